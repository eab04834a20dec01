"""The suites of an evaluation in a place: each is a function from a `Bench` to the figures of one
question and the rows of its contact sheet.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from distill.data.blocks.island import Island
from distill.evaluate import scores
from distill.evaluate.against import localise, reprojected, warped_lookup
from distill.evaluate.cases import PathCase
from distill.evaluate.generate import generate
from distill.evaluate.knowable import earlier_latents, knowable
from distill.evaluate.place_cases import SMALL_TURN, Ground
from distill.metrics import correlation, psnr, sharpness, to_unit
from worldmodel.camera import FRAMES_PER_LATENT
from worldmodel.errors import UserError
from worldmodel.rollout import RolloutConfig
from worldmodel.worlds.world import World

MOMENTS = (10, 60, 300, 600)  # seconds of the atlas
RESTS = (10, 60)  # seconds at rest
TURNS = 30  # seconds of small turns
ROUTE = 30  # seconds of each route
LOCALISED = 60  # seconds before the frame whose pose is searched
CURVE = (*range(10, 60, 10), *range(60, 601, 30))  # seconds, of the plot
AROUND = 2  # latents up to a moment whose frames are scored
SHOWN = 4  # cases on a contact sheet

Row = tuple[str, np.ndarray]  # a label, pictures uint8 [n, H, W, 3]


@dataclass(frozen=True)
class Sheet:
    """A contact sheet: rows of pictures under column titles."""

    rows: list[Row]
    columns: list[str]


@dataclass(frozen=True)
class SuiteOptions:
    """The size of the suites. Raises UserError for a number that is too small."""

    cases: int = 48
    seconds: int = 600  # no walk is longer
    batch: int = 24  # cases generated together
    seed: int = 0
    mask: bool = False  # score what an earlier frame showed apart

    def __post_init__(self):
        for name, least in (("cases", 1), ("seconds", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"expected {name} of at least {least}, got {getattr(self, name)}")


class Bench:
    """Generates the walks of the suites in one place, as play does: the rollout, conditions from
    remembered frames, the streaming decoder. No rule of rest: every latent is generated.
    """

    def __init__(
        self,
        world: World,
        config: RolloutConfig,
        ground: Ground,
        options: SuiteOptions,
        spread: Callable = map,
    ):
        self.world = world
        self.config = config
        self.ground = ground
        self.options = options
        self.spread = spread
        self.per_second = world.config.fps / FRAMES_PER_LATENT

    def latents(self, seconds: float) -> int:
        """Latents in so many seconds, at least one."""
        return max(1, round(seconds * self.per_second))

    def moments(self, wanted: Sequence[int]) -> list[int]:
        """Those of `wanted` seconds that the walks reach, or the end of the walks."""
        most = self.options.seconds
        return [second for second in wanted if second <= most] or [most]

    def film(
        self, cases: Sequence[PathCase], kept: Sequence[int], label: str
    ) -> dict[int, np.ndarray]:
        """The frames of the latents `kept` of generated walks, each uint8 [B, n, H, W, 3]."""
        return self.film_from(cases, self.first(cases), kept, label)

    def first(self, cases: Sequence[PathCase]) -> np.ndarray:
        """The pictures that the walks begin with, uint8 [B, H, W, 3]."""
        return self.ground.first_pictures(np.stack([case.c2w[0] for case in cases]))

    def film_from(
        self, cases: Sequence[PathCase], first: np.ndarray, kept: Sequence[int], label: str
    ) -> dict[int, np.ndarray]:
        """As `film`, with given first pictures."""
        wanted = set(kept)
        last = max(wanted)
        parts: dict[int, list[np.ndarray]] = {latent: [] for latent in sorted(wanted)}
        size = self.options.batch
        for start in range(0, len(cases), size):
            batch = cases[start : start + size]
            frames = generate(
                self.world,
                self.config,
                first[start : start + size],
                np.stack([case.latents[: last + 1] for case in batch]),
                [self.ground.prompt] * len(batch),
                self.options.seed + start,
                label,
                self.ground.place,
            )
            for latent, pictures in enumerate(frames):
                if latent in wanted:
                    parts[latent].append(pictures)
        return {latent: np.concatenate(films) for latent, films in parts.items()}

    # -------------------- the walks that several suites share

    @cached_property
    def walks(self) -> list[PathCase]:
        """The random walks of the atlas."""
        longest = max(self.moments(MOMENTS))
        return self.ground.walks(self.options.cases, self.latents(longest))

    @cached_property
    def walked(self) -> dict[int, np.ndarray]:
        """Their generated frames around the moments, and at the times of the curve."""
        last = max(self.moments(MOMENTS))
        kept = {self.latents(second) for second in CURVE if second <= last}
        for second in self.moments(MOMENTS):
            kept |= set(self.around(second))
        return self.film(self.walks, sorted(kept), "atlas")

    def around(self, second: int) -> list[int]:
        """The latents whose frames are scored at a moment."""
        end = self.latents(second)
        return list(range(max(1, end - AROUND + 1), end + 1))

    def at(self, second: int) -> tuple[np.ndarray, np.ndarray]:
        """Generated and true frames of the walks around a moment, uint8 [B, n, H, W, 3]."""
        around = self.around(second)
        frames = np.concatenate([self.walked[latent] for latent in around], 1)
        span = slice(FRAMES_PER_LATENT * (around[0] - 1) + 1, FRAMES_PER_LATENT * around[-1] + 1)
        return frames, self.ground.truth([case.c2w[span] for case in self.walks])

    def pose_at(self, second: int) -> np.ndarray:
        """Poses [B, 4, 4] of the walks at a moment."""
        return np.stack([case.latents[self.latents(second)] for case in self.walks])


# -------------------- suites


def rest(bench: Bench) -> tuple[dict, Sheet | None]:
    """The camera rests, or turns a little to and fro: what is left of the first frame."""
    figures = {}
    seconds = bench.moments(RESTS)
    ends = [bench.latents(second) for second in seconds]
    cases = bench.ground.rests(bench.options.cases, ends[-1])
    film = bench.film(cases, [0, *ends], "rest")
    first = film[0][:, -1]
    for second, end in zip(seconds, ends, strict=True):
        figures[f"{second} s"] = _kept(first, film[end][:, -1])
    rows = [(f"rest {n}", np.stack([film[k][n, -1] for k in (0, *ends)])) for n in _shown(cases)]
    sheet = Sheet(rows, ["first", *(f"{second} s" for second in seconds)])
    turns = bench.latents(min(TURNS, bench.options.seconds))
    period = len(SMALL_TURN)
    returns = range(period, turns + 1, period)
    if returns:
        cases = bench.ground.small_turns(bench.options.cases, turns)
        film = bench.film(cases, [0, *returns], "small turns")
        figures["small turns"] = _small_turns(film, returns)
    return figures, sheet


def atlas(bench: Bench) -> tuple[dict, Sheet | None]:
    """PSNR, correlation and sharpness where random walks have come to, against the truth; places
    never filmed are left to `unfilmed`.
    """
    figures = {}
    shown = {}
    for second in bench.moments(MOMENTS):
        frames, true = bench.at(second)
        seen = ~bench.ground.unfilmed(bench.pose_at(second))
        figures[f"{second} s"] = _against(frames[seen], true[seen])
        if bench.options.mask:
            figures[f"{second} s"]["knowable"] = _masked(bench, second, frames[:, -1], true[:, -1])
        shown[second] = (frames[:, -1], true[:, -1])
    figures["curve"] = list(_curve(bench))
    rows = []
    for case in _shown(bench.walks):
        rows.append((f"truth {case}", np.stack([true[case] for _, true in shown.values()])))
        rows.append((f"generated {case}", np.stack([ours[case] for ours, _ in shown.values()])))
    return figures, Sheet(rows, [f"{second} s" for second in shown])


def returning(bench: Bench) -> tuple[dict, Sheet | None]:
    """Leave and return: the share of the possible gain, see `scores.leave_and_return`."""
    cases = bench.ground.returns(bench.options.cases)
    moments = sorted({0} | {c.away for c in cases} | {c.back for c in cases})
    film = bench.film(cases, moments, "return")
    spots = [(0, case.away, case.back) for case in cases]
    ours = np.stack([[film[k][n, -1] for k in three] for n, three in enumerate(spots)])
    true = bench.ground.truth([case.latents[list(t)] for case, t in zip(cases, spots, strict=True)])
    short = [PathCase(case.kind, case.latents[list(t)], 1, 2) for case, t in zip(cases, spots)]
    figures = {}
    rows = []
    for kind in dict.fromkeys(case.kind for case in short):
        chosen = [n for n, case in enumerate(short) if case.kind == kind]
        entry = _returned(ours[chosen], true[chosen], [short[n] for n in chosen])
        figures[kind] = entry
        for n in chosen[: SHOWN // 2]:
            rows += [(f"truth, {kind}", true[n]), (f"generated, {kind}", ours[n])]
    return figures, Sheet(rows, ["start", "away", "return"])


def routes(bench: Bench) -> tuple[dict, Sheet | None]:
    """One pose reached by two walks: generated against generated, and against other poses."""
    latents = bench.latents(min(ROUTE, bench.options.seconds))
    there, back = bench.ground.routes(bench.options.cases, latents)
    one = bench.film(there, [latents], "one route")[latents][:, -1]
    other = bench.film(back, [latents], "other route")[latents][:, -1]
    table = np.stack(
        [psnr(to_unit(one[n : n + 1]).expand(len(other), -1, -1, -1), to_unit(other)).numpy()
         for n in range(len(one))]
    )  # fmt: skip
    same = np.diag(table)
    apart = table[~np.eye(len(table), dtype=bool)]
    figures = {"seconds": latents / bench.per_second, "same pose": statistics(same)}
    if len(apart):
        figures["other poses"] = statistics(apart.reshape(len(table), -1).mean(1))
        figures["other poses"] |= {
            f"p{share}": _number(np.percentile(apart, share)) for share in (10, 50, 90)
        }
        nearest = table.argmax(1) == np.arange(len(table))
        figures["same pose is the most similar"] = statistics(nearest)
    rows = [(f"pose {n}", np.stack([one[n], other[n]])) for n in _shown(there)]
    return figures, Sheet(rows, ["one route", "other route"])


def lookup(bench: Bench) -> tuple[dict, Sheet | None]:
    """Against what needs no network: the nearest remembered frame, warped by the best homography,
    and the condition as it is.
    """
    second = bench.moments(MOMENTS)[0]
    frames, true = (film[:, -1] for film in bench.at(second))
    poses = bench.pose_at(second)
    seen = np.flatnonzero(~bench.ground.unfilmed(poses))
    views = bench.ground.views
    count = bench.world.config.views
    if not len(seen):
        return {"skipped": "no walk ended in filmed ground; take more --cases"}, None
    size = true.shape[1:3]
    films = {
        "truth": true[seen],
        "generated": frames[seen],
        "lookup": np.stack([warped_lookup(views, poses[n], true[n]) for n in seen]),
        "reprojected": np.stack([reprojected(views, count, poses[n], size) for n in seen]),
    }
    target = to_unit(films["truth"])
    clear = {name: psnr(to_unit(film), target).numpy() for name, film in films.items()}
    figures = {name: statistics(clear[name]) for name in ("generated", "lookup", "reprojected")}
    figures["generated - lookup"] = statistics(clear["generated"] - clear["lookup"])
    figures["generated - reprojected"] = statistics(clear["generated"] - clear["reprojected"])
    figures["seconds"] = second
    rows = [(f"case {n}", np.stack([film[n] for film in films.values()])) for n in _shown(seen)]
    return figures, Sheet(rows, list(films))


def localising(bench: Bench) -> tuple[dict, Sheet | None]:
    """From where a generated frame looks to be taken, after a minute of walking."""
    second = bench.moments([s for s in MOMENTS if s <= LOCALISED])[-1]
    frames = bench.at(second)[0][:, -1]
    poses = bench.pose_at(second)
    seen = np.flatnonzero(~bench.ground.unfilmed(poses))
    lens = bench.world.config.intrinsics
    jobs = [
        (frames[n], poses[n], bench.ground.scene, lens, [bench.options.seed, 7, int(n)])
        for n in seen
    ]
    errors = np.array(list(bench.spread(_localised, jobs))).reshape(-1, 2)
    if not len(errors):
        return {"skipped": "no walk ended in filmed ground; take more --cases"}, None
    figures = {"seconds": second}
    for name, values in zip(("units", "degrees"), errors.T, strict=True):
        figures[name] = {"median": _number(np.median(values)), **statistics(values)}
    return figures, None


def unfilmed(bench: Bench) -> tuple[dict, Sheet | None]:
    """Walks that end in what the footage omits, apart from the atlas' that end elsewhere."""
    if not isinstance(bench.ground.scene, Island):
        return {"skipped": "the footage of this place omits nothing that its scene names"}, None
    second = bench.moments(MOMENTS)[0]
    end = bench.latents(second)
    cases = bench.ground.unfilmed_walks(bench.options.cases, end)
    if not cases:
        return {"skipped": f"no walk of {second} s ended in what was not filmed"}, None
    film = bench.film(cases, bench.around(second), "unfilmed")
    frames = np.concatenate(list(film.values()), 1)
    count = frames.shape[1]
    true = bench.ground.truth([case.c2w[-count:] for case in cases])
    figures = {"seconds": second, "unfilmed": _against(frames, true)}
    ours, truth = bench.at(second)
    seen = ~bench.ground.unfilmed(bench.pose_at(second))
    figures["filmed"] = _against(ours[seen], truth[seen])
    rows = [(f"case {n}", np.stack([true[n, -1], frames[n, -1]])) for n in _shown(cases)]
    return figures, Sheet(rows, ["truth", "generated"])


# name -> (suite, whether it needs the truth)
SUITES: dict[str, tuple[Callable, bool]] = {
    "rest": (rest, False),
    "return": (returning, True),
    "atlas": (atlas, True),
    "routes": (routes, False),
    "lookup": (lookup, True),
    "localise": (localising, True),
    "unfilmed": (unfilmed, True),
}


# -------------------- figures


def statistics(values) -> dict:
    """Mean, standard error and number of values; None where there are too few."""
    values = np.asarray(values, float)
    count = len(values)
    return {
        "mean": _number(values.mean()) if count else None,
        "se": _number(values.std(ddof=1) / count**0.5) if count > 1 else None,
        "cases": count,
    }


def _against(frames: np.ndarray, true: np.ndarray) -> dict:
    """Generated and true frames uint8 [B, n, H, W, 3] -> PSNR, correlation, sharpness ratio, each
    the mean over a case's frames.
    """
    if not len(frames):
        return {name: statistics([]) for name in ("psnr", "correlation", "sharpness")}
    ours = to_unit(frames.reshape(-1, *frames.shape[2:]))
    target = to_unit(true.reshape(-1, *true.shape[2:]))
    by_case = lambda values: values.view(len(frames), -1).mean(1).numpy()  # noqa: E731
    ratio = by_case(sharpness(ours)) / np.maximum(by_case(sharpness(target)), 1e-9)
    return {
        "psnr": statistics(by_case(psnr(ours, target))),
        "correlation": statistics(by_case(correlation(ours, target))),
        "sharpness": statistics(ratio),
    }


def _kept(first: np.ndarray, last: np.ndarray) -> dict:
    """Last frames against first ones, uint8 [B, H, W, 3]."""
    before = to_unit(first)
    after = to_unit(last)
    ratio = sharpness(after) / sharpness(before).clamp_min(1e-9)
    return {"psnr": statistics(psnr(after, before)), "sharpness": statistics(ratio)}


def _small_turns(film: dict[int, np.ndarray], returns: Sequence[int]) -> dict:
    """PSNR against the first frame at every return: of all, and of the worst return."""
    first = to_unit(film[0][:, -1])
    table = np.stack([psnr(to_unit(film[k][:, -1]), first).numpy() for k in returns], 1)
    worst = int(table.mean(0).argmin())
    return {
        "returns": len(returns),
        "psnr": statistics(table.mean(1)),
        "worst return": {"number": worst + 1, "psnr": statistics(table[:, worst])},
        "last return": {"psnr": statistics(table[:, -1])},
        "by return": [_number(value) for value in table.mean(0)],
    }


def _returned(ours: np.ndarray, true: np.ndarray, cases: list[PathCase]) -> dict:
    """The entry of one path, with the standard error of the share (jackknife)."""
    (entry,) = scores.leave_and_return(ours, true, cases)
    count = len(cases)
    shares = []
    for left_out in range(count if count > 1 else 0):
        kept = [n for n in range(count) if n != left_out]
        (part,) = scores.leave_and_return(ours[kept], true[kept], [cases[n] for n in kept])
        shares.append(part["share"])
    known = len(shares) > 1 and None not in shares
    error = np.std(shares) * (count - 1) ** 0.5 if known else None
    entry = {name: value for name, value in entry.items() if name != "path"}
    return entry | {"share_se": None if error is None else _number(error)}


def _curve(bench: Bench) -> Iterator[dict]:
    """PSNR of the last frame at the times of the plot."""
    last = max(bench.moments(MOMENTS))
    for second in [second for second in CURVE if second <= last] or [last]:
        latent = bench.latents(second)
        poses = np.stack([case.latents[latent] for case in bench.walks])
        seen = ~bench.ground.unfilmed(poses)
        if seen.any():
            frames = bench.walked[latent][seen, -1]
            true = bench.ground.truth(list(poses[seen, None]))[:, 0]
            yield {"seconds": second, **statistics(psnr(to_unit(frames), to_unit(true)))}


def _masked(bench: Bench, second: int, frames: np.ndarray, true: np.ndarray) -> dict:
    """Scores by what was shown before, see `masks`; remembered frames count to both."""
    ground = bench.ground
    views = ground.views
    latent = bench.latents(second)
    parts = []
    for case, ours, target in zip(bench.walks, frames, true, strict=True):
        past = case.latents[earlier_latents(latent)]
        pose = case.latents[latent]
        poses = np.concatenate([views.c2w, past])
        depths = np.concatenate([views.depth.float().numpy(), ground.depth(past)])
        depth = ground.depth(pose[None])[0]
        found = masks(depth, pose, views.intrinsics, poses, depths, len(views) + 1)
        parts.append({name: masked_scores(ours, target, *pair) for name, pair in found.items()})
    return merged(parts)


def masks(
    depth: np.ndarray, pose: np.ndarray, intrinsics, earlier, earlier_depth, given: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`knowable` from the first `given` earlier frames, which are true (the start picture and what
    is remembered), and from all, of which the later ones are generated: "given" and "earlier".
    """
    return {
        "given": knowable(depth, pose, intrinsics, earlier[:given], earlier_depth[:given]),
        "earlier": knowable(depth, pose, intrinsics, earlier, earlier_depth),
    }


def masked_scores(ours: np.ndarray, true: np.ndarray, mask: np.ndarray, solid: np.ndarray) -> dict:
    """PSNR and share of the knowable pixels, the other solid ones, and the sky of one frame uint8
    [H, W, 3]; the masks bool [h, w] may be smaller. None for a PSNR of no pixel.
    """
    step = ours.shape[0] // mask.shape[0]
    error = np.square((ours.astype(float) - true) / 255).mean(-1)
    parts = {"knowable": mask, "other": solid & ~mask, "sky": ~solid}
    entry = {}
    for name, part in parts.items():
        chosen = np.kron(part, np.ones((step, step), bool))
        error_here = error[chosen].mean() if chosen.any() else None
        clear = None if error_here is None else -10 * np.log10(max(error_here, 1e-6))
        entry[name] = {"psnr": clear, "share": float(part.mean())}
    return entry


def merged(parts: list[dict]) -> dict:
    """The statistics of the `masked_scores` of several frames, by mask."""
    entry = {}
    for mask in parts[0]:
        entry[mask] = {}
        for name in parts[0][mask]:
            scored = [part[mask][name] for part in parts]
            clear = [score["psnr"] for score in scored if score["psnr"] is not None]
            share = [score["share"] for score in scored]
            entry[mask][name] = {"psnr": statistics(clear), "share": statistics(share)}
    return entry


def _localised(job: tuple) -> tuple[float, float]:
    return localise(*job)


def _shown(cases: Sequence) -> range:
    return range(min(SHOWN, len(cases)))


def _number(value) -> float:
    return round(float(value), 4)

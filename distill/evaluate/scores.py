"""Scores of generated frames: from frames and ground truth of a batch of cases to plain numbers for
one row.
"""

import numpy as np
import torch

from distill.evaluate.cases import Case
from distill.metrics import (
    correlation,
    correlation_table,
    distinct_poses,
    flow_magnitude,
    flow_signs,
    psnr,
    retrieve,
    saturation,
    sharpness,
    ssim,
    to_unit,
)
from worldmodel.camera import FRAMES_PER_LATENT

# units and degrees below which two poses show one view: a fifth and a twentieth of a latent's
# motion
SAME_VIEW = (0.02, 0.5)
SHARPNESS_RANGE = (0.7, 1.4)  # required ratio generated / ground truth
RETRIEVAL_SHARE = 0.8  # required, right or neighbour
RETRIEVAL_LATENT = 8  # where that is required
FLOW_START = 5  # frames in which the momentum builds up


def fidelity(
    generated: np.ndarray, true: np.ndarray, cases: list[Case], horizons: list[int]
) -> dict[str, dict]:
    """Scores at each horizon. generated, true: uint8 [B, F, H, W, 3], one frame per latent, latent
    0 given.
    """
    candidates = [distinct_poses(case.latents, *SAME_VIEW) for case in cases]
    targets = [to_unit(frames) for frames in true]
    scores = {}
    for horizon in horizons:
        image = to_unit(generated[:, horizon])
        target = to_unit(true[:, horizon])
        sharp = sharpness(image)
        sharp_target = sharpness(target)
        ratio = (sharp / sharp_target.clamp_min(1e-9)).numpy()
        related = correlation(image, target)
        found = [
            retrieve(correlation_table(image[i : i + 1], targets[i])[0].numpy(), horizon, views)
            for i, views in enumerate(candidates)
            # only clips with enough motion to distinguish views
            if views.size > len(views.group) / 2 and views.group[horizon] != views.group[0]
        ]
        scores[str(horizon)] = {
            "psnr": _number(psnr(image, target).mean()),
            "ssim": _number(ssim(image, target).mean()),
            "correlation": _number(related.mean()),
            "correlation_by_case": [_number(value) for value in related],
            "sharpness": _number(sharp.sum() / sharp_target.sum()),
            "sharpness_p10": _number(np.percentile(ratio, 10)),
            "sharpness_p90": _number(np.percentile(ratio, 90)),
            "retrieval": {
                "clips": len(found),
                **{
                    name: found.count(name) / len(found) if found else None
                    for name in ("right", "neighbour", "other")
                },
            },
        }
    return scores


def leave_and_return(generated: np.ndarray, true: np.ndarray, cases: list[Case]) -> list[dict]:
    """One entry per path. generated, true: uint8 [B, F, H, W, 3].

    With S, R, A the similarity of the generated frame at the start, on return and away from it to
    the ground truth's first frame: gain = R - A, share = mean(R - A) / mean(S - A) (R2M-Bench's
    MemoryGain and NMR). A frozen picture gains 0; share is None where S - A is too small.
    """
    entries = []
    for path in dict.fromkeys(case.kind for case in cases):
        chosen = [index for index, case in enumerate(cases) if case.kind == path]
        reference = to_unit(true[chosen, 0])
        positions = {
            "start": [0] * len(chosen),
            "away": [cases[i].away for i in chosen],
            "return": [cases[i].back for i in chosen],
        }
        seen = {name: to_unit(generated[chosen, latents]) for name, latents in positions.items()}
        like = {
            name: correlation(frames, reference).double().mean() for name, frames in seen.items()
        }
        clear = {name: psnr(frames, reference).double().mean() for name, frames in seen.items()}
        possible = like["start"] - like["away"]
        entries.append(
            {
                "path": path,
                "cases": len(chosen),
                "start": _number(like["start"]),
                "return": _number(like["return"]),
                "away": _number(like["away"]),
                "gain": _number(like["return"] - like["away"]),
                "share": _number((like["return"] - like["away"]) / possible)
                if possible > 0.02
                else None,
                "psnr_gain": _number(clear["return"] - clear["away"]),
            }
        )
    return entries


def flow_directions(frames: np.ndarray, cases: list[Case]) -> dict[str, float]:
    """Share of the cases of each kind whose picture moves in the right direction. frames: uint8
    [B, T, H, W, 3].
    """
    right: dict[str, list[bool]] = {}
    for film, case in zip(frames, cases, strict=True):
        signs = flow_signs(film[FLOW_START:])
        holds = {
            "right": signs.right < 0,
            "left": signs.right > 0,
            "forward": signs.growth > 0,
            "back": signs.growth < 0,
        }
        right.setdefault(case.kind, []).append(bool(holds[case.kind]))
    return {kind: float(np.mean(values)) for kind, values in right.items()}


def drift(generated: np.ndarray, true: np.ndarray, fps: float, spans: int = 6) -> dict:
    """Sharpness and saturation of a long walk: mean of each span over that of the first frame, for
    generated frames and ground truth.

    generated, true: uint8 [B, F, H, W, 3], one frame per latent.
    """
    latents = generated.shape[1]
    edges = np.linspace(1, latents, min(spans, latents - 1) + 1).round().astype(int)
    entry = {"seconds": [_number(FRAMES_PER_LATENT * (edge - 1) / fps) for edge in edges[1:]]}
    for name, measure in (("sharpness", sharpness), ("saturation", saturation)):
        for suffix, frames in (("", generated), ("_of_truth", true)):
            values = torch.stack(
                [measure(to_unit(column)) for column in frames.swapaxes(0, 1)]
            ).mean(1)
            start = values[0].clamp_min(1e-9)
            entry[name + suffix] = [
                _number(values[a:b].mean() / start) for a, b in zip(edges, edges[1:], strict=False)
            ]
    return entry


def lateness(early: np.ndarray, late: np.ndarray) -> dict[str, float]:
    """Sharpness, saturation and motion of late frames over those of early frames, both uint8 [B, T,
    H, W, 3].
    """
    measures = {
        "sharpness": lambda frames: float(
            sharpness(to_unit(frames.reshape(-1, *frames.shape[2:]))).mean()
        ),
        "saturation": lambda frames: float(
            saturation(to_unit(frames.reshape(-1, *frames.shape[2:]))).mean()
        ),
        "flow": lambda frames: float(np.mean([flow_magnitude(film) for film in frames])),
    }
    return {
        name: _number(measure(late) / max(measure(early), 1e-9))
        for name, measure in measures.items()
    }


def thresholds(rows: list[dict], baseline: str, reference: str | None) -> list[dict]:
    """The requirements on the embedded world, for every row of generated frames.

    baseline: name of the frozen row. reference: name of the row that distillation must exceed, or
    None. A margin is clear when the mean of the paired differences is above two standard errors at
    every horizon.
    """
    by_name = {row["name"]: row["horizons"] for row in rows}
    found = []
    for row in (row for row in rows if row["generated"]):
        scores = row["horizons"]
        ratios = [score["sharpness"] for score in scores.values()]
        low, high = SHARPNESS_RANGE
        found.append(
            _threshold(
                row,
                f"sharpness {low}-{high} at every horizon",
                f"{min(ratios):.2f}-{max(ratios):.2f}",
                low <= min(ratios) and max(ratios) <= high,
            )
        )
        latent = max((h for h in scores if int(h) <= RETRIEVAL_LATENT), key=int)
        retrieval = scores[latent]["retrieval"]
        if retrieval["clips"]:
            near = round(retrieval["right"] + retrieval["neighbour"], 6)  # 0.1 + 0.7 is below 0.8
            found.append(
                _threshold(
                    row,
                    f"retrieval at {latent} latents right or neighbour in {RETRIEVAL_SHARE:.0%}",
                    f"{near:.0%}",
                    near >= RETRIEVAL_SHARE,
                )
            )
        for other in (name for name in (baseline, reference) if name and name != row["name"]):
            value, clear = _margin(scores, by_name[other])
            found.append(
                _threshold(
                    row,
                    f"correlation above '{other}' at every horizon, by over 2 standard errors",
                    value,
                    clear,
                )
            )
    return found


def _margin(scores: dict, other: dict) -> tuple[str, bool]:
    """The smallest lead over `other`, in its own standard errors, as text; whether every lead is
    clear.
    """
    leads = []
    for horizon, score in scores.items():
        pairs = zip(
            score["correlation_by_case"], other[horizon]["correlation_by_case"], strict=True
        )
        differences = np.array([a - b for a, b in pairs])
        error = (
            differences.std(ddof=1) / len(differences) ** 0.5 if len(differences) > 1 else np.inf
        )
        leads.append((differences.mean() - 2 * error, differences.mean(), error, horizon))
    worst, mean, error, horizon = min(leads)
    return f"{mean:+.3f} ± {error:.3f} at {horizon}", bool(worst > 0)


def _threshold(row: dict, text: str, value: str, passed: bool) -> dict:
    return {"name": row["name"], "threshold": text, "value": value, "passed": bool(passed)}


def _number(value) -> float:
    return round(float(value), 4)

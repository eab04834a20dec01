"""`python -m worldmodel benchmark`: how fast a world plays here, as JSON; several variants can take
turns in one run.

Times are of `Session.step`, which is what the client calls: sampling the pose to having the frames.
The first latents, while the window fills and the machine warms up, are not counted. Its parts are
timed where the work is done (`machine.PartClock`).
"""

import argparse
import gc
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from worldmodel import cli as command_line
from worldmodel.bench.flops import clean_flops, pass_flops
from worldmodel.bench.machine import (
    PartClock,
    PeakMemory,
    Span,
    describe_commit,
    describe_machine,
    matmul_rate,
    spread,
)
from worldmodel.bench.random_world import AUTOENCODERS, SHAPES, Shape, random_config, random_world
from worldmodel.bench.reference_loop import PublishedLoop
from worldmodel.camera import FRAMES_PER_LATENT, MotionStep, parse_trajectory
from worldmodel.config import as_dict, build, parse_yaml
from worldmodel.device import fast_dtype, open_device, synchronize
from worldmodel.engine.engine import EngineOptions
from worldmodel.errors import UserError, first_line
from worldmodel.pacing import key_to_pixel
from worldmodel.rollout import RolloutConfig, with_steps
from worldmodel.session import Session
from worldmodel.worlds.world import World

ROUNDS = 8  # turns that each variant gets
MOST_PUBLISHED = 900  # latents: the public rotary tables end at 1,024
PARTS = ("network", "clean", "decode")
ENGINE_KEYS = (
    "compile",
    "weights",
    "memory",
)  # what a variant may choose besides rollout options; and `autoencoder`


@dataclass(frozen=True)
class Variant:
    """One of the ways to play that are compared; `settings` are `key=value` of the rollout, the
    rest decides how the world is opened.
    """

    written: tuple[str, ...]  # all that was asked for
    settings: tuple[str, ...]
    engine: EngineOptions
    autoencoder: str | None  # of a random world; None = its own

    @property
    def opened(self) -> tuple[EngineOptions, str | None]:
        """What worlds can differ in before they are played."""
        return self.engine, self.autoencoder

    @classmethod
    def parse(cls, written: list[str], engine: EngineOptions, autoencoder: str | None) -> "Variant":
        """`key=value` texts over what holds for all variants."""
        keys = {text: text.partition("=")[0] for text in written}
        own = {
            key: text.partition("=")[2]
            for text, key in keys.items()
            if key in (*ENGINE_KEYS, "autoencoder")
        }
        autoencoder = own.pop("autoencoder", autoencoder)
        if autoencoder not in (None, *AUTOENCODERS):
            raise UserError(
                f"autoencoder must be one of {', '.join(AUTOENCODERS)}, got {autoencoder!r}."
            )
        settings = tuple(
            text for text, key in keys.items() if key not in (*ENGINE_KEYS, "autoencoder")
        )
        return cls(tuple(written), settings, replace(engine, **own), autoencoder)


Opener = Callable[
    [EngineOptions, str | None], World
]  # the engine's options, the autoencoder of a random world


def apply_settings(world: World, settings: tuple[str, ...]) -> World:
    """`world` with other rollout options, each `key=value` in YAML; `steps` may be a number of
    steps or a list.
    """
    rollout = as_dict(world.config.rollout)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"expected key=value such as window=8, got {setting!r}")
        try:
            value = parse_yaml(value)
        except UserError:
            raise UserError(f"expected a value in YAML such as window=8, got {setting!r}") from None
        if key == "steps" and isinstance(value, int):
            value = with_steps(world.config.rollout, value).steps
        rollout[key] = value
    return replace(
        world, config=replace(world.config, rollout=build(RolloutConfig, rollout, "--set"))
    )


class Walk:
    """A session that walks on and turns, and the times it took."""

    def __init__(self, world: World, variant: Variant, seed: int, published: bool = False):
        self.variant = variant
        self.settings = [*(["as published"] if published else []), *variant.written]
        self.world = apply_settings(world, variant.settings)
        asked = self.world.config.rollout
        self.rollout = self.world.engine.tier.rollout(
            asked, asked.history
        )  # what memory leaves of it
        envelope = self.world.config.envelope
        step = MotionStep(envelope.forward, envelope.yaw)
        self._path = parse_trajectory("w*6, w+l*4, l*4, w*4, w+j*6, j*2", step, envelope.style)[1:]
        self._seed = seed
        self._published = published
        self._clock = PartClock(world.device)
        self._session: Session | None = None
        self._done = 0
        self._base = np.eye(4)
        self.peak = 0  # bytes
        self.notices: list[str] = []
        self.fault = ""  # why there are no times
        self.chunks: list[
            tuple[float, float, list[Span]]
        ] = []  # ms until the next could begin, ms to the first frames, parts

    def _begin(self) -> None:
        """Makes the session and puts the clock around what it calls; play itself knows of none."""
        self._session = session = Session(self.world, seed=self._seed, history=self.rollout.history)
        if self._published:
            text = self.world.prompts[session.prompt][None]
            (rows, columns) = self.world.latent_size
            session.rollout = PublishedLoop(
                self.world.transformer,
                text,
                self.rollout,
                height=rows,
                width=columns,
                device=self.world.device,
            )
        rollout = session.rollout
        decoder = session._decoder
        clock = self._clock
        rollout.step = clock.timed("network", rollout.step)
        clean = (
            "commit" if self._published else "settle"
        )  # the published loop cleans within its step
        setattr(rollout, clean, clock.timed("clean", getattr(rollout, clean)))
        decoder.frames = clock.timed_pieces("decode", decoder.frames)

    def chunk(self) -> None:
        """One more chunk. On CUDA nobody waits for its clean pass but the next one, as in play."""
        poses = np.stack([self._next_pose() for _ in range(self.rollout.chunk)])
        moments = [time.perf_counter()]
        shown = self._session.step(
            poses, lambda _: moments.append(time.perf_counter())
        )  # the first frames are there
        self._session.settle()
        moments.append(time.perf_counter())
        self.notices += [shown.notice] if shown.notice else []
        ready, total = ((moment - moments[0]) * 1e3 for moment in moments[1:])
        self.chunks.append((total, ready, self._clock.take()))

    def warm_up(self, memory: PeakMemory, weights: int) -> None:
        """Fills the window, waits for the compiler, and sees what two more chunks take of memory;
        `weights`: bytes of its networks.
        """
        others = memory.now() - weights
        self._begin()
        for _ in range(self.rollout.window // self.rollout.chunk + 2):
            self.chunk()
        if self.world.engine.compiled:
            self.world.engine.compiled.wait()
        memory.reset()
        for _ in range(2):
            self.chunk()
        synchronize(self.world.device)
        self.peak = memory.peak() - others
        self.chunks.clear()

    def give_up(self, error: Exception) -> None:
        """Ends a walk that the device's memory does not hold: the others go on."""
        self.fault = first_line(error)
        self._session = None
        self.chunks.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _next_pose(self) -> np.ndarray:
        place = self._done % len(self._path)
        pose = self._base @ self._path[place]
        self._done += 1
        if place == len(self._path) - 1:
            self._base = pose
        return pose

    def report(self, rate: dict | None) -> dict:
        """Figures of all chunks since the warm-up. rate: of `matmul_rate`, to compare with."""
        if self.fault:
            return {
                "settings": self.settings,
                "rollout": as_dict(self.rollout),
                "fault": self.fault,
            }
        chunk = self.rollout.chunk
        frames = chunk * FRAMES_PER_LATENT
        totals, ready = (np.array([times[place] for times in self.chunks]) for place in range(2))
        parts = self._parts()
        period = frames / self.world.config.fps * 1e3
        report = {
            "settings": self.settings,
            "rollout": as_dict(self.rollout),
            "engine": self.world.engine.describe(self.rollout),
            "chunks": len(totals),
            "ms_per_latent": {
                part: spread(values / chunk) for part, values in {"total": totals, **parts}.items()
            },
            "frames_per_second": round(frames / (float(np.median(totals)) / 1e3), 2),
            "real_time_factor": round(period / float(np.median(totals)), 3),
            "sampled_to_ready_ms": spread(ready),
            "key_to_pixel_ms": spread(key_to_pixel(ready, totals, period), "p95"),
            "peak_memory_mib": round(self.peak / 2**20),
        }
        if self.notices:
            report["notices"] = self.notices
        if rate:
            report["transformer"] = self._speed(parts, rate["tflop_per_second"]["median"])
        return report

    def _parts(self) -> dict[str, np.ndarray]:
        """ms a chunk of each of PARTS."""
        parts = {part: np.zeros(len(self.chunks)) for part in PARTS}
        for place, (_, _, spans) in enumerate(self.chunks):
            for span in spans:
                parts[span.part][place] += span.milliseconds
        if self._published:
            parts["network"] -= parts["clean"]
        return parts

    def _speed(self, parts: dict[str, np.ndarray], rate: float) -> dict:
        """What the transformer multiplies, and what share that is of `rate`, 10^12 operations a
        second.
        """
        config = self.world.transformer.config
        rollout = self.rollout
        rows, columns = (
            cells // patch
            for cells, patch in zip(self.world.latent_size, config.patch_size[1:], strict=True)
        )
        amounts = (
            rollout.chunk * rows * columns,
            rollout.window * rows * columns,
            self.world.prompts.shape[0],
        )
        flops = {
            "network": len(rollout.steps) * pass_flops(config, *amounts),
            "clean": clean_flops(config, *amounts),
        }
        flops = {
            name: (2 if rollout.guidance != 1 else 1) * count for name, count in flops.items()
        }  # the dream without prompt goes along
        times = {name: parts[name] for name in flops}
        flops["both"] = sum(flops.values())
        times["both"] = times["network"] + times["clean"]
        if rollout.merge_clean:  # one time for both
            flops = {"both": flops["both"]}
            times = {"both": times["both"]}
        rates = {name: flops[name] / float(np.median(times[name])) / 1e9 for name in flops}
        return {
            "gflop_per_latent": {
                name: round(count / rollout.chunk / 1e9, 6) for name, count in flops.items()
            },
            "tflop_per_second": {name: round(value, 6) for name, value in rates.items()},
            "share_of_matmul_rate": {name: round(value / rate, 3) for name, value in rates.items()},
        }


def take_turns(walks: list[Walk], latents: int) -> None:
    """Gives the walks turns (A B A B ...) until each has made `latents` latents, warmed up as they
    are.
    """
    goals = [-(-latents // walk.rollout.chunk) for walk in walks]
    with tqdm(total=sum(goals), desc="benchmark", unit="chunk", leave=False) as bar:
        for turn in range(ROUNDS):
            for walk, goal in zip(walks, goals, strict=True):
                with _memory_permitting(walk):
                    while not walk.fault and len(walk.chunks) < -(-goal * (turn + 1) // ROUNDS):
                        walk.chunk()
                        bar.update()
                synchronize(walk.world.device)


@contextmanager
def _memory_permitting(walk: Walk) -> Iterator[None]:
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        walk.give_up(error)


def measure(
    open_world: Opener,
    variants: list[Variant],
    device: torch.device,
    latents: int,
    seed: int = 0,
    as_published: bool = False,
    rate: bool = False,
) -> dict:
    """The report that the command prints: one entry a variant, those after the first with the ratio
    of the medians to its.

    open_world: opens the world as a variant wants it. as_published: the first variant is also
    driven by `PublishedLoop`, before all
    others. rate: say what share of the device's matmul rate the transformer reaches.
    """
    memory = PeakMemory(device)
    machine = describe_machine(device)
    worlds = {}
    for variant in variants:
        if variant.opened not in worlds:
            before = memory.now()
            worlds[variant.opened] = open_world(*variant.opened), memory.now() - before
    world, _ = worlds[variants[0].opened]
    peak_rate = matmul_rate(device, world.dtype) if rate else None
    walks = [Walk(worlds[variant.opened][0], variant, seed) for variant in variants]
    if as_published:
        walks.insert(0, Walk(world, variants[0], seed, published=True))
    with torch.inference_mode():
        for walk in tqdm(walks, desc="warming up", unit="variant", leave=False):
            with _memory_permitting(walk):
                walk.warm_up(memory, worlds[walk.variant.opened][1])
        take_turns(walks, latents)
    if all(walk.fault for walk in walks):
        raise MemoryError(walks[0].fault)
    result = {
        "command": f"python -m worldmodel benchmark {shlex.join(sys.argv[1:])}",
        "commit": describe_commit(),
        "machine": machine,
        "world": world.config.name,
        "size": [world.config.height, world.config.width],
        "device": str(world.device),
        "dtype": str(world.dtype).removeprefix("torch."),
        "engine": world.engine.describe(walks[0].rollout),
        "parameters": {
            name: sum(p.numel() for p in network.parameters())
            for name, network in (
                ("transformer", world.transformer),
                ("autoencoder", world.autoencoder),
            )
        },
        "latents": latents,
        "seed": seed,
        "matmul_rate": peak_rate,
        "peak_memory_mib": round(max(memory.peak(), *(walk.peak for walk in walks)) / 2**20),
        "variants": [walk.report(peak_rate) for walk in walks],
    }
    first, *others = result["variants"]
    for other in others if not first.get("fault") else ():
        if not other.get("fault"):
            other["ratio"] = _ratio(first, other)
    return result | (
        {"ratio": others[0]["ratio"]} if len(others) == 1 and "ratio" in others[0] else {}
    )


def _ratio(first: dict, other: dict) -> dict[str, float]:
    """Time of the first / time of the other, part by part: above 1, the other is faster."""
    times = {
        part: (first["ms_per_latent"][part]["median"], other["ms_per_latent"][part]["median"])
        for part in ("total", *PARTS)
    }
    return {
        part: round(a / b, 3) for part, (a, b) in times.items() if min(a, b) > 0.1
    }  # ms; less is a part that one of them skips


def parser() -> command_line.Parser:
    """The options, one line each."""
    made = command_line.Parser(
        prog="python -m worldmodel benchmark", description=__doc__.splitlines()[0]
    )
    made.add_argument(
        "--world",
        type=Path,
        help="folder or name of the world (default: blocks); with --random-weights also a name of "
        "configs/worlds, for size, steps, window and motion",
    )
    made.add_argument(
        "--random-weights",
        metavar="SHAPE",
        help=f"random weights, no files needed: {', '.join(SHAPES)} or LAYERSxWIDTHxHEADS[xFFN]",
    )
    made.add_argument(
        "--size",
        type=_size,
        help="HEIGHTxWIDTH of the random world in pixels (default: the world's, or the shape's)",
    )
    made.add_argument(
        "--autoencoder",
        choices=AUTOENCODERS,
        help="of the random world: tiny (default), Wan2.1's own, or none: figures without decoding",
    )
    made.add_argument(
        "--latents", type=int, default=64, help="latents measured for each variant (default: 64)"
    )
    made.add_argument(
        "--threads",
        type=command_line.threads,
        help="threads of torch (default: torch's own choice)",
    )
    made.add_argument(
        "--steps", type=command_line.positive, help="denoising steps a chunk (default: the world's)"
    )
    made.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help=(
            f"rollout options, e.g. window=8 merge_clean=true, or {', '.join(ENGINE_KEYS)}, "
            "autoencoder of this variant alone"
        ),
    )
    made.add_argument(
        "--versus",
        nargs="+",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="the same of another variant, may be repeated; all take turns",
    )
    made.add_argument(
        "--as-published",
        action="store_true",
        help="first the same network driven as the public loops do it: the ratio is the gain",
    )
    made.add_argument(
        "--rate",
        action="store_true",
        help="also what share of the device's matmul rate the transformer reaches",
    )
    made.add_argument(
        "--memory",
        default="auto",
        help="auto, or plan for a GPU with 40, 24, 16, 12 or 8 GB (default: auto)",
    )
    made.add_argument("--weights", default="auto", help="auto, full, int8 or fp8 (default: auto)")
    made.add_argument(
        "--compile",
        default="auto",
        help="compiled blocks: auto (on CUDA), on (with CUDA graphs there), off (default: auto)",
    )
    made.add_argument("--attention", default="auto", help="auto, torch or fa3 (default: auto)")
    made.add_argument(
        "--device", default="cpu", help="where to compute: cpu, cuda, ... (default: cpu)"
    )
    made.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the networks (default: the fast one)",
    )
    made.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    made.add_argument("--output", type=Path, help="also write the JSON into this file")
    return made


def run(args: argparse.Namespace) -> dict:
    """Opens the world and measures it; ValueError for options that cannot be honoured."""
    if args.latents < ROUNDS:
        raise UserError(
            f"expected at least {ROUNDS} --latents, got {args.latents}: each variant takes "
            f"{ROUNDS} turns"
        )
    if args.as_published and args.latents > MOST_PUBLISHED:
        raise UserError(
            f"expected at most {MOST_PUBLISHED} --latents, where --as-published's tables end, got "
            f"{args.latents}"
        )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = open_device(args.device)
    engine = EngineOptions(args.memory, args.weights, args.compile, args.attention)
    steps = [f"steps={args.steps}"] if args.steps else []
    variants = [
        Variant.parse(steps + written, engine, args.autoencoder)
        for written in (args.set, *args.versus)
    ]
    opener = _opener(args, variants, device)
    return measure(opener, variants, device, args.latents, args.seed, args.as_published, args.rate)


def _opener(args: argparse.Namespace, variants: list[Variant], device: torch.device) -> Opener:
    """How the world is opened that the options describe."""
    dtype = getattr(torch, args.dtype) if args.dtype else fast_dtype(device)
    if args.random_weights:
        shape = Shape.parse(args.random_weights)
        config = random_config(shape, args.world, args.size)
        return lambda engine, autoencoder: _of_one_tier(
            random_world(shape, config, autoencoder or "tiny", device, dtype).fitted(engine)
        )
    if args.size or any(variant.autoencoder for variant in variants):
        raise UserError(
            "expected --size and --autoencoder with --random-weights alone: a stored world has "
            "its own"
        )
    return lambda engine, _: _of_one_tier(
        World.from_pretrained(args.world or "blocks", device, dtype, engine)
    )


def _of_one_tier(world: World) -> World:
    """A world that does not go down a tier when memory is full: what is measured is what is
    reported.
    """
    world.engine.tiers = world.engine.tiers[:1]
    return world


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(
            f"expected HEIGHTxWIDTH in pixels such as 96x160, got {text!r}"
        )
    return int(height), int(width)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status (see `command_line.run`)."""
    return command_line.report("benchmark", parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())

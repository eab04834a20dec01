"""`python -m worldmodel.benchmark`: how fast a world plays here, as JSON; two variants can take turns in one run.

Times are of `Session.step`, which is what the client calls: sampling the pose to having the frames. The first latents,
while the window fills and the machine warms up, are not counted.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm import tqdm

from worldmodel import command_line
from worldmodel.as_published import PublishedLoop
from worldmodel.autoencoder import FRAMES_PER_LATENT, TinyAutoencoder
from worldmodel.camera import MotionStep, parse_trajectory
from worldmodel.controls import Envelope
from worldmodel.engine import EngineOptions
from worldmodel.options import as_dict, build
from worldmodel.rollout import RolloutConfig, with_steps
from worldmodel.session import Session
from worldmodel.text import PromptBook
from worldmodel.transformer import CausalWanTransformer
from worldmodel.world import PromptConfig, World, WorldConfig, fast_dtype, open_device

ROUNDS = 8  # turns that each variant gets
PRESSES = 32  # simulated key presses a chunk, evenly spread
MOST_PUBLISHED = 900  # latents: the public rotary tables end at 1,024
MARGIN = 6.0  # ms between a chunk being ready and being due, as the client keeps it
PARTS = ("network", "clean", "decode")


@dataclass(frozen=True)
class Shape:
    """A world of random weights: as fast as a trained one of this shape."""

    layers: int
    width: int  # channels; the feed-forward layer has four times as many
    heads: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """`LAYERSxWIDTHxHEADS`, for example 8x256x4."""
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
            raise ValueError(f"expected LAYERSxWIDTHxHEADS such as 8x256x4, got {text!r}")
        shape = cls(*map(int, parts))
        if shape.width % (4 * shape.heads):
            raise ValueError(
                f"expected a width that is a multiple of 4 x {shape.heads} heads, got {shape.width} in {text!r}"
            )
        return shape


def random_world(shape: Shape, height: int, width: int, device: torch.device, dtype: torch.dtype) -> World:
    """A world in memory with random weights, without start images; height and width in pixels, multiples of 16."""
    if height % 16 or width % 16 or min(height, width) < 16:
        raise ValueError(f"expected a picture size in multiples of 16 pixels, got {height}x{width}")
    torch.manual_seed(0)
    transformer = CausalWanTransformer(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.width // shape.heads,
        num_layers=shape.layers,
        ffn_dim=4 * shape.width,
        text_dim=64,
    )
    autoencoder = TinyAutoencoder(
        encoder_widths=(32, 32, 64, 128),
        encoder_blocks=(1, 2, 2),
        decoder_widths=(160, 96, 48, 48),
        decoder_blocks=(3, 2, 1),
        strides=(1, 2, 2),
        patch_size=2,
    )
    config = WorldConfig(
        name="random",
        title="Random weights",
        height=height,
        width=width,
        fps=16.0,
        intrinsics=(0.5, 0.8333, 0.5, 0.5),
        envelope=Envelope(),
        rollout=RolloutConfig(),
        prompts=PromptConfig(default="random"),
    )
    parts = (torch.nn.Module.to(network.eval().requires_grad_(False), dtype) for network in (transformer, autoencoder))
    return World(Path("random"), config, *parts, PromptBook({"random": torch.randn(4, 64)}), device, dtype)


def apply_settings(world: World, settings: list[str]) -> World:
    """`world` with other rollout options, each `key=value` in YAML; `steps` may be a number of steps or a list."""
    rollout = as_dict(world.config.rollout)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"expected key=value such as window=8, got {setting!r}")
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"expected a value in YAML such as window=8, got {setting!r}") from None
        if key == "steps" and isinstance(value, int):
            value = with_steps(world.config.rollout, value).steps
        rollout[key] = value
    return replace(world, config=replace(world.config, rollout=build(RolloutConfig, rollout, "--set")))


class Walk:
    """A session that walks on and turns, and the times it took."""

    def __init__(self, world: World, settings: list[str], seed: int, published: bool = False):
        self.settings = ["as published", *settings] if published else settings
        self.world = apply_settings(world, settings)
        asked = self.world.config.rollout
        self.rollout = self.world.engine.tier.rollout(asked, asked.history)  # what memory leaves of it
        envelope = self.world.config.envelope
        step = MotionStep(envelope.forward, envelope.yaw)
        self._path = parse_trajectory("w*6, w+l*4, l*4, w*4, w+j*6, j*2", step, envelope.style)[1:]
        self._session = Session(self.world, seed=seed)
        self._published = published
        if published:
            rows, columns = self.world.latent_size
            text = self.world.prompts[self._session.prompt][None]
            self._session.rollout = PublishedLoop(
                self.world.transformer, text, self.rollout, height=rows, width=columns, device=world.device
            )
        self._done = 0
        self._base = np.eye(4)
        self.times: list[dict[str, float]] = []  # ms a chunk

    def chunk(self) -> None:
        """One more chunk."""
        poses = np.stack([self._next_pose() for _ in range(self.rollout.chunk)])
        moments = [time.perf_counter()]

        def pass_by(*_) -> None:
            moments.append(time.perf_counter())

        result = self._session.step(poses, pass_by)  # passes by when the first frames are there
        pass_by()
        self._session.settle()  # the clean pass of this chunk
        pass_by()
        ready, shown, total = ((moment - moments[0]) * 1e3 for moment in moments[1:])
        # the published loop cleans before it shows: its own clock tells how long
        parts = {**result.timings, "clean": self._session.rollout.timings["clean"] if self._published else total - shown}
        self.times.append({"total": total, "ready": ready, **{part: parts[part] for part in PARTS}})

    def _next_pose(self) -> np.ndarray:
        place = self._done % len(self._path)
        pose = self._base @ self._path[place]
        self._done += 1
        if place == len(self._path) - 1:
            self._base = pose
        return pose

    def report(self) -> dict:
        """Figures of all chunks since `times` was last cleared."""
        chunk = self.rollout.chunk
        frames = chunk * FRAMES_PER_LATENT
        totals, ready = (np.array([times[name] for times in self.times]) for name in ("total", "ready"))
        period = frames / self.world.config.fps * 1e3
        return {
            "settings": self.settings,
            "rollout": as_dict(self.rollout),
            "chunks": len(totals),
            "ms_per_latent": {
                part: spread(np.array([times[part] for times in self.times]) / chunk) for part in ("total", *PARTS)
            },
            "frames_per_second": round(frames / (float(np.median(totals)) / 1e3), 2),
            "real_time_factor": round(period / float(np.median(totals)), 3),
            "sampled_to_ready_ms": spread(ready),
            "key_to_pixel_ms": spread(key_to_pixel(ready, totals, period), "p95"),
        }


def key_to_pixel(durations: np.ndarray, busy: np.ndarray, period: float) -> np.ndarray:
    """Simulated time from a key press to the first frame that shows it, ms, for presses spread evenly over the run.

    The client's rule: a chunk starts its usual duration (the second longest of the last twelve) and `MARGIN` before its
    first frame is due, at most one period early, and reads the input at that moment; a late chunk moves the clock.

    Args:
        durations: [n] ms from the start of a chunk until its first frames were ready, n >= 2.
        busy: [n] ms from the start of a chunk until the next can start (its clean pass comes after its frames).
        period: ms for which the frames of one chunk are on the screen.
    """
    free, due = 0.0, 0.0  # of the chunk before: when all was done, when it was shown
    before, delays = 0.0, []
    for index, duration in enumerate(durations):
        recent = sorted(durations[max(0, index - 12) : index])
        lead = min((recent[-2:][0] if recent else period) + MARGIN, period)
        sampled = max(free, due + period - lead)
        free = sampled + busy[index]
        due = max(sampled + duration, due + period)
        presses = before + (np.arange(PRESSES) + 0.5) / PRESSES * (sampled - before)
        delays.append(due - presses)
        before = sampled
    return np.concatenate(delays[1:])


def spread(values: np.ndarray, high: str = "p90") -> dict[str, float]:
    """Median, 10th and 90th (or 95th) percentile."""
    low, middle, top = np.percentile(values, (10, 50, int(high[1:])))
    return {"median": round(float(middle), 3), "p10": round(float(low), 3), high: round(float(top), 3)}


def take_turns(walks: list[Walk], latents: int) -> None:
    """Fills every walk's window, then gives them turns (A B A B ...) until each has made `latents` latents."""
    total = sum(-(-latents // walk.rollout.chunk) + walk.rollout.window // walk.rollout.chunk + 2 for walk in walks)
    with tqdm(total=total, desc="benchmark", unit="chunk", leave=False) as bar:
        for walk in walks:
            for _ in range(walk.rollout.window // walk.rollout.chunk + 2):
                walk.chunk()
                bar.update()
            if walk.world.engine.compiled:
                walk.world.engine.compiled.wait()
            walk.times.clear()
        for turn in range(ROUNDS):
            for walk in walks:
                goal = -(-latents // walk.rollout.chunk)
                while len(walk.times) < -(-goal * (turn + 1) // ROUNDS):
                    walk.chunk()
                    bar.update()


def describe_machine(device: torch.device) -> dict:
    """Hardware and versions that times depend on."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # above 1 at the start: not idle
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe_commit() -> str:
    """The checkout that this package was imported from, `-dirty` when changed; "unknown" outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure(world: World, variants: list[list[str]], latents: int, seed: int = 0, as_published: bool = False) -> dict:
    """The report that the command prints: one entry a variant, and with two of them the ratio of their medians.

    as_published: the first variant is also driven by `PublishedLoop`, before all others.
    """
    machine = describe_machine(world.device)
    walks = [Walk(world, settings, seed) for settings in variants]
    if as_published:
        walks.insert(0, Walk(world, variants[0], seed, published=True))
    with torch.inference_mode():
        take_turns(walks, latents)
    reports = [walk.report() for walk in walks]
    result = {
        "command": f"python -m worldmodel.benchmark {shlex.join(sys.argv[1:])}",
        "commit": describe_commit(),
        "machine": machine,
        "world": world.config.name,
        "size": [world.config.height, world.config.width],
        "device": str(world.device),
        "dtype": str(world.dtype).removeprefix("torch."),
        "engine": world.engine.describe(walks[0].rollout),
        "parameters": {
            name: sum(p.numel() for p in network.parameters())
            for name, network in (("transformer", world.transformer), ("autoencoder", world.autoencoder))
        },
        "latents": latents,
        "seed": seed,
        "variants": reports,
    }
    if world.device.type == "cuda":
        result["peak_memory_mib"] = round(torch.cuda.max_memory_allocated(world.device) / 2**20)
    if len(reports) == 2:
        first, second = (report["ms_per_latent"] for report in reports)
        result["ratio"] = {  # time of the first / time of the second: above 1, the second is faster
            part: round(first[part]["median"] / second[part]["median"], 3)
            for part in first
            if min(first[part]["median"], second[part]["median"]) > 0.1  # ms; less is a part that one of them skips
        }
    return result


def parser() -> command_line.Parser:
    """The options, one line each."""
    made = command_line.Parser(prog="python -m worldmodel.benchmark", description=__doc__.splitlines()[0])
    made.add_argument("--world", type=Path, default=Path("assets/worlds/blocks"), help="folder of the world")
    made.add_argument("--random-weights", metavar="LxWxH", help="a random world of LAYERSxWIDTHxHEADS, no files needed")
    made.add_argument("--size", default="96x160", help="HEIGHTxWIDTH of the random world in pixels (default: 96x160)")
    made.add_argument("--latents", type=int, default=64, help="latents measured for each variant (default: 64)")
    made.add_argument("--threads", type=command_line.threads, help="threads of torch (default: torch's own choice)")
    made.add_argument("--steps", type=command_line.positive, help="denoising steps a chunk (default: the world's)")
    made.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="rollout options, e.g. window=8 merge_clean=true"
    )
    made.add_argument(
        "--versus", nargs="+", metavar="KEY=VALUE", help="rollout options of a second variant; both take turns"
    )
    made.add_argument(
        "--as-published", action="store_true", help="first the same network driven as the public loops do it: the ratio is the gain"
    )
    made.add_argument("--memory", default="auto", help="auto, or plan for a GPU with 40, 24, 16, 12 or 8 GB (default: auto)")
    made.add_argument("--weights", default="auto", help="auto, full, int8 or fp8 (default: auto)")
    made.add_argument("--compile", default="auto", help="compiled blocks: auto (on CUDA), on or off (default: auto)")
    made.add_argument("--attention", default="auto", help="auto, torch or fa3 (default: auto)")
    made.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, ... (default: cpu)")
    made.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="type of the networks (default: the fast one)"
    )
    made.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    made.add_argument("--output", type=Path, help="also write the JSON into this file")
    return made


def run(args: argparse.Namespace) -> dict:
    """Opens the world and measures it; ValueError for options that cannot be honoured."""
    if args.latents < ROUNDS:
        raise ValueError(f"expected at least {ROUNDS} --latents, got {args.latents}: each variant takes {ROUNDS} turns")
    if args.as_published and (args.versus or args.latents > MOST_PUBLISHED):
        wrong = "--versus" if args.versus else f"--latents {args.latents}"
        raise ValueError(f"expected --as-published alone and at most {MOST_PUBLISHED} latents, where the public tables end, got {wrong}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    device, engine = open_device(args.device), EngineOptions(args.memory, args.weights, args.compile, args.attention)
    if args.random_weights:
        height, _, width = args.size.partition("x")
        if not (height.isdecimal() and width.isdecimal()):
            raise ValueError(f"expected --size as HEIGHTxWIDTH such as 96x160, got {args.size!r}")
        shape = Shape.parse(args.random_weights)
        world = random_world(shape, int(height), int(width), device, dtype or fast_dtype(device)).fitted(engine)
    else:
        world = World.from_pretrained(args.world, device, dtype, engine)
    steps = [f"steps={args.steps}"] if args.steps else []
    variants = [steps + args.set] + ([steps + args.versus] if args.versus else [])
    return measure(world, variants, args.latents, args.seed, args.as_published)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status (see `command_line.run`)."""
    return command_line.run("benchmark", lambda: _report(parser().parse_args(argv)))


def _report(args: argparse.Namespace) -> None:
    text = json.dumps(run(args), indent=1)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

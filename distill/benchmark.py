"""`python -m distill benchmark CONFIG`: seconds per sample of a recipe's stages, as JSON.

The stages and the training step are those of `python -m distill train`. Clips and weights are
random, so no files are read, and none are written. Steps with and without gradient checkpointing
alternate on the same networks; one that does not fit into memory has an `error` in the report.
"""

import argparse
import gc
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from distill.config import Recipe, load_recipe, make_recipe
from distill.parallel import Processes
from distill.stages import STAGES
from distill.stages.stage import TransformerStage, new_transformer
from distill.train import Batches, train_step
from worldmodel import cli
from worldmodel.bench.machine import (
    PeakMemory,
    command_line,
    describe_commit,
    describe_machine,
    spread,
)
from worldmodel.bench.random_world import SHAPES, Shape, draw_weights
from worldmodel.camera import MotionStep, invert, parse_trajectory
from worldmodel.config import as_dict
from worldmodel.device import open_device, synchronize
from worldmodel.errors import UserError, first_line
from worldmodel.files import check_output
from worldmodel.models.transformer import CausalWanTransformer

# without those whose samples are more than latents
STAGE_NAMES = tuple(name for name in STAGES if name not in ("autoencoder", "places"))
CAPTIONS = ("a meadow", "dunes", "snow", "night")
CELL = 8  # pixels of a latent cell's side
FRAMES = 20  # latents of a published shape's sample: whole chunks of 1, 2, 4 and 5
WARM_UP = 2  # steps of each variant that are not counted


@dataclass(frozen=True)
class Caption:
    """The part of a clip that stages read before training."""

    caption: str


class RandomClips(Dataset):
    """Items as those of `LatentClips`: random latents, a walk and a caption, all a function of the
    index.
    """

    def __init__(self, frames: int, size: tuple[int, int, int]):
        self.size = (size[0], frames, *size[1:])
        self.channels = size[0]
        self.clips = [Caption(text) for text in CAPTIONS]
        poses = parse_trajectory(f"w*{frames}", MotionStep(0.08, 3.0), "fly")[:frames]
        self._viewmats = torch.from_numpy(invert(poses)).float()

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict:
        return {
            "latents": torch.randn(self.size, generator=torch.Generator().manual_seed(index)),
            "viewmats": self._viewmats,
            "intrinsics": torch.tensor([0.505, 0.898, 0.5, 0.5]),
            "caption": CAPTIONS[index % len(CAPTIONS)],
        }


def random_stage(
    name: str, recipe: Recipe, cells: tuple[int, int], device: torch.device
) -> TransformerStage:
    """Build the stage `name` on random clips of `cells` rows and columns, with random weights in
    all its networks.
    """

    class RandomStage(STAGES[name]):
        """The stage, reading no files."""

        def open_clips(self, frames: int) -> RandomClips:
            return RandomClips(frames, (recipe.model.channels, *cells))

        def load(self, source: str) -> CausalWanTransformer:
            with torch.device("meta"):
                network = new_transformer(recipe)
            return draw_weights(network, device, torch.float32)

    return RandomStage(recipe, device)


class TimedStage:
    """One stage, with or without gradient checkpointing: the seconds of its steps and of their
    parts.
    """

    def __init__(
        self, stage: TransformerStage, recipe: Recipe, device: torch.device, checkpointing: bool
    ):
        self.stage = stage
        self.recipe = recipe
        self.device = device
        self.checkpointing = checkpointing
        self.memory = PeakMemory(device)
        self.peak = 0
        self.error = ""  # why there are no times
        # seconds of a step: "total", and those of every network that learns
        self.steps: list[dict[str, float]] = []

    def step(self, number: int, batch: dict) -> None:
        """Take a training step; when memory is full, set `error` and free the step's memory."""
        for network in self.stage.modules.values():
            network.gradient_checkpointing = self.checkpointing
        self.memory.reset()
        try:
            self.steps.append(self._seconds(number, batch))
            self.peak = max(self.peak, self.memory.peak())
        except (MemoryError, torch.OutOfMemoryError) as error:
            self.error = first_line(error)
        # not in the `except`: the error's traceback holds the tensors of the step
        if self.error:
            for optimizer in self.stage.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            _free_memory(self.device)

    def _seconds(self, number: int, batch: dict) -> dict[str, float]:
        run = self.recipe.run
        seconds = {}
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=run.precision == "bfloat16"
        )
        processes = Processes(0, 1)
        generator = torch.Generator(self.device)
        generator.manual_seed(processes.seed(run.seed, number))
        synchronize(self.device)
        begin = time.perf_counter()
        now = begin
        for name, *_ in train_step(
            self.stage,
            batch,
            number,
            generator,
            autocast,
            self.recipe.optimizer.grad_clip,
            processes,
        ):
            synchronize(self.device)
            before = now
            now = time.perf_counter()
            seconds[name] = seconds.get(name, 0.0) + now - before
        return {"total": now - begin, **seconds}

    def report(self, name: str) -> dict:
        """Figures per sample, of all steps since `steps` was last cleared."""
        batch = self.stage.config.batch
        report = {"stage": name, "gradient_checkpointing": self.checkpointing, "batch": batch}
        if self.error:
            return {**report, "error": self.error}
        parts = {
            part: np.array([step[part] for step in self.steps]) / batch for part in self.steps[0]
        }
        return {
            **report,
            "steps": len(self.steps),
            "seconds_per_sample": {
                part: spread(values, digits=4) for part, values in parts.items()
            },
            "peak_memory_mib": round(self.peak / 2**20),
        }


def time_stage(
    name: str,
    recipe: Recipe,
    cells: tuple[int, int],
    device: torch.device,
    steps: int,
    checkpointing: tuple[bool, ...],
) -> list[dict]:
    """Time `steps` steps of each variant, alternating and after a warm-up.

    Returns one report per variant.
    """
    stage = random_stage(name, recipe, cells, device)
    variants = [TimedStage(stage, recipe, device, flag) for flag in checkpointing]
    count = stage.config.batch * stage.batches
    with Batches(stage, count, Processes(0, 1), recipe.run.seed, 0) as batches:
        for number in tqdm(range(steps + WARM_UP), desc=name, unit="step", leave=False):
            batch = next(batches)
            for variant in variants:
                if number == WARM_UP:
                    variant.steps.clear()
                if not variant.error:
                    variant.step(number, batch)
    return [variant.report(name) for variant in variants]


def _free_memory(device: torch.device) -> None:
    """Return memory that is no longer referenced."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def published_recipe(name: str, overrides: list[str]) -> Recipe:
    """A recipe for a published shape: bfloat16, one sample per step, whole clips, AdamW as at that
    scale.
    """
    shape: Shape = SHAPES[name]
    values = {
        "run": {"precision": "bfloat16"},
        "data": {"frames": FRAMES},
        "model": {
            "layers": shape.layers,
            "heads": shape.heads,
            "head_dim": shape.width // shape.heads,
            "ffn_dim": shape.ffn_dim,
            "text_dim": shape.text_dim,
            "text_length": shape.text_length,
        },
        "optimizer": {"betas": [0.0, 0.999]},
        **{stage: {"batch": 1} for stage in STAGE_NAMES},
    }
    values["dmd"]["window"] = FRAMES
    return make_recipe(values, overrides, name)


def random_recipe(recipe: Recipe) -> Recipe:
    """The same recipe without the files that it names; every network is random, so `init` is a
    name only.
    """
    return replace(
        recipe,
        data=replace(recipe.data, root="random clips", prompts="", autoencoder=""),
        consistency=replace(recipe.consistency, init="random"),
        dmd=replace(recipe.dmd, init="random", real="random"),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run` to `parser`."""
    parser.add_argument(
        "config",
        help=f"recipe, a YAML file such as configs/blocks/cpu.yaml, or {', '.join(SHAPES)}",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override, e.g. dmd.batch=2; may be repeated",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGE_NAMES,
        default=STAGE_NAMES,
        help="stages to time (default: all)",
    )
    parser.add_argument(
        "--size", help="HEIGHTxWIDTH in pixels (default: 96x160; of a published shape 480x832)"
    )
    parser.add_argument(
        "--steps",
        type=cli.positive,
        default=8,
        help="steps measured for each variant (default: 8)",
    )
    parser.add_argument(
        "--checkpointing",
        choices=("both", "on", "off"),
        default="both",
        help="gradient checkpointing (default: both, alternating)",
    )
    parser.add_argument("--output", type=Path, help="also write the JSON into this file")


def run(args: argparse.Namespace) -> None:
    """Time the stages and print the report.

    Raises UserError for options that cannot be honoured, MemoryError when no stage fits.
    """
    if args.output is not None:
        check_output(args.output)
    cli.print_report({"command": command_line("distill"), **_measure(args)}, args.output)


def _measure(args: argparse.Namespace) -> dict:
    name = args.config.lower()
    published = name in SHAPES
    recipe = published_recipe(name, args.set) if published else load_recipe(args.config, args.set)
    recipe = random_recipe(recipe)
    size = _size(args.size or ("480x832" if published else "96x160"), recipe)
    device = _device(recipe.run.device)
    flags = {"both": (False, True), "on": (True,), "off": (False,)}[args.checkpointing]
    torch.manual_seed(recipe.run.seed)
    machine = describe_machine(device)
    reports = []
    for stage in args.stages:
        try:
            cells = size[0] // CELL, size[1] // CELL
            reports += time_stage(stage, recipe, cells, device, args.steps, flags)
        except (MemoryError, torch.OutOfMemoryError) as error:  # not even its networks fit
            reports.append({"stage": stage, "error": first_line(error)})
        _free_memory(device)  # a stage's networks before those of the next
    if all("error" in report for report in reports):
        raise MemoryError(reports[0]["error"])
    return {
        "commit": describe_commit(),
        "machine": machine,
        "device": str(device),
        "recipe": args.config,
        "size": list(size),
        "precision": recipe.run.precision,
        "frames": recipe.data.frames,
        "model": as_dict(recipe.model),
        "options": {stage: as_dict(getattr(recipe, stage)) for stage in args.stages},
        "stages": reports,
    }


def _size(text: str, recipe: Recipe) -> tuple[int, int]:
    """Height and width in pixels, whole patches of the recipe's model."""
    height, _, width = text.partition("x")
    sides = [CELL * patch for patch in recipe.model.patch[1:]]
    for number, side in zip((height, width), sides, strict=True):
        if not number.isdecimal() or not int(number) or int(number) % side:
            raise UserError(
                f"expected --size as HEIGHTxWIDTH in multiples of {sides[0]} and {sides[1]} "
                f"pixels, got {text!r}"
            )
    return int(height), int(width)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return open_device(name)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status (see `cli.run`)."""
    parser = cli.Parser(prog="python -m distill benchmark", description=__doc__.splitlines()[0])
    add_arguments(parser)
    return cli.run("benchmark", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())

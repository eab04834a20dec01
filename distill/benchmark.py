"""`python -m distill.benchmark CONFIG`: seconds a sample of the stages of a recipe, or of a
published shape, as JSON.

The stages and the training step are those of `python -m distill train`; clips and weights are
random, so nothing is needed and nothing is left. With and without gradient checkpointing take turns
on the same networks; one that memory does not hold is told as such.
"""

import argparse
import gc
import importlib
import shlex
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
from worldmodel import cli as command_line
from worldmodel.bench.machine import PeakMemory, describe_commit, describe_machine, spread
from worldmodel.bench.random_world import SHAPES, Shape, draw_weights
from worldmodel.camera import MotionStep, invert, parse_trajectory
from worldmodel.config import as_dict
from worldmodel.device import open_device, synchronize
from worldmodel.errors import UserError, first_line
from worldmodel.models.transformer import CausalWanTransformer

TIMED = tuple(name for name in STAGES if name != "autoencoder")
CAPTIONS = ("a meadow", "dunes", "snow", "night")
CELL = 8  # pixels of a side to one latent cell
FRAMES = 20  # latents of a published shape's sample: whole chunks of 1, 2, 4 and 5


@dataclass(frozen=True)
class Caption:
    """All that a stage wants to know of a clip beforehand."""

    caption: str


class RandomClips(Dataset):
    """Random latents, a walk and a caption, in the form of `LatentClips`' items: item i is a
    function of i.
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
    """The stage `name` as training makes it, on random clips of `cells` rows and columns, all its
    networks with random weights.
    """
    module, kind = STAGES[name].split(":")
    real = getattr(importlib.import_module(module), kind)

    class RandomStage(real):
        """The stage, with nothing read from the disk."""

        def open_clips(self, frames: int) -> RandomClips:
            return RandomClips(frames, (recipe.model.channels, *cells))

        def load(self, source: str) -> CausalWanTransformer:
            with torch.device("meta"):
                network = new_transformer(recipe)
            return draw_weights(network, device, torch.float32)

    return RandomStage(recipe, device)


class Timed:
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
        self.fault = ""
        self.steps: list[
            dict[str, float]
        ] = []  # seconds a step: "total", and every network that learns

    def step(self, number: int, batch: dict) -> None:
        """Takes a training step, or ends in `fault` when memory is full."""
        for network in self.stage.modules.values():
            network.gradient_checkpointing = self.checkpointing
        self.memory.reset()
        try:
            self.steps.append(self._seconds(number, batch))
            self.peak = max(self.peak, self.memory.peak())
        except (MemoryError, torch.OutOfMemoryError) as error:
            self.fault = first_line(error)
        if self.fault:  # what the step held is let go before the others go on
            for optimizer in self.stage.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            _let_go(self.device)

    def _seconds(self, number: int, batch: dict) -> dict[str, float]:
        run = self.recipe.run
        spent = {}
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=run.precision == "bfloat16"
        )
        processes = Processes(0, 1)
        generator = torch.Generator(self.device)
        generator.manual_seed(processes.seed(run.seed, number))
        synchronize(self.device)
        begin = now = time.perf_counter()
        for name, *_ in train_step(
            self.stage,
            batch,
            number,
            generator,
            autocast,
            self.recipe.optimiser.grad_clip,
            processes,
        ):
            synchronize(self.device)
            before = now
            now = time.perf_counter()
            spent[name] = spent.get(name, 0.0) + now - before
        return {"total": now - begin, **spent}

    def report(self, name: str) -> dict:
        """Figures of all steps since `steps` was last cleared, a sample."""
        made = {
            "stage": name,
            "gradient_checkpointing": self.checkpointing,
            "batch": self.stage.config.batch,
        }
        if self.fault:
            return {**made, "fault": self.fault}
        batch = self.stage.config.batch
        parts = {
            part: np.array([step[part] for step in self.steps]) / batch for part in self.steps[0]
        }
        return {
            **made,
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
    """Two steps of each variant that are not counted, then `steps` that are, in turns; a report a
    variant.
    """
    stage = random_stage(name, recipe, cells, device)
    variants = [Timed(stage, recipe, device, flag) for flag in checkpointing]
    count = stage.config.batch * stage.batches
    with Batches(stage, count, Processes(0, 1), recipe.run.seed, 0) as batches:
        for number in tqdm(range(steps + 2), desc=name, unit="step", leave=False):
            batch = next(batches)
            for variant in variants:
                if number == 2:
                    variant.steps.clear()
                if not variant.fault:
                    variant.step(number, batch)
    return [variant.report(name) for variant in variants]


def _let_go(device: torch.device) -> None:
    """Gives memory back that nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def published_recipe(name: str, overrides: list[str]) -> Recipe:
    """Stages of a published shape as they are trained: bfloat16, one sample a step, whole clips,
    AdamW as at that scale.
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
        "optimiser": {"betas": [0.0, 0.999]},
        **{stage: {"batch": 1} for stage in TIMED},
    }
    values["dmd"]["window"] = FRAMES
    return make_recipe(values, overrides, name)


def random_recipe(recipe: Recipe) -> Recipe:
    """The same recipe without a file that it names; `init` stays only as a name, since every
    network is random.
    """
    return replace(
        recipe,
        data=replace(recipe.data, root="random clips", prompts="", autoencoder=""),
        consistency=replace(recipe.consistency, init="random"),
        dmd=replace(recipe.dmd, init="random", real="random"),
    )


def parser() -> command_line.Parser:
    """The options, one line each."""
    made = command_line.Parser(
        prog="python -m distill.benchmark", description=__doc__.splitlines()[0]
    )
    made.add_argument(
        "config",
        help=f"recipe, a YAML file such as configs/blocks/cpu.yaml, or {', '.join(SHAPES)}",
    )
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override, e.g. dmd.batch=2; may be repeated",
    )
    made.add_argument(
        "--stages", nargs="+", choices=TIMED, default=TIMED, help="stages to time (default: all)"
    )
    made.add_argument(
        "--size", help="HEIGHTxWIDTH in pixels (default: 96x160; of a published shape 480x832)"
    )
    made.add_argument(
        "--steps",
        type=command_line.positive,
        default=8,
        help="steps measured for each variant (default: 8)",
    )
    made.add_argument(
        "--checkpointing",
        choices=("both", "on", "off"),
        default="both",
        help="gradient checkpointing (default: both, in turns)",
    )
    made.add_argument("--output", type=Path, help="also write the JSON into this file")
    return made


def run(args: argparse.Namespace) -> dict:
    """Times the stages; ValueError for options that cannot be honoured, MemoryError when nothing
    fits.
    """
    published = args.config.lower() in SHAPES
    recipe = random_recipe(
        published_recipe(args.config.lower(), args.set)
        if published
        else load_recipe(args.config, args.set)
    )
    height, _, width = (args.size or ("480x832" if published else "96x160")).partition("x")
    sides = [CELL * patch for patch in recipe.model.patch[1:]]
    if not (height.isdecimal() and width.isdecimal()) or any(
        not int(n) or int(n) % side for n, side in zip((height, width), sides)
    ):
        raise UserError(
            f"expected --size as HEIGHTxWIDTH in multiples of {sides[0]} and {sides[1]} pixels, "
            f"got {args.size!r}"
        )
    cells = int(height) // CELL, int(width) // CELL
    name = (
        recipe.run.device
        if recipe.run.device != "auto"
        else "cuda"
        if torch.cuda.is_available()
        else "cpu"
    )
    device = open_device(name)
    flags = {"both": (False, True), "on": (True,), "off": (False,)}[args.checkpointing]
    torch.manual_seed(recipe.run.seed)
    machine = describe_machine(device)
    reports = []
    for stage in args.stages:
        try:
            reports += time_stage(stage, recipe, cells, device, args.steps, flags)
        except (MemoryError, torch.OutOfMemoryError) as error:  # not even its networks fit
            reports.append({"stage": stage, "fault": first_line(error)})
        _let_go(device)  # a stage's networks before those of the next
    if all("fault" in report for report in reports):
        raise MemoryError(reports[0]["fault"])
    return {
        "command": f"python -m distill.benchmark {shlex.join(sys.argv[1:])}",
        "commit": describe_commit(),
        "machine": machine,
        "device": str(device),
        "recipe": args.config,
        "size": [int(height), int(width)],
        "precision": recipe.run.precision,
        "frames": recipe.data.frames,
        "model": as_dict(recipe.model),
        "options": {stage: as_dict(getattr(recipe, stage)) for stage in args.stages},
        "stages": reports,
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status (see `command_line.run`)."""
    return command_line.report("benchmark", parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())

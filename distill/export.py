"""`python -m distill export`: trained networks -> a bundle that `play.py` opens, with start images
and a README.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from distill.config import Recipe, StageConfig, load_recipe
from distill.data.blocks.renderer import render
from distill.data.blocks.town import MOODS, Town
from distill.data.blocks.walker import Gait, Walker
from distill.data.clips import list_clips, read_meta
from distill.data.collect import FPS, CollectConfig
from distill.data.footage import Footage
from distill.evaluate.cases import held_out_town
from distill.evaluate.generate import load_transformer
from distill.evaluate.report import markdown, table
from distill.metrics import sharpness, to_unit
from distill.prompts import open_prompts
from worldmodel.bench.machine import describe_commit, describe_machine
from worldmodel.cli import print_line
from worldmodel.config import as_dict, build
from worldmodel.controls import Envelope
from worldmodel.errors import UserError
from worldmodel.files import check_output_folder, replacing_folder
from worldmodel.models.prompts import PromptBook
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.models.wan_autoencoder import Autoencoder
from worldmodel.rollout import RolloutConfig, with_steps
from worldmodel.worlds.config import PromptConfig, WorldConfig
from worldmodel.worlds.weights import open_autoencoder
from worldmodel.worlds.world import SHARD_SIZE, World, save_world

START_SEED = 7001  # of the towns and places of the start images
CANDIDATES = 4  # places of which the one with most to see becomes a start image
TITLE = "An endless town of blocks in four moods"


@dataclass(frozen=True)
class ExportOptions:
    """What a bundle is made of besides the networks."""

    images: int = 4  # start images a caption
    height: int | None = None  # pixels; None = as the footage
    width: int | None = None  # pixels; None = as the footage
    fps: float | None = None  # video frames a second; None = as the footage
    title: str | None = None  # a line for menus; None = what it was learned from
    envelope: tuple[str, ...] = ()  # AXIS=VALUE, instead of the footage's motion
    dtype: str = "bfloat16"  # of the stored weights
    steps: int | None = None  # denoising steps a chunk; None = the recipe's `dmd.denoise`
    sampler: str = "renoise"  # "euler" for a diffusion model that was not distilled
    seed: int = START_SEED  # of the start images

    def __post_init__(self):
        if self.images < 1 or self.seed < 0:
            raise UserError(
                f"expected at least one of --images and a --seed of at least 0, got {self.images} "
                f"and {self.seed}"
            )
        for name in ("height", "width", "fps"):
            value = vars(self)[name]
            if value is not None and not value > 0:
                raise UserError(f"expected --{name} above 0, got {value}")


@dataclass(frozen=True)
class Scenery:
    """What a world shows and how one moves in it: all of a bundle that the networks do not say."""

    title: str
    height: int  # pixels
    width: int  # pixels
    fps: float
    intrinsics: tuple[float, ...]
    envelope: Envelope
    licence: str
    images: dict[
        str, list[np.ndarray]
    ]  # start images uint8 [H, W, 3] by caption, the usual caption first
    default: str  # caption


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `export`."""
    default = ExportOptions()
    parser.add_argument(
        "--config", type=Path, required=True, help="recipe that the networks were trained with"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="the overrides it was trained with; may be repeated",
    )
    parser.add_argument(
        "--transformer",
        required=True,
        help="export folder, or the name of a stage of the recipe, e.g. dmd",
    )
    parser.add_argument(
        "--autoencoder", required=True, help="export folder, or `autoencoder` for the recipe's own"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="the bundle; an older one is replaced only by a complete one",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=default.images,
        help=f"start images of each caption (default: {default.images})",
    )
    parser.add_argument("--height", type=int, help="pixels (default: as the footage)")
    parser.add_argument("--width", type=int, help="pixels (default: as the footage)")
    parser.add_argument("--fps", type=float, help="video frames a second (default: as the footage)")
    parser.add_argument(
        "--title", help="a line for menus (default: what the world was learned from)"
    )
    parser.add_argument(
        "--envelope",
        nargs="*",
        default=[],
        metavar="AXIS=VALUE",
        help=(
            "motion a latent that the player may make, e.g. vertical=0 yaw=6 (default: what is "
            "common in the footage)"
        ),
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default=default.dtype,
        help=f"of the stored weights (default: {default.dtype})",
    )
    parser.add_argument(
        "--steps", type=int, help="denoising steps a chunk (default: the recipe's dmd.denoise)"
    )
    parser.add_argument(
        "--sampler",
        choices=("renoise", "euler"),
        default=default.sampler,
        help="euler for a model that was not distilled (default: renoise)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=default.seed,
        help=f"of the start images (default: {default.seed})",
    )
    parser.add_argument(
        "--stages",
        nargs="*",
        default=[],
        help="stages whose weights are kept in stages/, to compare with and to go on training from",
    )
    parser.add_argument(
        "--evaluation", type=Path, help="JSON of `evaluate`, whose tables go into the README"
    )
    parser.add_argument(
        "--hardware",
        help="what the networks were trained on, for the README (default: this machine)",
    )


def run(args: argparse.Namespace) -> None:
    """Makes the bundle; ValueError, and an older bundle stays, when anything is wrong."""
    options = ExportOptions(
        **{field.name: getattr(args, field.name) for field in fields(ExportOptions)}
    )
    if args.output.exists() and not (args.output / "world.yaml").is_file():
        raise UserError(
            f"expected --output as a new name or an older bundle, {args.output} is something else"
        )
    check_output_folder(args.output)
    recipe = load_recipe(args.config, args.set)
    folder = recipe.export_folder(args.transformer)
    dtype = getattr(torch, options.dtype)
    transformer = load_transformer(folder, torch.device("cpu"), dtype)
    autoencoder = open_autoencoder(recipe.export_folder(args.autoencoder), dtype=dtype)
    footage = open_footage(recipe, folder)
    prompts = open_captions(recipe, folder, footage)
    evaluation = _read_evaluation(args.evaluation) if args.evaluation else None
    scenery = make_scenery(options, footage, prompts, autoencoder.spatial_factor)
    config = world_config(args.output.name, recipe, options, scenery)
    pictures = scenery.images
    networks = transformer, autoencoder
    kept = {
        name: load_transformer(recipe.export_folder(name), torch.device("cpu"), dtype)
        for name in args.stages
    }
    size = _size((*networks, *kept.values()), pictures)
    readme = make_readme(args, recipe, config, networks, evaluation)
    with replacing_folder(args.output) as draft:
        save_world(draft, config, *networks, prompts, pictures, readme)
        for name, network in kept.items():
            network.save_pretrained(draft / "stages" / name, max_shard_size=SHARD_SIZE)
        World.from_pretrained(draft)  # what does not open does not replace what does
    print_line(
        f"{args.output}: {size / 1e6:.1f} MB; play it with: python play.py --world "
        f"{shlex.quote(str(args.output))}"
    )


def open_footage(recipe: Recipe, folder: Path) -> Footage | None:
    """The clips of `data.root`; None where they are gone, which only the town's may be (ValueError
    for another world's).
    """
    stored = folder / "prompts.safetensors"
    try:
        return Footage(recipe.data.root)
    except ValueError as error:
        if not stored.is_file() or set(PromptBook.load(stored).names) & set(MOODS):
            return None
        raise UserError(
            f"{error}; export takes captions, picture size, motion and start images from them"
        ) from None


def open_captions(recipe: Recipe, folder: Path, footage: Footage | None) -> PromptBook:
    """The embeddings that the transformer in `folder` was trained with; ValueError when the clips
    have other captions.
    """
    captions = MOODS if footage is None or footage.of_blocks else footage.captions
    stored = folder / "prompts.safetensors"
    if not stored.is_file():
        return open_prompts(recipe, captions)
    prompts = PromptBook.load(stored)
    unknown = [caption for caption in footage.captions if caption not in prompts] if footage else []
    if unknown:
        raise UserError(
            f"{folder} was not trained with the caption {unknown[0]!r} of the clips in "
            f"{footage.root}: set data.root to its footage"
        )
    return prompts


def make_scenery(
    options: ExportOptions, footage: Footage | None, prompts: PromptBook, factor: int
) -> Scenery:
    """What the options and the footage say; `factor`: pixels of a latent cell's side. None: the
    town's footage, which is gone.
    """
    height, width = footage.size(factor) if footage else (CollectConfig.height, CollectConfig.width)
    height = options.height or height
    width = options.width or width
    if footage is None or footage.of_blocks:
        scenery = town_scenery(options, [mood for mood in MOODS if mood in prompts], height, width)
    else:
        scenery = Scenery(
            footage.title,
            height,
            width,
            options.fps or footage.fps,
            footage.intrinsics,
            footage.envelope,
            footage.licence,
            footage.pictures(height, width, options.images),
            footage.captions[0],
        )
    return replace(
        scenery,
        title=options.title or scenery.title,
        fps=options.fps or scenery.fps,
        envelope=_changed(scenery.envelope, options.envelope),
    )


def town_scenery(options: ExportOptions, moods: list[str], height: int, width: int) -> Scenery:
    """The town of blocks: the walker's gait is the envelope, the start images are rendered."""
    gait = Gait()
    envelope = Envelope(
        forward=gait.walk,
        strafe=gait.strafe,
        vertical=0.0,
        run=gait.run,
        yaw=gait.yaw,
        pitch=gait.pitch,
        pitch_limit=gait.pitch_limit,
        smoothing=0.5,
        style="walk",
    )
    lens = CollectConfig("blocks", Path(), height=height, width=width).intrinsics
    images = town_images(options, moods, lens, height, width)
    return Scenery(TITLE, height, width, float(FPS), lens, envelope, "Apache-2.0", images, moods[0])


def _changed(envelope: Envelope, changes: Iterable[str]) -> Envelope:
    """The envelope with every AXIS=VALUE of `changes` in its place."""
    values = as_dict(envelope)
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise UserError(f"expected AXIS=VALUE after --envelope, got {change!r}")
        values[name] = value
    return build(Envelope, values, "--envelope")


def world_config(
    name: str, recipe: Recipe, options: ExportOptions, scenery: Scenery
) -> WorldConfig:
    """`world.yaml`: what stage 3 rolled out with is the rollout."""
    dmd = recipe.dmd
    rollout = RolloutConfig(
        steps=tuple(round(step) for step in dmd.denoise),
        first_steps=tuple(round(step) for step in dmd.first_denoise),
        shift=dmd.shift,
        chunk=dmd.chunk,
        window=dmd.window,
        sinks=dmd.sinks,
        sampler=options.sampler,
    )
    if options.steps is not None:
        rollout = with_steps(rollout, options.steps)
    if options.sampler == "euler":
        rollout = replace(rollout, first_steps=rollout.steps)
    return WorldConfig(
        name=name,
        title=scenery.title,
        height=scenery.height,
        width=scenery.width,
        fps=scenery.fps,
        intrinsics=scenery.intrinsics,
        envelope=scenery.envelope,
        rollout=rollout,
        prompts=PromptConfig(scenery.default),
        licence=scenery.licence,
    )


def town_images(
    options: ExportOptions, moods: list[str], intrinsics: tuple[float, ...], height: int, width: int
) -> dict[str, list[np.ndarray]]:
    """Pictures uint8 [H, W, 3] of streets of held-out towns, by mood."""
    images: dict[str, list[np.ndarray]] = {mood: [] for mood in moods}
    for index in tqdm(range(len(MOODS) * options.images), "start images", unit="picture"):
        town = held_out_town(options.seed, index)
        if town.mood not in images:
            continue
        poses = np.stack(
            [
                Walker(town, [options.seed, index, candidate]).pose()
                for candidate in range(CANDIDATES)
            ]
        )
        views = render(town, poses, intrinsics, height, width)
        images[town.mood].append(views[int(sharpness(to_unit(views)).argmax())].numpy())
    return images


def make_readme(
    args: argparse.Namespace,
    recipe: Recipe,
    config: WorldConfig,
    networks: tuple[CausalWanTransformer, Autoencoder],
    evaluation: dict | None,
) -> str:
    """How the bundle was made, and what it can do."""
    machine = describe_machine(torch.device("cpu"))
    hardware = (
        args.hardware
        or f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}"
    )
    counts = [f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M" for network in networks]
    parts = [
        f"# {config.name}",
        f"{config.title}. {config.height}x{config.width} pixels, {config.fps:g} frames a second; "
        f"transformer {counts[0]} parameters, autoencoder {counts[1]}, {args.dtype}.",
        f"Walk in it: `python play.py --world {shlex.quote(str(args.output))}`.",
        "## How it was made",
        f"Export: `python -m distill {shlex.join(sys.argv[1:])}`  \nCommit: {describe_commit()}  \n"
        f"Hardware: {hardware}  \nSeeds: training {recipe.run.seed}, start images {args.seed}",
        _footage(recipe),
        _stage_table(args, recipe),
        f"Recipe `{args.config}`:",
        f"```yaml\n{args.config.read_text(encoding='utf-8').strip()}\n```",
        "## What it can do",
        markdown(evaluation)
        if evaluation
        else "Not evaluated: see `python -m distill evaluate --help`.",
    ]
    return "\n\n".join(parts).strip() + "\n"


def _footage(recipe: Recipe) -> str:
    """The commands that made the footage, told from the clips themselves."""
    try:
        folders = list_clips(recipe.data.root)
    except ValueError:
        return f"The footage `{recipe.data.root}` was not there at export."
    meta = read_meta(folders[0])
    if not meta["source"].startswith("blocks:"):
        return (
            f"{len(folders)} clips in `{recipe.data.root}`, the first from "
            f"{meta['source'] or 'an unnamed source'}."
        )
    seed = Town.from_source(meta["source"]).seed // 2 // 1_000_003  # as `collect` numbers its towns
    sizes = " ".join(f"--{name} {meta[name]}" for name in ("latents", "height", "width", "samples"))
    root = recipe.data.root
    return (
        f"Footage: `python -m distill collect blocks --output {root} --clips {len(folders)} "
        f"{sizes} --seed {seed}`, encoded by `python -m distill encode --clips {root} "
        f"--autoencoder {recipe.export_folder(recipe.data.autoencoder or 'autoencoder')}`."
    )


def _stage_table(args: argparse.Namespace, recipe: Recipe) -> str:
    """Steps and hours of every stage that left metrics in the run folder."""
    lines = []
    overrides = "".join(f" --set {shlex.quote(override)}" for override in args.set)
    for stage in (
        field.name
        for field in fields(recipe)
        if isinstance(getattr(recipe, field.name), StageConfig)
    ):
        path = Path(recipe.run.folder) / stage / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        records = [
            json.loads(line)
            for line in text.splitlines()
            if line.startswith('{"step"') and line.endswith("}")
        ]
        if records:
            settings = getattr(recipe, stage)
            hours = sum(record["seconds"] for record in records) / 3600
            command = f"`python -m distill train {args.config} --stage {stage}{overrides}`"
            lines.append(
                [
                    command,
                    str(records[-1]["step"]),
                    str(settings.batch),
                    f"{settings.lr:g}",
                    f"{hours:.2f}",
                ]
            )
    note = ""
    if args.stages:
        names = ", ".join(f"`stages/{name}`" for name in args.stages)
        note = f"\n\nKept beside the world for comparison and further training: {names}."
    if not lines:
        return (
            f"The run folder `{recipe.run.folder}` was not there at export: no figures of the "
            "training."
        )
    return table(["command", "steps", "batch", "learning rate", "hours"], lines) + note


def _read_evaluation(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        markdown(found)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"expected --evaluation as the JSON that `distill evaluate` writes, got {path}"
        ) from None
    return found


def _size(networks: tuple, pictures: dict[str, list[np.ndarray]]) -> int:
    """Bytes of the bundle, pictures counted uncompressed."""
    weights = sum(
        p.numel() * p.element_size() for network in networks for p in network.state_dict().values()
    )
    return weights + sum(picture.nbytes for group in pictures.values() for picture in group)

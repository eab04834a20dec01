"""`python -m distill export`: networks and start images -> a bundle that `play.py` opens."""

import argparse
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from distill.config import Recipe, load_recipe
from distill.data.blocks.collect import FPS, LICENCE, BlocksConfig
from distill.data.blocks.renderer import render
from distill.data.blocks.town import MOODS
from distill.data.blocks.walker import Gait, Walker
from distill.data.footage import Footage
from distill.evaluate.cases import held_out_town
from distill.evaluate.generate import load_transformer
from distill.metrics import sharpness, to_unit
from distill.prompts import open_prompts
from worldmodel.cli import print_line
from worldmodel.config import as_dict, build
from worldmodel.controls import Envelope
from worldmodel.errors import UserError, first_line
from worldmodel.files import check_output_folder, replacing_folder
from worldmodel.models.prompts import PromptBook
from worldmodel.rollout import RolloutConfig, with_steps
from worldmodel.worlds.config import PromptConfig, WorldConfig
from worldmodel.worlds.weights import open_autoencoder
from worldmodel.worlds.world import SHARD_SIZE, World, save_world

START_SEED = 7001  # of the towns and places of the start images
CANDIDATES = 4  # places of which the one with the sharpest picture becomes a start image
TITLE = "An endless town of blocks in four moods"
README = "README.md"


@dataclass(frozen=True)
class ExportOptions:
    """Contents of a bundle apart from the networks. Raises UserError for a value out of its
    range.
    """

    images: int = 4  # start images per caption
    height: int | None = None  # pixels; None = as the footage
    width: int | None = None  # pixels; None = as the footage
    fps: float | None = None  # video frames per second; None = as the footage
    title: str | None = None  # a line for menus; None = the sources of the footage
    envelope: tuple[str, ...] = ()  # AXIS=VALUE, instead of the footage's motion
    dtype: str = "bfloat16"  # of the stored weights
    steps: int | None = None  # denoising steps per chunk; None = the recipe's `dmd.denoise`
    sampler: str = "renoise"  # "euler" for a diffusion model that was not distilled
    seed: int = START_SEED  # of the start images
    still: bool = False  # things do not move; the town's never do

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
    """A world's pictures and motion: the part of a bundle that the networks do not determine."""

    title: str
    height: int  # pixels
    width: int  # pixels
    fps: float
    intrinsics: tuple[float, ...]
    envelope: Envelope
    licence: str
    images: dict[str, list[np.ndarray]]  # start images uint8 [H, W, 3] by caption
    default: str  # caption
    still: bool = False  # whether its things do not move


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `export`."""
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
        "--stages",
        nargs="*",
        default=[],
        help="stages whose weights are kept in stages/, for comparison and further training",
    )
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="README.md of the bundle (default: that of the older bundle, else a few lines)",
    )
    _add_scenery_arguments(parser)
    _add_rollout_arguments(parser)


def _add_scenery_arguments(parser: argparse.ArgumentParser) -> None:
    default = ExportOptions()
    parser.add_argument(
        "--images",
        type=int,
        default=default.images,
        help=f"start images of each caption (default: {default.images})",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=default.seed,
        help=f"of the start images (default: {default.seed})",
    )
    parser.add_argument("--height", type=int, help="pixels (default: as the footage)")
    parser.add_argument("--width", type=int, help="pixels (default: as the footage)")
    parser.add_argument("--fps", type=float, help="video frames per second (default: as footage)")
    parser.add_argument(
        "--still",
        action="store_true",
        help="things do not move: at rest nothing is generated (always so in blocks)",
    )
    parser.add_argument("--title", help="a line for menus (default: the sources of the footage)")
    parser.add_argument(
        "--envelope",
        nargs="*",
        default=[],
        metavar="AXIS=VALUE",
        help=(
            "the player's largest motion per latent, e.g. vertical=0 yaw=6 (default: the usual "
            "motion in the footage)"
        ),
    )


def _add_rollout_arguments(parser: argparse.ArgumentParser) -> None:
    default = ExportOptions()
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default=default.dtype,
        help=f"of the stored weights (default: {default.dtype})",
    )
    parser.add_argument(
        "--steps", type=int, help="denoising steps per chunk (default: the recipe's dmd.denoise)"
    )
    parser.add_argument(
        "--sampler",
        choices=("renoise", "euler"),
        default=default.sampler,
        help="euler for a model that was not distilled (default: renoise)",
    )


def run(args: argparse.Namespace) -> None:
    """Write the bundle. Raises UserError, and keeps an older bundle, when anything is wrong."""
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
    scenery = make_scenery(options, footage, prompts, autoencoder.spatial_factor)
    config = world_config(args.output.name, recipe, options, scenery)
    readme = read_readme(args.readme, args.output, config)
    kept = {
        name: load_transformer(recipe.export_folder(name), torch.device("cpu"), dtype)
        for name in args.stages
    }
    with replacing_folder(args.output) as draft:
        save_world(draft, config, transformer, autoencoder, prompts, scenery.images, readme)
        for name, network in kept.items():
            network.save_pretrained(draft / "stages" / name, max_shard_size=SHARD_SIZE)
        World.from_pretrained(draft)  # a bundle that does not open must not replace one that does
        size = sum(path.stat().st_size for path in draft.rglob("*") if path.is_file())
    print_line(
        f"{args.output}: {size / 1e6:.1f} MB; play it with: python play.py --world "
        f"{shlex.quote(str(args.output))}"
    )


def read_readme(given: Path | None, output: Path, config: WorldConfig) -> str:
    """Text of the bundle's README.md: the given file's, the older bundle's, or a few lines."""
    path = given or output / README
    if given is None and not path.is_file():
        return (
            f"# {config.name}\n\n"
            f"{config.title}. {config.height}x{config.width} pixels, {config.fps:g} frames per "
            f"second. Licence: {config.licence}.\n\n"
            f"Play: `python play.py --world {shlex.quote(str(output))}`\n"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"expected a text file in UTF-8 for {README}, cannot read {path} ({first_line(error)})"
        ) from None


def open_footage(recipe: Recipe, folder: Path) -> Footage | None:
    """The clips of `data.root`; None where the town's clips are missing, since it can be rendered.

    Raises UserError where another world's clips are missing.
    """
    stored = folder / "prompts.safetensors"
    try:
        return Footage(recipe.data.root)
    except UserError as error:
        if not stored.is_file() or set(PromptBook.load(stored).names) & set(MOODS):
            return None
        raise UserError(
            f"{error}; export takes captions, picture size, motion and start images from them"
        ) from None


def open_captions(recipe: Recipe, folder: Path, footage: Footage | None) -> PromptBook:
    """The embeddings that the transformer in `folder` was trained with. Raises UserError when the
    clips have other captions.
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
    """The scenery that options and footage define; `factor`: pixels of a latent cell's side.

    footage: None for the town's, where its clips are missing.
    """
    height, width = footage.size(factor) if footage else (BlocksConfig.height, BlocksConfig.width)
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
        still=options.still or scenery.still,
    )


def town_scenery(options: ExportOptions, moods: list[str], height: int, width: int) -> Scenery:
    """The town of blocks: the envelope is the walker's gait, the start images are rendered."""
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
    lens = BlocksConfig(Path(), height=height, width=width).intrinsics
    images = town_images(options, moods, lens, height, width)
    return Scenery(
        TITLE, height, width, float(FPS), lens, envelope, LICENCE, images, moods[0], still=True
    )


def _changed(envelope: Envelope, changes: Iterable[str]) -> Envelope:
    """The envelope with every AXIS=VALUE of `changes` applied."""
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
    """`world.yaml`, with the rollout of stage 3."""
    dmd = recipe.dmd
    rollout = RolloutConfig(
        steps=tuple(round(step) for step in dmd.denoise),
        first_steps=tuple(round(step) for step in dmd.first_denoise),
        shift=dmd.shift,
        chunk=dmd.chunk,
        window=dmd.window,
        sinks=dmd.sinks,
        recall=dmd.recall,
        recall_unit=dmd.recall_unit,
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
        still=scenery.still,
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

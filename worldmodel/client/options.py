"""The options of `worldmodel play`: read and checked before anything slow is imported."""

import argparse
import difflib
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

from worldmodel.camera import parse_trajectory
from worldmodel.cli import positive, print_progress, threads
from worldmodel.config import build, parse_yaml
from worldmodel.device import usual_threads
from worldmodel.errors import UserError
from worldmodel.files import check_output, check_output_folder, data_folder
from worldmodel.worlds.catalog import find_world
from worldmodel.worlds.labels import Labels

KEYS_HELP = (
    "keys: W A S D move, arrows and mouse look (a click captures the mouse), Shift run, R "
    "restart, N next mood, T new town, M another mood in this place, P pause, F9 record, F12 "
    "screenshot, F1 figures, Esc releases the mouse, then quits"
)


@dataclass(frozen=True)
class PlayOptions:
    """What the player asked for. None means: as the world has it."""

    world: Path = data_folder("worlds") / "blocks"  # bundle folder
    prompt: str | None = None  # a mood of the world, or any text where it has a text encoder
    image: str | None = None  # name of a start image of the world, or a picture file
    seed: int = 0
    steps: int | None = None  # denoising steps a chunk
    memory: str = "auto"  # this and the next three: worldmodel.engine.engine.EngineOptions
    weights: str = "auto"
    compile: str = "auto"
    attention: str = "auto"
    record: Path | None = None  # folder of a recording that starts with the first frame
    threads: int = 1  # of torch
    headless: bool = False
    trajectory: str | None = None  # "w*10,l*5,w+l*8"
    output: Path | None = None  # MP4 of a headless walk
    replay: Path | None = None  # folder of a recording
    verify: bool = False  # compare a replay with what was recorded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `worldmodel play`."""
    parser.epilog = KEYS_HELP
    parser.add_argument(
        "--prompt",
        metavar="MOOD",
        help="mood to start in, or your own words where there is a text encoder",
    )
    parser.add_argument(
        "--image", metavar="NAME|FILE", help="start image: one of the world's, or a file of yours"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument(
        "--steps", type=positive, help="denoising steps per chunk (default: the world's)"
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="DIR",
        help="record into this new folder from the first frame",
    )
    parser.add_argument(
        "--headless", action="store_true", help="no window: walk a path and write an MP4"
    )
    parser.add_argument(
        "--trajectory",
        metavar="TEXT",
        help='path to walk until a motion key is pressed: "w*10,l*5,w+l*8,wait*2"',
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="MP4 of a headless walk (default: out/walk.mp4)"
    )
    parser.add_argument(
        "--replay", type=Path, metavar="DIR", help="replay a recording; P or R then walks on"
    )
    parser.add_argument(
        "--verify", action="store_true", help="with --replay: compare with what was recorded"
    )
    add_engine_arguments(parser)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Which world is opened, and how it is computed."""
    parser.add_argument(
        "--world",
        metavar="NAME|FOLDER",
        help="world to enter (default: blocks, or the recorded one)",
    )
    parser.add_argument(
        "--threads",
        type=threads,
        default=usual_threads(),
        help="CPU threads (default: %(default)s)",
    )
    parser.add_argument(
        "--memory",
        choices=("auto", "40", "24", "16", "12", "8"),
        default="auto",
        help="GB of a GPU to plan for",
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "full", "int8", "fp8"),
        default="auto",
        help="type of the weights",
    )
    parser.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile the blocks: auto (on CUDA), on (before play begins), off",
    )
    parser.add_argument(
        "--attention", choices=("auto", "torch", "fa3"), default="auto", help="attention kernel"
    )


def read_options(args: argparse.Namespace) -> PlayOptions:
    """Parsed arguments -> PlayOptions. Raises UserError with one sentence for what cannot be
    honoured; a published world is fetched first.
    """
    given = vars(args)
    replay = given.get("replay")
    world = given.pop("world") or (recorded_world(replay) if replay else "blocks")
    options = PlayOptions(world=find_world(world, print_progress), **given)
    _check_together(options)
    _check_scene(options)
    if options.trajectory is not None:
        parse_trajectory(options.trajectory)
    return options


def _check_together(options: PlayOptions) -> None:
    if options.verify and options.replay is None:
        raise UserError("--verify compares a recording; name its folder with --replay DIR.")
    if options.output and not options.headless:
        raise UserError(
            "--output is the film of a walk without a window; add --headless (in a window, F9 "
            "records)."
        )
    if options.output and options.output.is_dir():
        raise UserError(
            f"--output must be a file such as {options.output / 'walk.mp4'}, got the folder "
            f"{options.output}."
        )
    if options.output:
        check_output(options.output)
    if options.replay and (
        options.trajectory or options.prompt or options.image or options.steps or options.seed
    ):
        raise UserError(
            "--replay brings its own path, mood, picture, seed and steps; leave those options away."
        )
    if options.replay and options.record:
        raise UserError(
            "--replay is not recorded again; copy the folder instead of adding --record."
        )
    if options.verify and (options.output or options.headless):
        raise UserError("--replay DIR --verify only compares; leave --headless and --output away.")
    if options.seed < 0:
        raise UserError(f"--seed must be 0 or more, got {options.seed}.")
    if (
        options.record
        and options.record.exists()
        and any(options.record.iterdir() if options.record.is_dir() else [1])
    ):
        raise UserError(
            f"{options.record} exists and is not empty; name a new folder for the recording."
        )
    if options.record:
        check_output_folder(options.record)


def recorded_world(folder: Path) -> str:
    """Name of the world that a recording was made in; UserError when `folder` is not a
    recording.
    """
    try:
        with (folder / "session.jsonl").open(encoding="utf-8") as lines:
            return str(json.loads(lines.readline())["world"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} is not a recording (session.jsonl cannot be read); name a folder F9 made."
        ) from None


def _check_scene(options: PlayOptions) -> None:
    """Prompt and picture exist, as far as can be said without torch; the world itself checks
    everything again.
    """
    if options.prompt is not None:
        _check_prompt(options.prompt, options.world)
    if options.image is not None and not Path(options.image).is_file():
        _known(
            "start picture", options.image, [Path(name).stem for name in image_files(options.world)]
        )


def _check_prompt(prompt: str, world: Path) -> None:
    """A mood of the world, or any text in one with a text encoder."""
    if not prompt.strip():
        raise UserError(
            "--prompt is empty; name a mood of the world, or leave it away for the world's first."
        )
    if not world_values(world).get("text_encoder"):
        _known("prompt", prompt, prompt_names(world))


def _known(what: str, name: str, names: list[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        guess = f"did you mean {near[0]!r}? There are" if near else "there are"
        name = textwrap.shorten(name, 60, placeholder=" ...")
        raise UserError(f"This world has no {what} {name!r}; {guess} {', '.join(names) or 'none'}.")


def prompt_names(folder: Path) -> list[str]:
    """Names of a bundle's prompts."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "prompts.safetensors", framework="numpy") as prompts:
            return sorted(prompts.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / 'prompts.safetensors'} cannot be read ({error}); fetch the world again."
        ) from None


def image_files(folder: Path, prompt: str | None = None) -> list[str]:
    """File names in `images/` of a bundle, those of `prompt` (default: of the usual one) first."""
    values = world_values(folder)
    try:
        groups = dict(values.get("images") or {})
        usual = prompt or (values.get("prompts") or {}).get("default")
        return [*groups.pop(usual, ()), *(name for group in groups.values() for name in group)]
    except (ValueError, AttributeError, TypeError):
        return []


def world_labels(folder: Path) -> Labels:
    """What a bundle calls its actions; the defaults where its world.yaml cannot be read."""
    try:
        return build(Labels, world_values(folder).get("labels") or {}, "labels")
    except UserError:  # reported in full when the world is opened
        return Labels()


def world_values(folder: Path) -> dict:
    """What a bundle's world.yaml says; empty for a faulty one, which is reported in full when the
    world is opened.
    """
    try:
        values = parse_yaml((folder / "world.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, UserError):
        return {}
    return values if isinstance(values, dict) else {}

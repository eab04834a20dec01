"""The options of `worldmodel play`: read and checked before anything slow is imported."""

import argparse
import difflib
import json
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

from worldmodel.camera import parse_trajectory
from worldmodel.cli import positive, print_progress, threads
from worldmodel.config import build, parse_yaml
from worldmodel.device import usual_threads
from worldmodel.engine.options import CHOICES
from worldmodel.errors import UserError
from worldmodel.files import check_output, check_output_folder, data_folder
from worldmodel.worlds.catalog import find_world
from worldmodel.worlds.labels import Labels

KEYS_HELP = (
    "keys: W A S D move, arrows and mouse look (a click captures the mouse), Shift run, Backspace "
    "go back 8 latents (hold: further), R restart, N restart with the next prompt, T restart with "
    "the next start image and seed (where there are places: leave one for somewhere imagined, or "
    "return to it), M change the prompt without a restart, P pause, F9 record, F12 "
    "screenshot, F1 figures, Esc release the mouse, then quit"
)


@dataclass(frozen=True)
class PlayOptions:
    """What the player asked for. None means the world's default."""

    world: Path = data_folder("worlds") / "blocks"  # bundle folder
    prompt: str | None = None  # a prompt of the world, or any text where it has a text encoder
    image: str | None = None  # name of a start image of the world, or a picture file
    seed: int = 0
    steps: int | None = None  # denoising steps per chunk
    memory: str = "auto"  # this and the next three: EngineOptions
    weights: str = "auto"
    compile: str = "auto"
    attention: str = "auto"
    record: Path | None = None  # folder of a recording that starts with the first frame
    rest: bool = True  # nothing is generated while the camera rests, in worlds that are still
    place: str | None = None  # name of a remembered place of the world; None = imagined
    imagined: bool = False  # begin somewhere imagined, in a world that begins in a place
    walls: bool = True  # the walls of a place stop the camera
    recall: int | None = None  # latents of the window that view overlap chooses
    recall_memory: int | None = None  # MiB for what can be recalled
    threads: int = 1  # of torch
    headless: bool = False
    trajectory: str | None = None  # "w*10,l*5,w+l*8"
    output: Path | None = None  # MP4 of a headless walk
    replay: Path | None = None  # folder of a recording
    verify: bool = False  # compare a replay with what was recorded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `worldmodel play`."""
    parser.epilog = KEYS_HELP
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="prompt of the world to start with, or your own words where it has a text encoder",
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
    parser.add_argument(
        "--no-rest",
        dest="rest",
        action="store_false",
        help="generate while the camera rests, too, in worlds whose things do not move",
    )
    parser.add_argument("--place", metavar="NAME", help="begin in a place that the world remembers")
    parser.add_argument(
        "--imagined",
        action="store_true",
        help="begin somewhere imagined, also in a world that begins in a place of its own",
    )
    parser.add_argument(
        "--no-walls",
        dest="walls",
        action="store_false",
        help="walk through walls, in places that have them, into what was never filmed",
    )
    parser.add_argument(
        "--recall",
        type=int,
        metavar="N",
        help="latents of the window that are chosen by view overlap among all older ones; 0 = none "
        "(default: the world's)",
    )
    parser.add_argument(
        "--recall-memory",
        type=positive,
        metavar="MIB",
        help="memory for latents that can be recalled (default: the world's)",
    )
    add_engine_arguments(parser)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a world and how it is computed."""
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
        choices=CHOICES["memory"],
        default="auto",
        help="GB of a GPU to plan for",
    )
    parser.add_argument(
        "--weights",
        choices=CHOICES["weights"],
        default="auto",
        help="type of the weights",
    )
    parser.add_argument(
        "--compile",
        choices=CHOICES["compile"],
        default="auto",
        help="compile the blocks: auto (on CUDA), on (before play begins), off",
    )
    parser.add_argument(
        "--attention", choices=CHOICES["attention"], default="auto", help="attention kernel"
    )


def read_options(args: argparse.Namespace) -> PlayOptions:
    """Return the options of parsed arguments; a published world is fetched first.

    Raises UserError with one sentence for what cannot be honoured.
    """
    given = vars(args)
    replay = given.get("replay")
    default = recorded_world(replay) if replay else "blocks"
    world = given.pop("world") or default
    options = PlayOptions(world=find_world(world, print_progress), **given)
    _check_together(options)
    _check_scene(options)
    options = replace(options, place=options.place or _first_place(options))
    if options.trajectory is not None:
        parse_trajectory(options.trajectory)
    return options


def _check_together(options: PlayOptions) -> None:
    """Raise UserError for options that contradict each other."""
    if options.seed < 0:
        raise UserError(f"--seed must be 0 or more, got {options.seed}.")
    if options.verify and options.replay is None:
        raise UserError("--verify compares a recording; name its folder with --replay DIR.")
    if options.place and (options.image or options.replay or options.imagined):
        raise UserError(
            "--place cannot be combined with --image, --imagined or --replay: a place has its own "
            "first picture, and a recording knows its place; omit one of them."
        )
    if options.imagined and options.replay:
        raise UserError(
            "--imagined cannot be combined with --replay: a recording knows where it was made; "
            "omit one of them."
        )
    if options.replay:
        _check_replay(options)
    if options.output:
        _check_film(options)
    if options.record:
        _check_new_recording(options.record)


def _first_place(options: PlayOptions) -> str | None:
    """Return the place where the world begins, unless the player asked for something else."""
    if options.imagined or options.image or options.prompt or options.replay:
        return None
    place = world_values(options.world).get("place")
    return place if place and isinstance(place, str) else None


def _check_replay(options: PlayOptions) -> None:
    if options.trajectory or options.prompt or options.image or options.steps or options.seed:
        raise UserError(
            "--replay cannot be combined with --trajectory, --prompt, --image, --steps or --seed: "
            "the recording holds them; omit those options."
        )
    if options.record:
        raise UserError(
            "--replay cannot be combined with --record: to have the recording twice, copy its "
            "folder."
        )
    if not options.rest and (options.verify or options.headless):
        raise UserError(
            "--no-rest cannot be combined with --replay and --verify or --headless: a recording is "
            "replayed as it was generated; omit --no-rest."
        )
    if not options.walls and (options.verify or options.headless):
        raise UserError(
            "--no-walls cannot be combined with --replay and --verify or --headless: the recording "
            "holds its path; omit --no-walls."
        )
    recall = options.recall is not None or options.recall_memory is not None
    if recall and (options.verify or options.headless):
        raise UserError(
            "--recall and --recall-memory cannot be combined with --replay and --verify or "
            "--headless: a recording is replayed as it was generated; omit them."
        )
    if options.verify and (options.output or options.headless):
        raise UserError(
            "--verify cannot be combined with --headless or --output: it only compares; omit them."
        )


def _check_film(options: PlayOptions) -> None:
    if not options.headless:
        raise UserError(
            "--output is the film of a walk without a window; add --headless (in a window, F9 "
            "records)."
        )
    if options.output.is_dir():
        raise UserError(
            f"--output must be a file such as {options.output / 'walk.mp4'}, got the folder "
            f"{options.output}."
        )
    check_output(options.output)


def _check_new_recording(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; name a new folder for the recording.")
    check_output_folder(folder)


def recorded_world(folder: Path) -> str:
    """Return the name of the world of a recording. Raises UserError if `folder` is not one."""
    try:
        with (folder / "session.jsonl").open(encoding="utf-8") as lines:
            return str(json.loads(lines.readline())["world"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} is not a recording (session.jsonl cannot be read); name a folder F9 made."
        ) from None


def _check_scene(options: PlayOptions) -> None:
    """Raise UserError for a prompt or a start picture that the world does not have.

    Opening the world checks them in full.
    """
    if options.prompt is not None:
        _check_prompt(options.prompt, options.world)
    if options.image is not None and not Path(options.image).is_file():
        _known(
            "start picture", options.image, [Path(name).stem for name in image_files(options.world)]
        )


def _check_prompt(prompt: str, world: Path) -> None:
    """Raise UserError unless the world has this prompt, or a text encoder."""
    if not prompt.strip():
        raise UserError(
            "--prompt is empty; name a prompt of the world, or omit it for the world's default."
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
    """Return the names of a bundle's prompts. Raises UserError if its file cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "prompts.safetensors", framework="numpy") as prompts:
            return sorted(prompts.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / 'prompts.safetensors'} cannot be read ({error}); fetch the world again."
        ) from None


def image_files(folder: Path, prompt: str | None = None) -> list[str]:
    """Return the file names in `images/` of a bundle, those of `prompt` (None = the default) first.

    A faulty world.yaml has none: opening the world reports it.
    """
    values = world_values(folder)
    try:
        groups = dict(values.get("images") or {})
        first = prompt or (values.get("prompts") or {}).get("default")
        return [*groups.pop(first, ()), *(name for group in groups.values() for name in group)]
    except (ValueError, AttributeError, TypeError):
        return []


def first_picture(options: PlayOptions) -> Path | None:
    """Return the file of a picture of where play begins; None where there is none."""
    if options.place:
        picture = options.world / "places" / options.place / "start.png"
        if picture.is_file():
            return picture
    files = image_files(options.world, options.prompt)
    return options.world / "images" / files[0] if files else None


def world_labels(folder: Path) -> Labels:
    """Return what a bundle calls its actions; the defaults where its world.yaml is faulty."""
    try:
        labels = build(Labels, world_values(folder).get("labels") or {}, "labels")
    except UserError:  # opening the world reports it
        labels = Labels()
    has_places = any(folder.glob("places/*/place.yaml"))
    return replace(labels, new_seed=labels.elsewhere) if has_places else labels


def world_values(folder: Path) -> dict:
    """Return the values of a bundle's world.yaml; none for a faulty one, which opening the world
    reports.
    """
    try:
        values = parse_yaml((folder / "world.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, UserError):
        return {}
    return values if isinstance(values, dict) else {}

"""`python -m distill collect`: footage with exact camera poses, from our own renderer (`blocks`) or
a real game (`vizdoom`).
"""

import argparse
import importlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from distill.data.blocks.renderer import render
from distill.data.blocks.town import MOODS, Town
from distill.data.blocks.walker import walk
from distill.data.clips import frames_of, read_meta, write_clip
from worldmodel.camera import FRAMES_PER_LATENT
from worldmodel.errors import UserError
from worldmodel.files import check_output_folder, exclusive, remove_leftovers

FPS = 16
SPLITS = ("train", "heldout")
FIELD_OF_VIEW = 0.5  # fx / W: 90 degrees across


@dataclass(frozen=True)
class CollectConfig:
    """What to collect, for every source."""

    source: str  # blocks or vizdoom
    output: Path  # folder of clips
    clips: int = 240
    latents: int = 41  # latent frames a clip (4 * latents - 3 video frames)
    seed: int = 0
    split: str = "train"  # train or heldout: never the same towns
    height: int = 96  # pixels
    width: int = 160  # pixels
    workers: int = 2  # processes
    moods: tuple[str, ...] = tuple(MOODS)  # blocks only
    samples: int = 2  # blocks only: rays along each side of a pixel
    levels: tuple[str, ...] = ()  # vizdoom only: maps; none = the collector's own choice

    def __post_init__(self):
        for name, least in (
            ("clips", 1),
            ("latents", 1),
            ("seed", 0),
            ("workers", 1),
            ("samples", 1),
        ):
            if not least <= vars(self)[name] < 2**31:
                raise UserError(f"expected --{name} of at least {least}, got {vars(self)[name]}")
        for name in ("height", "width"):
            if vars(self)[name] < 8 or vars(self)[name] % 8:
                raise UserError(
                    f"expected --{name} to be a multiple of 8 (one latent cell), got "
                    f"{vars(self)[name]}"
                )
        if self.split not in SPLITS:
            raise UserError(f"expected --split {' or '.join(SPLITS)}, got {self.split!r}")

    @property
    def intrinsics(self) -> tuple[float, float, float, float]:
        """fx/W, fy/H, cx/W, cy/H: square pixels, 90 degrees across."""
        return FIELD_OF_VIEW, FIELD_OF_VIEW * self.width / self.height, 0.5, 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_subparsers(dest="source", required=True)
    blocks = sources.add_parser(
        "blocks", help="walks through the endless town of flat-shaded boxes"
    )
    vizdoom = sources.add_parser(
        "vizdoom", help="walks through levels of a ViZDoom game (extra `collect`)"
    )
    for source in (blocks, vizdoom):
        source.add_argument(
            "--output",
            type=Path,
            required=True,
            help="folder of the clips; finished clips in it are kept",
        )
        source.add_argument(
            "--clips",
            type=int,
            default=CollectConfig.clips,
            help="how many clips the folder shall hold (default: %(default)s)",
        )
        source.add_argument(
            "--latents",
            type=int,
            default=CollectConfig.latents,
            help="latent frames a clip, 4 video frames each (default: %(default)s)",
        )
        source.add_argument(
            "--seed",
            type=int,
            default=CollectConfig.seed,
            help="another seed, other places and walks (default: %(default)s)",
        )
        source.add_argument(
            "--split",
            choices=SPLITS,
            default="train",
            help="heldout places never occur in train (default: train)",
        )
        source.add_argument(
            "--height", type=int, default=CollectConfig.height, help="pixels (default: %(default)s)"
        )
        source.add_argument(
            "--width", type=int, default=CollectConfig.width, help="pixels (default: %(default)s)"
        )
        source.add_argument(
            "--workers",
            type=int,
            default=CollectConfig.workers,
            help="processes (default: %(default)s)",
        )
    blocks.add_argument(
        "--moods", default="all", help=f"comma-separated, of {', '.join(MOODS)} (default: all)"
    )
    blocks.add_argument(
        "--samples",
        type=int,
        default=CollectConfig.samples,
        help="rays along a pixel's side (default: %(default)s)",
    )
    vizdoom.add_argument(
        "--levels",
        default="",
        help="comma-separated maps, e.g. MAP01,MAP02 (default: a choice of maps)",
    )


def run(args: argparse.Namespace) -> None:
    """Collects what the command line asks for; one clear sentence (ValueError) when it cannot."""
    options = {
        key: value for key, value in vars(args).items() if key in CollectConfig.__dataclass_fields__
    }
    if args.source == "blocks":
        options["moods"] = _moods(args.moods)
        collect_clips(CollectConfig(**options))
    else:
        options["levels"] = tuple(name for name in args.levels.split(",") if name)
        importlib.import_module("distill.data.vizdoom").collect_clips(CollectConfig(**options))


def collect_clips(config: CollectConfig) -> None:
    """Renders the town's clips that are not there yet; see `make_missing`."""
    make_missing(config, collect_clip, _identity)


def make_missing(
    config: CollectConfig,
    make: Callable[[CollectConfig, int], Path],
    identity: Callable[[CollectConfig, int], dict],
) -> None:
    """Calls `make(config, index)` for the clips that are not there yet, in several processes; may
    be killed and started again at any time.

    identity: what the meta.yaml of clip `index` must say. Raises ValueError when the folder already
    holds footage of other settings, or another process writes into it.
    """
    check_output_folder(config.output)
    with exclusive(config.output):
        remove_leftovers(config.output)
        todo = [
            index
            for index in range(config.clips)
            if not _finished(config.output / clip_name(config, index), identity(config, index))
        ]
        _make(config, make, todo)


def _make(
    config: CollectConfig, make: Callable[[CollectConfig, int], Path], todo: list[int]
) -> None:
    with tqdm(
        total=config.clips, initial=config.clips - len(todo), unit="clip", desc=f"{config.output}"
    ) as bar:
        if config.workers == 1:
            for index in todo:
                make(config, index)
                bar.update()
        elif todo:
            with worker_pool(config.workers) as pool:
                for job in as_completed([pool.submit(make, config, index) for index in todo]):
                    job.result()
                    bar.update()


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each; Ctrl-C is left to this one, and what waits is dropped when the
    block fails.

    Raises ChildProcessError when one of them was killed.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    with ProcessPoolExecutor(
        workers, spawn, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # processes inherit this
        try:
            pool.submit(int)  # starts them all
        finally:
            signal.signal(signal.SIGINT, heard)
        try:
            yield pool
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker process died (out of memory?): run again, finished clips are kept; "
                "--workers 1 needs less"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def collect_clip(config: CollectConfig, index: int) -> Path:
    """Renders and writes clip number `index`; the same numbers give the same clip on every
    machine.
    """
    town = town_of(config, index)
    poses = walk(town, frames_of(config.latents), [config.seed, SPLITS.index(config.split), index])
    frames = render(
        town, poses, config.intrinsics, config.height, config.width, config.samples
    ).numpy()
    return write_clip(
        config.output,
        clip_name(config, index),
        frames,
        poses[::FRAMES_PER_LATENT],
        config.intrinsics,
        caption=town.mood,
        fps=FPS,
        licence="Apache-2.0",
        **_identity(config, index),
    )


def clip_name(config: CollectConfig, index: int) -> str:
    return f"{config.source}-{index:05d}"


def _identity(config: CollectConfig, index: int) -> dict:
    source = town_of(config, index).source
    return {
        "source": source,
        "latents": config.latents,
        "height": config.height,
        "width": config.width,
        "samples": config.samples,
    }


def _finished(folder: Path, identity: dict) -> bool:
    """Whether the clip is there; ValueError when another clip has its place."""
    if not folder.exists():
        return False
    meta = read_meta(folder)
    for key, value in identity.items():
        if meta.get(key) != value:
            raise UserError(
                f"{folder}: expected a clip with {key} {value}, found {meta.get(key)}; "
                "choose another --output, or the settings this folder was begun with"
            )
    return True


def _moods(text: str) -> tuple[str, ...]:
    names = tuple(MOODS) if text == "all" else tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in MOODS:
            raise UserError(f"expected --moods all or some of {', '.join(MOODS)}, got {name!r}")
    if not names:
        raise UserError("expected at least one mood, got none; leave --moods out for all of them")
    return names


def town_of(config: CollectConfig, index: int) -> Town:
    """The town of clip `index`: every clip has its own, train towns have even seeds, held-out towns
    odd ones.
    """
    seed = 2 * (config.seed * 1_000_003 + index) + SPLITS.index(config.split)
    return Town(config.moods[index % len(config.moods)], seed)

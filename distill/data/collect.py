"""Collecting of footage, for every source: what to collect, and a pool of processes that makes the
missing clips.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from tqdm import tqdm

from distill.data.clips import read_meta
from worldmodel.errors import UserError
from worldmodel.files import check_output_folder, exclusive, remove_leftovers

SPLITS = ("train", "heldout")
FIELD_OF_VIEW = 0.5  # fx / W: 90 degrees across


@dataclass(frozen=True)
class CollectConfig:
    """What to collect, for every source. Raises UserError for a value out of its range."""

    source: ClassVar[str]  # name of the source, the first part of a clip's name

    output: Path  # folder of clips
    clips: int = 240
    latents: int = 41  # latent frames per clip (4 * latents - 3 video frames)
    seed: int = 0
    split: str = "train"  # train or heldout, which never share places
    height: int = 96  # pixels
    width: int = 160  # pixels
    workers: int = 2  # processes

    def __post_init__(self):
        for name, least in (("clips", 1), ("latents", 1), ("seed", 0), ("workers", 1)):
            self._check_range(name, least)
        for name in ("height", "width"):
            if vars(self)[name] < 8 or vars(self)[name] % 8:
                raise UserError(
                    f"expected --{name} to be a multiple of 8 (one latent cell), got "
                    f"{vars(self)[name]}"
                )
        if self.split not in SPLITS:
            raise UserError(f"expected --split {' or '.join(SPLITS)}, got {self.split!r}")

    def _check_range(self, name: str, least: int) -> None:
        if not least <= vars(self)[name] < 2**31:
            raise UserError(f"expected --{name} of at least {least}, got {vars(self)[name]}")

    @property
    def intrinsics(self) -> tuple[float, float, float, float]:
        """fx/W, fy/H, cx/W, cy/H: square pixels, 90 degrees across."""
        return FIELD_OF_VIEW, FIELD_OF_VIEW * self.width / self.height, 0.5, 0.5


def clip_name(config: CollectConfig, index: int) -> str:
    return f"{config.source}-{index:05d}"


def make_missing(
    config: CollectConfig,
    make: Callable[[CollectConfig, int], Path],
    identity: Callable[[CollectConfig, int], dict],
) -> None:
    """Call `make(config, index)` for the missing clips, in several processes; may be killed and
    restarted at any time.

    identity: entries that the meta.yaml of clip `index` must have. Raises UserError when the folder
    already holds footage of other settings, or another process writes into it.
    """
    check_output_folder(config.output)
    with exclusive(config.output):
        remove_leftovers(config.output)
        missing = [
            index
            for index in range(config.clips)
            if not _is_finished(config.output / clip_name(config, index), identity(config, index))
        ]
        _make(config, make, missing)


def _make(
    config: CollectConfig, make: Callable[[CollectConfig, int], Path], missing: list[int]
) -> None:
    done = config.clips - len(missing)
    with tqdm(total=config.clips, initial=done, unit="clip", desc=f"{config.output}") as bar:
        if config.workers == 1:
            for index in missing:
                make(config, index)
                bar.update()
        elif missing:
            with worker_pool(config.workers) as pool:
                for job in as_completed([pool.submit(make, config, index) for index in missing]):
                    job.result()
                    bar.update()


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each. Ctrl-C reaches this process only; pending jobs are dropped when
    the block fails.

    Raises ChildProcessError when one of the processes was killed.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    with ProcessPoolExecutor(
        workers, spawn, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # processes inherit this
        try:
            pool.submit(int)  # starts them all
        finally:
            signal.signal(signal.SIGINT, before)
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


def _is_finished(folder: Path, identity: dict) -> bool:
    """Whether the clip exists. Raises UserError when it was made with other settings."""
    if not folder.exists():
        return False
    meta = read_meta(folder)
    for key, value in identity.items():
        if meta.get(key) != value:
            raise UserError(
                f"{folder}: expected a clip with {key} {value}, found {meta.get(key)}; choose "
                "another --output, or the settings that its other clips were made with"
            )
    return True

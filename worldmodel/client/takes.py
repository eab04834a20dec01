"""The recordings of a walk: F9 begins and ends one, a restart or a rewind begins a new one."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worldmodel.recording import Recorder
    from worldmodel.session import FrameChunk


class Takes:
    """Owns the recorder that is running, if one is.

    wanted: folder that was asked for; None = a folder in `folder`, named `name` and the time.
    notify: takes a sentence for the player. A folder that is taken gets a number.
    """

    def __init__(
        self, name: str, wanted: Path | None, folder: Path, notify: Callable[[str], object]
    ):
        self._name = name
        self._wanted = wanted
        self._folder = folder
        self._notify = notify
        self._recorder: Recorder | None = None
        self._suspended = False

    @property
    def folder(self) -> Path | None:
        """Folder of the running recording; None while nothing is recorded."""
        return self._recorder.folder if self._recorder else None

    @property
    def wanted(self) -> bool:
        """Whether the player is recording, be it that the next take has not begun yet."""
        return self._recorder is not None or self._suspended

    @property
    def suspended(self) -> bool:
        """Whether a new take is to begin before the next chunk."""
        return self._suspended

    def start(self, record: Callable[[Path], "Recorder"], latent: int) -> "Recorder":
        """Begin a recording: `record` opens a recorder in a folder. Raises UserError if it cannot.

        latent: number of latents so far, for the receipt.
        """
        self._suspended = False
        self._recorder = record(self._free_folder())
        self._notify(f"Recording since latent {latent}")
        return self._recorder

    def write(self, chunk: "FrameChunk", c2w, keys: tuple[str, ...]) -> None:
        """Record a chunk with its poses [F, 4, 4] and the keys held, if a recording is running."""
        if self._recorder and not self._recorder.write(chunk, c2w, keys):
            self.stop()

    def suspend(self) -> None:
        """End the running take; `suspended` then says that the next one is due."""
        if self._recorder:
            self.stop()
            self._suspended = True

    def stop(self) -> None:
        """End the recording and wait until it is on disk."""
        self._suspended = False
        recorder = self._recorder
        self._recorder = None
        if recorder:
            recorder.close()
            self._notify(recorder.error or f"Saved {recorder.folder}")

    def _free_folder(self) -> Path:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        wanted = self._wanted or self._folder / f"{self._name}-{stamp}"
        folder = wanted
        number = 1
        while folder.exists() and any(folder.iterdir()):
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        return folder

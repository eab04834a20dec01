"""One process at a time on a folder that is written to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from worldmodel.recording import lock

LOCK = ".lock"  # stays behind; what counts is who holds it, and a killed process holds nothing


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes `folder` and keeps others out of this block; ValueError when another process is in it.
    Locks nothing on Windows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        if not lock(file):
            raise ValueError(
                "another process "
                "is writing "
                f"into {folder}: "
                "wait for its end, "
                "or choose "
                "another folder"
            )
        yield

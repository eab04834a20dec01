"""Errors that a user can correct, as opposed to bugs of this program, and the log of bugs.

`UserError` alone becomes one sentence and exit status 2. Every other exception is a bug: it keeps
its traceback, which `log_bug` also appends to a file, because a window has no place for it.
"""

import os
import platform
import sys
import tempfile
import time
import traceback
from pathlib import Path

import platformdirs

_LOG_LIMIT = 1_000_000  # bytes; a longer log is moved to `*.old` before the next entry


class UserError(ValueError):
    """Bad input: the message is one sentence: what was expected, what came, what to do."""


class Stopped(Exception):
    """Work that a signal stopped; the sentence states what to do ("": another process prints
    it).
    """

    def __init__(self, number: int, sentence: str):
        super().__init__(sentence)
        self.number = number  # of the signal


def first_line(error: BaseException) -> str:
    """The first line of an error's message, to be put into a sentence; the error's name when it has
    no message.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def user_log() -> Path:
    """The file that tracebacks go to: `~/.local/state/worldmodel/log/worldmodel.log` on Linux."""
    return platformdirs.user_log_path("worldmodel", appauthor=False) / "worldmodel.log"


def log_bug(error: BaseException) -> Path | None:
    """Append the traceback of a bug to `user_log()`, and return the file that holds it.

    Where that file cannot be written, the entry goes to the system's temporary folder; None when it
    can be written nowhere. Never raises. An error that was logged before is not logged again.
    """
    known = getattr(error, "_logged", None)
    if known is not None:
        return known
    for path in (user_log(), Path(tempfile.gettempdir()) / f"worldmodel-{os.getpid()}.log"):
        try:
            _append(path, _entry(error))
        except OSError:
            continue
        error._logged = path
        return path
    return None


def _entry(error: BaseException) -> str:
    head = f"{time.strftime('%Y-%m-%d %H:%M:%S')} pid {os.getpid()}: {' '.join(sys.argv)}"
    system = f"Python {platform.python_version()} on {platform.platform()}"
    return f"{head}\n{system}\n{''.join(traceback.format_exception(error))}\n"


def _append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.stat().st_size > _LOG_LIMIT:
        path.replace(path.with_suffix(".old"))
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)

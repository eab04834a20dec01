"""How an error that ends the program is shown in the window: one sentence and an exit status."""

from dataclasses import dataclass

from worldmodel.cli import BAD_INPUT, FAILED, explain
from worldmodel.errors import UserError, first_line, log_bug


@dataclass(frozen=True)
class Failure:
    """What ended the program."""

    sentence: str
    status: int  # of the process: 2 for bad input, 1 for anything else


def describe(error: Exception) -> Failure:
    """Return what the player reads of `error`.

    A UserError is its own sentence. The traceback of any other error is written to the log file,
    which the sentence then names.
    """
    if isinstance(error, UserError):
        return Failure(" ".join(str(error).split()), BAD_INPUT)
    path = log_bug(error)
    where = f" The log file {path} holds the details." if path else ""
    known = explain(error)
    if known:
        return Failure(known[1] + where, FAILED)
    what = f"{type(error).__name__}: {first_line(error)}"
    return Failure(f"This is a bug of the program, not of your input ({what}).{where}", FAILED)

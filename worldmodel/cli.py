"""What every command line of this project does alike: a mistake is one sentence on stderr and an
exit status.
"""

import argparse
import errno
import json
import sys
import traceback
from collections.abc import Callable

from safetensors import SafetensorError

from worldmodel.errors import Stopped, UserError, first_line, log_bug
from worldmodel.files import write_file

MOST_THREADS = 256
BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130
_NO_MEMORY = (
    "out of memory",
    "allocate memory",
)  # in torch's RuntimeErrors, which on the CPU have no type of their own


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a ValueError of one sentence, not a page and an exit; its
    sub-parsers too.
    """

    def error(self, message: str):
        raise UserError(
            f"{message[:1].upper()}{message[1:]}; {self.prog} --help lists the options."
        )


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def threads(text: str) -> int:
    """argparse type: CPU threads. The system ends a program that cannot have all the threads it
    asks for.
    """
    if positive(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_THREADS}, got {text}")
    return int(text)


def run(program: str, work: Callable[[], int | None]) -> int:
    """Run `work` and return the exit status: its own (None = 0), or what went wrong.

    An error that `explain` knows becomes one sentence on stderr. Anything else is a bug of this
    program: its traceback goes to stderr and into the log, and the status is 1.
    """
    try:
        return work() or 0
    except (Exception, KeyboardInterrupt) as error:
        known = explain(error)
        if known is None:
            _report_bug(program, error)
            return FAILED
    # Here the traceback is gone, and with it the progress bars it kept open: the sentence gets a
    # line of its own.
    status, sentence = known
    if sentence:
        print(f"{program}: {sentence}", file=sys.stderr)
    return status


def explain(error: BaseException) -> tuple[int, str] | None:
    """(exit status, one sentence) of an error that is not a bug of this program; None for a bug.

    UserError: 2. OSError, SafetensorError (its writer's OSError), out of memory: 1. Ctrl-C: 130.
    Stopped: 128 and its signal's number, with "" where another process says the sentence.
    """
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "stopped before the end."
    if isinstance(error, Stopped):
        return 128 + error.number, " ".join(str(error).split())
    if isinstance(error, UserError):
        return BAD_INPUT, " ".join(str(error).split())
    if isinstance(error, OSError):
        return FAILED, " ".join(_of_the_system(error).split())
    if isinstance(error, SafetensorError):
        return FAILED, f"{first_line(error)}; see to the disk and start again."
    if _is_out_of_memory(error):
        what = first_line(error).partition(". ")[0]
        return FAILED, f"there is not enough memory ({what}); ask for less at a time."
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in _NO_MEMORY)
    return isinstance(error, MemoryError)


def _report_bug(program: str, error: BaseException) -> None:
    traceback.print_exception(error)
    log = log_bug(error)
    where = f" Its log is {log}." if log else ""
    print(f"{program}: this is a bug of the program, not of your input.{where}", file=sys.stderr)


def report(
    program: str,
    parser: Parser,
    measure: Callable[[argparse.Namespace], dict],
    argv: list[str] | None,
) -> int:
    """`run` for a program that prints what it measured as JSON, and writes it into the file
    `--output` too where one is named.
    """

    def work() -> None:
        args = parser.parse_args(argv)
        text = json.dumps(measure(args), indent=1)
        print(text)
        if args.output:
            write_file(args.output, text + "\n")

    return run(program, work)


def tell(sentence: str) -> None:
    """Says on stderr what is being done, for who waits."""
    print(sentence, file=sys.stderr)


def _of_the_system(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    where = f"{error.filename2 or error.filename}: " if error.filename else ""
    todo = "; make room and start again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{where}{error.strerror}{todo}."

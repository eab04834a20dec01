"""What every command line of this project does alike: a mistake is one sentence on stderr and an
exit status.
"""

import argparse
import errno
import json
import sys
from collections.abc import Callable

from safetensors import SafetensorError

from worldmodel.errors import Stopped, UserError
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
    """Runs `work` and returns the exit status: its own (None = 0), or what went wrong, after one
    sentence on stderr.

    ValueError: 2. OSError, SafetensorError (its writer's OSError), no memory: 1. Ctrl-C: 130.
    Stopped: 128 and its signal's number. Anything else is a fault of this program and passes
    through.
    """
    try:
        return work() or 0
    except KeyboardInterrupt:
        status = INTERRUPTED
        sentence = "stopped before the end."
    except Stopped as stop:
        status = 128 + stop.number
        sentence = str(stop)
    except OSError as error:
        status = FAILED
        sentence = _of_the_system(error)
    except ValueError as error:
        status = BAD_INPUT
        sentence = str(error)
    except SafetensorError as error:
        status = FAILED
        sentence = f"{error}; see to the disk and start again."
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        status = FAILED
        sentence = (
            f"there is not enough memory ({str(error).partition('.')[0]}); ask for less at a time."
        )
    # Here the traceback is gone, and with it the progress bars it kept open: the sentence gets a
    # line of its own.
    if sentence:
        print(f"{program}: {' '.join(sentence.split())}", file=sys.stderr)
    return status


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

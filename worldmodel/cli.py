"""What all command lines of this project share: errors as one sentence and an exit status, log
messages on stderr, and output that any encoding can print.
"""

import argparse
import errno
import importlib
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from worldmodel.errors import Stopped, UserError, first_line, log_bug
from worldmodel.files import write_file

MOST_THREADS = 256
BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130
# in torch's RuntimeErrors, which on the CPU have no type of their own
_NO_MEMORY = ("out of memory", "allocate memory")
_LOGGERS = [logging.getLogger(name) for name in ("worldmodel", "distill")]
_LEVEL = "log_level"  # where argparse keeps the level until it is set


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a UserError of one sentence, not a page and an exit.

    It has the options -v and --debug, and so do its sub-parsers: they set the level of the log that
    `run` shows, and do not appear among the parsed arguments.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.add_argument(
            "-v",
            "--verbose",
            dest=_LEVEL,
            action="store_const",
            const=logging.INFO,
            default=argparse.SUPPRESS,  # a sub-parser's default would overwrite the parser's value
            help="print what is being done",
        )
        self.add_argument(
            "--debug",
            dest=_LEVEL,
            action="store_const",
            const=logging.DEBUG,
            default=argparse.SUPPRESS,
            help="print all log messages with their module, and the traceback of every error",
        )

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        if hasattr(parsed, _LEVEL):
            _set_level(getattr(parsed, _LEVEL))
            delattr(parsed, _LEVEL)
        return parsed

    def error(self, message: str):
        raise UserError(
            f"{message[:1].upper()}{message[1:]}; {self.prog} --help lists the options."
        )

    def _print_message(self, message: str, file: TextIO | None = None):
        print_line(message.removesuffix("\n"), file)


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


def run_command(
    program: str,
    description: str,
    commands: Mapping[str, tuple[str, str]],
    argv: list[str] | None = None,
) -> int:
    """`run` for a program with commands, of which only the chosen one is imported.

    commands: name -> (module with `add_arguments(parser)` and `run(args)`, one line of help). argv:
    the command line; None = that of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = next((word for word in argv if not word.startswith("-")), None)

    def work() -> int | None:
        parser = Parser(prog=program, description=description)
        chosen = parser.add_subparsers(dest="command", required=True)
        for name, (module, summary) in commands.items():
            command = chosen.add_parser(name, help=summary, description=summary)
            if name == first:
                importlib.import_module(module).add_arguments(command)
        args = parser.parse_args(argv)
        module, _ = commands[vars(args).pop("command")]
        return importlib.import_module(module).run(args)

    return run(first if first in commands else program, work)


def run(program: str, work: Callable[[], int | None]) -> int:
    """Run `work` and return the exit status: its own (None = 0), or what went wrong.

    An error that `explain` knows becomes one sentence on stderr. Anything else is a bug of this
    program: its traceback goes to stderr and into the log file, and the status is 1. Meanwhile the
    log messages of this project appear on stderr, warnings only unless -v or --debug is given.
    """
    with _log_on_stderr(program):
        return _run(program, work)


def _run(program: str, work: Callable[[], int | None]) -> int:
    try:
        return work() or 0
    except (Exception, KeyboardInterrupt) as error:
        known = explain(error)
        if known is None:
            _report_bug(program, error)
            return FAILED
        if _LOGGERS[0].level == logging.DEBUG:
            traceback.print_exception(error)
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


def print_report(report: dict, output: Path | None) -> None:
    """Print a report as JSON, and write it into the file `output` too unless that is None."""
    text = json.dumps(report, indent=1)
    print_line(text)
    if output is not None:
        write_file(output, text + "\n")


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print text to `file` (default: stdout) at once; escape what its encoding cannot write."""
    file = file or sys.stdout
    try:
        print(text, file=file, flush=True)
    except UnicodeEncodeError:
        text = text.encode(file.encoding, "backslashreplace").decode(file.encoding)
        print(text, file=file, flush=True)


def print_progress(sentence: str) -> None:
    """Print a progress message to stderr."""
    print_line(sentence, sys.stderr)


@contextmanager
def _log_on_stderr(program: str) -> Iterator[None]:
    """Show this project's log messages on stderr while the block runs."""
    handler = _StderrHandler(program)
    before = [(logger, logger.level) for logger in _LOGGERS]
    for logger in _LOGGERS:
        logger.addHandler(handler)
    _set_level(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in before:
            logger.removeHandler(handler)
            logger.setLevel(level)


def _set_level(level: int) -> None:
    for logger in _LOGGERS:
        logger.setLevel(level)


class _StderrHandler(logging.Handler):
    """Writes `program: warning: sentence`; information has no label, and --debug adds the module.

    Progress bars stay whole: the lines appear above them.
    """

    def __init__(self, program: str):
        super().__init__()
        self._program = program

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        parts = [self._program]
        if record.levelno != logging.INFO:
            parts.append(record.levelname.lower())
        if _LOGGERS[0].level == logging.DEBUG:
            parts.append(record.name)
        try:
            parts.append(self.format(record))
            tqdm.write(": ".join(parts), file=sys.stderr)
        except Exception:  # a message that cannot be shown ends no work
            self.handleError(record)


def _of_the_system(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    where = f"{error.filename2 or error.filename}: " if error.filename else ""
    todo = "; make room and start again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{where}{error.strerror}{todo}."

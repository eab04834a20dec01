"""Errors that a user can mend, told apart from faults of this program.

`UserError` alone becomes one sentence and exit status 2. Every other exception is a bug: it keeps
its traceback.
"""


class UserError(ValueError):
    """Bad input: the message is one sentence that says what was expected, what came, what to do."""


class Stopped(Exception):
    """Work that a signal ended before its end; the sentence says what to do ("": another process
    says it).
    """

    def __init__(self, number: int, sentence: str):
        super().__init__(sentence)
        self.number = number  # of the signal


def first_line(error: BaseException) -> str:
    """The first line of an error's message, to be put into a sentence; the error's name when it has
    no message.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

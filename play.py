"""Walk through a world: `python play.py` is `worldmodel play`; --help lists the options."""

import sys


def main(arguments: list[str]) -> int:
    """Play; returns the exit status: 0, 1 for a failure, 2 for bad input."""
    from worldmodel.cli import Parser, run
    from worldmodel.client import play

    def work() -> int:
        parser = Parser(prog="python play.py", description=play.__doc__)
        play.add_arguments(parser)
        return play.run(parser.parse_args(arguments))

    return run("play.py", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

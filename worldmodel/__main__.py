"""Play, verify and convert learned worlds."""

import sys

from worldmodel.cli import run_command

# Each command is in the module named here: `add_arguments(parser)` and `run(args)`. Only the chosen
# one is imported.
COMMANDS = {
    "play": ("worldmodel.client.play", "walk through a world, in a window or into a film"),
    "verify": ("worldmodel.client.verify", "replay a recording and compare every frame"),
    "inspect": ("worldmodel.worlds.inspect_cli", "describe a weights file"),
    "convert": ("worldmodel.worlds.convert_cli", "make a world of published weights"),
    "benchmark": ("worldmodel.bench.benchmark", "measure the speed of play"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status, see `cli.run`."""
    return run_command("worldmodel", __doc__, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())

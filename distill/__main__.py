"""`python -m distill COMMAND ...`: footage -> latents -> training -> a bundle that `play.py` opens
-> figures.
"""

import importlib
import sys

from worldmodel.cli import Parser, run

# Each command is a module with `add_arguments(parser)` and `run(args)`. Only the chosen one is
# imported, so that --help is quick.
COMMANDS = {
    "collect": ("distill.data.sources", "render or record footage with exact camera poses"),
    "import": ("distill.data.importers.worldplay", "turn WorldPlay / minWM footage into clips"),
    "encode": ("distill.data.encode", "turn clips into latents with an autoencoder"),
    "train": ("distill.train", "train one stage from a config"),
    "export": ("distill.export", "write a bundle that play.py opens"),
    "benchmark": ("distill.benchmark", "print the seconds per sample of a recipe's stages"),
    "evaluate": ("distill.evaluate.evaluate", "compare generated frames with the ground truth"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status (see `worldmodel.cli.run`)."""
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv and argv[0] in COMMANDS else "python -m distill"
    return run(name, lambda: _command(argv))


def _command(argv: list[str]) -> None:
    parser = Parser(prog="python -m distill", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in argv[:1]:
            importlib.import_module(module_name).add_arguments(command)
    args = parser.parse_args(argv)
    importlib.import_module(COMMANDS[args.command][0]).run(args)


if __name__ == "__main__":
    sys.exit(main())

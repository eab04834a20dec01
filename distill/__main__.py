"""`python -m distill COMMAND ...`: footage -> latents -> training -> a bundle that `play.py` opens
-> figures.
"""

import sys

from worldmodel.cli import run_command

# Each command is a module with `add_arguments(parser)` and `run(args)`. Only the chosen one is
# imported, so that --help is quick.
COMMANDS = {
    "collect": ("distill.data.sources", "render or record footage with exact camera poses"),
    "import": ("distill.data.importers.worldplay", "turn WorldPlay / minWM footage into clips"),
    "condition": ("distill.data.conditions", "write what other clips of a place show of each clip"),
    "encode": ("distill.data.encode", "turn clips into latents with an autoencoder"),
    "train": ("distill.train", "train one stage from a config"),
    "place": ("distill.place", "let a bundle remember a place that clips show"),
    "export": ("distill.export", "write a bundle that play.py opens"),
    "benchmark": ("distill.benchmark", "print the seconds per sample of a recipe's stages"),
    "evaluate": ("distill.evaluate.evaluate", "compare generated frames with the ground truth"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status (see `worldmodel.cli.run`)."""
    return run_command("python -m distill", __doc__, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())

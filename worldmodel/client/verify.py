"""`worldmodel verify RECORDING`: replay a recording and compare every frame."""

import argparse
from pathlib import Path

from worldmodel.client.headless import verify_recording
from worldmodel.client.options import add_engine_arguments, read_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "replay", type=Path, metavar="RECORDING", help="folder that F9 or --record made"
    )
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Verify, and return the exit status: 0 when every frame is bit-identical."""
    args.verify = True
    return verify_recording(read_options(args))

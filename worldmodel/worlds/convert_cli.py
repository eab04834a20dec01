"""`worldmodel convert [SOURCE] --world YAML --output FOLDER`: make a world of published weights."""

import argparse
import shlex
from pathlib import Path

from worldmodel.cli import positive, print_line, print_progress
from worldmodel.worlds.convert import Conversion, PublishedWorld, convert
from worldmodel.worlds.inspect_cli import PART, SOURCE

DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help=f"of the transformer: {SOURCE} (default: as the YAML says)",
    )
    parser.add_argument(
        "--world",
        metavar="YAML",
        type=Path,
        required=True,
        help="size, steps, camera: a file such as configs/worlds/minwm-4step.yaml",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, required=True, help="the world to write"
    )
    parser.add_argument(
        "--autoencoder",
        metavar="SOURCE",
        help="vae/ in diffusers' layout, or taew2_1 weights (default: as the YAML says)",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="safetensors, embeddings by name (default: the YAML's sentence)",
    )
    parser.add_argument("--part", help=PART)
    parser.add_argument(
        "--head-dim",
        type=positive,
        help="width of an attention head (default: as a config.json says, or 128)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=Conversion.dtype,
        help="of the stored weights (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    published = PublishedWorld.read(args.world)
    options = Conversion(
        args.source or "",
        args.autoencoder or "",
        args.prompts,
        args.part,
        args.head_dim,
        args.dtype,
    )
    convert(published, args.output, options, print_progress)
    folder = shlex.quote(str(args.output))
    print_line(f"{args.output} is ready; play it with: worldmodel play --world {folder}")

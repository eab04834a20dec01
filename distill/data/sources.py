"""`python -m distill collect`: footage with exact camera poses, from our own renderer (`blocks`) or
a real game (`vizdoom`).
"""

import argparse
from dataclasses import fields
from pathlib import Path

from distill.data import vizdoom
from distill.data.blocks import collect as blocks
from distill.data.blocks.town import MOODS
from distill.data.collect import SPLITS, CollectConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `collect`."""
    sources = parser.add_subparsers(dest="source", required=True)
    town = sources.add_parser(
        "blocks", help="walks through endless towns or an island of flat-shaded boxes"
    )
    game = sources.add_parser(
        "vizdoom", help="walks through levels of a ViZDoom game (extra `collect`)"
    )
    for source in (town, game):
        _add_common_arguments(source)
    _add_blocks_arguments(town)
    game.add_argument(
        "--levels",
        default="",
        help="comma-separated maps, e.g. MAP01,MAP02 (default: a choice of maps)",
    )


def _add_blocks_arguments(town: argparse.ArgumentParser) -> None:
    town.add_argument(
        "--scene",
        choices=tuple(blocks.SCENES),
        default="town",
        help="town: every clip in a town of its own; island: every clip on the same island, where "
        "train and heldout share the place but not the walks (default: town)",
    )
    town.add_argument(
        "--moods",
        default="all",
        help=f"comma-separated, of {', '.join(MOODS)} (default: all that the scene has)",
    )
    town.add_argument(
        "--samples",
        type=int,
        default=blocks.BlocksConfig.samples,
        help="rays along a pixel's side (default: %(default)s)",
    )
    town.add_argument(
        "--depth",
        action="store_true",
        help="write depth.safetensors too: the depth at the pose of every latent",
    )
    town.add_argument(
        "--unfilmed",
        action="store_true",
        help="keep one disc and two sectors of view, marked in distill/data/blocks/island.py, out "
        "of the train split of the island, to test what was never seen",
    )


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the clips; finished clips are kept"
    )
    helps = {
        "clips": "number of clips that the folder will hold",
        "latents": "latent frames per clip, 4 video frames each",
        "seed": "another seed gives other places and walks",
        "height": "pixels",
        "width": "pixels",
        "workers": "processes",
    }
    for name, text in helps.items():
        default = getattr(CollectConfig, name)
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="train",
        help="heldout places (on the island: walks) never occur in train (default: train)",
    )


def run(args: argparse.Namespace) -> None:
    """Collect the requested clips. Raises UserError for options that cannot be used."""
    common = {field.name: getattr(args, field.name) for field in fields(CollectConfig)}
    if args.source == "blocks":
        moods = blocks.parse_moods(args.moods, args.scene)
        own = {name: getattr(args, name) for name in ("samples", "scene", "depth", "unfilmed")}
        config = blocks.BlocksConfig(**common, moods=moods, **own)
        blocks.collect_clips(config)
    else:
        levels = tuple(name for name in args.levels.split(",") if name)
        vizdoom.collect_clips(vizdoom.VizdoomConfig(**common, levels=levels))

"""`python -m distill place add BUNDLE --clips DIR --name NAME`: a bundle remembers a place that
clips show.
"""

import argparse
import re
from pathlib import Path

import numpy as np

from distill.data.clips import list_clips, read_meta
from distill.data.conditions import PlaceFootage, chosen, read_footage, spread
from worldmodel.cli import positive, print_line
from worldmodel.errors import UserError
from worldmodel.files import replacing_folder
from worldmodel.walkable import WalkableMap
from worldmodel.worlds.place import Place
from worldmodel.worlds.place_views import write_views
from worldmodel.worlds.world import World

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `place`."""
    actions = parser.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="remember a place")
    add.add_argument("bundle", type=Path, help="folder of the world")
    add.add_argument(
        "--clips", type=Path, required=True, help="folder of clips of one place, with depth"
    )
    add.add_argument("--name", required=True, help="of the place: small letters, digits, hyphens")
    add.add_argument("--title", default="", help="a line for menus (default: the name)")
    add.add_argument(
        "--views", type=positive, default=1200, help="frames to remember (default: 1200)"
    )


def run(args: argparse.Namespace) -> None:
    """Write `places/NAME/` into the bundle."""
    if not NAME.fullmatch(args.name):
        raise UserError(
            f"expected --name of at most 32 small letters, digits and hyphens, got {args.name!r}"
        )
    world = World.from_pretrained(args.bundle)
    folder = world.folder / "places" / args.name
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it, or choose another --name")
    size = tuple(cells * world.autoencoder.encoder_factor for cells in world.latent_size)
    footage, source = place_footage(args.clips, size)
    positions = footage.views.c2w[:, [0, 2], 3]
    start = footage.views.c2w[0]
    walkable = WalkableMap.from_positions(positions)
    place = Place(args.name, args.title or args.name, start, walkable, source)
    remembered = chosen(footage, spread(footage.views.c2w, args.views))
    folder.parent.mkdir(exist_ok=True)
    with replacing_folder(folder) as partial:
        place.write(partial)
        size = write_views(partial, remembered.views).stat().st_size
    print_line(f"{folder}: {len(remembered.views)} frames in {size / 1e6:.1f} MB")


def place_footage(root: Path, size: tuple[int, int]) -> tuple[PlaceFootage, str]:
    """The views of the clips under `root`, and the source that their meta.yaml names. Raises
    UserError unless all show one place.
    """
    folders = list_clips(root)
    sources = sorted({read_meta(folder)["source"] for folder in folders})
    if len(sources) > 1:
        raise UserError(
            f"{root}: expected clips of one place, in one coordinate system, got the sources "
            f"{sources[0]} and {sources[1]}; put each place into a folder of its own"
        )
    footage = read_footage(folders, size)
    _check_overlap(footage, folders)
    return footage, sources[0]


def _check_overlap(footage: PlaceFootage, folders: list[Path]) -> None:
    """UserError when a clip sees nothing of what the others show."""
    for number, folder in enumerate(folders if len(folders) > 1 else ()):
        own = footage.clip == number
        middle = np.flatnonzero(own)[own.sum() // 2]
        if not footage.views.choose(footage.views.c2w[middle], 1, own):
            raise UserError(
                f"{folder}: expected a clip that overlaps the others, but none shows what it "
                "shows; remove it, or film the way between"
            )

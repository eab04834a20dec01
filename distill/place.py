"""`python -m distill place add BUNDLE --clips DIR --name NAME`: a bundle remembers a place that
clips show.
"""

import argparse
import re
from pathlib import Path

import numpy as np

from distill.data.clips import list_clips, read_clip, read_meta
from distill.data.conditions import PlaceFootage, chosen, read_footage, spread
from worldmodel.camera import FRAMES_PER_LATENT, advance
from worldmodel.cli import positive, print_line
from worldmodel.errors import UserError
from worldmodel.files import replacing_folder
from worldmodel.images import fit_picture
from worldmodel.reprojection import SKY, RememberedViews
from worldmodel.walkable import WalkableMap
from worldmodel.worlds.place import PLACES, Place
from worldmodel.worlds.place_views import write_views
from worldmodel.worlds.world import World

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
LEVEL = 0.5  # degrees of tilt: a walk is level where it begins
FAR = 20  # median depths
CANDIDATES = 48  # widest poses whose coverage is compared
SHARED = 0.02  # of the ground that a clip shows
GLANCES = (-50.0, 0.0, 50.0)  # degrees: where a player looks first


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
    add.add_argument(
        "--start",
        metavar="CLIP:LATENT",
        help="where walks begin, e.g. blocks-00003:7 (default: the widest view)",
    )


def run(args: argparse.Namespace) -> None:
    """Write `places/NAME/` into the bundle."""
    if not NAME.fullmatch(args.name):
        raise UserError(
            f"expected --name of at most 32 small letters, digits and hyphens, got {args.name!r}"
        )
    world = World.from_pretrained(args.bundle)
    folder = world.folder / PLACES / args.name
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it, or choose another --name")
    folders = list_clips(args.clips)
    footage = place_footage(args.clips, folders, world)
    walkable = WalkableMap.from_positions(footage.views.c2w[:, [0, 2], 3])
    remembered = chosen(footage, spread(footage.views.c2w, args.views)).views
    if args.start:
        number = named_view(args.start, folders, footage)
    else:
        number = widest_view(footage.views, remembered, world.config.views)
    start = footage.views.c2w[number]
    if world.config.envelope.style == "walk" and _tilt(start[None])[0] > LEVEL:
        raise UserError(
            f"{args.clips}: expected a level camera where walks begin, got one that is tilted by "
            f"{_tilt(start[None])[0]:.1f} degrees; name another with --start CLIP:LATENT"
        )
    clip = read_clip(folders[footage.clip[number]])
    latent = number - int(np.argmax(footage.clip == footage.clip[number]))
    picture = clip.frames[FRAMES_PER_LATENT * latent]
    place = Place(
        args.name,
        args.title or args.name,
        start,
        walkable,
        fit_picture(picture, world.config.height, world.config.width),
        clip.caption if clip.caption in world.prompts else "",
        clip.source,
    )
    folder.parent.mkdir(exist_ok=True)
    with replacing_folder(folder) as partial:
        place.write(partial)
        size = write_views(partial, remembered).stat().st_size
    begins = f"{folders[footage.clip[number]].name}:{latent}"
    print_line(
        f"{folder}: {len(remembered)} frames in {size / 1e6:.1f} MB; walks begin at {begins}"
    )


def place_footage(root: Path, folders: list[Path], world: World) -> PlaceFootage:
    """The views of the clips `folders` under `root`, for a place of `world`. Raises UserError
    unless all show one place, through the lens of the world.
    """
    sources = sorted({read_meta(folder)["source"] for folder in folders})
    if len(sources) > 1:
        raise UserError(
            f"{root}: expected clips of one place, in one coordinate system, got the sources "
            f"{sources[0]} and {sources[1]}; put each place into a folder of its own"
        )
    size = tuple(cells * world.autoencoder.encoder_factor for cells in world.latent_size)
    footage = read_footage(folders, size)
    lens = footage.views.intrinsics
    if np.abs(np.array(lens) - world.config.intrinsics).max() > 1e-3:
        raise UserError(
            f"{root}: expected clips with the world's lens {list(world.config.intrinsics)}, got "
            f"{list(lens)}; collect them for this world"
        )
    _check_overlap(footage, folders)
    return footage


def widest_view(views: RememberedViews, remembered: RememberedViews, count: int) -> int:
    """Number of the view where a walk begins best: level, over wide ground, and most of what is
    seen there ahead and at the sides is remembered.

    Width is the mean depth over the picture, in which what is farther than FAR medians (sky, the
    open sea) counts nothing: a horizon is no view of a place. count: frames for each latent.
    """
    tilt = _tilt(views.c2w)
    depth = views.depth.float().flatten(1)
    far = FAR * depth[depth < SKY].median()
    width = (depth * (depth < far)).mean(1).numpy()
    width /= width.max()
    width[tilt > max(LEVEL, tilt.min())] = -1
    best = np.argsort(-width, kind="stable")[:CANDIDATES]
    scores = [width[n] + _coverage(remembered, views.c2w[n], count) for n in best]
    return int(best[np.argmax(scores)])


def _coverage(views: RememberedViews, c2w: np.ndarray, count: int) -> float:
    """Share of what is known of the pictures of a camera at `c2w` that glances around."""
    glances = [advance(c2w, [0, 0, 0], degrees, 0) for degrees in GLANCES]
    known = [views.reproject(views.choose(pose, count), pose)[1] for pose in glances]
    return float(np.mean([share.float().mean() for share in known]))


def _tilt(c2w: np.ndarray) -> np.ndarray:
    """Degrees between the vertical of cameras [N, 4, 4] and that of their coordinates: [N]."""
    return np.degrees(np.arccos(np.clip(c2w[:, 1, 1], -1, 1)))


def named_view(start: str, folders: list[Path], footage: PlaceFootage) -> int:
    """Number of the view that `start`, CLIP:LATENT, names. Raises UserError where there is none."""
    name, _, latent = start.rpartition(":")
    names = [folder.name for folder in folders]
    own = np.flatnonzero(footage.clip == names.index(name)) if name in names else []
    if not latent.isdecimal() or int(latent) >= len(own):
        raise UserError(
            f"expected --start CLIP:LATENT with a clip's folder and a latent of it, e.g. "
            f"{names[0]}:0, got {start!r}"
        )
    return int(own[int(latent)])


def _check_overlap(footage: PlaceFootage, folders: list[Path]) -> None:
    """UserError when a clip sees next to nothing of the ground that others show: less than SHARED
    of the cubes in which its points lie hold points of others. The sky, which all see, is no
    ground.
    """
    points, depth = (part.flatten(0, 1).numpy() for part in footage.views.probes)
    clip = np.repeat(footage.clip, footage.views.probes[1].shape[1])
    solid = depth.ravel() < SKY
    side = np.median(depth.ravel()[solid]) / 2
    cubes = np.floor(points[solid] / side).astype(np.int64)
    pairs = np.unique(np.column_stack([cubes, clip[solid]]), axis=0)
    _, cube, count = np.unique(pairs[:, :3], axis=0, return_inverse=True, return_counts=True)
    shared = count[cube.ravel()] > 1
    for number, folder in enumerate(folders if len(folders) > 1 else ()):
        own = shared[pairs[:, 3] == number]
        if not len(own) or own.mean() < SHARED:
            raise UserError(
                f"{folder}: expected a clip that overlaps the others, but none shows what it "
                "shows; remove it, or film the way between"
            )

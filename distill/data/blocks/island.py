"""An island village of flat-coloured boxes: one finite place with a fixed plan, for footage of a
world that can be known by heart.

Axes and units are those of the town. The plan covers PLAN cells along x and z, from the origin on;
sea lies all around, on the same plane y = 0 as the land. Positions in this file are in tiles (a
third of a cell), x to the east and z to the north; heights are in units. South: the harbour with
pier and boats, the beach, the lighthouse. Middle: windmill, market square, chapel. North: the
keep, the arched lane, the garden. Each quarter has wall and roof colours of its own.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from distill.data.blocks.town import CELL, MOODS, TILES, Boxes, Mood, rgb
from worldmodel.errors import UserError

PLAN = 12  # cells along each side of the plan
TILE = CELL / TILES  # side of a tile, units
VERSION = 1  # of the plan and its colours; part of the source of a clip
VISIBILITY = 26.0  # the whole island is visible from everywhere, units
REACH = 16  # cells that show the whole island from every cell of the plan
SHALLOW = 3  # width of the shallow water along the shore, tiles

# Ground, later rows over earlier ones: kind, x from, x to, z from, z to. Sea elsewhere.
GROUND = (
    ("grass", 4, 32, 11, 32),
    ("grass", 7, 29, 32, 34),
    ("grass", 2, 4, 14, 28),
    ("grass", 32, 34, 14, 27),
    ("sand", 5, 12, 6, 11),
    ("sand", 4, 10, 11, 12),
    ("stone", 24, 32, 5, 11),
    ("stone", 28, 34, 2, 6),
    ("planks", 17, 19, 3, 11),
    ("planks", 15, 21, 1, 3),
    ("stone", 10, 29, 11, 13),
    ("square", 12, 24, 13, 21),
    ("lane", 9, 12, 13, 21),
    ("lane", 24, 28, 13, 21),
    ("lane", 4, 33, 21, 23),
    ("lane", 14, 16, 23, 33),
    ("lane", 20, 22, 23, 32),
    ("lane", 26, 28, 23, 32),
    ("lane", 8, 28, 32, 33),
    ("square", 8, 11, 23, 31),
    ("square", 28, 33, 14, 19),
    ("field", 3, 8, 18, 21),
)
SHORE_OF = {"grass": "sand"}  # a tile of the first kind that touches the sea becomes the second


@dataclass(frozen=True)
class View:
    """Headings that the train split does not film inside a rectangle of the plan."""

    x: tuple[float, float]  # units
    z: tuple[float, float]  # units
    heading: float  # degrees, 0 along +z, 90 along +x
    width: float  # degrees, both sides together


# What `collect blocks --scene island --unfilmed` keeps out of the train split: no camera within the
# disc, and none in a quarter that looks into its sector.
UNFILMED_DISC = (27 * TILE, 27 * TILE, 1.0)  # x, z, radius, units: the lane east of the rose houses
UNFILMED_VIEWS = (
    View(x=(0.0, 6.6), z=(0.0, 6.6), heading=45.0, width=60.0),  # south-west, to the chapel
    View(x=(6.6, 13.2), z=(0.0, 6.6), heading=-45.0, width=60.0),  # south-east, to the keep
)

# Colours by mood: tones of ground and sea (near tiles alternate between two), then of what is built
PALETTES = {
    "meadow": {
        "sea": rgb("2178b8", "2b86c4"),
        "shallow": rgb("45b5c9", "58c3d0"),
        "grass": rgb("86c550", "74b545"),
        "sand": rgb("f3dfa6", "e9d093"),
        "stone": rgb("c9c3b8", "b8b2a8"),
        "planks": rgb("b98a58", "a67848"),
        "square": rgb("eadcc0", "d8c49e"),
        "lane": rgb("d9bf93", "c9ad80"),
        "field": rgb("f0c84a", "9cbf4a"),
        "rim": rgb("a8a298"),
        "harbour": rgb("a9d4e6"),
        "harbour_roof": rgb("2f62a8"),
        "market": rgb("f2b84b"),
        "market_roof": rgb("b8472f"),
        "rose": rgb("e58a7e"),
        "rose_roof": rgb("6d4a7a"),
        "keep": rgb("a89f94"),
        "keep_roof": rgb("5f5a58"),
        "banner": rgb("c8323a"),
        "farm": rgb("f4e6c4"),
        "farm_roof": rgb("8a5a34"),
        "chapel": rgb("fbf7ee"),
        "chapel_roof": rgb("2f9c8c"),
        "villa": rgb("f6d9dc"),
        "red": rgb("d93a34"),
        "white": rgb("fbf9f4"),
        "green": rgb("2f8f5a"),
        "wood": rgb("8a5f3a"),
        "door": rgb("4a3226"),
        "window": rgb("3f5f7f"),
        "water": rgb("5cc4dc"),
        "lamp": rgb("ffe88a"),
        "crown": rgb("3a9a44"),
        "cypress": rgb("23714a"),
        "rock": rgb("8c8a86"),
    },
}
GLITTER = {"meadow": 0.45}  # share of the light of the sun's disc in the sea below it


@dataclass(frozen=True)
class Island:
    """The island in one mood. It has the face of `Town`: see `distill.data.blocks.scenes`.

    Raises UserError for a mood in which the island has no colours.
    """

    mood: str

    def __post_init__(self):
        if self.mood not in PALETTES:
            raise UserError(
                f"expected a mood of the island ({', '.join(PALETTES)}), got {self.mood!r}"
            )

    @classmethod
    def from_source(cls, source: str) -> "Island":
        """The island of a clip, from the `source` of its meta.yaml (`island:<mood>:<version>`)."""
        parts = source.split(":")
        if len(parts) != 3 or parts[0] != "island":
            raise UserError(f"expected a clip source like island:meadow:1, got {source!r}")
        if parts[2] != str(VERSION):
            raise UserError(
                f"expected version {VERSION} of the island, got {source!r}; collect its clips again"
            )
        return cls(parts[1])

    @property
    def source(self) -> str:
        return f"island:{self.mood}:{VERSION}"

    @property
    def look(self) -> Mood:
        return replace(MOODS[self.mood], visibility=VISIBILITY, glitter=GLITTER[self.mood])

    @property
    def reach(self) -> int:
        return REACH

    def boxes(self, i: int, j: int, reach: int) -> Boxes:
        """All boxes that touch the cells within `reach` cells of cell (i, j)."""
        boxes = _boxes(self.mood)
        low = (np.array([i, j]) - reach) * CELL
        high = (np.array([i, j]) + reach + 1) * CELL
        touched = ((boxes.high[:, [0, 2]] > low) & (boxes.low[:, [0, 2]] < high)).all(1)
        return Boxes(*(part[touched] for part in vars(boxes).values()))

    def ground(self, i: int, j: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
        """Tile colours around cell (i, j) -> (near, far), both [T, T, 3], see `Town.ground`."""
        kinds = _around(i, j, reach)
        palette = PALETTES[self.mood]
        tones = np.array([palette[name] for name in KINDS])[kinds]  # [T, T, 2, 3]
        line = np.arange(len(kinds))
        tile_i = line[:, None] + TILES * (i - reach)
        tile_j = line[None, :] + TILES * (j - reach)
        odd = (tile_i + tile_j) & 1
        odd = np.where(kinds == KINDS.index("field"), tile_i & 1, odd)  # furrows along z
        odd = np.where(kinds == KINDS.index("planks"), tile_j & 1, odd)  # boards across the pier
        near = np.where(odd[..., None] == 0, tones[..., 0, :], tones[..., 1, :])
        return near, tones.mean(axis=-2)

    def sea(self, i: int, j: int, reach: int) -> np.ndarray:
        """Which tiles around cell (i, j) are water, bool [T, T]."""
        return _around(i, j, reach) < WATER

    def barriers(self, i: int, j: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
        """Footprints (low, high) [n, 2] in x and z that feet cannot enter: the water."""
        return _water()

    def walkable(self, step: float = 0.1, radius: float = 0.12) -> np.ndarray:
        """Where the walker can be: bool [n, n], rows x, columns z, at ((k + 0.5) * step).

        Ground that keeps `radius` from every wall and from the water, and that is connected with
        the market square.
        """
        return _walkable(self.mood, step, radius)

    def start(
        self, number: int, shift=(0.0, 0.0, 0.0), unfilmed: bool = False
    ) -> tuple[np.ndarray, float]:
        """Start `number` (position [2] in units, heading in degrees) of a sequence that fills the
        walkable ground and all headings evenly, however long it is.

        Roberts' additive recurrence in three dimensions, without the points that are not walkable.

        shift: three numbers in [0, 1) that select a sequence.
        unfilmed: omit the starts that the train split does not film, too.
        """
        step = 0.1
        mask = self.walkable(step)
        steps = 1.2207440846057596 ** -np.arange(1.0, 4.0)  # the root of x^4 = x + 1
        size = 4 * number + 64
        while True:
            points = (np.asarray(shift) + np.arange(1, size + 1)[:, None] * steps) % 1.0
            x, z = PLAN * CELL * points[:, :2].T
            heading = 360.0 * points[:, 2]
            kept = mask[(x / step).astype(int), (z / step).astype(int)]
            if unfilmed:
                kept &= ~_is_unfilmed(x, z, heading)
            kept = np.flatnonzero(kept)
            if len(kept) > number:
                chosen = kept[number]
                return np.array([x[chosen], z[chosen]]), float(heading[chosen])
            size *= 2

    def unfilmed(self, c2w) -> np.ndarray:
        """Which cameras [N, 4, 4] stand in the disc, or look into a sector, that the train split
        does not film; bool [N].
        """
        c2w = np.asarray(c2w).reshape(-1, 4, 4)
        heading = np.degrees(np.arctan2(c2w[:, 0, 2], c2w[:, 2, 2]))
        return _is_unfilmed(c2w[:, 0, 3], c2w[:, 2, 3], heading)


def _is_unfilmed(x: np.ndarray, z: np.ndarray, heading: np.ndarray) -> np.ndarray:
    hidden = np.hypot(x - UNFILMED_DISC[0], z - UNFILMED_DISC[1]) < UNFILMED_DISC[2]
    for view in UNFILMED_VIEWS:
        inside = (x >= view.x[0]) & (x < view.x[1]) & (z >= view.z[0]) & (z < view.z[1])
        aside = np.abs((heading - view.heading + 180) % 360 - 180)
        hidden |= inside & (aside < view.width / 2)
    return hidden


KINDS = ("sea", "shallow", *dict.fromkeys(row[0] for row in GROUND))
WATER = 2  # kinds before this number are water


@lru_cache
def _tiles() -> np.ndarray:
    """Kind of every tile of the plan, int [N, N], with a margin of shallow water's width."""
    count = PLAN * TILES + 2 * SHALLOW
    kinds = np.zeros((count, count), dtype=int)
    for name, x0, x1, z0, z1 in GROUND:
        kinds[x0 + SHALLOW : x1 + SHALLOW, z0 + SHALLOW : z1 + SHALLOW] = KINDS.index(name)
    shore = _grown(kinds < WATER) & (kinds >= WATER)
    for inner, edge in SHORE_OF.items():
        kinds[shore & (kinds == KINDS.index(inner))] = KINDS.index(edge)
    near = kinds >= WATER
    for _ in range(SHALLOW):
        near = _grown(near)
    kinds[near & (kinds < WATER)] = KINDS.index("shallow")
    return kinds


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask with the four neighbours of each of its tiles."""
    wide = np.pad(mask, 1)
    return mask | wide[2:, 1:-1] | wide[:-2, 1:-1] | wide[1:-1, 2:] | wide[1:-1, :-2]


def _around(i: int, j: int, reach: int) -> np.ndarray:
    """Kinds of the tiles within `reach` cells of cell (i, j), int [T, T]."""
    kinds = _tiles()
    line = np.arange(TILES * (2 * reach + 1))
    x = line + TILES * (i - reach) + SHALLOW
    z = line + TILES * (j - reach) + SHALLOW
    known = ((x >= 0) & (x < len(kinds)))[:, None] & ((z >= 0) & (z < len(kinds)))[None, :]
    last = len(kinds) - 1
    return np.where(known, kinds[np.ix_(np.clip(x, 0, last), np.clip(z, 0, last))], 0)


@lru_cache
def _water() -> tuple[np.ndarray, np.ndarray]:
    """The water of the plan and its margin as few rectangles: (low, high) [n, 2], units."""
    wet = _tiles() < WATER
    runs = {}  # z from, z to -> x from, of the runs that end at the row before
    rectangles = []
    for x in range(len(wet) + 1):
        line = np.flatnonzero(np.diff(np.pad(wet[x] if x < len(wet) else wet[0] & False, 1)))
        found = {(int(a), int(b)) for a, b in line.reshape(-1, 2)}
        for run in [run for run in runs if run not in found]:
            rectangles.append((runs.pop(run), run[0], x, run[1]))
        for run in found - runs.keys():
            runs[run] = x
    corners = (np.array(rectangles, dtype=float) - SHALLOW) * TILE
    return corners[:, :2], corners[:, 2:]


@lru_cache
def _walkable(mood: str, step: float, radius: float) -> np.ndarray:
    boxes = _boxes(mood)
    body = boxes.high[:, 1] > -0.2
    low = np.concatenate([boxes.low[body][:, [0, 2]], _water()[0]])
    high = np.concatenate([boxes.high[body][:, [0, 2]], _water()[1]])
    line = (np.arange(math.ceil(PLAN * CELL / step)) + 0.5) * step
    free = np.ones((len(line), len(line)), dtype=bool)
    for (x0, z0), (x1, z1) in zip(low, high):
        gap_x = line - np.clip(line, x0, x1)
        gap_z = line - np.clip(line, z0, z1)
        free &= np.hypot(gap_x[:, None], gap_z[None, :]) >= radius
    reached = np.zeros_like(free)
    middle = (int(18.5 * TILE / step), int(14.5 * TILE / step))  # the market, south of the fountain
    reached[middle] = free[middle]
    while True:
        more = _grown(reached) & free
        if (more == reached).all():
            return reached
        reached = more


@lru_cache
def _boxes(mood: str) -> Boxes:
    site = _Site(PALETTES[mood])
    for build in (_harbour, _lighthouse, _west, _market, _chapel, _keep, _lane, _garden, _horizon):
        build(site)
    rows = [np.array(part, dtype=float) for part in zip(*site.rows)]
    return Boxes(*rows)


class _Site:
    """Collects boxes. Spans are (from, to): x and z in tiles, y in units above the ground."""

    def __init__(self, palette: dict):
        self.palette = palette
        self.rows = []

    def box(self, x, z, y, side: str, top: str = "", glow: float = 0.0) -> None:
        """One box; `side` and `top` name colours (the first tone of a ground's)."""
        low = (x[0] * TILE, -y[1], z[0] * TILE)
        high = (x[1] * TILE, -y[0], z[1] * TILE)
        colours = (np.atleast_2d(self.palette[name])[0] for name in (side, top or side))
        self.rows.append((low, high, *colours, glow))

    def block(self, centre, size, y, side: str, top: str = "", glow: float = 0.0) -> None:
        """One box around a centre (x, z) with a size (x, z) or a side length, in tiles."""
        wide, deep = np.broadcast_to(size, 2) / 2
        x, z = centre
        self.box((x - wide, x + wide), (z - deep, z + deep), y, side, top, glow)

    def house(self, x, z, height: float, walls: str, door: str, windows: bool = True) -> None:
        """A body, a roof of two steps, and a door with a window on each side in the wall that
        faces `door` (n, s, e or w), with windows in the opposite wall too.
        """
        roof = f"{walls}_roof"
        self.box(x, z, (0, height), walls)
        self.box(
            (x[0] - 0.25, x[1] + 0.25), (z[0] - 0.25, z[1] + 0.25), (height, height + 0.07), roof
        )
        inset = 0.22 * min(x[1] - x[0], z[1] - z[0])
        self.box(
            (x[0] + inset, x[1] - inset), (z[0] + inset, z[1] - inset), (height, height + 0.2), roof
        )
        self.opening(x, z, door, 0.0, 0.46, (0, 0.22), "door")
        walls_with_windows = (door, {"n": "s", "s": "n", "e": "w", "w": "e"}[door])
        for wall in walls_with_windows if windows else ():
            for side in (-1, 1):
                self.opening(x, z, wall, side * 0.3, 0.42, (0.2, 0.34), "window")

    def opening(self, x, z, wall: str, shift: float, width: float, y, colour: str) -> None:
        """A flat box on a wall; `shift`: from the wall's middle, as a share of its length."""
        along = z if wall in "ew" else x
        middle = (along[0] + along[1]) / 2 + shift * (along[1] - along[0])
        span = (middle - width / 2, middle + width / 2)
        face = {"w": x[0], "e": x[1], "s": z[0], "n": z[1]}[wall]
        thick = (face - 0.07, face + 0.07)
        self.box(*((thick, span) if wall in "ew" else (span, thick)), y, colour)

    def tree(self, x: float, z: float, crown: float = 0.95) -> None:
        self.block((x, z), 0.24, (0, 0.3), "wood")
        self.block((x, z), crown, (0.26, 0.26 + 0.36 * crown), "crown")

    def cypress(self, x: float, z: float, height: float = 0.8) -> None:
        self.block((x, z), 0.7, (0.05, height), "cypress")


def _harbour(site: _Site) -> None:
    """Quay walls, two boats at the pier, the warehouses, the fishing hut on the beach."""
    for x, z in (
        ((12, 17), (10.7, 11)),
        ((19, 24), (10.7, 11)),
        ((23.7, 24), (5, 11)),
        ((24, 28), (4.7, 5)),
        ((28, 34), (1.7, 2)),
        ((27.7, 28), (1.7, 5)),
        ((34, 34.3), (1.7, 6)),
    ):
        site.box(x, z, (0, 0.05), "rim")
    _boat(site, 21.2, 6.6, "red", "white")
    _boat(site, 14.8, 5.6, "harbour_roof", "red")
    for x in (17.1, 18.9):
        site.block((x, 3.4), 0.24, (0, 0.16), "wood")
    site.house((26.3, 29), (7.2, 10.4), 0.5, "harbour", "w")
    site.block((25.1, 6), 0.7, (0, 0.2), "wood", "market")
    site.block((25.2, 6.1), 0.4, (0.2, 0.32), "wood", "market")
    site.house((5.8, 8), (8.6, 10.6), 0.36, "harbour", "e", windows=False)
    site.tree(10.6, 8.8)


def _boat(site: _Site, x: float, z: float, hull: str, sail: str) -> None:
    """A boat of two hull steps with a mast and a square sail across z."""
    site.block((x, z), (1.5, 3.2), (0, 0.12), hull, "wood")
    site.block((x, z - 1.4), (1.0, 1.0), (0, 0.17), hull, "wood")
    site.block((x, z), 0.2, (0.1, 1.05), "wood")
    site.block((x, z - 0.1), (1.9, 0.12), (0.35, 0.95), sail)


def _lighthouse(site: _Site) -> None:
    """The tall striped tower on the south-eastern point."""
    centre = (31, 4)
    site.block(centre, 2.4, (0, 0.18), "rock")
    for step in range(6):
        size = 1.75 - 0.12 * step
        colour = "white" if step % 2 else "red"
        site.block(centre, size, (0.18 + 0.4 * step, 0.58 + 0.4 * step), colour)
    site.block(centre, 1.7, (2.58, 2.66), "rim")
    site.block(centre, 0.9, (2.66, 2.96), "lamp", glow=0.8)
    site.block(centre, 1.25, (2.96, 3.08), "red")
    site.block(centre, 0.6, (3.08, 3.24), "red")


def _west(site: _Site) -> None:
    """The windmill with its field, and the farm."""
    centre = (5.5, 16)
    site.block(centre, 1.9, (0, 0.6), "white")
    site.block(centre, 1.5, (0.6, 1.15), "white")
    site.block(centre, 1.75, (1.15, 1.35), "farm_roof")
    site.opening((4.55, 6.45), (15.05, 16.95), "e", 0.0, 0.5, (0, 0.24), "door")
    hub = 6.6
    site.block((hub, 16), (0.14, 0.4), (0.4, 1.9), "banner")
    site.block((hub, 16), (0.14, 4.1), (1.08, 1.22), "banner")
    site.house((4.6, 7.4), (12.6, 14.2), 0.34, "farm", "n", windows=False)
    site.tree(3.6, 24.4)
    site.tree(3.4, 21.9, 1.1)


def _market(site: _Site) -> None:
    """Ochre houses around the square, a fountain, four striped stalls."""
    site.house((9.4, 11.9), (13.6, 16.6), 0.52, "market", "e")
    site.house((9.4, 11.9), (17.8, 20.8), 0.6, "market", "e")
    site.house((24.1, 26), (13.4, 15.8), 0.46, "market", "w")
    site.house((24.1, 26), (18.6, 20.9), 0.54, "market", "w")
    site.block((18, 17.5), 1.9, (0, 0.12), "rim", "water")
    site.block((18, 17.5), 0.5, (0.1, 0.42), "rim")
    site.block((18, 17.5), 1.0, (0.42, 0.48), "rim", "water")
    for x, z, colour in (
        (14.6, 15, "red"),
        (14.6, 19.2, "green"),
        (21.4, 15, "harbour_roof"),
        (21.4, 19.2, "red"),
    ):
        _stall(site, x, z, colour)


def _stall(site: _Site, x: float, z: float, colour: str) -> None:
    """A counter, a back wall, and an awning of five stripes."""
    site.block((x, z - 0.2), (2.2, 0.6), (0, 0.13), "wood", "market")
    site.block((x, z + 0.6), (2.2, 0.2), (0, 0.34), colour)
    for stripe in range(5):
        tone = "white" if stripe % 2 else colour
        site.block((x + 0.52 * (stripe - 2), z), (0.52, 1.7), (0.34, 0.42), tone)


def _chapel(site: _Site) -> None:
    """A white nave with a stepped roof, and a steeple that looks at the market."""
    nave = ((29.4, 32.6), (15.2, 17.8))
    site.box(*nave, (0, 0.45), "chapel")
    for step in range(3):
        inset = 0.4 * step - 0.2
        z = (nave[1][0] + inset, nave[1][1] - inset)
        site.box((29.4, 32.7), z, (0.45 + 0.1 * step, 0.55 + 0.1 * step), "chapel_roof")
    tower = ((28, 29.6), (15.7, 17.3))
    site.box(*tower, (0, 1.15), "chapel")
    site.opening(*tower, "w", 0.0, 0.5, (0, 0.26), "door")
    for wall in "wsn":
        site.opening(*tower, wall, 0.0, 0.5, (0.78, 1.0), "window")
    for step, size in enumerate((1.9, 1.25, 0.6)):
        site.block((28.8, 16.5), size, (1.15 + 0.2 * step, 1.35 + 0.2 * step), "chapel_roof")
    site.cypress(29, 19.6)
    site.cypress(31.4, 19.6)


def _keep(site: _Site) -> None:
    """A walled court with two gates, corner towers and the great tower."""
    wall = (0, 0.42)
    for x, z in (
        ((5, 8.6), (23.6, 24.2)),
        ((10.4, 13.6), (23.6, 24.2)),
        ((5, 13.6), (31, 31.6)),
        ((4.8, 5.4), (24, 31.2)),
        ((13, 13.6), (24, 26.6)),
        ((13, 13.6), (28.4, 31.2)),
    ):
        site.box(x, z, wall, "keep", "keep_roof")
    for x, z in (((8.6, 10.4), (23.5, 24.3)), ((12.9, 13.7), (26.6, 28.4))):  # over the gates
        site.box(x, z, (0.42, 0.6), "keep", "keep_roof")
    for centre in ((5.1, 23.9), (13.3, 23.9), (5.1, 31.3), (13.3, 31.3)):
        site.block(centre, 1.3, (0, 0.66), "keep")
        site.block(centre, 1.6, (0.66, 0.78), "keep_roof")
    site.block((7.6, 28.6), 2.6, (0, 1.6), "keep")
    site.block((7.6, 28.6), 3.0, (1.6, 1.72), "keep_roof")
    for x in (-1.15, 1.15):
        for z in (-1.15, 1.15):
            site.block((7.6 + x, 28.6 + z), 0.7, (1.72, 1.9), "keep")
    site.opening((6.3, 8.9), (27.3, 29.9), "s", 0.0, 0.6, (0, 0.28), "door")
    site.opening((6.3, 8.9), (27.3, 29.9), "s", 0.0, 0.9, (0.75, 1.45), "banner")
    site.opening((6.3, 8.9), (27.3, 29.9), "e", 0.0, 0.9, (0.75, 1.45), "banner")
    site.block((7.6, 28.6), 0.2, (1.72, 2.5), "wood")
    site.block((8.25, 28.6), (1.2, 0.14), (2.14, 2.5), "banner")


def _lane(site: _Site) -> None:
    """Rose houses along a lane with two arches."""
    site.house((16.3, 19.8), (23.4, 26.2), 0.5, "rose", "w")
    site.house((16.3, 19.8), (27.6, 31.2), 0.58, "rose", "w")
    site.house((22.2, 25.6), (23.4, 26.6), 0.56, "rose", "e")
    site.house((22.2, 25.6), (28, 31.2), 0.48, "rose", "e")
    for z in ((24, 25.2), (29, 30.2)):
        site.box((19.7, 22.3), z, (0.4, 0.62), "rose", "rose_roof")
        for x in ((19.7, 20.15), (21.85, 22.3)):
            site.box(x, z, (0, 0.4), "rose")


def _garden(site: _Site) -> None:
    """The villa between cypresses in the north-east, trees along the northern shore."""
    site.house((29.2, 31.6), (25.4, 28), 0.44, "chapel", "w")
    for z in (24, 29.6, 31):
        site.cypress(28.8, z, 0.9)
    site.tree(32.6, 23.9)
    site.tree(30.9, 30.6)


def _horizon(site: _Site) -> None:
    """What stands in the sea around: each side of the island has its own shape on the horizon."""
    for x, z, size, height in ((-5, 33, 2.4, 0.5), (-3.6, 34, 1.4, 0.9), (41, 24, 2.6, 0.6)):
        site.block((x, z), size, (0, height), "rock")
    site.block((19, 43), (5, 3), (0, 0.12), "sand")
    site.block((19, 43), (4, 2.2), (0, 0.22), "grass")
    site.block((18, 43), 0.5, (0, 0.7), "wood")
    site.block((18, 43), 1.8, (0.6, 1.2), "crown")
    site.block((-9, 14), (3, 3), (0, 0.35), "rock")
    site.block((-9, 14), 0.9, (0.35, 1.2), "white")
    site.block((-9, 14), 1.2, (1.2, 1.4), "red")
    _boat(site, 5.5, -7, "red", "white")
    _boat(site, 42, 13, "green", "market")
    _boat(site, 31, 41, "harbour_roof", "red")

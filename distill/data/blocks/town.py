"""An endless, seeded town of flat-coloured boxes. Nothing is stored: every cell is determined by an
integer hash of its position.

World axes are the camera's (OpenCV): x right, y down, z forward. The ground is the plane y = 0,
buildings have y < 0. One unit is about 10 metres. The plan is a grid of cells; in both directions
one of every three lines of cells (which one, is hashed) is a street, the others are plots with a
house, a tower, a tree, a wall or nothing.
"""

import math
from dataclasses import dataclass

import numpy as np

from worldmodel.errors import UserError

CELL = 1.1  # side of a cell, units
TILES = 3  # ground tiles along the side of a cell
STREET_EVERY = 3  # cells per street line
GOLDEN = 0x9E3779B1


@dataclass(frozen=True)
class Mood:
    """Colours (RGB in [0, 1]) and light of a town."""

    sky: tuple  # colour high above
    horizon: tuple  # colour at the horizon, and of the fog
    # azimuth (degrees from +z towards +x) and elevation (degrees) of the sun or moon
    sun: tuple[float, float]
    light: tuple  # colour of the direct light
    ambient: tuple  # colour of the light in the shade
    disc: tuple  # colour of the sun or moon disc
    disc_radius: float  # degrees
    street: tuple  # the two tones of the tiles of a street
    plot: tuple  # the two tones of the tiles of a plot
    walls: tuple  # wall colours
    roofs: tuple  # roof colours
    doors: tuple  # door colours
    trunk: tuple
    crowns: tuple  # crown colours of the trees
    glow: float = 0.0  # share of a crown's colour that emits light (lanterns)
    visibility: float = 6.0  # distance at which 2 % of a surface's colour pass the fog, units
    glitter: float = 0.0  # share of the disc's colour that the sea below the sun reflects

    @property
    def sun_direction(self) -> np.ndarray:
        """Unit vector [3] towards the sun."""
        azimuth, elevation = (math.radians(angle) for angle in self.sun)
        flat = math.cos(elevation)
        return np.array([flat * math.sin(azimuth), -math.sin(elevation), flat * math.cos(azimuth)])


def rgb(*codes: str) -> tuple:
    """Colours of hexadecimal codes, RGB in [0, 1]: one colour, or a tuple of several."""
    colours = tuple(tuple(int(code[k : k + 2], 16) / 255 for k in (0, 2, 4)) for code in codes)
    return colours if len(colours) > 1 else colours[0]


MOODS = {
    "meadow": Mood(
        sky=rgb("3f8fe0"),
        horizon=rgb("cfe8f5"),
        sun=(35, 38),
        light=(0.76, 0.72, 0.60),
        ambient=(0.54, 0.57, 0.62),
        disc=rgb("fff6c8"),
        disc_radius=5.0,
        street=rgb("d9c69a", "c8b486"),
        plot=rgb("7cc04e", "68ac40"),
        walls=rgb("f2e3c2", "e2725b", "f0b840", "6aa5c9"),
        roofs=rgb("a63d2f", "6b4a3a", "47607a"),
        doors=rgb("4a3226", "2f6b4f"),
        trunk=rgb("7a5230"),
        crowns=rgb("2f8f3c", "57a834"),
    ),
    "dunes": Mood(
        sky=rgb("3f6fb0"),
        horizon=rgb("fbd3a0"),
        sun=(-50, 30),
        light=(0.86, 0.68, 0.48),
        ambient=(0.52, 0.50, 0.58),
        disc=rgb("ffe9a8"),
        disc_radius=6.5,
        street=rgb("e3b677", "d3a263"),
        plot=rgb("f0cf96", "e2bd80"),
        walls=rgb("f7ead2", "c8643c", "d99a4e", "5d9c98"),
        roofs=rgb("8c3f2b", "f2f0e6", "2f6f78"),
        doors=rgb("2a5d7c", "5c2e1e"),
        trunk=rgb("8a5a34"),
        crowns=rgb("5f8a35", "88963a"),
    ),
    "snow": Mood(
        sky=rgb("86aed6"),
        horizon=rgb("e9f0f6"),
        sun=(140, 34),
        light=(0.66, 0.62, 0.54),
        ambient=(0.58, 0.62, 0.70),
        disc=rgb("fffdf0"),
        disc_radius=5.0,
        street=rgb("b9c6d4", "a8b7c8"),
        plot=rgb("f2f6fa", "e0e8f0"),
        walls=rgb("9c3b34", "7a5a42", "3f6d94", "d9a441"),
        roofs=rgb("f7fafd", "dfe8f0", "4a4f5a"),
        doors=rgb("ece4d0", "2b2f38"),
        trunk=rgb("4f3a2c"),
        crowns=rgb("1f5d4a", "2f7a5c"),
    ),
    "night": Mood(
        sky=rgb("0b1030"),
        horizon=rgb("3a3566"),
        sun=(-125, 33),
        light=(0.50, 0.56, 0.78),
        ambient=(0.46, 0.44, 0.62),
        disc=rgb("f4f1dc"),
        disc_radius=6.0,
        street=rgb("4f5680", "424870"),
        plot=rgb("2f5560", "264852"),
        walls=rgb("8a4f8f", "3f7f9c", "b0606a", "6c6cb0"),
        roofs=rgb("2a2350", "1f3a52", "5a2a4a"),
        doors=rgb("ffc65c", "ff9a4a"),
        trunk=rgb("2a2238"),
        crowns=rgb("ffb84d", "ff8f5a"),
        glow=0.9,
    ),
}


@dataclass(frozen=True)
class Boxes:
    """M axis-aligned boxes: corners `low` <= `high` [M, 3] (units), colours [M, 3] in [0, 1],
    emitted light `glow` [M].
    """

    low: np.ndarray
    high: np.ndarray
    side: np.ndarray
    top: np.ndarray
    glow: np.ndarray

    def __len__(self) -> int:
        return len(self.low)


@dataclass(frozen=True)
class Town:
    """The town with this mood and seed; equal arguments give the same town on every machine.

    Raises UserError for an unknown mood or a negative seed.
    """

    mood: str
    seed: int

    def __post_init__(self):
        if self.mood not in MOODS:
            raise UserError(f"expected one of the moods {', '.join(MOODS)}, got {self.mood!r}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"expected a town seed of 0 to 2^63 - 1, got {self.seed}")

    @classmethod
    def from_source(cls, source: str) -> "Town":
        """The town of a clip, from the `source` of its meta.yaml (`blocks:<mood>:<seed>`)."""
        parts = source.split(":")
        if len(parts) != 3 or parts[0] != "blocks" or not parts[2].isdecimal():
            raise UserError(f"expected a clip source like blocks:meadow:12, got {source!r}")
        return cls(parts[1], int(parts[2]))

    @property
    def source(self) -> str:
        return f"blocks:{self.mood}:{self.seed}"

    @property
    def look(self) -> Mood:
        return MOODS[self.mood]

    @property
    def reach(self) -> int:
        """Cells around the camera's that a picture shows: farther ones are lost in the fog."""
        return math.ceil(1.2 * self.look.visibility / CELL)

    def boxes(self, i: int, j: int, reach: int) -> Boxes:
        """All boxes of the cells within `reach` cells of cell (i, j); cell (i, j) covers x in CELL
        * [i, i + 1], z likewise.
        """
        line = np.arange(-reach, reach + 1, dtype=np.int64)
        cell_i, cell_j = (grid.ravel() for grid in np.meshgrid(i + line, j + line, indexing="ij"))
        street = self.street(cell_i, cell_j)
        kind = self._draw(cell_i, cell_j, 0)
        spots = {
            _house: ~street & (kind < 0.62),
            _tower: ~street & (kind >= 0.62) & (kind < 0.70),
            _wall: ~street & (kind >= 0.70) & (kind < 0.76),
            _tree: (~street & (kind >= 0.76) & (kind < 0.91)) | (street & (kind < 0.05)),
        }
        pieces = []
        for build, chosen in spots.items():
            at_i = cell_i[chosen]
            at_j = cell_j[chosen]
            draws = np.stack([self._draw(at_i, at_j, channel) for channel in range(1, 11)], axis=1)
            centre = (np.stack([at_i, at_j], axis=1) + 0.5) * CELL
            pieces += build(self.look, centre, draws)
        return Boxes(*(np.concatenate(parts) for parts in zip(*pieces)))

    def street(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Whether cells (i, j) are street, bool of the shape of i and j."""
        return self._street_line(i, 1) | self._street_line(j, 2)

    def ground(self, i: int, j: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
        """Tile colours around cell (i, j) -> (near, far), both [T, T, 3], T = TILES * (2 * reach +
        1), rows x, columns z.

        `far` is the mean colour of the kind of ground: a tile that is too small to be resolved.
        """
        tiles = np.arange(TILES * (2 * reach + 1), dtype=np.int64)
        tile_i, tile_j = np.meshgrid(
            TILES * (i - reach) + tiles, TILES * (j - reach) + tiles, indexing="ij"
        )
        street = self.street(tile_i // TILES, tile_j // TILES)
        tones = np.where(
            street[..., None, None], np.array(self.look.street), np.array(self.look.plot)
        )
        checker = ((tile_i + tile_j) & 1)[..., None]
        near = np.where(checker == 0, tones[..., 0, :], tones[..., 1, :])
        level = np.floor(3 * self._draw(tile_i, tile_j, 20))[..., None] - 1  # one of three tints
        return near * (1 + 0.05 * level), tones.mean(axis=-2)

    def sea(self, i: int, j: int, reach: int) -> None:
        """A town has no water; see `Island.sea`."""

    def barriers(self, i: int, j: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
        """Footprints (low, high) [n, 2] in x and z that feet cannot enter, boxes aside: none."""
        return np.empty((0, 2)), np.empty((0, 2))

    def _street_line(self, index: np.ndarray, axis: int) -> np.ndarray:
        group = index // STREET_EVERY
        return index - STREET_EVERY * group == np.floor(
            2 * self._draw(group, np.full_like(group, axis), 30)
        )

    def _draw(self, i: np.ndarray, j: np.ndarray, channel: int) -> np.ndarray:
        """Uniform numbers in [0, 1) that depend on the seed, the cell and the channel only."""
        state = np.full(i.shape, channel * 0x27D4EB2F & 0xFFFFFFFF, dtype=np.uint32)
        for key in (self.seed & 0xFFFFFFFF, self.seed >> 32, i, j):
            state ^= (np.asarray(key) & 0xFFFFFFFF).astype(np.uint32)
            state *= np.uint32(GOLDEN)
            state ^= state >> np.uint32(15)
            state *= np.uint32(0x85EBCA77)
            state ^= state >> np.uint32(13)
        return state / 2.0**32


def _box(
    centre: np.ndarray,
    size: np.ndarray,
    bottom,
    top,
    side: np.ndarray,
    roof: np.ndarray,
    glow: float = 0.0,
) -> tuple:
    """One box per row: centre [n, 2] and full size [n, 2] in x and z, heights above the ground
    `bottom` and `top`.
    """
    count = len(centre)
    bottom, top = (np.broadcast_to(height, (count,)) for height in (bottom, top))
    low = np.stack([centre[:, 0] - size[:, 0] / 2, -top, centre[:, 1] - size[:, 1] / 2], axis=1)
    high = np.stack([centre[:, 0] + size[:, 0] / 2, -bottom, centre[:, 1] + size[:, 1] / 2], axis=1)
    return low, high, side, roof, np.full(count, glow)


def _pick(colours: tuple, draw: np.ndarray) -> np.ndarray:
    return np.array(colours)[np.floor(draw * len(colours)).astype(int)]


def _house(look: Mood, centre: np.ndarray, draws: np.ndarray) -> list:
    """A body with a wider roof slab, a door on one side, and on some houses a smaller upper
    floor.
    """
    size = 0.45 + 0.35 * draws[:, 0:2]
    height = 0.26 + 0.34 * draws[:, 2]
    centre = centre + (draws[:, 3:5] - 0.5) * (CELL - 0.14 - size)
    walls = _pick(look.walls, draws[:, 5])
    roofs = _pick(look.roofs, draws[:, 6])
    upper = draws[:, 7] < 0.3
    attic = _box(
        centre[upper],
        0.55 * size[upper],
        height[upper],
        height[upper] + 0.24,
        walls[upper] * 0.86,
        roofs[upper],
    )
    return [
        _box(centre, size, 0.0, height, walls, roofs),
        _box(centre, size + 0.07, height, height + 0.055, roofs * 0.92, roofs),
        attic,
        _door(look, centre, size, draws[:, 8], draws[:, 9]),
    ]


def _door(
    look: Mood, centre: np.ndarray, size: np.ndarray, side: np.ndarray, colour: np.ndarray
) -> tuple:
    """A flat box that protrudes slightly from one of the four walls."""
    wall = np.floor(4 * side).astype(int)
    along_x = wall % 2 == 0
    outward = np.where(wall < 2, 0.5, -0.5)
    shift = np.stack(
        [np.where(along_x, outward * size[:, 0], 0), np.where(along_x, 0, outward * size[:, 1])],
        axis=1,
    )
    plan = np.where(along_x[:, None], np.array([0.03, 0.15]), np.array([0.15, 0.03]))
    colours = _pick(look.doors, colour)
    return _box(centre + shift, plan, 0.0, 0.2, colours, colours, look.glow)


def _tower(look: Mood, centre: np.ndarray, draws: np.ndarray) -> list:
    """A tall body under a wider top."""
    size = 0.4 + 0.2 * draws[:, 0:1].repeat(2, axis=1)
    height = 0.9 + 0.6 * draws[:, 2]
    walls = _pick(look.walls, draws[:, 5])
    roofs = _pick(look.roofs, draws[:, 6])
    return [
        _box(centre, size, 0.0, height, walls, roofs),
        _box(centre, size + 0.1, height, height + 0.14, roofs * 0.92, roofs),
        _door(look, centre, size, draws[:, 8], draws[:, 9]),
    ]


def _wall(look: Mood, centre: np.ndarray, draws: np.ndarray) -> list:
    """A low wall along x or z."""
    length = 0.6 + 0.3 * draws[:, 0]
    along_x = draws[:, 1] < 0.5
    size = np.stack([np.where(along_x, length, 0.14), np.where(along_x, 0.14, length)], axis=1)
    colours = _pick(look.walls, draws[:, 5])
    return [_box(centre, size, 0.0, 0.1 + 0.05 * draws[:, 2], colours * 0.9, colours)]


def _tree(look: Mood, centre: np.ndarray, draws: np.ndarray) -> list:
    """A thin trunk and a cubic crown (a lantern where the mood's crowns glow)."""
    centre = centre + (draws[:, 3:5] - 0.5) * 0.6
    clear = 0.24 + 0.08 * draws[:, 0]
    crown = 0.26 + 0.14 * draws[:, 1]
    wide = crown[:, None].repeat(2, axis=1)
    trunks = np.broadcast_to(np.array(look.trunk), (len(centre), 3))
    crowns = _pick(look.crowns, draws[:, 5])
    return [
        _box(centre, np.full_like(wide, 0.07), 0.0, clear, trunks, trunks),
        _box(centre, wide, clear, clear + crown, crowns, crowns, look.glow),
    ]

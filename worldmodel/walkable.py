"""Where a walker may go: a map of the ground, made of where the footage's cameras were, and motion
that slides along its border.

The ground is the plane x, z of a place's coordinates. Needs neither torch nor pygame.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from scipy import ndimage

from worldmodel.camera import check_poses
from worldmodel.config import Positive, build, read_yaml
from worldmodel.errors import UserError
from worldmodel.files import write_file
from worldmodel.images import read_image, write_png

PNG = "walkable.png"  # white = walkable; rows along z, columns along x
YAML = "walkable.yaml"
MOST_CELLS = 16_000_000
_SUBSTEP = 0.5  # cells; shorter than any wall is thick
_REACH = 2  # cells around the walker that define the direction of a wall
_AWAY = (30.0, 60.0)  # degrees away from a wall, tried where its border is stepped


@dataclass(frozen=True)
class _Frame:
    """`walkable.yaml`: where the picture lies."""

    origin: tuple[float, ...]  # x, z of the corner of the first cell
    cell: Positive  # side of a cell, units


@dataclass(frozen=True)
class WalkableMap:
    """A boolean grid over x, z. What is outside the grid is not walkable.

    grid: [rows along z, columns along x]. origin: [2] x, z of the corner of cell [0, 0]. cell: its
    side in units.
    """

    grid: np.ndarray
    origin: np.ndarray
    cell: float

    def __post_init__(self):
        if self.grid.ndim != 2 or self.grid.dtype != bool or not self.grid.any():
            raise UserError(
                "A walkable map must be a boolean grid [z, x] with at least one walkable cell, got "
                f"{self.grid.dtype} {list(self.grid.shape)}; make it from positions."
            )

    @classmethod
    def from_positions(cls, positions, cell: float = 0.05, radius: float = 0.1) -> "WalkableMap":
        """The map of cameras that were at `positions` [N, 2] (x, z): a cell is walkable when its
        centre is within `radius` units of a camera's cell.

        Enclosed holes smaller than the disc of one camera are closed: the footage only happened to
        miss them. Raises UserError for other positions, and for more than MOST_CELLS cells.
        """
        positions = np.asarray(positions, np.float64)
        if positions.ndim != 2 or positions.shape[1] != 2 or not len(positions):
            raise UserError(f"Expected positions [N, 2], got {list(positions.shape)}; give x, z.")
        if not np.isfinite(positions).all() or not (cell > 0 and radius >= 0):
            raise UserError(
                "Expected finite positions, a cell above 0 and a radius of at least 0, got "
                f"cell {cell} and radius {radius}; correct them."
            )
        reach = math.floor(radius / cell)
        cells = np.floor(positions / cell)
        low = cells.min(0) - reach - 1
        size = cells.max(0) - low + reach + 2
        if size.prod() > MOST_CELLS:
            raise UserError(
                f"A map of {size[0]:.0f}x{size[1]:.0f} cells is too large; raise cell ({cell})."
            )
        columns, rows = np.unique((cells - low).astype(int), axis=0).T
        grid = np.zeros(size[::-1].astype(int), bool)
        for row in range(-reach, reach + 1):
            for column in range(-reach, reach + 1):
                if math.hypot(row, column) * cell <= radius:
                    grid[rows + row, columns + column] = True
        return cls(_without_holes(grid, math.pi * (radius / cell) ** 2), low * cell, cell)

    def contains(self, xz) -> np.ndarray:
        """Whether positions [..., 2] are walkable: bool [...]."""
        column, row = np.moveaxis(np.floor((np.asarray(xz) - self.origin) / self.cell), -1, 0)
        rows, columns = self.grid.shape
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        held = self.grid[
            np.where(inside, row, 0).astype(int), np.where(inside, column, 0).astype(int)
        ]
        return inside & held

    def slide(self, before, after) -> np.ndarray:
        """Return where a walker at `before` [2] ends who wants to get to `after` [2].

        The result is always walkable: in the open it is `after`, at a border the motion along it
        remains. Walls are never passed, however long the step. A walker who is off the map is first
        put onto the nearest walkable ground.
        """
        before = np.asarray(before, np.float64)
        after = np.asarray(after, np.float64)
        position = before if self.contains(before) else self._nearest(before)
        wanted = after - position
        count = math.ceil(np.hypot(*wanted) / (_SUBSTEP * self.cell))
        straight = True
        for number in range(count):
            part = (number + 1) / count
            target = position + wanted / count
            if straight:  # not summed up: in the open the end is exactly `after`
                target = after if part == 1 else after - wanted * (1 - part)
            if not self._open(position, target):
                straight = False
                target = self._beside(position, wanted / count)
            position = target
        return position

    def write(self, folder) -> None:
        """Write PNG and YAML into `folder`."""
        folder = Path(folder)
        write_png(folder / PNG, np.repeat(np.uint8(255) * self.grid[..., None], 3, 2))
        frame = {"origin": [float(x) for x in self.origin], "cell": float(self.cell)}
        write_file(folder / YAML, yaml.safe_dump(frame, sort_keys=False))

    @classmethod
    def read(cls, folder) -> "WalkableMap":
        """Read what `write` wrote. Raises UserError for files that are missing or damaged."""
        folder = Path(folder)
        frame = build(_Frame, read_yaml(folder / YAML, "place"), str(folder / YAML))
        picture = read_image(folder / PNG)
        finite = np.isfinite([*frame.origin, frame.cell]).all()
        if len(frame.origin) != 2 or not finite:
            raise UserError(
                f"{folder / YAML}: expected origin [x, z] and cell as finite numbers, got "
                f"{list(frame.origin)} and {frame.cell}; fetch the place again."
            )
        if not np.isin(picture, (0, 255)).all() or not picture.any():
            raise UserError(
                f"{folder / PNG}: expected black and white with something walkable (white), got "
                "another picture; fetch the place again."
            )
        return cls(picture[..., 0] > 0, np.array(frame.origin, np.float64), frame.cell)

    # -------------------- inside

    def _open(self, position: np.ndarray, target: np.ndarray) -> bool:
        """Whether a substep ends on walkable ground and does not slip between two cells that touch
        in a corner.
        """
        corners = [(target[0], position[1]), (position[0], target[1])]
        return bool(self.contains(target) and self.contains(corners).any())

    def _beside(self, position: np.ndarray, step: np.ndarray) -> np.ndarray:
        """The end of a substep that a wall blocks: along the wall, or where it was."""
        along = step
        moves = []
        away = self._away_from_wall(position)
        if away is not None:
            along = step - min(away @ step, 0.0) * away
            length = np.hypot(*along)
            for angle in np.radians((0.0, *_AWAY)):
                turned = math.cos(angle) * along + math.sin(angle) * length * away
                moves.append(math.cos(angle) * turned)
        moves += [step * (1, 0), step * (0, 1)]
        least = 1e-9 * np.hypot(*step)  # rounding is no motion
        targets = (position + move for move in moves if np.hypot(*move) > least)
        return next((target for target in targets if self._open(position, target)), position)

    def _away_from_wall(self, position: np.ndarray) -> np.ndarray | None:
        """Unit vector [2] from the walls around `position` to the open ground; None = no wall, or
        walls on all sides.
        """
        offsets = np.arange(-_REACH, _REACH + 1)
        around = np.stack(np.meshgrid(offsets, offsets), -1).reshape(-1, 2)
        away = around[self.contains(position + around * self.cell)].sum(0)
        length = np.hypot(*away)
        return away / length if length else None

    def _nearest(self, position: np.ndarray) -> np.ndarray:
        """The nearest walkable position, well inside its cell as far as rounding is concerned."""
        low = self.origin + np.argwhere(self.grid)[:, ::-1] * self.cell
        margin = 1e-6 * self.cell
        nearest = np.clip(position, low + margin, low + self.cell - margin)
        return nearest[np.hypot(*(nearest - position).T).argmin()]


class Walls:
    """A map around a session, whose origin is the pose `start` [4, 4] (c2w) in the place."""

    def __init__(self, walkable: WalkableMap, start):
        self.map = walkable
        self._start = check_poses(start, 1, "Walls")[0]

    def slide(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Return the pose [4, 4] of a walker at `before` who wants to get to `after`, both c2w in
        the session's frame; exactly `after` in the open, with its rotation in any case.
        """
        turn = self._start[:3, :3]
        here = (turn @ before[:3, 3] + self._start[:3, 3])[[0, 2]]
        move = turn @ (after[:3, 3] - before[:3, 3])
        wanted = here + move[[0, 2]]
        reached = self.map.slide(here, wanted)
        if np.array_equal(reached, wanted):
            return after
        move[[0, 2]] = reached - here
        pose = after.copy()
        pose[:3, 3] = before[:3, 3] + turn.T @ move
        return pose

    def follow(self, c2w: np.ndarray) -> np.ndarray:
        """Return the path [N, 4, 4] with the same motions as `c2w`, from its first pose on, where
        walls allow them.
        """
        path = [c2w[0]]
        for before, after in zip(c2w[:-1], c2w[1:], strict=True):
            wanted = after.copy()
            if np.array_equal(before[:3, 3], after[:3, 3]):
                wanted[:3, 3] = path[-1][:3, 3]
            else:
                wanted[:3, 3] += path[-1][:3, 3] - before[:3, 3]
            path.append(self.slide(path[-1], wanted))
        return np.stack(path)


def _without_holes(grid: np.ndarray, cells: float) -> np.ndarray:
    """`grid` with its enclosed holes of at most so many cells closed."""
    holes, count = ndimage.label(~grid)
    small = np.bincount(holes.ravel(), minlength=count + 1) <= cells
    edge = np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]])
    small[np.unique(edge)] = False
    small[0] = False
    return grid | small[holes]

"""The cases of an evaluation in a place: starts, random walks and scripted paths, all seeded, in
the coordinates of the place, with ground truth where its scene has a renderer.
"""

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from distill.data.blocks.collect import BlocksConfig, poses_of_clip
from distill.data.blocks.island import Island
from distill.data.blocks.renderer import render, render_depth
from distill.data.blocks.scenes import Scene, scene_of
from distill.data.blocks.town import CELL, Boxes
from distill.data.blocks.walker import Gait, Order, Start, Walker, walk
from distill.data.clips import frames_of
from distill.evaluate.cases import REST, PathCase, follow
from worldmodel.camera import FRAMES_PER_LATENT, rotation
from worldmodel.errors import UserError
from worldmodel.images import fit_picture
from worldmodel.reprojection import RememberedViews
from worldmodel.walkable import WalkableMap
from worldmodel.worlds.place import Place
from worldmodel.worlds.world import World

ATTEMPTS = 4000  # starts or walks tried for the cases of one kind
TURN = 6.0  # degrees of a small turn
SMALL_TURN = np.array([0.5, 1.0, 0.5, 0.0]) * TURN  # heading at the latents of one turn to a side
WIDE = 100.0  # units around a map that nothing enters


class MapScene:
    """What a walker sees of a place that is known by its map alone: everything else is a wall."""

    def __init__(self, walkable: WalkableMap):
        self._low, self._high = _blocked(walkable)

    def boxes(self, i: int, j: int, reach: int) -> Boxes:
        """None."""
        points = np.zeros((0, 3))
        return Boxes(points, points, points, points, np.zeros(0))

    def barriers(self, i: int, j: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
        """Rectangles (low, high) [n, 2] in x and z of the ground around cell (i, j) that is not
        walkable.
        """
        cell = np.array([i, j])
        near = (self._high > (cell - reach) * CELL).all(1)
        near &= (self._low < (cell + reach + 1) * CELL).all(1)
        return self._low[near], self._high[near]


class Ground:
    """A place as evaluation sees it: where walks begin and go, and its truth if there is one.

    On the island walks are those of the collector's held-out split. Elsewhere they begin at
    remembered frames, and the map of the place holds them.
    """

    def __init__(self, world: World, place: Place, seed: int, spread: Callable = map):
        self.world = world
        self.place = place
        self.seed = seed
        self._spread = spread
        self.scene = truth_of(place)
        config = world.config
        self._picture = (config.intrinsics, config.height, config.width)

    @property
    def views(self) -> RememberedViews:
        return self.world.views(self.place.name)

    @property
    def prompt(self) -> str:
        """The prompt of the place's clips where the world has it, else the default."""
        mood = self.scene.mood if self.scene else ""
        return mood if mood in self.world.prompts.names else self.world.config.prompts.default

    # -------------------- truth

    def truth(self, paths: list[np.ndarray]) -> np.ndarray:
        """True pictures at poses [B, T, 4, 4]: uint8 [B, T, H, W, 3] of the world's size."""
        return np.stack(list(self._spread(partial(_film, self.scene, *self._picture), paths)))

    def first_pictures(self, starts: np.ndarray) -> np.ndarray:
        """What a walk shows at its start [B, 4, 4]: the truth, or without a renderer the remembered
        frame of the most similar pose; uint8 [B, H, W, 3].
        """
        if self.scene:
            return self.truth(list(starts[:, None]))[:, 0]
        config = self.world.config
        found = [self._nearest(start) for start in starts]
        pictures = (self.views.pictures[number].numpy() for number in found)
        return np.stack([fit_picture(one, config.height, config.width) for one in pictures])

    def depth(self, c2w: np.ndarray) -> np.ndarray:
        """True depth at the poses [N, 4, 4] with the resolution of the remembered frames."""
        return render_depth(self.scene, c2w, self.world.config.intrinsics, *self.views.size).numpy()

    def unfilmed(self, c2w: np.ndarray) -> np.ndarray:
        """Which cameras [N, 4, 4] stand in, or look into, what the footage omits; bool [N]."""
        if isinstance(self.scene, Island):
            return self.scene.unfilmed(c2w)
        return np.zeros(len(c2w), bool)

    # -------------------- cases

    def walks(self, count: int, latents: int, first: int = 0) -> list[PathCase]:
        """`count` random walks of `latents` latents after the start, from number `first` on."""
        return [
            PathCase("walk", self._walk(index, latents)) for index in range(first, first + count)
        ]

    def unfilmed_walks(self, count: int, latents: int) -> list[PathCase]:
        """Walks that end in what was never filmed; fewer than `count` where few are found."""
        found = []
        for index in range(ATTEMPTS):
            path = self._walk(10_000 + index, latents)
            if self.unfilmed(path[-1:]).all():
                found.append(PathCase("unfilmed", path))
            if len(found) == count:
                break
        return found

    def rests(self, count: int, latents: int) -> list[PathCase]:
        """The camera stays for `latents` latents."""
        return [
            PathCase("rest", np.repeat(start[None], frames_of(latents + 1), 0))
            for start in self._starts(count)
        ]

    def small_turns(self, count: int, latents: int) -> list[PathCase]:
        """Turns to the right and to the left, each back at the start after four latents."""
        swing = np.concatenate([SMALL_TURN, -SMALL_TURN])
        headings = np.concatenate([[0.0], np.tile(swing, -(-latents // len(swing)))[:latents]])
        at = np.arange(frames_of(latents + 1)) / FRAMES_PER_LATENT
        headings = np.interp(at, np.arange(latents + 1), headings)
        turns = np.tile(np.eye(4), (len(headings), 1, 1))
        turns[:, :3, :3] = [rotation(heading, 0) for heading in headings]
        return [PathCase("small turns", start @ turns) for start in self._starts(count)]

    def returns(self, count: int) -> list[PathCase]:
        """`count` cases of each leave-and-return path, padded with rest to one length: 90 degrees
        and back, two units out and back on walkable ground.

        Raises UserError where the place has no room.
        """
        gait = self._gait
        quarter = round(90 * FRAMES_PER_LATENT / gait.yaw)
        out = round(2.0 * FRAMES_PER_LATENT / gait.walk)
        scripts = {
            "turn 90 degrees": (Order(quarter, yaw=1.0), Order(quarter, yaw=-1.0)),
            "out and back": (Order(out, forward=1.0), Order(out, forward=-1.0)),
        }
        longest = max(leave.frames for leave, _ in scripts.values())
        total = 2 * (longest + REST) + -2 * (longest + REST) % FRAMES_PER_LATENT
        cases = []
        for kind, (leave, home) in scripts.items():
            length = 2 * (leave.frames + REST)
            orders = [leave, Order(REST), home, Order(REST + total - length)]
            away = (leave.frames + REST) // FRAMES_PER_LATENT
            paths = self._free(orders, count, kind)
            back = -(-length // FRAMES_PER_LATENT)
            cases += [PathCase(kind, path, away, back) for path in paths]
        return cases

    def routes(self, count: int, latents: int) -> tuple[list[PathCase], list[PathCase]]:
        """Pairs of different walks of `latents` latents that end at one pose: the first half of a
        longer walk, and the second half backwards.
        """
        half = frames_of(latents + 1)
        longer = [self._walk(1000 + index, 2 * latents) for index in range(count)]
        there = [PathCase("there", path[:half]) for path in longer]
        back = [PathCase("back", path[half - 1 :][::-1]) for path in longer]
        return there, back

    # -------------------- inside

    @cached_property
    def _gait(self) -> Gait:
        """The collector's on its own scenes, elsewhere the world's limits of motion."""
        if self.scene:
            return Gait()
        limits = self.world.config.envelope
        return Gait(
            limits.forward,
            limits.strafe,
            limits.run,
            limits.yaw,
            limits.pitch,
            limits.pitch_limit,
            radius=0.5 * self._map.cell,
            caution=5.5 * limits.forward,
        )

    @cached_property
    def _map(self) -> WalkableMap:
        """The place's, or one of the remembered frames' positions."""
        if self.place.walkable:
            return self.place.walkable
        return WalkableMap.from_positions(self.views.c2w[:, [0, 2], 3])

    @cached_property
    def _mapped(self) -> MapScene:
        return MapScene(self._map)

    def _walk(self, index: int, latents: int) -> np.ndarray:
        """Walk number `index`: poses [4F-3, 4, 4]."""
        if isinstance(self.scene, Island):
            moods = (self.scene.mood,)
            config = BlocksConfig(
                Path(), scene="island", moods=moods, split="heldout", latents=latents + 1,
                seed=self.seed,
            )  # fmt: skip
            return poses_of_clip(config, index)
        seed = [self.seed, 6, index]
        start = self._remembered(np.random.default_rng(seed))
        path = walk(self._mapped, frames_of(latents + 1), seed, self._gait, start)
        path[:, 1, 3] = self.place.start[1, 3]
        return path

    def _starts(self, count: int) -> np.ndarray:
        """Poses [count, 4, 4] at which walks begin."""
        return np.stack([self._walk(index, 0)[0] for index in range(count)])

    def _remembered(self, rng: np.random.Generator) -> Start:
        """Position and heading of a remembered frame."""
        pose = self.views.c2w[int(rng.integers(len(self.views)))]
        return pose[[0, 2], 3], float(np.degrees(np.arctan2(pose[0, 2], pose[2, 2])))

    def _nearest(self, pose: np.ndarray) -> int:
        """Number of the remembered frame nearest in position and direction."""
        apart = np.linalg.norm(self.views.c2w[:, :3, 3] - pose[:3, 3], axis=1)
        aside = 1 - self.views.c2w[:, :3, 2] @ pose[:3, 2]
        return int((apart + aside).argmin())

    def _free(self, orders: list[Order], count: int, kind: str) -> list[np.ndarray]:
        """Paths along the orders that stay on walkable ground and see nothing unfilmed."""
        found = []
        motion = follow(np.eye(4), orders, self._gait)
        for index in range(ATTEMPTS):
            path = self._walk(4000 + index, 0)[0] @ motion  # walks begin level
            free = self._map.contains(path[:, [0, 2], 3]).all()
            if free and not self.unfilmed(path).any() and self._open(path):
                found.append(path)
            if len(found) == count:
                return found
        raise UserError(
            f"expected {count} paths {kind!r} in the place {self.place.name!r}, found {len(found)} "
            f"from {ATTEMPTS} starts; take fewer --cases"
        )

    def _open(self, path: np.ndarray) -> bool:
        """Whether no wall of the scene is nearer than the walker's radius."""
        if not self.scene:
            return True
        walker = Walker(self.scene, 0, self._gait, (path[0][[0, 2], 3], 0.0))
        return all(walker.is_free(pose[[0, 2], 3]) for pose in path[::FRAMES_PER_LATENT])


def truth_of(place: Place) -> Scene | None:
    """The scene that the clips of a place were rendered from; None where none was, or its source is
    unknown.
    """
    try:
        return scene_of(place.source) if place.source else None
    except UserError:
        return None


def _film(scene: Scene, intrinsics, height: int, width: int, poses: np.ndarray) -> np.ndarray:
    """uint8 [T, H, W, 3]."""
    return render(scene, poses, intrinsics, height, width).numpy()


def _blocked(walkable: WalkableMap) -> tuple[np.ndarray, np.ndarray]:
    """Rectangles (low, high) [n, 2] of all cells that are not walkable, and of a wide border."""
    rows, columns = walkable.grid.shape
    runs = []
    for row in range(rows):
        edges = np.flatnonzero(np.diff(np.pad(~walkable.grid[row], 1).astype(int)))
        runs += [(start, row, end, row + 1) for start, end in edges.reshape(-1, 2)]
    wide = WIDE / walkable.cell
    runs += [
        (-wide, -wide, 0, rows + wide),
        (columns, -wide, columns + wide, rows + wide),
        (-wide, -wide, columns + wide, 0),
        (-wide, rows, columns + wide, rows + wide),
    ]
    rectangles = np.array(runs, float) * walkable.cell + np.tile(walkable.origin, 2)
    return rectangles[:, :2], rectangles[:, 2:]

"""The cases of an evaluation: held-out towns, free starts and camera paths, all seeded, with ground
truth from the renderer.

A path is a list of `Order`s (keys held for a number of video frames), followed with the walker's
momentum from a free place on a street. A path that would touch a wall is discarded and another
start is drawn.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from distill.data.blocks.collect import BlocksConfig, town_of
from distill.data.blocks.renderer import render
from distill.data.blocks.town import CELL, MOODS, Town
from distill.data.blocks.walker import Gait, Order, Walker, walk
from distill.data.clips import frames_of
from distill.data.collect import worker_pool
from worldmodel.camera import FRAMES_PER_LATENT, advance
from worldmodel.errors import UserError

KINDS = ("walk", "forward", "turn", "strafe", "mix")
RETURNS = ("turn 30 degrees", "turn 90 degrees", "out and back")
FLOWS = ("right", "left", "forward", "back")
ATTEMPTS = 400  # starts tried in a town before it counts as too narrow
REST = 12  # video frames in which the momentum dies away


@dataclass(frozen=True)
class PathCase:
    """One path."""

    kind: str
    c2w: np.ndarray  # float64 [4F-3, 4, 4], one pose per video frame
    away: int = 0  # leave-and-return: the latent farthest from the start
    back: int = 0  # leave-and-return: the latent at which the camera is back

    @property
    def latents(self) -> np.ndarray:
        """Poses [F, 4, 4] of the latents."""
        return self.c2w[::FRAMES_PER_LATENT]


@dataclass(frozen=True)
class Case(PathCase):
    """One path through one held-out town."""

    town: Town = field(kw_only=True)


def fidelity_cases(count: int, latents: int, seed: int) -> list[Case]:
    """`count` cases of `latents` + 1 latents (the first is given); kinds and moods alternate."""
    frames = frames_of(latents + 1)
    cases = []
    for index in tqdm(range(count), "paths", unit="case", leave=False):
        rng = np.random.default_rng([seed, 1, index])
        town = held_out_town(seed, index)
        kind = KINDS[index % len(KINDS)]
        if kind == "walk":
            cases.append(Case(kind, walk(town, frames, [seed, 2, index]), town=town))
        else:
            orders = _script(kind, frames - 1, rng)
            cases.append(
                Case(kind, free_path(town, orders, rng, across=kind == "strafe"), town=town)
            )
    return cases


def return_cases(count: int, seed: int) -> list[Case]:
    """`count` cases of each leave-and-return path, padded with standing still to one length."""
    scripts = {name: _return_script(name) for name in RETURNS}
    frames = max(sum(order.frames for order in orders) for orders, _ in scripts.values())
    frames += -frames % FRAMES_PER_LATENT
    cases = []
    for number, (name, (orders, away)) in enumerate(scripts.items()):
        length = sum(order.frames for order in orders)
        for index in range(count):
            rng = np.random.default_rng([seed, 3, number, index])
            side = 1 if rng.random() < 0.5 else -1
            script = [Order(o.frames, o.forward, o.strafe, side * o.yaw) for o in orders]
            script.append(Order(frames - length))
            town = held_out_town(seed, 1000 * (number + 1) + index)
            path = free_path(town, script, rng)
            cases.append(Case(name, path, away, length // FRAMES_PER_LATENT, town=town))
    return cases


def flow_cases(count: int, seed: int) -> list[Case]:
    """`count` cases of each direction, 4 latents long after the start."""
    orders = {
        "right": {"yaw": 1.0},
        "left": {"yaw": -1.0},
        "forward": {"forward": 1.0},
        "back": {"forward": -1.0},
    }
    cases = []
    for number, kind in enumerate(FLOWS):
        for index in range(count):
            town = held_out_town(seed, 5000 + 100 * number + index)
            rng = np.random.default_rng([seed, 4, number, index])
            order = Order(4 * FRAMES_PER_LATENT, **orders[kind])
            cases.append(Case(kind, free_path(town, [order], rng), town=town))
    return cases


def drift_cases(count: int, latents: int, seed: int) -> list[Case]:
    """`count` free walks of `latents` latents after the start."""
    towns = [held_out_town(seed, 7000 + index) for index in range(count)]
    frames = frames_of(latents + 1)
    return [
        Case("walk", walk(town, frames, [seed, 5, index]), town=town)
        for index, town in enumerate(towns)
    ]


def held_out_town(seed: int, index: int) -> Town:
    """A town of no training clip; the moods alternate."""
    return town_of(BlocksConfig(Path(), seed=seed, split="heldout"), index)


@contextmanager
def renderers(workers: int) -> Iterator[Callable]:
    """A `map` for `ground_truth` over this many processes; 1 renders in this process."""
    if workers == 1:
        yield map
        return
    with worker_pool(workers) as pool:
        yield pool.map


def ground_truth(
    cases: list[Case], intrinsics, height: int, width: int, every: int = 1, spread: Callable = map
) -> np.ndarray:
    """Rendered frames of the cases, uint8 [B, T, H, W, 3].

    every: step between the frames. spread: a `map`, see `renderers`.
    """
    jobs = [(case.town, case.c2w[::every], intrinsics, height, width) for case in cases]
    bar = tqdm(spread(_film, jobs), "ground truth", len(jobs), unit="case", leave=False)
    return np.stack(list(bar))


def _film(job: tuple) -> np.ndarray:
    """Render one case: (town, poses, intrinsics, height, width) -> uint8 [T, H, W, 3]."""
    return render(*job).numpy()


def _script(kind: str, frames: int, rng: np.random.Generator) -> list[Order]:
    """Orders of a scripted kind that fill `frames` video frames."""
    side = float(rng.choice([-1, 1]))
    slow = 0.5
    if kind == "forward":
        return [Order(frames, forward=1.0)]
    if kind == "turn":
        return [Order(frames, yaw=side * slow)]
    if kind == "strafe":
        return [Order(frames, strafe=side)]
    quarter = frames // 4
    return [
        Order(quarter, forward=1.0),
        Order(quarter, forward=1.0, yaw=side * slow),
        Order(quarter, strafe=side, yaw=-side * slow),
        Order(frames - 3 * quarter, yaw=side),
    ]


def _return_script(name: str) -> tuple[list[Order], int]:
    """Orders of a leave-and-return path and the latent at which it is farthest."""
    if name == "out and back":
        out = 32
        leave = Order(32, forward=1.0)
        home = Order(32, forward=-1.0)
    else:
        # video frames at 10 degrees per latent
        out = {"turn 30 degrees": 12, "turn 90 degrees": 36}[name]
        leave = Order(out, yaw=1.0)
        home = Order(out, yaw=-1.0)
    return [leave, Order(REST), home, Order(REST)], (out + REST) // FRAMES_PER_LATENT


def free_path(
    town: Town,
    orders: list[Order],
    rng: np.random.Generator,
    across: bool = False,
    gait: Gait = Gait(),
) -> np.ndarray:
    """A path [T, 4, 4] (start included) that follows the orders exactly from a street and touches
    no wall.

    across: look across the street instead of along it (a sideways walk then follows it).
    Raises UserError when no start allows such a path.
    """
    for _ in range(ATTEMPTS):
        start = Walker(town, int(rng.integers(2**31)), gait).pose()
        if across:
            start = advance(start, np.zeros(3), float(rng.choice([-90, 90])), 0.0, style="walk")
        path = follow(start, orders, gait)
        if is_free(town, path, gait):
            return path
    raise UserError(
        f"expected a free path in the town {town.source}, found none in {ATTEMPTS} starts: take "
        "another seed"
    )


def follow(start: np.ndarray, orders: list[Order], gait: Gait = Gait()) -> np.ndarray:
    """Poses [T, 4, 4] from `start` along the orders, with the walker's momentum and no walls."""
    path = [start]
    speed = np.zeros(4)  # forward, strafe (units per frame), yaw, pitch (degrees per frame)
    full = np.array([gait.walk, gait.strafe, gait.yaw, gait.pitch]) / FRAMES_PER_LATENT
    for order in orders:
        wanted = full * [order.forward, order.strafe, order.yaw, order.pitch]
        for _ in range(order.frames):
            speed = speed + gait.momentum * (wanted - speed)
            path.append(
                advance(
                    path[-1], np.array([speed[1], 0.0, speed[0]]), speed[2], speed[3], style="walk"
                )
            )
    return np.stack(path)


def is_free(town: Town, path: np.ndarray, gait: Gait = Gait()) -> bool:
    """Whether every pose [T, 4, 4] keeps the walker's radius from all boxes at the height of its
    body.
    """
    places = path[:, [0, 2], 3]
    cells = np.floor(places / CELL).astype(int)
    for cell in np.unique(cells, axis=0):
        boxes = town.boxes(int(cell[0]), int(cell[1]), 1)
        body = boxes.high[:, 1] > -gait.eye - 0.03
        low = boxes.low[body][:, [0, 2]]
        high = boxes.high[body][:, [0, 2]]
        here = places[(cells == cell).all(1)][:, None]
        if (np.linalg.norm(here - np.clip(here, low, high), axis=-1) < gait.radius - 1e-6).any():
            return False
    return True


def moods(cases: list[Case]) -> list[str]:
    """Prompt names of the cases."""
    return [case.town.mood for case in cases]


def check_prompts(names: tuple[str, ...]) -> None:
    """Raise UserError unless the world's prompts are the town's moods, whose frames can be
    rendered.
    """
    absent = [mood for mood in MOODS if mood not in names]
    if absent:
        raise UserError(
            f"expected a world with the prompts {', '.join(MOODS)}, {absent[0]} is missing: only "
            "towns can be evaluated"
        )

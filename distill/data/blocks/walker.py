"""A seeded walker: holds keys for a while, as a player does, and yields the camera's pose at every
video frame.

It walks, runs, strafes, steps back, stands, turns, looks up and down, and often revisits what it
has seen: it turns away and back, walks out and back, makes whole loops. Speeds change with
momentum, houses and water stop it (it slides along them), and it steers away from walls in front
of it. The camera has no roll: yaw about the world's vertical, pitch about its own x axis.
"""

import math
from dataclasses import dataclass

import numpy as np

from distill.data.blocks.scenes import Scene
from distill.data.blocks.town import CELL
from worldmodel.camera import FRAMES_PER_LATENT

SIGHT = 3  # cells around the walker in which it sees obstacles


@dataclass(frozen=True)
class Gait:
    """How the walker moves; speeds per latent frame (4 video frames)."""

    walk: float = 0.10  # units per latent, forward and back
    strafe: float = 0.08  # units per latent, sideways
    run: float = 1.6  # factor on both
    yaw: float = 10.0  # degrees per latent, at most
    pitch: float = 5.0  # degrees per latent, at most
    pitch_limit: float = 20.0  # degrees up and down
    momentum: float = 0.35  # share of a speed change applied in each video frame
    eye: float = 0.17  # height of the eye, units
    radius: float = 0.12  # distance kept from walls, units
    caution: float = 0.55  # steers away from obstacles nearer than this, units


@dataclass(frozen=True)
class Order:
    """Keys held for a number of video frames; each a share of the full speed in [-1, 1] (forward up
    to Gait.run).
    """

    frames: int
    forward: float = 0.0
    strafe: float = 0.0
    yaw: float = 0.0  # + to the right
    pitch: float = 0.0  # + up


Start = tuple[np.ndarray, float]  # position (x, z) [2] in units, heading in degrees


def walk(
    scene: Scene, frames: int, seed, gait: Gait = Gait(), start: Start | None = None
) -> np.ndarray:
    """Poses of a walk through a scene, one per video frame: camera-to-world float64 [frames, 4, 4];
    equal arguments give equal walks.

    seed: anything that numpy's default_rng accepts.
    start: the first pose, at rest. Without it, a town's walk begins on a street, at rest or moving.
    """
    walker = Walker(scene, seed, gait, start)
    if start is not None:
        return np.stack([walker.pose(), *(walker.step() for _ in range(frames - 1))])
    poses = [walker.step() for _ in range(frames + int(walker.rng.integers(0, 2)) * 16)]
    return np.stack(poses[-frames:])


class Walker:
    """State of a walk; `step` makes one video frame."""

    def __init__(self, scene: Scene, seed, gait: Gait = Gait(), start: Start | None = None):
        self.scene = scene
        self.gait = gait
        self.rng = np.random.default_rng(seed)
        self.orders: list[Order] = []
        self.cell = None
        self.low = None
        self.high = None
        self.pitch = 0.0  # degrees, + up
        # forward, strafe (units per frame), yaw, pitch (degrees per frame)
        self.speed = np.zeros(4)
        self.position, self.yaw = self._start() if start is None else start

    def step(self) -> np.ndarray:
        """Advance by one video frame; return the new pose [4, 4]."""
        if not self.orders:
            self.orders = self._plan()
        order = self.orders.pop(0)
        if order.frames > 1:
            self.orders.insert(
                0, Order(order.frames - 1, order.forward, order.strafe, order.yaw, order.pitch)
            )
        self.speed += self.gait.momentum * (self._wanted(order) - self.speed)
        self.yaw += self.speed[2]
        self.pitch = float(
            np.clip(self.pitch + self.speed[3], -self.gait.pitch_limit, self.gait.pitch_limit)
        )
        ahead = _heading(self.yaw)
        right = _heading(self.yaw + 90)
        before = self.position
        self.position = self._pushed_out(before + self.speed[0] * ahead + self.speed[1] * right)
        moved = self.position - before
        self.speed[:2] = moved @ ahead, moved @ right  # a wall takes the momentum towards it
        return self.pose()

    def pose(self) -> np.ndarray:
        """Camera-to-world matrix [4, 4]."""
        yaw = math.radians(self.yaw)
        pitch = math.radians(self.pitch)
        about_y = np.array(
            [[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]]
        )
        about_x = np.array(
            [
                [1, 0, 0],
                [0, math.cos(pitch), -math.sin(pitch)],
                [0, math.sin(pitch), math.cos(pitch)],
            ]
        )
        pose = np.eye(4)
        pose[:3, :3] = about_y @ about_x
        pose[:3, 3] = self.position[0], -self.gait.eye, self.position[1]
        return pose

    def is_free(self, position: np.ndarray) -> bool:
        """Whether the walker could stand at `position` [2]: no wall is nearer than its radius."""
        self.position = position
        return bool(np.allclose(self._pushed_out(position), position))

    def _wanted(self, order: Order) -> np.ndarray:
        """Target speeds per frame of an order, changed where a wall is close ahead."""
        gait = self.gait
        both = math.sqrt(2) if order.forward and order.strafe else 1.0  # a diagonal is not faster
        ahead = order.forward * gait.walk / both
        aside = order.strafe * gait.strafe / both
        wanted = np.array([ahead, aside, order.yaw * gait.yaw, order.pitch * gait.pitch])
        clear = self._clearance(self.yaw)
        if clear < (gait.caution if order.forward > 0 else 0.35) and (
            order.forward > 0 or not order.yaw
        ):
            left, right = (
                max(self._clearance(self.yaw + side * angle) for angle in (35, 70))
                for side in (-1, 1)
            )
            wanted[2] = math.copysign(0.8 * gait.yaw, right - left)
            wanted[0] *= min(1.0, max(0.0, clear - 0.08) / 0.3) if order.forward > 0 else 1.0
        return wanted / FRAMES_PER_LATENT

    def _plan(self) -> list[Order]:
        """The next few orders."""
        rng = self.rng
        gait = self.gait
        side = float(rng.choice([-1, 1]))
        rate = 1.0 if rng.random() < 0.4 else float(rng.uniform(0.3, 1.0))
        pace = gait.run if rng.random() < 0.2 else 1.0
        level = self._look(-self.pitch, 1.0) if abs(self.pitch) > 0.5 else []
        match rng.choice(10, p=[0.24, 0.19, 0.08, 0.06, 0.08, 0.13, 0.07, 0.07, 0.01, 0.07]):
            case 0:  # straight on
                return level + [Order(int(rng.integers(16, 60)), forward=pace)]
            case 1:  # a curve
                return [Order(int(rng.integers(10, 32)), forward=pace, yaw=side * rate)]
            case 2:  # sideways, alone or while walking
                return [
                    Order(
                        int(rng.integers(8, 28)), strafe=side, forward=float(rng.choice([0, 0, 1]))
                    )
                ]
            case 3:  # stand
                return level + [Order(int(rng.integers(4, 48)))]
            case 4:  # turn on the spot
                return level + self._turn(side * rng.uniform(20, 120) * rate, rate)
            case 5:  # turn away and back, standing or walking
                angle = side * (30 + 90 * rate * rng.random())
                forward = float(rng.choice([0, 1]))
                pause = [Order(int(rng.integers(1, 10)), forward=forward)]
                return self._turn(angle, rate, forward) + pause + self._turn(-angle, rate, forward)
            case 6:  # look up or down for a while, then level
                angle = side * rng.uniform(5, gait.pitch_limit)
                forward = float(rng.choice([0, 1]))
                angle = (
                    float(np.clip(self.pitch + angle, -gait.pitch_limit, gait.pitch_limit))
                    - self.pitch
                )
                hold = Order(
                    int(rng.integers(4, 20)),
                    forward=forward,
                    yaw=float(rng.choice([0, 0, side * rate])),
                )
                return self._look(angle, rate) + [hold] + self._look(-self.pitch - angle, rate)
            case 7:  # out and back, backwards or after a turn
                frames = int(rng.integers(12, 36))
                out = Order(frames, forward=1.0)
                rest = Order(int(rng.integers(2, 8)))
                if rng.random() < 0.6:
                    return [out, rest, Order(frames, forward=-1.0)]
                return [out, *self._turn(side * 180, 1.0), out, rest]
            case 8:  # a whole loop
                return level + self._turn(side * 360, 1.0, forward=float(rng.choice([0, 1])))
            case _:  # backwards, straight or in a curve
                return level + [
                    Order(
                        int(rng.integers(12, 40)),
                        forward=-1.0,
                        yaw=float(rng.choice([0, 0, side * rate])),
                    )
                ]

    def _turn(self, angle: float, rate: float, forward: float = 0.0) -> list[Order]:
        return self._rotate(
            angle,
            rate,
            self.gait.yaw,
            lambda frames, share: Order(frames, forward=forward, yaw=share),
        )

    def _look(self, angle: float, rate: float) -> list[Order]:
        return self._rotate(
            angle, rate, self.gait.pitch, lambda frames, share: Order(frames, pitch=share)
        )

    def _rotate(self, angle: float, rate: float, full: float, order) -> list[Order]:
        """Turn by exactly `angle` degrees at about `rate` of the full speed (momentum delays the
        turn, and completes it afterwards).
        """
        if abs(angle) < 0.1:
            return []
        frames = max(1, math.ceil(abs(angle) * FRAMES_PER_LATENT / (full * rate)))
        return [order(frames, angle * FRAMES_PER_LATENT / (full * frames))]

    def _start(self) -> tuple[np.ndarray, float]:
        """A free position on a street and a heading (degrees) with a view along it."""
        best = None
        for _ in range(64):
            cell = self.rng.integers(-40, 40, size=2)
            if not self.scene.street(*cell[:, None]).item():
                continue
            self.position = (cell + 0.5 + self.rng.uniform(-0.25, 0.25, size=2)) * CELL
            yaw = 90.0 * int(self.rng.integers(4)) + float(self.rng.normal(0, 12))
            if np.allclose(self._pushed_out(self.position), self.position):
                clear = self._clearance(yaw)
                if best is None or clear > best[0]:
                    best = clear, self.position, yaw
                if clear > 1.8:
                    break
        return best[1], best[2]

    def _obstacles(self) -> tuple[np.ndarray, np.ndarray]:
        """Footprints (low, high) [n, 2] of the boxes at the height of the body, and of water."""
        cell = tuple(math.floor(x / CELL) for x in self.position)
        if cell != self.cell:
            boxes = self.scene.boxes(*cell, SIGHT)
            low, high = self.scene.barriers(*cell, SIGHT)
            body = boxes.high[:, 1] > -self.gait.eye - 0.03
            self.cell = cell
            self.low = np.concatenate([boxes.low[body][:, [0, 2]], low])
            self.high = np.concatenate([boxes.high[body][:, [0, 2]], high])
        return self.low, self.high

    def _pushed_out(self, position: np.ndarray) -> np.ndarray:
        """The nearest position that keeps the radius from every wall."""
        low, high = self._obstacles()
        for _ in range(4):
            away = position - np.clip(position, low, high)
            distance = np.hypot(away[:, 0], away[:, 1])
            nearest = int(distance.argmin())
            if distance[nearest] >= self.gait.radius:
                return position
            if distance[nearest] < 1e-9:  # inside: leave through the nearest side
                gaps = np.concatenate([position - low[nearest], high[nearest] - position])
                axis = int(gaps.argmin())
                position = position.copy()
                position[axis % 2] = (
                    low[nearest, axis] - self.gait.radius
                    if axis < 2
                    else high[nearest, axis - 2] + self.gait.radius
                )
            else:
                factor = self.gait.radius * 1.0001 / distance[nearest] - 1
                position = position + away[nearest] * factor
        return position

    def _clearance(self, yaw: float) -> float:
        """Free distance in a direction (degrees) for a body of the walker's radius, units."""
        low, high = self._obstacles()
        ray = _heading(yaw)
        ray = np.where(np.abs(ray) < 1e-9, 1e-9, ray)
        margin = 0.9 * self.gait.radius
        one = (low - margin - self.position) / ray
        other = (high + margin - self.position) / ray
        enter = np.minimum(one, other).max(1)
        leave = np.maximum(one, other).min(1)
        hits = enter[(leave > np.maximum(enter, 0))]
        return float(np.maximum(hits, 0).min(initial=SIGHT * CELL))


def _heading(yaw: float) -> np.ndarray:
    """Unit vector (x, z) of a yaw in degrees; 0 looks along +z, 90 along +x."""
    angle = math.radians(yaw)
    return np.array([math.sin(angle), math.cos(angle)])

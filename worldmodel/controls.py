"""Time-stamped key and mouse edges -> one exact camera pose per latent frame, within what a world
has learned.

The clock belongs to the caller: every method takes the time `t` in seconds, of any origin. Edges
may come from another thread than the one that asks for poses. Needs neither torch nor pygame.
"""

import math
import threading
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from worldmodel.camera import STYLES, advance, check_poses, heading
from worldmodel.errors import UserError

if TYPE_CHECKING:  # it reads pictures, which the controls do not need
    from worldmodel.walkable import Walls

# motion a key is bound to -> (axis of the envelope, sign)
MOTIONS = {
    "forward": ("forward", 1),
    "back": ("forward", -1),
    "right": ("strafe", 1),
    "left": ("strafe", -1),
    "rise": ("vertical", 1),
    "sink": ("vertical", -1),
    "turn_right": ("yaw", 1),
    "turn_left": ("yaw", -1),
    "look_up": ("pitch", 1),
    "look_down": ("pitch", -1),
    "run": ("run", 1),
}
AXES = ("forward", "strafe", "vertical", "yaw", "pitch")
# axes that share one length, so that a diagonal is no faster than a straight line
_GROUPS = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]], np.float64)
STOP = 0.02  # share of a full step below which a motion that nothing asks for ends
_RUNNING = np.array([1, 1, 1, 0, 0], bool)


@dataclass(frozen=True)
class Envelope:
    """The motion a world has learned; what it has not learned is 0 (locked).

    Raises UserError for a value out of its range.
    """

    forward: float = 0.08  # units per latent
    strafe: float = 0.08  # units per latent
    vertical: float = 0.0  # units per latent
    run: float = 1.0  # factor on the three above while `run` is held; 1 = locked
    yaw: float = 3.0  # degrees per latent
    pitch: float = 3.0  # degrees per latent
    pitch_limit: float = 60.0  # degrees above and below the horizon
    smoothing: float = 1.0  # share of the speed change made in one latent; 1 = at once
    # "walk": yaw about the vertical, move on the ground; "fly": about the camera's own axes
    style: str = "walk"

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "style" and not (
                isinstance(value, (int, float)) and 0 <= value < math.inf
            ):
                raise UserError(
                    f"Envelope: {field.name} must be a number of at least 0, got {value!r}."
                )
        if self.style not in STYLES:
            raise UserError(
                f"Envelope: style must be one of {', '.join(STYLES)}, got {self.style!r}."
            )
        if self.run < 1 or not 0 < self.smoothing <= 1 or not 0 < self.pitch_limit <= 90:
            raise UserError(
                "Envelope: run must be at least 1, smoothing above 0 and at most 1, pitch_limit "
                f"above 0 and at most 90; got {self.run}, {self.smoothing}, {self.pitch_limit}."
            )

    @property
    def locked(self) -> tuple[str, ...]:
        """Names of the MOTIONS this world has not learned."""
        nothing = {axis: 0 for axis in AXES} | {"run": 1}
        return tuple(
            name for name, (axis, _) in MOTIONS.items() if getattr(self, axis) == nothing[axis]
        )

    @property
    def limits(self) -> np.ndarray:
        """[5] largest motion per latent without running, in the order of AXES."""
        return np.array(
            [self.forward, self.strafe, self.vertical, self.yaw, self.pitch], np.float64
        )


class Controls:
    """Integrate the edges between two calls of `pose_until` exactly: speed is constant between
    neighbouring edges.

    A latent is worth `frames_per_latent / fps` seconds. Called at that pace, a key held for a third
    of it moves a third of the envelope. Called late (a slow machine), a press keeps the worth of
    its real time, up to one full step; called early, a key held all the time still moves a full
    step. The first call starts the clock and moves nothing. Of opposite motions the latest pressed
    wins until it is released.

    envelope: what the world has learned. fps: pixel frames a second. sensitivity: degrees per mouse
    count. walls: where the camera may go; None = everywhere. It may be
    replaced between two poses.
    """

    def __init__(
        self,
        envelope: Envelope,
        fps: float,
        frames_per_latent: int = 4,
        sensitivity: float = 0.1,
        walls: "Walls | None" = None,
    ):
        if not (fps > 0 and frames_per_latent >= 1):
            raise ValueError(
                f"fps and frames_per_latent must be positive, got {fps} and {frames_per_latent}."
            )
        self.envelope = envelope
        self.sensitivity = sensitivity
        self.walls = walls
        self._latent = frames_per_latent / fps  # seconds
        self._lock = threading.Lock()
        # (t, "press" | "release" | "look", motion or counts)
        self._edges: list[tuple[float, str, object]] = []
        self._held: dict[str, None] = {}  # in the order of pressing
        self.reset()

    @property
    def locked(self) -> tuple[str, ...]:
        """Names of the MOTIONS that the world has not learned."""
        return self.envelope.locked

    @property
    def held(self) -> tuple[str, ...]:
        """Motions held at the last pose, in the order of pressing."""
        with self._lock:
            return tuple(self._held)

    @property
    def pose(self) -> np.ndarray:
        """The last pose given, c2w [4,4]."""
        return self._pose.copy()

    @property
    def velocity(self) -> np.ndarray:
        """[5] motion of the last latent (units, degrees), in the order of AXES."""
        return self._velocity.copy()

    @property
    def at_rest(self) -> bool:
        """Whether the camera stands still until the next edge: no speed, no key that moves it."""
        with self._lock:
            return not (self._velocity.any() or self._carried.any() or self._speed().any())

    @property
    def next_edge(self) -> float | None:
        """Time of the first edge since the last pose; None = none."""
        with self._lock:
            return min((t for t, _, _ in self._edges), default=None)

    def press(self, motion: str, t: float) -> None:
        """Note that the key of `motion` (one of MOTIONS) went down at `t` seconds. A locked motion
        is held but moves nothing.
        """
        self._add(t, "press", _known(motion))

    def release(self, motion: str, t: float) -> None:
        """Note that the key of `motion` went up at `t` seconds."""
        self._add(t, "release", _known(motion))

    def look(self, dx: float, dy: float, t: float) -> None:
        """Note that the mouse moved by `dx` counts right and `dy` counts down at `t` seconds."""
        if not (math.isfinite(dx) and math.isfinite(dy)):
            raise ValueError(f"Mouse motion must be finite, got {dx}, {dy}.")
        self._add(t, "look", (dx, dy))

    def reset(self, c2w=None) -> None:
        """Stand still at `c2w` [4,4] (default: identity). Keys stay held; the clock restarts
        with the next pose, so `reset(pose)` also ends a pause.
        """
        pose = np.eye(4) if c2w is None else check_poses(c2w, 1, "reset")[0].copy()
        with self._lock:
            for _, kind, value in sorted(self._edges, key=lambda edge: edge[0]):
                self._apply(kind, value)
            self._edges.clear()
        self._pose = pose
        self._velocity = np.zeros(len(AXES))
        # mouse degrees (yaw, pitch) that did not fit into the last latent
        self._carried = np.zeros(2)
        self._since: float | None = None

    def pose_until(self, t: float) -> np.ndarray:
        """Return c2w [4,4] after all edges until `t`: one latent frame further."""
        with self._lock:
            edges = sorted((edge for edge in self._edges if edge[0] <= t), key=lambda edge: edge[0])
            self._edges = [edge for edge in self._edges if edge[0] > t]
            start = t if self._since is None else min(self._since, t)
            share, mouse = self._integrate(edges, start, t)
        self._since = t
        target = share * self.envelope.limits
        target[3:] += self._mouse_turn(mouse, target[3:])
        self._velocity += self.envelope.smoothing * (target - self._velocity)
        # smoothing alone would only halve it, and the camera would never come to rest
        slow = np.abs(self._velocity) < STOP * self.envelope.limits
        self._velocity[slow & (target == 0)] = 0.0
        self._limit_pitch()
        forward, strafe, vertical, yaw, pitch = self._velocity
        pose = advance(self._pose, [strafe, -vertical, forward], yaw, pitch, self.envelope.style)
        self._pose = pose if self.walls is None else self._slide(pose)
        return self.pose

    # -------------------- inside

    def _add(self, t: float, kind: str, value) -> None:
        if not math.isfinite(t):
            raise ValueError(f"The time of an edge must be finite seconds, got {t}.")
        with self._lock:
            self._edges.append((t, kind, value))

    def _integrate(self, edges, start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the share [5] of the envelope that the keys ask for between start and end, and
        the mouse motion [2] in counts.
        """
        mouse = np.zeros(2)
        total = np.zeros(len(AXES))
        active = np.zeros(len(_GROUPS))
        now = start
        for when, kind, value in [*edges, (end, "end", None)]:
            when = min(max(when, start), end)  # an edge that came late counts from the start
            speed = self._speed()
            total += speed * (when - now)
            active += (_GROUPS @ np.abs(speed) > 0) * (when - now)
            now = when
            if kind == "look":
                mouse += value
            else:
                self._apply(kind, value)
        if end <= start:
            return total, mouse
        # Dividing by the time a group was active, at least a latent, keeps the mean inside the
        # envelope.
        return total / (np.maximum(active, min(end - start, self._latent)) @ _GROUPS), mouse

    def _apply(self, kind: str, motion) -> None:
        if kind == "press":
            self._held.setdefault(motion)  # a repeated press of a held key changes nothing
        elif kind == "release":
            self._held.pop(motion, None)

    def _speed(self) -> np.ndarray:
        """Return the share [5] of the envelope that the held keys ask for; diagonals have length 1,
        or `run` while running.
        """
        speed = np.zeros(len(AXES))
        for motion in self._held:  # later presses overwrite earlier ones
            axis, sign = MOTIONS[motion]
            if axis != "run" and motion not in self.locked:
                speed[AXES.index(axis)] = sign
        speed /= np.maximum(np.sqrt(_GROUPS @ speed**2), 1.0) @ _GROUPS
        return (
            np.where(_RUNNING, speed * self.envelope.run, speed) if "run" in self._held else speed
        )

    def _mouse_turn(self, counts: np.ndarray, by_keys: np.ndarray) -> np.ndarray:
        """Mouse counts (right, down) -> degrees [2] of yaw and pitch that the keys' turn
        leaves within the limits.
        """
        limits = self.envelope.limits[3:]
        fresh = np.where(limits > 0, counts * [1, -1] * self.sensitivity, 0.0)
        wanted = by_keys + self._carried + fresh
        turned = np.clip(wanted, -limits, limits)
        # only this latent's own motion waits for the next one; what already waited once is dropped
        self._carried = np.clip(wanted - turned, np.minimum(fresh, 0), np.maximum(fresh, 0))
        return turned - by_keys

    def _slide(self, wanted: np.ndarray) -> np.ndarray:
        """Return the pose [4,4] that walls leave of `wanted`; the speed towards them is lost."""
        pose = self.walls.slide(self._pose, wanted)
        axes = heading(pose) if self.envelope.style == "walk" else pose[:3, :3]
        strafe, down, forward = axes.T @ (pose[:3, 3] - wanted[:3, 3])
        self._velocity[:3] += (forward, strafe, -down)
        return pose

    def _limit_pitch(self) -> None:
        elevation = math.degrees(math.asin(np.clip(-self._pose[1, 2], -1, 1)))
        limit = self.envelope.pitch_limit
        low = min(-limit - elevation, 0)
        high = max(limit - elevation, 0)
        allowed = min(max(self._velocity[4], low), high)
        if allowed != self._velocity[4]:
            self._velocity[4] = allowed
            self._carried[1] = 0.0


def _known(motion: str) -> str:
    if motion not in MOTIONS:
        raise ValueError(f"Unknown motion {motion!r}; the motions are {', '.join(MOTIONS)}.")
    return motion

"""Camera paths without a player: a trajectory text, or a tour of the motions a world knows."""

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from worldmodel.camera import MOTIONS, MotionStep, parse_trajectory
from worldmodel.controls import Controls, Envelope
from worldmodel.errors import UserError

if TYPE_CHECKING:
    from worldmodel.walkable import Walls

# (motions held together, latents; degrees where one of them turns)
TOUR = (
    (("forward",), 10),
    (("turn_right",), 90),
    ((), 3),
    (("turn_left",), 90),
    (("forward", "run"), 8),
    (("left",), 6),
    (("right",), 6),
    (("look_up",), 12),
    (("look_down",), 12),
    (("forward", "turn_left"), 60),
    (("forward", "turn_right"), 60),
    (("back",), 4),
    (("forward",), 8),
)
MET_WALL = "The path met a wall and slides along it; --no-walls walks through"
MIN_LATENTS = 24  # of the tour, also where a world knows few motions or none


def written_path(text: str, envelope: Envelope) -> np.ndarray:
    """Return c2w [N, 4, 4] of the latents after the first, from a trajectory text.

    One count of a key is one full step of `envelope`. Raises UserError for an unknown key, and for
    a key whose motion the world has not learned.
    """
    known = (
        np.array(
            [envelope.strafe, envelope.vertical, envelope.forward, envelope.yaw, envelope.pitch]
        )
        > 0
    )
    step = MotionStep(
        envelope.forward, envelope.yaw, envelope.strafe, envelope.vertical, envelope.pitch
    )
    poses = parse_trajectory(text, step, envelope.style)[1:]
    for key in re.findall(r"[a-z]+", text.lower()):
        if np.any(np.concatenate(MOTIONS[key])[~known]):
            raise UserError(
                f"Trajectory key {key!r} is locked: this world has not learned that motion; leave "
                "it out."
            )
    return poses


def within_walls(
    path: np.ndarray, walls: "Walls | None", notify: Callable[[str], object]
) -> np.ndarray:
    """Return `path`, c2w [N, 4, 4] from the identity on, sliding along `walls` (None = no walls).

    notify: receives one sentence if the path met a wall.
    """
    if walls is None:
        return path
    kept = walls.follow(np.concatenate([np.eye(4)[None], path]))[1:]
    if not np.array_equal(kept, path):
        notify(MET_WALL)
    return kept


def tour(envelope: Envelope) -> np.ndarray:
    """Return the scripted walk, c2w [N >= 24, 4, 4]: walk, turn away and back, run, strafe, look.

    Locked motions are left out; the rest of the time it stands still.
    """
    controls = Controls(envelope, fps=4.0, frames_per_latent=4)
    poses = []
    now = 0.0
    controls.pose_until(now)
    for motions, amount in TOUR:
        if any(motion in controls.locked for motion in motions if motion != "run"):
            continue
        turn = next((motion for motion in motions if motion.startswith(("turn", "look"))), None)
        if turn:
            amount = math.ceil(
                amount / (envelope.pitch if turn.startswith("look") else envelope.yaw)
            )
        for motion in motions:
            controls.press(motion, now)
        for _ in range(amount):
            now += 1.0
            poses.append(controls.pose_until(now))
        for motion in motions:
            controls.release(motion, now)
    poses += poses[-1:] * (MIN_LATENTS - len(poses))
    return np.stack(poses)

"""Camera poses: trajectory text, pose files, checks and conversions. numpy float64 throughout, no
torch.

Axes are OpenCV's: x right, y down, z forward. `c2w` maps camera to world, `w2c` ("viewmats") world
to camera. Angles are degrees at the public face; positive yaw looks right, positive pitch looks up.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from worldmodel.errors import UserError
from worldmodel.files import write_file

# Video frames of one latent frame. Latent 0 is video frame 0 alone; latent k covers frames 4k-3..4k
# and its pose is that of frame 4k, so F latents are 4F - 3 video frames.
FRAMES_PER_LATENT = 4

# What one held key does: movement in camera axes (x, y, z) and turn (yaw, pitch), in units of
# MotionStep. `u`/`dn` rise and sink, `up`/`down` look: minWM's and WorldPlay's keys do not clash.
MOTIONS = {
    "w": ((0, 0, 1), (0, 0)),
    "s": ((0, 0, -1), (0, 0)),
    "a": ((-1, 0, 0), (0, 0)),
    "d": ((1, 0, 0), (0, 0)),
    "u": ((0, -1, 0), (0, 0)),
    "dn": ((0, 1, 0), (0, 0)),
    "j": ((0, 0, 0), (-1, 0)),
    "l": ((0, 0, 0), (1, 0)),
    "i": ((0, 0, 0), (0, 1)),
    "k": ((0, 0, 0), (0, -1)),
    "left": ((0, 0, 0), (-1, 0)),
    "right": ((0, 0, 0), (1, 0)),
    "up": ((0, 0, 0), (0, 1)),
    "down": ((0, 0, 0), (0, -1)),
    "wait": ((0, 0, 0), (0, 0)),  # ours: the only key of a world without camera control
}
STYLES = ("fly", "walk")
MOST_LATENTS = 100_000  # of a trajectory text: seven hours
_COMMAND = re.compile(r"^([a-z]+(?:\s*\+\s*[a-z]+)*)\s*[*-]\s*(\d+(?:\.\d*)?|\.\d+)$")
_ROTATION_TOLERANCE = 1e-3  # files store rotations in float32 or a few decimals


@dataclass(frozen=True)
class MotionStep:
    """How far a held key moves the camera during one latent frame.

    The defaults are those of minWM and WorldPlay.
    """

    move: float = 0.08  # world units per latent, forwards and back
    turn: float = 3.0  # degrees per latent, left and right
    strafe: float | None = None  # world units per latent, sideways; None = as `move`
    vertical: float | None = None  # world units per latent, up and down; None = as `move`
    pitch: float | None = None  # degrees per latent, up and down; None = as `turn`

    def scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Return units per latent along x, y, z, and degrees per latent of yaw and pitch."""
        strafe, vertical = (
            self.move if value is None else value for value in (self.strafe, self.vertical)
        )
        return np.array([strafe, vertical, self.move]), np.array(
            [self.turn, self.turn if self.pitch is None else self.pitch]
        )


# -------------------- motion


def rotation(yaw: float, pitch: float) -> np.ndarray:
    """Return the [3,3] camera-to-world rotation of `yaw` degrees right about the down axis, then
    `pitch` degrees up about the camera's x axis.
    """
    yaw = np.deg2rad(yaw)
    pitch = np.deg2rad(pitch)
    cos_y = np.cos(yaw)
    sin_y = np.sin(yaw)
    cos_p = np.cos(pitch)
    sin_p = np.sin(pitch)
    about_y = np.array([[cos_y, 0, sin_y], [0, 1, 0], [-sin_y, 0, cos_y]])
    about_x = np.array([[1, 0, 0], [0, cos_p, -sin_p], [0, sin_p, cos_p]])
    return about_y @ about_x


def advance(c2w: np.ndarray, move, yaw: float, pitch: float, style: str = "fly") -> np.ndarray:
    """Turn by `yaw`, `pitch` degrees, then move by `move` [3] units; return a new c2w [4,4].

    "fly" turns and moves about the camera's own axes (minWM, WorldPlay). "walk" yaws about the
    world's vertical axis and moves on the ground plane along the heading, so looking up or down
    does not change the direction.
    """
    pose = c2w.copy()
    move = np.asarray(move, np.float64)
    if style == "fly":
        pose[:3, :3] = c2w[:3, :3] @ rotation(yaw, pitch)
        pose[:3, 3] += pose[:3, :3] @ move
    else:
        pose[:3, :3] = rotation(yaw, 0) @ c2w[:3, :3] @ rotation(0, pitch)
        pose[:3, 3] += heading(pose) @ move
    return pose


def heading(c2w: np.ndarray) -> np.ndarray:
    """Return the [3,3] rotation about the vertical axis of a walker's c2w [4,4] without roll."""
    right = c2w[:3, 0]  # horizontal, whatever the pitch
    return rotation(np.rad2deg(np.arctan2(-right[2], right[0])), 0)


def parse_trajectory(text: str, step: MotionStep = MotionStep(), style: str = "fly") -> np.ndarray:
    """Return c2w [N+1,4,4] of a trajectory text: the identity, then one pose per latent frame.

    Reads minWM's `w*5,j*3` and WorldPlay's `w-3, right-0.5`; `+` joins keys held together: `w+l*4`.
    Counts are latent frames. Fractions count: the next command starts where the last one ended,
    inside a latent, and an unfinished last latent is completed by standing still.
    Differs: WorldPlay cuts fractions off. Joined keys turn first, then move, as both references do
    in one motion. Raises UserError for a text that does not follow this form.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}.")
    pose = np.eye(4)
    poses = [np.eye(4)]
    filled = 0.0
    units, degrees = step.scale()
    for move, turn, count in _commands(text):
        move = move * units
        (yaw, pitch) = turn * degrees
        while count > 1e-9:
            part = min(count, 1.0 - filled)
            pose = advance(pose, move * part, yaw * part, pitch * part, style)
            count = count - part
            filled = filled + part
            if filled > 1.0 - 1e-9:
                poses.append(pose)
                filled = 0.0
    if filled > 1e-9:
        poses.append(pose)
    return np.stack(poses)


def _commands(text: str):
    """Return a list of (move [3], turn [2], count in latents) of a trajectory text."""
    commands = []
    for part in text.lower().split(","):
        match = _COMMAND.match(part.strip())
        if match is None:
            raise UserError(
                f"Trajectory part {part.strip()!r} is not KEY*COUNT or KEY-COUNT; write for "
                "example 'w*10, w+l*8'."
            )
        keys = [key.strip() for key in match[1].split("+")]
        for key in keys:
            if key not in MOTIONS:
                raise UserError(
                    f"Trajectory key {key!r} is unknown; the keys are {', '.join(MOTIONS)}."
                )
        motion = np.array([[*MOTIONS[key][0], *MOTIONS[key][1]] for key in keys], np.float64).sum(0)
        commands.append((motion[:3], motion[3:], float(match[2])))
    total = sum(count for _, _, count in commands)
    if total > MOST_LATENTS:
        raise UserError(
            f"Trajectory of {total:.0f} latents is longer than {MOST_LATENTS}; write a shorter one."
        )
    return commands


# -------------------- matrices


def invert(poses: np.ndarray) -> np.ndarray:
    """Invert rigid transforms [...,4,4] (c2w <-> w2c) exactly: transpose the rotation."""
    poses = np.asarray(poses, np.float64)
    inverse = np.zeros_like(poses)
    rotations = np.swapaxes(poses[..., :3, :3], -1, -2)
    inverse[..., :3, :3] = rotations
    inverse[..., :3, 3] = -(rotations @ poses[..., :3, 3:])[..., 0]
    inverse[..., 3, 3] = 1.0
    return inverse


def relative_to_first(c2w: np.ndarray) -> np.ndarray:
    """Express c2w [F,4,4] in the frame of the first camera, which becomes the identity."""
    c2w = np.asarray(c2w, np.float64)
    relative = invert(c2w[0]) @ c2w
    relative[0] = np.eye(4)
    return relative


def check_poses(c2w, count: int | None = None, source: str = "") -> np.ndarray:
    """Return `c2w` as float64 [F,4,4]. Raises UserError, which names the first bad pose.

    count: the least number of poses. source: where they came from, for the message.
    """
    where = f"{source}: " if source else ""
    try:
        poses = np.asarray(c2w, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where}expected poses as numbers [F,4,4], got something else.") from None
    if poses.ndim == 2:
        poses = poses[None]
    if poses.ndim != 3 or poses.shape[1:] != (4, 4):
        raise UserError(
            f"{where}expected poses [F,4,4], got an array of shape {list(poses.shape)}."
        )
    if len(poses) < (count or 1):
        raise UserError(
            f"{where}{count or 1} poses are needed (one per latent frame), got {len(poses)}."
        )
    for index, pose in enumerate(poses):
        fault = _pose_fault(pose)
        if fault:
            raise UserError(
                f"{where}pose {index} {fault}; expected a camera-to-world matrix [R t; 0 0 0 1]."
            )
    return poses


def _pose_fault(pose: np.ndarray) -> str | None:
    """Return what is wrong with a pose [4,4], or None."""
    if not np.isfinite(pose).all():
        return "holds NaN or infinity"
    if np.abs(pose[3] - [0, 0, 0, 1]).max() > 1e-6:
        return f"has the bottom row {pose[3].tolist()}"
    turn = pose[:3, :3]
    if np.abs(turn @ turn.T - np.eye(3)).max() > _ROTATION_TOLERANCE:
        return "is not a rotation (its axes are not of length 1 and at right angles)"
    if np.linalg.det(turn) < 0:
        return "is not a rotation (it mirrors: determinant -1)"
    return None


def poses_to_vectors(c2w: np.ndarray) -> np.ndarray:
    """Convert c2w [F,4,4] to w2c vectors [F,7] (tx, ty, tz, qx, qy, qz, qw), the form of minWM's
    LMDB files.
    """
    w2c = invert(c2w)
    return np.concatenate([w2c[:, :3, 3], Rotation.from_matrix(w2c[:, :3, :3]).as_quat()], axis=1)


def vectors_to_poses(vectors: np.ndarray) -> np.ndarray:
    """Convert w2c vectors [F,7] to c2w [F,4,4]: the inverse of `poses_to_vectors`."""
    vectors = np.asarray(vectors, np.float64)
    w2c = np.tile(np.eye(4), (len(vectors), 1, 1))
    w2c[:, :3, :3] = Rotation.from_quat(vectors[:, 3:]).as_matrix()
    w2c[:, :3, 3] = vectors[:, :3]
    return invert(w2c)


# -------------------- files


def read_pose_json(path) -> tuple[np.ndarray, np.ndarray]:
    """Read WorldPlay's pose file: (c2w [F,4,4], intrinsics [F,4] as fx/W, fy/H, cx/W, cy/H).

    The file holds no picture size: as in the reference (minWM `build_worldplaygen_lmdb`), it is
    twice the principal point, which therefore comes back as 0.5, 0.5.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        ordered = [entries[key] for key in sorted(entries, key=int)]
        c2w = [entry["extrinsic"] for entry in ordered]
        matrices = np.array([entry["K"] for entry in ordered], np.float64).reshape(-1, 3, 3)
    except OSError as error:
        raise UserError(f"Pose file {path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
        raise UserError(
            f"Pose file {path} is not in WorldPlay's form "
            '{"0": {"extrinsic": 4x4, "K": 3x3 pixels}, ...}.'
        ) from None
    c2w = check_poses(c2w, source=f"Pose file {path}")
    if not np.isfinite(matrices).all() or (matrices[:, [0, 1, 0, 1], [0, 1, 2, 2]] <= 0).any():
        raise UserError(
            f"Pose file {path}: K must hold positive focal lengths and a positive principal point."
        )
    width = 2 * matrices[:, 0, 2]
    height = 2 * matrices[:, 1, 2]
    half = np.full(len(c2w), 0.5)
    return c2w, np.stack(
        [matrices[:, 0, 0] / width, matrices[:, 1, 1] / height, half, half], axis=1
    )


def write_pose_json(path, c2w, intrinsics, width: int, height: int) -> None:
    """Write WorldPlay's pose file: c2w [F,4,4] and K in pixels of width x height, one entry per
    latent frame.

    intrinsics: [4] or [F,4], normalised. The principal point must be the centre (see
    `read_pose_json`).
    """
    c2w = check_poses(c2w)
    intrinsics = np.broadcast_to(np.asarray(intrinsics, np.float64), (len(c2w), 4))
    if np.abs(intrinsics[:, 2:] - 0.5).max() > 1e-6:
        raise UserError(
            "A pose file needs the principal point in the picture's centre (cx/W = cy/H = 0.5)."
        )
    entries = {}
    for index, (pose, (fx, fy, cx, cy)) in enumerate(zip(c2w, intrinsics, strict=True)):
        matrix = [[fx * width, 0.0, cx * width], [0.0, fy * height, cy * height], [0.0, 0.0, 1.0]]
        entries[str(index)] = {"extrinsic": pose.tolist(), "K": matrix}
    write_file(path, json.dumps(entries))

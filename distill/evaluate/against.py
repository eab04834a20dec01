"""What a generated frame in a place is compared with: a remembered frame warped onto the truth, the
remembered frames reprojected, and true frames at other poses.
"""

import cv2
import numpy as np

from distill.data.blocks.renderer import render
from distill.data.blocks.scenes import Scene
from distill.metrics import correlation_table, psnr, to_unit
from worldmodel.camera import rotation
from worldmodel.images import to_uint8
from worldmodel.reprojection import RememberedViews, filled

ECC = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 100, 1e-5)
ECC_BLUR = 5  # pixels
# The search of `localise`: half its width and its first step, units and degrees
REACH = (0.8, 18.0)
STEP = (0.4, 6.0)
COARSE = (24, 40)  # pixels
FINE = (48, 80)
ROUNDS = 5  # each halves the step
CANDIDATES = 3  # of the coarse search that are refined


def warped_lookup(views: RememberedViews, pose: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The remembered frame that shows most of what a camera at `pose` sees, warped onto its true
    picture uint8 [H, W, 3] by the best homography: the strongest slide show there could be.

    The homography of the rotation between both cameras is refined on the truth (enhanced
    correlation); of both, the one of less error counts. Outside the frame its border is repeated.
    """
    height, width = truth.shape[:2]
    chosen = views.choose(pose, 1)
    number = chosen[0] if chosen else 0
    size = (width, height)
    frame = cv2.resize(views.pictures[number].numpy(), size, interpolation=cv2.INTER_CUBIC)
    start = _rotation_homography(views, number, pose, height, width)
    grey = [cv2.cvtColor(one, cv2.COLOR_RGB2GRAY) for one in (truth, _warp(frame, start))]
    warps = [start]
    try:
        found = cv2.findTransformECC(
            *grey, np.eye(3, dtype=np.float32), cv2.MOTION_HOMOGRAPHY, ECC, None, ECC_BLUR
        )[1]
        warps.append(start @ found.astype(np.float64))
    except cv2.error:  # it did not converge
        pass
    candidates = np.stack([_warp(frame, one) for one in warps])
    errors = psnr(to_unit(candidates), to_unit(truth[None]))
    return candidates[int(errors.argmax())]


def reprojected(
    views: RememberedViews, count: int, pose: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """What the condition shows: `count` remembered frames seen from `pose`, holes filled, uint8 [H,
    W, 3] of `size`.
    """
    picture = filled(*views.reproject(views.choose(pose, count), pose))
    frame = to_uint8(picture).permute(1, 2, 0).numpy()
    return cv2.resize(frame, size[::-1], interpolation=cv2.INTER_CUBIC)


def localise(
    frame: np.ndarray, pose: np.ndarray, scene: Scene, intrinsics, seed
) -> tuple[float, float]:
    """How far from the true pose the frame uint8 [H, W, 3] looks to be taken: units, degrees.

    The pose, among those on the ground within REACH of the true one, whose true picture correlates
    most with the frame. A grid, whose centre is a random part of a step off the truth, then smaller
    steps around its best poses. The results are at most about REACH.
    """
    step = np.array([STEP[0], STEP[0], STEP[1]])
    offset = np.random.default_rng(seed).uniform(-0.5, 0.5, 3) * step
    counts = [round(reach / size) for reach, size in zip(REACH, STEP, strict=True)]
    lines = [np.arange(-n, n + 1) for n in (counts[0], counts[0], counts[1])]
    grid = np.stack(np.meshgrid(*lines, indexing="ij"), -1).reshape(-1, 3) * step + offset
    like = _likeness(frame, pose, grid, scene, intrinsics, COARSE)
    best = grid[np.argsort(-like)[:CANDIDATES]]
    around = np.stack(np.meshgrid(*[(-1, 0, 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    for number in range(ROUNDS):
        step = step / 2
        grid = np.unique((best[:, None] + around * step).reshape(-1, 3).round(6), axis=0)
        like = _likeness(frame, pose, grid, scene, intrinsics, FINE)
        best = grid[np.argsort(-like)[: 1 if number else 2]]
    return float(np.hypot(*best[0, :2])), float(abs(best[0, 2]))


def _likeness(frame: np.ndarray, pose, moves: np.ndarray, scene, intrinsics, size) -> np.ndarray:
    """Correlation of the frame with the true pictures from `pose` moved by x, z (units) and heading
    (degrees), [N, 3]: [N].
    """
    poses = np.repeat(pose[None], len(moves), 0)
    poses[:, [0, 2], 3] += moves[:, :2]
    poses[:, :3, :3] = [rotation(heading, 0) @ pose[:3, :3] for heading in moves[:, 2]]
    small = cv2.resize(frame, size[::-1], interpolation=cv2.INTER_AREA)
    true = render(scene, poses, intrinsics, *size, samples=1)
    return correlation_table(to_unit(small[None]), to_unit(true))[0].numpy()


def _rotation_homography(
    views: RememberedViews, number: int, pose: np.ndarray, height: int, width: int
) -> np.ndarray:
    """From pixels of a camera at `pose` to those of the remembered frame, as if all were far."""
    fx, fy, cx, cy = views.intrinsics
    lens = np.array(
        [[fx * width, 0, cx * width - 0.5], [0, fy * height, cy * height - 0.5], [0, 0, 1]]
    )
    turn = views.c2w[number][:3, :3].T @ pose[:3, :3]
    return lens @ turn @ np.linalg.inv(lens)


def _warp(frame: np.ndarray, homography: np.ndarray) -> np.ndarray:
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = frame.shape[1::-1]
    return cv2.warpPerspective(
        frame, homography, size, flags=flags, borderMode=cv2.BORDER_REPLICATE
    )

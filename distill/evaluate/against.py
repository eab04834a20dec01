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
# The search of `localise`
REACH = (0.8, 18.0)  # to each side of the truth, units and degrees
STEP = 0.4  # units between the positions of the grid
TURN = 1.5  # degrees between the headings that are tried at a position
FINE_TURN = 0.25
ROUNDS = 5  # each halves the step
CANDIDATES = 2  # positions of the grid that are refined
SMALL = (48, 80)  # pixels in which pictures are compared
WIDE = (1.7, 2.3)  # height and width of a rendered picture, of which every heading is a part


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
    most with the frame: first on a grid, whose centre is a random part of a step off the truth,
    then in smaller steps around its best positions. The results are at most about REACH.
    """
    draws = np.random.default_rng(seed)
    centre = draws.uniform(-0.5, 0.5, 2) * STEP
    shift = draws.uniform(-0.5, 0.5) * TURN
    small = cv2.resize(frame, SMALL[::-1], interpolation=cv2.INTER_AREA)
    line = np.arange(-round(REACH[0] / STEP), round(REACH[0] / STEP) + 1) * STEP
    moves = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2) + centre
    tried = {}

    def best_of(moves: np.ndarray, count: int) -> list[tuple[float, float]]:
        """The `count` most similar of the positions, searching headings where it was not done."""
        keys = [tuple(move) for move in moves.round(6)]
        new = [key for key in dict.fromkeys(keys) if key not in tried]
        if new:
            wide = _wide_pictures(pose, np.array(new), scene, intrinsics)
            tried.update(
                (key, _best_heading(small, picture, pose, intrinsics, shift))
                for key, picture in zip(new, wide, strict=True)
            )
        return sorted(dict.fromkeys(keys), key=lambda key: -tried[key][0])[:count]

    found = best_of(moves, CANDIDATES)
    around = np.stack(np.meshgrid((-1, 0, 1), (-1, 0, 1)), -1).reshape(-1, 2)
    for number in range(1, ROUNDS + 1):
        near = (np.array(found)[:, None] + around * STEP / 2**number).reshape(-1, 2)
        found = best_of(near, CANDIDATES if number == 1 else 1)
    return float(np.hypot(*found[0])), abs(tried[found[0]][1])


def _wide_pictures(pose: np.ndarray, moves: np.ndarray, scene: Scene, intrinsics) -> np.ndarray:
    """True pictures with a wide lens from `pose` moved by x, z [N, 2]: uint8 [N, H, W, 3]."""
    poses = np.repeat(pose[None], len(moves), 0)
    poses[:, [0, 2], 3] += moves
    fx, fy, cx, cy = intrinsics
    height, width = (round(n * wide) for n, wide in zip(SMALL, WIDE, strict=True))
    lens = (fx * SMALL[1] / width, fy * SMALL[0] / height, cx, cy)
    return render(scene, poses, lens, height, width).numpy()


def _best_heading(
    small: np.ndarray, wide: np.ndarray, pose: np.ndarray, intrinsics, shift: float
) -> tuple[float, float]:
    """(correlation, degrees from the true heading) of the part of a wide picture that is most like
    the small one.
    """
    headings = np.arange(-REACH[1], REACH[1] + TURN / 2, TURN) + shift
    for _ in range(2):  # coarse, fine
        parts = np.stack([_turned(wide, pose, intrinsics, heading) for heading in headings])
        like = correlation_table(to_unit(small[None]), to_unit(parts))[0]
        best = int(like.argmax())
        centre = headings[best]
        headings = centre + np.arange(-TURN + FINE_TURN, TURN, FINE_TURN)
    return float(like[best]), float(centre)


def _turned(wide: np.ndarray, pose: np.ndarray, intrinsics, heading: float) -> np.ndarray:
    """What a camera turned by `heading` degrees about the vertical sees of a wide picture."""
    height, width = SMALL
    cx, cy = intrinsics[2:]
    own = _lens(intrinsics, height, width)
    source = own.copy()
    source[:2, 2] = cx * wide.shape[1] - 0.5, cy * wide.shape[0] - 0.5
    turn = pose[:3, :3].T @ rotation(heading, 0) @ pose[:3, :3]
    return _warp(wide, source @ turn @ np.linalg.inv(own), (width, height))


def _rotation_homography(
    views: RememberedViews, number: int, pose: np.ndarray, height: int, width: int
) -> np.ndarray:
    """From pixels of a camera at `pose` to those of the remembered frame, as if all were far."""
    lens = _lens(views.intrinsics, height, width)
    turn = views.c2w[number][:3, :3].T @ pose[:3, :3]
    return lens @ turn @ np.linalg.inv(lens)


def _lens(intrinsics, height: int, width: int) -> np.ndarray:
    """From camera space to pixels, whose centres have whole numbers, [3, 3]."""
    fx, fy, cx, cy = intrinsics
    return np.array(
        [[fx * width, 0, cx * width - 0.5], [0, fy * height, cy * height - 0.5], [0, 0, 1]]
    )


def _warp(
    frame: np.ndarray, homography: np.ndarray, size: tuple[int, int] | None = None
) -> np.ndarray:
    """The frame under the inverse of a homography; size: width and height, None = the frame's."""
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = size or frame.shape[1::-1]
    return cv2.warpPerspective(
        frame, homography, size, flags=flags, borderMode=cv2.BORDER_REPLICATE
    )

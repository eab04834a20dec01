"""Properties of a world that follow from its folder of clips: captions, frame rate, lens, motion,
start images.
"""

from collections import Counter
from functools import cached_property

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from distill.data.clips import LATENTS, POSES, VIDEO, list_clips, read_meta
from distill.data.importers.worldplay import read_frames
from distill.metrics import sharpness, to_unit
from worldmodel.camera import read_pose_json, relative_to_first, rotation
from worldmodel.controls import AXES, Envelope
from worldmodel.errors import UserError
from worldmodel.images import fit_picture

CANDIDATES = 4  # first frames compared for each start image; the sharpest is taken
MOST_CAPTIONS = 12  # captions with start images, the most frequent ones
# percentile of the motion per latent that a player may make; larger motions are falls, doors and
# errors
COMMON = 99
# share of the fastest axis below which a movement is a by-product of another one
LEAST_MOVE = 0.05
LEAST_TURN = 0.2  # degrees per latent, likewise
MOST_ROLL = 1.0  # degrees of roll above which the camera is not a walker's


class Footage:
    """The clips under `root` that have poses. Raises UserError when there are none, or a clip is
    broken.
    """

    def __init__(self, root):
        self.folders = [folder for folder in list_clips(root) if (folder / POSES).is_file()]
        if not self.folders:
            raise UserError(f"{root}: expected clips with {POSES}, found none")
        self.root = root
        self._metas = [read_meta(folder) for folder in self.folders]

    @property
    def of_blocks(self) -> bool:
        """Whether all clips show the town of blocks, which can be rendered at any pose."""
        return all(meta["source"].startswith("blocks:") for meta in self._metas)

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """The distinct captions, the most frequent first."""
        counts = Counter(meta["caption"] for meta in self._metas)
        return tuple(sorted(counts, key=lambda caption: (-counts[caption], caption)))

    @property
    def title(self) -> str:
        """A line for menus."""
        kinds = sorted(
            {meta["source"].partition(":")[0] or "an unnamed source" for meta in self._metas}
        )
        return f"Learned from {len(self.folders)} clips of {', '.join(kinds)}"

    @property
    def licence(self) -> str:
        return (
            "; ".join(sorted({meta["licence"] for meta in self._metas if meta["licence"]}))
            or "unknown"
        )

    @property
    def fps(self) -> float:
        """Video frames per second. Raises UserError where clips differ."""
        rates = sorted({float(meta["fps"]) for meta in self._metas})
        if len(rates) > 1:
            raise UserError(
                f"{self.root}: expected clips of one frame rate, got {rates[0]:g} to "
                f"{rates[-1]:g}; choose one with --fps"
            )
        return rates[0]

    @cached_property
    def cameras(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """c2w [F, 4, 4] and intrinsics [4] of every clip."""
        cameras = (
            read_pose_json(folder / POSES)
            for folder in tqdm(self.folders, "poses", unit="clip", leave=False)
        )
        return [(c2w, intrinsics[0]) for c2w, intrinsics in cameras]

    @property
    def intrinsics(self) -> tuple[float, ...]:
        """fx/W, fy/H, cx/W, cy/H: the median of the clips."""
        return tuple(np.median([intrinsics for _, intrinsics in self.cameras], axis=0).tolist())

    def size(self, factor: int) -> tuple[int, int]:
        """Height and width in pixels; `factor`: pixels of a latent cell's side, for footage without
        videos.
        """
        folder = self.folders[0]
        if (folder / VIDEO).is_file():
            return read_frames(folder / VIDEO, 1)[0].shape[1:3]
        try:
            with safe_open(folder / LATENTS, framework="pt") as file:
                rows, columns = file.get_slice("latents").get_shape()[2:]
        except (OSError, SafetensorError, ValueError):
            raise UserError(
                f"{folder}: expected {VIDEO} or {LATENTS}, which determine the picture size; add "
                "one, or give --height and --width"
            ) from None
        return rows * factor, columns * factor

    @property
    def envelope(self) -> Envelope:
        """The usual motion per latent; an axis that hardly moves is locked. With roll the style is
        "fly".
        """
        poses = [c2w for c2w, _ in self.cameras]
        roll = np.concatenate([np.abs(_degrees(c2w[:, 1, 0])) for c2w in poses])
        style = "walk" if np.percentile(roll, COMMON) < MOST_ROLL else "fly"
        steps = np.abs(np.concatenate([motions(c2w, style) for c2w in poses]))
        most = np.percentile(steps, COMMON, axis=0) if len(steps) else np.zeros(len(AXES))
        most[:3][most[:3] < LEAST_MOVE * most[:3].max()] = 0.0
        most[3:][most[3:] < LEAST_TURN] = 0.0
        levelled = poses if style == "walk" else [relative_to_first(c2w) for c2w in poses]
        tilt = np.percentile(
            np.concatenate([np.abs(_degrees(c2w[:, 1, 2])) for c2w in levelled]), COMMON
        )
        known = dict(zip(AXES, (float(f"{value:.3g}") for value in most), strict=True))
        return Envelope(
            **known,
            pitch_limit=min(90.0, max(1.0, float(f"{tilt:.3g}"))),
            smoothing=0.5,
            style=style,
        )

    def pictures(self, height: int, width: int, count: int) -> dict[str, list[np.ndarray]]:
        """First frames uint8 [height, width, 3] by caption, at most `count` each: sharp ones, and
        level ones, since play begins level.
        """
        level = sorted(
            range(len(self.folders)), key=lambda number: abs(self.cameras[number][0][0, 1, 2])
        )
        images = {}
        for caption in tqdm(self.captions[:MOST_CAPTIONS], "start images", unit="caption"):
            clips = [
                self.folders[number]
                for number in level
                if self._metas[number]["caption"] == caption
            ]
            videos = [folder / VIDEO for folder in clips if (folder / VIDEO).is_file()][
                : CANDIDATES * count
            ]
            views = [fit_picture(read_frames(video, 1)[0][0], height, width) for video in videos]
            if views:
                order = np.argsort(
                    [-sharpness(to_unit(view[None])).item() for view in views], kind="stable"
                )
                images[caption] = [views[number] for number in order[:count]]
        return images


def motions(c2w: np.ndarray, style: str) -> np.ndarray:
    """c2w [F, 4, 4] -> the motion from each latent to the next, [F-1, 5] in the order of AXES
    (units, degrees).

    walk: along the heading on the ground and about the vertical; fly: along and about the camera's
    own axes. Movement is measured half-way through the turn, so that a curve does not count as
    strafing.
    """
    if style == "walk":
        right = c2w[:, :3, 0]
        frames = np.stack(
            [rotation(heading, 0) for heading in np.rad2deg(np.arctan2(-right[:, 2], right[:, 0]))]
        )
    else:
        frames = c2w[:, :3, :3]
    turns = np.swapaxes(frames[:-1], 1, 2) @ frames[1:]
    yaw = np.rad2deg(np.arctan2(turns[:, 0, 2], turns[:, 2, 2]))
    pitch = np.diff(-_degrees(c2w[:, 1, 2])) if style == "walk" else -_degrees(turns[:, 1, 2])
    moved = np.diff(c2w[:, :3, 3], axis=0)[:, None]
    x, y, z = ((moved @ frames[:-1] + moved @ frames[1:]) / 2)[:, 0].T
    return np.stack([z, x, -y, yaw, pitch], axis=1)


def _degrees(sine: np.ndarray) -> np.ndarray:
    return np.rad2deg(np.arcsin(np.clip(sine, -1, 1)))

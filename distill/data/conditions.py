"""`python -m distill condition`: what other clips of a place show of every clip, as the condition
of the stage `places`.
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from distill.data.clips import (
    CONDITION,
    LATENTS,
    POSES,
    list_clips,
    read_clip,
    read_depth,
    write_condition,
)
from distill.data.encode import encoder_fingerprint
from distill.data.encoders import check_encoders
from worldmodel.camera import FRAMES_PER_LATENT, read_pose_json
from worldmodel.cli import print_line
from worldmodel.errors import UserError
from worldmodel.models.wan_autoencoder import Autoencoder
from worldmodel.reprojection import ConditionStream, RememberedViews
from worldmodel.worlds.weights import open_autoencoder

logger = logging.getLogger(__name__)

# What counts as one step between two cameras: units, radians of heading, radians of pitch.
REACH = (0.4, 0.5, 0.35)


@dataclass(frozen=True)
class PlaceFootage:
    """The frames at the latents of all clips of a place, as views, and the clip of each."""

    views: RememberedViews
    clip: np.ndarray  # int [N]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `condition`."""
    parser.add_argument("--clips", type=Path, required=True, help="folder of clips with depth")
    parser.add_argument(
        "--autoencoder", type=Path, required=True, help="folder of a trained autoencoder"
    )
    parser.add_argument(
        "--views", type=int, default=1500, help="frames that are remembered (default: 1500)"
    )
    parser.add_argument(
        "--count", type=int, default=8, help="of which a latent is made (default: 8)"
    )
    parser.add_argument(
        "--worker", type=int, default=0, help="number of this worker, from 0 (default: 0)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="how many workers share the clips (default: 1)"
    )


def run(args: argparse.Namespace) -> None:
    """Write `condition.safetensors` into every clip's folder that lacks it."""
    autoencoder = open_autoencoder(args.autoencoder, "cpu").requires_grad_(False)
    folders = list_clips(args.clips)
    encoder = encoder_fingerprint(autoencoder)
    files = [folder / name for folder in folders for name in (LATENTS, CONDITION)]
    check_encoders(args.clips, files, encoder)
    footage = read_footage(folders)
    footage = chosen(footage, spread(footage.views.c2w, args.views))
    made = 0
    for number in tqdm(range(args.worker, len(folders), args.workers), "condition", unit="clip"):
        if not (folders[number] / CONDITION).exists():
            made += 1
            condition = condition_of(folders[number], footage, number, autoencoder, args.count)
            write_condition(folders[number], condition, encoder)
    print_line(f"{made} of {len(folders)} conditions written")


@torch.no_grad()
def condition_of(
    folder: Path, footage: PlaceFootage, number: int, autoencoder: Autoencoder, count: int
) -> torch.Tensor:
    """The condition [4 + C, F, h, w] of clip `number`, made of other clips' views."""
    c2w, _ = read_pose_json(folder / POSES)
    stream = ConditionStream(footage.views, autoencoder, count, footage.clip == number)
    return torch.cat([stream.step(pose[None]) for pose in c2w], dim=2)[0]


def read_footage(folders: list[Path], size: tuple[int, int] = (96, 160)) -> PlaceFootage:
    """The views of all clips, pictures and depth reduced to `size`."""
    pictures = []
    depths = []
    poses = []
    numbers = []
    intrinsics = None
    for number, folder in enumerate(tqdm(folders, "views", unit="clip")):
        clip = read_clip(folder)
        frames = clip.frames[::FRAMES_PER_LATENT]
        pictures += [cv2.resize(f, size[::-1], interpolation=cv2.INTER_AREA) for f in frames]
        depth = read_depth(folder)
        _check_size(folder, tuple(depth.shape[1:]), size)
        step = depth.shape[1] // size[0]
        depths.append(depth[:, step // 2 :: step, step // 2 :: step])
        poses.append(clip.c2w)
        numbers += [number] * len(frames)
        if intrinsics is not None and np.abs(clip.intrinsics - intrinsics).max() > 1e-6:
            raise UserError(f"{folder}: expected clips of one lens, got {clip.intrinsics}")
        intrinsics = clip.intrinsics
    views = RememberedViews(
        torch.from_numpy(np.stack(pictures)),
        torch.cat(depths),
        np.concatenate(poses),
        tuple(float(x) for x in intrinsics),
    )
    return PlaceFootage(views, np.array(numbers))


def _check_size(folder: Path, found: tuple[int, int], size: tuple[int, int]) -> None:
    """UserError for pictures that cannot be reduced to `size` by a whole number."""
    step = found[0] // size[0]
    if step < 1 or found != (step * size[0], step * size[1]):
        raise UserError(
            f"{folder}: expected pictures of {size[0]}x{size[1]} pixels, as the autoencoder reads "
            f"them, or a multiple, got {found[0]}x{found[1]}; collect the clips at that size"
        )


def chosen(footage: PlaceFootage, numbers: np.ndarray) -> PlaceFootage:
    """Some of the views."""
    views = footage.views
    return PlaceFootage(
        RememberedViews(
            views.pictures[numbers], views.depth[numbers], views.c2w[numbers], views.intrinsics
        ),
        footage.clip[numbers],
    )


def spread(c2w: np.ndarray, count: int) -> np.ndarray:
    """Numbers of `count` poses of [N, 4, 4] that lie farthest apart: each next one is the farthest
    from all before (in units of REACH), the first is number 0.
    """
    ahead = c2w[:, :3, 2]
    flat = ahead[:, [0, 2]] / np.linalg.norm(ahead[:, [0, 2]], axis=1, keepdims=True)
    pitch = np.arcsin(np.clip(ahead[:, 1:2], -1, 1))
    features = np.concatenate([c2w[:, :3, 3] / REACH[0], flat / REACH[1], pitch / REACH[2]], axis=1)
    numbers = [0]
    distance = np.linalg.norm(features - features[0], axis=1)
    while len(numbers) < min(count, len(c2w)):
        numbers.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(features - features[numbers[-1]], axis=1))
    return np.array(numbers)

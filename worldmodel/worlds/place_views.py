"""What a bundle remembers of a place: frames with depth, in one file of its folder."""

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from worldmodel.camera import check_poses
from worldmodel.errors import UserError
from worldmodel.files import replacing_file
from worldmodel.reprojection import NEAR, SKY, RememberedViews

VIEWS = "views.safetensors"
LEVELS = 4095  # of the logarithm of depth between NEAR and SKY: steps of 0.25 %
_TENSORS = ("pictures", "picture_sizes", "depth", "depth_sizes", "c2w", "intrinsics")


def write_views(folder, views: RememberedViews) -> Path:
    """Write `views.safetensors`: pictures as lossless WebP, depth as PNG of `LEVELS` levels."""
    path = Path(folder) / VIEWS
    pictures = [
        cv2.imencode(".webp", p[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, 101])[1].ravel()
        for p in views.pictures.numpy()
    ]
    depths = [
        cv2.imencode(".png", _levels(d), [cv2.IMWRITE_PNG_COMPRESSION, 9])[1].ravel()
        for d in views.depth.float()
    ]
    tensors = {
        "pictures": torch.from_numpy(np.concatenate(pictures)),
        "picture_sizes": torch.tensor([len(p) for p in pictures]),
        "depth": torch.from_numpy(np.concatenate(depths)),
        "depth_sizes": torch.tensor([len(d) for d in depths]),
        "c2w": torch.from_numpy(np.ascontiguousarray(views.c2w)),
        "intrinsics": torch.tensor(views.intrinsics, dtype=torch.float64),
    }
    with replacing_file(path) as temporary:
        save_file(tensors, temporary)
    return path


def read_views(folder) -> RememberedViews:
    """Read `views.safetensors`. Raises UserError when it is missing, cut off or damaged."""
    path = Path(folder) / VIEWS
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        pictures = list(_decoded(tensors["pictures"], tensors["picture_sizes"], cv2.IMREAD_COLOR))
        depths = list(_decoded(tensors["depth"], tensors["depth_sizes"], cv2.IMREAD_UNCHANGED))
        c2w = check_poses(tensors["c2w"].numpy(), len(pictures), str(path))
        shapes = {p.shape[:2] for p in pictures} | {d.shape for d in depths}
        if len(depths) != len(pictures) or len(shapes) != 1:
            raise ValueError("pictures and depth do not belong together")
        return RememberedViews(
            torch.from_numpy(np.stack(pictures)[..., ::-1].copy()),
            torch.from_numpy(_depth(np.stack(depths))),
            c2w,
            tuple(tensors["intrinsics"].tolist()),
        )
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{path} is not a complete file of remembered frames ({error}); fetch the place again."
        ) from None


def _decoded(data: Tensor, sizes: Tensor, flag: int) -> Iterable[np.ndarray]:
    if int(sizes.sum()) != len(data):
        raise ValueError(f"{len(data)} bytes of pictures, {int(sizes.sum())} expected")
    for part in data.split(sizes.tolist()):
        picture = cv2.imdecode(part.numpy(), flag)
        if picture is None:
            raise ValueError("a picture cannot be decoded")
        yield picture


def _levels(depth: Tensor) -> np.ndarray:
    share = (depth.clamp(NEAR, SKY) / NEAR).log() / np.log(SKY / NEAR)
    return (share * LEVELS).round().numpy().astype(np.uint16)


def _depth(levels: np.ndarray) -> np.ndarray:
    depth = NEAR * np.exp(levels.astype(np.float32) / LEVELS * np.float32(np.log(SKY / NEAR)))
    return depth.astype(np.float16)

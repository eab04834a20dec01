"""Which pixels of a true frame an earlier frame showed: nothing can know the others."""

import numpy as np
import torch
from torch import Tensor

from distill.data.blocks.renderer import FAR
from worldmodel.camera import invert
from worldmodel.reprojection import NEAR

WITHIN = 0.02  # of the depth: a point this much behind the surface of an earlier frame is hidden
EARLIER = 120  # frames of a walk that are looked at, evenly spread


def knowable(
    depth: np.ndarray,
    pose: np.ndarray,
    intrinsics,
    earlier: np.ndarray,
    earlier_depth: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels of a frame are knowable, and which are solid; bool [H, W] each.

    A solid pixel is knowable if its point in the world projects into an earlier frame and is not
    hidden there, within 2 % of the depth. The sky is not solid.

    Args:
        depth: [H, W], units along z. pose: c2w [4, 4].
        intrinsics: fx/W, fy/H, cx/W, cy/H of all frames.
        earlier: c2w [N, 4, 4]. earlier_depth: [N, h, w].
    """
    solid = depth < 0.5 * FAR
    points = torch.from_numpy(_points(depth, intrinsics)[solid])
    known = torch.zeros(len(points), dtype=torch.bool)
    relative = torch.from_numpy(invert(earlier) @ pose)
    for motion, surface in zip(relative, torch.from_numpy(earlier_depth).float(), strict=True):
        left = (~known).nonzero().squeeze(1)
        if not len(left):
            break
        known[left] = _visible(points[left], motion, surface, intrinsics)
    mask = np.zeros(depth.shape, bool)
    mask[solid] = known.numpy()
    return mask, solid


def earlier_latents(latent: int) -> np.ndarray:
    """Numbers of the latents before `latent` that stand for its past, at most `EARLIER`."""
    return np.unique(np.linspace(0, latent - 1, min(latent, EARLIER)).round().astype(int))


def _points(depth: np.ndarray, intrinsics) -> np.ndarray:
    """Points of the pixels in camera coordinates, float64 [H, W, 3]."""
    height, width = depth.shape
    fx, fy, cx, cy = intrinsics
    v = ((np.arange(height) + 0.5) / height - cy) / fy
    u = ((np.arange(width) + 0.5) / width - cx) / fx
    x, y = np.meshgrid(u, v)
    return np.stack([x, y, np.ones_like(x)], -1) * depth[..., None].astype(np.float64)


def _visible(points: Tensor, motion: Tensor, surface: Tensor, intrinsics) -> Tensor:
    """Which points [M, 3] a camera sees, given `motion` [4, 4] into its coordinates and its depth
    [h, w]; bool [M].
    """
    height, width = surface.shape
    fx, fy, cx, cy = intrinsics
    x, y, z = (points @ motion[:3, :3].T + motion[:3, 3]).unbind(1)
    scale = 1 / z.clamp(min=NEAR)
    column = ((x * scale * fx + cx) * width).floor()
    row = ((y * scale * fy + cy) * height).floor()
    inside = (z > NEAR) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    there = surface[row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long()]
    return inside & (z <= (1 + WITHIN) * there)

"""PRoPE: cameras as relative positions inside attention.

Every group of four neighbouring features is multiplied by a 4x4 matrix of its frame's camera, `P = lift(K) @ w2c`:
`q' = P^T q`, `k' = P^-1 k`, `v' = P^-1 v`, and the attention's result `o = P o'`. A score is then `q^T P_i P_j^-1 k`: it depends on how
camera j looks from camera i and on nothing else, so any common change of the world's frame cancels.
Source: PRoPE (arXiv 2507.10496) as in minWM `wan/modules/prope.py`; the principal point is dropped, as the released checkpoints do.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CameraMatrices:
    """What attention multiplies with, one 4x4 matrix a frame, `[B, F, 4, 4]`: for queries P^T, keys and values P^-1, results P."""

    query: Tensor
    key: Tensor
    result: Tensor


def projection(viewmats: Tensor, intrinsics: Tensor) -> Tensor:
    """`P = lift(diag(fx, fy, 1)) @ w2c`.

    `viewmats` `[..., 4, 4]` are w2c (OpenCV axes), `intrinsics` `[..., 4]` normalised (fx/W, fy/H, cx/W, cy/H), broadcast against them.
    Returns `[..., 4, 4]` in the type of `viewmats`. Differs: cx and cy are ignored, as in the reference.
    """
    focal = torch.ones(*intrinsics.shape[:-1], 4, dtype=viewmats.dtype, device=viewmats.device)
    focal[..., :2] = intrinsics[..., :2].to(viewmats.dtype)
    return focal[..., :, None] * viewmats


def camera_matrices(projections: Tensor, dtype: torch.dtype) -> CameraMatrices:
    """Inverts projections `[B, F, 4, 4]` once for a whole forward pass; computed in their own type, returned in `dtype`."""
    inverse = torch.linalg.inv_ex(projections).inverse
    return CameraMatrices(projections.transpose(-1, -2).to(dtype), inverse.to(dtype), projections.to(dtype))


def apply(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiplies every group of four features of `x` `[..., F, N, width]` (N tokens a frame) by its frame's `matrix` `[..., F, 4, 4]`."""
    groups = x.unflatten(-1, (-1, 4)).flatten(-3, -2)
    return (groups @ matrix.transpose(-1, -2)).reshape(x.shape)

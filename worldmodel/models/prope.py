"""PRoPE: cameras as relative positions inside attention.

Every group of four neighbouring features is multiplied by a 4x4 matrix of its frame's camera, `P =
lift(K) @ w2c`: `q' = P^T q`, `k' = P^-1 k`, `v' = P^-1 v`, and the attention's result `o = P o'`. A
score is then `q^T P_i P_j^-1 k`: it depends on how camera j looks from camera i and on nothing
else, so any common change of the world's frame cancels.
Source: PRoPE (arXiv 2507.10496) as in minWM `wan/modules/prope.py`; the principal point is dropped,
as the released checkpoints do.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CameraMatrices:
    """What attention multiplies with, one matrix a frame, `[B, F, m, m]`: for queries P^T, keys and
    values P^-1, results P.
    """

    query: Tensor
    key: Tensor
    result: Tensor


def projmats(viewmats: Tensor, intrinsics: Tensor) -> Tensor:
    """`P = lift(diag(fx, fy, 1)) @ w2c`.

    `viewmats` `[..., 4, 4]` are w2c (OpenCV axes), `intrinsics` `[..., 4]` normalised (fx/W, fy/H,
    cx/W, cy/H), broadcast against them.
    Returns `[..., 4, 4]` in the type of `viewmats`. Differs: cx and cy are ignored, as in the
    reference.
    """
    focal = torch.ones(*intrinsics.shape[:-1], 4, dtype=viewmats.dtype, device=viewmats.device)
    focal[..., :2] = intrinsics[..., :2].to(viewmats.dtype)
    return focal[..., :, None] * viewmats


def camera_matrices(
    projmats: Tensor, dtype: torch.dtype, width: int = 4, device: torch.device | None = None
) -> CameraMatrices:
    """Inverts `projmats` `[B, F, 4, 4]` once for a whole forward pass; computed in their own type
    where they are, returned in `dtype` on `device` (None: there).

    For features of `width` channels the matrices come several times along a diagonal, up to 64x64:
    the product is the same, and processors that multiply tiles do it several times faster than many
    products with 4x4.
    """
    inverse = torch.linalg.inv_ex(projmats).inverse
    times = math.gcd(width, 64) // 4
    matrices = projmats.transpose(-1, -2), inverse, projmats
    return CameraMatrices(
        *(_repeat(matrix, times).to(device=device, dtype=dtype) for matrix in matrices)
    )


def _repeat(matrix: Tensor, times: int) -> Tensor:
    """`[..., 4, 4]` -> `[..., 4 times, 4 times]`, zero off the diagonal blocks."""
    places = torch.eye(times, dtype=matrix.dtype, device=matrix.device)
    return (places[:, None, :, None] * matrix[..., None, :, None, :]).flatten(-2).flatten(-3, -2)


def apply(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiplies every group of m neighbouring features of `x` `[..., F, N, width]` (N tokens a
    frame) by its frame's `matrix` `[..., F, m, m]`, m = 4 or what `camera_matrices` made of it.
    """
    groups = x.unflatten(-1, (-1, matrix.shape[-1])).flatten(-3, -2)
    return (groups @ matrix.transpose(-1, -2)).reshape(x.shape)

"""Wan's rotary position embedding over three axes: latent frame, row, column of the token grid.

Neighbouring features (2j, 2j + 1) form a complex number that is turned by position times frequency;
the head's width is divided into a band for the frame axis and two for rows and columns. Source:
Wan2.1 `rope_apply`, Causal-Forcing `causal_rope_apply`.
"""

import torch
from torch import Tensor

from worldmodel.errors import UserError

THETA = 10000.0


def band_widths(head_dim: int) -> tuple[int, int, int]:
    """Features a head gives to (frame, row, column); they sum to `head_dim`, which must be even."""
    if head_dim % 2:
        raise UserError(
            f"a head's width must be even for rotary embedding, got {head_dim}: choose another "
            "attention_head_dim"
        )
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


def rope_table(frames: Tensor, rows: int, columns: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for the tokens of some latent frames.

    `frames` `[F]` holds frame positions (any numbers; only differences matter to attention).
    Returns two float32 tensors
    `[F, rows * columns, head_dim]`: cos, and sin with the sign of `rotate` folded in. Angles are
    computed in float64 (see `float64_device`).
    """
    device = frames.device
    bands = zip(
        band_widths(head_dim),
        (frames, torch.arange(rows, device=device), torch.arange(columns, device=device)),
        strict=True,
    )
    shapes = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))
    angles = []
    for (width, positions), shape in zip(bands, shapes, strict=True):
        frequency = THETA ** (
            -torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
        )
        angle = positions.to(torch.float64)[:, None] * frequency
        angles.append(
            angle.reshape(*shape, width // 2).expand(len(frames), rows, columns, width // 2)
        )
    angle = torch.cat(angles, dim=-1).flatten(1, 2)
    cos = angle.cos().repeat_interleave(2, dim=-1).float()
    sin = torch.stack([-angle.sin(), angle.sin()], dim=-1).flatten(-2).float()
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns features `[..., head_dim]` by a table of `rope_table` that broadcasts against them."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)

"""Causal consistency distillation: neighbouring points of the teacher's trajectory must lead to the
same clean latents.

Source: stage 2 of Causal Forcing++ (arXiv 2605.15141) as in minWM
`model/camera_naive_consistency.py`. Differs: time steps and their differences stay float32 (the
reference rounds both to bfloat16, which changes single teacher steps by up to 64 %); every chunk
draws its own pair, where the reference draws one for the whole batch; the pairs reach down to sigma
0, where the average returns its input, so that the chain is anchored; `x0` is computed with the
exact sigma unless `lookup` is "grid".
"""

import torch
from torch import Tensor

from distill.objectives.flow_matching import Predict, draw_index
from worldmodel.schedule import nearest_grid_sigma, over_latents, sigma_grid, to_x0


def draw_pair(
    batch: int, frames: int, chunk: int, count: int, shift: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Neighbouring noise levels (sigma, next lower one), `[B, F]` each, of a grid of `count` points
    followed by 0.
    """
    index = draw_index(batch, frames, chunk, count, generator)
    grid = torch.cat([sigma_grid(count, shift), torch.zeros(1)]).to(index.device)
    return grid[index], grid[index + 1]


@torch.no_grad()
def teacher_step(
    conditional: Predict,
    unconditional: Predict | None,
    x: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    guidance: float,
) -> Tensor:
    """One Euler step of the guided teacher: `x - (sigma - sigma_next) v` with `v = u + guidance (c
    - u)`.

    `x` `[B, C, F, H, W]`, sigmas `[B, F]`. `unconditional` may be None when `guidance` is 1.
    """
    velocity = conditional(x, sigma)
    if guidance != 1.0:
        base = unconditional(x, sigma)
        velocity = base + guidance * (velocity - base)
    return x - over_latents(sigma - sigma_next, x) * velocity.float()


def consistency_loss(
    student: Predict,
    average: Predict,
    x: Tensor,
    sigma: Tensor,
    x_next: Tensor,
    sigma_next: Tensor,
    *,
    lookup: str,
    shift: float,
) -> Tensor:
    """`mean (G(x, sigma) - stopgrad G_average(x_next, sigma_next))^2` with `G = x - sigma v`.

    Latents `[B, C, F, H, W]`, sigmas `[B, F]`; `lookup` and `shift` as in `predict_x0`.
    """
    with torch.no_grad():
        target = predict_x0(average, x_next, sigma_next, lookup, shift)
    return (predict_x0(student, x, sigma, lookup, shift) - target).square().mean()


def predict_x0(predict: Predict, x: Tensor, sigma: Tensor, lookup: str, shift: float) -> Tensor:
    """Clean latents that a velocity network predicts from `x` `[B, C, F, H, W]` at sigma `[B, F]`.

    `lookup` "exact" computes them with sigma itself, "grid" with the nearest of the 1000 sigmas of
    the grid with this shift, as the reference does.
    """
    used = nearest_grid_sigma(sigma, shift) if lookup == "grid" else sigma
    return to_x0(x, predict(x, sigma).float(), used)

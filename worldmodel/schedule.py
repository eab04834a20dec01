"""Noise levels of rectified flow and the conversions between noise, data and velocity.

Everywhere `sigma` is the noise level in [0, 1] (1 = pure noise), `x_sigma = (1 - sigma) x0 + sigma
eps` and the velocity is `v = eps - x0`. Sigmas are float32 whatever the model computes in: rounded
to bfloat16, single teacher steps become wrong by up to 64 % (minWM
`model/camera_naive_consistency.py`). Latents are `[B, C, F, H, W]`; a sigma is a scalar, `[B]` or
`[B, F]`.
"""

import math

import torch
from torch import Tensor

from worldmodel.errors import UserError

CLOCK = 1000.0  # the network's clock runs from 0 to 1000; only this room and the network know


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Moves noise levels (any shape, in [0, 1]) towards 1: `s sigma / (1 + (s - 1) sigma)`, Wan's
    and SD3's time shift.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_grid(count: int, shift: float) -> Tensor:
    """`[count]` float32, from 1 down to just above 0: the shifted grid of minWM's
    FlowMatchScheduler(extra_one_step=True).
    """
    return shift_sigma(torch.linspace(1.0, 0.0, count + 1)[:-1], shift)


def warp_steps(steps: list[float] | tuple[float, ...], shift: float) -> Tensor:
    """Turns a published step list such as (1000, 750, 500, 250) into shifted sigmas `[n]`,
    float32.
    """
    if not 0 < shift < math.inf:
        raise UserError(f"shift must be above 0, got {shift}: 5 is usual")
    if (
        not steps
        or any(not 0 < step <= CLOCK for step in steps)
        or list(steps) != sorted(set(steps), reverse=True)
    ):
        raise UserError(
            f"steps must fall from at most 1000 to above 0, got {list(steps)}: write them like "
            "[1000, 500]"
        )
    grid = torch.cat(
        [sigma_grid(1000, shift) * CLOCK, torch.zeros(1)]
    )  # rounded as the references' table is
    exact = shift_sigma(torch.tensor(steps, dtype=torch.float64) / CLOCK, shift).float()
    return torch.stack(
        [
            grid[1000 - int(step)] / CLOCK if step == int(step) else sigma
            for step, sigma in zip(steps, exact, strict=True)
        ]
    )


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """`(1 - sigma) x0 + sigma noise` for latents `[B, C, F, H, W]`."""
    sigma = over_latents(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def to_x0(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Clean latents from noisy ones and their velocity: `x - sigma v`."""
    return x - over_latents(sigma, x) * velocity


def nearest_grid_sigma(sigma: Tensor, shift: float) -> Tensor:
    """The nearest point of the 1000-step grid, which never reaches 0 (0 becomes 0.00498 at shift
    5).

    The reference reads every sigma through this table. We use exact sigmas and keep this for parity
    alone.
    """
    grid = sigma_grid(1000, shift).to(sigma.device)
    index = (grid.mul(CLOCK) - sigma.float().reshape(-1, 1).mul(CLOCK)).abs().argmin(dim=1)
    return grid[index].reshape(sigma.shape)


def training_weight(sigma: Tensor, shift: float) -> Tensor:
    """Weight of the flow-matching loss, largest in the middle: a Gaussian of the grid's clock,
    scaled to mean 1 over the 1000-step grid.

    Source: minWM `wan_utils/scheduler.py` (`training_weight`). Same shape as sigma.
    """
    clock = sigma_grid(1000, shift).to(sigma.device) * CLOCK
    bell = torch.exp(-2 * ((clock - CLOCK / 2) / CLOCK) ** 2)
    weights = bell - bell.min()
    weights = weights * (1000 / weights.sum())
    index = (clock - sigma.float().reshape(-1, 1) * CLOCK).abs().argmin(dim=1)
    return weights[index].reshape(sigma.shape)


def over_latents(sigma: Tensor, latents: Tensor) -> Tensor:
    """Reshapes a sigma (scalar, `[B]` or `[B, F]`) so that it broadcasts over `[B, C, F, H, W]`."""
    if sigma.ndim == 0:
        return sigma
    if sigma.ndim == 1:
        return sigma[:, None, None, None, None]
    if sigma.ndim == 2 and latents.ndim == 5:
        return sigma[:, None, :, None, None]
    raise ValueError(
        "sigma must be a scalar, [B] or [B, F] for latents [B, C, F, H, W], got "
        f"{tuple(sigma.shape)}: reshape it"
    )

"""Flow matching: the network learns the velocity from data to noise at a random noise level.

Source: stages 0 and 1 of Causal Forcing, minWM `model/camera_bidirectional_diffusion.py` and
`model/camera_diffusion.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from worldmodel.schedule import add_noise, sigma_grid

GRID = 1000  # noise levels that training draws from

# noisy latents [B, C, F, H, W], sigma [B, F] -> velocity [B, C, F, H, W]
Predict = Callable[[Tensor, Tensor], Tensor]


def draw_index(
    batch: int, frames: int, chunk: int, count: int, generator: torch.Generator
) -> Tensor:
    """Uniform integers `[B, F]` in [0, count), one per chunk (chunk = frames: one per clip), on the
    generator's device.
    """
    index = torch.randint(
        count, (batch, frames // chunk), generator=generator, device=generator.device
    )
    return index.repeat_interleave(chunk, dim=1)


def grid_sigma(index: Tensor, shift: float, count: int = GRID) -> Tensor:
    """Noise level of each grid index, float32, same shape. The shift makes uniform indices dense
    near 1.
    """
    return sigma_grid(count, shift).to(index.device)[index]


def flow_matching_error(predict: Predict, latents: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """`(v(x_sigma, sigma) - (noise - x0))^2` of every frame, `[B, F]`.

    `latents` and `noise` `[B, C, F, H, W]`, `sigma` `[B, F]` in (0, 1] float32.
    """
    velocity = predict(add_noise(latents, noise, sigma), sigma).float()
    return (velocity - (noise - latents)).square().mean(dim=(1, 3, 4))


def flow_matching_loss(
    predict: Predict, latents: Tensor, sigma: Tensor, noise: Tensor, weight: Tensor | None = None
) -> Tensor:
    """Mean of `weight` times `flow_matching_error`; `weight` `[B, F]` or None for 1."""
    error = flow_matching_error(predict, latents, sigma, noise)
    return error.mean() if weight is None else (weight * error).mean()

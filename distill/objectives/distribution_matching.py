"""Distribution matching distillation: move the student's samples to where the score of the data and
the score of the student's own distribution agree.

Source: stage 3 of Causal Forcing++ (DMD2 with self-forcing) as in minWM `model/dmd.py`. The fake
score learns by flow matching on the student's samples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.objectives.consistency import predict_x0
from distill.objectives.flow_matching import GRID, Predict
from worldmodel.schedule import add_noise, nearest_grid_sigma, shift_sigma


def ground_truth_loss(samples: Tensor, target: Tensor, scale: float) -> Tensor:
    """Half the mean square error of samples against the ground truth, both `[B, C, F, H, W]`.

    With `scale` above 0 a cell's square error e (mean over its channels) counts as `scale log(1 + e
    / scale)` (Cauchy's robust loss): cells near the truth are pulled to it, and cells that nobody
    can predict are not pulled to the grey mean of their possible contents.
    """
    error = (samples - target).square().mean(dim=1)
    return 0.5 * (scale * torch.log1p(error / scale) if scale else error).mean()


def low_pass_loss(samples: Tensor, target: Tensor) -> Tensor:
    """Half the mean square error of means over 2x2 latent cells, samples and target `[B, C, F, H,
    W]`.

    Its optimum is the expected layout of a frame. Everything inside the cells, above all edges, is
    left to the score.
    """
    error = (samples - target).flatten(1, 2)
    return 0.5 * F.avg_pool2d(error, 2, ceil_mode=True).square().mean()


def score_sigma(index: Tensor, shift: float, clamp: tuple[float, float]) -> Tensor:
    """Noise level at which the scores are compared, from uniform integers in [0, 1000): shifted and
    clamped, same shape.
    """
    return shift_sigma(index.float() / GRID, shift).clamp(*clamp)


def noised(samples: Tensor, noise: Tensor, sigma: Tensor, lookup: str, shift: float) -> Tensor:
    """Samples `[B, C, F, H, W]` at noise level sigma `[B, F]`, or ("grid") at the nearest of the
    1000 grid sigmas.
    """
    return add_noise(
        samples, noise, nearest_grid_sigma(sigma, shift) if lookup == "grid" else sigma
    )


@torch.no_grad()
def distribution_gradient(
    samples: Tensor,
    sigma: Tensor,
    noise: Tensor,
    *,
    fake: Predict,
    real: Predict,
    real_unconditional: Predict | None,
    guidance: float,
    lookup: str,
    shift: float,
) -> Tensor:
    """`(x0_fake - x0_real) / mean |x - x0_real|` at one noise level per sample.

    `samples` `[B, C, F, H, W]`, `sigma` `[B, F]`. The real score is guided `c + guidance (c - u)`:
    0 needs no `u`. `lookup` and `shift` as in `predict_x0`.
    """
    noisy = noised(samples, noise, sigma, lookup, shift)
    fake_x0 = predict_x0(fake, noisy, sigma, lookup, shift)
    real_x0 = predict_x0(real, noisy, sigma, lookup, shift)
    if guidance:
        real_x0 = real_x0 + guidance * (
            real_x0 - predict_x0(real_unconditional, noisy, sigma, lookup, shift)
        )
    scale = (samples - real_x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return torch.nan_to_num((fake_x0 - real_x0) / scale)


def distribution_loss(samples: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose derivative by the samples is `gradient` over the number of elements."""
    return 0.5 * (samples - (samples - gradient).detach()).square().mean()


def fake_score_loss(
    fake: Predict, samples: Tensor, sigma: Tensor, noise: Tensor, *, lookup: str, shift: float
) -> Tensor:
    """Flow matching of the fake score on the student's samples (no gradient into them)."""
    noisy = noised(samples.detach(), noise, sigma, lookup, shift)
    return (fake(noisy, sigma).float() - (noise - samples.detach())).square().mean()

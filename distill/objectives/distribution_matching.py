"""Distribution matching distillation: the student's rollouts move to where the data's score and
their own score agree.

Source: stage 3 of Causal Forcing++ (DMD2 with self-forcing) as in minWM `model/dmd.py`,
`pipeline/self_forcing_training.py`. The fake score is trained with `flow_matching_loss` on the
student's samples.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.objectives.consistency import predict_x0
from distill.objectives.flow_matching import GRID, Predict
from worldmodel.rollout import Rollout
from worldmodel.schedule import add_noise, nearest_grid_sigma, shift_sigma


@dataclass(frozen=True)
class RolloutDraws:
    """The chance in one self-rollout.

    `noise` `[B, C, F, H, W]` starts every chunk; `renoise` has one list a chunk, one tensor a step
    but the last.
    `first_exit` and `exit`: the step (0 = first) after which the first chunk and all later ones
    stop; gradients pass through it alone.
    """

    noise: Tensor
    exit: int
    first_exit: int
    renoise: list[list[Tensor]] | None = None  # None: drawn from the generator
    context: Tensor | None = (
        # [B, C, F, H, W], used where the rollout has a context_sigma; None: drawn from the
        # generator
        None
    )


def self_rollout(
    rollout: Rollout,
    viewmats: Tensor,
    intrinsics: Tensor,
    draws: RolloutDraws,
    *,
    grad: bool,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Lets the student dream chunk after chunk into its own cache, from wherever `rollout` stands.

    `viewmats` `[B, F, 4, 4]`, `intrinsics` `[B, F, 4]`: cameras of the new frames. Returns `[B, C,
    F, H, W]`; `grad` lets gradients through.
    """
    chunk = rollout.config.chunk
    samples = []
    for index, start in enumerate(range(0, viewmats.shape[1], chunk)):
        frames = slice(start, start + chunk)
        samples.append(
            rollout.step(
                viewmats[:, frames],
                intrinsics[:, frames],
                noise=draws.noise[:, :, frames],
                renoise=draws.renoise[index] if draws.renoise else None,
                generator=generator,
                exit_step=draws.first_exit if rollout.frames == 0 else draws.exit,
                grad=grad,
                context_noise=None if draws.context is None else draws.context[:, :, frames],
            )
        )
    return torch.cat(samples, dim=2)


def truth_loss(samples: Tensor, truth: Tensor, scale: float) -> Tensor:
    """Half the mean square distance of samples `[B, C, F, H, W]` from the truth; with `scale` above
    0 far-off cells hardly count.

    A cell's square error e (mean over its channels) counts as `scale log(1 + e / scale)` (Cauchy's
    robust loss): what is known is pulled to its place, and what nobody can know is not pulled to
    the grey mean of all that it might be.
    """
    error = (samples - truth).square().mean(dim=1)
    return 0.5 * (scale * torch.log1p(error / scale) if scale else error).mean()


def coarse_loss(samples: Tensor, truth: Tensor) -> Tensor:
    """Half the mean square distance of the means over 2x2 latent cells, samples and truth `[B, C,
    F, H, W]`.

    Its optimum is the expected layout of what a frame shows. What lies inside the cells, edges
    above all, is left to the score.
    """
    error = (samples - truth).flatten(1, 2)
    return 0.5 * F.avg_pool2d(error, 2, ceil_mode=True).square().mean()


def score_sigma(index: Tensor, shift: float, clamp: tuple[float, float]) -> Tensor:
    """Noise level at which samples are judged, from uniform integers in [0, 1000): shifted,
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
    """`(x0_fake - x0_real) / mean |x - x0_real|` at one noise level a sample.

    `samples` `[B, C, F, H, W]`, `sigma` `[B, F]`. The real score is guided `c + guidance (c - u)`:
    0 needs no `u`.
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


def critic_loss(
    fake: Predict, samples: Tensor, sigma: Tensor, noise: Tensor, *, lookup: str, shift: float
) -> Tensor:
    """Flow matching of the fake score on the student's samples (no gradient into them)."""
    noisy = noised(samples.detach(), noise, sigma, lookup, shift)
    return (fake(noisy, sigma).float() - (noise - samples.detach())).square().mean()

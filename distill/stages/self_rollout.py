"""Self-rollout: the student generates chunk after chunk from its own past, as in play.

Source: Self-Forcing as in minWM `pipeline/self_forcing_training.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from worldmodel.rollout import Rollout, TrainingStep


@dataclass(frozen=True)
class RolloutDraws:
    """The random draws of one self-rollout.

    noise: `[B, C, F, H, W]`, the start of every chunk.
    exit, first_exit: the denoising step (0 = first) after which all later chunks and the first
    chunk stop; gradients pass through that step alone.
    renoise: one list per chunk, of one tensor per step but the last; None = drawn from the
    generator.
    context: `[B, C, F, H, W]`, noise of the clean pass where `context_sigma` is above 0; None
    = drawn from the generator.
    """

    noise: Tensor
    exit: int
    first_exit: int
    renoise: list[list[Tensor]] | None = None
    context: Tensor | None = None


def self_rollout(
    rollout: Rollout,
    viewmats: Tensor,
    intrinsics: Tensor,
    draws: RolloutDraws,
    *,
    grad: bool,
    generator: torch.Generator | None = None,
    cache_gradient: str = "detached",
    context_sigma: float = 0.0,
) -> Tensor:
    """Generate chunk after chunk into the rollout's own cache, from its current frame on.

    `viewmats` `[B, F, 4, 4]`, `intrinsics` `[B, F, 4]`: cameras of the new frames. Returns `[B, C,
    F, H, W]`; `grad` lets gradients through; `cache_gradient` and `context_sigma` are those of
    `TrainingStep`.
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
                training=TrainingStep(
                    draws.exit if rollout.frames else draws.first_exit,
                    grad,
                    cache_gradient,
                    context_sigma,
                    None if draws.context is None else draws.context[:, :, frames],
                ),
            )
        )
    return torch.cat(samples, dim=2)

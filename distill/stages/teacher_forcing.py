"""Stage 1: an autoregressive diffusion model: a noisy chunk is predicted from itself and the clean
chunks before it.
"""

from collections.abc import Iterator

import torch

from distill.config import Recipe
from distill.objectives.flow_matching import GRID, draw_index, flow_matching_loss, grid_sigma
from distill.stages.stage import Loss, TransformerStage, teacher_forced
from worldmodel.schedule import add_noise, training_weight


class TeacherForcingStage(TransformerStage):
    """Flow matching with one sigma per chunk.

    Differs: with `context_sigma_max` above 0 every frame of the context is noised by its own sigma,
    which is an input of the network. Generated frames are never as clean as footage, and a model
    trained on clean context alone accumulates its errors.
    """

    def __init__(self, recipe: Recipe, device: torch.device):
        super().__init__(recipe, recipe.teacher_forcing, device)

    def losses(self, batch: dict, step: int, generator: torch.Generator) -> Iterator[Loss]:
        windows = self.prepare(batch, generator)
        latents = windows.latents
        device = generator.device
        count, _, frames = latents.shape[:3]
        sigma = grid_sigma(
            draw_index(count, frames, self.config.chunk, GRID, generator).to(self.device),
            self.config.shift,
        )
        noise = torch.randn(latents.shape, generator=generator, device=device).to(self.device)
        weight = training_weight(sigma, self.config.shift) if self.config.weighting else None
        clean = latents
        clean_sigma = None
        if self.config.context_sigma_max > 0:
            clean_sigma = (
                torch.rand(count, frames, generator=generator, device=device).to(self.device)
                * self.config.context_sigma_max
            )
            clean = add_noise(
                latents,
                torch.randn(latents.shape, generator=generator, device=device).to(self.device),
                clean_sigma,
            )
        predict = teacher_forced(self.student, windows, self.config.chunk, clean, clean_sigma)
        yield "student", flow_matching_loss(predict, latents, sigma, noise, weight), {}

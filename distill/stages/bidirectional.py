"""Stage 0: a pose-conditioned video diffusion model of whole clips; in stage 3 it scores the
student's samples.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from distill.config import Recipe
from distill.objectives.flow_matching import GRID, draw_index, flow_matching_loss, grid_sigma
from distill.stages.stage import Loss, TransformerStage, Windows, bidirectional
from worldmodel.schedule import over_latents, sigma_grid, training_weight


class BidirectionalStage(TransformerStage):
    """Flow matching with one sigma per clip."""

    def __init__(self, recipe: Recipe, device: torch.device):
        super().__init__(recipe, recipe.bidirectional, device)

    def losses(self, batch: dict, step: int, generator: torch.Generator) -> Iterator[Loss]:
        windows = self.prepare(batch, generator)
        count, _, frames = windows.latents.shape[:3]
        sigma = grid_sigma(
            draw_index(count, frames, frames, GRID, generator).to(self.device), self.config.shift
        )
        noise = torch.randn(windows.latents.shape, generator=generator, device=generator.device).to(
            self.device
        )
        weight = training_weight(sigma, self.config.shift) if self.config.weighting else None
        predict = bidirectional(self.student, windows)
        yield "student", flow_matching_loss(predict, windows.latents, sigma, noise, weight), {}

    def generate(self, windows: Windows, generator: torch.Generator) -> Tensor:
        """Euler steps from pure noise: the whole clip is generated from its cameras and caption."""
        predict = bidirectional(self.average, windows)
        x = torch.randn(windows.latents.shape, generator=generator, device=generator.device).to(
            self.device
        )
        levels = [
            *sigma_grid(self.config.sample_steps, self.config.shift).to(self.device),
            torch.zeros((), device=self.device),
        ]
        for sigma, sigma_next in pairwise(levels):
            velocity = predict(x, sigma.expand(x.shape[0], x.shape[2]))
            x = x + over_latents(sigma_next - sigma, x) * velocity
        return x

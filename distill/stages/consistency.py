"""Stage 2, causal consistency distillation: the model learns to jump to the end of its teacher's
trajectory.
"""

from collections.abc import Iterator

import torch

from distill.config import Recipe
from distill.objectives.consistency import consistency_loss, draw_pair, teacher_step
from distill.stages.stage import Loss, TransformerStage, teacher_forced
from worldmodel.errors import UserError
from worldmodel.rollout import RolloutConfig, with_steps
from worldmodel.schedule import add_noise


class ConsistencyStage(TransformerStage):
    """Teacher, student and average all start from `init`; the average is the target and the
    result.
    """

    def __init__(self, recipe: Recipe, device: torch.device):
        if not recipe.consistency.init:
            raise UserError(
                "consistency.init is empty: name the export of the stage teacher_forcing, which "
                "is the teacher"
            )
        super().__init__(recipe, recipe.consistency, device)
        self.teacher = self.load_frozen(recipe.consistency.init)
        self.compile(self.teacher)

    def losses(self, batch: dict, step: int, generator: torch.Generator) -> Iterator[Loss]:
        config = self.config
        windows = self.prepare(batch, generator)
        latents = windows.latents
        count, _, frames = latents.shape[:3]
        sigma, sigma_next = (
            s.to(self.device)
            for s in draw_pair(count, frames, config.chunk, config.grid, config.shift, generator)
        )
        noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(
            self.device
        )
        x = add_noise(latents, noise, sigma)
        unconditional = teacher_forced(self.teacher, windows.without_text(), config.chunk)
        x_next = teacher_step(
            teacher_forced(self.teacher, windows, config.chunk),
            unconditional,
            x,
            sigma,
            sigma_next,
            config.guidance,
        )
        student, average = (
            teacher_forced(model, windows, config.chunk) for model in (self.student, self.average)
        )
        loss = consistency_loss(
            student,
            average,
            x,
            sigma,
            x_next,
            sigma_next,
            lookup="exact",
            shift=config.shift,
        )
        yield "student", loss, {}

    def sampling(self) -> RolloutConfig:
        """A few steps with new noise between them, as the model is used in play."""
        config = RolloutConfig(
            shift=self.config.shift, chunk=self.config.chunk, window=self.recipe.data.frames
        )
        return with_steps(config, self.config.sample_steps)

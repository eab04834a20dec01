"""Stage 3, asymmetric DMD: the student dreams whole clips and learns what a bidirectional model
thinks of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from distill.config import Recipe
from distill.objectives.distribution_matching import (
    RolloutDraws,
    coarse_loss,
    critic_loss,
    distribution_gradient,
    distribution_loss,
    score_sigma,
    self_rollout,
    truth_loss,
)
from distill.objectives.flow_matching import GRID, draw_index
from distill.optimizer import make_optimizer
from distill.stages.stage import Loss, TransformerStage, Windows, bidirectional
from worldmodel.errors import UserError
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.rollout import Rollout, RolloutConfig


class Dream(NamedTuple):
    """What a self-rollout left to be judged."""

    samples: Tensor  # [B, C, F, H, W]
    windows: Windows  # the clips' own frames at the same places
    # whether the rollout began with the clips' true first chunk, so that their frames are what it
    # should show
    anchored: bool


class DmdStage(TransformerStage):
    """One step of the student, then `critic_updates` steps of the fake score.

    Differs: with `dmd.shared` the fake score learns from the rollouts that the student has just
    learnt from, with noise of its own for every update, instead of from fresh ones. With
    `dmd.truth` or `dmd.truth_coarse` above 0 rollouts that begin with a clip's true first chunk are
    also pulled towards its own frames. The score alone only asks whether a dream looks real; this
    asks, along the student's own past, whether it is the place that it began in.
    """

    def __init__(self, recipe: Recipe, device: torch.device):
        config = recipe.dmd
        if not config.init or not config.real:
            raise UserError(
                "dmd.init and dmd.real must name exports: the student's start and the network "
                "that scores real data"
            )
        super().__init__(recipe, config, device, config.rollout)
        self.real = self.load_frozen(config.real)
        self.critic = self.load(config.critic or config.real)
        self.modules["critic"] = self.critic
        for score in (self.real, self.critic):  # they always see windows of one length
            super().compile(score)
        self.optimizers["critic"] = make_optimizer(
            self.critic, config.critic_lr, config.optimiser, recipe.optimiser
        )
        self.judged = config.judged or recipe.data.frames
        self.score_shift = config.score_shift or config.shift
        self.batches = 1 if config.shared else config.critic_updates + 1

    def losses(self, batch: dict, step: int, generator: torch.Generator) -> Iterator[Loss]:
        shape = torch.Generator().manual_seed(
            self.recipe.run.seed * 1_000_003 + step
        )  # alike in all processes: none waits for another
        windows = self.prepare(batch, generator)
        student_part, *critic_parts = windows.split(len(windows.latents) // self.batches)
        dream = self.dream_along(student_part, generator, shape, grad=True)
        yield "student", *self._student_loss(dream, generator)
        for index in range(self.config.critic_updates):
            if not self.config.shared:
                with torch.no_grad():
                    dream = self.dream_along(critic_parts[index], generator, shape, grad=False)
            start = _below(dream.samples.shape[2] - self.judged + 1, shape)
            part = slice(start, start + self.judged)
            samples = dream.samples[:, :, part].detach()
            sigma, noise = self._score_draws(samples, generator)
            yield (
                "critic",
                critic_loss(
                    bidirectional(self.critic, dream.windows.cut(part)),
                    samples,
                    sigma,
                    noise,
                    **self._reading(),
                ),
                {},
            )

    def _student_loss(
        self, dream: Dream, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        samples, windows, anchored = dream
        parts = [
            slice(start, start + self.judged) for start in range(0, samples.shape[2], self.judged)
        ]
        gradient = torch.cat(
            [
                self._gradient(samples[:, :, part].detach(), windows.cut(part), generator)
                for part in parts
            ],
            dim=2,
        )
        loss = distribution_loss(samples, gradient)
        metrics = {"gradient": gradient.abs().mean(), "spread": samples.detach().std()}
        if self.config.truth and anchored:
            pull = truth_loss(samples, windows.latents, self.config.truth_scale)
            loss = loss + self.config.truth * pull
            metrics["truth"] = pull.detach()
        if self.config.truth_coarse and anchored:
            pull = coarse_loss(samples, windows.latents)
            loss = loss + self.config.truth_coarse * pull
            metrics["coarse"] = pull.detach()
        return loss, metrics

    def _gradient(self, samples: Tensor, windows: Windows, generator: torch.Generator) -> Tensor:
        """Where both scores want samples `[B, C, F, H, W]` to go."""
        sigma, noise = self._score_draws(samples, generator)
        return distribution_gradient(
            samples,
            sigma,
            noise,
            fake=bidirectional(self.critic, windows),
            real=bidirectional(self.real, windows),
            real_unconditional=bidirectional(self.real, windows.without_text()),
            guidance=self.config.guidance,
            **self._reading(),
        )

    def compile(self, network: CausalWanTransformer) -> None:
        """Nothing for the student: every latent of a rollout sees a longer past, and each length
        would be compiled anew.
        """

    def dream_along(
        self, windows: Windows, generator: torch.Generator, shape: torch.Generator, *, grad: bool
    ) -> Dream:
        """The last `data.frames` latents of a self-rollout, and the windows cut to them.

        The rollout's length and place are drawn (from `shape`, as is the step that learns), up to
        all of the windows; a share of the rollouts begins with the true first chunk. What comes
        before the last frames is dreamed as in play, without gradient, so that the student meets
        its own long past (Self-Forcing++, arXiv 2510.02283).
        """
        frames = self.recipe.data.frames
        chunk = self.config.chunk
        longest = (windows.latents.shape[2] - frames) // chunk
        start = int((longest + 1) * _share(shape) ** self.config.skew)
        place = (
            0
            if _share(shape) < self.recipe.data.first_share
            else _below(longest - start + 1, shape)
        )
        start = chunk * start
        place = chunk * place
        windows = windows.cut(slice(place, place + start + frames))
        latents = windows.latents
        steps = len(self.config.denoise)
        first_steps = len(self.config.first_denoise)
        batch, _, _, height, width = latents.shape
        rollout = Rollout(
            self.student,
            windows.text,
            self.sampling(),
            batch=batch,
            height=height,
            width=width,
            device=self.device,
        )
        noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(
            self.device
        )
        exits = _below(steps, shape), _below(first_steps, shape)
        given = chunk if _share(shape) < self.config.start_share else 0
        if given:
            with torch.no_grad():
                rollout.commit(
                    latents[:, :, :given],
                    windows.viewmats[:, :given],
                    windows.intrinsics[:, :given],
                )
        parts = [latents[:, :, :given]]
        if given < start:
            before = windows.cut(slice(given, start))
            draws = RolloutDraws(noise[:, :, given:start], steps - 1, first_steps - 1)
            parts.append(
                self_rollout(
                    rollout,
                    before.viewmats,
                    before.intrinsics,
                    draws,
                    grad=False,
                    generator=generator,
                )
            )
        judged = windows.cut(slice(max(given, start), None))
        draws = RolloutDraws(noise[:, :, max(given, start) :], *exits)
        parts.append(
            self_rollout(
                rollout, judged.viewmats, judged.intrinsics, draws, grad=grad, generator=generator
            )
        )
        return Dream(
            torch.cat(parts, dim=2)[:, :, start:], windows.cut(slice(start, None)), given > 0
        )

    def sampling(self) -> RolloutConfig:
        config = self.config
        return RolloutConfig(
            steps=config.denoise,
            first_steps=config.first_denoise,
            shift=config.shift,
            chunk=config.chunk,
            window=config.window,
            sinks=config.sinks,
            cache_gradient=config.cache_gradient,
        )

    def _score_draws(self, samples: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One noise level a sample, `[B, F]`, and noise like the samples."""
        batch, _, frames = samples.shape[:3]
        index = draw_index(batch, frames, frames, GRID, generator).to(self.device)
        noise = torch.randn(samples.shape, generator=generator, device=generator.device).to(
            self.device
        )
        return score_sigma(index, self.score_shift, self.config.clamp), noise

    def _reading(self) -> dict:
        return {"lookup": self.config.sigma_lookup, "shift": self.score_shift}


def _share(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, device=generator.device))


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator, device=generator.device))

"""Stage 3, asymmetric DMD: the student generates whole clips and learns from the score of a
bidirectional model.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from distill.config import Recipe
from distill.objectives.distribution_matching import (
    distribution_gradient,
    distribution_loss,
    fake_score_loss,
    ground_truth_loss,
    low_pass_loss,
    score_sigma,
)
from distill.objectives.flow_matching import GRID, draw_index
from distill.optimizer import make_optimizer
from distill.stages.self_rollout import RolloutDraws, self_rollout
from distill.stages.stage import Loss, TransformerStage, Windows, bidirectional
from worldmodel.errors import UserError
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.rollout import Rollout, RolloutConfig


class RolloutSample(NamedTuple):
    """The part of a self-rollout that is scored."""

    latents: Tensor  # [B, C, F, H, W]
    windows: Windows  # the clips' own frames at the same cameras
    # whether the rollout started from the clips' first chunk, so that it should show their frames
    anchored: bool


class RolloutPlan(NamedTuple):
    """Which frames of the windows a self-rollout covers."""

    first: int  # frame of the windows at which the rollout starts
    unscored: int  # frames generated before the scored ones


class DmdStage(TransformerStage):
    """One step of the student, then `fake_score_updates` steps of the fake score.

    Differs: with `dmd.reuse_rollouts` the fake score learns from the rollouts that the student has
    just learnt from, with new noise for every update, instead of from new rollouts. With
    `dmd.ground_truth_weight` or `dmd.ground_truth_low_pass_weight` above 0, rollouts that start
    from a clip's first chunk are also pulled to that clip's frames: the scores only ask whether a
    sample looks real; this asks, along the student's own past, whether it still is the same place.
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
        self.fake_score = self.load(config.fake_score or config.real)
        self.modules["fake_score"] = self.fake_score
        for score in (self.real, self.fake_score):  # their windows have one length
            super().compile(score)
        self.optimizers["fake_score"] = make_optimizer(
            self.fake_score, config.fake_score_lr, config.optimizer, recipe.optimizer
        )
        self.score_window = config.score_window or recipe.data.frames
        self.score_shift = config.score_timestep_shift or config.shift
        self.batches = 1 if config.reuse_rollouts else config.fake_score_updates + 1

    def losses(self, batch: dict, step: int, generator: torch.Generator) -> Iterator[Loss]:
        # the same in all processes, so that none waits for a longer rollout of another
        shape = torch.Generator().manual_seed(self.recipe.run.seed * 1_000_003 + step)
        windows = self.prepare(batch, generator)
        student_part, *fake_score_parts = windows.split(len(windows.latents) // self.batches)
        sample = self.generate_sample(student_part, generator, shape, grad=True)
        yield "student", *self._student_loss(sample, generator)
        for index in range(self.config.fake_score_updates):
            if not self.config.reuse_rollouts:
                with torch.no_grad():
                    sample = self.generate_sample(
                        fake_score_parts[index], generator, shape, grad=False
                    )
            start = _randint(sample.latents.shape[2] - self.score_window + 1, shape)
            part = slice(start, start + self.score_window)
            latents = sample.latents[:, :, part].detach()
            sigma, noise = self._score_draws(latents, generator)
            fake = bidirectional(self.fake_score, sample.windows.cut(part))
            loss = fake_score_loss(fake, latents, sigma, noise, **self._sigma_lookup())
            yield "fake_score", loss, {}

    def _student_loss(
        self, sample: RolloutSample, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        latents, windows, anchored = sample
        parts = [
            slice(start, start + self.score_window)
            for start in range(0, latents.shape[2], self.score_window)
        ]
        gradient = torch.cat(
            [
                self._gradient(latents[:, :, part].detach(), windows.cut(part), generator)
                for part in parts
            ],
            dim=2,
        )
        loss = distribution_loss(latents, gradient)
        metrics = {"gradient": gradient.abs().mean(), "spread": latents.detach().std()}
        config = self.config
        if config.ground_truth_weight and anchored:
            term = ground_truth_loss(latents, windows.latents, config.ground_truth_scale)
            loss = loss + config.ground_truth_weight * term
            metrics["ground_truth"] = term.detach()
        if config.ground_truth_low_pass_weight and anchored:
            term = low_pass_loss(latents, windows.latents)
            loss = loss + config.ground_truth_low_pass_weight * term
            metrics["low_pass"] = term.detach()
        return loss, metrics

    def _gradient(self, samples: Tensor, windows: Windows, generator: torch.Generator) -> Tensor:
        """Direction in which the two scores want samples `[B, C, F, H, W]` to move."""
        sigma, noise = self._score_draws(samples, generator)
        return distribution_gradient(
            samples,
            sigma,
            noise,
            fake=bidirectional(self.fake_score, windows),
            real=bidirectional(self.real, windows),
            real_unconditional=bidirectional(self.real, windows.without_text()),
            guidance=self.config.guidance,
            **self._sigma_lookup(),
        )

    def compile(self, network: CausalWanTransformer) -> None:
        """Nothing for the student: every latent of a rollout has a longer past, and each length
        would be compiled again.
        """

    def generate_sample(
        self, windows: Windows, generator: torch.Generator, shape: torch.Generator, *, grad: bool
    ) -> RolloutSample:
        """The last `data.frames` latents of a self-rollout, with the windows cut to them.

        `shape` draws the rollout's place in the windows, its length up to all of them, the
        denoising step that learns, and whether the rollout starts from the ground truth's first
        chunk. The frames before the scored ones are generated as in play, without gradient, so that
        the student meets its own long past (Self-Forcing++, arXiv 2510.02283).
        """
        config = self.config
        plan = self._plan(windows.latents.shape[2], shape)
        scored = plan.unscored
        windows = windows.cut(slice(plan.first, plan.first + scored + self.recipe.data.frames))
        latents = windows.latents
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
        last = len(config.denoise) - 1
        first_last = len(config.first_denoise) - 1
        exits = _randint(last + 1, shape), _randint(first_last + 1, shape)
        given = config.chunk if _rand(shape) < config.gt_first_chunk_prob else 0
        parts = [latents[:, :, :given]]
        if given:
            with torch.no_grad():
                rollout.commit(parts[0], windows.viewmats[:, :given], windows.intrinsics[:, :given])
        if given < scored:
            past = windows.cut(slice(given, scored))
            draws = RolloutDraws(noise[:, :, given:scored], last, first_last)
            parts.append(self._generate(rollout, past, draws, generator, grad=False))
        learning = windows.cut(slice(max(given, scored), None))
        draws = RolloutDraws(noise[:, :, max(given, scored) :], *exits)
        parts.append(self._generate(rollout, learning, draws, generator, grad=grad))
        return RolloutSample(
            torch.cat(parts, dim=2)[:, :, scored:], windows.cut(slice(scored, None)), given > 0
        )

    def _plan(self, frames: int, shape: torch.Generator) -> RolloutPlan:
        """Length and place of a rollout within windows of `frames` latents, in whole chunks."""
        chunk = self.config.chunk
        longest = (frames - self.recipe.data.frames) // chunk
        unscored = int((longest + 1) * _rand(shape) ** self.config.length_exponent)
        first = (
            0
            if _rand(shape) < self.recipe.data.first_frame_prob
            else _randint(longest - unscored + 1, shape)
        )
        return RolloutPlan(chunk * first, chunk * unscored)

    def sampling(self) -> RolloutConfig:
        config = self.config
        return RolloutConfig(
            steps=config.denoise,
            first_steps=config.first_denoise,
            shift=config.shift,
            chunk=config.chunk,
            window=config.window,
            sinks=config.sinks,
            recall=config.recall,
            recall_unit=config.recall_unit,
        )

    def _generate(
        self,
        rollout: Rollout,
        windows: Windows,
        draws: RolloutDraws,
        generator: torch.Generator,
        *,
        grad: bool,
    ) -> Tensor:
        return self_rollout(
            rollout,
            windows.viewmats,
            windows.intrinsics,
            draws,
            grad=grad,
            generator=generator,
            context_sigma=self.config.context_sigma,
        )

    def _score_draws(self, samples: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One noise level per sample, `[B, F]`, and noise of the samples' shape."""
        batch, _, frames = samples.shape[:3]
        index = draw_index(batch, frames, frames, GRID, generator).to(self.device)
        noise = torch.randn(samples.shape, generator=generator, device=generator.device).to(
            self.device
        )
        return score_sigma(index, self.score_shift, self.config.clamp), noise

    def _sigma_lookup(self) -> dict:
        """Arguments of the objectives: sigmas are used exactly, under this shift."""
        return {"lookup": "exact", "shift": self.score_shift}


def _rand(generator: torch.Generator) -> float:
    """Uniform in [0, 1)."""
    return float(torch.rand((), generator=generator, device=generator.device))


def _randint(count: int, generator: torch.Generator) -> int:
    """Uniform in 0 .. count - 1."""
    return int(torch.randint(count, (), generator=generator, device=generator.device))

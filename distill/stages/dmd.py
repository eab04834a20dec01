"""Stage 3, asymmetric DMD: the student dreams whole clips and learns what a bidirectional model thinks of them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from distill.config import Recipe
from distill.objectives.distribution_matching import (
    RolloutDraws,
    critic_loss,
    distribution_gradient,
    distribution_loss,
    score_sigma,
    self_rollout,
)
from distill.objectives.flow_matching import GRID, draw_index
from distill.optimiser import make_optimizer
from distill.stages.stage import Loss, TransformerStage, Windows, bidirectional
from worldmodel.rollout import Rollout, RolloutConfig
from worldmodel.transformer import CausalWanTransformer


class Dream(NamedTuple):
    """What a self-rollout left to be judged."""

    samples: Tensor  # [B, C, F, H, W]
    windows: Windows  # the clips' own frames at the same places
    anchored: bool  # whether the rollout began with the clips' true first chunk, so that their frames are what it should show


class DmdStage(TransformerStage):
    """`critic_updates` steps of the fake score, then one of the student, each on fresh cameras and a fresh rollout.

    Differs: with `dmd.truth` above 0 rollouts that begin with a clip's true first chunk are also pulled towards its own frames. The
    score alone only asks whether a dream looks real; this asks, along the student's own past, whether it is the place that it began in.
    """

    def __init__(self, recipe: Recipe, device: torch.device):
        config = recipe.dmd
        if not config.init or not config.real:
            raise ValueError("dmd.init and dmd.real must name exports: the student's start and the network that scores real data")
        super().__init__(recipe, config, device, config.rollout)
        self.real = self.load_frozen(config.real)
        self.critic = self.load(config.critic or config.real)
        self.modules["critic"] = self.critic
        self.optimizers["critic"] = make_optimizer(self.critic, config.critic_lr, config.optimiser, recipe.optimiser)
        self.batches = config.critic_updates + 1

    def losses(self, batch: dict, step: int, generator: torch.Generator) -> Iterator[Loss]:
        windows = self.prepare(batch, generator)
        *critic_parts, student_part = windows.split(len(windows.latents) // self.batches)
        for windows in critic_parts:
            with torch.no_grad():
                samples, windows, _ = self.dream_along(windows, generator, grad=False)
            sigma, noise = self._score_draws(samples, generator)
            yield (
                "critic",
                critic_loss(bidirectional(self.critic, windows), samples, sigma, noise, **self._reading()),
                {},
            )
        yield "student", *self._student_loss(student_part, generator)

    def _student_loss(self, windows: Windows, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        samples, windows, anchored = self.dream_along(windows, generator, grad=True)
        sigma, noise = self._score_draws(samples, generator)
        gradient = distribution_gradient(
            samples.detach(),
            sigma,
            noise,
            fake=bidirectional(self.critic, windows),
            real=bidirectional(self.real, windows),
            real_unconditional=bidirectional(self.real, windows.without_text()),
            guidance=self.config.guidance,
            **self._reading(),
        )
        loss, metrics = distribution_loss(samples, gradient), {"gradient": gradient.abs().mean(), "spread": samples.detach().std()}
        if self.config.truth and anchored:
            error = (samples - windows.latents).square().mean()
            loss, metrics["truth"] = loss + 0.5 * self.config.truth * error, error.detach()
        return loss, metrics

    def compile(self, network: CausalWanTransformer) -> None:
        """Nothing: every latent of a rollout sees a longer past, and each length would be compiled anew."""

    def dream_along(self, windows: Windows, generator: torch.Generator, *, grad: bool) -> Dream:
        """The last `data.frames` latents of a self-rollout, and the windows cut to them.

        The rollout's length is drawn, up to all of the windows; a share of the rollouts begins with the true first chunk. What comes
        before the last frames is dreamed as in play, without gradient, so that the student meets its own long past (Self-Forcing++,
        arXiv 2510.02283).
        """
        frames, chunk = self.recipe.data.frames, self.config.chunk
        start = chunk * _below((windows.latents.shape[2] - frames) // chunk + 1, generator)
        windows = windows.cut(slice(0, start + frames))
        latents, (steps, first_steps) = windows.latents, (len(self.config.denoise), len(self.config.first_denoise))
        batch, _, _, height, width = latents.shape
        rollout = Rollout(self.student, windows.text, self.sampling(), batch=batch, height=height, width=width, device=self.device)
        noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(self.device)
        exits = _below(steps, generator), _below(first_steps, generator)
        given = chunk if torch.rand((), generator=generator, device=generator.device) < self.config.start_share else 0
        if given:
            rollout.commit(latents[:, :, :given], windows.viewmats[:, :given], windows.intrinsics[:, :given])
        parts = [latents[:, :, :given]]
        before, judged = (given, start, (steps - 1, first_steps - 1), False), (max(given, start), start + frames, exits, grad)
        for begin, end, last, learns in (before, judged):
            if begin < end:
                part = windows.cut(slice(begin, end))
                draws = RolloutDraws(noise[:, :, begin:end], *last)
                parts.append(self_rollout(rollout, part.viewmats, part.intrinsics, draws, grad=learns, generator=generator))
        return Dream(torch.cat(parts, dim=2)[:, :, start:], windows.cut(slice(start, None)), given > 0)

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
        noise = torch.randn(samples.shape, generator=generator, device=generator.device).to(self.device)
        return score_sigma(index, self.config.shift, self.config.clamp), noise

    def _reading(self) -> dict:
        return {"lookup": self.config.sigma_lookup, "shift": self.config.shift}


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator, device=generator.device))

"""Places: the student of stage 3 learns to read what is known of a place, and forgets nothing.

Windows of a place have a condition: remembered frames of other clips, reprojected into the window's
cameras (`worldmodel/reprojection.py`). The truth is known there at every moment, so plain flow
matching is right however long a rollout lasts. Windows of endless footage have none; on them the
student keeps to the network that it started from.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.config import Recipe
from distill.data.clips import LatentClips
from distill.data.mixture import MixedClips
from distill.objectives.flow_matching import GRID, draw_index, grid_sigma
from distill.stages.stage import Loss, TransformerStage, Windows, teacher_forced
from worldmodel.errors import UserError
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.rollout import RolloutConfig
from worldmodel.schedule import add_noise, to_x0, warp_steps


class PlacesStage(TransformerStage):
    """Flow matching with one sigma per chunk, as in stage 1, on a mixture of places and endless
    footage.

    Half of the noise levels are those of play. The context is the student's own past: up to
    `own_past` passes without gradients (as many for all windows of a step) make all its frames
    again, every pass from the frames of the one before it, so that errors add up as they do in
    play. Where no pass is drawn, the context of a place is footage noised by up to
    `context_sigma_max`, so that the condition is needed. With probability `condition_dropout` a
    frame has no condition.
    Sources: Resampling Forcing (arXiv 2512.15702), which makes the context in one pass; BAgger
    (2512.12080), whose context is a whole rollout. Differs: both lie at the ends of `own_past`.
    """

    def __init__(self, recipe: Recipe, device: torch.device):
        if not recipe.places.init or not recipe.data.places:
            raise UserError(
                "places.init must name the weights to start from, and data.places a folder of "
                "clips with conditions (`python -m distill condition`)"
            )
        super().__init__(recipe, recipe.places, device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self._levels = warp_steps(self.config.denoise, self.config.shift).to(device)

    def open_clips(self, frames: int) -> LatentClips | MixedClips:
        endless = super().open_clips(frames)
        data = self.recipe.data
        places = LatentClips(
            Path(data.places), frames, data.first_frame_prob, self.recipe.run.seed, conditions=True
        )
        return MixedClips(places, endless, self.config.place_share, self.recipe.run.seed)

    def load(self, source: str) -> CausalWanTransformer:
        """As in every stage; weights that read no condition get zero weights for it."""
        return with_condition(super().load(source), self._clips.condition_channels)

    def losses(self, batch: dict, step: int, generator: torch.Generator) -> Iterator[Loss]:
        windows = self.prepare(batch, generator)
        place = batch["place"].to(self.device)
        latents = windows.latents
        clean, clean_sigma = self._context(windows, place, generator)
        sigma = self._sigma(latents, generator)
        noise = self._normal(latents, generator)
        noisy = add_noise(latents, noise, sigma)
        target = noise - latents
        if not place.all():
            rows = ~place
            kept = windows.rows(rows)
            with torch.no_grad():
                teacher = teacher_forced(
                    self.teacher, kept, self.config.chunk, clean[rows], clean_sigma[rows]
                )
                target[rows] = teacher(noisy[rows], sigma[rows]).float()
        predict = teacher_forced(self.student, windows, self.config.chunk, clean, clean_sigma)
        error = (predict(noisy, sigma).float() - target).square().mean((1, 2, 3, 4))
        metrics = {}
        for name, rows in (("place", place), ("endless", ~place)):
            if rows.any():
                metrics[name] = error[rows].mean().detach()
        yield "student", error.mean(), metrics

    def prepare(self, batch: dict, generator: torch.Generator) -> Windows:
        windows = super().prepare(batch, generator)
        keep = self._uniform(windows.latents[:, :, :1], generator) >= self.config.condition_dropout
        condition = batch["condition"].to(self.device).float() * keep[:, None, :, None, None]
        return windows.with_condition(condition)

    def sampling(self) -> RolloutConfig:
        return RolloutConfig(
            steps=self.config.denoise,
            first_steps=self.config.first_denoise,
            shift=self.config.shift,
            chunk=self.config.chunk,
            window=self.recipe.data.frames,
        )

    # -------------------- inside

    @torch.no_grad()
    def _context(
        self, windows: Windows, place: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """What the clean frames of a step are, and their noise levels [B, F]."""
        latents = windows.latents
        passes = int(torch.randint(self.config.own_past + 1, (), generator=generator))
        if not passes:
            largest = self.config.context_sigma_max * place.float()[:, None]
            clean_sigma = self._uniform(latents, generator) * largest
            return add_noise(latents, self._normal(latents, generator), clean_sigma), clean_sigma
        clean = latents
        clean_sigma = latents.new_zeros(latents.shape[0], latents.shape[2])
        for _ in range(passes):
            level = self._draw_index(latents, len(self._levels), generator)
            sigma = self._levels[level]
            noisy = add_noise(latents, self._normal(latents, generator), sigma)
            predict = teacher_forced(self.student, windows, self.config.chunk, clean, clean_sigma)
            clean = to_x0(noisy, predict(noisy, sigma).float(), sigma)
        return clean, clean_sigma

    def _draw_index(self, like: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """One of `count` numbers per chunk, [B, F]."""
        batch, _, frames = like.shape[:3]
        return draw_index(batch, frames, self.config.chunk, count, generator).to(self.device)

    def _sigma(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        """One noise level per chunk [B, F]."""
        grid = grid_sigma(self._draw_index(latents, GRID, generator), self.config.shift)
        level = self._draw_index(latents, len(self._levels), generator)
        of_play = self._draw_index(latents, 2, generator) == 0
        return torch.where(of_play, self._levels[level], grid)

    def _uniform(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """[B, F] in [0, 1)."""
        shape = (like.shape[0], like.shape[2])
        return torch.rand(shape, generator=generator, device=generator.device).to(self.device)

    def _normal(self, like: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(like.shape, generator=generator, device=generator.device)
        return noise.to(self.device)


@torch.no_grad()
def with_condition(network: CausalWanTransformer, channels: int) -> CausalWanTransformer:
    """The network with `channels` condition channels; new ones have zero weights, so the output
    does not change.

    Raises UserError where it reads another number already.
    """
    if network.condition_channels == channels:
        return network
    if network.condition_channels:
        raise UserError(
            f"expected a network with {channels} condition channels or none, got "
            f"{network.condition_channels}: start from other weights"
        )
    old = network.patch_embedding
    inputs = network.config.in_channels + channels
    new = nn.Conv3d(inputs, old.out_channels, old.kernel_size, old.stride).to(old.weight)
    new.weight.zero_()
    new.weight[:, : old.in_channels] = old.weight
    new.bias.copy_(old.bias)
    network.patch_embedding = new
    network.register_to_config(in_channels=inputs)
    return network

"""Stage 1: an autoregressive diffusion model: a noisy chunk is predicted from itself and the clean
chunks before it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill.config import Recipe
from distill.data.recall import RecallClips
from distill.objectives.flow_matching import GRID, draw_index, flow_matching_error, grid_sigma
from distill.stages.stage import Loss, TransformerStage, teacher_forced
from worldmodel.schedule import add_noise, training_weight


class TeacherForcingStage(TransformerStage):
    """Flow matching with one sigma per chunk.

    Differs: with `context_sigma_max` above 0 every frame of the context is noised by its own sigma,
    which is an input of the network. Generated frames are never as clean as footage, and a model
    trained on clean context alone accumulates its errors. With `recall_frames` above 0 some windows
    begin with remembered frames (`distill/data/recall.py`), which have no loss of their own.
    """

    def __init__(self, recipe: Recipe, device: torch.device):
        super().__init__(recipe, recipe.teacher_forcing, device)
        self._samples: Dataset = self._clips
        if self.config.recall_frames:
            self._samples = RecallClips(
                self._clips,
                self.config.recall_frames,
                self.config.recall_share,
                self.config.recall_unit,
            )

    def dataset(self) -> Dataset:
        return self._samples

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
        error = flow_matching_error(predict, latents, sigma, noise)
        metrics = {}
        if self.config.recall_frames:
            recalled = batch["recalled"].to(self.device)
            counted = torch.arange(frames, device=self.device) >= recalled[:, None]
            metrics = _recall_metrics(error.detach(), recalled)
            error = torch.where(counted, error, 0) * (counted.numel() / counted.sum())
        yield "student", error.mean() if weight is None else (weight * error).mean(), metrics


def _recall_metrics(error: Tensor, recalled: Tensor) -> dict[str, Tensor]:
    """Unweighted errors, where the batch has such windows: of the first frame behind recalled
    ones, of all frames behind them, and of plain windows.
    """
    rows = recalled > 0
    metrics = {}
    if rows.any():
        count = int(recalled.max())
        metrics["recall_first"] = error[rows, count].mean()
        metrics["recall"] = error[rows, count:].mean()
    if not rows.all():
        metrics["plain"] = error[~rows].mean()
    return metrics

"""The interface between a stage of a recipe and the training loop, and what all stages that train
the transformer have in common.
"""

import copy
import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distill.config import Recipe, TransformerConfig
from distill.data.clips import LatentClips
from distill.ema import MovingAverage
from distill.objectives.flow_matching import Predict
from distill.optimizer import JointOptimizer, make_optimizer
from distill.prompts import open_prompts
from worldmodel.errors import UserError
from worldmodel.images import to_uint8
from worldmodel.models.attention import Bidirectional, TeacherForcing
from worldmodel.models.prope import projmats
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.models.wan_autoencoder import Autoencoder
from worldmodel.rollout import Rollout, RolloutConfig, with_steps
from worldmodel.worlds.checkpoint import inspect, load_transformer
from worldmodel.worlds.weights import open_autoencoder

logger = logging.getLogger(__name__)

Loss = tuple[str, Tensor, dict[str, float | Tensor]]  # optimizer name, scalar loss, metrics


class Stage(ABC):
    """One stage: its networks, its losses, its result. The loop (`distill/train.py`) does the rest.

    modules: every network that training changes, by name; saved and restored.
    optimizers: their optimizers, by name; a group's initial learning rate is its peak.
    averages: moving averages, by the name of the optimizer whose steps they follow.
    batches: how many batches one step takes from the dataset, collated into one.
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer | JointOptimizer]
    averages: Mapping[str, MovingAverage] = MappingProxyType({})
    batches: int = 1

    @abstractmethod
    def dataset(self) -> Dataset:
        """Samples: dictionaries of tensors and strings for torch's default collation, each a
        function of its index.
        """

    def indices(self, drawn: int, count: int, seed: int) -> list[int]:
        """Indices of the `count` samples after the first `drawn`: endless passes over the dataset,
        each in a new order.
        """
        length = len(self.dataset())
        return [
            _shuffled(length, seed, epoch)[position]
            for epoch, position in (divmod(i, length) for i in range(drawn, drawn + count))
        ]

    @abstractmethod
    def losses(self, batch: dict, step: int, generator: torch.Generator) -> Iterator[Loss]:
        """Yield the losses of step `step`; after each one the loop runs the backward pass and the
        optimizer that it names.
        """

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the result (averaged weights) with `save_pretrained`."""

    def sample(self, generator: torch.Generator) -> np.ndarray | None:
        """A picture of the stage's progress, uint8 [H, W, 3], or None."""
        return None


@dataclass(frozen=True)
class Windows:
    """A batch: latents `[B, C, F, h, w]` float32, w2c `[B, F, 4, 4]`, intrinsics `[B, F, 4]`, text
    `[B, L, D]`, and the condition `[B, K, F, h, w]` of networks that read one.
    """

    latents: Tensor
    viewmats: Tensor
    intrinsics: Tensor
    text: Tensor
    condition: Tensor | None = None

    @property
    def projmats(self) -> Tensor:
        """PRoPE's matrices `[B, F, 4, 4]`, float32."""
        return projmats(self.viewmats, self.intrinsics).float()

    def without_text(self) -> "Windows":
        """The same windows under the unconditional embedding."""
        return replace(self, text=torch.zeros_like(self.text))

    def with_condition(self, condition: Tensor) -> "Windows":
        """The same windows with a condition."""
        return replace(self, condition=condition)

    def rows(self, rows: Tensor | slice) -> "Windows":
        """Some of the windows."""
        fields = (self.latents, self.viewmats, self.intrinsics, self.text, self.condition)
        return Windows(*(None if x is None else x[rows] for x in fields))

    def split(self, size: int) -> list["Windows"]:
        """Parts of `size` windows."""
        count = len(self.latents)
        return [self.rows(slice(start, start + size)) for start in range(0, count, size)]

    def cut(self, frames: slice) -> "Windows":
        """Some frames of the same windows."""
        return Windows(
            self.latents[:, :, frames],
            self.viewmats[:, frames],
            self.intrinsics[:, frames],
            self.text,
            None if self.condition is None else self.condition[:, :, frames],
        )


class TransformerStage(Stage):
    """A stage whose result is a `CausalWanTransformer`: `student` is trained, `average` follows it
    and is exported.

    frames: latents of a sample; 0 = `data.frames`.
    """

    def __init__(
        self, recipe: Recipe, config: TransformerConfig, device: torch.device, frames: int = 0
    ):
        self.recipe = recipe
        self.config = config
        self.device = device
        self._clips = self.open_clips(frames or recipe.data.frames)
        self.prompts = open_prompts(recipe, (clip.caption for clip in self._clips.clips))
        self._rows = {name: row for row, name in enumerate(self.prompts.names)}
        self._table = torch.stack(
            [*(self.prompts[name] for name in self.prompts.names), self.prompts.unconditional]
        ).to(device)
        self.student = self.load(config.init)
        self.average = copy.deepcopy(self.student)
        self.modules = {"student": self.student, "average": self.average}
        self.optimizers = {
            "student": make_optimizer(self.student, config.lr, config.optimizer, recipe.optimizer)
        }
        self._decoder = self._load_decoder()
        self.compile(self.student)
        self.averages = {
            "student": MovingAverage(self.student, self.average, config.ema, config.ema_start)
        }

    def open_clips(self, frames: int) -> LatentClips:
        """The training data, in windows of `frames` latents."""
        return LatentClips(
            Path(self.recipe.data.root),
            frames,
            self.recipe.data.first_frame_prob,
            self.recipe.run.seed,
        )

    def load(self, source: str) -> CausalWanTransformer:
        """A trainable transformer: a stage's export, any weights that `load_transformer` reads, or
        random ones for an empty `source`.

        Weights without a camera path get one of zeros where the recipe's model has one, so that the
        first prediction does not change. Raises UserError where the export is missing, or does not
        fit the clips or prompts.
        """
        if not source:
            return self._checked(new_transformer(self.recipe).to(self.device), "model")
        folder = self.recipe.export_folder(source)
        if folder != Path(source) and not (folder / "config.json").is_file():
            raise UserError(
                f"no exported transformer in {folder}: train that stage first, or name another "
                "folder"
            )
        location = source if folder == Path(source) else folder
        camera = inspect(location).camera
        if self.recipe.model.camera and not camera:
            logger.warning(f"{location} has no camera weights: they start as zeros")
        network = load_transformer(
            location, dtype=torch.float32, camera=camera or self.recipe.model.camera
        )
        return self._checked(network.to(self.device), str(location))

    def _checked(self, network: CausalWanTransformer, name: str) -> CausalWanTransformer:
        """The network, if it fits the clips and the prompts."""
        expected = (network.config.out_channels, network.config.text_dim)
        given = (self._clips.channels, self.prompts.shape[1])
        if expected != given:
            raise UserError(
                f"{name}: a network for latents of {expected[0]} channels and prompts of width "
                f"{expected[1]}, the clips in {self.recipe.data.root} have {given[0]} and the "
                f"prompts {given[1]}: choose another network, or change model or data"
            )
        patch = network.config.patch_size[1:]
        if any(cells % size for cells, size in zip(self._clips.cells, patch, strict=True)):
            raise UserError(
                f"{name}: a network for patches of {patch[0]}x{patch[1]} latent cells, the clips "
                f"in {self.recipe.data.root} have {self._clips.cells[0]}x{self._clips.cells[1]}: "
                "choose another network, or change model.patch or data"
            )
        return network

    def load_frozen(self, source: str) -> CausalWanTransformer:
        """A transformer for inference only; it is not part of a checkpoint."""
        return self.load(source).requires_grad_(False).eval()

    def compile(self, network: CausalWanTransformer) -> None:
        """Compile a network's blocks for the stage's one shape if `run.compile` is set."""
        for block in network.blocks if self.recipe.run.compile else ():
            block.compile(dynamic=False)

    def _load_decoder(self) -> Autoencoder | None:
        """The decoder of the sample pictures; missing files raise UserError now, not hours
        later.
        """
        if not self.recipe.data.autoencoder:
            return None
        folder = self.recipe.export_folder(self.recipe.data.autoencoder)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"no exported autoencoder in {folder}: train it first, or leave data.autoencoder "
                "empty"
            )
        return open_autoencoder(folder, self.device).requires_grad_(False)

    def dataset(self) -> Dataset:
        return self._clips

    def indices(self, drawn: int, count: int, seed: int) -> list[int]:
        """Consecutive numbers: LatentClips shuffles by itself and draws a new window for each."""
        return list(range(drawn, drawn + count))

    def prepare(self, batch: dict, generator: torch.Generator) -> Windows:
        """Move a batch of `LatentClips` to the device and drop some of its captions."""
        rows = torch.tensor(
            [self._rows[caption] for caption in batch["caption"]], device=self.device
        )
        dropped = (
            torch.rand(len(rows), generator=generator, device=generator.device)
            < self.config.caption_dropout
        )
        rows = torch.where(dropped.to(self.device), len(self._rows), rows)
        latents, viewmats, intrinsics = (
            batch[name].to(self.device) for name in ("latents", "viewmats", "intrinsics")
        )
        intrinsics = intrinsics[:, None].expand(-1, viewmats.shape[1], -1)
        return Windows(latents.float(), viewmats, intrinsics, self._table[rows])

    def export(self, folder: Path) -> None:
        self.average.save_pretrained(folder)
        self.prompts.save(Path(folder) / "prompts.safetensors")

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> np.ndarray | None:
        """Two windows, ground truth above generated frames, one column per latent; None without
        `data.autoencoder`.
        """
        if self._decoder is None:
            return None
        items = [self._clips[index] for index in (0, len(self._clips) // 2)]
        windows = self.prepare(torch.utils.data.default_collate(items), generator)
        rows = [
            self._decoder.decode(x)[:, :, ::4]
            for x in (windows.latents, self.generate(windows, generator))
        ]
        return to_uint8(_sheet(rows)).cpu().numpy()

    def generate(self, windows: Windows, generator: torch.Generator) -> Tensor:
        """Latents `[B, C, F, h, w]` of the average along the windows' cameras, from their first
        chunk on.
        """
        return roll_out(self.average, windows, self.sampling(), generator)

    def sampling(self) -> RolloutConfig:
        """Sampling of the pictures: the diffusion sampler with `sample_steps` steps, all frames in
        the window.
        """
        frames = self.recipe.data.frames
        return with_steps(
            RolloutConfig(
                shift=self.config.shift, chunk=self.config.chunk, window=frames, sampler="euler"
            ),
            self.config.sample_steps,
        )


def teacher_forced(
    model: CausalWanTransformer,
    windows: Windows,
    chunk: int,
    clean: Tensor | None = None,
    clean_sigma: Tensor | None = None,
) -> Predict:
    """The model as a function of (noisy latents, sigma), with `clean` (default: the windows'
    latents) as context.
    """
    clean = windows.latents if clean is None else clean
    frames = clean.shape[2]
    matrices = windows.projmats
    condition = windows.condition
    if condition is not None:
        condition = condition.repeat(1, 1, 2, 1, 1)

    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        context = TeacherForcing(model.layout(*x.shape[3:]), frames, chunk, matrices)
        first = torch.zeros_like(sigma) if clean_sigma is None else clean_sigma
        both = torch.cat([clean, x], dim=2), torch.cat([first, sigma], dim=1)
        return model(*both, windows.text, context, condition=condition)[:, :, frames:]

    return predict


def bidirectional(model: CausalWanTransformer, windows: Windows) -> Predict:
    """The model as a function of (noisy latents, sigma); every frame attends to every frame."""
    matrices = windows.projmats

    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        context = Bidirectional(model.layout(*x.shape[3:]), x.shape[2], matrices)
        return model(x, sigma, windows.text, context, condition=windows.condition)

    return predict


def roll_out(
    model: CausalWanTransformer, windows: Windows, config: RolloutConfig, generator: torch.Generator
) -> Tensor:
    """Generate latents `[B, C, F, h, w]` along the windows' cameras; the first chunk is the
    windows' own.
    """
    batch, _, frames, height, width = windows.latents.shape
    rollout = Rollout(
        model,
        windows.text,
        config,
        batch=batch,
        height=height,
        width=width,
        device=windows.latents.device,
    )
    first = windows.cut(slice(0, config.chunk))
    chunks = [first.latents]
    rollout.commit(first.latents, first.viewmats, first.intrinsics, first.condition)
    for start in range(config.chunk, frames, config.chunk):
        part = windows.cut(slice(start, start + config.chunk))
        chunks.append(
            rollout.step(
                part.viewmats, part.intrinsics, condition=part.condition, generator=generator
            )
        )
    return torch.cat(chunks, dim=2)


def new_transformer(recipe: Recipe) -> CausalWanTransformer:
    """A transformer with random weights (torch's global generator) of the recipe's size."""
    model = recipe.model
    return CausalWanTransformer(
        patch_size=model.patch,
        num_attention_heads=model.heads,
        attention_head_dim=model.head_dim,
        in_channels=model.channels,
        out_channels=model.channels,
        text_dim=model.text_dim,
        freq_dim=model.freq_dim,
        ffn_dim=model.ffn_dim,
        num_layers=model.layers,
        camera=model.camera,
    )


@functools.lru_cache(maxsize=2)
def _shuffled(length: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(
        length, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    ).tolist()


def _sheet(rows: list[Tensor]) -> Tensor:
    """Videos `[B, 3, F, H, W]`, one per row -> picture `[B rows H, F W, 3]`, the rows of one sample
    stacked.
    """
    stacked = torch.stack(rows, dim=1)  # [B, rows, 3, F, H, W]
    return stacked.permute(0, 1, 4, 3, 5, 2).flatten(3, 4).flatten(0, 2)

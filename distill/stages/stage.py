"""What a stage of a recipe is to the training loop, and what the stages that train the transformer
share.
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
from distill.optimizer import Joint, make_optimizer
from distill.prompts import open_prompts
from worldmodel.errors import UserError
from worldmodel.models.prope import projection
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.models.wan_autoencoder import Autoencoder
from worldmodel.rollout import Rollout, RolloutConfig, with_steps
from worldmodel.worlds.checkpoint import inspect, load_transformer
from worldmodel.worlds.weights import open_autoencoder

logger = logging.getLogger(__name__)

Loss = tuple[str, Tensor, dict[str, float | Tensor]]  # optimiser name, scalar loss, metrics


class Stage(ABC):
    """One stage: its networks, how a loss is made, what it leaves behind. The loop
    (`distill/train.py`) does the rest.

    `modules`: every network that training changes, by name; saved and restored. `optimizers`:
    theirs, by name; the learning rate that a group begins with is its peak. `averages`: moving
    averages, by the name of the optimiser
    whose steps they follow. `batches`: how many batches one step takes from the dataset, collated
    into one.
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer | Joint]
    averages: Mapping[str, MovingAverage] = MappingProxyType({})
    batches: int = 1

    @abstractmethod
    def dataset(self) -> Dataset:
        """Samples: dictionaries of tensors and strings for torch's default collation, each a
        function of its index.
        """

    def indices(self, drawn: int, count: int, seed: int) -> list[int]:
        """The next `count` samples after the first `drawn`: endless passes over the dataset, each
        in a new order.
        """
        length = len(self.dataset())
        return [
            _shuffled(length, seed, epoch)[place]
            for epoch, place in (divmod(i, length) for i in range(drawn, drawn + count))
        ]

    @abstractmethod
    def losses(self, batch: dict, step: int, generator: torch.Generator) -> Iterator[Loss]:
        """The losses of step `step`, lazily: after each one the loop goes backward and steps the
        optimiser it names.
        """

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Writes the result (averaged weights) with `save_pretrained`."""

    def sample(self, generator: torch.Generator) -> np.ndarray | None:
        """A picture of what the stage can do by now, uint8 [H, W, 3], or None."""
        return None


@dataclass(frozen=True)
class Windows:
    """A batch: latents `[B, C, F, h, w]` float32, w2c `[B, F, 4, 4]`, intrinsics `[B, F, 4]`, text
    `[B, L, D]`.
    """

    latents: Tensor
    viewmats: Tensor
    intrinsics: Tensor
    text: Tensor

    @property
    def projection(self) -> Tensor:
        """PRoPE's matrices `[B, F, 4, 4]`, float32."""
        return projection(self.viewmats, self.intrinsics).float()

    def without_text(self) -> "Windows":
        """The same windows under the unconditional embedding."""
        return replace(self, text=torch.zeros_like(self.text))

    def split(self, size: int) -> list["Windows"]:
        """Parts of `size` windows."""
        fields = (self.latents, self.viewmats, self.intrinsics, self.text)
        return [Windows(*parts) for parts in zip(*(x.split(size) for x in fields), strict=True)]

    def cut(self, frames: slice) -> "Windows":
        """The same windows, some of their frames alone."""
        return Windows(
            self.latents[:, :, frames],
            self.viewmats[:, frames],
            self.intrinsics[:, frames],
            self.text,
        )


class TransformerStage(Stage):
    """A stage whose result is a `CausalWanTransformer`: `student` is trained, `average` follows it
    and is exported.

    `frames`: latents of a sample, where that is not `data.frames`.
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
            "student": make_optimizer(self.student, config.lr, config.optimiser, recipe.optimiser)
        }
        self._decoder = self._load_decoder()
        self.compile(self.student)
        self.averages = {
            "student": MovingAverage(self.student, self.average, config.ema, config.ema_start)
        }

    def open_clips(self, frames: int) -> LatentClips:
        """What the stage learns from, in windows of `frames` latents."""
        return LatentClips(
            Path(self.recipe.data.root), frames, self.recipe.data.first_share, self.recipe.run.seed
        )

    def load(self, source: str) -> CausalWanTransformer:
        """A trainable transformer: a stage's export, any weights that `load_transformer` reads, or
        random ones for an empty `source`.

        Weights without a camera get one where the recipe's model has one; at zero, so that the
        first prediction is theirs.
        """
        if not source:
            return self._checked(new_transformer(self.recipe).to(self.device), "model")
        folder = self.recipe.export_folder(source)
        if folder != Path(source) and not (folder / "config.json").is_file():
            raise UserError(
                f"no exported transformer in {folder}: train the stage that makes it first, or "
                "name another folder"
            )
        place = source if folder == Path(source) else folder
        camera = inspect(place).camera
        if self.recipe.model.camera and not camera:
            logger.warning(f"{place} has no camera weights: they begin as zeros")
        network = load_transformer(
            place, dtype=torch.float32, camera=camera or self.recipe.model.camera
        )
        return self._checked(network.to(self.device), str(place))

    def _checked(self, network: CausalWanTransformer, name: str) -> CausalWanTransformer:
        """The network, when it reads what the clips and prompts hold."""
        reads = (network.config.in_channels, network.config.text_dim)
        given = (self._clips.channels, self.prompts.shape[1])
        if reads != given:
            raise UserError(
                f"{name}: a network for latents of {reads[0]} channels and prompts of width "
                f"{reads[1]}, the clips in {self.recipe.data.root} have {given[0]} and the "
                f"prompts {given[1]}: choose another network, or change model or data"
            )
        return network

    def load_frozen(self, source: str) -> CausalWanTransformer:
        """A transformer that only answers; it is not part of a checkpoint."""
        return self.load(source).requires_grad_(False).eval()

    def compile(self, network: CausalWanTransformer) -> None:
        """Compiles a network's blocks for the stage's one shape, if the recipe asks for it."""
        for block in network.blocks if self.recipe.run.compile else ():
            block.compile(dynamic=False)

    def _load_decoder(self) -> Autoencoder | None:
        """For the sample pictures; missing files are found now and not hours later."""
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
        """LatentClips shuffles by itself and has a fresh window for every number."""
        return list(range(drawn, drawn + count))

    def prepare(self, batch: dict, generator: torch.Generator) -> Windows:
        """Moves a batch of `LatentClips` to the device and drops some of its captions."""
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
        """Two windows, truth above dream, one column a latent; None without `data.autoencoder`."""
        if self._decoder is None:
            return None
        items = [self._clips[index] for index in (0, len(self._clips) // 2)]
        windows = self.prepare(torch.utils.data.default_collate(items), generator)
        rows = [
            self._decoder.decode(x)[:, :, ::4]
            for x in (windows.latents, self.dream(windows, generator))
        ]
        return (
            ((_sheet(rows).float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
        )

    def dream(self, windows: Windows, generator: torch.Generator) -> Tensor:
        """What the average makes of the windows' cameras from their first true chunk on, `[B, C, F,
        h, w]`.
        """
        return roll_out(self.average, windows, self.sampling(), generator)

    def sampling(self) -> RolloutConfig:
        """How the sample pictures are dreamed: the diffusion sampler with `sample_steps` steps, all
        frames in view.
        """
        frames = self.recipe.data.frames
        return with_steps(
            RolloutConfig(
                shift=self.config.shift, chunk=self.config.chunk, window=frames, sampler="euler"
            ),
            self.config.sample_steps,
        )


def teacher_forced(
    model: nn.Module,
    windows: Windows,
    chunk: int,
    clean: Tensor | None = None,
    clean_sigma: Tensor | None = None,
) -> Predict:
    """The model as a function of (noisy latents, sigma), with `clean` (default: the windows'
    latents) as context.
    """
    clean = windows.latents if clean is None else clean
    matrices = windows.projection
    return lambda x, sigma: model(
        x,
        sigma,
        windows.text,
        matrices,
        mode="teacher_forcing",
        chunk=chunk,
        clean=clean,
        clean_sigma=clean_sigma,
    )


def bidirectional(model: nn.Module, windows: Windows) -> Predict:
    """The model as a function of (noisy latents, sigma), every frame in view of every frame."""
    matrices = windows.projection
    return lambda x, sigma: model(x, sigma, windows.text, matrices, mode="bidirectional")


def roll_out(
    model: CausalWanTransformer, windows: Windows, config: RolloutConfig, generator: torch.Generator
) -> Tensor:
    """Dreams along the windows' cameras; the first chunk is the true one. Returns `[B, C, F, h,
    w]`.
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
    chunks = [windows.latents[:, :, : config.chunk]]
    rollout.commit(
        chunks[0], windows.viewmats[:, : config.chunk], windows.intrinsics[:, : config.chunk]
    )
    for start in range(config.chunk, frames, config.chunk):
        now = slice(start, start + config.chunk)
        chunks.append(
            rollout.step(windows.viewmats[:, now], windows.intrinsics[:, now], generator=generator)
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
    """Videos `[B, 3, F, H, W]`, one a row -> picture `[B rows H, F W, 3]`, the rows of one sample
    under each other.
    """
    stacked = torch.stack(rows, dim=1)  # [B, rows, 3, F, H, W]
    return stacked.permute(0, 1, 4, 3, 5, 2).flatten(3, 4).flatten(0, 2)

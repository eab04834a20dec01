"""Trains the tiny autoencoder on windows of footage: crisp edges, bounded latents, a decoder that
is robust against small errors of the latents.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from distill.config import AutoencoderConfig
from distill.data.clips import VideoWindows
from distill.ema import MovingAverage
from distill.metrics import sharpness
from distill.objectives.reconstruction import detail_term, psnr, reconstruction_terms
from distill.stages.stage import Loss, Stage
from worldmodel.camera import FRAMES_PER_LATENT
from worldmodel.errors import UserError
from worldmodel.images import to_uint8, to_unit_range
from worldmodel.models.tiny_autoencoder import (
    ENCODING_KEYS,
    MemBlock,
    TGrow,
    TinyAutoencoder,
    TPool,
)
from worldmodel.worlds.weights import load_network

_SIZE_KEYS = ("encoder_widths", "encoder_blocks", "decoder_widths", "decoder_blocks")
_LAYOUT_KEYS = ("latent_channels", "image_channels", "strides", "patch_size")  # cannot grow


class AutoencoderStage(Stage):
    """The stage `autoencoder`: one network; its `average` follows it and is exported."""

    def __init__(self, config: AutoencoderConfig, clips: Path, device: torch.device | str = "cpu"):
        self.config = config
        self.clips = Path(clips)
        self.device = torch.device(device)
        self.autoencoder = build_autoencoder(config).to(self.device)
        self.average = copy.deepcopy(self.autoencoder)
        self.autoencoder.encoder.requires_grad_(not config.freeze_encoder)
        self.modules = {"autoencoder": self.autoencoder, "average": self.average}
        trained = [
            parameter for parameter in self.autoencoder.parameters() if parameter.requires_grad
        ]
        options = {
            "lr": config.lr,
            "betas": (0.9, 0.99),
            "weight_decay": config.weight_decay,
            "fused": True,
        }
        self.optimizers = {"autoencoder": torch.optim.AdamW(trained, **options)}
        self.averages = {
            "autoencoder": MovingAverage(
                self.autoencoder, self.average, config.ema, config.ema_start
            )
        }
        self._windows: VideoWindows | None = None

    def dataset(self) -> VideoWindows:
        """All footage, decoded once."""
        if self._windows is None:
            self._windows = VideoWindows(self.clips, self.config.window, self.config.crop)
        return self._windows

    def losses(self, batch: dict, step: int, generator: torch.Generator) -> Iterator[Loss]:
        """The reconstruction loss of a batch {"video": uint8 [B,3,T,H,W]}."""
        video = to_unit_range(batch["video"].to(self.device))
        latents = self.autoencoder.encode(video).float()
        _, std = self.autoencoder.latent_statistics()
        noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(
            self.device
        )
        scale = self.config.latent_noise * latents.detach().std((0, 2, 3, 4), keepdim=True)
        decoded = self.autoencoder.decode(latents + noise * scale, clamp=False).float()
        pixel, edge, coarse = reconstruction_terms(decoded, video)
        norm = (latents * std).square().mean()
        square = (decoded - video).square().mean()
        detail = detail_term(decoded, video)
        weights = self.config
        loss = (
            pixel
            + weights.edge_weight * edge
            + weights.coarse_weight * coarse
            + weights.square_weight * square
        )
        loss = loss + weights.detail_weight * detail + weights.latent_weight * norm
        metrics = {
            "l1": pixel,
            "edge": edge,
            "detail": detail,
            "latent_norm": norm,
            "psnr": psnr(decoded.clamp(-1, 1), video),
        }
        energy, target = (
            sharpness(film.detach().transpose(1, 2).flatten(0, 1)).mean()
            for film in (decoded, video)
        )
        metrics["sharpness"] = energy / target.clamp(min=1e-9)
        yield "autoencoder", loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> np.ndarray:
        """Ground truth above, reconstruction below: first and last frames of four windows, uint8
        [2H, 8W, 3].
        """
        windows = self.dataset()
        chosen = torch.randint(
            len(windows), (4,), generator=generator, device=generator.device
        ).tolist()
        video = to_unit_range(
            torch.stack([windows[index]["video"] for index in chosen]).to(self.device)
        )
        decoded = self.average.decode(self.average.encode(video)).float()
        rows = [torch.cat([clip[:, :, 0], clip[:, :, -1]]) for clip in (video, decoded)]
        picture = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
        return to_uint8(picture.permute(1, 2, 0)).cpu().numpy()

    def export(self, folder: Path) -> None:
        """Measure the latents' mean and std over the footage and write the averaged autoencoder.

        With `freeze_encoder` the statistics stay as they are, so that existing latents stay valid.
        """
        if not self.config.freeze_encoder:
            measure_latents(self.average, self.dataset().clips, self.device)
        self.average.save_pretrained(folder)


def build_autoencoder(config: AutoencoderConfig) -> TinyAutoencoder:
    """A network of the config's sizes; with `start`, from the trained one there, which may be
    smaller (see `grow_autoencoder`).

    Raises UserError where `start` is missing or does not fit.
    """
    if config.freeze_encoder and not config.start:
        raise UserError(
            "expected `start` with freeze_encoder: an encoder with random weights cannot be kept; "
            "name a trained folder"
        )
    names = ("latent_channels", *_SIZE_KEYS, "strides", "patch_size", "upscale")
    network = TinyAutoencoder(**{name: vars(config)[name] for name in names})
    if config.start:
        trained = load_network(TinyAutoencoder, config.start)
        grow_autoencoder(network, trained, config.start, same_encoder=config.freeze_encoder)
    return network


@torch.no_grad()
def measure_latents(
    autoencoder: TinyAutoencoder, clips: Sequence[Tensor], device: torch.device, frames: int = 17
) -> None:
    """Set the autoencoder's per-channel statistics from the raw latents of the middle `frames` (4F
    - 3) of every clip.

    clips: uint8 [T,H,W,3] each.
    """
    channels = autoencoder.config.latent_channels
    autoencoder.set_latent_statistics(torch.zeros(channels), torch.ones(channels))
    latents = []
    for clip in tqdm(clips, "latent statistics", unit="clip"):
        length = min(frames, len(clip) - (len(clip) - 1) % FRAMES_PER_LATENT)
        start = (len(clip) - length) // 2
        video = to_unit_range(clip[start : start + length].to(device)).permute(3, 0, 1, 2)
        latents.append(autoencoder.encode(video[None])[0].flatten(1).float())
    std, mean = torch.std_mean(torch.cat(latents, 1), 1)
    autoencoder.set_latent_statistics(mean, std.clamp(min=1e-6))


@torch.no_grad()
def grow_autoencoder(
    network: TinyAutoencoder, trained: TinyAutoencoder, name: str, same_encoder: bool = False
) -> None:
    """Give `network` the weights and latent statistics of `trained`, which has its sizes or smaller
    ones, so that both compute the same; with a larger `upscale`, the same picture enlarged by
    repeating pixels.

    New channels read their inputs but no existing channel reads them; new blocks pass their input
    on. Source: Net2Net (arXiv 1511.05641), with zeros instead of copies for what is new.

    Args:
        name: of `trained`, in error messages.
        same_encoder: the encoder must not grow, since existing latents must stay valid.
    Raises:
        UserError: `trained` is larger somewhere or has another layout.
    """
    for key in _LAYOUT_KEYS + (ENCODING_KEYS if same_encoder else ()):
        if _as_list(network.config[key]) != _as_list(trained.config[key]):
            raise UserError(
                f"{name}: an autoencoder with {key} {trained.config[key]}, the recipe says "
                f"{network.config[key]}: its encoder does not fit; set autoencoder.{key}, or "
                "leave autoencoder.start empty"
            )
    if network.upscale % trained.upscale:
        raise UserError(
            f"{name}: an autoencoder with upscale {trained.upscale} cannot become one with "
            f"{network.upscale}: set autoencoder.upscale to a multiple"
        )
    for key in _SIZE_KEYS:
        if any(
            old > new for new, old in zip(network.config[key], trained.config[key], strict=True)
        ):
            sizes = f"{key} {trained.config[key]} cannot shrink to {network.config[key]}"
            raise UserError(f"{name}: an autoencoder with {sizes}: raise autoencoder.{key}")
    for layers, old_layers in (
        (network.encoder, trained.encoder),
        (network.decoder, trained.decoder),
    ):
        old = dict(_layers_by_key(old_layers))
        for key, layer in _layers_by_key(layers):
            if layer is network.decoder[-1]:
                _repeat_pixels(layer, network, trained)
            elif key in old:
                _grow_layer(layer, old[key])
            else:  # a new block
                nn.init.zeros_(layer.conv[-1].weight)
                nn.init.zeros_(layer.conv[-1].bias)
    network.set_latent_statistics(*(values.flatten() for values in trained.latent_statistics()))


def _repeat_pixels(last: nn.Conv2d, network: TinyAutoencoder, trained: TinyAutoencoder) -> None:
    """The last layer's outputs are patches [channel, row, column]: a larger patch repeats the
    smaller one's pixels.
    """
    old = trained.config.patch_size * trained.upscale
    new = network.config.patch_size * network.upscale
    row = torch.arange(new) * old // new
    pixels = torch.arange(trained.config.image_channels)[:, None, None] * old**2
    source = (pixels + row[:, None] * old + row).flatten()
    last.weight.zero_()
    inputs = trained.decoder[-1].weight.shape[1]
    last.weight[:, :inputs] = trained.decoder[-1].weight[source]
    last.bias.copy_(trained.decoder[-1].bias[source])


def _layers_by_key(layers: nn.Sequential) -> Iterator[tuple[tuple, nn.Module]]:
    """Every layer with a key that stays when blocks are added: (level, "block" or "layer",
    number).
    """
    level = 0
    numbers = {}
    for layer in layers:
        kind = "block" if isinstance(layer, MemBlock) else "layer"
        if isinstance(layer, TPool | TGrow):
            level = level + 1
            numbers = {}
        numbers[kind] = numbers.get(kind, -1) + 1
        yield (level, kind, numbers[kind]), layer


def _grow_layer(layer: nn.Module, old: nn.Module) -> None:
    """Copy `old` into `layer` of the same kind; the old outputs do not read the new inputs."""
    if isinstance(layer, MemBlock):
        _grow_conv(layer.conv[0], old.conv[0], inputs=2)  # this frame and the one before
        _grow_conv(layer.conv[2], old.conv[2])
        _grow_conv(layer.conv[4], old.conv[4])
    elif isinstance(layer, TPool):
        _grow_conv(layer.conv, old.conv, inputs=layer.stride)
    elif isinstance(layer, TGrow):
        _grow_conv(layer.conv, old.conv, outputs=layer.stride)
    elif isinstance(layer, nn.Conv2d):
        _grow_conv(layer, old)


def _grow_conv(conv: nn.Conv2d, old: nn.Conv2d, inputs: int = 1, outputs: int = 1) -> None:
    """Channels come in `inputs` and `outputs` groups of equal size; every group grows at its
    end.
    """

    def grouped(weight: Tensor) -> Tensor:  # [outputs, channels, inputs, channels, 3, 3], a view
        return weight.unflatten(1, (inputs, -1)).unflatten(0, (outputs, -1))

    weight = grouped(conv.weight)
    before = grouped(old.weight)
    rows = before.shape[1]
    columns = before.shape[3]
    weight[:, :rows, :, columns:] = 0
    weight[:, :rows, :, :columns] = before
    if conv.bias is not None:
        conv.bias.unflatten(0, (outputs, -1))[:, :rows] = old.bias.unflatten(0, (outputs, -1))


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple | list) else value

"""Video autoencoders that run live, latent by latent, with one face: our tiny one, and Wan2.1's own
(`WanAutoencoder`, at the end).

The tiny one has TAEHV's layers and parameter names, with widths from a config. Source:
madebyollin/taehv (`taehv.py`), whose published widths are the defaults here, so `taew2_1` weights
load by name. Every layer looks only at the current and the previous frame, therefore a clip and a
live stream go through the same code: a stream is a clip that comes in pieces, with one remembered
feature map per `MemBlock`.

Differs: pixels are [-1, 1] at our edge ([0, 1] inside); pixel frame 0 alone is latent 0 (it is
repeated to fill its group of four, and the first three of the frames decoded from latent 0 are
dropped), so F latents are 4F - 3 frames; latents are normalised per channel by `latents_mean` /
`latents_std`.
"""

from collections.abc import Iterator, Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from worldmodel.camera import FRAMES_PER_LATENT
from worldmodel.errors import UserError
from worldmodel.models.streaming import Stream, StreamState, _check_latents, _check_video

ENCODING_KEYS = (
    "latent_channels",
    "image_channels",
    "encoder_widths",
    "encoder_blocks",
    "strides",
    "patch_size",
)  # what latents depend on
POOLS = (2, 2, 1)  # frames merged at each encoder level; the decoder undoes them in reverse


class MemBlock(nn.Module):
    """Residual block over a frame and the same features of the frame before it (zeros before the
    first).
    """

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width_in, width),
            nn.ReLU(),
            _conv(width, width),
            nn.ReLU(),
            _conv(width, width),
        )
        self.skip = (
            nn.Conv2d(width_in, width, 1, bias=False) if width_in != width else nn.Identity()
        )

    def forward(self, x: Tensor, batch: int, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B*T,C,H,W] (T fastest), memory [B,C,H,W] or None -> (result, memory for the next call:
        the last input frame).
        """
        past, memory = _delayed(x, batch, memory)
        return functional.relu(self.conv(torch.cat([x, past], 1)) + self.skip(x)), memory


class TPool(nn.Module):
    """Merges `stride` consecutive frames into one."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return self.conv(x)
        grouped = x.unflatten(0, (-1, self.stride))
        return self.conv(torch.cat(grouped.unbind(1), 1))


class TGrow(nn.Module):
    """Makes `stride` consecutive frames out of one."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return torch.stack(x.chunk(self.stride, 1), 1).flatten(0, 1) if self.stride > 1 else x


class Clamp(nn.Module):
    """Soft limit of the latents to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _TinyStream(Stream):
    """A stack of layers; every `MemBlock` remembers one feature map, [B,C,H,W]."""

    def __init__(self, model: "TinyAutoencoder", layers: nn.Sequential):
        blocks = [place for place, layer in enumerate(layers) if isinstance(layer, MemBlock)]
        super().__init__(len(blocks))
        self._model = model
        self._layers = layers
        self._memory_at = {place: number for number, place in enumerate(blocks)}

    def _run(self, x: Tensor, apart: bool = False) -> Iterator[Tensor]:
        """x [B,C,T,H,W] -> [B,C',T',H',W'] in one piece, or frame by frame; advances the memory
        when all layers have succeeded.

        apart: frames that are made out of one go their ways one after the other, the first to the
        very end before the second begins.
        """
        batch = x.shape[0]
        memories = list(self._state.memories)
        self._check_batch(batch)
        x = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        for piece in self._flow(0, x, batch, memories, apart):
            yield piece.unflatten(0, (batch, -1)).transpose(1, 2)
        self._state = StreamState(True, tuple(memories))

    def _flow(
        self, start: int, x: Tensor, batch: int, memories: list[Tensor | None], apart: bool
    ) -> Iterator[Tensor]:
        """x [B*T,C,H,W] through the layers from number `start` on."""
        for place in range(start, len(self._layers)):
            layer = self._layers[place]
            number = self._memory_at.get(place)
            if number is None:
                x = layer(x)
            else:
                x, memories[number] = layer(x, batch, memories[number])
            if apart and isinstance(layer, TGrow) and layer.stride > 1:
                for frame in x.unflatten(0, (batch, -1)).unbind(1):
                    yield from self._flow(place + 1, frame, batch, memories, apart)
                return
        yield x


class StreamingEncoder(_TinyStream):
    """Encodes live video: one frame first, then four (or any multiple of four) a step.

    reduced: the video has the encoder's resolution, `upscale` times smaller than pictures.
    """

    def __init__(self, model: "TinyAutoencoder", layers: nn.Sequential, reduced: bool = False):
        super().__init__(model, layers)
        self._scale = 1 if reduced else model.upscale

    def step(self, video: Tensor) -> Tensor:
        """video [B,3,T,H,W] in [-1, 1], T = 1 (or 4f - 3) first and 4f later -> normalised latents
        [B,C,f,h,w].
        """
        model = self._model
        factor = model.spatial_factor * self._scale // model.upscale
        _check_video(video, model.config.image_channels, factor, self._state.started)
        x = (video.to(model.dtype) + 1) / 2
        if not self._state.started:
            x = torch.cat([x[:, :, :1].expand(-1, -1, FRAMES_PER_LATENT - 1, -1, -1), x], 2)
        if self._scale > 1:
            pooled = functional.avg_pool3d(x.float(), (1, self._scale, self._scale))
            x = pooled.to(model.dtype)  # CPUs do not pool bfloat16
        if model.config.patch_size > 1:
            x = functional.pixel_unshuffle(x.transpose(1, 2), model.config.patch_size).transpose(
                1, 2
            )
        mean, std = model.latent_statistics()
        (latents,) = self._run(x)
        return (latents - mean) / std


class StreamingDecoder(_TinyStream):
    """Decode a stream of latents: the first gives one frame, each later one four."""

    def step(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Normalised latents [B,C,f,h,w] -> video [B,3,T,H,W] in [-1, 1]; T = 4f - 3 on the first
        call, 4f later.

        Args:
            clamp: limit the result to [-1, 1]; training leaves it off, so that no pixel loses its
            gradient.
        """
        (video,) = self._decode(latents, clamp, apart=False)
        return video

    def frames(self, latents: Tensor) -> Iterator[Tensor]:
        """As `step`, a frame [B,3,1,H,W] at a time, of which all must be asked for. The first is
        early: in `blocks` after two thirds of the work.
        """
        return self._decode(latents, clamp=True, apart=True)

    def _decode(self, latents: Tensor, clamp: bool, apart: bool) -> Iterator[Tensor]:
        model = self._model
        model.check_latents(latents)
        mean, std = model.latent_statistics()
        dropped = 0 if self._state.started else FRAMES_PER_LATENT - 1
        for x in self._run(latents.to(model.dtype) * std + mean, apart):
            skipped = min(dropped, x.shape[2])
            dropped -= skipped
            if skipped == x.shape[2]:
                continue
            x = x[:, :, skipped:]
            patch = model.config.patch_size * model.upscale
            if patch > 1:
                x = functional.pixel_shuffle(x.transpose(1, 2), patch).transpose(1, 2)
            x = x * 2 - 1
            yield x.clamp(-1, 1) if clamp else x


class TinyAutoencoder(ModelMixin, ConfigMixin):
    """Encoder and decoder small enough for live play on two CPU cores.

    Args:
        encoder_widths: channels of the stem and of the three levels, from pixels to latents.
        encoder_blocks: `MemBlock`s in each of the three encoder levels.
        decoder_widths: channels of the three levels, from latents to pixels, and of the last layer
        before the picture.
        decoder_blocks: `MemBlock`s in each of the three decoder levels.
        strides: spatial reduction of the three encoder levels (the decoder undoes it in reverse),
        each 1 or 2.
        patch_size: pixels of a side folded into channels before the encoder and unfolded after the
        decoder; 2 with strides (1, 2, 2) keeps the 8x reduction and makes the layers at the highest
        resolution four times cheaper.
        upscale: pictures have this many times the encoder's resolution: the encoder averages them
        first, the decoder unfolds patches of `patch_size * upscale` pixels. An encoder trained with
        1 stays valid.
        latents_mean, latents_std: per channel, of the raw latents; None is 0 and 1 (public weights
        need no other).
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        image_channels: int = 3,
        encoder_widths: Sequence[int] = (64, 64, 64, 64),
        encoder_blocks: Sequence[int] = (3, 3, 3),
        decoder_widths: Sequence[int] = (256, 128, 64, 64),
        decoder_blocks: Sequence[int] = (3, 3, 3),
        strides: Sequence[int] = (2, 2, 2),
        patch_size: int = 1,
        upscale: int = 1,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ):
        super().__init__()
        lengths = (
            len(encoder_widths),
            len(encoder_blocks),
            len(decoder_widths),
            len(decoder_blocks),
            len(strides),
        )
        if patch_size < 1 or upscale < 1:
            raise UserError(
                f"expected patch_size and upscale of at least 1, got {patch_size} and {upscale}"
            )
        if lengths != (4, 3, 4, 3, 3) or set(strides) - {1, 2}:
            raise UserError(
                "expected 4 widths and 3 block counts for encoder and decoder and 3 strides of 1 "
                f"or 2, got encoder {tuple(encoder_widths)} {tuple(encoder_blocks)}, decoder "
                f"{tuple(decoder_widths)} {tuple(decoder_blocks)}, strides {tuple(strides)}"
            )
        pixels = image_channels * patch_size**2
        self.encoder = _encoder(pixels, latent_channels, encoder_widths, encoder_blocks, strides)
        self.decoder = _decoder(
            pixels * upscale**2, latent_channels, decoder_widths, decoder_blocks, strides[::-1]
        )
        for name, values, default in (("mean", latents_mean, 0.0), ("std", latents_std, 1.0)):
            values = (
                [default] * latent_channels
                if values is None
                else [float(value) for value in values]
            )
            if len(values) != latent_channels:
                raise UserError(
                    f"expected latents_{name} with {latent_channels} values, got {len(values)}"
                )
            self.register_buffer(
                f"_latents_{name}", torch.tensor(values).view(-1, 1, 1, 1), persistent=False
            )
        self._initialise()
        self.to(memory_format=torch.channels_last)

    def _initialise(self) -> None:
        """Weights for training from scratch: twice torch's default, blocks near the identity, grey
        in, grey out.

        Measured on town footage: 21 dB after 240 small steps; 14 dB with He's initialisation and a
        small last layer, which waits long at the grey picture.
        """
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.weight.mul_(2.0)
            for block in (layer for layer in self.modules() if isinstance(layer, MemBlock)):
                block.conv[-1].weight.mul_(0.3)
            self.encoder[0].bias.copy_(-0.5 * self.encoder[0].weight.sum((1, 2, 3)))
            self.decoder[-1].bias.fill_(0.5)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As diffusers' method of this name; weights are laid out channels last, which is a fifth
        faster on CPUs.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).to(memory_format=torch.channels_last)
        return loaded

    @property
    def spatial_factor(self) -> int:
        """Pixels of a side to one latent cell."""
        first, second, third = self.config.strides
        return self.upscale * self.config.patch_size * first * second * third

    @property
    def encoder_factor(self) -> int:
        """Pixels of a side to one latent cell, at the encoder's resolution."""
        return self.spatial_factor // self.upscale

    @property
    def upscale(self) -> int:
        """Resolution of pictures / resolution of the encoder."""
        return self.config.upscale

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.config.latent_channels

    def encoding_parts(self) -> tuple[dict, Iterator[tuple[str, Tensor]]]:
        """Options and named tensors that latents depend on: what names an encoding (the decoder may
        be trained on without a new one).
        """
        return {key: self.config[key] for key in ENCODING_KEYS}, iter(
            self.encoder.state_dict().items()
        )

    def encode(self, video: Tensor) -> Tensor:
        """video [B,3,T,H,W] in [-1, 1], T = 4F - 3 -> normalised latents [B,C,F,h,w] in the
        module's type.
        """
        return self.streaming_encoder().step(video)

    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Normalised latents [B,C,F,h,w] -> video [B,3,4F-3,H,W] in [-1, 1] (beyond it a little
        with clamp=False).
        """
        return self.streaming_decoder().step(latents, clamp=clamp)

    def streaming_encoder(self, reduced: bool = False) -> StreamingEncoder:
        """An encoder for video that comes piece by piece; see `StreamingEncoder`."""
        return StreamingEncoder(self, self.encoder, reduced)

    def streaming_decoder(self) -> StreamingDecoder:
        """A decoder for latents that come one by one."""
        return StreamingDecoder(self, self.decoder)

    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the raw latents, each [C,1,1,1]."""
        return self._latents_mean, self._latents_std

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Sets mean and std [C] of the raw latents, here and in the config that is saved."""
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise UserError(
                f"expected finite latent statistics with std > 0, got mean {mean.tolist()}, std "
                f"{std.tolist()}"
            )
        self._latents_mean.copy_(mean.view(-1, 1, 1, 1))
        self._latents_std.copy_(std.view(-1, 1, 1, 1))
        self.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())

    def check_video(self, video: Tensor, *, started: bool = False) -> None:
        """UserError unless the video's axes, frame count and size fit."""
        _check_video(video, self.config.image_channels, self.spatial_factor, started)

    def check_latents(self, latents: Tensor) -> None:
        """ValueError unless the latents' axes fit."""
        _check_latents(latents, self.latent_channels)


def _conv(width_in: int, width: int, **options) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, 3, padding=1, **options)


def _encoder(
    pixels: int, latents: int, widths: Sequence[int], blocks: Sequence[int], strides: Sequence[int]
):
    """Layers in TAEHV's order; their places give the parameter names."""
    layers = [_conv(pixels, widths[0]), nn.ReLU()]
    for level, (pool, stride) in enumerate(zip(POOLS, strides, strict=True)):
        before, width = widths[level : level + 2]
        layers += [TPool(before, pool), _conv(before, width, stride=stride, bias=False)]
        layers += [MemBlock(width, width) for _ in range(blocks[level])]
    return nn.Sequential(*layers, _conv(widths[3], latents))


def _decoder(
    pixels: int, latents: int, widths: Sequence[int], blocks: Sequence[int], strides: Sequence[int]
):
    """Layers in TAEHV's order; their places give the parameter names."""
    layers = [Clamp(), _conv(latents, widths[0]), nn.ReLU()]
    for level, (grow, stride) in enumerate(zip(POOLS[::-1], strides, strict=True)):
        width, after = widths[level : level + 2]
        layers += [MemBlock(width, width) for _ in range(blocks[level])]
        layers += [
            nn.Upsample(scale_factor=stride),
            TGrow(width, grow),
            _conv(width, after, bias=False),
        ]
    return nn.Sequential(*layers, nn.ReLU(), _conv(widths[3], pixels))


def _delayed(x: Tensor, batch: int, memory: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [B*T,C,H,W] one frame later with `memory` in front, and the last frame, which leaves at the
    end.
    """
    frames = x.unflatten(0, (batch, -1))
    first = torch.zeros_like(frames[:, 0]) if memory is None else memory.to(x.dtype)
    last = frames[:, -1]
    if frames.shape[1] == 1:
        return first, last
    # A copy, so that the memory does not keep the whole clip's features alive.
    return torch.cat([first[:, None], frames[:, :-1]], 1).flatten(0, 1), last.clone()


# -------------------- Wan2.1's own

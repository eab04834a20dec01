"""Wan2.1's own autoencoder (diffusers' `AutoencoderKLWan`) as whole clips and as streams."""

from collections.abc import Iterator, Sequence

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from worldmodel.camera import FRAMES_PER_LATENT
from worldmodel.errors import UserError
from worldmodel.models.streaming import Stream, StreamState, _check_latents, _check_video
from worldmodel.models.tiny_autoencoder import TinyAutoencoder


class WanAutoencoder(nn.Module):
    """Wan2.1's autoencoder, diffusers' `AutoencoderKLWan`, behind the methods of `TinyAutoencoder`.

    The streams run its encoder and decoder one latent at a time with a feature cache of our own;
    joined, their pieces equal diffusers' whole-clip results bit for bit. Latents are the means of
    the posterior, normalised by the config's `latents_mean` and `latents_std`.
    Source: Wan2.1 `vae.py` as in diffusers. Differs: the result is not sampled.
    """

    def __init__(self, network: AutoencoderKLWan):
        super().__init__()
        if network.config.patch_size is not None or network.config.is_residual:
            raise UserError(
                "expected the autoencoder of Wan2.1, got that of Wan2.2 (folded pixels): use a "
                "Wan2.1 model"
            )
        self.network = network
        for name in ("mean", "std"):
            values = torch.tensor(network.config[f"latents_{name}"], device=network.device).view(
                -1, 1, 1, 1
            )
            self.register_buffer(f"_latents_{name}", values, persistent=False)

    config = property(lambda self: self.network.config)
    device = property(lambda self: self.network.device)
    dtype = property(lambda self: self.network.dtype)
    spatial_factor = property(lambda self: self.network.spatial_compression_ratio)
    latent_channels = property(lambda self: self.network.config.z_dim)

    def encode(self, video: Tensor) -> Tensor:
        """video [B,3,T,H,W] in [-1, 1], T = 4F - 3 -> normalised latents [B,C,F,h,w] in the
        module's type.
        """
        return self.streaming_encoder().step(video)

    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Normalised latents [B,C,F,h,w] -> video [B,3,4F-3,H,W] in [-1, 1]."""
        return self.streaming_decoder().step(latents, clamp=clamp)

    @property
    def encoder_factor(self) -> int:
        """As `spatial_factor`: pictures have the encoder's resolution."""
        return self.spatial_factor

    def streaming_encoder(self, reduced: bool = False) -> "WanStreamingEncoder":
        """An encoder for video that comes piece by piece; pictures have its own resolution, so
        `reduced` changes nothing.
        """
        return WanStreamingEncoder(self)

    def streaming_decoder(self) -> "WanStreamingDecoder":
        """A decoder for latents that come one by one."""
        return WanStreamingDecoder(self)

    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the raw latents, each [C,1,1,1]."""
        return self._latents_mean, self._latents_std

    def encoding_parts(self) -> tuple[dict, Iterator[tuple[str, Tensor]]]:
        """Options and named tensors that latents depend on, as `TinyAutoencoder.encoding_parts`."""
        keys = (
            "base_dim",
            "z_dim",
            "dim_mult",
            "num_res_blocks",
            "attn_scales",
            "temperal_downsample",
            "in_channels",
        )
        tensors = self.network.state_dict().items()
        return {key: self.config[key] for key in keys}, (
            (n, t) for n, t in tensors if n.startswith(("encoder.", "quant_conv."))
        )

    def save_pretrained(self, folder, **options) -> None:
        """Writes diffusers' own folder."""
        self.network.save_pretrained(folder, **options)

    def check_video(self, video: Tensor, *, started: bool = False) -> None:
        """UserError unless the video's axes, frame count and size fit."""
        _check_video(video, self.config.in_channels, self.spatial_factor, started)

    def check_latents(self, latents: Tensor) -> None:
        """ValueError unless the latents' axes fit."""
        _check_latents(latents, self.latent_channels)


class _WanStream(Stream):
    """diffusers' list of remembered frames, one entry a causal convolution.

    An upsampler that has seen one latent leaves a word there instead of frames; in our state that
    is an empty tensor.
    """

    _WORD = "Rep"
    _tells_first = False  # whether the part takes `first_chunk`

    def __init__(self, model: WanAutoencoder, part: str):
        super().__init__(model.network._cached_conv_counts[part])
        self._model = model
        self._part = getattr(model.network, part)

    def _run(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """What the part makes of each piece [B,C,T,H,W]; advances the memory only when all have
        succeeded.
        """
        self._check_batch(pieces[0].shape[0])
        memory = [
            self._WORD if m is not None and not m.numel() else m for m in self._state.memories
        ]
        results = []
        for index, piece in enumerate(pieces):
            first = (
                {"first_chunk": index == 0 and not self._state.started} if self._tells_first else {}
            )
            results.append(self._part(piece, feat_cache=memory, feat_idx=[0], **first))
        empty = torch.empty(0, device=self._model.device)
        self._state = StreamState(True, tuple(empty if isinstance(m, str) else m for m in memory))
        return results


class WanStreamingEncoder(_WanStream):
    """Encodes live video: one frame first, then four (or any multiple of four) a step."""

    def __init__(self, model: WanAutoencoder):
        super().__init__(model, "encoder")

    def step(self, video: Tensor) -> Tensor:
        """video [B,3,T,H,W] in [-1, 1], T = 1 (or 4f - 3) first and 4f later -> normalised latents
        [B,C,f,h,w].
        """
        model = self._model
        model.check_video(video, started=self._state.started)
        video = video.to(model.dtype)
        lone = 0 if self._state.started else 1
        pieces = [video[:, :, :lone], *video[:, :, lone:].split(FRAMES_PER_LATENT, 2)]
        features = self._run([piece for piece in pieces if piece.shape[2]])
        raw = torch.cat([model.network.quant_conv(piece) for piece in features], 2)[
            :, : model.latent_channels
        ]
        mean, std = model.latent_statistics()
        return (raw - mean.to(raw.dtype)) / std.to(raw.dtype)


class WanStreamingDecoder(_WanStream):
    """Decode a stream of latents: the first gives one frame, each later one four."""

    _tells_first = True

    def __init__(self, model: WanAutoencoder):
        super().__init__(model, "decoder")

    def step(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Normalised latents [B,C,f,h,w] -> video [B,3,T,H,W] in [-1, 1]; T = 4f - 3 on the first
        call, 4f later.
        """
        model = self._model
        model.check_latents(latents)
        mean, std = model.latent_statistics()
        raw = latents.to(model.dtype) * std.to(model.dtype) + mean.to(model.dtype)
        pieces = [model.network.post_quant_conv(piece) for piece in raw.split(1, 2)]
        video = torch.cat(self._run(pieces), 2)
        return video.clamp(-1, 1) if clamp else video

    def frames(self, latents: Tensor) -> Iterator[Tensor]:
        """As `step`, the frames of a latent at a time."""
        for latent in latents.split(1, 2):
            yield self.step(latent)


Autoencoder = TinyAutoencoder | WanAutoencoder

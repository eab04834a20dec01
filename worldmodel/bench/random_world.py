"""Worlds of random weights, as fast as trained ones of their shape.

No files are needed: weights are drawn on the device that uses them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from worldmodel.camera import FRAMES_PER_LATENT
from worldmodel.controls import Envelope
from worldmodel.errors import UserError
from worldmodel.models.prompts import PromptBook
from worldmodel.models.streaming import Stream, StreamState
from worldmodel.models.tiny_autoencoder import TinyAutoencoder
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.models.wan_autoencoder import Autoencoder, WanAutoencoder
from worldmodel.rollout import RolloutConfig
from worldmodel.worlds.catalog import published_worlds
from worldmodel.worlds.config import PromptConfig, WorldConfig
from worldmodel.worlds.convert import PublishedWorld
from worldmodel.worlds.world import World

AUTOENCODERS = ("tiny", "wan", "none")


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer with cameras (PRoPE)."""

    layers: int
    width: int  # channels
    heads: int
    ffn_dim: int
    text_dim: int = 64
    text_length: int = 4  # rows of an embedded prompt
    published: bool = False  # a Wan2.1: its usual picture is 480x832, its tiny autoencoder taew2_1

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read the name of a published shape, or `LAYERSxWIDTHxHEADS[xFFN]`, for example 8x256x4
        (FFN: four times the width).

        Raises UserError for anything else.
        """
        if text.lower() in SHAPES:
            return SHAPES[text.lower()]
        parts = text.lower().split("x")
        if len(parts) not in (3, 4) or not all(part.isdecimal() and int(part) for part in parts):
            raise UserError(
                f"expected {', '.join(SHAPES)} or LAYERSxWIDTHxHEADS[xFFN] such as 8x256x4, got "
                f"{text!r}"
            )
        layers, width, heads, *ffn_dim = map(int, parts)
        if width % (4 * heads):
            raise UserError(
                f"expected a width that is a multiple of 4 x {heads} heads, got {width} in {text!r}"
            )
        return cls(layers, width, heads, *(ffn_dim or [4 * width]))

    @property
    def size(self) -> tuple[int, int]:
        """Default height and width of the picture, pixels."""
        return (480, 832) if self.published else (96, 160)

    def transformer(self, device: torch.device, dtype: torch.dtype) -> CausalWanTransformer:
        """Build the transformer with random weights on `device`."""
        with torch.device("meta"):
            network = CausalWanTransformer(
                num_attention_heads=self.heads,
                attention_head_dim=self.width // self.heads,
                num_layers=self.layers,
                ffn_dim=self.ffn_dim,
                text_dim=self.text_dim,
            )
        return draw_weights(network, device, dtype)


SHAPES = {
    "wan2.1-1.3b": Shape(30, 1536, 12, 8960, 4096, 512, published=True),
    "wan2.1-14b": Shape(40, 5120, 40, 13824, 4096, 512, published=True),
}


def draw_weights(
    network: CausalWanTransformer, device: torch.device, dtype: torch.dtype
) -> CausalWanTransformer:
    """Give a network on the meta device random weights on `device`, tensor by tensor.

    What `from_pretrained` keeps in float32 is float32 here too. Matrices are scaled so that they
    keep the variance of their input; norm weights are 1, biases 0.
    """
    float32_modules = set(network._keep_in_fp32_modules)

    def draw(name: str, like: Tensor) -> Tensor:
        kept = float32_modules & set(name.split("."))
        options = {"device": device, "dtype": torch.float32 if kept else dtype}
        if like.ndim > 1:
            inputs = like.numel() // like.shape[0]
            return torch.randn(like.shape, **options).mul_(inputs**-0.5)
        return torch.full(like.shape, float(name.endswith("weight")), **options)

    weights = {name: draw(name, tensor) for name, tensor in network.state_dict().items()}
    network.load_state_dict(weights, assign=True)
    return network


def random_world(
    shape: Shape, config: WorldConfig, autoencoder: str, device: torch.device, dtype: torch.dtype
) -> World:
    """Build a world with random weights and no start images.

    autoencoder: one of AUTOENCODERS. Raises UserError for a picture size that does not fit.
    """
    if config.height % 16 or config.width % 16 or min(config.height, config.width) < 16:
        raise UserError(
            f"expected a picture size in multiples of 16 pixels, got {config.height}x{config.width}"
        )
    torch.manual_seed(0)
    transformer = shape.transformer(device, dtype).eval().requires_grad_(False)
    decoder = nn.Module.to(_autoencoder(autoencoder, shape.published), dtype)
    decoder.eval().requires_grad_(False)
    prompts = PromptBook({config.prompts.default: torch.randn(shape.text_length, shape.text_dim)})
    return World(Path("random"), config, transformer, decoder, prompts, device, dtype)


def random_config(shape: Shape, world: Path | None, size: tuple[int, int] | None) -> WorldConfig:
    """The config of a random world.

    Args:
        world: a bundle, a file of configs/worlds or its name, for size, steps, window and motion;
            None = the defaults of the shape.
        size: height and width in pixels; None = the world's, or the shape's.

    Raises UserError for an unknown world.
    """
    like = None if world is None else _read(world)
    height, width = size or (shape.size if like is None else (like.height, like.width))
    return WorldConfig(
        name="random" if like is None else f"random, as {world.stem}",
        title="Random weights",
        height=height,
        width=width,
        fps=like.fps if like else 16.0,
        intrinsics=like.intrinsics if like else (0.5, 0.8333, 0.5, 0.5),
        envelope=like.envelope if like else Envelope(),
        rollout=like.rollout if like else RolloutConfig(),
        prompts=PromptConfig(default="random"),
    )


def _read(world: Path) -> WorldConfig | PublishedWorld:
    if (world / "world.yaml").is_file():
        return WorldConfig.read(world / "world.yaml")
    named = published_worlds() / f"{world}.yaml"
    if not (named if named.is_file() else world).is_file():
        known = ", ".join(sorted(path.stem for path in published_worlds().glob("*.yaml")))
        raise UserError(
            "expected --world as a world's folder, a YAML file as in configs/worlds, or one of "
            f"{known}, got {str(world)!r}"
        )
    return PublishedWorld.read(named if named.is_file() else world)


def _autoencoder(name: str, published: bool) -> "Autoencoder | NoAutoencoder":
    if name == "none":
        return NoAutoencoder()
    if name == "wan":
        return WanAutoencoder(AutoencoderKLWan())
    if published:
        return TinyAutoencoder()
    return TinyAutoencoder(  # the embedded world's
        encoder_widths=(32, 32, 64, 128),
        encoder_blocks=(1, 2, 2),
        decoder_widths=(160, 96, 48, 48),
        decoder_blocks=(3, 2, 1),
        strides=(1, 2, 2),
        patch_size=2,
    )


class NoAutoencoder(nn.Module):
    """Takes a latent's first cell as its picture, for figures without decoding."""

    spatial_factor = 8
    latent_channels = 16

    def streaming_decoder(self) -> "NoDecoder":
        return NoDecoder(0)


class NoDecoder(Stream):
    """The stream of `NoAutoencoder`: as many frames as a decoder returns, of one pixel."""

    def step(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, f, h, w]` -> video `[B, 3, T, 1, 1]`."""
        frames = latents.shape[2] * FRAMES_PER_LATENT
        if not self._state.started:  # the first latent is one frame
            frames -= FRAMES_PER_LATENT - 1
        self._state = StreamState(True, ())
        return latents[:, :3, -1:, :1, :1].expand(-1, -1, frames, -1, -1)

    def frames(self, latents: Tensor) -> Iterator[Tensor]:
        yield self.step(latents)

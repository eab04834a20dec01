"""A trained autoencoder as the start of a larger one that does the same at first.

New channels read what they like and nobody reads them; new blocks pass their input on. Source:
Net2Net (arXiv 1511.05641), with zeros instead of copies for what is new.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from worldmodel.errors import UserError
from worldmodel.models.tiny_autoencoder import (
    ENCODING_KEYS,
    MemBlock,
    TGrow,
    TinyAutoencoder,
    TPool,
)

SHAPE_KEYS = ("latent_channels", "image_channels", "strides", "patch_size")  # what cannot grow


@torch.no_grad()
def grow_autoencoder(
    network: TinyAutoencoder, trained: TinyAutoencoder, name: str, same_encoder: bool = False
) -> None:
    """Gives `network` the weights of `trained`, which has its sizes or smaller ones, and its latent
    statistics.

    same_encoder: the encoder may not grow, since latents that were made before must stay valid.
    Raises ValueError that names `name` and the option when `trained` is larger somewhere or has
    another layout.
    """
    for key in SHAPE_KEYS + (ENCODING_KEYS if same_encoder else ()):
        if _plain(network.config[key]) != _plain(trained.config[key]):
            raise UserError(
                f"{name}: an autoencoder with {key} {trained.config[key]}, the recipe says "
                f"{network.config[key]}: its encoder does not fit; set autoencoder.{key}, or "
                "leave autoencoder.start empty"
            )
    for key in ("encoder_widths", "encoder_blocks", "decoder_widths", "decoder_blocks"):
        if any(
            old > new for new, old in zip(network.config[key], trained.config[key], strict=True)
        ):
            sizes = f"{key} {trained.config[key]} cannot shrink to {network.config[key]}"
            raise UserError(f"{name}: an autoencoder with {sizes}: raise autoencoder.{key}")
    for layers, old_layers in (
        (network.encoder, trained.encoder),
        (network.decoder, trained.decoder),
    ):
        old_places = dict(_places(old_layers))
        for place, layer in _places(layers):
            if place in old_places:
                _grow_layer(layer, old_places[place])
            else:  # a new block
                nn.init.zeros_(layer.conv[-1].weight)
                nn.init.zeros_(layer.conv[-1].bias)
    network.set_latent_statistics(*(values.flatten() for values in trained.latent_statistics()))


def _places(layers: nn.Sequential) -> Iterator[tuple[tuple, nn.Module]]:
    """Every layer with the place it keeps when blocks are added: (level, "block", number) or
    (level, "layer", number).
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
    """Copies `old` into `layer` of the same kind; the old outputs do not read the new inputs."""
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


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple | list) else value

"""Weights of the blocks' linear layers in 8 bits, through torchao."""

import importlib.util

import torch
from torch import nn

from worldmodel.errors import UserError
from worldmodel.models.transformer import CausalWanTransformer


def quantize(model: CausalWanTransformer, weights: str, device: torch.device) -> None:
    """Stores the blocks' linear layers in 8 bits on `device`, one after the other, through torchao;
    "full" leaves them alone.

    int8: symmetric, one scale an output channel, multiplied in the networks' type. fp8: e4m3; on
    GPUs that multiply it (compute capability 8.9 and newer) activations too, a scale each row,
    elsewhere weights alone. Embedders, modulation, `prope_out` and output layer stay.
    """
    if weights == "full":
        return
    if not has_torchao():
        raise UserError(
            f"weights {weights} are stored by torchao, which is not installed: pip install "
            "torchao, or choose weights full."
        )

    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    multiplies = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    fp8 = (
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
        if multiplies
        else Float8WeightOnlyConfig()
    )
    chosen = set(map(id, linear_layers(model.blocks)))
    config = Int8WeightOnlyConfig() if weights == "int8" else fp8
    quantize_(model.blocks, config, filter_fn=lambda layer, _: id(layer) in chosen, device=device)


def has_torchao() -> bool:
    return importlib.util.find_spec("torchao") is not None


def linear_layers(blocks: nn.ModuleList) -> list[nn.Linear]:
    """What can be stored in 8 bits and is not yet: nearly all of the weights."""
    linear = [
        m
        for name, m in blocks.named_modules()
        if isinstance(m, nn.Linear) and not name.endswith("prope_out")
    ]
    return [layer for layer in linear if type(layer.weight) is nn.Parameter]

"""Operations of a pass of the network; a multiplication with its addition counts as two.

Counts matrix products: the linear layers, and the attention of both paths over the window. Norms,
rotations and the cameras' 4x4 products are not counted, so a share of the device's rate is a lower
bound.
"""

from collections.abc import Mapping


def pass_flops(config: Mapping, tokens: int, seen: int, text_length: int) -> int:
    """Operations of a denoising pass over `tokens` tokens, each of which attends to `seen` tokens
    and to `text_length` rows of a prompt.

    config: of a `CausalWanTransformer`. The embedding of time and prompt is not counted.
    """
    width = _width(config)
    block = _block(config, tokens, seen, text_length)
    return config["num_layers"] * block + _ends(
        config, tokens, width, config["in_channels"] + config["out_channels"]
    )


def clean_flops(config: Mapping, tokens: int, seen: int, text_length: int) -> int:
    """Operations of a pass that ends at the keys and values of the last layer, see `pass_flops`."""
    width = _width(config)
    block = _block(config, tokens, seen, text_length)
    return (
        (config["num_layers"] - 1) * block
        + 2 * _linear(tokens, width, width)
        + _ends(config, tokens, width, config["in_channels"])
    )


def _block(config: Mapping, tokens: int, seen: int, text_length: int) -> int:
    width = _width(config)
    paths = 2 if config["camera"] else 1
    # q, k, v; an output layer a path; the query and output layers of cross-attention
    square = 3 + paths + 2
    # scores, then values
    attention = 2 * (paths * _linear(tokens, seen, width) + _linear(tokens, text_length, width))
    return (
        square * _linear(tokens, width, width)
        + attention
        + 2 * _linear(tokens, width, config["ffn_dim"])
    )


def _ends(config: Mapping, tokens: int, width: int, channels: int) -> int:
    """The patch embedding and, where `channels` counts them, the output layer."""
    _, rows, columns = config["patch_size"]
    return _linear(tokens, width, channels * rows * columns)


def _width(config: Mapping) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def _linear(tokens: int, inputs: int, outputs: int) -> int:
    return 2 * tokens * inputs * outputs

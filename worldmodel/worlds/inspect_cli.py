"""`worldmodel inspect SOURCE`: describe a weights file."""

import argparse

from worldmodel.cli import print_line
from worldmodel.worlds.checkpoint import inspect
from worldmodel.worlds.state_dict import PARTS, WAN_HEAD_DIM, CheckpointInfo

SOURCE = "a file, a folder, or owner/name[/path] on the Hugging Face hub"
PART = f"part of a trainer's checkpoint (default: the first of {', '.join(PARTS)})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=SOURCE)
    parser.add_argument("--part", help=PART)


def run(args: argparse.Namespace) -> None:
    print_line(describe(inspect(args.source, args.part)))


def describe(info: CheckpointInfo) -> str:
    """A table of what weights hold, one line for each property."""
    heads = "unknown: give their width (--head-dim, attention_head_dim)"
    if info.head_dim:
        number = info.config()["num_attention_heads"]
        heads = f"{number} of {info.head_dim}, from the file next to the weights"
    elif info.width % WAN_HEAD_DIM == 0:
        number = info.width // WAN_HEAD_DIM
        heads = f"{number} if {WAN_HEAD_DIM} wide, as in every public Wan (the tensors do not say)"
    patch = "x".join(map(str, info.patch_size))
    rows = {
        "names": f"{info.family}, prefix {info.prefix!r}",
        "part": info.part or "the whole file",
        "not read": ", ".join(info.other_parts) or "nothing",
        "stage": info.stage or "not said",
        "layers": info.layers,
        "width": f"{info.width} (feed-forward {info.ffn_width})",
        "heads": heads,
        "latent": f"{info.in_channels} -> {info.out_channels} channels, patch {patch}",
        "text": f"{info.text_dim} features",
        "camera": "PRoPE" if info.camera else "none",
        "numbers": f"{info.parameters / 1e6:.1f} M, {', '.join(info.dtypes)}",
    }
    return "\n".join(f"{name:9} {value}" for name, value in rows.items())

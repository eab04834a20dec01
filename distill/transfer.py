"""`python -m distill transfer`: what a stage taught a network, added to a later version of the
network that the stage began with.

Stage 3 changes weights little (2 % of what stage 1 does), and stage 1 may be trained on meanwhile.
Instead of distilling anew, the
difference that stage 3 made is added: `to + scale (tuned - origin)`. Source: task arithmetic
(Ilharco et al., arXiv 2212.04089).
"""

import argparse
import shutil
from pathlib import Path

import torch

from worldmodel.transformer import CausalWanTransformer
from worldmodel.world import load_network, replace_folder

PROMPTS = "prompts.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `transfer`."""
    parser.add_argument(
        "--to", type=Path, required=True, help="export of the network that learned on"
    )
    parser.add_argument("--tuned", type=Path, required=True, help="export of what the stage left")
    parser.add_argument(
        "--origin", type=Path, required=True, help="export of what the stage began with"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="how much of the difference is added (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, help="new export folder")


def run(args: argparse.Namespace) -> None:
    """Writes `to + scale (tuned - origin)`; ValueError for networks of different sizes or an output
    that is there already.
    """
    if args.output.exists():
        raise ValueError(f"{args.output} exists already: name a new folder")
    networks = [
        load_network(CausalWanTransformer, folder) for folder in (args.to, args.tuned, args.origin)
    ]
    result = transferred(
        *networks, args.scale, [str(folder) for folder in (args.to, args.tuned, args.origin)]
    )
    draft = args.output.with_name(f".{args.output.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    result.save_pretrained(draft)
    if (args.to / PROMPTS).is_file():
        shutil.copy(args.to / PROMPTS, draft / PROMPTS)
    replace_folder(draft, args.output)


@torch.no_grad()
def transferred(
    to: CausalWanTransformer,
    tuned: CausalWanTransformer,
    origin: CausalWanTransformer,
    scale: float,
    names: list[str],
) -> CausalWanTransformer:
    """`to` itself with `scale (tuned - origin)` added to its weights; `names` tell them apart in
    errors.
    """
    weights = [network.state_dict() for network in (to, tuned, origin)]
    sizes = [{name: tensor.shape for name, tensor in state.items()} for state in weights]
    for name, size in zip(names[1:], sizes[1:], strict=True):
        if size != sizes[0]:
            raise ValueError(
                f"{name}: expected "
                "a network "
                "of the sizes of "
                f"{names[0]}: "
                "transfer "
                "between "
                "versions of "
                "one network"
            )
    for name, tensor in weights[0].items():
        tensor += scale * (weights[1][name] - weights[2][name])
    return to

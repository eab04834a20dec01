"""Published weights -> a world that `play.py` opens, and the command line of `python -m
worldmodel.worlds.checkpoint`.

What the weights do not tell (picture size, steps, camera motion, where the other parts come from)
is a YAML file of configs/worlds:

    python -m worldmodel inspect SOURCE python -m worldmodel convert SOURCE
    --world configs/worlds/NAME.yaml --output FOLDER [--prompts FILE.safetensors]
"""

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan

from worldmodel.cli import Parser, positive, print_line, print_progress, run
from worldmodel.config import Count, Positive, build, parse_yaml
from worldmodel.controls import Envelope
from worldmodel.device import open_device
from worldmodel.errors import UserError, first_line
from worldmodel.files import check_output_folder, find_config
from worldmodel.models.prompts import PromptBook
from worldmodel.models.text_encoder import embed_text, libraries, locate
from worldmodel.models.tiny_autoencoder import TinyAutoencoder
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.models.wan_autoencoder import Autoencoder
from worldmodel.rollout import RolloutConfig
from worldmodel.worlds.checkpoint import (
    WAN_HEAD_DIM,
    CheckpointInfo,
    check_tensors,
    inspect,
    load_transformer,
    read_state,
)
from worldmodel.worlds.config import PromptConfig, WorldConfig, warn_ignored, without_retired
from worldmodel.worlds.hub import fetch, parse_source, weights_among
from worldmodel.worlds.weights import open_autoencoder
from worldmodel.worlds.world import World, check_fit, save_world

logger = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16", "float32")
PROMPT = "default"  # name of the prompt that a world starts with
STILL = Envelope(
    forward=0.0, strafe=0.0, yaw=0.0, pitch=0.0
)  # a model without camera weights knows no motion


@dataclass(frozen=True)
class PublishedWorld:
    """configs/worlds/NAME.yaml: how a published model is played. Sources are read as
    `worldmodel.worlds.hub` says.
    """

    title: str  # one line for menus
    source: str  # of the transformer
    autoencoder: (
        str  # source of `vae/` in diffusers' layout, or of a tiny autoencoder in taew2_1's layout
    )
    licence: str  # of the weights, and where it is written
    prompt: str  # the sentence that is dreamed where no prompts are given
    # a sentence that guided dreams keep away from, as published beside the weights; empty: no
    # prompt, zeros
    negative: str = ""
    # of the light variant; the place that public code names, not fetched here
    tiny_autoencoder: str = "lightx2v/Autoencoders/taew2_1.pth"
    text_encoder: str = ""  # folder or hub id, diffusers' layout; empty: stored prompts only
    text_length: Count = 512  # tokens of an embedded prompt
    part: str = ""  # of a trainer's checkpoint; empty: the average if there is one
    height: Count = 480  # pixels
    width: Count = 832  # pixels
    fps: Positive = 16.0  # pixel frames a second
    intrinsics: tuple[float, ...] = (0.505, 0.898, 0.5, 0.5)  # fx/W, fy/H, cx/W, cy/H
    envelope: Envelope = Envelope()  # a model without camera weights gets `STILL`
    rollout: RolloutConfig = RolloutConfig()

    @classmethod
    def read(cls, path: str | Path) -> "PublishedWorld":
        """Read a YAML file; UserError with one sentence for one that is absent or faulty.

        Rollout options that format 1 of world.yaml had are ignored, as `WorldConfig.read` does.
        """
        path = find_config(path)
        try:
            values = parse_yaml(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, UserError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(
                f"{path} cannot be read as a published world ({reason}); name a file of "
                "configs/worlds."
            ) from None
        if isinstance(values, dict) and "rollout" in values:
            values["rollout"], ignored = without_retired(values["rollout"])
            warn_ignored(path, ignored)
        return build(cls, values, str(path))


@dataclass(frozen=True)
class Conversion:
    """What is asked of one conversion. None or "": as the published world has it."""

    source: str = ""  # of the transformer
    autoencoder: str = ""  # of the autoencoder
    prompts: Path | None = (
        # stored prompts (`PromptBook`); None: the text encoder embeds the published world's
        # sentence
        None
    )
    part: str | None = None  # of a trainer's checkpoint
    head_dim: int | None = (
        None  # width of an attention head; None: as a config.json beside the weights says, or 128
    )
    dtype: str = "bfloat16"  # of the stored weights, one of DTYPES


def convert(
    published: PublishedWorld,
    output: Path,
    asked: Conversion = Conversion(),
    progress: Callable[[str], object] = logger.info,
) -> World:
    """Writes the bundle `output` (its name is the world's) and returns the world as it was put
    together.

    An older bundle there is replaced only by a complete one. progress: is called with a sentence
    before each long step. Errors: UserError with one sentence
    for anything that cannot be had, is damaged, or does not fit together; nothing is written then.
    """
    source = asked.source or published.source
    codec = asked.autoencoder or published.autoencoder
    if output.exists() and not (output / "world.yaml").is_file():
        raise UserError(
            f"expected the output as a new name or an older world, {output} is something else."
        )
    check_output_folder(output)
    for name in (source, codec):
        parse_source(name)
    prompts = asked.prompts and PromptBook.load(asked.prompts)
    if prompts is None:
        _check_encoder(published)
    path = fetch(source, progress=progress)
    codec_path = fetch(codec, "vae", progress)
    dtype = getattr(torch, asked.dtype)
    progress(f"reading the transformer from {source}")
    overrides = {} if asked.head_dim is None else {"attention_head_dim": asked.head_dim}
    transformer = load_transformer(
        path, part=asked.part or published.part or None, dtype=dtype, **overrides
    )
    transformer.requires_grad_(False)
    prompts = prompts or _embedded(published, output, transformer.config.text_dim, progress)
    progress(f"reading the autoencoder from {codec}")
    autoencoder = open_vae(codec_path, dtype).requires_grad_(False)
    config = _world_config(
        output.name, published, f"{source}, autoencoder {codec}", transformer, prompts
    )
    world = World(output, config, transformer, autoencoder, prompts, torch.device("cpu"), dtype)
    check_fit(world)
    size = sum(
        t.numel() * t.element_size()
        for part in (transformer, autoencoder)
        for t in part.state_dict().values()
    )
    progress(f"writing {output} ({size / 1e6:,.1f} MB)")
    output.parent.mkdir(parents=True, exist_ok=True)
    readme = _readme(config, source, codec, published, asked)
    save_world(output, config, transformer, autoencoder, prompts, {}, readme, shard_size="4GB")
    return world


def open_vae(path: Path, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """The autoencoder in a file or folder: diffusers' (`vae/`), a world's (`autoencoder/`), or tiny
    weights in taew2_1's layout.

    Errors: UserError with one sentence, as `open_autoencoder`, and for tensors that are not those
    of the published tiny widths.
    """
    folders = [path / "autoencoder", path / "vae", path] if path.is_dir() else [path.parent]
    folder = next((folder for folder in folders if _says_autoencoder(folder)), None)
    if folder is not None:
        return open_autoencoder(folder, dtype=dtype)
    if path.is_dir():
        found = weights_among([file.name for file in path.iterdir() if file.is_file()], "vae")
        if len(found) != 1:
            raise UserError(
                f"{path} holds no autoencoder (config.json and weights, or one file in taew2_1's "
                "layout): name another one."
            )
        path = path / found[0]
    state = read_state(path)
    with init_empty_weights(include_buffers=False):
        tiny = TinyAutoencoder()
    try:
        check_tensors(
            state, {name: tuple(tensor.shape) for name, tensor in tiny.state_dict().items()}
        )
    except UserError as error:
        raise UserError(
            f"{path} is not a tiny autoencoder in taew2_1's layout, {error} For Wan2.1's own give "
            "vae/ of a diffusers repository."
        ) from None
    tiny.load_state_dict(
        {name: tensor.to(dtype, copy=True) for name, tensor in state.items()}, assign=True
    )
    return tiny.to(dtype, memory_format=torch.channels_last).eval()


def _says_autoencoder(folder: Path) -> bool:
    """Whether config.json names one of the two networks that `open_autoencoder` opens."""
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return named in (TinyAutoencoder.__name__, AutoencoderKLWan.__name__)


# -------------------- what a bundle says


def _check_encoder(published: PublishedWorld) -> None:
    """UserError where the world's sentence could not be embedded: known before anything is
    fetched.
    """
    if not published.text_encoder:
        raise UserError(
            "A world needs a stored prompt: give --prompts FILE.safetensors (embeddings [L, D] by "
            "name), or let the YAML name a text_encoder."
        )
    libraries(
        "The text encoder of a published world",
        "give stored embeddings (convert --prompts FILE.safetensors)",
    )


def _embedded(
    published: PublishedWorld, output: Path, width: int, progress: Callable[[str], object]
) -> PromptBook:
    """A book with the world's own sentence, which its text encoder embeds."""
    place = locate(published.text_encoder, output)
    device = open_device("cuda" if torch.cuda.is_available() else "cpu")
    shape = published.text_length, width
    sentences = {
        PROMPT: published.prompt,
        **({"": published.negative} if published.negative else {}),
    }
    embeddings = {
        name: embed_text(sentence, place, shape, device, torch.bfloat16, progress)
        for name, sentence in sentences.items()
    }
    return PromptBook(embeddings, {PROMPT: published.prompt})


def _world_config(
    name: str,
    published: PublishedWorld,
    origin: str,
    transformer: CausalWanTransformer,
    prompts: PromptBook,
) -> WorldConfig:
    still = not transformer.config.camera
    return WorldConfig(
        name=name,
        title=published.title + (" (no camera weights: it cannot be steered)" if still else ""),
        height=published.height,
        width=published.width,
        fps=published.fps,
        intrinsics=published.intrinsics,
        envelope=STILL if still else published.envelope,
        rollout=published.rollout,
        prompts=PromptConfig(PROMPT if PROMPT in prompts else prompts.names[0]),
        text_encoder=published.text_encoder,
        licence=f"{published.licence} Weights: {origin}.",
    )


def _readme(
    config: WorldConfig, source: str, codec: str, published: PublishedWorld, asked: Conversion
) -> str:
    rollout = config.rollout
    steering = (
        "The model has no camera weights: it dreams on by itself, every motion key is locked."
        if config.envelope == STILL
        else (
            f"A held key moves {config.envelope.forward:g} units or turns {config.envelope.yaw:g} "
            "degrees a latent."
        )
    )
    return (
        "\n\n".join(
            [
                f"# {config.name}",
                f"{config.title}. {config.height}x{config.width} pixels, {config.fps:g} frames a "
                f"second, {rollout.chunk} latents a chunk in {len(rollout.steps)} steps "
                f"({len(rollout.first_steps)} for the first), a window of {rollout.window} "
                f"latents, {asked.dtype}.",
                steering,
                (
                    f"Walk in it: `python play.py --world {shlex.quote(config.name)}`, or with "
                    "the path of this folder."
                ),
                "Transformer: "
                f"`{source}`{f', part `{asked.part or published.part}`' if asked.part or published.part else ''}  \n"  # noqa: E501
                "Autoencoder: "
                f"`{codec}` "
                " \nPrompts: "
                f"`{asked.prompts or published.text_encoder}` "
                " \nLicence: "
                f"{published.licence}",
                "Made by `python -m worldmodel convert`; nothing was trained here.",
            ]
        )
        + "\n"
    )


# -------------------- command line


def main(argv: list[str]) -> int:
    """`inspect SOURCE` or `convert SOURCE --world YAML --output FOLDER`; returns the exit
    status.
    """
    return run(argv[0] if argv else "worldmodel.worlds.checkpoint", lambda: _work(argv))


def _work(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    if args.command == "inspect":
        print_line(describe(inspect(args.source, args.part)))
        return
    published = PublishedWorld.read(args.world)
    asked = Conversion(
        args.source or "",
        args.autoencoder or "",
        args.prompts,
        args.part,
        args.head_dim,
        args.dtype,
    )
    convert(published, args.output, asked, print_progress)
    print_line(
        f"{args.output} is ready; play it with: python play.py --world "
        f"{shlex.quote(str(args.output))}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m worldmodel.worlds.checkpoint",
        description="Says what weights are, and makes worlds of published ones.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    source = "a file, a folder, or owner/name[/path] on the Hugging Face hub"
    part = (
        "part of a trainer's checkpoint, for example generator (default: the average if there is "
        "one)"
    )
    shown = commands.add_parser("inspect", help="print what weights hold")
    shown.add_argument("source", metavar="SOURCE", help=source)
    shown.add_argument("--part", help=part)
    made = commands.add_parser("convert", help="make a world of published weights")
    made.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help=f"of the transformer: {source} (default: the one the YAML names)",
    )
    made.add_argument(
        "--world",
        metavar="YAML",
        type=Path,
        required=True,
        help="file of configs/worlds: size, steps, camera",
    )
    made.add_argument(
        "--output", metavar="FOLDER", type=Path, required=True, help="the world to write"
    )
    made.add_argument(
        "--autoencoder",
        metavar="SOURCE",
        help="vae/ in diffusers' layout, or taew2_1 weights (default: as the YAML says)",
    )
    made.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="safetensors, embeddings by name (default: the YAML's sentence)",
    )
    made.add_argument("--part", help=part)
    made.add_argument(
        "--head-dim",
        type=positive,
        help="width of an attention head (default: as a config.json says, or 128)",
    )
    made.add_argument(
        "--dtype",
        choices=DTYPES,
        default=Conversion.dtype,
        help="of the stored weights (default: %(default)s)",
    )
    return parser


def describe(info: CheckpointInfo) -> str:
    """A table of what weights hold, one line a property."""
    heads = "not told: give their width (--head-dim, attention_head_dim)"
    if info.head_dim:
        heads = (
            f"{info.config()['num_attention_heads']} of {info.head_dim}, as said beside the weights"
        )
    elif info.width % WAN_HEAD_DIM == 0:
        heads = (
            f"{info.width // WAN_HEAD_DIM} if {WAN_HEAD_DIM} wide, as in every public Wan (the "
            "tensors do not tell)"
        )
    rows = {
        "names": f"{info.family}, prefix {info.prefix!r}",
        "part": info.part or "the whole file",
        "not read": ", ".join(info.other_parts) or "nothing",
        "stage": info.stage or "not said",
        "layers": info.layers,
        "width": f"{info.width} (feed-forward {info.ffn_width})",
        "heads": heads,
        "latent": (
            f"{info.in_channels} -> {info.out_channels} channels, patch "
            f"{'x'.join(map(str, info.patch_size))}"
        ),
        "text": f"{info.text_dim} features",
        "camera": "PRoPE" if info.camera else "none",
        "numbers": f"{info.parameters / 1e6:.1f} M, {', '.join(info.dtypes)}",
    }
    return "\n".join(f"{name:9} {value}" for name, value in rows.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

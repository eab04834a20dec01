"""Published weights -> a world, as a YAML file of configs/worlds describes it.

The YAML says what the weights do not: picture size, steps, camera motion, where the other parts
come from.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan

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
from worldmodel.worlds.checkpoint import load_transformer, read_state
from worldmodel.worlds.config import PromptConfig, WorldConfig, warn_ignored, without_retired
from worldmodel.worlds.hub import fetch, parse_source, weights_among
from worldmodel.worlds.state_dict import check_tensors
from worldmodel.worlds.weights import open_autoencoder
from worldmodel.worlds.world import World, check_fit, save_world

PROMPT = "default"  # name of the prompt that a world starts with
# of a model without camera control
STILL = Envelope(forward=0.0, strafe=0.0, yaw=0.0, pitch=0.0)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedWorld:
    """configs/worlds/NAME.yaml: how a published model is played. See `hub` for what a source is."""

    title: str  # one line for menus
    source: str  # of the transformer
    autoencoder: str  # source of `vae/` in diffusers' layout, or of weights in taew2_1's layout
    licence: str  # of the weights, and where it is written
    prompt: str  # the sentence that is embedded where no prompts are given
    # the negative prompt of guidance, as published with the weights; empty: an embedding of zeros
    negative: str = ""
    # autoencoder of the variant NAME-tiny
    tiny_autoencoder: str = "lightx2v/Autoencoders/taew2_1.pth"
    text_encoder: str = ""  # folder or hub id, diffusers' layout; empty: stored prompts only
    text_length: Count = 512  # tokens of an embedded prompt
    part: str = ""  # of a trainer's checkpoint; empty: the first of `state_dict.PARTS`
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
    """The options of one conversion. None or "": as the published world has it."""

    source: str = ""  # of the transformer
    autoencoder: str = ""  # of the autoencoder
    # stored prompts (`PromptBook`); None: the text encoder embeds the published world's sentence
    prompts: Path | None = None
    part: str | None = None  # of a trainer's checkpoint
    # width of an attention head; None: as a config.json next to the weights says, or 128
    head_dim: int | None = None
    dtype: str = "bfloat16"  # of the stored weights, a name of torch's


def convert(
    published: PublishedWorld,
    output: Path,
    asked: Conversion = Conversion(),
    progress: Callable[[str], object] = logger.info,
) -> World:
    """Write the bundle `output`, whose name becomes the world's, and return the world.

    An older bundle there is replaced only by a complete one. progress: is called with a sentence
    before each long step. Raises UserError with one sentence for anything that is absent, damaged
    or does not fit together; nothing is written then.
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
    save_world(output, config, transformer, autoencoder, prompts, {}, shard_size="4GB")
    return world


def open_vae(path: Path, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """The autoencoder in a file or folder: diffusers' (`vae/`), a world's (`autoencoder/`), or tiny
    weights in taew2_1's layout.

    Raises UserError with one sentence, as `open_autoencoder`, and for tensors that are not those of
    the published tiny widths.
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


def _check_encoder(published: PublishedWorld) -> None:
    """Raise UserError where the world's sentence cannot be embedded, before anything is fetched."""
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

"""A world: a folder with two networks, prompts, start images and `world.yaml`, opened and checked
as one thing.
"""

import difflib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import signature
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, ModelMixin
from safetensors import SafetensorError, safe_open

from worldmodel.autoencoder import Autoencoder, TinyAutoencoder, WanAutoencoder
from worldmodel.checkpoint import check_tensors
from worldmodel.command_line import first_line
from worldmodel.controls import Envelope
from worldmodel.engine import (
    HISTORY,
    Demand,
    Engine,
    EngineOptions,
    demand,
    fitting,
    free_memory,
    is_out_of_memory,
    quantise,
    start_engine,
    tiers_from,
)
from worldmodel.options import as_dict, build
from worldmodel.rollout import RolloutConfig
from worldmodel.text import PromptBook
from worldmodel.text_encoder import PromptEncoder
from worldmodel.transformer import CausalWanTransformer

FORMAT = 1
_AGAIN = "fetch the world or make the export again"
_MOST_PIXELS = 4096
_MOST_FPS = 240
# numbers a pixel that a decoder has in hand at its widest (Wan2.1's: 4 frames of 96 channels, four
# times)
_DECODER_WORK = 1500
SHARD_SIZE = "16MB"  # of a small world, whose files live in a repository
_EVERYTHING = (
    "world.yaml",
    "transformer/config.json",
    "autoencoder/config.json",
    "prompts.safetensors",
)


@dataclass(frozen=True)
class PromptConfig:
    """Which prompt a session starts with when none is asked for."""

    default: str


@dataclass(frozen=True)
class WorldConfig:
    """`world.yaml`. Unknown keys and wrong types are errors."""

    name: str
    title: str  # one line for menus
    height: int  # pixels
    width: int  # pixels
    fps: float  # pixel frames a second
    intrinsics: tuple[float, ...]  # fx/W, fy/H, cx/W, cy/H
    envelope: Envelope
    rollout: RolloutConfig
    prompts: PromptConfig
    images: dict[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # prompt -> files in images/, the first is usual
    # folder or hub id (diffusers' layout) of the encoder that made the prompts; empty: stored
    # prompts only
    text_encoder: str = ""
    licence: str = "unknown"  # of weights and pictures, copied into recordings
    format: int = FORMAT

    def __post_init__(self):
        fx, fy, *centre = self.intrinsics if len(self.intrinsics) == 4 else (0, 0, 0)
        if min(fx, fy) <= 0 or max(abs(c - 0.5) for c in centre) > 1e-6:
            raise ValueError(
                "intrinsics must be [fx/W, fy/H, 0.5, 0.5] with positive focal lengths, got "
                f"{list(self.intrinsics)} (recordings cannot hold another principal point)."
            )
        for name, most in (("height", _MOST_PIXELS), ("width", _MOST_PIXELS), ("fps", _MOST_FPS)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be 1 to {most}, got {getattr(self, name)}.")

    @classmethod
    def read(cls, path) -> "WorldConfig":
        """Reads world.yaml; ValueError with one sentence for a foreign, newer or faulty one."""
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(
                f"{path} cannot be read as YAML ({first_line(error)}); fetch the world again."
            ) from None
        found = values.get("format") if isinstance(values, dict) else None
        if found != FORMAT:
            newer = isinstance(found, int) and found > FORMAT
            todo = "update this program" if newer else "it is not one of this program's worlds"
            raise ValueError(f"{path} has format {found!r}, format {FORMAT} is expected; {todo}.")
        return build(cls, values, str(path))

    def text(self) -> str:
        """The YAML that `read` reads."""
        plain = as_dict(self)
        return yaml.safe_dump(
            {"format": plain.pop("format"), **plain}, sort_keys=False, allow_unicode=True
        )


@dataclass(frozen=True)
class World:
    """An opened bundle. The networks are in evaluation mode, without gradients, on one device and
    of one type.
    """

    folder: Path
    config: WorldConfig
    transformer: CausalWanTransformer
    autoencoder: Autoencoder
    prompts: PromptBook
    device: torch.device
    dtype: torch.dtype
    engine: Engine = field(default_factory=Engine)  # its tier may go down while the world is played

    @classmethod
    def from_pretrained(
        cls,
        folder,
        device="cpu",
        dtype: torch.dtype | None = None,
        engine: EngineOptions = EngineOptions(),
    ) -> "World":
        """Opens `assets/worlds/<name>`.

        device: where to compute. dtype: type of the networks; None = `fast_dtype(device)`. engine:
        see `worldmodel/engine.py`.
        Errors: ValueError with one sentence for anything that is absent, cut off, foreign or does
        not fit together.
        """
        folder = Path(folder)
        config = _check_bundle(folder)
        device = open_device(device)
        dtype = fast_dtype(device) if dtype is None else dtype
        transformer = load_network(
            CausalWanTransformer, folder / "transformer", dtype=dtype
        ).requires_grad_(False)
        autoencoder = open_autoencoder(folder / "autoencoder", dtype=dtype).requires_grad_(False)
        world = cls(
            folder,
            config,
            transformer,
            autoencoder,
            PromptBook.load(folder / "prompts.safetensors"),
            device,
            dtype,
        )
        check_fit(world)
        return world.fitted(engine)

    def fitted(self, options: EngineOptions) -> "World":
        """The same world, its networks stored and running as `options` and the device allow;
        ValueError when they cannot.
        """
        tiers = tiers_from(options)
        free = free_memory(self.device)
        if options.memory == "auto" and free is not None:
            free += sum(
                p.nbytes for p in self.transformer.parameters() if p.device.type == self.device.type
            )  # it is there already
            tiers = fitting(
                tiers, self.demand(options.records(self.device)), self.config.rollout, HISTORY, free
            )
        quantise(self.transformer, tiers[0].weights, self.device)
        transformer = self.transformer.to(self.device)
        autoencoder = self.autoencoder.to(self.device)
        engine = start_engine(options, tiers, transformer, self.device)
        return replace(self, transformer=transformer, autoencoder=autoencoder, engine=engine)

    def demand(self, recorded: bool = False) -> Demand:
        """The memory that a dream of this world needs, passes `recorded` or not; to be asked before
        the networks are on their device.
        """
        rows, columns = self.latent_size
        weights = sum(p.numel() * p.dtype.itemsize for p in self.autoencoder.parameters())
        pixels = rows * columns * self.autoencoder.spatial_factor**2
        with torch.no_grad():
            decoder = self.autoencoder.streaming_decoder()
            decoder.step(torch.zeros(1, self.autoencoder.latent_channels, 2, 2, 2))
        rewound = (
            sum(m.nbytes for m in decoder.state().memories if m is not None) * rows * columns // 4
        )
        work = pixels * _DECODER_WORK * self.dtype.itemsize
        rest = weights + 2 * rewound + work
        prompt = self.prompts.shape[0] if recorded else 0
        return demand(
            self.transformer, rows, columns, self.config.rollout.chunk, rest, rewound, prompt
        )

    @cached_property
    def prompt_encoder(self) -> PromptEncoder:
        """Embeds stored prompts and, where world.yaml names a text encoder, any text."""
        return PromptEncoder(
            self.prompts, self.config.text_encoder, self.folder, self.device, self.dtype
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what decides a dream (weights, prompts, picture, rollout): where it is equal,
        recordings can be replayed.
        """
        values = yaml.safe_load((self.folder / "world.yaml").read_text(encoding="utf-8"))
        deciding = {
            key: values.get(key) for key in ("height", "width", "intrinsics", "rollout")
        }  # a title decides nothing
        digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode())
        for path in sorted(self.folder.rglob("*")):
            if path.suffix in (".safetensors", ".json"):
                digest.update(str(path.relative_to(self.folder)).encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns of a latent frame."""
        factor = self.autoencoder.spatial_factor
        return self.config.height // factor, self.config.width // factor

    def images(self, prompt: str) -> tuple[str, ...]:
        """Names of the start images of a prompt (none for a prompt without)."""
        self.prompts[prompt]
        return tuple(Path(file).stem for file in self.config.images.get(prompt, ()))

    def image(self, name: str) -> np.ndarray:
        """Start image `name` (with or without its file extension) -> uint8 [H,W,3] RGB."""
        files = [file for group in self.config.images.values() for file in group]
        for file in files:
            if name in (file, Path(file).stem):
                return read_image(self.folder / "images" / file)
        near = difflib.get_close_matches(name, [Path(file).stem for file in files], 1, 0)
        hint = f"did you mean {near[0]!r}?" if near else "it has no start images."
        raise ValueError(f"World {self.config.name!r} has no start image {name!r}; {hint}")


# -------------------- reading


def read_image(path) -> np.ndarray:
    """A picture file -> uint8 [H,W,3] RGB; ValueError when it cannot be read."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise ValueError(f"Picture {path} cannot be read: {error.strerror}.") from None
    level = cv2.utils.logging.setLogLevel(
        cv2.utils.logging.LOG_LEVEL_SILENT
    )  # the sentence below says it
    try:
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except cv2.error:  # larger than OpenCV reads
        picture = None
    finally:
        cv2.utils.logging.setLogLevel(level)
    if picture is None:
        raise ValueError(f"Picture {path} is no complete PNG or JPEG file; give another one.")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def fast_dtype(device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively (CUDA, CPUs with AVX512_BF16 or AMX), else
    float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16
    native = kind == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return torch.bfloat16 if native else torch.float32


def open_device(name) -> torch.device:
    """ "cpu", "cuda", "cuda:1", ... or a torch.device; ValueError for one that cannot compute here,
    or whose memory is full.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # no such name; not compiled in, no driver, no such number
        if is_out_of_memory(error):
            raise ValueError(
                "The memory of "
                "the device "
                f"{str(name)!r} is "
                "full, not one "
                "number fits: "
                "close other programs "
                "that use "
                "it, or choose "
                "another."
            ) from None
        raise ValueError(
            "expected a device "
            "that torch "
            "can compute on "
            "here, such as cpu "
            "or cuda, got "
            f"{str(name)!r}."
        ) from None
    return device


def _check_bundle(folder: Path) -> WorldConfig:
    """Everything that can be known without loading a weight."""
    if not folder.is_dir():
        worlds = sorted(path.parent.name for path in folder.parent.glob("*/world.yaml"))
        raise ValueError(
            "There is no world "
            f"at {folder}; "
            f"{'there are ' + ', '.join(worlds) if worlds else 'none is'} "
            "there."
        )
    absent = [name for name in _EVERYTHING if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder} is not a complete world: {absent[0]} is missing.")
    config = WorldConfig.read(folder / "world.yaml")
    for name in (file for group in config.images.values() for file in group):
        if not (folder / "images" / name).is_file():
            raise ValueError(f"{folder} is not a complete world: images/{name} is missing.")
    return config


def load_network(
    kind: type[ModelMixin], folder, device="cpu", dtype: torch.dtype = torch.float32
) -> ModelMixin:
    """The network in `folder` (config.json and safetensors files), in evaluation mode.

    kind: its class. dtype: type of its weights, whatever they are stored in.
    Errors: ValueError with one sentence for a folder that is absent, cut off, of another kind, or
    does not fit itself. Nothing is looked for on the network.
    """
    folder = Path(folder)
    config = _read_config(kind, folder)
    stored = _stored_weights(folder)
    try:
        with init_empty_weights(include_buffers=False), warnings.catch_warnings(action="ignore"):
            network = kind(**config)
    except Exception as error:  # a foreign value can break anything
        raise ValueError(
            f"{folder / 'config.json'} "
            "describes "
            f"no {kind.__name__} "
            f"({first_line(error)}); "
            f"{_AGAIN}."
        ) from None
    try:
        check_tensors(
            stored, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    try:
        network = kind.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded ({first_line(error)}); {_AGAIN}.") from None
    return network.to(device)


def open_autoencoder(folder, device="cpu", dtype: torch.dtype = torch.float32) -> Autoencoder:
    """The autoencoder in `folder`, ours or Wan2.1's own, as config.json says; errors as in
    `load_network`.
    """
    if _class_name(Path(folder), TinyAutoencoder.__name__) == AutoencoderKLWan.__name__:
        return WanAutoencoder(load_network(AutoencoderKLWan, folder, device, dtype))
    return load_network(TinyAutoencoder, folder, device, dtype)


def _class_name(folder: Path, default: str) -> str:
    """What config.json says its network is; `default` where it says nothing (the loader then says
    what is wrong).
    """
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return default


def _read_config(kind: type[ModelMixin], folder: Path) -> dict:
    """The arguments for `kind` that config.json holds."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no "
            f"{kind.__name__}: "
            "config.json "
            "is missing; name "
            "another "
            "folder, or train "
            "one first."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        stored = config.get("_class_name")
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"{path} is damaged; {_AGAIN}.") from None
    if stored != kind.__name__:
        raise ValueError(
            f"{folder} holds a {stored}, a {kind.__name__} is expected; name another folder."
        )
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = [key for key in arguments if key not in signature(kind.__init__).parameters]
    if unknown:
        raise ValueError(
            f"{path} has the "
            "unknown key "
            f"{unknown[0]!r}: "
            "it was made by "
            "another version "
            "of this program; "
            "update it."
        )
    return arguments


def _stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Names and shapes (tensors without memory) in the weights files, each of which is there and
    complete.
    """
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    names = {"diffusion_pytorch_model.safetensors"}
    try:
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{index} is damaged; {_AGAIN}.") from None
    stored = {}
    for name in sorted(names):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing; {_AGAIN}.")
        try:
            with safe_open(
                folder / name, framework="pt"
            ) as file:  # a header says where its file ends
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    stored[key] = torch.empty(file.get_slice(key).get_shape(), device="meta")
        except (SafetensorError, OSError):
            raise ValueError(f"{folder / name} is cut off or damaged; {_AGAIN}.") from None
    return stored


def check_fit(world: World) -> None:
    """ValueError when transformer, autoencoder, prompts and picture size do not belong together."""
    config = world.config
    latent = world.autoencoder.latent_channels
    factor = world.autoencoder.spatial_factor
    patch = world.transformer.config.patch_size
    faults = {
        (
            "prompts have "
            f"{world.prompts.shape[1]} "
            "features, the "
            "transformer reads "
            f"{world.transformer.config.text_dim}"
        ): (world.prompts.shape[1] != world.transformer.config.text_dim),
        (
            "the autoencoder "
            "makes "
            f"{latent} channels, "
            "the transformer "
            "reads "
            f"{world.transformer.config.in_channels}"
        ): (latent != world.transformer.config.in_channels),
        (
            f"{config.height}x{config.width} "
            "pixels do "
            "not divide into "
            "tokens of "
            f"{factor * patch[1]}x{factor * patch[2]}"
        ): (config.height % (factor * patch[1]) != 0 or config.width % (factor * patch[2]) != 0),
    }
    for sentence, wrong in faults.items():
        if wrong:
            raise ValueError(f"{world.folder} does not fit together: {sentence}; export it again.")
    for prompt in [config.prompts.default, *config.images]:
        try:
            world.prompts[prompt]
        except ValueError as error:
            raise ValueError(f"{world.folder / 'world.yaml'}: {error}") from None


# -------------------- writing


def save_world(
    folder,
    config: WorldConfig,
    transformer: CausalWanTransformer,
    autoencoder: Autoencoder,
    prompts: PromptBook,
    images: Mapping[str, list[np.ndarray]],
    readme: str = "",
    shard_size: str = SHARD_SIZE,
) -> None:
    """Writes a bundle that `World.from_pretrained` opens; an older one of that name is replaced
    only by a complete one.

    images: prompt -> uint8 [H,W,3] start images, stored as images/<prompt>-<n>.png (they replace
    `config.images`); of a prompt that is no file name, its letters and digits.
    readme: README.md of the bundle. The networks are stored in the type they have, in files of at
    most `shard_size`.
    """
    folder = Path(folder)
    stems = _file_stems(images)
    names = {
        prompt: tuple(f"{stems[prompt]}-{n}.png" for n in range(len(group)))
        for prompt, group in images.items()
    }
    config = replace(config, images=names)
    for prompt in [config.prompts.default, *images]:
        prompts[prompt]
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / "images").mkdir(parents=True)
        for name, network in (("transformer", transformer), ("autoencoder", autoencoder)):
            network.save_pretrained(
                temporary / name, safe_serialization=True, max_shard_size=shard_size
            )
        prompts.save(temporary / "prompts.safetensors")
        for prompt, group in images.items():
            for file, picture in zip(names[prompt], group, strict=True):
                _write_png(temporary / "images" / file, picture, config)
        (temporary / "README.md").write_text(readme, encoding="utf-8")
        (temporary / "world.yaml").write_text(config.text(), encoding="utf-8")
        _check_bundle(temporary)
        replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _file_stems(prompts: Iterable[str]) -> dict[str, str]:
    """A short file name for every prompt, each another."""
    stems: dict[str, str] = {}
    for prompt in prompts:
        stem = re.sub(r"[^\w-]+", "-", prompt)[:40].strip("-") or "prompt"
        stems[prompt] = f"{stem}-{len(stems)}" if stem in stems.values() else stem
    return stems


def _write_png(path: Path, picture: np.ndarray, config: WorldConfig) -> None:
    if picture.dtype != np.uint8 or picture.shape != (config.height, config.width, 3):
        raise ValueError(
            "Start image "
            f"{path.name} "
            "must be uint8 "
            f"[{config.height},{config.width},3], "
            f"got {picture.dtype} "
            f"{list(picture.shape)}."
        )
    if not cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)):
        raise OSError(f"Start image {path} could not be written.")


def replace_folder(new: Path, folder: Path) -> None:
    """Puts `new` in the place of `folder`, which is kept until `new` is there."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)

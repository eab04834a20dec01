"""A world: a folder with two networks, prompts, start images and `world.yaml`, opened and checked as one thing."""

import difflib
import hashlib
import json
import os
import shutil
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open

from worldmodel.autoencoder import TinyAutoencoder
from worldmodel.controls import Envelope
from worldmodel.rollout import RolloutConfig
from worldmodel.text import PromptBook
from worldmodel.transformer import CausalWanTransformer

FORMAT = 1
SHARD_SIZE = "16MB"
_EVERYTHING = ("world.yaml", "transformer/config.json", "autoencoder/config.json", "prompts.safetensors")


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
    images: dict[str, tuple[str, ...]] = field(default_factory=dict)  # prompt -> files in images/, the first is usual
    licence: str = "unknown"  # of weights and pictures, copied into recordings
    format: int = FORMAT

    def __post_init__(self):
        fx, fy, *centre = self.intrinsics if len(self.intrinsics) == 4 else (0, 0, 0)
        if min(fx, fy) <= 0 or max(abs(c - 0.5) for c in centre) > 1e-6:
            raise ValueError(
                "intrinsics must be [fx/W, fy/H, 0.5, 0.5] with positive focal lengths, got "
                f"{list(self.intrinsics)} (recordings cannot hold another principal point)."
            )
        if min(self.height, self.width, self.fps) <= 0:
            raise ValueError(f"height, width and fps must be positive, got {self.height}, {self.width}, {self.fps}.")

    @classmethod
    def read(cls, path) -> "WorldConfig":
        """Reads world.yaml; ValueError with one sentence for a foreign, newer or faulty one."""
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} cannot be read as YAML ({reason}); fetch the world again.") from None
        found = values.get("format") if isinstance(values, dict) else None
        if found != FORMAT:
            newer = isinstance(found, int) and found > FORMAT
            todo = "update this program" if newer else "it is not one of this program's worlds"
            raise ValueError(f"{path} has format {found!r}, format {FORMAT} is expected; {todo}.")
        return from_mapping(cls, values, str(path))

    def text(self) -> str:
        """The YAML that `read` reads."""
        plain = json.loads(json.dumps(asdict(self)))  # tuples become lists
        return yaml.safe_dump({"format": plain.pop("format"), **plain}, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class World:
    """An opened bundle. The networks are in evaluation mode, without gradients, on one device and of one type."""

    folder: Path
    config: WorldConfig
    transformer: CausalWanTransformer
    autoencoder: TinyAutoencoder
    prompts: PromptBook
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype: torch.dtype | None = None) -> "World":
        """Opens `assets/worlds/<name>`.

        device: where to compute. dtype: type of the networks; None = `fast_dtype(device)`.
        Errors: ValueError with one sentence for anything that is absent, cut off, foreign or does not fit together.
        """
        folder = Path(folder)
        config = _check_bundle(folder)
        device = torch.device(device)
        dtype = fast_dtype(device) if dtype is None else dtype
        transformer = _load_network(CausalWanTransformer, folder / "transformer", device, dtype)
        autoencoder = _load_network(TinyAutoencoder, folder / "autoencoder", device, dtype)
        world = cls(
            folder, config, transformer, autoencoder, PromptBook.load(folder / "prompts.safetensors"), device, dtype
        )
        _check_fit(world)
        return world

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what decides a dream (weights, prompts, picture, rollout): where it is equal, recordings can be replayed."""
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


# ------------------------------------------------------------------------------------------------ reading


def from_mapping(kind: type, values, where: str):
    """Builds the (nested, frozen) dataclass `kind` from plain YAML values, strictly.

    where: what is being read, for the error sentence. Lists become tuples, whole numbers may stand for floats.
    Errors: ValueError for an unknown key (names the nearest known one), a missing key, a wrong type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected keys and values for {kind.__name__}, got {values!r}.")
    known = {item.name: item for item in fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0)[0]
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {near!r}?")
    for name, item in known.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{where}: the key {name!r} is missing.")
    made = {key: _converted(value, hints[key], f"{where}: {key}") for key, value in values.items()}
    try:
        return kind(**made)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _converted(value, hint, where: str):
    """`value` as the annotation `hint` wants it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return from_mapping(hint, value, where)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _converted(value, next(i for i in inner if i is not types.NoneType), where)
    if origin is typing.Literal:
        if value not in inner:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, inner))}, got {value!r}.")
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_converted(one, inner[0], where) for one in value)
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _converted(one, inner[1], where) for key, one in value.items()}
    expected = origin or hint
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"{where} must be a {expected.__name__}, got {value!r}.")
    return value


def read_image(path) -> np.ndarray:
    """A picture file -> uint8 [H,W,3] RGB; ValueError when it cannot be read."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise ValueError(f"Picture {path} cannot be read: {error.strerror}.") from None
    picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if picture is None:
        raise ValueError(f"Picture {path} is no complete PNG or JPEG file; give another one.")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def fast_dtype(device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively (CUDA, CPUs with AVX512_BF16 or AMX), else float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16
    native = kind == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


def _check_bundle(folder: Path) -> WorldConfig:
    """Everything that can be known without loading a weight."""
    if not folder.is_dir():
        worlds = sorted(path.parent.name for path in folder.parent.glob("*/world.yaml"))
        raise ValueError(
            f"There is no world at {folder}; {'there are ' + ', '.join(worlds) if worlds else 'none is'} there."
        )
    absent = [name for name in _EVERYTHING if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder} is not a complete world: {absent[0]} is missing.")
    config = WorldConfig.read(folder / "world.yaml")
    for name in (file for group in config.images.values() for file in group):
        if not (folder / "images" / name).is_file():
            raise ValueError(f"{folder} is not a complete world: images/{name} is missing.")
    return config


def _load_network(kind: type[ModelMixin], folder: Path, device: torch.device, dtype: torch.dtype) -> ModelMixin:
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"{folder / 'config.json'} is damaged; fetch the world again.") from None
    if stored != kind.__name__:
        raise ValueError(
            f"{folder} holds a {stored}, a {kind.__name__} is expected; this world is not for this program."
        )
    _check_weights(folder)
    try:
        network, report = kind.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{folder} cannot be loaded ({reason}); fetch the world again.") from None
    wrong = [name for names in report.values() for name in names]
    if wrong:
        raise ValueError(f"{folder}: weights and config.json do not fit (first: {wrong[0]}); fetch the world again.")
    return network.eval().requires_grad_(False).to(device)


def _check_weights(folder: Path) -> None:
    """Every weights file is there and complete (a safetensors header says where its file ends)."""
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    names = {"diffusion_pytorch_model.safetensors"}
    try:
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{index} is damaged; fetch the world again.") from None
    for name in sorted(names):
        if not (folder / name).is_file():
            raise ValueError(f"{folder.parent} is not a complete world: {folder.name}/{name} is missing.")
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (SafetensorError, OSError):
            raise ValueError(f"{folder / name} is cut off or damaged; fetch the world again.") from None


def _check_fit(world: World) -> None:
    config, latent = world.config, world.autoencoder.config.latent_channels
    factor, patch = world.autoencoder.spatial_factor, world.transformer.config.patch_size
    faults = {
        f"prompts have {world.prompts.shape[1]} features, the transformer reads {world.transformer.config.text_dim}": (
            world.prompts.shape[1] != world.transformer.config.text_dim
        ),
        f"the autoencoder makes {latent} channels, the transformer reads {world.transformer.config.in_channels}": (
            latent != world.transformer.config.in_channels
        ),
        f"{config.height}x{config.width} pixels do not divide into tokens of {factor * patch[1]}x{factor * patch[2]}": (
            config.height % (factor * patch[1]) != 0 or config.width % (factor * patch[2]) != 0
        ),
    }
    for sentence, wrong in faults.items():
        if wrong:
            raise ValueError(f"{world.folder} does not fit together: {sentence}; export it again.")
    for prompt in [config.prompts.default, *config.images]:
        world.prompts[prompt]


# ------------------------------------------------------------------------------------------------ writing


def save_world(
    folder,
    config: WorldConfig,
    transformer: CausalWanTransformer,
    autoencoder: TinyAutoencoder,
    prompts: PromptBook,
    images: Mapping[str, list[np.ndarray]],
    readme: str = "",
) -> None:
    """Writes a bundle that `World.from_pretrained` opens; an older one of that name is replaced only by a complete one.

    images: prompt -> uint8 [H,W,3] start images, stored as images/<prompt>-<n>.png (they replace `config.images`).
    readme: README.md of the bundle. The networks are stored in the type they have, in files of at most 16 MB.
    """
    folder = Path(folder)
    names = {prompt: tuple(f"{prompt}-{n}.png" for n in range(len(group))) for prompt, group in images.items()}
    config = replace(config, images=names)
    for prompt in [config.prompts.default, *images]:
        prompts[prompt]
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / "images").mkdir(parents=True)
        for name, network in (("transformer", transformer), ("autoencoder", autoencoder)):
            network.save_pretrained(temporary / name, safe_serialization=True, max_shard_size=SHARD_SIZE)
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


def _write_png(path: Path, picture: np.ndarray, config: WorldConfig) -> None:
    if picture.dtype != np.uint8 or picture.shape != (config.height, config.width, 3):
        raise ValueError(
            f"Start image {path.name} must be uint8 [{config.height},{config.width},3], got {picture.dtype} "
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

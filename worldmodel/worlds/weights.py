"""Networks in a bundle's folders: opened, checked, loaded."""

import json
import warnings
from inspect import signature
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, ModelMixin
from safetensors import SafetensorError, safe_open

from worldmodel.errors import UserError, first_line
from worldmodel.models.tiny_autoencoder import TinyAutoencoder
from worldmodel.models.wan_autoencoder import Autoencoder, WanAutoencoder
from worldmodel.worlds.state_dict import check_tensors


def load_network(
    kind: type[ModelMixin], folder, device="cpu", dtype: torch.dtype = torch.float32
) -> ModelMixin:
    """The network in `folder` (config.json and safetensors files), in evaluation mode.

    kind: its class. dtype: type of its weights, whatever they are stored in.
    Errors: UserError with one sentence for a folder that is absent, cut off, of another kind, or
    does not fit itself. Nothing is looked for on the network.
    """
    folder = Path(folder)
    config = _read_config(kind, folder)
    stored = _stored_weights(folder)
    try:
        with init_empty_weights(include_buffers=False), warnings.catch_warnings(action="ignore"):
            network = kind(**config)
    except Exception as error:  # a foreign value can break anything
        raise UserError(
            f"{folder / 'config.json'} describes no {kind.__name__} ({first_line(error)}); "
            f"{_AGAIN}."
        ) from error
    try:
        check_tensors(
            stored, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        )
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    try:
        network = kind.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded ({first_line(error)}); {_AGAIN}.") from error
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
        raise UserError(
            f"{folder} holds no {kind.__name__}: config.json is missing; name another folder, or "
            "train one first."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        stored = config.get("_class_name")
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged; {_AGAIN}.") from None
    if stored != kind.__name__:
        raise UserError(
            f"{folder} holds a {stored}, a {kind.__name__} is expected; name another folder."
        )
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = [key for key in arguments if key not in signature(kind.__init__).parameters]
    if unknown:
        raise UserError(
            f"{path} has the unknown key {unknown[0]!r}: it was made by another version of this "
            "program; update it."
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
        raise UserError(f"{index} is damaged; {_AGAIN}.") from None
    stored = {}
    for name in sorted(names):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; {_AGAIN}.")
        try:
            with safe_open(
                folder / name, framework="pt"
            ) as file:  # a header says where its file ends
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    stored[key] = torch.empty(file.get_slice(key).get_shape(), device="meta")
        except (SafetensorError, OSError):
            raise UserError(f"{folder / name} is cut off or damaged; {_AGAIN}.") from None
    return stored


_AGAIN = "fetch the world or make the export again"

"""Read published transformer weights: strictly (every tensor is accounted for) and safely (no code
in a file runs).

Understood are safetensors files, single or sharded, and `torch.save` files that hold plain tensors
(see `state_dict` for the names in them); folders with one of these, worlds, and the checkpoints of
`distill train`; all of them on this machine or on the hub (see `hub`). The kind of a file is read
from its content, never from its name.
"""

import errno
import json
import pickle
import warnings
from collections.abc import Mapping
from inspect import signature
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from worldmodel.errors import UserError, first_line
from worldmodel.worlds.hub import fetch, read_index, weights_among
from worldmodel.worlds.state_dict import (
    PARTS,
    CheckpointError,
    CheckpointInfo,
    check_tensors,
    inspect_state,
    is_transformer,
    listing,
    match_camera,
    to_diffusers_names,
)

# sections of the recipe in our state.json; the remaining one is named after its stage
_RECIPE_SECTIONS = frozenset({"data", "optimiser", "optimizer", "model", "run"})
# `_class_name` in the config.json of a Wan
_NETWORKS = ("CausalWanTransformer", "WanTransformer3DModel", "WanModel", "CausalWanModel")


def read_state(path: str | Path) -> dict:
    """The content of weights here: {name: tensor}, or a trainer's {part: {name: tensor}}.

    path: a file, an index of sharded files, or a folder (see `find_weights`). Tensors are mapped
    from the file, not read, where the format allows. Raises FileNotFoundError; CheckpointError for
    other formats, damaged files, and pickles that hold anything but plain data (nothing in them
    runs); SourceError for a damaged index.
    """
    path = find_weights(path)
    if path.is_dir():
        return _read_training(path)
    with path.open("rb") as file:
        start = file.read(9)
    if start[:1] == b"{":
        return _read_shards(path)
    try:
        if start[8:9] == b"{":  # eight bytes of header length, then JSON
            return load_file(path)
        if start[:2] == b"PK":  # a zip archive: torch.save since 1.6
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if start[:1] == b"\x80":  # torch.save before 1.6: a bare pickle
            with warnings.catch_warnings(action="ignore"):  # about an unusual pickle protocol
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds Python objects other than tensors and could run code, so it was not "
            "loaded: ask for a safetensors file, or save the tensors alone."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        # EINVAL: the reader seeks to before the start of a short file
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise CheckpointError(
            f"{path} is damaged or incomplete ({first_line(error)}): fetch it again."
        ) from error
    # an empty file, or what git leaves where git-lfs is not installed
    if len(start) < 9 or start == b"version h":
        raise CheckpointError(
            f"{path} stands for a file that was not fetched, it holds {path.stat().st_size} "
            "bytes: fetch it again."
        )
    raise CheckpointError(
        f"{path} is neither a safetensors file nor a torch.save file: expected transformer weights."
    )


def find_weights(path: str | Path) -> Path:
    """The file that `read_state` reads for a path: the file itself, or the one transformer of a
    folder, in `transformer/` or in the folder.

    A checkpoint folder of `distill train` stays a folder. Of several weights files, the one with
    the tensors of a transformer is used. Raises FileNotFoundError for an absent path,
    CheckpointError for a folder with none or several.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weights file at {path}")
    if not path.is_dir() or _is_training(path):
        return path
    files = [*path.iterdir(), *(path / "transformer").glob("*")]
    found = weights_among([file.relative_to(path).as_posix() for file in files if file.is_file()])
    named = _values(path / "config.json").get("_class_name", "")
    foreign = named not in ("", *_NETWORKS)
    if len(found) > 1 or foreign:
        found = [name for name in found if _holds_transformer(path / name)]
    if foreign and not found:
        raise CheckpointError(
            f"{path} holds a {named}, a {_NETWORKS[0]} is expected: name another folder."
        )
    if len(found) != 1:
        what = (
            f"{len(found)} transformers, {listing(found)}" if found else "no transformer's weights"
        )
        raise CheckpointError(f"{path} holds {what}: name the file that is meant.")
    return path / found[0]


def inspect(source: str | Path, part: str | None = None) -> CheckpointInfo:
    """Describe a file, folder or place on the hub, see `inspect_state`; the configuration next to
    the weights is read too.

    Raises CheckpointError, SourceError, FileNotFoundError, as `read_state` and `hub.fetch`.
    """
    state, head_dim = _open(source)
    return inspect_state(state, part, head_dim)


def load_transformer(
    source: str | Path | Mapping,
    *,
    part: str | None = None,
    dtype: torch.dtype | None = None,
    **overrides,
):
    """Build the `CausalWanTransformer` that weights describe; the model owns its memory.

    source: a file, folder or place on the hub (see `hub`), or what `read_state` returned.
    part: which part of a trainer's checkpoint; default: the first of `PARTS`.
    dtype: number type of the weights, except those that diffusers keeps in float32; default: the
    file's.
    overrides: configuration values that the shapes do not say, or that are to differ:
    `attention_head_dim` (default: what a config.json next to the weights says, or 128);
    `camera=True` adds the PRoPE layers (zero, so the output does not change) to a model without
    them, `camera=False` leaves them out.

    Raises CheckpointError naming missing, foreign and misshapen tensors, or an unknown
    configuration key; for a source also the errors of `read_state` and `hub.fetch`.
    """
    # both imports are slow, and reading names needs neither
    from accelerate import init_empty_weights

    from worldmodel.models.transformer import CausalWanTransformer

    state, head_dim = (source, None) if isinstance(source, Mapping) else _open(source)
    info = inspect_state(state, part, head_dim)
    config = info.config(**overrides)
    known = signature(CausalWanTransformer.__init__).parameters
    unknown = [key for key in config if key not in known]
    if unknown:
        raise CheckpointError(
            f"unknown configuration key {unknown[0]!r}: expected one of "
            f"{', '.join(list(known)[1:])}."
        )
    with init_empty_weights(include_buffers=False):
        model = CausalWanTransformer(**config)
    tensors = dict(to_diffusers_names(state, part))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = match_camera(tensors, expected, info.camera, config["camera"])
    check_tensors(tensors, expected)
    for name in list(tensors):  # one by one: the file is mapped, only the copy is in memory
        precise = dtype and not set(name.split(".")).isdisjoint(model._keep_in_fp32_modules)
        tensors[name] = tensors[name].to(
            torch.float32 if precise else dtype or tensors[name].dtype, copy=True
        )
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _open(source: str | Path) -> tuple[dict, int | None]:
    """Weights of any source -> (content, width of a head where a file next to them says it)."""
    path = find_weights(fetch(source))
    return read_state(path), _head_dim(path)


def _head_dim(path: Path) -> int | None:
    """From the config.json of a Wan (diffusers' or the original) next to the weights, or the
    state.json of `distill train`.
    """
    values = _values(path / "state.json" if path.is_dir() else path.with_name("config.json"))
    try:
        if path.is_dir():
            return int(values["config"]["model"]["head_dim"])
        if values["_class_name"] not in _NETWORKS:
            return None
        return (
            int(values["attention_head_dim"])
            if "attention_head_dim" in values
            else values["dim"] // values["num_heads"]
        )
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return None  # the usual width is tried, and has to fit


def _values(file: Path) -> dict:
    """The values of a JSON file; empty where it cannot be read."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _is_training(folder: Path) -> bool:
    return (folder / "state.json").is_file()


def _read_training(folder: Path) -> dict:
    """`runs/X/STAGE/checkpoints/step-N` -> {network: {name: tensor}, "stage": its name, "step":
    steps taken}.
    """
    try:
        saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        stages = [name for name in saved["config"] if name not in _RECIPE_SECTIONS]
        step = int(saved["step"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{folder / 'state.json'} is damaged or of another program: name a weights file."
        ) from None
    files = sorted(
        file for file in folder.glob("*.safetensors") if not file.name.startswith("optimizer-")
    )
    if not any(file.stem in PARTS for file in files):
        raise CheckpointError(
            f"{folder} holds no transformer's weights: name the checkpoint of a stage that trains "
            "one."
        )
    return {file.stem: read_state(file) for file in files} | {
        "stage": ", ".join(stages),
        "step": step,
    }


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    """The tensors that an index names, from the files it names; each file must hold exactly its
    own.
    """
    table = read_index(index)
    state = {}
    for file in sorted(set(table.values())):
        if not (index.parent / file).is_file():
            raise CheckpointError(
                f"{index.parent / file} is missing, which {index.name} names: fetch it too."
            )
        held = read_state(index.parent / file)
        named = {name for name in table if table[name] == file}
        for names, fault in (
            (named - set(held), "lacks"),
            (set(held) - named, "also holds"),
        ):
            if names:
                raise CheckpointError(
                    f"{index.parent / file} {fault} {listing(sorted(map(str, names)))}: fetch "
                    "index and files again."
                )
        state |= held
    return state


def _holds_transformer(path: Path) -> bool:
    """Whether a file has the tensors of a Wan transformer, bare or in a part; of a safetensors file
    only the names are read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return is_transformer(file.keys())
    except (SafetensorError, OSError):
        pass
    try:
        state = read_state(path)
    except UserError:
        return False
    if not isinstance(state, Mapping):
        return False
    parts = [state, *(value for value in state.values() if isinstance(value, Mapping))]
    return any(is_transformer(part) for part in parts)

"""Reads published transformer weights: strictly (every tensor accounted for) and safely (no code in
a file ever runs).

Understood: safetensors files, single or sharded, and `torch.save` files that hold plain tensors,
with the parameter names of the original Wan2.1 code (Wan2.1, minWM, Self-Forcing, Causal-Forcing)
or of diffusers, bare or inside a trainer's checkpoint; folders with one of these, worlds, and the
checkpoints that our own training leaves; all of them here or on the hub (`worldmodel.worlds.hub`).
What a file is, is read from its content, never from its name.

    python -m worldmodel inspect SOURCE
    python -m worldmodel convert SOURCE --world configs/worlds/NAME.yaml --output FOLDER
"""

import errno
import importlib
import json
import pickle
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from worldmodel.errors import UserError, first_line
from worldmodel.worlds.hub import fetch, read_index, weights_among

State = Mapping[str, torch.Tensor]

WAN_HEAD_DIM = (
    128  # width of one attention head in every published Wan model; the shapes do not tell it
)
# Trainers save {part: state dict}; of several parts the first of these is taken, as the reference's
# inference does.
PARTS = (
    "generator_ema",
    "generator",
    "model",
    "average",
    "student",
)  # the last two: our own training's
_STEP_NAMES = ("step", "global_step", "iteration")  # how trainers call the number of steps taken
_RECIPE_SECTIONS = frozenset(
    {"data", "optimiser", "model", "run"}
)  # of our state.json; the one besides them is named after its stage
_NETWORKS = (
    "CausalWanTransformer",
    "WanTransformer3DModel",
    "WanModel",
    "CausalWanModel",
)  # `_class_name` in the config.json of a Wan
# Path segments that training puts into names: FSDP, checkpointing and torch.compile anywhere, the
# others in front.
_WRAPPER_SEGMENTS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
_LEADING_SEGMENTS = frozenset({"model", "diffusion_model", "module"})

# Wan2.1 module -> diffusers module. The last path segment (weight, bias) is kept; `modulation` is
# itself a parameter.
_OUTER_NAMES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
_BLOCK_NAMES = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "self_attn.prope_o": "attn1.prope_out",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "norm3": "norm2",  # the two codes number the norms differently
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_FAMILY_MARKS = {
    "wan": "text_embedding.0.weight",
    "diffusers": "condition_embedder.text_embedder.linear_1.weight",
}


class CheckpointError(UserError):
    """A weights file that cannot be used; the message is one sentence for the user."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a state dict holds, read from its names and shapes alone."""

    family: str  # naming scheme: "wan" (original code) or "diffusers"
    part: str  # part of a trainer's checkpoint that was taken, "" for a bare state dict
    other_parts: tuple[str, ...]  # parts of the file that were left alone, for example "critic"
    # what wrappers had put in front of the names, for example "model._fsdp_wrapped_module."
    prefix: str
    layers: int  # transformer blocks
    width: int  # features per token
    ffn_width: int  # features inside the feed-forward layers
    in_channels: int  # channels of a latent
    out_channels: int  # channels of the predicted velocity
    patch_size: tuple[int, int, int]  # latent cells per token: frames, rows, columns
    text_dim: int  # features of a text token
    freq_dim: int  # features of the sinusoidal clock
    camera: bool  # has the PRoPE output layers
    cross_attn_norm: bool  # layer norm with weights before cross attention
    head_dim: (
        int | None
    )  # width of an attention head where a file beside the weights says it; the tensors do not tell
    stage: str  # what the trainer says of it, "" where it says nothing: "dmd, step 500"
    dtypes: tuple[str, ...]  # number types of the tensors
    parameters: int  # numbers in all tensors

    def config(self, **overrides) -> dict:
        """Configuration for `CausalWanTransformer`; `overrides` replace or complete what the shapes
        tell.

        The number of heads is width / `attention_head_dim` (default: what stands beside the
        weights, or 128, as in every public Wan).
        Errors: CheckpointError where the heads do not make the width.
        """
        if "num_attention_heads" in overrides and "attention_head_dim" not in overrides:
            overrides["attention_head_dim"] = self.width // max(1, overrides["num_attention_heads"])
        head_dim = overrides.setdefault("attention_head_dim", self.head_dim or WAN_HEAD_DIM)
        heads = overrides.setdefault("num_attention_heads", self.width // max(1, head_dim))
        if heads * head_dim != self.width or heads < 1:
            raise CheckpointError(
                f"{heads} heads of {head_dim} do not make the width {self.width} of this "
                "checkpoint: give attention_head_dim (shapes do not tell it)."
            )
        derived = {
            "patch_size": self.patch_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "text_dim": self.text_dim,
            "freq_dim": self.freq_dim,
            "ffn_dim": self.ffn_width,
            "num_layers": self.layers,
            "cross_attn_norm": self.cross_attn_norm,
            "camera": self.camera,
        }
        return derived | overrides


def read_state(path: str | Path) -> dict:
    """The content of weights here: {name: tensor}, or a trainer's {part: {name: tensor}}.

    path: a file, an index of sharded files, or a folder (see `find_weights`). Tensors are mapped
    from the file, not read, where the format allows.
    Errors: FileNotFoundError; CheckpointError for other formats, damaged files, and pickles that
    hold anything besides plain data (nothing in them runs); SourceError for a damaged index.
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
            with warnings.catch_warnings(
                action="ignore"
            ):  # of an unusual protocol; what it holds is told below
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds Python objects besides tensors and could run code, so it was not "
            "loaded: ask for a safetensors file, or save the tensors alone."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        if (
            isinstance(error, OSError) and error.errno != errno.EINVAL
        ):  # that one: the reader seeks to before a short file's start
            raise
        raise CheckpointError(
            f"{path} is damaged or incomplete ({first_line(error)}): fetch it again."
        ) from error
    if (
        len(start) < 9 or start == b"version h"
    ):  # an empty file, or what git leaves where git-lfs is not installed
        raise CheckpointError(
            f"{path} stands for a file that was not fetched, it holds {path.stat().st_size} "
            "bytes: fetch it again."
        )
    raise CheckpointError(
        f"{path} is neither a safetensors file nor a torch.save file: expected transformer weights."
    )


def find_weights(path: str | Path) -> Path:
    """What `read_state` reads of a path: a file itself; of a folder its one transformer, in
    `transformer/` or in the folder.

    A checkpoint folder of our training stays a folder. Of several weights files, the one with the
    tensors of a transformer is taken.
    Errors: FileNotFoundError for an absent path; CheckpointError for a folder with none or several.
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
            f"{len(found)} transformers, {_listing(found)}" if found else "no transformer's weights"
        )
        raise CheckpointError(f"{path} holds {what}: name the file that is meant.")
    return path / found[0]


def inspect(source: str | Path, part: str | None = None) -> CheckpointInfo:
    """Says what a file, folder or place on the hub holds, as `inspect_state`; what stands beside
    the weights is read too.

    Errors: CheckpointError, SourceError, FileNotFoundError, as `read_state` and
    `worldmodel.worlds.hub.fetch`.
    """
    return _inspect(*_select(*_open(source), part))


def inspect_state(state: Mapping, part: str | None = None) -> CheckpointInfo:
    """Says what a state dict (or a trainer's dict of state dicts) holds. `part` picks one part of a
    trainer's file.

    Errors: CheckpointError where it is not a Wan transformer for text and camera, naming what is
    missing or foreign.
    """
    return _inspect(*_select(state, None, part))


def to_diffusers_names(state: Mapping, part: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a Wan or diffusers state dict under diffusers' names, whatever wraps them.

    The reference's `self_attn.prope_o` becomes `attn1.prope_out`. `state` is not changed and shares
    its tensors.
    Errors: CheckpointError naming a tensor that no Wan transformer has.
    """
    bare = _bare_names(_select(state, None, part)[0])
    if _family(bare) == "diffusers":
        return bare
    renamed = {name: _diffusers_name(name) for name in bare}
    foreign = [name for name, new in renamed.items() if new is None]
    if foreign:
        raise CheckpointError(
            f"a Wan text-to-video transformer has no such tensors: {_listing(foreign)}; give "
            "another model."
        )
    return {renamed[name]: tensor for name, tensor in bare.items()}


def load_transformer(
    source: str | Path | Mapping,
    *,
    part: str | None = None,
    dtype: torch.dtype | None = None,
    **overrides,
):
    """Builds the `CausalWanTransformer` that weights describe; the model owns its memory.

    Args:
        source: file, folder or place on the hub (`worldmodel.worlds.hub`), or what `read_state`
        returned.
        part: which part of a trainer's checkpoint; default: the EMA if there is one.
        dtype: number type of the weights, except those that diffusers keeps in float32; default:
        the file's.
        overrides: configuration values that shapes do not tell or that are to differ:
        `attention_head_dim` (default: what a config.json beside the weights says, or 128);
        `camera=True` adds the camera path (zero, so the output does not change) to a model without
        one, `camera=False` leaves it out.

    Errors: CheckpointError naming missing, foreign and misshapen tensors, or an unknown
    configuration key; for a source also those of `read_state` and `worldmodel.worlds.hub.fetch`.
    """
    from accelerate import (
        init_empty_weights,
    )  # both imports are slow, and reading names needs neither

    from worldmodel.models.transformer import CausalWanTransformer

    state, beside = (source, None) if isinstance(source, Mapping) else _open(source)
    info = _inspect(*_select(state, beside, part))
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
    tensors = _match_camera(tensors, expected, info.camera, config["camera"])
    check_tensors(tensors, expected)
    for name in list(tensors):  # one by one: a file is mapped, and only the copy lies in memory
        precise = dtype and not set(name.split(".")).isdisjoint(model._keep_in_fp32_modules)
        tensors[name] = tensors[name].to(
            torch.float32 if precise else dtype or tensors[name].dtype, copy=True
        )
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def check_tensors(state: State, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compares names and shapes with the expected ones. Errors: one CheckpointError naming every
    kind of difference.
    """
    missing = [name for name in expected if name not in state]
    foreign = [name for name in state if name not in expected]
    shapes = [
        f"{name} {list(tensor.shape)} instead of {list(expected[name])}"
        for name, tensor in state.items()
        if name in expected and tuple(tensor.shape) != tuple(expected[name])
    ]
    found = [
        f"{kind}: {_listing(names)}"
        for kind, names in (
            ("missing", missing),
            ("not expected", foreign),
            ("wrong shape", shapes),
        )
        if names
    ]
    if found:
        raise CheckpointError(
            f"the weights do not fit the network they are for ({'; '.join(found)}): "
            "it is incomplete or of another model."
        )


@dataclass(frozen=True)
class _Told:
    """What is known of a state dict besides its tensors."""

    part: str = ""
    other_parts: tuple[str, ...] = ()
    head_dim: int | None = None
    stage: str = ""


def _open(source: str | Path) -> tuple[dict, int | None]:
    """Weights of any source -> (content, width of a head that a file beside them tells)."""
    path = find_weights(fetch(source))
    return read_state(path), _told_head_dim(path)


def _told_head_dim(path: Path) -> int | None:
    """From the config.json of a Wan (diffusers' or the original) beside the weights, or our
    training's state.json.
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
        return None  # nothing told: the usual width is tried, and has to fit


def _values(file: Path) -> dict:
    """What a JSON file beside the weights says; empty where it says nothing."""
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
        told = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        stages = [name for name in told["config"] if name not in _RECIPE_SECTIONS]
        step = int(told["step"])
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
    """The tensors that an index names, out of the files it names; each file holds exactly its
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
            (set(held) - named, "holds beside what the index names"),
        ):
            if names:
                raise CheckpointError(
                    f"{index.parent / file} {fault} {_listing(sorted(map(str, names)))}: fetch "
                    "index and files again."
                )
        state |= held
    return state


def _holds_transformer(path: Path) -> bool:
    """Whether a file has the tensors of a Wan transformer, bare or in a part; of safetensors, only
    the names are read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return _is_transformer(file.keys())
    except (SafetensorError, OSError):
        pass
    try:
        state = read_state(path)
    except UserError:
        return False
    if not isinstance(state, Mapping):
        return False
    parts = [state, *(value for value in state.values() if isinstance(value, Mapping))]
    return any(_is_transformer(part) for part in parts)


def _is_transformer(names: Iterable) -> bool:
    return not {_bare(str(name)) for name in names}.isdisjoint(_FAMILY_MARKS.values())


def _select(state: Mapping, head_dim: int | None, part: str | None) -> tuple[State, _Told]:
    """-> (state dict, what is known besides)."""
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(
            f"expected a dict with the weights of a transformer, found {type(state).__name__} "
            "with nothing in it."
        )
    parts = [name for name, value in state.items() if isinstance(value, Mapping)]
    if part is None and not parts:
        chosen = state
        name = ""
    else:
        wanted = [part] if part else [name for name in PARTS if name in parts]
        if not wanted or wanted[0] not in parts:
            raise CheckpointError(
                f"the checkpoint has no part {part or ' / '.join(PARTS)}: it has "
                f"{_listing(map(str, state))}."
            )
        name = wanted[0]
        chosen = state[wanted[0]]
    wrong = [
        key
        for key, value in chosen.items()
        if not isinstance(key, str) or not isinstance(value, torch.Tensor)
    ]
    if wrong or not chosen:
        raise CheckpointError(
            "expected a dict with the weights of a transformer, found other things: "
            f"{_listing(map(str, wrong))}."
        )
    if not name:
        return chosen, _Told(head_dim=head_dim)
    stage = [state[key] for key in ("stage",) if isinstance(state.get(key), str)]
    steps = [f"step {int(state[key])}" for key in _STEP_NAMES if _is_count(state.get(key))]
    others = tuple(str(key) for key in state if key not in (name, "stage", *_STEP_NAMES))
    return chosen, _Told(name, others, head_dim, ", ".join(stage + steps[:1]))


def _is_count(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _bare(name: str) -> str:
    segments = [segment for segment in name.split(".") if segment not in _WRAPPER_SEGMENTS]
    while len(segments) > 1 and segments[0] in _LEADING_SEGMENTS:
        segments.pop(0)
    return ".".join(segments)


def _bare_names(state: State) -> dict[str, torch.Tensor]:
    bare = {}
    for name, tensor in state.items():
        if _bare(name) in bare:
            raise CheckpointError(
                f"the checkpoint has two tensors for {_bare(name)}: expected one model."
            )
        bare[_bare(name)] = tensor
    return bare


def _family(bare: State) -> str:
    for family, mark in _FAMILY_MARKS.items():
        if mark in bare:
            return family
    raise CheckpointError(
        f"not the weights of a Wan transformer: expected {' or '.join(_FAMILY_MARKS.values())}, "
        f"found {_listing(bare)}."
    )


def _diffusers_name(name: str) -> str | None:
    """Wan2.1 name -> diffusers name, None for a name that a text-to-video transformer has not."""
    block = ""
    inner = name
    names = _OUTER_NAMES
    if name.startswith("blocks."):
        _, number, inner = (name.split(".", 2) + ["", ""])[:3]
        block = f"blocks.{number}."
        names = _BLOCK_NAMES
    if name == "head.modulation" or (block and inner == "modulation"):
        return block + "scale_shift_table"
    module, _, leaf = inner.rpartition(".")
    return f"{block}{names[module]}.{leaf}" if module in names else None


def _inspect(state: State, told: _Told) -> CheckpointInfo:
    bare = _bare_names(state)
    family = _family(bare)
    mark = _FAMILY_MARKS[family]
    named = to_diffusers_names(bare)

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in named:
            raise CheckpointError(f"the checkpoint is incomplete: {name} is missing.")
        if named[name].ndim != dimensions:
            raise CheckpointError(
                f"{name} has shape {list(named[name].shape)}: expected {dimensions} dimensions."
            )
        return tuple(named[name].shape)

    width, in_channels, *patch = shape("patch_embedding.weight", 5)
    numbers = {name.split(".")[1] for name in named if name.startswith("blocks.")}
    cells = patch[0] * patch[1] * patch[2]
    return CheckpointInfo(
        family=family,
        part=told.part,
        other_parts=told.other_parts,
        prefix=next(name for name in state if _bare(name) == mark).removesuffix(mark),
        layers=len(numbers),
        width=width,
        ffn_width=shape("blocks.0.ffn.net.0.proj.weight", 2)[0],
        in_channels=in_channels,
        out_channels=shape("proj_out.weight", 2)[0] // cells,
        patch_size=tuple(patch),
        text_dim=shape("condition_embedder.text_embedder.linear_1.weight", 2)[1],
        freq_dim=shape("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        camera=any(".attn1.prope_out." in name for name in named),
        cross_attn_norm="blocks.0.norm2.weight" in named,
        head_dim=told.head_dim,
        stage=told.stage,
        dtypes=tuple(
            sorted({str(tensor.dtype).removeprefix("torch.") for tensor in named.values()})
        ),
        parameters=sum(tensor.numel() for tensor in named.values()),
    )


def _match_camera(tensors: State, expected: Mapping, has: bool, wants: bool) -> State:
    """Adds the camera path as zeros, or leaves it out, where the caller asked for the other kind
    than the file has.
    """
    if wants and not has:
        like = tensors["proj_out.weight"]
        zeros = {
            name: like.new_zeros(shape)
            for name, shape in expected.items()
            if ".attn1.prope_out." in name
        }
        return {**tensors, **zeros}
    if has and not wants:
        return {name: tensor for name, tensor in tensors.items() if ".attn1.prope_out." not in name}
    return tensors


def _listing(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def main(argv: list[str] | None = None) -> int:
    """The command line, `inspect` and `convert`; returns the exit status (2 for weights that cannot
    be used).
    """
    # It makes worlds, which are made of this room: it lives further down, in worldmodel/convert.py,
    # and is found by name.
    return importlib.import_module("worldmodel.worlds.convert").main(
        sys.argv[1:] if argv is None else argv
    )


if __name__ == "__main__":
    sys.exit(main())

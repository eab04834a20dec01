"""State dicts of Wan transformers: naming schemes, parts, shapes. Reads no file.

Understood are the parameter names of the original Wan2.1 code (Wan2.1, minWM, Self-Forcing,
Causal-Forcing) and of diffusers, bare or inside a trainer's checkpoint.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from worldmodel.errors import UserError

State = Mapping[str, torch.Tensor]
# width of an attention head in every published Wan model; the shapes do not tell it
WAN_HEAD_DIM = 128
# Trainers save {part: state dict}. Of several parts the first of these is used, as in the public
# inference code; the last two are written by `distill train`.
PARTS = ("generator_ema", "generator", "model", "average", "student")
_STEP_NAMES = ("step", "global_step", "iteration")  # how trainers name the number of steps taken
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
    part: str  # part of a trainer's checkpoint that is used, "" for a bare state dict
    other_parts: tuple[str, ...]  # parts of the file that are not used, for example "critic"
    # what wrappers put before the names, for example "model._fsdp_wrapped_module."
    prefix: str
    layers: int  # transformer blocks
    width: int  # features per token
    ffn_width: int  # features inside the feed-forward layers
    in_channels: int  # channels of a latent
    out_channels: int  # channels of the predicted velocity
    patch_size: tuple[int, int, int]  # latent cells per token: frames, rows, columns
    text_dim: int  # features of a text token
    freq_dim: int  # features of the sinusoidal time embedding
    camera: bool  # has the PRoPE output layers
    cross_attn_norm: bool  # layer norm with weights before cross attention
    head_dim: int | None  # width of an attention head, where a file next to the weights says it
    stage: str  # stage and step as the trainer wrote them ("dmd, step 500"), or ""
    dtypes: tuple[str, ...]  # number types of the tensors
    parameters: int  # numbers in all tensors

    def config(self, **overrides) -> dict:
        """Configuration for `CausalWanTransformer`; `overrides` replace or complete what the shapes
        say.

        The number of heads is width / `attention_head_dim` (default: what a file next to the
        weights says, or 128, as in every public Wan). Raises CheckpointError where the heads do not
        make up the width.
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


def inspect_state(
    state: Mapping, part: str | None = None, head_dim: int | None = None
) -> CheckpointInfo:
    """Describe a state dict, or a trainer's dict of state dicts.

    part: which part of a trainer's file to use; default: the first of `PARTS`. head_dim: width of
    an attention head, where it is known. Raises CheckpointError where this is not a Wan transformer
    for text and camera; the message names what is missing or foreign.
    """
    tensors, origin = _select(state, part)
    return _inspect(tensors, origin, head_dim)


def to_diffusers_names(state: Mapping, part: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a Wan or diffusers state dict under diffusers' names, without wrappers.

    minWM's `self_attn.prope_o` becomes `attn1.prope_out`. `state` is not changed and shares its
    tensors. Raises CheckpointError naming a tensor that no Wan transformer has.
    """
    bare = _bare_names(_select(state, part)[0])
    if _family(bare) == "diffusers":
        return bare
    renamed = {name: _diffusers_name(name) for name in bare}
    foreign = [name for name, new in renamed.items() if new is None]
    if foreign:
        raise CheckpointError(
            f"a Wan text-to-video transformer has no such tensors: {listing(foreign)}; give "
            "another model."
        )
    return {renamed[name]: tensor for name, tensor in bare.items()}


def check_tensors(state: State, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes with the expected ones. Raises one CheckpointError that names every
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
        f"{kind}: {listing(names)}"
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
class _Origin:
    """Where in a trainer's file a state dict was found; the defaults: it is the whole file."""

    part: str = ""
    other_parts: tuple[str, ...] = ()
    stage: str = ""


def is_transformer(names: Iterable) -> bool:
    """Whether tensors of these names are a Wan transformer, bare or wrapped."""
    return not {_bare(str(name)) for name in names}.isdisjoint(_FAMILY_MARKS.values())


def _select(state: Mapping, part: str | None) -> tuple[State, _Origin]:
    """The state dict in what a file holds, and where it was found."""
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
                f"{listing(map(str, state))}."
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
            f"{listing(map(str, wrong))}."
        )
    if not name:
        return chosen, _Origin()
    stage = [state[key] for key in ("stage",) if isinstance(state.get(key), str)]
    steps = [f"step {int(state[key])}" for key in _STEP_NAMES if _is_count(state.get(key))]
    others = tuple(str(key) for key in state if key not in (name, "stage", *_STEP_NAMES))
    return chosen, _Origin(name, others, ", ".join(stage + steps[:1]))


def _is_count(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _bare(name: str) -> str:
    """A tensor's name without what wrappers put into it."""
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
        f"found {listing(bare)}."
    )


def _diffusers_name(name: str) -> str | None:
    """Wan2.1 name -> diffusers name; None for a name that no text-to-video transformer has."""
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


def _inspect(state: State, origin: _Origin, head_dim: int | None) -> CheckpointInfo:
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
        part=origin.part,
        other_parts=origin.other_parts,
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
        head_dim=head_dim,
        stage=origin.stage,
        dtypes=tuple(
            sorted({str(tensor.dtype).removeprefix("torch.") for tensor in named.values()})
        ),
        parameters=sum(tensor.numel() for tensor in named.values()),
    )


def match_camera(tensors: State, expected: Mapping, has: bool, wants: bool) -> State:
    """Add the PRoPE output layers as zeros where the model `wants` them and the file has none; drop
    them in the opposite case.
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


def listing(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are, for a message."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

"""Who attends to whom: one attention call, and the contexts that a pass of the network runs in.

An `AttentionContext` says where the tokens of a pass stand (rotary tables, camera matrices) and
what their queries see. The network reads nothing else of a mode or of a past. There are three:
`Bidirectional` and `TeacherForcing` here, and the context of a chunk over remembered frames, which
`KVCache.begin_chunk` makes.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.device import float64_device
from worldmodel.models import prope
from worldmodel.models.prope import CameraMatrices
from worldmodel.models.rope import rope_table, rotate


class RopeTables(NamedTuple):
    """Rotary tables of the tokens of a pass, `[F, N, 1, head_dim]` each (see `rope.rope_table`)."""

    cos: Tensor
    sin: Tensor


class AttentionContext(Protocol):
    """Where the tokens of a pass stand and what they see.

    `rope`: tables of its F frames of N tokens. `cameras`: matrices of its frames, or None without
    the camera path.
    """

    rope: RopeTables
    cameras: CameraMatrices | None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries, keys and values of the pass `[B, H, F N, head_dim]` (H = heads, twice as many
        with cameras) -> the result of attention, same shape as `q`.
        """
        ...

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Takes the pass's own un-rotated keys and raw values `[B, F, N, width]`."""
        ...


@dataclass(frozen=True)
class TokenLayout:
    """How a latent frame becomes tokens; `CausalWanTransformer.layout` makes it."""

    rows: int  # of tokens
    columns: int
    heads: int
    head_dim: int
    camera: bool  # whether the network has the PRoPE path
    dtype: torch.dtype  # that features are computed in
    device: torch.device

    @property
    def tokens(self) -> int:
        """Tokens of a frame."""
        return self.rows * self.columns

    def rope(self, positions: Tensor) -> RopeTables:
        """Tables for frames at rotary `positions` `[F]`; angles are computed in float64."""
        positions = positions.to(float64_device(positions.device))
        tables = rope_table(positions, self.rows, self.columns, self.head_dim)
        return RopeTables(*(table.unsqueeze(2).to(self.device, self.dtype) for table in tables))

    def cameras(self, projmats: Tensor | None) -> CameraMatrices | None:
        """Matrices for `projmats` `[B, F, 4, 4]` (see `prope`); None without the PRoPE path."""
        if projmats is None or not self.camera:
            return None
        width = self.heads * self.head_dim
        return prope.camera_matrices(projmats, self.dtype, width, self.device)


class Bidirectional:
    """Every frame sees every frame, as Wan2.1 was trained.

    frames: of the pass. projmats: `[B, F, 4, 4]` from `prope.projmats`; None = no camera path.
    """

    def __init__(self, layout: TokenLayout, frames: int, projmats: Tensor | None = None):
        _check_cameras(projmats, frames)
        self.rope = layout.rope(torch.arange(frames, device=layout.device))
        self.cameras = layout.cameras(projmats)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Nothing is remembered."""


class TeacherForcing:
    """`[clean frames | noisy frames]` in one pass; noisy chunk i sees the clean chunks before it
    and itself (stages 1 and 2 of Causal Forcing).

    frames: clean frames, as many noisy ones follow. chunk: frames denoised together. projmats:
    `[B, F, 4, 4]` of the clean frames; the noisy ones have the same cameras.
    """

    def __init__(
        self, layout: TokenLayout, frames: int, chunk: int, projmats: Tensor | None = None
    ):
        _check_cameras(projmats, frames)
        if frames % chunk:
            raise ValueError(
                f"teacher forcing needs a multiple of {chunk} latent frames, got {frames}: change "
                "the clip's length or chunk"
            )
        self.rope = layout.rope(torch.arange(frames, device=layout.device).repeat(2))
        self.cameras = layout.cameras(None if projmats is None else projmats.repeat(1, 2, 1, 1))
        self._chunk = chunk * layout.tokens

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return teacher_forcing(q, k, v, self._chunk)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Nothing is remembered."""


def _check_cameras(projmats: Tensor | None, frames: int) -> None:
    if projmats is not None and projmats.shape[1] != frames:
        raise ValueError(
            f"one camera a latent frame is needed, got {projmats.shape[1]} for {frames} frames: "
            f"pass {frames}"
        )


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention without a mask: q `[B, H, N, D]`, k and v `[B, H, M, D]` -> `[B, H, N, D]`.

    On a CPU three plain products are about twice as fast as torch's fused kernel for the few
    queries of one latent frame.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(dim=-1).to(v.dtype) @ v


def project_kv(
    k: Tensor, v: Tensor, rope: RopeTables, inverse: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, F, N, width]` as attention reads them, `[B, heads or 2 heads, F N,
    head_dim]`: the rotary path, then PRoPE's.

    inverse: `CameraMatrices.key`, or None without the camera path.
    """
    keys = [rotate(k.unflatten(-1, (heads, -1)), *rope)]
    values = [v.unflatten(-1, (heads, -1))]
    if inverse is not None:
        keys.append(prope.apply(inverse, k).unflatten(-1, (heads, -1)))
        values.append(prope.apply(inverse, v).unflatten(-1, (heads, -1)))
    return merge_paths(keys), merge_paths(values)


def merge_paths(paths: list[Tensor]) -> Tensor:
    """Features `[B, F, N, heads, head_dim]` of one path or two -> `[B, heads or 2 heads, F N,
    head_dim]`.
    """
    return torch.cat(paths, dim=-2).flatten(1, 2).transpose(1, 2)


def teacher_forcing(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Attention over `[clean frames | noisy frames]`, each `[B, H, 2 N, D]`, in chunks of `chunk`
    tokens.

    Every chunk, clean or noisy, sees the clean chunks before it and itself. A loop over chunks does
    only the work that the mask leaves, about a quarter; `dense_teacher_forcing` is the reference it
    is tested against.
    """
    # a list over chunks of [B, H, 2, chunk, D]
    q, k, v = (x.unflatten(2, (2, -1, chunk)).unbind(3) for x in (q, k, v))
    clean_k = [x[:, :, 0] for x in k]
    clean_v = [x[:, :, 0] for x in v]
    outputs = []
    for index, query in enumerate(q):
        if index == 0:
            outputs.append(attend(query, k[0], v[0]))
            continue
        past_k = torch.cat(clean_k[:index], dim=2)
        past_v = torch.cat(clean_v[:index], dim=2)
        outputs.append(_attend_past_and_own(query, past_k, past_v, k[index], v[index]))
    return torch.stack(outputs, dim=3).flatten(2, 4)


def _attend_past_and_own(
    query: Tensor, past_k: Tensor, past_v: Tensor, own_k: Tensor, own_v: Tensor
) -> Tensor:
    """Both versions of a chunk `[B, H, 2, n, D]` attend to a shared past `[B, H, m, D]` and each to
    itself.
    """
    if query.device.type != "cpu":
        shape = (-1, -1, 2, -1, -1)
        k = torch.cat([past_k.unsqueeze(2).expand(shape), own_k], dim=3)
        v = torch.cat([past_v.unsqueeze(2).expand(shape), own_v], dim=3)
        out = F.scaled_dot_product_attention(*(x.flatten(1, 2) for x in (query, k, v)))
        return out.unflatten(1, (-1, 2))
    query = query * query.shape[-1] ** -0.5
    past = query.flatten(2, 3) @ past_k.transpose(-1, -2)
    own = query @ own_k.transpose(-1, -2)
    scores = torch.cat([past.unflatten(2, (2, -1)), own], dim=-1)
    weights = scores.softmax(dim=-1).to(own_v.dtype)
    past, own = weights.split([past_k.shape[2], own_k.shape[3]], dim=-1)
    return (past.flatten(2, 3) @ past_v).unflatten(2, (2, -1)) + own @ own_v


def teacher_forcing_mask(chunks: int, chunk: int, device: torch.device | str = "cpu") -> Tensor:
    """Boolean `[2 N, 2 N]` (query row, key column; True = may attend) over `[clean | noisy]`
    tokens, N = chunks * chunk.
    """
    index = torch.arange(chunks, device=device)
    before = index[:, None] > index[None]
    same = index[:, None] == index[None]
    clean = torch.cat([before | same, torch.zeros_like(same)], dim=1)
    noisy = torch.cat([before, same], dim=1)
    return torch.cat([clean, noisy]).repeat_interleave(chunk, 0).repeat_interleave(chunk, 1)


def dense_teacher_forcing(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """The plain form of `teacher_forcing`: one call under a dense mask."""
    mask = teacher_forcing_mask(q.shape[2] // 2 // chunk, chunk, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

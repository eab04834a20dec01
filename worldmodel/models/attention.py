"""Who attends to whom: one attention call, and the teacher-forcing pattern built from it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.models import prope
from worldmodel.models.rope import rotate


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention without a mask: q `[B, H, N, D]`, k and v `[B, H, M, D]` -> `[B, H, N, D]`.

    On a CPU the three plain products are about twice as fast as torch's fused kernel for the few
    queries of one latent frame.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(dim=-1).to(v.dtype) @ v


def teacher_forcing(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Attention over `[clean frames | noisy frames]`, each `[B, H, 2 N, D]`, in chunks.

    Every chunk, clean or noisy, sees the clean chunks before it and itself. A loop over chunks does
    only the work the mask leaves over, about a quarter; `dense_teacher_forcing` is the reference it
    is tested against.
    """
    q, k, v = (
        x.unflatten(2, (2, -1, chunk)).unbind(3) for x in (q, k, v)
    )  # a list over chunks of [B, H, 2, chunk, D]
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
    """Both versions of a chunk (`[B, H, 2, n, D]`) attend to a shared past (`[B, H, m, D]`) and
    each to itself.
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
    weights = torch.cat([past.unflatten(2, (2, -1)), own], dim=-1).softmax(dim=-1).to(own_v.dtype)
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


def turned(
    k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, inverse: Tensor | None, heads: int
) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, F, N, width]` as attention reads them, `[B, heads or 2 heads, F N,
    head_dim]`: rotary path, then PRoPE's.

    `cos`, `sin`: tables `[F, N, 1, head_dim]`; `inverse`: `CameraMatrices.key`, or None without the
    camera path.
    """
    keys = [rotate(k.unflatten(-1, (heads, -1)), cos, sin)]
    values = [v.unflatten(-1, (heads, -1))]
    if inverse is not None:
        keys.append(prope.apply(inverse, k).unflatten(-1, (heads, -1)))
        values.append(prope.apply(inverse, v).unflatten(-1, (heads, -1)))
    return by_head(keys), by_head(values)


def by_head(paths: list[Tensor]) -> Tensor:
    """Features `[B, F, N, heads, head_dim]` of one path or two -> `[B, heads or 2 heads, F N,
    head_dim]`.
    """
    return torch.cat(paths, dim=-2).flatten(1, 2).transpose(1, 2)

"""`CausalWanTransformer`: Wan2.1's video diffusion transformer with camera poses (PRoPE).

One network for every way of attending: an `AttentionContext` says where the tokens of a pass stand
and what they see (bidirectional, teacher forcing, or a chunk over remembered frames).
Parameter names and config keys are those of diffusers' `WanTransformer3DModel`, so
`Wan-AI/Wan2.1-T2V-1.3B-Diffusers` loads as it is; a camera model has one more linear layer a block,
`attn1.prope_out`, zero at the start. Tokens are `[B, F, N, width]`: F latent frames of N tokens
each; the residual stream and the modulation are float32.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from worldmodel.device import float64_device
from worldmodel.errors import UserError
from worldmodel.models import attention, prope
from worldmodel.models.attention import (
    AttentionContext,
    RopeTables,
    TokenLayout,
    merge_paths,
    project_kv,
)
from worldmodel.models.kv_cache import CachedContext
from worldmodel.models.prope import CameraMatrices
from worldmodel.models.rope import rotate
from worldmodel.schedule import CLOCK


@dataclass(frozen=True)
class TextContext:
    """A prompt ready for every layer: cross-attention keys and values, each `[B, heads, L,
    head_dim]`.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]


# of a block: shift, factor and gate of attention, then of the feed-forward, each
# `[B, F, 1, width]` float32
Modulation = tuple[Tensor, ...]


@dataclass(frozen=True)
class TimeContext:
    """A noise level ready for every layer: embedding `[B, F, width]` float32 and every block's
    modulation.
    """

    embedding: Tensor
    layers: tuple[Modulation, ...]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the whole width, across heads, as Wan has it."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, eps=self.eps).mul(self.weight).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Affine layer norm in float32, whatever type its weights have."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )


class TwoLayers(nn.Module):
    """linear, activation, linear: the time and text embedders."""

    def __init__(self, width_in: int, width: int, activation: nn.Module):
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.activation = activation
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class ConditionEmbedder(nn.Module):
    """Noise level -> modulation, prompt embedding -> context."""

    def __init__(self, width: int, freq_dim: int, text_dim: int):
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TwoLayers(freq_dim, width, nn.SiLU())
        self.time_proj = nn.Linear(width, 6 * width)
        self.text_embedder = TwoLayers(text_dim, width, nn.GELU(approximate="tanh"))

    def embed_time(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """sigma `[B, F]` -> embedding `[B, F, width]` and modulation `[B, F, 6, width]`, float32
        even under autocast.
        """
        exact = float64_device(sigma.device)
        half = torch.arange(self.freq_dim // 2, dtype=torch.float64, device=exact)
        angle = (sigma.float() * CLOCK).to(exact).double()[..., None] * 10000.0 ** (
            -half / (self.freq_dim // 2)
        )
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1).float().to(sigma.device)
        with torch.autocast(sigma.device.type, enabled=False):
            embedding = self.time_embedder(wave.to(self.time_embedder.linear_1.weight.dtype))
            modulation = self.time_proj(F.silu(embedding).to(self.time_proj.weight.dtype))
        return embedding.float(), modulation.float().unflatten(-1, (6, -1))


class Attention(nn.Module):
    """Projections of self- or cross-attention in diffusers' names; `camera` adds the second path's
    output layer.
    """

    def __init__(self, width: int, heads: int, eps: float, camera: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q = RMSNorm(width, eps)
        self.norm_k = RMSNorm(width, eps)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.prope_out = nn.Linear(width, width) if camera else None

    def queries(self, x: Tensor, rope: RopeTables, cameras: CameraMatrices | None) -> Tensor:
        """x `[B, F, N, width]` -> `[B, heads, F N, head_dim]`, or twice the heads when there are
        cameras: the rotary path, then PRoPE's.
        """
        q = self.norm_q(self.to_q(x))
        paths = [rotate(q.unflatten(-1, (self.heads, -1)), *rope)]
        if cameras is not None:
            paths.append(prope.apply(cameras.query, q).unflatten(-1, (self.heads, -1)))
        return merge_paths(paths)

    def kv(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x `[B, F, N, width]` -> its un-rotated keys and raw values, same shape."""
        return self.norm_k(self.to_k(x)), self.to_v(x)

    def output(self, out: Tensor, frames: int, cameras: CameraMatrices | None) -> Tensor:
        """The result of attention, in the shape of `queries`, -> `[B, F, N, width]`."""
        out = out.transpose(1, 2).unflatten(
            1, (frames, -1)
        )  # [B, F, N, heads or 2 heads, head_dim]
        result = self.to_out[0](out[..., : self.heads, :].flatten(-2))
        if cameras is not None:
            second = prope.apply(cameras.result, out[..., self.heads :, :].flatten(-2))
            result = result + self.prope_out(second)
        return result

    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded prompt `[B, L, width]` -> keys and values `[B, heads, L, head_dim]`."""
        return tuple(x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.kv(text))

    def cross_attention(self, x: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """x `[B, F, N, width]` attends to a prompt's keys and values; same shape."""
        q = self.norm_q(self.to_q(x.to(self.to_q.weight.dtype)))
        q = q.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = attention.attend(q, *text).transpose(1, 2).flatten(-2)
        return self.to_out[0](out).view(x.shape)


class FeedForward(nn.Module):
    """diffusers' names for linear, tanh GELU, linear: `net.0.proj` and `net.2`."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(width, hidden)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(hidden, width)])

    def forward(self, x: Tensor) -> Tensor:
        first = self.net[0].proj
        return self.net[2](F.gelu(first(x.to(first.weight.dtype)), approximate="tanh"))


class WanBlock(nn.Module):
    """One transformer block: modulated self-attention, cross-attention to the prompt, modulated
    feed-forward.

    Rotary and camera path are ONE attention over twice the heads. What comes before it
    (`pre_attention`) and after it (`post_attention`) depends on no past, so it can be compiled once
    for all blocks and every length of the window.
    """

    def __init__(
        self, width: int, heads: int, ffn_dim: int, eps: float, cross_attn_norm: bool, camera: bool
    ):
        super().__init__()
        self.attn1 = Attention(width, heads, eps, camera)
        self.attn2 = Attention(width, heads, eps)
        self.norm2 = LayerNorm(width, eps) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(width, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)
        self.eps = eps

    def forward(
        self,
        x: Tensor,
        modulation: Modulation,
        text: tuple[Tensor, Tensor],
        context: AttentionContext,
        layer: int,
    ) -> Tensor:
        """x `[B, F, N, width]`, text from `Attention.text_kv` -> `[B, F, N, width]`."""
        q, kv, projected = self.pre_attention(x, modulation, context.rope, context.cameras)
        context.store(layer, *kv)
        out = context.attend(layer, q, *projected)
        return self.post_attention(x, out, modulation, text, context.cameras)

    def cache_only(
        self, x: Tensor, modulation: Modulation, context: CachedContext, layer: int
    ) -> None:
        """Leaves keys and values in the context as `forward` does, and computes nothing else."""
        _, kv, projected = self.pre_attention(
            x, modulation, context.rope, context.cameras, queries=False
        )
        context.store(layer, *kv)
        context.write(layer, *projected)

    def modulate(self, modulation: Tensor) -> Modulation:
        """Modulation `[B, F, 6, width]` that all blocks share -> this block's."""
        parts = (self.scale_shift_table + modulation).unsqueeze(2).unbind(3)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts
        return shift, 1 + scale, gate, ffn_shift, 1 + ffn_scale, ffn_gate

    def pre_attention(
        self,
        x: Tensor,
        modulation: Modulation,
        rope: RopeTables,
        cameras: CameraMatrices | None,
        queries: bool = True,
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Before self-attention: queries (if asked for), un-rotated keys and raw values, and both
        as attention reads them.
        """
        shift, factor, *_ = modulation
        x = modulated_norm(x, factor, shift, self.eps).to(self.attn1.to_q.weight.dtype)
        kv = self.attn1.kv(x)
        q = self.attn1.queries(x, rope, cameras) if queries else None
        inverse = None if cameras is None else cameras.key
        return q, kv, project_kv(*kv, rope, inverse, self.attn1.heads)

    def post_attention(
        self,
        x: Tensor,
        out: Tensor,
        modulation: Modulation,
        text: tuple[Tensor, Tensor],
        cameras: CameraMatrices | None,
    ) -> Tensor:
        """After self-attention, whose result is `out`."""
        _, _, gate, shift, factor, ffn_gate = modulation
        x = torch.addcmul(x, gate, self.attn1.output(out, x.shape[1], cameras))
        x = x + self.attn2.cross_attention(self.norm2(x), text)
        return torch.addcmul(x, ffn_gate, self.ffn(modulated_norm(x, factor, shift, self.eps)))


def modulated_norm(x: Tensor, factor: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Layer norm without weights, then the time's factor (1 + scale) and shift, `[B, F, 1, width]`
    each.
    """
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), factor)


class CausalWanTransformer(ModelMixin, ConfigMixin):
    """See the module's text. Config keys are diffusers'; those of models we cannot run (image
    branch) must be None.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = [
        "time_embedder",
        "scale_shift_table",
        "norm2",
    ]  # as diffusers: so the residual stream is float32 too
    _no_split_modules = ["WanBlock"]

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 12,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 8960,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,  # read for compatibility; our table has no end
        pos_embed_seq_len: int | None = None,
        camera: bool = True,
    ):
        super().__init__()
        _check_config(
            patch_size,
            attention_head_dim,
            freq_dim,
            qk_norm,
            {
                "image_dim": image_dim,
                "added_kv_proj_dim": added_kv_proj_dim,
                "pos_embed_seq_len": pos_embed_seq_len,
            },
            camera,
        )
        width = num_attention_heads * attention_head_dim
        self.patch_embedding = nn.Conv3d(in_channels, width, patch_size, patch_size)
        self.condition_embedder = ConditionEmbedder(width, freq_dim, text_dim)
        self.blocks = nn.ModuleList(
            WanBlock(width, num_attention_heads, ffn_dim, eps, cross_attn_norm, camera)
            for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(
            width, out_channels * patch_size[0] * patch_size[1] * patch_size[2]
        )
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.gradient_checkpointing = False
        for block in self.blocks if camera else ():
            nn.init.zeros_(block.attn1.prope_out.weight)
            nn.init.zeros_(block.attn1.prope_out.bias)

    @property
    def condition_channels(self) -> int:
        """Input channels beyond the noisy latents, as in Wan2.1's image-to-video networks."""
        return self.config.in_channels - self.config.out_channels

    def encode_text(self, text: Tensor) -> TextContext:
        """Prompt embedding `[B, L, text_dim]` -> every layer's keys and values. Padded rows are
        zero and are attended to, as in Wan.
        """
        text = self.condition_embedder.text_embedder(text.to(self.patch_embedding.weight.dtype))
        return TextContext(tuple(block.attn2.text_kv(text) for block in self.blocks))

    def encode_time(self, sigma: Tensor) -> TimeContext:
        """Noise levels `[B, F]` in [0, 1] -> what passes at these levels need of them."""
        embedding, modulation = self.condition_embedder.embed_time(sigma)
        return TimeContext(embedding, tuple(block.modulate(modulation) for block in self.blocks))

    def layout(self, height: int, width: int) -> TokenLayout:
        """How latent frames of `height` x `width` cells become tokens, for attention contexts.

        Raises ValueError when the patch does not divide them.
        """
        config = self.config
        _, patch_h, patch_w = config.patch_size
        if height % patch_h or width % patch_w:
            raise ValueError(
                f"latents must be a multiple of the patch {tuple(config.patch_size)}, got "
                f"{height}x{width} cells: resize"
            )
        kind = self.device.type
        dtype = self.patch_embedding.weight.dtype
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        grid = height // patch_h, width // patch_w
        heads = config.num_attention_heads
        head_dim = config.attention_head_dim
        return TokenLayout(*grid, heads, head_dim, config.camera, dtype, self.device)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor | TimeContext,
        text: Tensor | TextContext,
        context: AttentionContext,
        *,
        condition: Tensor | None = None,
        cache_only: bool = False,
    ) -> Tensor | None:
        """Predicts the velocity `eps - x0` of noisy latents.

        latents: `[B, C, F, H, W]`, H and W multiples of the patch. sigma: in [0, 1], `[B]` or
        `[B, F]`, or what `encode_time` made of it. text: an embedding `[B, L, text_dim]`, or what
        `encode_text` made of it. context: of these F frames. condition: `[B, K, F, H, W]` with the
        K = `condition_channels` further input channels of the network; None = zeros, nothing is
        known.
        Returns `[B, C, F, H, W]` in float32. With `cache_only` the pass ends where the last layer's
        keys and values are stored in the context (a `CachedContext`), and returns None.
        """
        _, patch_h, patch_w = self.config.patch_size
        frames = latents.shape[2]
        if isinstance(sigma, Tensor):
            sigma = sigma[:, None].expand(-1, frames) if sigma.ndim == 1 else sigma
            sigma = self.encode_time(sigma)
        if isinstance(text, Tensor):
            text = self.encode_text(text)
        if self.condition_channels:
            latents = self._with_condition(latents, condition)
        x = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype))
        x = x.float().flatten(3).permute(0, 2, 3, 1)
        for layer, block in enumerate(self.blocks):
            modulation = sigma.layers[layer]
            if cache_only and layer == len(self.blocks) - 1:
                return block.cache_only(x, modulation, context, layer)
            arguments = (x, modulation, text.layers[layer], context, layer)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        grid = latents.shape[3] // patch_h, latents.shape[4] // patch_w
        return self._to_latents(x, sigma.embedding, grid)

    def _with_condition(self, latents: Tensor, condition: Tensor | None) -> Tensor:
        batch, _, *size = latents.shape
        if condition is None:
            condition = latents.new_zeros(())
        condition = condition.expand(batch, self.condition_channels, *size)
        return torch.cat([latents, condition.to(latents.dtype)], dim=1)

    def _to_latents(self, x: Tensor, embedding: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens `[B, F, N, width]` -> velocity `[B, C, F, H, W]`."""
        shift, scale = (self.scale_shift_table + embedding.unsqueeze(2)).unsqueeze(2).unbind(3)
        x = self.proj_out(
            modulated_norm(x, 1 + scale, shift, self.config.eps).to(self.proj_out.weight.dtype)
        ).float()
        _, patch_h, patch_w = self.config.patch_size
        x = x.unflatten(-1, (patch_h, patch_w, -1)).unflatten(
            2, grid
        )  # [B, F, rows, columns, patch_h, patch_w, C]
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def _check_config(
    patch_size, head_dim: int, freq_dim: int, qk_norm: str, absent: dict, camera: bool
) -> None:
    wrong = [name for name, value in absent.items() if value is not None]
    if wrong:
        raise UserError(
            f"this network has no image branch, got {wrong[0]}={absent[wrong[0]]}: use a "
            "text-to-video Wan model"
        )
    if patch_size[0] != 1 or qk_norm != "rms_norm_across_heads":
        found = f"{tuple(patch_size)} and {qk_norm}"
        raise UserError(
            f"patch_size must be (1, h, w) and qk_norm rms_norm_across_heads, got {found}: not a "
            "Wan2.1 model"
        )
    if freq_dim % 2:
        raise UserError(
            f"freq_dim must be even (sines and cosines), got {freq_dim}: choose another"
        )
    if camera and head_dim % 4:
        raise UserError(
            f"PRoPE needs a head width that is a multiple of 4, got {head_dim}: choose another "
            "attention_head_dim"
        )

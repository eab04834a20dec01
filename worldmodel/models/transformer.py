"""`CausalWanTransformer`: Wan2.1's video diffusion transformer with camera poses (PRoPE), one
network for three ways of attending.

- `bidirectional`: every latent frame sees every frame, as Wan2.1 was trained.
- `teacher_forcing`: noisy chunk i sees the clean chunks before it and itself (Causal Forcing stage
  1 and 2).
- `cached`: the frames of the current chunk see the committed frames of a `CacheView` and
  themselves: play and self-rollout.

The mode is an argument and never guessed. Parameter names and config keys are those of diffusers'
`WanTransformer3DModel`, so `Wan-AI/Wan2.1-T2V-1.3B-Diffusers` loads as it is; a camera model has
one more linear layer a block, `attn1.prope_out`, zero at the start.
Inside, tokens are `[B, F, N, width]`: F latent frames of N tokens each; the residual stream and the
modulation are float32.
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
from worldmodel.models.attention import by_head, turned
from worldmodel.models.kv_cache import CacheView
from worldmodel.models.rope import rope_table, rotate
from worldmodel.schedule import CLOCK


@dataclass(frozen=True)
class TextContext:
    """A prompt made ready for every layer: cross-attention keys and values, each `[B, heads, L,
    head_dim]`.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]


Modulation = tuple[
    Tensor, ...
    # of a block: shift, factor and gate of attention, then of the feed-forward, `[B, F, 1, width]`
    # float32
]


@dataclass(frozen=True)
class TimeContext:
    """A noise level made ready: embedding `[B, F, width]` float32 and every block's modulation."""

    embedding: Tensor
    layers: tuple[Modulation, ...]


@dataclass(frozen=True)
class FramePositions:
    """Where the tokens of a pass stand: rotary tables `[F, N, 1, head_dim]`, and camera matrices or
    None.
    """

    cos: Tensor
    sin: Tensor
    cameras: prope.CameraMatrices | None


@dataclass(frozen=True)
class Pattern:
    """Who attends to whom: a mode, the frames denoised together, and what is remembered."""

    mode: str
    chunk: int
    view: CacheView | None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
        """q, k, v `[B, H, F N, head_dim]` of `frames` frames -> the same shape."""
        if self.mode == "teacher_forcing":
            return attention.teacher_forcing(q, k, v, self.chunk * q.shape[2] // frames)
        if self.mode == "cached":
            return self.view.attend(layer, q, k, v)
        return attention.attend(q, k, v)


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

    def memory(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x `[B, F, N, width]` -> its un-rotated keys and its values."""
        return self.norm_k(self.to_k(x)), self.to_v(x)

    def turned_queries(self, x: Tensor, positions: FramePositions) -> Tensor:
        """x `[B, F, N, width]` -> `[B, heads, F N, head_dim]`, or twice the heads when there are
        cameras: rotary first, PRoPE second.
        """
        q = self.norm_q(self.to_q(x))
        paths = [rotate(q.unflatten(-1, (self.heads, -1)), positions.cos, positions.sin)]
        if positions.cameras is not None:
            paths.append(prope.apply(positions.cameras.query, q).unflatten(-1, (self.heads, -1)))
        return by_head(paths)

    def turned_memory(
        self, k: Tensor, v: Tensor, positions: FramePositions
    ) -> tuple[Tensor, Tensor]:
        """What `memory` gave, in the shape of `turned_queries`."""
        inverse = None if positions.cameras is None else positions.cameras.key
        return turned(k, v, positions.cos, positions.sin, inverse, self.heads)

    def result(self, out: Tensor, positions: FramePositions) -> Tensor:
        """What attention gave, in the shape of `turned_queries`, -> `[B, F, N, width]`."""
        out = out.transpose(1, 2).unflatten(
            1, positions.cos.shape[:2]
        )  # [B, F, N, heads or 2 heads, head_dim]
        result = self.to_out[0](out[..., : self.heads, :].flatten(-2))
        if positions.cameras is not None:
            result = result + self.prope_out(
                prope.apply(positions.cameras.result, out[..., self.heads :, :].flatten(-2))
            )
        return result

    def text_keys(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded prompt `[B, L, width]` -> keys and values `[B, heads, L, head_dim]`."""
        k = self.norm_k(self.to_k(text))
        v = self.to_v(text)
        return tuple(x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (k, v))

    def cross_attention(self, x: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        q = (
            self.norm_q(self.to_q(x.to(self.to_q.weight.dtype)))
            .flatten(1, 2)
            .unflatten(-1, (self.heads, -1))
            .transpose(1, 2)
        )
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
        positions: FramePositions,
        pattern: Pattern,
        layer: int,
    ) -> Tensor:
        """x `[B, F, N, width]`, text of `Attention.text_keys`.

        Rotary and camera path are ONE attention over twice the heads; what comes before and behind
        it knows nothing of a past.
        """
        q, (k, v), memory = self.enter(x, modulation, positions)
        if pattern.view is not None:
            pattern.view.keep(layer, *memory)
        return self.leave(
            x, pattern.attend(layer, q, k, v, x.shape[1]), modulation, text, positions
        )

    def modulate(self, modulation: Tensor) -> Modulation:
        """Modulation `[B, F, 6, width]` that all blocks share -> this block's."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            (self.scale_shift_table + modulation).unsqueeze(2).unbind(3)
        )
        return shift, 1 + scale, gate, ffn_shift, 1 + ffn_scale, ffn_gate

    def remember(
        self,
        x: Tensor,
        modulation: Modulation,
        positions: FramePositions,
        view: CacheView,
        layer: int,
    ) -> None:
        """Leaves the keys and values of this block in view and window, as `forward` does, and
        computes nothing else.
        """
        _, turned_memory, memory = self.enter(x, modulation, positions, queries=False)
        view.keep(layer, *memory)
        view.write(layer, *turned_memory)

    def enter(
        self, x: Tensor, modulation: Modulation, positions: FramePositions, queries: bool = True
    ):
        """Before self-attention: its queries (if asked for), its keys and values, and those that
        are remembered.
        """
        shift, factor, *_ = modulation
        x = modulated_norm(x, factor, shift, self.eps).to(self.attn1.to_q.weight.dtype)
        memory = self.attn1.memory(x)
        return (
            self.attn1.turned_queries(x, positions) if queries else None,
            self.attn1.turned_memory(*memory, positions),
            memory,
        )

    def leave(
        self,
        x: Tensor,
        out: Tensor,
        modulation: Modulation,
        text: tuple[Tensor, Tensor],
        positions: FramePositions,
    ) -> Tensor:
        """Behind self-attention, which gave `out`."""
        _, _, gate, shift, factor, ffn_gate = modulation
        x = torch.addcmul(x, gate, self.attn1.result(out, positions))
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

    def encode_text(self, text: Tensor) -> TextContext:
        """Prompt embedding `[B, L, text_dim]` (padded rows are zero and are attended to, as in Wan)
        -> every layer's keys and values.
        """
        text = self.condition_embedder.text_embedder(text.to(self.patch_embedding.weight.dtype))
        return TextContext(tuple(block.attn2.text_keys(text) for block in self.blocks))

    def encode_time(self, sigma: Tensor) -> TimeContext:
        """Noise levels `[B, F]` in [0, 1] -> what a pass needs of them, for passes that share
        them.
        """
        embedding, modulation = self.condition_embedder.embed_time(sigma)
        return TimeContext(embedding, tuple(block.modulate(modulation) for block in self.blocks))

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor | TimeContext,
        text: Tensor | TextContext,
        projection: Tensor | None = None,
        *,
        mode: str = "bidirectional",
        chunk: int = 1,
        clean: Tensor | None = None,
        clean_sigma: Tensor | None = None,
        view: CacheView | None = None,
        velocity: bool = True,
    ) -> Tensor | None:
        """Predicts the velocity `eps - x0` of noisy latents.

        `latents` `[B, C, F, H, W]` (H and W multiples of the patch), `sigma` in [0, 1] `[B]` or
        `[B, F]` or what `encode_time` made of it, `text` an embedding `[B, L, text_dim]` or what
        `encode_text` made of it, `projection` `[B, F, 4, 4]` from `prope.projection` or None (no
        camera path).
        teacher_forcing: `clean` latents of the same shape, their `clean_sigma` `[B, F]` (None: 0),
        `chunk` frames denoised together.
        cached: `view` of the committed frames; its reference camera is the one `projection` is
        relative to. With `velocity` false the pass ends where the last layer's keys and values are
        known, and returns None.
        Returns `[B, C, F, H, W]` in float32.
        """
        self._check_inputs(latents, projection, mode, chunk, clean, view)
        frames = latents.shape[2]
        (_, patch_h, patch_w) = self.config.patch_size
        grid = latents.shape[3] // patch_h, latents.shape[4] // patch_w
        if isinstance(sigma, Tensor) and sigma.ndim == 1:
            sigma = sigma[:, None].expand(-1, frames)
        if mode == "teacher_forcing":
            latents = torch.cat([clean, latents], dim=2)
            sigma = torch.cat(
                [torch.zeros_like(sigma) if clean_sigma is None else clean_sigma, sigma], dim=1
            )
            projection = None if projection is None else projection.repeat(1, 2, 1, 1)
        if isinstance(text, Tensor):
            text = self.encode_text(text)
        x = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype))
        dtype = x.dtype
        x = x.float().flatten(3).permute(0, 2, 3, 1)
        time = self.encode_time(sigma) if isinstance(sigma, Tensor) else sigma
        positions = self.positions(frames, grid, projection, mode, view, dtype)
        pattern = Pattern(mode, chunk, view)
        for layer, block in enumerate(self.blocks):
            if not velocity and layer == len(self.blocks) - 1:
                return block.remember(x, time.layers[layer], positions, view, layer)
            arguments = (x, time.layers[layer], text.layers[layer], positions, pattern, layer)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        if mode == "teacher_forcing":
            return self._to_latents(x[:, frames:], time.embedding[:, frames:], grid)
        return self._to_latents(x, time.embedding, grid)

    def positions(
        self,
        frames: int,
        grid: tuple[int, int],
        projection: Tensor | None,
        mode: str,
        view: CacheView | None,
        dtype: torch.dtype,
    ) -> FramePositions:
        """Where the tokens of a pass stand, `grid` of them a frame; made once for all passes with
        the same `view` and `projection`.
        """
        if view is not None and view.tables is not None and view.tables[0] is projection:
            return view.tables[1]
        index = torch.arange(frames, device=self.device) if view is None else view.positions(frames)
        index = index.repeat(2) if mode == "teacher_forcing" else index
        cos, sin = rope_table(
            index.to(float64_device(index.device)), *grid, self.config.attention_head_dim
        )
        cameras = None
        if projection is not None and self.config.camera:
            width = self.config.num_attention_heads * self.config.attention_head_dim
            cameras = prope.camera_matrices(projection, dtype, width, self.device)
        positions = FramePositions(
            *(table.unsqueeze(2).to(self.device, dtype) for table in (cos, sin)), cameras
        )
        if view is not None:
            view.tables = projection, positions
        return positions

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

    def _check_inputs(self, latents, projection, mode, chunk, clean, view) -> None:
        if mode not in ("bidirectional", "teacher_forcing", "cached"):
            raise ValueError(
                f"mode must be bidirectional, teacher_forcing or cached, got {mode!r}: name one "
                "of them"
            )
        if (clean is not None) != (mode == "teacher_forcing") or (view is not None) != (
            mode == "cached"
        ):
            raise ValueError(
                f"clean goes with teacher_forcing and view with cached, got mode {mode!r}: pass "
                "exactly what the mode needs"
            )
        _, _, frames, height, width = latents.shape
        if height % self.config.patch_size[1] or width % self.config.patch_size[2]:
            raise UserError(
                f"latents must be a multiple of the patch {tuple(self.config.patch_size)}, got "
                f"{height}x{width} cells: resize"
            )
        if mode == "teacher_forcing" and frames % chunk:
            raise ValueError(
                f"teacher forcing needs a multiple of {chunk} latent frames, got {frames}: change "
                "the clip's length or chunk"
            )
        if projection is not None and projection.shape[1] != frames:
            raise ValueError(
                f"one camera a latent frame is needed, got {projection.shape[1]} for {frames} "
                f"frames: pass {frames}"
            )


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

"""The same network driven as the public loops do it: the baseline of `worldmodel benchmark
--reference-loop`.

What a pass costs in this loop but not in `Rollout`: two attention calls a layer over two caches
(rotary and PRoPE), with keys rotated when they are written; a full window rolled by copying; rotary
embedding in complex float64; cache ends kept in tensors that every layer reads back to the host; a
clean pass before the frames are shown; nothing shared between the passes of a chunk.

Source: the behaviour of minWM's and Self-Forcing's `CausalInferencePipeline`. Differs: the text's
keys are computed once a prompt and the camera matrices once a pass, so that only the loop is
compared. It generates what `Rollout` generates with `positions: absolute` (tested).
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.errors import UserError
from worldmodel.models import prope
from worldmodel.models.rope import THETA, band_widths
from worldmodel.models.transformer import (
    CausalWanTransformer,
    TextContext,
    WanBlock,
    modulated_norm,
)
from worldmodel.rollout import Rollout, RolloutConfig, per_frame
from worldmodel.schedule import add_noise, to_x0


@dataclass
class LayerCache:
    """Keys and values `[B, tokens, heads, head_dim]` of one path of one layer."""

    keys: Tensor
    values: Tensor
    written: Tensor  # int64 [1]: tokens written since the start
    held: Tensor  # int64 [1]: tokens in the buffers

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> "LayerCache":
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return cls(
            keys, values, *(torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        )

    def write(self, keys: Tensor, values: Tensor, start: int, sinks: int) -> tuple[Tensor, Tensor]:
        """Write tokens at absolute position `start` and return all keys and values that are held.

        When the buffers are full, the oldest tokens after the first `sinks` are dropped.
        """
        count = keys.shape[1]
        room = self.keys.shape[1]
        new = start + count - self.written.item()
        if new > 0 and self.held.item() + new > room:
            dropped = self.held.item() + new - room
            kept = self.held.item() - dropped - sinks
            for buffer in (self.keys, self.values):
                old = buffer[:, sinks + dropped : sinks + dropped + kept]
                buffer[:, sinks : sinks + kept] = old.clone()
            self.held.fill_(self.held.item() - dropped)
        end = self.held.item() + new
        self.keys[:, end - count : end] = keys
        self.values[:, end - count : end] = values
        self.held.fill_(end)
        self.written.fill_(start + count)
        return self.keys[:, :end], self.values[:, :end]


class ReferenceLoop(Rollout):
    """A `Rollout` without rewind; positions are absolute, whatever the config says.

    Raises UserError for a sampler or guidance that the public loops do not have.
    """

    def __init__(
        self,
        model: CausalWanTransformer,
        text: Tensor | TextContext,
        config: RolloutConfig,
        *,
        batch: int = 1,
        height: int,
        width: int,
        device: torch.device | str = "cpu",
    ):
        if config.sampler != "renoise" or config.guidance != 1:
            found = f"{config.sampler} and {config.guidance}"
            raise UserError(
                "--reference-loop drives few-step models: expected sampler renoise and guidance 1, "
                f"got {found}"
            )
        super().__init__(
            model, text, config, batch=batch, height=height, width=width, device=device
        )
        _, patch_h, patch_w = model.config.patch_size
        self.grid = height // patch_h, width // patch_w
        self.tokens = self.grid[0] * self.grid[1]
        heads = model.config.num_attention_heads
        head_dim = model.config.attention_head_dim
        shape = batch, config.window * self.tokens, heads, head_dim
        dtype = model.patch_embedding.weight.dtype
        paths = 2 if model.config.camera else 1
        self.caches = [
            [LayerCache.empty(shape, self.device, dtype) for _ in range(paths)]
            for _ in model.blocks
        ]
        self.table = _frequencies(head_dim, self.device)
        self.done = 0

    @property
    def frames(self) -> int:
        return self.done

    def commit_pending(self) -> None:
        """Do nothing: `step` has run the clean pass."""

    def step(
        self,
        viewmats: Tensor,
        intrinsics: Tensor,
        *,
        condition: None = None,
        noise: Tensor | None = None,
        renoise: list[Tensor] | None = None,
        generator: torch.Generator | None = None,
        defer_commit: bool = False,
    ) -> Tensor:
        """As `Rollout.step`, but the clean pass always comes before the result.

        Raises ValueError for a condition: the public loop has none.
        """
        if condition is not None:
            raise ValueError("the reference loop reads no condition: leave the session's place out")
        sigmas = [x.sigma for x in (self.levels if self.done else self.first_levels)]
        shape = (self.batch, self.model.config.in_channels, viewmats.shape[1], *self.cells)
        x = self._draw(shape, generator) if noise is None else noise
        started = time.perf_counter()
        for index, sigma in enumerate(sigmas):
            x0 = to_x0(x, self._pass(x, sigma, viewmats, intrinsics), sigma)
            if index < len(sigmas) - 1:
                x = add_noise(
                    x0,
                    renoise[index] if renoise else self._draw(shape, generator),
                    sigmas[index + 1],
                )
        self.timings["network"] = (time.perf_counter() - started) * 1e3
        self.commit(x0, viewmats, intrinsics)
        return x0

    def commit(self, latents: Tensor, viewmats: Tensor, intrinsics: Tensor) -> None:
        started = time.perf_counter()
        self._pass(latents, torch.zeros((), device=self.device), viewmats, intrinsics)
        self.done += latents.shape[2]
        self.timings["clean"] = (time.perf_counter() - started) * 1e3

    def _pass(self, latents: Tensor, sigma: Tensor, viewmats: Tensor, intrinsics: Tensor) -> Tensor:
        """Run one forward pass, which writes its keys and values to the caches.

        Returns the velocity `[B, C, F, H, W]`.
        """
        model = self.model
        frames = latents.shape[2]
        x = model.patch_embedding(latents.to(model.patch_embedding.weight.dtype))
        dtype = x.dtype
        x = x.float().flatten(3).permute(0, 2, 3, 1)
        embedding, modulation = model.condition_embedder.embed_time(
            sigma.expand(self.batch, frames)
        )
        cameras = None
        if model.config.camera:
            matrices = prope.projmats(viewmats.double(), per_frame(intrinsics, viewmats).double())
            cameras = prope.camera_matrices(matrices.float(), dtype)
        for block, text, caches in zip(model.blocks, self.text.layers, self.caches, strict=True):
            x = self._block(block, x, modulation, text, cameras, caches)
        return model._to_latents(x, embedding, self.grid)

    def _block(
        self,
        block: WanBlock,
        x: Tensor,
        modulation: Tensor,
        text,
        cameras,
        caches: list[LayerCache],
    ) -> Tensor:
        shift, factor, gate, ffn_shift, ffn_factor, ffn_gate = block.modulate(modulation)
        x = x + gate * self._self_attention(
            block.attn1, modulated_norm(x, factor, shift, block.eps), cameras, caches
        )
        x = x + block.attn2.cross_attention(block.norm2(x), text)
        return x + ffn_gate * block.ffn(modulated_norm(x, ffn_factor, ffn_shift, block.eps))

    def _self_attention(self, attn, x: Tensor, cameras, caches: list[LayerCache]) -> Tensor:
        x = x.to(attn.to_q.weight.dtype)
        q = attn.norm_q(attn.to_q(x))
        k = attn.norm_k(attn.to_k(x))
        v = attn.to_v(x)

        def split(y: Tensor) -> Tensor:
            return y.flatten(1, 2).unflatten(-1, (attn.heads, -1))

        out = self._attend(self._rotate(split(q)), self._rotate(split(k)), split(v), caches[0])
        result = attn.to_out[0](out.flatten(-2).view(x.shape))
        if cameras is not None:
            parts = (
                prope.apply(cameras.query, q),
                prope.apply(cameras.key, k),
                prope.apply(cameras.key, v),
            )
            out = (
                self._attend(*(split(part) for part in parts), caches[1]).flatten(-2).view(x.shape)
            )
            result = result + attn.prope_out(prope.apply(cameras.result, out))
        return result

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
        """Write k and v to the cache and attend over it, all `[B, tokens, heads, head_dim]`."""
        keys, values = cache.write(k, v, self.done * self.tokens, self.config.sinks * self.tokens)
        return F.scaled_dot_product_attention(
            *(y.transpose(1, 2) for y in (q, keys, values))
        ).transpose(1, 2)

    def _rotate(self, x: Tensor) -> Tensor:
        """Apply the rotary embedding at absolute frame numbers, sample by sample, as complex
        float64 products.
        """
        frames = x.shape[1] // self.tokens
        rows, columns = self.grid
        time_table, row_table, column_table = self.table
        grid = (frames, rows, columns, -1)
        bands = (
            time_table[self.done : self.done + frames].view(frames, 1, 1, -1).expand(grid),
            row_table[:rows].view(1, rows, 1, -1).expand(grid),
            column_table[:columns].view(1, 1, columns, -1).expand(grid),
        )
        rotation = torch.cat(bands, -1).flatten(0, 2)[:, None]
        rotated = []
        for sample in x:
            pairs = sample.to(torch.float64).unflatten(-1, (-1, 2)).contiguous()
            product = torch.view_as_complex(pairs) * rotation
            rotated.append(torch.view_as_real(product).flatten(-2))
        return torch.stack(rotated).type_as(x)


def _frequencies(head_dim: int, device: torch.device, length: int = 1024) -> list[Tensor]:
    """Unit complex numbers `[length, width / 2]` for the frame, row and column bands; `length` is
    that of the public table.
    """
    tables = []
    for width in band_widths(head_dim):
        frequency = THETA ** (
            -torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
        )
        angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency
        tables.append(torch.polar(torch.ones_like(angle), angle))
    return tables

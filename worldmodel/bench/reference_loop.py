"""The same network driven the way the public loops do it: the yardstick of `python -m
worldmodel.bench.benchmark --as-published`.

What a pass costs there and not here: two attention calls a layer over two caches (rotary and
PRoPE), keys rotated when they are written; a full window is rolled by copying; rotary embedding in
complex float64; the caches' ends are tensors that every layer reads back to the host; the clean
pass is a pass of its own, always before the frames are shown; nothing is shared between the passes
of a chunk.
Source: the behaviour of minWM's and Self-Forcing's `CausalInferencePipeline`. Differs: the text's
keys are made once a prompt and the camera matrices once a pass, so that only the loop is compared.
It dreams what `Rollout` dreams with `positions: absolute` (tested).
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
from worldmodel.rollout import Rollout, RolloutConfig, a_frame
from worldmodel.schedule import add_noise, to_x0


@dataclass
class LayerCache:
    """Keys and values `[B, tokens, heads, head_dim]` of one path of one layer, and how much was
    ever written and is held.
    """

    keys: Tensor
    values: Tensor
    written: Tensor  # int64 [1]
    held: Tensor  # int64 [1]

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> "LayerCache":
        keys, values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return cls(
            keys, values, *(torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        )

    def write(self, keys: Tensor, values: Tensor, start: int, sinks: int) -> tuple[Tensor, Tensor]:
        """Puts new tokens at place `start` of all time, rolls the rest when there is no room, and
        returns all that is held.
        """
        count = keys.shape[1]
        room = self.keys.shape[1]
        fresh = start + count - self.written.item()
        if fresh > 0 and self.held.item() + fresh > room:
            gone = self.held.item() + fresh - room
            kept = self.held.item() - gone - sinks
            for buffer in (self.keys, self.values):
                buffer[:, sinks : sinks + kept] = buffer[
                    :, sinks + gone : sinks + gone + kept
                ].clone()
            self.held.fill_(self.held.item() - gone)
        end = self.held.item() + fresh
        self.keys[:, end - count : end] = keys
        self.values[:, end - count : end] = values
        self.held.fill_(end)
        self.written.fill_(start + count)
        return self.keys[:, :end], self.values[:, :end]


class PublishedLoop(Rollout):
    """`Rollout` as far as a session without rewinding needs it; positions are absolute, whatever
    the config says.
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
                "the loop as published is that of few-step models: expected sampler renoise and "
                f"guidance 1, got {found}"
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

    def settle(self) -> None:
        """Nothing is ever left to settle."""

    def step(
        self,
        viewmats: Tensor,
        intrinsics: Tensor,
        *,
        noise: Tensor | None = None,
        renoise: list[Tensor] | None = None,
        generator: torch.Generator | None = None,
        settle: bool = True,
    ) -> Tensor:
        """As `Rollout.step`; the clean pass comes before the result, whatever `settle` says."""
        sigmas = self.first_sigmas if self.done == 0 else self.sigmas
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
        """One forward pass that leaves its keys and values in the caches; velocity `[B, C, F, H,
        W]`.
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
            matrices = prope.projection(viewmats.double(), a_frame(intrinsics, viewmats).double())
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
        """Writes k and v to the cache and attends over it, all `[B, tokens, heads, head_dim]`."""
        keys, values = cache.write(k, v, self.done * self.tokens, self.config.sinks * self.tokens)
        return F.scaled_dot_product_attention(
            *(y.transpose(1, 2) for y in (q, keys, values))
        ).transpose(1, 2)

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding at absolute frame numbers as complex float64 products, one sample at a
        time.
        """
        frames = x.shape[1] // self.tokens
        (rows, columns) = self.grid
        places = (slice(self.done, self.done + frames), slice(rows), slice(columns))
        bands = [table[place] for table, place in zip(self.table, places, strict=True)]
        shapes = ((frames, 1, 1, -1), (1, rows, 1, -1), (1, 1, columns, -1))
        turn = torch.cat(
            [
                b.view(s).expand(frames, rows, columns, -1)
                for b, s in zip(bands, shapes, strict=True)
            ],
            -1,
        ).flatten(0, 2)
        turned = []
        for sample in x:
            pairs = torch.view_as_complex(
                sample.to(torch.float64).unflatten(-1, (-1, 2)).contiguous()
            )
            turned.append(torch.view_as_real(pairs * turn[:, None]).flatten(-2))
        return torch.stack(turned).type_as(x)


def _frequencies(head_dim: int, device: torch.device, places: int = 1024) -> list[Tensor]:
    """Unit complex numbers `[places, width / 2]` for the frame, row and column bands; like the
    public table, it has an end.
    """
    tables = []
    for width in band_widths(head_dim):
        frequency = THETA ** (
            -torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
        )
        angle = torch.arange(places, dtype=torch.float64, device=device)[:, None] * frequency
        tables.append(torch.polar(torch.ones_like(angle), angle))
    return tables

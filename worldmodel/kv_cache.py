"""What is remembered of committed latent frames, and the view of it that attention reads.

Store once: a frame keeps, for all layers together, its normalised un-rotated keys, its raw values and its camera. View per chunk: before a
chunk is denoised, the window's keys are rotated and projected once, relative to the window and to the current camera, and read by all
its passes. So positions never run out, the numbers stay small however far the player walks, rewinding is truncation, a fork shares the
frames (they are never written again), and a sink is a frame that is not dropped.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from worldmodel import attention, prope
from worldmodel.rope import rope_table, rotate


@dataclass(frozen=True)
class FrameMemory:
    """One committed latent frame: keys and values `[layers, B, N, width]`, w2c `[B, 4, 4]` float64, intrinsics `[B, 4]` float64."""

    index: int
    keys: Tensor
    values: Tensor
    viewmats: Tensor
    intrinsics: Tensor


@dataclass
class CacheView:
    """The window as one chunk sees it: keys and values `[layers, B, heads or 2 heads, M, head_dim]`, or None when nothing is committed.

    `first` is the rotary position of the chunk's first frame. A pass leaves its own keys and values in `fresh`, one pair a layer.
    When the clean pass of the chunk before is merged in, the pass holds both chunks: `pending` frames come first, and the chunk behind
    them reads `later`, the window as it will be once they are committed.
    """

    keys: Tensor | None
    values: Tensor | None
    first: int
    device: torch.device
    fresh: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    pending: int = 0
    tokens: int = 0  # tokens a frame, needed when frames are pending
    later: tuple[Tensor | None, Tensor | None] = (None, None)

    def positions(self, frames: int) -> Tensor:
        """Rotary positions `[frames]` of the frames of a pass."""
        return torch.arange(self.first, self.first + frames, device=self.device)

    def keep(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Called by attention: the pass's own un-rotated keys and raw values, `[B, F, N, width]`."""
        self.fresh[layer] = (keys, values)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries of the chunk `[B, H, F N, D]` over the window and the chunk itself."""
        if not self.pending:
            return attention.attend(q, *self._with_window(layer, self.keys, self.values, k, v))
        split = self.pending * self.tokens
        before = attention.attend(q[:, :, :split], *self._with_window(layer, self.keys, self.values, k[:, :, :split], v[:, :, :split]))
        after = attention.attend(q[:, :, split:], *self._with_window(layer, *self.later, k, v))
        return torch.cat([before, after], dim=2)

    @staticmethod
    def _with_window(layer: int, keys: Tensor | None, values: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if keys is None:
            return k, v
        return torch.cat([keys[layer], k], dim=2), torch.cat([values[layer], v], dim=2)


class KVCache:
    """The committed frames of a rollout.

    `window`: latent frames attention may see, those of the current chunk included; `sinks`: the first frames, which are kept for ever and
    count as part of the window; `absolute`: rotary positions are frame numbers (the references' way) instead of places in the
    window; `history`: frames kept beyond the window so that rewinding has something to return to; `camera`: whether
    the network has the PRoPE path.
    """

    def __init__(self, heads: int, window: int, sinks: int = 0, absolute: bool = False, history: int = 0, camera: bool = True):
        if not 0 <= sinks < window:
            raise ValueError(f"sinks must be at least 0 and fewer than the window of {window} latents, got {sinks}: change one of them")
        self.heads, self.window, self.sinks, self.absolute, self.history = heads, window, sinks, absolute, history
        self.camera = camera
        self.frames: list[FrameMemory] = []
        self.committed = 0

    def commit(self, fresh: dict[int, tuple[Tensor, Tensor]], viewmats: Tensor, intrinsics: Tensor) -> None:
        """Remembers a chunk: `fresh` of its clean pass, `viewmats` `[B, F, 4, 4]`, `intrinsics` `[B, F, 4]`."""
        keys, values = (torch.stack([fresh[layer][i] for layer in sorted(fresh)]) for i in range(2))
        for frame in range(viewmats.shape[1]):
            stored = keys[:, :, frame], values[:, :, frame], viewmats[:, frame], intrinsics[:, frame]
            self.frames.append(FrameMemory(self.committed, *stored))
            self.committed += 1
        self.frames = [f for f in self.frames if f.index < self.sinks or f.index >= self.committed - self.window - self.history]

    def visible(self, chunk: int) -> list[FrameMemory]:
        """The frames that a chunk of `chunk` new frames sees: sinks, then the most recent ones."""
        recent = self.committed - (self.window - chunk - self.sinks)
        return [f for f in self.frames if f.index < self.sinks or f.index >= recent]

    def view(self, viewmats: Tensor, intrinsics: Tensor, rows: int, columns: int) -> tuple[CacheView, Tensor]:
        """The window for a chunk with cameras `viewmats` `[B, F, 4, 4]` and `intrinsics` `[B, F, 4]`.

        Returns it with the chunk's projections `[B, F, 4, 4]`, relative to the chunk's first camera.
        """
        frames = self.visible(viewmats.shape[1])
        first = self.committed if self.absolute else len(frames)
        reference = torch.linalg.inv_ex(viewmats[:, :1].double()).inverse  # inv would wait for its error flag
        keys, values = self._rotate(frames, reference, rows, columns, start=first - len(frames))
        view = CacheView(keys, values, first, viewmats.device)
        return view, prope.projection(viewmats.double() @ reference, intrinsics.double()).float()

    def pair_view(self, viewmats: Tensor, chunk: int, intrinsics: Tensor, rows: int, columns: int) -> tuple[CacheView, Tensor]:
        """The view of two chunks in one pass, `viewmats` `[B, 2 chunk, 4, 4]`: the first is about to be committed, the second follows.

        The second's window has lost its oldest frames to the first, and its sinks stand as near as they will when the first is in.
        """
        frames, now = self.visible(chunk), self.committed
        later = [f for f in frames if f.index < self.sinks or f.index >= now - (self.window - 2 * chunk - self.sinks)]
        first = now if self.absolute else len(frames)
        reference = torch.linalg.inv_ex(viewmats[:, :1].double()).inverse  # inv would wait for its error flag
        keys, values = self._rotate(frames, reference, rows, columns, start=first - len(frames))
        after = self._rotate(later, reference, rows, columns, start=first - len(later))
        view = CacheView(keys, values, first, viewmats.device, pending=chunk, tokens=rows * columns, later=after)
        return view, prope.projection(viewmats.double() @ reference, intrinsics.double()).float()

    def _rotate(
        self, frames: list[FrameMemory], reference: Tensor, rows: int, columns: int, start: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values of `frames` in the rotary and the camera path, `[layers, B, 2 heads, M, head_dim]`."""
        if not frames:
            return None, None
        keys, values = (torch.stack([getattr(f, name) for f in frames], dim=2) for name in ("keys", "values"))
        index = self._places(frames, start, keys.device)
        cos, sin = (t.unsqueeze(2).to(keys.dtype) for t in rope_table(index, rows, columns, keys.shape[-1] // self.heads))

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1))

        rotated, carried = [rotate(split(keys), cos, sin)], [split(values)]
        if self.camera:
            inverse = self._inverse_cameras(frames, reference).to(keys.dtype)
            rotated.append(split(prope.apply(inverse, keys)))
            carried.append(split(prope.apply(inverse, values)))
        return tuple(torch.cat(x, dim=-2).flatten(2, 3).transpose(2, 3) for x in (rotated, carried))

    def _places(self, frames: list[FrameMemory], start: int, device: torch.device) -> Tensor:
        """Rotary positions of `frames`, made on the device: a list of numbers would have to be waited for."""
        if not self.absolute:
            return torch.arange(start, start + len(frames), device=device)
        sinks = sum(f.index < self.sinks for f in frames)
        runs = [run for run in (frames[:sinks], frames[sinks:]) if run]  # each without gaps
        return torch.cat([torch.arange(run[0].index, run[-1].index + 1, device=device) for run in runs])

    @staticmethod
    def _inverse_cameras(frames: list[FrameMemory], reference: Tensor) -> Tensor:
        """P^-1 of every frame, relative to the reference camera `[B, 1, 4, 4]`: `[B, F, 4, 4]` float32."""
        viewmats = torch.stack([f.viewmats for f in frames], dim=1) @ reference
        cameras = prope.projection(viewmats, torch.stack([f.intrinsics for f in frames], dim=1))
        return prope.camera_matrices(cameras.float(), torch.float32).key

    def truncate(self, committed: int) -> None:
        """Forgets every frame from number `committed` on; ValueError when that reaches back beyond what is kept."""
        kept = [f for f in self.frames if f.index < committed]
        wanted = range(max(self.sinks, committed - (self.window - self.sinks) + 1), committed)
        missing = set(wanted) - {f.index for f in kept}
        if missing or not 0 <= committed <= self.committed:
            raise ValueError(f"can rewind to latent {min(missing, default=0)} no more, got {committed} of {self.committed}: rewind less")
        self.frames, self.committed = kept, committed

    def fork(self) -> "KVCache":
        """An independent cache with the same past; the frames are shared, since they are never written again."""
        twin = KVCache(self.heads, self.window, self.sinks, self.absolute, self.history, self.camera)
        twin.frames, twin.committed = list(self.frames), self.committed
        return twin

"""What is remembered of committed latent frames, and the view of it that attention reads.

Store once: a frame keeps, for all layers together, its normalised un-rotated keys, its raw values and its camera. View per chunk: before
a chunk is denoised, the window's keys are rotated and projected once, relative to the window and to the last committed camera, and read
by all its passes. So positions never run out, the numbers stay small however far the player walks, rewinding is truncation, a fork shares
the frames (they are never written again), and a sink is a frame that is not dropped.
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
class Window:
    """Keys and values of the committed frames a chunk sees, rotated and projected, `[layers, B, heads or 2 heads, M + room, head_dim]`.

    The last `room` places are for the tokens of a pass, so that no pass copies the window to stand beside it.
    """

    keys: Tensor
    values: Tensor
    room: int

    def joined(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The window of a layer with `room` keys and values of a pass behind it; valid until the next pass."""
        if torch.is_grad_enabled():  # what a backward pass needs may not be overwritten
            return tuple(torch.cat([past[layer][:, :, : -self.room], own], dim=2) for past, own in ((self.keys, k), (self.values, v)))
        self.keys[layer][:, :, -self.room :] = k
        self.values[layer][:, :, -self.room :] = v
        return self.keys[layer], self.values[layer]


@dataclass
class CacheView:
    """What one chunk sees: the window, or None when nothing is committed.

    `first` is the rotary position of the chunk's first frame. A pass leaves its own keys and values in `fresh`, one pair a layer.
    When the clean pass of the chunk before is merged in, the pass holds both chunks: `pending` tokens come first, and the chunk behind
    them reads `later`, the window as it will be once they are committed. Nothing in here may hold the view: a cycle would keep whole
    windows alive until the garbage collector runs.
    """

    window: Window | None
    first: int
    device: torch.device
    fresh: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    pending: int = 0
    later: Window | None = None
    tables: tuple | None = None  # a projection, with the rotary tables and camera matrices of the passes that come with it

    def positions(self, frames: int) -> Tensor:
        """Rotary positions `[frames]` of the frames of a pass."""
        return torch.arange(self.first, self.first + frames, device=self.device)

    def keep(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Called by attention: the pass's own un-rotated keys and raw values, `[B, F, N, width]`."""
        self.fresh[layer] = (keys, values)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries of the chunk `[B, H, F N, D]` over the window and the chunk itself."""
        if not self.pending:
            return _attend(self.window, layer, q, k, v)
        split = self.pending
        before = _attend(self.window, layer, q[:, :, :split], k[:, :, :split], v[:, :, :split])
        return torch.cat([before, _attend(self.later, layer, q[:, :, split:], k, v)], dim=2)


def _attend(window: Window | None, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.attend(q, *(window.joined(layer, k, v) if window else (k, v)))


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
        self._ahead: tuple[int, Window | None] | None = None  # chunk length and window of `prepare`, while they are true

    def commit(self, fresh: dict[int, tuple[Tensor, Tensor]], viewmats: Tensor, intrinsics: Tensor) -> None:
        """Remembers a chunk: `fresh` of its clean pass, `viewmats` `[B, F, 4, 4]`, `intrinsics` `[B, F, 4]`."""
        keys, values = (torch.stack([fresh[layer][i] for layer in sorted(fresh)]) for i in range(2))
        for frame in range(viewmats.shape[1]):
            stored = keys[:, :, frame], values[:, :, frame], viewmats[:, frame], intrinsics[:, frame]
            self.frames.append(FrameMemory(self.committed, *stored))
            self.committed += 1
        self.frames = [f for f in self.frames if f.index < self.sinks or f.index >= self.committed - self.window - self.history]
        self._ahead = None

    def visible(self, chunk: int) -> list[FrameMemory]:
        """The frames that a chunk of `chunk` new frames sees: sinks, then the most recent ones."""
        recent = self.committed - (self.window - chunk - self.sinks)
        return [f for f in self.frames if f.index < self.sinks or f.index >= recent]

    def view(self, viewmats: Tensor, intrinsics: Tensor, rows: int, columns: int) -> tuple[CacheView, Tensor]:
        """The window for a chunk with cameras `viewmats` `[B, F, 4, 4]` and `intrinsics` `[B, F, 4]`.

        Returns it with the chunk's projections `[B, F, 4, 4]`, relative to the last committed camera, as the window is.
        """
        chunk = viewmats.shape[1]
        frames = self.visible(chunk)
        if self._ahead is None or self._ahead[0] != chunk or torch.is_grad_enabled():
            self.prepare(chunk, rows, columns)
        view = CacheView(self._ahead[1], self.committed if self.absolute else len(frames), viewmats.device)
        reference = _inverse(frames[-1].viewmats[:, None] if frames else viewmats[:, :1])
        return view, prope.projection(viewmats.double() @ reference, intrinsics.double()).float()

    def prepare(self, chunk: int, rows: int, columns: int) -> None:
        """Makes the window of the next chunk, of `chunk` frames, before its cameras are known."""
        frames = self.visible(chunk)
        reference = _inverse(frames[-1].viewmats[:, None]) if frames else None
        start = self.committed - len(frames) if self.absolute else 0
        self._ahead = chunk, self._window(frames, reference, rows, columns, start, room=chunk)

    def pair_view(self, viewmats: Tensor, chunk: int, intrinsics: Tensor, rows: int, columns: int) -> tuple[CacheView, Tensor]:
        """The view of two chunks in one pass, `viewmats` `[B, 2 chunk, 4, 4]`: the first is about to be committed, the second follows.

        The second's window has lost its oldest frames to the first, and its sinks stand as near as they will when the first is in.
        """
        frames, now = self.visible(chunk), self.committed
        later = [f for f in frames if f.index < self.sinks or f.index >= now - (self.window - 2 * chunk - self.sinks)]
        first = now if self.absolute else len(frames)
        reference = _inverse(viewmats[:, :1])
        before = self._window(frames, reference, rows, columns, start=first - len(frames), room=chunk)
        after = self._window(later, reference, rows, columns, start=first - len(later), room=2 * chunk)
        view = CacheView(before, first, viewmats.device, pending=chunk * rows * columns, later=after)
        return view, prope.projection(viewmats.double() @ reference, intrinsics.double()).float()

    def _window(
        self, frames: list[FrameMemory], reference: Tensor, rows: int, columns: int, start: int, room: int
    ) -> Window | None:
        """`frames` in the rotary and the camera path, first of them at rotary position `start`, with room for `room` more.

        Layer by layer, so that what comes in between stays small.
        """
        if not frames:
            return None
        layers, batch, tokens, width = frames[0].keys.shape
        places, paths = len(frames) * tokens, 2 if self.camera else 1
        shape = layers, batch, paths, self.heads, places + room * tokens, width // self.heads
        keys, values = frames[0].keys.new_empty(shape), frames[0].values.new_empty(shape)
        cos, sin = (t.unsqueeze(2).to(keys.dtype) for t in rope_table(self._places(frames, start, keys.device), rows, columns, shape[-1]))
        inverse = self._inverse_cameras(frames, reference, width).to(keys.dtype) if self.camera else None
        for layer in range(layers):
            k, v = (torch.stack([getattr(f, name)[layer] for f in frames], dim=1) for name in ("keys", "values"))  # [B, F, N, width]
            seen = [(rotate(k.unflatten(-1, (self.heads, -1)), cos, sin), v)]
            if self.camera:
                seen.append((prope.apply(inverse, k), prope.apply(inverse, v)))
            for path, pair in enumerate(seen):
                for joined, x in zip((keys, values), pair, strict=True):
                    joined[layer, :, path, :, :places] = x.reshape(batch, places, self.heads, -1).transpose(1, 2)
        return Window(keys.flatten(2, 3), values.flatten(2, 3), room * tokens)

    def _places(self, frames: list[FrameMemory], start: int, device: torch.device) -> Tensor:
        """Rotary positions of `frames`, made on the device: a list of numbers would have to be waited for."""
        if not self.absolute:
            return torch.arange(start, start + len(frames), device=device)
        sinks = sum(f.index < self.sinks for f in frames)
        runs = [run for run in (frames[:sinks], frames[sinks:]) if run]  # each without gaps
        return torch.cat([torch.arange(run[0].index, run[-1].index + 1, device=device) for run in runs])

    @staticmethod
    def _inverse_cameras(frames: list[FrameMemory], reference: Tensor, width: int) -> Tensor:
        """P^-1 of every frame, relative to the reference camera `[B, 1, 4, 4]`: `[B, F, m, m]` float32, see `prope.camera_matrices`."""
        viewmats = torch.stack([f.viewmats for f in frames], dim=1) @ reference
        cameras = prope.projection(viewmats, torch.stack([f.intrinsics for f in frames], dim=1))
        return prope.camera_matrices(cameras.float(), torch.float32, width).key

    def truncate(self, committed: int) -> None:
        """Forgets every frame from number `committed` on; ValueError when that reaches back beyond what is kept."""
        kept = [f for f in self.frames if f.index < committed]
        wanted = range(max(self.sinks, committed - (self.window - self.sinks) + 1), committed)
        missing = set(wanted) - {f.index for f in kept}
        if missing or not 0 <= committed <= self.committed:
            raise ValueError(f"can rewind to latent {min(missing, default=0)} no more, got {committed} of {self.committed}: rewind less")
        self.restore(kept, committed)

    def restore(self, frames: list[FrameMemory], committed: int) -> None:
        """Goes on from `frames`, what is kept of a past of `committed` latent frames."""
        self.frames, self.committed, self._ahead = list(frames), committed, None

    def fork(self) -> "KVCache":
        """An independent cache with the same past; the frames are shared, since they are never written again."""
        twin = KVCache(self.heads, self.window, self.sinks, self.absolute, self.history, self.camera)
        twin.restore(self.frames, self.committed)
        return twin


def _inverse(viewmats: Tensor) -> Tensor:
    """c2w of w2c `[..., 4, 4]` in float64; torch.linalg.inv would wait for its error flag."""
    return torch.linalg.inv_ex(viewmats.double()).inverse

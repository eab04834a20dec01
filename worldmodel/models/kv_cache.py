"""What a rollout remembers of committed latent frames, and the ring of keys that a chunk attends
to.

The store: a frame keeps, for all layers together, its normalised un-rotated keys, its raw values
and its camera. It is never written again, so rewinding is truncation and a clone shares the frames.
The ring: the frames that a chunk sees, with rotated and projected keys, in fixed memory. The passes
of a chunk write their own keys to the slots of frames that have just left the window; those of the
clean pass stay, so between two rebases only sinks, whose positions move, are projected again.
Attention depends on differences of positions and on relative cameras only, so both are relative to
a reference frame a few latents back. Every `KVCache.rebase_interval` latents there is a new one,
and the ring is projected from the store again: positions never run out, and the numbers stay small
however far the camera travels. A policy that recalls has a second store, of the whole session
(`frame_store.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from worldmodel.device import to_device_async
from worldmodel.models import attention, prope
from worldmodel.models.attention import RopeTables, TokenLayout, project_kv
from worldmodel.models.frame_store import CachedFrame, FrameStore
from worldmodel.models.memory import FrameNumber, MemoryPolicy, RecentWindow, Selection

LayerKV = dict[int, tuple[Tensor, Tensor]]  # keys and values by layer


class SlotRange(NamedTuple):
    """Neighbouring slots of a ring as a range of its tokens, and the tokens of a pass that go
    there.
    """

    ring: slice
    tokens: slice


def slot_ranges(slots: Sequence[int], tokens: int) -> list[SlotRange]:
    """Ranges for frames of `tokens` tokens each that stand in `slots`, as few as possible."""
    ranges = []
    start = 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] != slots[end - 1] + 1:
            ring = slice(slots[start] * tokens, (slots[end - 1] + 1) * tokens)
            ranges.append(SlotRange(ring, slice(start * tokens, end * tokens)))
            start = end
    return ranges


class Resident(NamedTuple):
    """What stands in a slot of the ring: a frame, rotated to a position, relative to the reference
    pose of a position offset.
    """

    frame: FrameNumber
    position: int
    offset: int


@dataclass
class Ring:
    """Rotated and projected keys and values in fixed memory of `size` tokens.

    `layers`: a pair `[B, heads or 2 heads, size, head_dim]` each, rotary path first.
    `residents`: what is known to stand in a slot.
    """

    size: int
    layers: LayerKV = field(default_factory=dict)
    residents: dict[int, Resident] = field(default_factory=dict)

    def layer(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer; at its first use with room for tokens `like` `[B, H, M,
        head_dim]`.
        """
        if layer not in self.layers:
            batch, heads, _, width = like.shape
            shape = (batch, heads, self.size, width)
            self.layers[layer] = like.new_empty(shape), like.new_empty(shape)
        return self.layers[layer]

    def write(self, layer: int, ranges: Sequence[SlotRange], k: Tensor, v: Tensor) -> None:
        """Puts keys and values `[B, H, M, head_dim]` into their slots."""
        for held, new in zip(self.layer(layer, k), (k, v), strict=True):
            for part in ranges:
                held[:, :, part.ring] = new[:, :, part.tokens]


class CachedContext:
    """The context of a chunk over remembered frames (see `attention.AttentionContext`).

    `viewmats` `[B, F, 4, 4]` and `intrinsics` `[B, F, 4]`, float64: the chunk's cameras.
    `new_kv`: un-rotated keys and raw values that the last pass stored, by layer.
    It must not hold the cache: the cycle would keep gigabytes alive until the garbage collector
    runs.
    """

    def __init__(
        self,
        ring: Ring,
        selection: Selection,
        offset: int,
        rope: RopeTables,
        cameras: prope.CameraMatrices | None,
        viewmats: Tensor,
        intrinsics: Tensor,
    ):
        tokens = rope.cos.shape[1]
        self.rope = rope
        self.cameras = cameras
        self.viewmats = viewmats
        self.intrinsics = intrinsics
        self.selection = selection
        self.offset = offset
        self.new_kv: LayerKV = {}
        self.ring = ring
        self._own = slot_ranges(selection.own, tokens)
        self._used = (len(selection.remembered) + len(selection.own)) * tokens
        self._others = _between(self._own, self._used)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries of the chunk `[B, H, F N, head_dim]` over the ring and the chunk itself."""
        if torch.is_grad_enabled():  # a backward pass needs what an in-place write would destroy
            held = self.ring.layer(layer, k)
            parts = [[x[:, :, part] for part in self._others] for x in held]
            return attention.attend(
                q, torch.cat([*parts[0], k], dim=2), torch.cat([*parts[1], v], dim=2)
            )
        self.write(layer, k, v)
        return attention.attend(q, *(x[:, :, : self._used] for x in self.ring.layers[layer]))

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Puts projected keys and values of the chunk into the ring, for a layer that need not
        attend.
        """
        self.ring.write(layer, self._own, k, v)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.new_kv[layer] = key, value


class KVCache:
    """The committed frames of a rollout.

    layout: tokens of a frame. memory: which frames a chunk sees, unless `begin_chunk` says
    otherwise; where it recalls, `store` holds frames of the whole session. history: frames kept
    beyond the window, so that `truncate` has something to return to.
    Positions are relative to the reference frame, but for `absolute` ones.
    """

    def __init__(self, layout: TokenLayout, memory: RecentWindow, history: int = 0):
        self.layout = layout
        self.memory = memory
        self.history = history
        # short enough that the reference frame is always kept
        self.rebase_interval = max(1, memory.recent - 1)
        self.frames: list[CachedFrame] = []
        self.store = memory.store()
        # recalled frames that the last chunk saw, on the device
        self._recalled: dict[FrameNumber, CachedFrame] = {}
        self.committed = 0
        self._ring: Ring | None = None
        self._open: CachedContext | None = None  # begun, and neither committed nor out of date

    def begin_chunk(
        self, viewmats: Tensor, intrinsics: Tensor, memory: MemoryPolicy | None = None
    ) -> CachedContext:
        """The context of the next chunk, with cameras `viewmats` w2c `[B, F, 4, 4]` and
        `intrinsics` `[B, F, 4]`. It is valid until the next chunk begins or the past changes.

        memory: which remembered frames the chunk sees; None = the cache's own.
        While gradients are enabled the ring is a new one, which nothing else writes to.
        """
        memory = memory or self.memory
        viewmats = viewmats.double()
        intrinsics = intrinsics.double()
        selection = memory.select(self._remembered(), self.committed, viewmats, intrinsics)
        offset = self._position_offset()
        reference = self._reference_pose(offset, viewmats)
        self._open = None  # until all is written
        ring = self._filled_ring(memory, selection, offset, reference)
        first = selection.position - self._shown_offset(offset)
        count = viewmats.shape[1]
        positions = torch.arange(first, first + count, device=viewmats.device)
        projmats = prope.projmats(viewmats @ reference, intrinsics).float()
        context = CachedContext(
            ring,
            selection,
            offset,
            self.layout.rope(positions),
            self.layout.cameras(projmats),
            viewmats,
            intrinsics,
        )
        self._open = context
        return context

    def is_current(self, context: CachedContext | None) -> bool:
        """Whether a context can still be read: nothing was begun or changed since it was made."""
        return context is not None and context is self._open

    def commit(self, context: CachedContext, kv: LayerKV | None = None) -> None:
        """Remembers the chunk of `context`, whose last pass was the clean one.

        kv: keys and values to keep; None = those that the pass stored.
        """
        if not self.is_current(context):
            raise ValueError("the context is out of date: begin the chunk again")
        kv = context.new_kv if kv is None else kv
        keys, values = (torch.stack([kv[layer][i] for layer in sorted(kv)]) for i in range(2))
        shown = self._shown_offset(context.offset)
        for number, slot in enumerate(context.selection.own):
            stored = keys[:, :, number], values[:, :, number]
            cameras = context.viewmats[:, number], context.intrinsics[:, number]
            self.frames.append(CachedFrame(self.committed, *stored, *cameras))
            if self.store is not None:
                self.store.add(self.frames[-1])
            position = context.selection.position + number - shown
            context.ring.residents[slot] = Resident(self.committed, position, context.offset)
            self.committed += 1
        self._drop_old_frames()
        self._open = None

    def prepare(self, chunk: int) -> None:
        """Projects what the next chunk of `chunk` frames will see, before its cameras are known.

        Optional: `begin_chunk` does what is still to be done. Only for the cache's own policy.
        """
        if not self.frames:
            return
        last = self.frames[-1]
        viewmats = last.viewmats[:, None].expand(-1, chunk, -1, -1)
        intrinsics = last.intrinsics[:, None].expand(-1, chunk, -1)
        selection = self.memory.select(self._remembered(), self.committed, viewmats, intrinsics)
        offset = self._position_offset()
        reference = self._reference_pose(offset, viewmats)
        self._filled_ring(self.memory, selection, offset, reference)

    def truncate(self, committed: int) -> None:
        """Forgets every frame from number `committed` on. Raises ValueError when that reaches back
        beyond what is kept.
        """
        kept = [frame for frame in self.frames if frame.index < committed]
        window = self.memory
        recent = range(max(window.sinks, committed - window.recent + 1), committed)
        missing = set(recent) - {frame.index for frame in kept}
        if missing or not 0 <= committed <= self.committed:
            raise ValueError(
                f"cannot return to {committed} of {self.committed} latents, because latent "
                f"{min(missing, default=0)} is no longer kept: rewind less"
            )
        self.frames = kept
        self.committed = committed
        if self.store is not None:
            self.store.truncate(committed)
        self._forget_ring()
        self._drop_old_frames()

    def clone(self, memory: RecentWindow | None = None, history: int | None = None) -> "KVCache":
        """A cache with the same past; the frames are shared. Its ring is made by the chunk that
        needs it first.
        """
        twin = KVCache(
            self.layout, memory or self.memory, self.history if history is None else history
        )
        twin.restore(self.frames, self.committed, self._remembered())
        return twin

    def restore(
        self,
        frames: Sequence[CachedFrame],
        committed: int,
        stored: Sequence[CachedFrame] | None = None,
    ) -> None:
        """Continue from `frames`, what is kept of a past of `committed` latent frames.

        stored: frames that may be recalled, where the policy does so; None = `frames`.
        """
        self.frames = list(frames)
        self.committed = committed
        if self.store is not None:
            if isinstance(stored, FrameStore):
                self.store = stored.copy()
            else:
                self.store.refill(frames if stored is None else stored)
        self._forget_ring()
        self._drop_old_frames()

    def visible(self, chunk: int) -> list[CachedFrame]:
        """The frames that a chunk of `chunk` new frames may see, by the cache's own policy."""
        oldest = self.memory.oldest(self.committed, chunk)
        return [f for f in self.frames if f.index < self.memory.sinks or f.index >= oldest]

    # -------------------- inside

    def _remembered(self) -> Sequence[CachedFrame]:
        return self.frames if self.store is None else self.store

    def _drop_old_frames(self) -> None:
        keeps = self.memory.keeps
        self.frames = [f for f in self.frames if keeps(f.index, self.committed - self.history)]

    def _forget_ring(self) -> None:
        """After a change of the past the ring is projected from the store again, so that a rewound
        rollout equals a reopened one bit for bit. Its memory is reused.
        """
        self._open = None
        self._recalled.clear()
        if self._ring is not None:
            self._ring.residents.clear()

    def _position_offset(self) -> int:
        """The frame number that the reference pose belongs to, by the count alone: a reopened
        rollout has the same one.
        """
        return self.committed // self.rebase_interval * self.rebase_interval

    def _shown_offset(self, offset: int) -> int:
        """What is subtracted from rotary positions."""
        return 0 if self.memory.absolute else offset

    def _reference_pose(self, offset: int, viewmats: Tensor) -> Tensor:
        """c2w `[B, 1, 4, 4]` of the last frame before the offset (in the first interval of frame
        0), or of the kept one nearest to it; of the chunk itself when there is no past.
        """
        if not self.frames:
            return _inverse(viewmats[:, :1])
        wanted = max(0, offset - 1)
        nearest = min(self.frames, key=lambda frame: abs(frame.index - wanted))
        return _inverse(nearest.viewmats[:, None])

    def _filled_ring(
        self, memory: MemoryPolicy, selection: Selection, offset: int, reference: Tensor
    ) -> Ring:
        """The ring with the selected frames in it; what stands in the chunk's own slots no longer
        counts, for its passes write there.
        """
        size = memory.size * self.layout.tokens
        if torch.is_grad_enabled():
            self._ring = None
            ring = Ring(size)
        else:
            if self._ring is None or self._ring.size != size:
                self._ring = None  # before the new one is made: two of them would be gigabytes
                self._ring = Ring(size)
            ring = self._ring
        for slot in selection.own:
            ring.residents.pop(slot, None)
        shown = self._shown_offset(offset)
        missing = {}
        for frame, slot, position in selection.remembered:
            resident = Resident(frame, position - shown, offset)
            if ring.residents.get(slot) != resident:
                missing[slot] = resident
        recalled = {slot.frame for slot in selection.remembered if isinstance(slot.frame, tuple)}
        self._recalled = {
            numbers: self._recalled.get(numbers) or self._from_store(numbers)
            for numbers in sorted(recalled)
        }
        if missing:
            self._project(ring, missing, reference)
        return ring

    def _from_store(self, numbers: tuple[int, ...]) -> CachedFrame:
        """A frame of the store for each row of the batch, as one frame on the device."""
        frames = [self.store[self.store.find(number)] for number in numbers]
        frame = frames[0]
        if any(other is not frame for other in frames):
            rows = list(enumerate(frames))
            frame = CachedFrame(
                frame.index,
                torch.stack([one.keys[:, row] for row, one in rows], dim=1),
                torch.stack([one.values[:, row] for row, one in rows], dim=1),
                torch.stack([one.viewmats[row] for row, one in rows]),
                torch.stack([one.intrinsics[row] for row, one in rows]),
            )
        newest = self.frames[-1]
        return frame.to(newest.keys.device, newest.viewmats.device)

    def _project(self, ring: Ring, missing: dict[int, Resident], reference: Tensor) -> None:
        """Writes frames from the store into slots of the ring, layer by layer, so that what comes
        in between stays small.
        """
        by_index = {frame.index: frame for frame in self.frames} | self._recalled
        frames = [by_index[resident.frame] for resident in missing.values()]
        for slot in missing:
            ring.residents.pop(slot, None)
        positions = torch.tensor([resident.position for resident in missing.values()])
        rope = self.layout.rope(to_device_async(positions, frames[0].viewmats.device))
        viewmats = torch.stack([frame.viewmats for frame in frames], dim=1) @ reference
        intrinsics = torch.stack([frame.intrinsics for frame in frames], dim=1)
        cameras = self.layout.cameras(prope.projmats(viewmats, intrinsics).float())
        inverse = None if cameras is None else cameras.key
        ranges = slot_ranges(list(missing), self.layout.tokens)
        for layer in range(len(frames[0].keys)):
            k = torch.stack([frame.keys[layer] for frame in frames], dim=1)
            v = torch.stack([frame.values[layer] for frame in frames], dim=1)
            ring.write(layer, ranges, *project_kv(k, v, rope, inverse, self.layout.heads))
        ring.residents.update(missing)


def _between(ranges: Sequence[SlotRange], used: int) -> list[slice]:
    """The first `used` tokens of a ring without `ranges`."""
    taken = sorted((part.ring.start, part.ring.stop) for part in ranges)
    starts = (0, *(stop for _, stop in taken))
    stops = (*(start for start, _ in taken), used)
    return [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]


def _inverse(viewmats: Tensor) -> Tensor:
    """c2w of w2c `[..., 4, 4]` in float64; torch.linalg.inv would wait for its error flag."""
    return torch.linalg.inv_ex(viewmats.double()).inverse

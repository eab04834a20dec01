"""What is remembered of committed latent frames, and the window of it that attention reads.

Store once: a frame keeps, for all layers together, its normalised un-rotated keys, its raw values
and its camera. Turn once: the window is a ring in fixed memory; the passes of a chunk write their
keys, rotated and projected, to the places of the frames that have just left it, and those of the
clean pass stay. Attention asks for differences of positions and cameras only, so all of them are
relative to an anchor, a frame a few latents back; every `KVCache.period` latents there is a new one
and the ring is written from the store again. So positions never run out, the numbers stay small
however far the player walks, rewinding is truncation, a fork shares the frames (they are never
written again), and a sink is a frame that is not dropped.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from worldmodel.models import attention, prope
from worldmodel.models.attention import by_head, turned
from worldmodel.models.rope import rope_table, rotate


@dataclass(frozen=True)
class FrameMemory:
    """One committed latent frame: keys and values `[layers, B, N, width]`, w2c `[B, 4, 4]` and
    intrinsics `[B, 4]` in float64, which stay on the `rope.float64_device`.
    """

    index: int
    keys: Tensor
    values: Tensor
    viewmats: Tensor
    intrinsics: Tensor


Runs = list[
    tuple[slice, slice]
]  # places of a window that follow each other, and the tokens that take them


@dataclass(frozen=True)
class Places:
    """Where the tokens of a chunk stand in a window (a recorded pass: `numbers`), and how many
    places are in use then, these included.
    """

    runs: Runs | Tensor
    used: int

    @property
    def rest(self) -> list[slice]:
        """The other places in use."""
        taken = sorted((stand.start, stand.stop) for stand, _ in self.runs)
        starts = (0, *(stop for _, stop in taken))
        stops = (*(start for start, _ in taken), self.used)
        return [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]

    def numbers(self, device: torch.device) -> Tensor:
        """The places one by one, `[M]`: numbers that can change while the operations on them stay
        the same.
        """
        return torch.cat(
            [torch.arange(stand.start, stand.stop, device=device) for stand, _ in self.runs]
        )


@dataclass
class Window:
    """Keys and values, rotated and projected, of the frames that a chunk sees, in a ring of `size`
    tokens.

    `layers`: a pair `[B, heads or 2 heads, size, head_dim]` each, rotary path first. `anchor`: the
    camera that all are relative to, c2w `[B, 1, 4, 4]`; `phase`: the frame whose rotary position is
    0. `held`: committed frames, the last of which stand here; `oldest`: the first of them, sinks
    apart, that has not been written over.
    """

    size: int
    anchor: Tensor
    phase: int
    held: int
    oldest: int
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def layer(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer; at its first use with room for tokens `like` `[B, H, M,
        head_dim]`.
        """
        if layer not in self.layers:
            batch, heads, _, width = like.shape
            self.layers[layer] = tuple(
                like.new_empty(batch, heads, self.size, width) for _ in range(2)
            )
        return self.layers[layer]

    def write(self, layer: int, runs: Runs | Tensor, k: Tensor, v: Tensor) -> None:
        """Puts keys and values `[B, H, M, head_dim]` to their places."""
        for joined, x in zip(self.layer(layer, k), (k, v), strict=True):
            if isinstance(runs, Tensor):
                joined.index_copy_(2, runs, x)
                continue
            for stand, part in runs:
                joined[:, :, stand] = x[:, :, part]

    def joined(self, layer: int, places: Places, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that a chunk sees, its own among them; valid until the next pass."""
        if torch.is_grad_enabled():  # what a backward pass needs may not be overwritten
            return tuple(
                torch.cat([*(x[:, :, rest] for rest in places.rest), own], 2)
                for x, own in zip(self.layer(layer, k), (k, v))
            )
        self.write(layer, places.runs, k, v)
        return tuple(x[:, :, : places.used] for x in self.layers[layer])

    def put_sinks(self, layer: int, keys: Tensor) -> None:
        """Replaces the sinks' rotary keys, `[B, heads, M, head_dim]`."""
        self.layers[layer][0][:, : keys.shape[1], : keys.shape[2]] = keys


@dataclass
class CacheView:
    """What one chunk sees: a window, and the places of the chunk in it.

    `first` is the rotary position of the chunk's first frame. A pass leaves its own keys and values
    in `fresh`, one pair a layer. When the clean pass of the chunk before is merged in, the pass
    holds both chunks: `pending` tokens come first, and those behind them go to the places `later`,
    after the first have read the window; `sinks` are the sinks' rotary keys as those see them, one
    a layer, or none. Nothing in here may hold the view: a cycle would keep whole windows alive
    until the garbage collector runs.
    """

    window: Window
    places: Places
    first: int
    device: torch.device
    fresh: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    pending: int = 0
    later: Places | None = None
    sinks: list[Tensor] = field(default_factory=list)
    tables: tuple | None = (
        # a projection, and what the passes that come with it share (`transformer.FramePositions`)
        None
    )

    @property
    def full(self) -> bool:
        """Whether all of the window is in use; so it stays, until the dream is rewound."""
        return self.places.used == self.window.size

    def positions(self, frames: int) -> Tensor:
        """Rotary positions `[frames]` of the frames of a pass."""
        return torch.arange(self.first, self.first + frames, device=self.device)

    def keep(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Called by attention: the pass's own un-rotated keys and raw values, `[B, F, N,
        width]`.
        """
        self.fresh[layer] = (keys, values)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Leaves turned keys and values of a pass in the window, for a layer that need not
        attend.
        """
        self.window.write(layer, self.places.runs, k, v)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries of the chunk `[B, H, F N, D]` over the window and the chunk itself."""
        if not self.pending:
            return attention.attend(q, *self.window.joined(layer, self.places, k, v))
        split = self.pending
        before = attention.attend(
            q[:, :, :split],
            *self.window.joined(layer, self.places, k[:, :, :split], v[:, :, :split]),
        )
        if self.sinks:
            self.window.put_sinks(layer, self.sinks[layer])
        after = attention.attend(
            q[:, :, split:],
            *self.window.joined(layer, self.later, k[:, :, split:], v[:, :, split:]),
        )
        return torch.cat([before, after], dim=2)


class KVCache:
    """The committed frames of a rollout.

    `window`: latent frames attention may see, those of the current chunk included; `sinks`: the
    first frames, which are kept for ever and count as part of the window; `absolute`: rotary
    positions are frame numbers (the references' way) instead of places in the window; `history`:
    frames kept beyond the window so that rewinding has something to return to; `camera`: whether
    the network has the PRoPE path.
    """

    def __init__(
        self,
        heads: int,
        window: int,
        sinks: int = 0,
        absolute: bool = False,
        history: int = 0,
        camera: bool = True,
    ):
        if not 0 <= sinks < window:
            raise ValueError(
                f"sinks must be at least 0 and fewer than the window of {window} latents, got "
                f"{sinks}: change one of them"
            )
        self.heads = heads
        self.window = window
        self.sinks = sinks
        self.absolute = absolute
        self.history = history
        self.camera = camera
        self.period = max(
            1, window - sinks - 1
        )  # latents to a new anchor; so long the old one is among the frames that are kept
        self.frames: list[FrameMemory] = []
        self.committed = 0
        self._window: Window | None = None  # what stands in the ring, when that is known
        self._ring: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # its memory, which every window without gradients takes over

    def commit(
        self,
        view: CacheView,
        viewmats: Tensor,
        intrinsics: Tensor,
        fresh: dict[int, tuple[Tensor, Tensor]],
    ) -> None:
        """Remembers a chunk: the `view` that its clean pass was the last to read, cameras
        `viewmats` `[B, F, 4, 4]` and `intrinsics` `[B, F, 4]`, and the keys and values that the
        pass left, `fresh`.
        """
        keys, values = (torch.stack([fresh[layer][i] for layer in sorted(fresh)]) for i in range(2))
        for frame in range(viewmats.shape[1]):
            stored = (
                keys[:, :, frame],
                values[:, :, frame],
                viewmats[:, frame],
                intrinsics[:, frame],
            )
            self.frames.append(FrameMemory(self.committed, *stored))
            self.committed += 1
        self.frames = self._kept(self.frames)
        view.window.held = self.committed

    def _kept(self, frames: list[FrameMemory]) -> list[FrameMemory]:
        """Those that are still worth their memory: sinks, window and history."""
        return [
            f
            for f in frames
            if f.index < self.sinks or f.index >= self.committed - self.window - self.history
        ]

    def visible(self, chunk: int) -> list[FrameMemory]:
        """The frames that a chunk of `chunk` new frames sees: sinks, then the most recent ones."""
        return self._since(self._oldest(chunk))

    def view(
        self, viewmats: Tensor, intrinsics: Tensor, rows: int, columns: int
    ) -> tuple[CacheView, Tensor]:
        """The window for a chunk with cameras `viewmats` `[B, F, 4, 4]` and `intrinsics` `[B, F,
        4]`.

        Returns it with the chunk's projections `[B, F, 4, 4]`, relative to the window's anchor.
        """
        chunk = viewmats.shape[1]
        now = self.committed
        window = self.prepare(chunk, rows, columns, viewmats[:, 0])
        first = now if self.absolute else now - window.phase
        view = CacheView(window, self._places(now, chunk, rows * columns), first, viewmats.device)
        return view, prope.projection(
            viewmats.double() @ window.anchor, intrinsics.double()
        ).float()

    def pair_view(
        self, viewmats: Tensor, chunk: int, intrinsics: Tensor, rows: int, columns: int
    ) -> tuple[CacheView, Tensor]:
        """The view of two chunks in one pass, `viewmats` `[B, 2 chunk, 4, 4]`: the first is about
        to be committed, the second follows.

        The second's window has lost its oldest frames to the first, and its sinks stand as near as
        they will when the first is in.
        """
        view, _ = self.view(viewmats[:, :chunk], intrinsics[:, :chunk], rows, columns)
        oldest = self._oldest(2 * chunk)
        tokens = rows * columns
        view.pending = chunk * tokens
        view.later = self._places(self.committed + chunk, chunk, tokens)
        view.sinks = self._moved_sinks(view.window, oldest, rows, columns)
        view.window.oldest = oldest
        return view, prope.projection(
            viewmats.double() @ view.window.anchor, intrinsics.double()
        ).float()

    def prepare(self, chunk: int, rows: int, columns: int, camera: Tensor | None = None) -> Window:
        """The window as the next chunk, of `chunk` frames, finds it: the one that is there, or a
        new one where that is of no use any more.

        The first chunk of all is its own anchor and must give its `camera` `[B, 4, 4]`; the others'
        need not be known yet. While gradients are wanted the window is always a new one, which
        nobody else writes to.
        """
        grad = torch.is_grad_enabled()
        oldest = self._oldest(chunk)
        window = self._window
        phase = (
            self.committed // self.period * self.period
        )  # by the count alone: a window made anew is like the old one
        if (
            grad
            or not self.committed
            or window is None
            or (window.held, window.phase) != (self.committed, phase)
            or oldest < window.oldest
        ):
            window = self._new_window(phase, oldest, rows, columns, camera)
        for layer, keys in enumerate(self._moved_sinks(window, oldest, rows, columns)):
            window.put_sinks(layer, keys)
        window.oldest = oldest
        self._window = None if grad else window
        return window

    def holds(self, view: CacheView | None, chunk: int) -> bool:
        """Whether a view of a chunk of `chunk` new frames can still be read: nothing was committed
        or written over since it was made.
        """
        window = self._window
        return (
            view is not None
            and view.window is window
            and (window.held, window.oldest) == (self.committed, self._oldest(chunk))
        )

    def _since(self, oldest: int) -> list[FrameMemory]:
        return [f for f in self.frames if f.index < self.sinks or f.index >= oldest]

    def _oldest(self, chunk: int) -> int:
        """The first frame, sinks apart, that a chunk of `chunk` new frames sees."""
        return max(self.sinks, self.committed - (self.window - chunk - self.sinks))

    def _places(self, first: int, frames: int, tokens: int) -> Places:
        """Where frames `first` to `first + frames` stand: one behind the other, in a full ring in
        place of the oldest.
        """
        slots = [self._slot(index) for index in range(first, first + frames)]
        return Places(_runs(slots, tokens), min(first + frames, self.window) * tokens)

    def _slot(self, index: int) -> int:
        """Which place of the window frame `index` takes: sinks stay in front."""
        return (
            index
            if index < self.sinks
            else self.sinks + (index - self.sinks) % (self.window - self.sinks)
        )

    def _new_window(
        self, phase: int, oldest: int, rows: int, columns: int, camera: Tensor | None
    ) -> Window:
        """The sinks and the frames from `oldest` on out of the store, layer by layer, so that what
        comes in between stays small.

        The anchor is the last frame before the phase (in the first phase the first of all), or the
        nearest to it that is kept. Without gradients it is written over the window before it: two
        of them would be gigabytes.
        """
        if self.frames:
            camera = min(
                self.frames, key=lambda frame: abs(frame.index - max(0, phase - 1))
            ).viewmats
        grad = torch.is_grad_enabled()
        size = self.window * rows * columns
        if grad or any(keys.shape[2] != size for keys, _ in self._ring.values()):
            self._ring = {}
        self._window = None  # not known until all is written
        window = Window(
            size,
            _inverse(camera[:, None]),
            phase,
            self.committed,
            oldest,
            {} if grad else self._ring,
        )
        frames = self._since(oldest)
        if not frames:
            return window
        device = frames[0].viewmats.device
        sinks = self._sink_positions(window, oldest, device)[: len(frames)]
        recent = torch.arange(oldest, max(oldest, self.committed), device=device) - (
            0 if self.absolute else phase
        )
        cos, sin = self._table(torch.cat([sinks, recent]), frames, rows, columns)
        inverse = self._inverse_cameras(frames, window.anchor) if self.camera else None
        runs = _runs([self._slot(f.index) for f in frames], rows * columns)
        for layer in range(len(frames[0].keys)):
            k, v = (
                torch.stack([getattr(f, name)[layer] for f in frames], dim=1)
                for name in ("keys", "values")
            )
            window.write(layer, runs, *turned(k, v, cos, sin, inverse, self.heads))
        return window

    def _moved_sinks(self, window: Window, oldest: int, rows: int, columns: int) -> list[Tensor]:
        """Rotary keys `[B, heads, M, head_dim]` of the sinks, one a layer, with `oldest` behind
        them; none where they need not move.
        """
        sinks = self.frames[: self.sinks]
        if self.absolute or not sinks or oldest == window.oldest:
            return []
        cos, sin = self._table(
            self._sink_positions(window, oldest, sinks[0].viewmats.device), sinks, rows, columns
        )
        layers = torch.stack([f.keys for f in sinks], dim=2).unflatten(-1, (self.heads, -1))
        return [by_head([rotate(k, cos, sin)]) for k in layers]

    def _sink_positions(self, window: Window, oldest: int, device: torch.device) -> Tensor:
        """Rotary positions of the sinks: their own, or right before the oldest frame."""
        first = 0 if self.absolute else oldest - self.sinks - window.phase
        return torch.arange(first, first + self.sinks, device=device)

    def _table(
        self, positions: Tensor, frames: list[FrameMemory], rows: int, columns: int
    ) -> tuple[Tensor, Tensor]:
        """Rotary tables `[F, N, 1, head_dim]` in the type of the frames' keys, and beside them."""
        keys = frames[0].keys
        return tuple(
            t.unsqueeze(2).to(keys.device, keys.dtype)
            for t in rope_table(positions, rows, columns, keys.shape[-1] // self.heads)
        )

    @staticmethod
    def _inverse_cameras(frames: list[FrameMemory], anchor: Tensor) -> Tensor:
        """P^-1 of every frame, relative to the anchor `[B, 1, 4, 4]`: `[B, F, m, m]` in the type of
        the frames' keys and beside them, see `prope.camera_matrices`.
        """
        viewmats = torch.stack([f.viewmats for f in frames], dim=1) @ anchor
        cameras = prope.projection(viewmats, torch.stack([f.intrinsics for f in frames], dim=1))
        keys = frames[0].keys
        return prope.camera_matrices(cameras.float(), keys.dtype, keys.shape[-1], keys.device).key

    def truncate(self, committed: int) -> None:
        """Forgets every frame from number `committed` on; ValueError when that reaches back beyond
        what is kept.
        """
        kept = [f for f in self.frames if f.index < committed]
        wanted = range(max(self.sinks, committed - (self.window - self.sinks) + 1), committed)
        missing = set(wanted) - {f.index for f in kept}
        if missing or not 0 <= committed <= self.committed:
            raise ValueError(
                f"can rewind to latent {min(missing, default=0)} no more, got {committed} of "
                f"{self.committed}: rewind less"
            )
        self.restore(kept, committed)

    def restore(self, frames: list[FrameMemory], committed: int) -> None:
        """Goes on from `frames`, what is kept of a past of `committed` latent frames."""
        self.committed = committed
        self._window = None
        self.frames = self._kept(frames)


def _runs(slots: list[int], tokens: int) -> Runs:
    """The places of frames in `slots`, `tokens` each."""
    runs = []
    start = 0
    for number in range(1, len(slots) + 1):
        if number == len(slots) or slots[number] != slots[number - 1] + 1:
            stand = slice(slots[start] * tokens, (slots[number - 1] + 1) * tokens)
            runs.append((stand, slice(start * tokens, number * tokens)))
            start = number
    return runs


def _inverse(viewmats: Tensor) -> Tensor:
    """c2w of w2c `[..., 4, 4]` in float64; torch.linalg.inv would wait for its error flag."""
    return torch.linalg.inv_ex(viewmats.double()).inverse

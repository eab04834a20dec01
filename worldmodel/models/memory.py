"""Which remembered frames a chunk sees, where they stand in the ring, and at which positions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from worldmodel.errors import UserError
from worldmodel.models.frame_store import CachedFrame, FrameStore
from worldmodel.models.view_overlap import choose_views

# number of a remembered frame, or of one for each row of the batch
FrameNumber = int | tuple[int, ...]


class Slot(NamedTuple):
    """A remembered frame that a chunk sees: which one, where it stands in the ring, and at which
    rotary position.
    """

    frame: FrameNumber
    slot: int
    position: int


class Selection(NamedTuple):
    """What a chunk sees: remembered frames, and the slots that its own frames take.

    The slots of both together are the first `len(remembered) + len(own)` of the ring.
    """

    remembered: tuple[Slot, ...]
    own: tuple[int, ...]
    position: int  # rotary position of the chunk's first frame


class MemoryPolicy(Protocol):
    """Chooses the remembered frames that a chunk sees.

    The choice must depend on its arguments alone, so that a rewound, cloned or reopened rollout has
    the same future. `size`: slots of the ring, the chunk's own included.
    """

    size: int

    def select(
        self, frames: Sequence[CachedFrame], committed: int, viewmats: Tensor, intrinsics: Tensor
    ) -> Selection:
        """frames: what is remembered, oldest first (all that the `FrameStore` holds, where there is
        one). committed: latent frames so far. viewmats `[B, F, 4, 4]` and intrinsics `[B, F, 4]`:
        cameras of the chunk.
        """
        ...

    def keeps(self, frame: int, committed: int) -> bool:
        """Whether a later chunk may still see frame number `frame`."""
        ...


@dataclass(frozen=True)
class RecentWindow:
    """The first `sinks` frames of all and the most recent ones, `size` with the chunk's own.

    absolute: rotary positions are frame numbers, as in the references; otherwise sinks stand right
    before the oldest recent frame, so that a session has no end.
    """

    size: int
    sinks: int = 0
    absolute: bool = False

    def __post_init__(self):
        if not 0 <= self.sinks < self.size:
            raise UserError(
                f"sinks must be at least 0 and fewer than the window of {self.size} latents, got "
                f"{self.sinks}: change one of them"
            )

    @property
    def recent(self) -> int:
        """Latents of the recent part, the chunk's own included."""
        return self.size - self.sinks

    def store(self) -> FrameStore | None:
        """An empty store of the whole session; None where the policy needs none."""
        return None

    def select(
        self, frames: Sequence[CachedFrame], committed: int, viewmats: Tensor, intrinsics: Tensor
    ) -> Selection:
        chunk = viewmats.shape[1]
        if not 1 <= chunk <= self.recent:
            raise ValueError(
                f"a chunk has 1 to {self.recent} latents in a window of {self.size} with "
                f"{self.sinks} sinks, got {chunk}: pass fewer at a time"
            )
        oldest = self.oldest(committed, chunk)
        sinks = range(min(self.sinks, committed))
        first_sink = 0 if self.absolute else oldest - self.sinks
        remembered = [Slot(index, index, first_sink + index) for index in sinks]
        remembered += [Slot(i, self._slot(i), i) for i in range(oldest, committed)]
        own = tuple(self._slot(index) for index in range(committed, committed + chunk))
        return Selection(tuple(remembered), own, committed)

    def keeps(self, frame: int, committed: int) -> bool:
        return frame < self.sinks or frame >= committed - self.size

    def oldest(self, committed: int, chunk: int) -> int:
        """The first frame, sinks apart, that a chunk of `chunk` new frames sees."""
        return max(self.sinks, committed - (self.recent - chunk))

    def _slot(self, frame: int) -> int:
        """Sinks stay in front, the others take turns behind them."""
        if frame < self.sinks:
            return frame
        return self.sinks + (frame - self.sinks) % self.recent


@dataclass(frozen=True)
class RecallWindow(RecentWindow):
    """As `RecentWindow`, but `recall` of its frames are chosen among all older ones of the session
    by view overlap with the chunk's cameras, for each row of the batch.

    They take the positions right before the oldest recent frame, in the order of their numbers
    (temporal reframing, as in WorldPlay, arXiv 2512.14614), and the last slots of the ring. As long
    as the window holds the whole session, what a chunk sees is what it sees without recall.
    unit: see `view_overlap.choose_views`. memory: MiB for the frames of a session.
    The choice depends on the cameras of the past and of the chunk alone. After a rewind it is that
    of a session that never went further, unless the store was thinned in between: then frames that
    were dropped for later ones are missing.
    """

    recall: int = 1
    unit: float = 1.0
    memory: int = 512

    @property
    def recent(self) -> int:
        return self.size - self.sinks - self.recall

    def store(self) -> FrameStore:
        return FrameStore(self.memory, self.sinks, self.size + 1, self.unit)

    def select(
        self, frames: FrameStore, committed: int, viewmats: Tensor, intrinsics: Tensor
    ) -> Selection:
        plain = super().select(frames, committed, viewmats, intrinsics)
        oldest = self.oldest(committed, viewmats.shape[1])
        first = frames.find(self.sinks)
        last = frames.find(oldest)
        if first == last:
            return plain
        rows = [
            choose_views(*frames.cameras(row, first, last), *asking, self.recall, self.unit)
            for row, asking in enumerate(zip(viewmats.cpu(), intrinsics.cpu(), strict=True))
        ]
        chosen = [tuple(frames[first + i].index for i in places) for places in zip(*rows)]
        count = len(chosen)
        sinks = [s._replace(position=s.position - count) for s in plain.remembered[: self.sinks]]
        recalled = [
            Slot(numbers, self.size - self.recall + i, oldest - count + i)
            for i, numbers in enumerate(chosen)
        ]
        remembered = (*sinks, *recalled, *plain.remembered[self.sinks :])
        return Selection(remembered, plain.own, committed)

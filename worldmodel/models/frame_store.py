"""What a rollout remembers of a whole session in ordinary memory: a bounded store of frames.

When it is full, every new frame costs an old one: of the two stored frames with the most similar
cameras the newer goes, since the older is nearer to the truth that a session began with. What
remains covers every place and direction that was seen. The choice depends on the cameras alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from worldmodel.errors import UserError

_MIB = 2**20
_STALE = -1  # the most similar frame is not known; `_gap` is then a lower bound


@dataclass(frozen=True)
class CachedFrame:
    """One committed latent frame: un-rotated keys and raw values `[layers, B, N, width]`, w2c
    `[B, 4, 4]` and intrinsics `[B, 4]` in float64 (on `device.float64_device`).
    """

    index: int
    keys: Tensor
    values: Tensor
    viewmats: Tensor
    intrinsics: Tensor

    def to(self, device: torch.device, float64: torch.device) -> "CachedFrame":
        """The frame with keys and values on `device`, cameras on `float64`; itself where it is
        there.
        """
        if self.keys.device == device and self.viewmats.device == float64:
            return self
        features = self.keys.to(device), self.values.to(device)
        return CachedFrame(
            self.index, *features, self.viewmats.to(float64), self.intrinsics.to(float64)
        )

    def alone(self) -> "CachedFrame":
        """The frame in memory of its own: a part of a chunk would keep the whole chunk alive."""
        parts = (self.keys, self.values)
        if all(part.untyped_storage().nbytes() == part.nbytes for part in parts):
            return self
        keys, values = (part.clone() for part in parts)
        return replace(self, keys=keys, values=values)


class FrameStore(Sequence[CachedFrame]):
    """Frames on the CPU, oldest first, for each row of the batch at most `memory` MiB of keys and
    values.

    sinks: first frames of all, which are never dropped. least: frames that must fit; UserError at
    the first frame where they do not. unit: length at which a step to the side changes a view as
    much as a turn by one radian.
    A frame costs work in proportion to the number of stored frames, however long the session: one
    comparison of its camera with all others, and about one more for every dropped frame.
    """

    def __init__(self, memory: int, sinks: int, least: int, unit: float):
        self.memory = memory
        self.sinks = sinks
        self.least = least
        self.unit = unit
        self.frames: list[CachedFrame] = []
        self._capacity = 0  # frames; known with the first one
        self._numbers = np.zeros(0, np.int64)
        self._w2c = np.zeros((0, 0, 3, 4))
        self._focal = np.zeros((0, 0, 2))
        self._signatures = np.zeros((0, 0))  # of cameras, numbers by frames: similar = near
        self._gap = np.zeros(0)  # squared distance to the most similar other frame
        self._twin = np.zeros(0, np.int64)  # its number

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, place):
        return self.frames[place]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(frame.keys.nbytes + frame.values.nbytes for frame in self.frames)

    def find(self, number: int) -> int:
        """Place of the first frame whose number is `number` or more."""
        return int(np.searchsorted(self._numbers[: len(self)], number))

    def cameras(self, row: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """w2c `[n, 3, 4]` and fx/W, fy/H `[n, 2]` of the frames at places first .. last - 1."""
        return (
            torch.from_numpy(self._w2c[row, first:last]),
            torch.from_numpy(self._focal[row, first:last]),
        )

    def add(self, frame: CachedFrame) -> None:
        """Remembers a frame, whose number is higher than all others; drops one where it is full."""
        cpu = torch.device("cpu")
        frame = frame.to(cpu, cpu).alone()
        if not self._capacity:
            self._begin(frame)
        if len(self) == self._capacity:
            self._thin()
        count = len(self)
        if count == len(self._numbers):
            self._grow()
        w2c = frame.viewmats.numpy()
        signature = self._signature(w2c)
        gaps = self._gaps(signature)
        nearer = gaps < self._gap[:count]
        self._gap[:count][nearer] = gaps[nearer]
        self._twin[:count][nearer] = frame.index
        self._numbers[count] = frame.index
        self._w2c[:, count] = w2c[:, :3]
        self._focal[:, count] = frame.intrinsics.numpy()[:, :2]
        self._signatures[:, count] = signature
        self._gap[count] = gaps.min(initial=np.inf)
        self._twin[count] = self._numbers[gaps.argmin()] if count else _STALE
        self.frames.append(frame)

    def truncate(self, committed: int) -> None:
        """Forgets frames from number `committed` on. Those that had been dropped do not return."""
        count = self.find(committed)
        del self.frames[count:]
        twin = self._twin[:count]
        twin[twin >= committed] = _STALE

    def refill(self, frames: Iterable[CachedFrame]) -> None:
        """Holds these frames instead."""
        self.truncate(0)
        for frame in frames:
            self.add(frame)

    def copy(self) -> "FrameStore":
        """A store of its own with the same frames, which are shared."""
        twin = FrameStore(self.memory, self.sinks, self.least, self.unit)
        twin.frames = list(self.frames)
        twin._capacity = self._capacity
        for name in _ARRAYS:
            setattr(twin, name, getattr(self, name).copy())
        return twin

    # -------------------- inside

    def _begin(self, frame: CachedFrame) -> None:
        rows = len(frame.viewmats)
        size = (frame.keys.nbytes + frame.values.nbytes) / rows
        self._capacity = int(self.memory * _MIB / size)
        if self._capacity < self.least:
            raise UserError(
                f"{self.memory} MiB of memory for recall hold {self._capacity} latents of this "
                f"world, at least {self.least} are needed: set --recall-memory (in world.yaml: "
                f"rollout.recall_memory) to {-(-int(self.least * size) // _MIB)} or more"
            )
        self._w2c = np.zeros((rows, 0, 3, 4))
        self._focal = np.zeros((rows, 0, 2))
        self._signatures = np.zeros((9 * rows, 0))

    def _grow(self) -> None:
        """Room for twice as many frames, or for all that there may be."""
        size = min(self._capacity, max(64, 2 * len(self._numbers)))
        for name, axis in _ARRAYS.items():
            old = getattr(self, name)
            shape = list(old.shape)
            shape[axis] = size - shape[axis]
            setattr(self, name, np.concatenate([old, np.zeros(shape, old.dtype)], axis))

    def _signature(self, w2c: np.ndarray) -> np.ndarray:
        """Place and two axes of the cameras `[B, 4, 4]`, `[9 B]`."""
        rotation = w2c[:, :3, :3]
        place = -np.einsum("bij,bi->bj", rotation, w2c[:, :3, 3]) / self.unit
        return np.concatenate([place, rotation[:, 0], rotation[:, 2]], axis=1).ravel()

    def _gaps(self, signature: np.ndarray) -> np.ndarray:
        """Squared distances of a signature to all stored ones `[n]`, summed in a fixed order."""
        gaps = np.zeros(len(self))
        for stored, own in zip(self._signatures, signature, strict=True):
            gaps += (stored[: len(self)] - own) ** 2
        return gaps

    def _thin(self) -> None:
        """Drops the newer one of the two frames with the most similar cameras, never a sink."""
        count = len(self)
        first = self.find(self.sinks)
        while True:
            place = first + int(self._gap[first:count].argmin())
            if self._twin[place] != _STALE:
                break
            gaps = self._gaps(self._signatures[:, place])
            gaps[place] = np.inf
            self._gap[place] = gaps.min()
            self._twin[place] = self._numbers[gaps.argmin()]
        number = max(self._numbers[place], self._twin[place])
        place = self.find(number)
        for name, axis in _ARRAYS.items():
            array = np.moveaxis(getattr(self, name), axis, 0)
            array[place : count - 1] = array[place + 1 : count]
        del self.frames[place]
        twin = self._twin[: count - 1]
        twin[twin == number] = _STALE


# arrays with an entry a frame, and its axis
_ARRAYS = {"_numbers": 0, "_w2c": 1, "_focal": 1, "_signatures": 1, "_gap": 0, "_twin": 0}

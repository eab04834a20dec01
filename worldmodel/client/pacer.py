"""The queue of frames between the generator thread and the window: an even rate, little waiting."""

import threading
from collections import deque
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Frame:
    """One picture for the window."""

    picture: np.ndarray  # uint8 [H, W, 3]
    latent: int  # index of the latent frame it belongs to
    edges: tuple[float, ...] = ()  # seconds; key edges that this frame is the first to show


class Pacer:
    """A short queue with a clock: each frame is due one period after the one before it.

    The generator calls `put` and `wanted_at`, the window `take` and `shown`. When the generator is
    late, the clock starts again at the late frame; when the window is late, the frames it missed
    are dropped. All times are seconds of one clock that both threads read. fps: frames a second
    until the first `put`.
    """

    def __init__(self, fps: float):
        self._lock = threading.Lock()
        self._frames: deque[Frame] = deque()
        # when the next frame is to be shown; None = as soon as there is one
        self._due: float | None = None
        self._period = 1.0 / fps
        self._latencies: deque[float] = deque(maxlen=200)
        self._seen: deque[float] = deque(maxlen=64)
        self._held = False
        self.late = 0  # chunks that arrived more than one period after they were wanted
        self.dropped = 0  # frames that were never shown

    # -------------------- generator

    def put(self, frames: list[Frame], now: float, period: float) -> None:
        """Append a chunk; from now on frames are `period` seconds apart."""
        with self._lock:
            if not self._frames:
                if self._due is not None and now > self._due + self._period:
                    self.late += 1
                self._due = now if self._due is None else max(self._due, now)
            self._period = period
            self._frames.extend(frames)

    def wanted_at(self, now: float) -> float:
        """Return when the next chunk's first frame is due: when the queue has run dry."""
        with self._lock:
            if self._due is None:
                return now
            return max(self._due + self._period * len(self._frames), now)

    def restart(self) -> None:
        """Drop what is queued and start the clock again at the next chunk."""
        with self._lock:
            self._frames.clear()
            self._due = None
            self._held = False

    def hold(self) -> None:
        """Freeze the picture. What is queued is shown after `release`, but no longer counts as
        latency.
        """
        with self._lock:
            self._held = True
            self._frames = deque(replace(frame, edges=()) for frame in self._frames)

    def release(self, now: float) -> None:
        """Resume after `hold` or any other break, whose time does not count as late."""
        with self._lock:
            self._held = False
            if self._due is not None and self._due < now:
                self._due = now if self._frames else None

    # -------------------- window

    def take(self, now: float) -> Frame | None:
        """Return the frame to show now, or None while the present one stays. Frames whose time has
        passed are dropped.
        """
        with self._lock:
            if self._held or not self._frames or now < self._due:
                return None
            frame = self._frames.popleft()
            self._due += self._period
            while self._frames and now >= self._due:
                following = self._frames.popleft()
                frame = replace(following, edges=frame.edges + following.edges)
                self.dropped += 1
                self._due += self._period
            return frame

    def next_due(self) -> float | None:
        """Return when `take` will next have a frame; None while there is none."""
        with self._lock:
            return self._due if self._frames and not self._held else None

    def shown(self, frame: Frame, now: float) -> None:
        """Note that `frame` is on the screen: its key edges become latency samples."""
        with self._lock:
            self._latencies.extend(now - edge for edge in frame.edges)
            self._seen.append(now)

    # -------------------- figures

    def fps(self, now: float) -> float:
        """Return frames a second over the last two seconds."""
        with self._lock:
            recent = [moment for moment in self._seen if now - moment <= 2.0]
        return (len(recent) - 1) / (recent[-1] - recent[0]) if len(recent) > 2 else 0.0

    def latency(self) -> tuple[float, float] | None:
        """Return key to pixel (p50, p95), seconds over the last 200 key edges; None before any."""
        with self._lock:
            samples = list(self._latencies)
        if not samples:
            return None
        p50, p95 = np.percentile(samples, (50, 95))
        return float(p50), float(p95)

    def latency_count(self) -> int:
        """Return the number of key edges behind `latency`."""
        with self._lock:
            return len(self._latencies)

"""The rewind key: a tap goes back once, holding it repeats. Knows neither pygame nor torch."""

import threading

import numpy as np

STEP = 8  # latents that a tap takes back, in whole chunks
FIRST_REPEAT = 0.4  # seconds that the key is held before it repeats
REPEAT = 0.25  # seconds between two repeats


def step_of(chunk: int) -> int:
    """Return the latents of one step back: the whole number of chunks nearest to STEP."""
    return chunk * max(1, round(STEP / chunk))


class RewindKey:
    """Count the steps back that the player asks for.

    The window calls `press` and `release`, the generator `take`. A tap that is over before the
    generator looks still counts; repeats are never queued, so none is left over after `release`.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._taps = 0
        self._down = False
        self._next = 0.0  # seconds; when a held key repeats

    @property
    def active(self) -> bool:
        """Whether the key is down, or was tapped since the last `take`."""
        with self._lock:
            return self._down or self._taps > 0

    def press(self) -> None:
        """Note that the key went down."""
        with self._lock:
            self._taps += 1
            self._down = True

    def release(self) -> None:
        """Note that the key went up."""
        with self._lock:
            self._down = False

    def cancel(self) -> None:
        """Forget what was asked for."""
        with self._lock:
            self._taps = 0
            self._down = False

    def take(self, now: float) -> bool:
        """Return whether to go one step back at `now` (seconds)."""
        with self._lock:
            if self._taps:
                self._taps -= 1
                self._next = now + FIRST_REPEAT
                return True
            if self._down and now >= self._next:
                self._next = now + REPEAT
                return True
            return False

    def wait(self, now: float) -> float:
        """Return the seconds until a held key repeats."""
        with self._lock:
            return max(self._next - now, 0.0)


class Past:
    """The last picture of each chunk that can be returned to, by the latents up to its end."""

    def __init__(self):
        self._pictures: dict[int, np.ndarray] = {}

    def add(self, latents: int, picture: np.ndarray, oldest: int) -> None:
        """Keep `picture`, uint8 [H, W, 3], at `latents`; forget what is older than `oldest`."""
        self._pictures[latents] = picture.copy()
        self._pictures = {
            index: kept for index, kept in self._pictures.items() if oldest <= index <= latents
        }

    def at(self, latents: int) -> np.ndarray:
        """Return the picture that was shown last when there were `latents` latents."""
        return self._pictures[latents]

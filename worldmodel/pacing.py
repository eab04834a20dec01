"""When the client starts a chunk: the rule that it plays by and that the benchmark simulates.

A chunk starts as late as its first frame can still be on time, because it reads the keys when it
starts. This module needs numpy alone.
"""

from collections.abc import Sequence

import numpy as np

MARGIN = 0.006  # seconds between a chunk being ready and being due: the wake-up of a thread
RECENT = 12  # chunks whose durations decide how early the next one starts
PRESSES = 32  # simulated key presses a chunk, evenly spread


def expected_duration(recent: Sequence[float], default: float) -> float:
    """Return how long the next chunk takes until its first frame: the second longest of `recent`.

    recent: durations of at most `RECENT` chunks. default: the duration where there is none. Both
    in one unit, which is the result's too.
    """
    return sorted(recent)[-2:][0] if recent else default


def key_to_pixel(durations: np.ndarray, busy: np.ndarray, period: float) -> np.ndarray:
    """Simulate the time from a key press to the first frame that shows it, in ms.

    A chunk starts its expected duration and `MARGIN` before its first frame is due, at most one
    period early, and reads the keys at that moment. A late chunk moves the clock.

    durations: [n] ms from the start of a chunk until its first frames are ready, n >= 2. busy: [n]
    ms from the start of a chunk until the next one can start (the clean pass comes after the
    frames). period: ms for which the frames of one chunk are on the screen. Returns the delays of
    `PRESSES` presses, evenly spread, for each chunk after the first.
    """
    free = 0.0  # when the chunk before was completely done
    due = 0.0  # when the chunk before was shown
    before = 0.0  # when the chunk before read the keys
    delays = []
    for index, duration in enumerate(durations):
        expected = expected_duration(durations[max(0, index - RECENT) : index].tolist(), period)
        lead = min(expected + MARGIN * 1e3, period)
        sampled = max(free, due + period - lead)
        free = sampled + busy[index]
        due = max(sampled + duration, due + period)
        presses = before + (np.arange(PRESSES) + 0.5) / PRESSES * (sampled - before)
        delays.append(due - presses)
        before = sampled
    return np.concatenate(delays[1:])

"""The machine that times depend on: what it is, how fast it multiplies, and clocks for what it
does.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from worldmodel.device import cores, synchronize

_TURNS = 12  # of the matmul measurement
_UNCOUNTED = 3


def describe_machine(device: torch.device) -> dict:
    """Hardware and versions that times depend on."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2)
        if hasattr(os, "getloadavg")
        else None,  # above 1 at the start: not idle
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe_commit() -> str:
    """The checkout that this package was imported from, `-dirty` when changed; "unknown" outside
    git.
    """
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def spread(values: np.ndarray, high: str = "p90", digits: int = 3) -> dict[str, float]:
    """Median, 10th and 90th (or 95th) percentile."""
    low, middle, top = np.percentile(values, (10, 50, int(high[1:])))
    return {
        "median": round(float(middle), digits),
        "p10": round(float(low), digits),
        high: round(float(top), digits),
    }


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 0) -> dict:
    """What the device multiplies at its best: the median rate of large square products, in 10^12
    operations a second.

    A multiplication with its addition counts as two. size: rows and columns, 0 = 8192 on CUDA and
    1024 elsewhere.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    clock = PartClock(device)
    products = 8 if device.type == "cuda" else 1
    for _ in range(_TURNS + _UNCOUNTED):
        clock.timed("turn", lambda: [torch.mm(a, b, out=out) for _ in range(products)])()
    synchronize(device)
    milliseconds = np.array([span.milliseconds for span in clock.take()[_UNCOUNTED:]])
    rates = spread(2 * size**3 * products / milliseconds / 1e9, digits=6)
    return {"tflop_per_second": rates, "size": size, "dtype": str(dtype).removeprefix("torch.")}


class PeakMemory:
    """The most memory that was in use since `reset`, in bytes.

    On CUDA what tensors took; elsewhere what the process ever held, which cannot be reset; 0 where
    the system does not tell.
    """

    def __init__(self, device: torch.device):
        self._device = device

    def reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def now(self) -> int:
        """In use at this moment; 0 where only the peak is known."""
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        try:
            import resource
        except ImportError:  # Windows
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )


class Span(NamedTuple):
    """A part of a device's work."""

    part: str
    begin: "float | torch.cuda.Event"
    end: "float | torch.cuda.Event"

    @property
    def milliseconds(self) -> float:
        """On CUDA the device must have done it."""
        return (
            (self.end - self.begin) * 1e3
            if isinstance(self.begin, float)
            else self.begin.elapsed_time(self.end)
        )


class PartClock:
    """How long the parts of a device's work take: on CUDA between events in the stream at hand,
    elsewhere by the clock.

    Events tell when the device works, not when it is asked to, and nobody waits for them: what is
    measured runs as ever.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._spans: list[Span] = []

    def timed(self, part: str, work: Callable) -> Callable:
        """`work`, each call of which is a span of `part`."""

        def run(*inputs, **options):
            begin = self._mark()
            result = work(*inputs, **options)
            self._spans.append(Span(part, begin, self._mark()))
            return result

        return run

    def timed_pieces(self, part: str, work: Callable[..., Iterator]) -> Callable[..., Iterator]:
        """As `timed`, where the work is done piece by piece and ends with the last one; so it
        includes what is done with the pieces.
        """

        def run(*inputs, **options):
            begin = self._mark()
            yield from work(*inputs, **options)
            self._spans.append(Span(part, begin, self._mark()))

        return run

    def take(self) -> list[Span]:
        """All spans since the last call, in the order of their ends."""
        spans = self._spans
        self._spans = []
        return spans

    def _mark(self) -> "float | torch.cuda.Event":
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

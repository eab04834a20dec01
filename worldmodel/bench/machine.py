"""The machine that times depend on: its hardware, its matmul rate, and clocks for its work."""

import os
import platform
import shlex
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
_WARM_UP = 3  # further turns before them, not counted


def describe_machine(device: torch.device) -> dict:
    """Hardware and versions that times depend on, and the load at this moment."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def command_line(package: str) -> str:
    """The command that this process runs, such as `python -m worldmodel benchmark --threads 2`.

    package: the one whose `__main__` runs the benchmark.
    """
    words = sys.argv[1:] if sys.argv[1:2] == ["benchmark"] else ["benchmark", *sys.argv[1:]]
    return f"python -m {package} {shlex.join(words)}"


def load() -> float | None:
    """Average number of running processes in the last minute; None where the system has no such
    figure.
    """
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def describe_commit(folder: Path = Path(__file__).parent) -> str:
    """The commit checked out at `folder`, with `-dirty` when it is changed; "unknown" outside git.

    folder: in the checkout; by default this package.
    """
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
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
    """Median, 10th percentile, and `high`: a higher percentile such as p90 or p95."""
    low, middle, top = np.percentile(values, (10, 50, int(high[1:])))
    return {
        "median": round(float(middle), digits),
        "p10": round(float(low), digits),
        high: round(float(top), digits),
    }


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 0) -> dict:
    """The median rate of large square matrix products, in 10^12 operations a second.

    A multiplication with its addition counts as two. size: rows and columns, 0 = 8192 on CUDA and
    1024 elsewhere.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    clock = PartClock(device)
    products = 8 if device.type == "cuda" else 1
    for _ in range(_TURNS + _WARM_UP):
        clock.timed("turn", lambda: [torch.mm(a, b, out=out) for _ in range(products)])()
    synchronize(device)
    milliseconds = np.array([span.milliseconds for span in clock.take()[_WARM_UP:]])
    rates = spread(2 * size**3 * products / milliseconds / 1e9, digits=6)
    return {"tflop_per_second": rates, "size": size, "dtype": str(dtype).removeprefix("torch.")}


class PeakMemory:
    """The most memory in use since `reset`, in bytes.

    On CUDA that of tensors; elsewhere the process's since its start, which cannot be reset; 0 where
    the system has no such figure.
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
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Span(NamedTuple):
    """A part of a device's work."""

    part: str
    begin: "float | torch.cuda.Event"
    end: "float | torch.cuda.Event"

    @property
    def milliseconds(self) -> float:
        """On CUDA the device must have finished the part."""
        if isinstance(self.begin, float):
            return (self.end - self.begin) * 1e3
        return self.begin.elapsed_time(self.end)


class PartClock:
    """Times parts of a device's work: on CUDA between events in the current stream, elsewhere by
    the clock.

    Events mark when the device works, not when it is asked to, and nothing waits for them: the
    timed work keeps its order and overlap.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._spans: list[Span] = []

    def timed(self, part: str, work: Callable) -> Callable:
        """Wrap `work` so that each call is a span of `part`."""

        def run(*inputs, **options):
            begin = self._mark()
            result = work(*inputs, **options)
            self._spans.append(Span(part, begin, self._mark()))
            return result

        return run

    def timed_pieces(self, part: str, work: Callable[..., Iterator]) -> Callable[..., Iterator]:
        """As `timed` for a generator: its span ends with the last piece, and includes what the
        caller does with the pieces.
        """

        def run(*inputs, **options):
            begin = self._mark()
            yield from work(*inputs, **options)
            self._spans.append(Span(part, begin, self._mark()))

        return run

    def take(self) -> list[Span]:
        """Return all spans since the last call, in the order of their ends."""
        spans = self._spans
        self._spans = []
        return spans

    def _mark(self) -> "float | torch.cuda.Event":
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

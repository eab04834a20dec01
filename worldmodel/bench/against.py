"""`worldmodel benchmark --against CHECKOUT`: is this checkout as fast as another one?

Processes of both checkouts alternate (A B, B A, ...), each of which opens the same world and walks
the same path. A pair's ratio is that of two processes that ran one after the other, so that slow
changes of the machine's load cancel out.
"""

import json
import logging
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit
from tqdm import tqdm

from worldmodel.bench.machine import describe_commit, describe_machine, load, spread
from worldmodel.errors import UserError

PAIRS = 8
MIN_PAIRS = 2  # fewer have no variance
TOLERANCE = 0.98  # ratio that the interval must reach to be "within 2 %"
# figures of a process -> the name of their ratio, the other's figure / this one's
RATIOS = {
    "ms_per_latent": "speed_ratio",
    "first_frames_ms": "first_frames_ratio",
    "cpu_ms_per_latent": "cpu_ratio",  # of all threads; less disturbed by other programs
}
SCRIPT = Path(__file__).with_name("checkout_walk.py")
THIS = Path(__file__).resolve().parents[2]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What every process of both checkouts is given."""

    world: str | None  # folder of a bundle; of a random world as in `random_config`
    latents: int  # measured per process, after the window is full
    threads: int
    seed: int
    steps: int | None = None  # denoising steps per chunk; None = the world's
    device: str = "cpu"
    dtype: str | None = None  # None = each checkout's own choice
    random_weights: str | None = None  # shape of a world of random weights
    size: tuple[int, int] | None = None  # height and width of the random world
    autoencoder: str = "tiny"  # of the random world


def check_checkout(folder: Path) -> Path:
    """The absolute path of a checkout. Raises UserError for a folder that is none."""
    if not folder.is_dir():
        raise UserError(
            f"expected --against as the folder of another checkout, but there is no folder {folder}"
        )
    if not (folder / "worldmodel" / "session.py").is_file():
        raise UserError(
            "expected --against as a checkout of this project, which contains "
            f"worldmodel/session.py, but {folder} does not"
        )
    return folder.resolve()


def compare(checkout: Path, settings: Settings, pairs: int = PAIRS) -> dict:
    """Alternate processes of this checkout and of `checkout`, and return the report.

    Raises UserError for a folder that is no checkout, for less than two pairs, and where a process
    fails.
    """
    other = check_checkout(checkout)
    if pairs < MIN_PAIRS:
        raise UserError(
            f"expected at least {MIN_PAIRS} --pairs, which an interval needs, got {pairs}"
        )
    machine = describe_machine(torch.device(settings.device)) | {"threads": settings.threads}
    walks: list[Pair] = []
    with tqdm(total=2 * pairs, desc="benchmark", unit="process", leave=False) as bar:
        for index in range(pairs):
            walks.append(_pair(other, settings, index % 2 == 0, bar))
            logger.info("pair %d of %d: %s", index + 1, pairs, walks[-1].report())
    these = [pair.this for pair in walks]
    others = [pair.other for pair in walks]
    return {
        "machine": machine,
        "settings": {**asdict(settings), "pairs": pairs},
        "this": _summary(THIS, these),
        "other": {"checkout": str(checkout), **_summary(other, others)},
        **_ratios(these, others),
        "same_frames": len({walk["frames"] for walk in these + others}) == 1,
        "pairs": [pair.report() for pair in walks],
    }


@dataclass(frozen=True)
class Pair:
    """The figures of two processes that ran one after the other."""

    this: dict
    other: dict
    this_first: bool
    load: float | None  # of the machine, before them

    def report(self) -> dict:
        """ms per latent of both, and the ratio of their speeds."""
        this = self.this["ms_per_latent"]
        other = self.other["ms_per_latent"]
        return {
            "first": "this" if self.this_first else "other",
            "load": self.load,
            "this_ms": round(this, 3),
            "other_ms": round(other, 3),
            "ratio": round(other / this, 4),
        }


def _pair(other: Path, settings: Settings, this_first: bool, bar: tqdm) -> Pair:
    before = load()
    order = (THIS, other) if this_first else (other, THIS)
    figures = []
    for checkout in order:
        figures.append(_walk(checkout, settings))
        bar.update()
    this, that = figures if this_first else reversed(figures)
    return Pair(this, that, this_first, before)


def _walk(checkout: Path, settings: Settings) -> dict:
    """The figures of one process of `checkout`. Raises UserError where it fails."""
    # -B: writes no bytecode into the other checkout; -P: not this module's folder but the checkout
    # comes first on the path
    command = [sys.executable, "-B", "-P", str(SCRIPT), json.dumps(asdict(settings))]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, errors="replace")
    if done.returncode:
        logger.debug("stderr of the process in %s:\n%s", checkout, done.stderr)
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].rstrip(".") if lines else "no message"
        raise UserError(
            f"the walk in {checkout} failed with exit status {done.returncode}: {reason}; --debug "
            "prints its whole message"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _summary(checkout: Path, walks: list[dict]) -> dict:
    return {
        "commit": describe_commit(checkout),
        "played": walks[0]["played"],
        **{figure: spread(np.array([walk[figure] for walk in walks])) for figure in RATIOS},
    }


def _ratios(this: list[dict], other: list[dict]) -> dict:
    """Speed of this checkout / speed of the other, and whether it is at most 2 % slower."""
    ratios = {
        name: paired_ratio([walk[figure] for walk in other], [walk[figure] for walk in this])
        for figure, name in RATIOS.items()
    }
    reached = ratios["speed_ratio"]["interval_95"][1] >= TOLERANCE
    return {"within_2_percent": reached, **ratios}


def paired_ratio(numerators: list[float], denominators: list[float]) -> dict:
    """The ratio of paired positive numbers with its 95 % interval.

    The geometric mean of the pairs' ratios; the interval is Student's t of their logarithms. Needs
    at least two pairs.
    """
    logarithms = np.log(np.array(numerators) / np.array(denominators))
    count = len(logarithms)
    mean = logarithms.mean()
    error = logarithms.std(ddof=1) / np.sqrt(count)
    half = stdtrit(count - 1, 0.975) * error
    low, middle, high = np.exp([mean - half, mean, mean + half])
    return {
        "ratio": round(float(middle), 4),
        "interval_95": [round(float(low), 4), round(float(high), 4)],
    }

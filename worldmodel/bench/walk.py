"""A walk that the benchmark times, and the figures it gives."""

import gc
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from worldmodel.bench.flops import clean_flops, pass_flops
from worldmodel.bench.machine import PartClock, PeakMemory, Span, spread
from worldmodel.bench.random_world import AUTOENCODERS
from worldmodel.bench.reference_loop import ReferenceLoop
from worldmodel.camera import FRAMES_PER_LATENT, MotionStep, parse_trajectory
from worldmodel.config import as_dict, build, parse_yaml
from worldmodel.device import float64_device, synchronize
from worldmodel.engine.options import EngineOptions
from worldmodel.errors import UserError, first_line
from worldmodel.pacing import key_to_pixel
from worldmodel.rollout import RolloutConfig, with_steps
from worldmodel.session import Session
from worldmodel.worlds.world import World

PARTS = ("network", "clean", "decode")
ENGINE_KEYS = ("compile", "weights", "memory")  # of a variant, in addition to rollout options
TRAJECTORY = "w*6, w+l*4, l*4, w*4, w+j*6, j*2"  # walks and turns; repeated from where it ends


@dataclass(frozen=True)
class Variant:
    """One of the ways to play that are compared."""

    written: tuple[str, ...]  # the `key=value` texts as the user wrote them
    rollout: tuple[str, ...]  # those of them that are rollout options
    engine: EngineOptions
    autoencoder: str | None  # of a random world; None = its default

    @property
    def opened(self) -> tuple[EngineOptions, str | None]:
        """What decides how the world is opened: variants that agree in it share one world."""
        return self.engine, self.autoencoder

    @classmethod
    def parse(cls, written: list[str], engine: EngineOptions, autoencoder: str | None) -> "Variant":
        """Read `key=value` texts; `engine` and `autoencoder` hold where they say nothing.

        Raises UserError for an unknown autoencoder or a value that EngineOptions refuses.
        """
        rollout = []
        opened = {}
        for text in written:
            key, _, value = text.partition("=")
            if key in (*ENGINE_KEYS, "autoencoder"):
                opened[key] = value
            else:
                rollout.append(text)
        autoencoder = opened.pop("autoencoder", autoencoder)
        if autoencoder not in (None, *AUTOENCODERS):
            raise UserError(
                f"autoencoder must be one of {', '.join(AUTOENCODERS)}, got {autoencoder!r}."
            )
        return cls(tuple(written), tuple(rollout), replace(engine, **opened), autoencoder)


def apply_settings(world: World, settings: tuple[str, ...]) -> World:
    """`world` with other rollout options, each `key=value` in YAML.

    `steps` may be a number of steps or a list. Raises UserError for an unknown key or a bad value.
    """
    rollout = as_dict(world.config.rollout)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"expected key=value such as window=8, got {setting!r}")
        try:
            value = parse_yaml(value)
        except UserError:
            raise UserError(f"expected a value in YAML such as window=8, got {setting!r}") from None
        if key == "steps" and isinstance(value, int):
            value = with_steps(world.config.rollout, value).steps
        rollout[key] = value
    config = replace(world.config, rollout=build(RolloutConfig, rollout, "--set"))
    return replace(world, config=config)


class ChunkTimes(NamedTuple):
    """Times of one chunk."""

    total: float  # ms until the next chunk can begin
    ready: float  # ms until its first frames are there
    parts: list[Span]


class Walk:
    """A session that walks and turns, and the times of its chunks.

    reference: drive the network by `ReferenceLoop` instead of `Rollout`.
    """

    def __init__(self, world: World, variant: Variant, seed: int, reference: bool = False):
        self.variant = variant
        self.settings = [*(["reference loop"] if reference else []), *variant.written]
        self.world = apply_settings(world, variant.rollout)
        asked = self.world.config.rollout
        self.rollout = self.world.engine.tier.rollout(asked, asked.history)  # within its memory
        envelope = self.world.config.envelope
        step = MotionStep(envelope.forward, envelope.yaw)
        self._path = parse_trajectory(TRAJECTORY, step, envelope.style)[1:]
        self._seed = seed
        self._reference = reference
        self._clock = PartClock(world.device)
        self._session: Session | None = None
        self._done = 0
        self._base = np.eye(4)
        self.peak = 0  # bytes
        self.notices: list[str] = []
        self.error = ""  # why there are no times
        self.chunks: list[ChunkTimes] = []

    @property
    def engine(self) -> str:
        """One line about memory, weights, attention and compiler."""
        return self.world.engine.describe(self.rollout, self.rollout.history)

    def _begin(self) -> None:
        """Make the session, and time the methods it calls."""
        session = Session(self.world, seed=self._seed, history=self.rollout.history)
        self._session = session
        if self._reference:
            session.rollout = self._reference_loop(session.prompt)
        rollout = session.rollout
        decoder = session._decoder
        clock = self._clock
        rollout.step = clock.timed("network", rollout.step)
        # the reference loop runs its clean pass within its step
        clean = "commit" if self._reference else "commit_pending"
        setattr(rollout, clean, clock.timed("clean", getattr(rollout, clean)))
        decoder.frames = clock.timed_pieces("decode", decoder.frames)

    def _reference_loop(self, prompt: str) -> ReferenceLoop:
        """The loop after its first chunk, where a new session is too."""
        rows, columns = self.world.latent_size
        loop = ReferenceLoop(
            self.world.transformer,
            self.world.prompts[prompt][None],
            self.rollout,
            height=rows,
            width=columns,
            device=self.world.device,
        )
        options = {"dtype": torch.float64, "device": float64_device(self.world.device)}
        poses = torch.eye(4, **options).expand(1, self.rollout.chunk, 4, 4)
        loop.step(poses, torch.tensor([self.world.config.intrinsics], **options))
        return loop

    def chunk(self) -> None:
        """Generate one more chunk. On CUDA only the next chunk waits for its clean pass, as in
        play.
        """
        poses = np.stack([self._next_pose() for _ in range(self.rollout.chunk)])
        moments = [time.perf_counter()]
        shown = self._session.step(poses, lambda _: moments.append(time.perf_counter()))
        self._session.commit_pending()
        moments.append(time.perf_counter())
        if shown.notice:
            self.notices.append(shown.notice)
        began, ready, ended = moments
        self.chunks.append(
            ChunkTimes((ended - began) * 1e3, (ready - began) * 1e3, self._clock.take())
        )

    def warm_up(self, memory: PeakMemory, weights: int) -> None:
        """Fill the window, wait for the compiler, and measure the memory of two more chunks.

        weights: bytes of its networks.
        """
        others = memory.now() - weights
        self._begin()
        for _ in range(self.rollout.window // self.rollout.chunk + 2):
            self.chunk()
        if self.world.engine.compiled:
            self.world.engine.compiled.wait()
        memory.reset()
        for _ in range(2):
            self.chunk()
        synchronize(self.world.device)
        self.peak = memory.peak() - others
        self.chunks.clear()

    def give_up(self, error: Exception) -> None:
        """End a walk that does not fit into the device's memory, and free what it holds."""
        self.error = first_line(error)
        self._session = None
        self.chunks.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _next_pose(self) -> np.ndarray:
        index = self._done % len(self._path)
        pose = self._base @ self._path[index]
        self._done += 1
        if index == len(self._path) - 1:
            self._base = pose
        return pose

    def report(self, rate: dict | None) -> dict:
        """Figures of all chunks since the warm-up. rate: of `matmul_rate`, to compare with."""
        report = {"settings": self.settings, "rollout": as_dict(self.rollout)}
        if self.error:
            return {**report, "error": self.error}
        chunk = self.rollout.chunk
        frames = chunk * FRAMES_PER_LATENT
        totals = np.array([times.total for times in self.chunks])
        ready = np.array([times.ready for times in self.chunks])
        median = float(np.median(totals))
        parts = self._parts()
        period = frames / self.world.config.fps * 1e3
        report |= {
            "engine": self.engine,
            "chunks": len(totals),
            "ms_per_latent": {
                part: spread(values / chunk) for part, values in {"total": totals, **parts}.items()
            },
            "frames_per_second": round(frames / (median / 1e3), 2),
            "real_time_factor": round(period / median, 3),
            "sampled_to_ready_ms": spread(ready),
            "key_to_pixel_ms": spread(key_to_pixel(ready, totals, period), "p95"),
            "peak_memory_mib": round(self.peak / 2**20),
        }
        if self.notices:
            report["notices"] = self.notices
        if rate:
            report["transformer"] = self._speed(parts, rate["tflop_per_second"]["median"])
        return report

    def _parts(self) -> dict[str, np.ndarray]:
        """ms per chunk of each of PARTS."""
        parts = {part: np.zeros(len(self.chunks)) for part in PARTS}
        for index, times in enumerate(self.chunks):
            for span in times.parts:
                parts[span.part][index] += span.milliseconds
        if self._reference:
            parts["network"] -= parts["clean"]
        return parts

    def _speed(self, parts: dict[str, np.ndarray], rate: float) -> dict:
        """The transformer's operations, and the share of `rate` (10^12 operations a second) that
        they reach.
        """
        config = self.world.transformer.config
        rollout = self.rollout
        rows, columns = (
            cells // patch
            for cells, patch in zip(self.world.latent_size, config.patch_size[1:], strict=True)
        )
        tokens = rollout.chunk * rows * columns
        seen = rollout.window * rows * columns
        text_length = self.world.prompts.shape[0]
        samples = 1 if rollout.guidance == 1 else 2  # guidance also runs the sample without prompt
        network = samples * len(rollout.steps) * pass_flops(config, tokens, seen, text_length)
        clean = samples * clean_flops(config, tokens, seen, text_length)
        flops = {"network": network, "clean": clean, "both": network + clean}
        times = {
            "network": parts["network"],
            "clean": parts["clean"],
            "both": parts["network"] + parts["clean"],
        }
        rates = {name: flops[name] / float(np.median(times[name])) / 1e9 for name in flops}
        return {
            "gflop_per_latent": {
                name: round(count / rollout.chunk / 1e9, 6) for name, count in flops.items()
            },
            "tflop_per_second": {name: round(value, 6) for name, value in rates.items()},
            "share_of_matmul_rate": {name: round(value / rate, 3) for name, value in rates.items()},
        }

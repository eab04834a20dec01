"""The generator thread: reads the input as late as it can, dreams one chunk, hands the frames to the pacer.

No pygame and no torch in here: it drives whatever `Scenes` opens, on a clock that is passed in.
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from worldmodel.client.pacer import Frame, Pacer
from worldmodel.client.scenes import Scene, Scenes
from worldmodel.controls import KEYS, Controls

MARGIN = 0.012  # seconds between a chunk being ready and being wanted: a thread's wake-up and a window's flip


@dataclass(frozen=True)
class LoopOptions:
    scene: Scene = Scene()
    script: np.ndarray | None = None  # [N, 4, 4] poses walked before the player's; a motion key takes over at once
    record: Path | None = None  # record from the first frame into this folder
    recordings: Path = Path("recordings")  # where later recordings go


@dataclass(frozen=True)
class Status:
    """What the window may know, replaced as a whole between chunks."""

    phase: str = "opening"  # opening, running, paused, failed
    stage: str = "Waking up"  # what is being waited for while opening
    progress: float = 0.0  # 0..1 while opening
    error: str = ""  # one sentence when failed
    fatal: BaseException | None = None
    scene: Scene = Scene()
    locked: frozenset[str] = frozenset()  # axes of controls.AXES, or "run"
    latent: int = 0  # latents since the start of the session
    window: tuple[int, int] = (0, 0)  # latents remembered, latents the memory holds
    pose: np.ndarray | None = None  # [4, 4] c2w of the newest latent
    timings: tuple[tuple[str, float], ...] = ()  # milliseconds of the newest chunk, by part
    milliseconds: float = 0.0  # per latent, median of the last chunks
    speed: float = 1.0  # of real time
    recording: Path | None = None


class Loop:
    """Owns the session. Windows call `press`, `release`, `look`, `command`, read `status`, `notices` and `pacer`.

    open_scenes: called once, in the generator's thread, with a function (stage text, progress 0..1).
    clock: seconds. sleep: waits at most that many seconds, less when `wake` is set.
    """

    def __init__(
        self,
        open_scenes: Callable[[Callable[[str, float], None]], Scenes],
        options: LoopOptions = LoopOptions(),
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] | None = None,
    ):
        self._open_scenes, self._options = open_scenes, options
        self.clock, self._wake = clock, threading.Event()
        self._sleep = sleep or self._wake.wait
        self._commands: deque[str] = deque()
        self._edges: deque[tuple[float, str]] = deque()
        self.notices: deque[str] = deque(maxlen=8)  # receipts for the player, taken by the window
        self.status = Status()
        self.pacer: Pacer | None = None  # there once the world's frame rate is known
        self._controls: Controls | None = None
        self._stopping = False
        self._durations: deque[float] = deque(maxlen=12)  # seconds a chunk
        self._thread: threading.Thread | None = None

    # --------------------------------------------------------------------------------------------- window

    def start(self) -> None:
        """Run in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="generator")
        self._thread.start()

    def stop(self) -> None:
        """End after the present chunk, close the recording, and wait for it."""
        self._stopping = True
        self._wake.set()
        if self._thread:
            self._thread.join()

    def command(self, name: str) -> None:
        """restart, next_mood, new_town, pause or record: done between two chunks, with a notice when it is done."""
        self._commands.append(name)
        self._wake.set()

    def press(self, key: str, now: float) -> None:
        """A motion key of Controls went down at `now`."""
        if self._controls:
            self._edges.append((now, key))
            self._controls.press(key, now)

    def release(self, key: str, now: float) -> None:
        """A motion key of Controls went up at `now`."""
        if self._controls:
            self._edges.append((now, key))
            self._controls.release(key, now)

    def look(self, dx: float, dy: float, now: float) -> None:
        """The captured mouse moved by dx, dy counts (right, down)."""
        if self._controls:
            self._controls.look(dx, dy, now)

    # ------------------------------------------------------------------------------------------ generator

    def run(self) -> None:
        """Everything, until `stop` or an error; an error ends up in `status` as one sentence."""
        try:
            self.open()
            while not self._stopping:
                self.turn()
        except Exception as error:
            sentence = str(error).strip().splitlines()
            self._tell(phase="failed", error=sentence[0] if sentence else type(error).__name__, fatal=error)
        finally:
            if self.status.recording:
                self._stop_recording()

    def open(self) -> None:
        """Load the world and show its first picture."""
        self._scenes = self._open_scenes(lambda stage, progress: self._tell(stage=stage, progress=progress))
        self._chunk_seconds = self._scenes.chunk * self._scenes.frames_per_latent / self._scenes.fps
        self.pacer = Pacer(self._scenes.fps)
        self._controls = Controls(self._scenes.envelope, self._scenes.fps, self._scenes.frames_per_latent)
        self._script = deque() if self._options.script is None else deque(self._options.script)
        self._tell(locked=frozenset(self._controls.locked), stage="Dreaming the first picture", progress=0.9)
        self._enter(self._options.scene)
        if self._options.record:
            self._start_recording(self._options.record)
        self._first_picture()
        self._tell(phase="running", progress=1.0)

    def turn(self) -> None:
        """One step of the loop: obey commands, then dream a chunk if it is time, else sleep a little."""
        while self._commands:
            self._obey(self._commands.popleft())
        self._wake.clear()
        if self.status.phase == "paused":
            self._sleep(0.1)
            return
        begin = self._begin_at()
        if begin > self.clock():
            self._sleep(min(begin - self.clock(), 0.1))
        else:
            self._dream()

    def _begin_at(self) -> float:
        """When to start the next chunk: as late as its frames are still in time, at most one chunk ahead."""
        usual = sorted(self._durations)[-2:][0] if self._durations else self._chunk_seconds
        return self.pacer.wanted_at(self.clock()) - min(usual + MARGIN, self._frame_period() * self._chunk_frames)

    @property
    def _chunk_frames(self) -> int:
        return self._scenes.chunk * self._scenes.frames_per_latent

    def _frame_period(self) -> float:
        """Seconds between frames: the world's, or slower when this machine is, so that motion stays even."""
        typical = statistics.median(self._durations) if self._durations else 0.0
        return max(self._chunk_seconds, typical) / self._chunk_frames

    def _dream(self) -> None:
        begun = self.clock()
        c2w, edges = self._poses(begun)
        chunk = self._session.step(c2w)
        done = self.clock()
        self._durations.append(done - begun)
        self._show(chunk, c2w, edges, done)
        typical = statistics.median(self._durations)
        self._tell(
            milliseconds=typical / self._scenes.chunk * 1000, speed=min(1.0, self._chunk_seconds / max(typical, 1e-9))
        )

    def _poses(self, now: float) -> tuple[np.ndarray, tuple[float, ...]]:
        """The next chunk's c2w [chunk, 4, 4] and the key edges (seconds) that it is the first to show."""
        count, since = self._scenes.chunk, self._sampled
        edges = []
        while self._edges and self._edges[0][0] <= now:
            edges.append(self._edges.popleft())
        if edges and self._script:
            self._script.clear()  # a key takes over; a recording or a path is only followed while nobody steers
            self._controls.reset(self._pose)
        if self._script:
            poses = [self._script.popleft() for _ in range(min(count, len(self._script)))]
            poses += poses[-1:] * (count - len(poses))
            self._controls.reset(poses[-1])
        else:
            poses = [self._controls.pose_until(since + (now - since) * (k + 1) / count) for k in range(count)]
        self._sampled, self._pose = now, poses[-1]
        visible = tuple(t for t, key in edges if KEYS[key][0] not in self.status.locked)
        return np.stack(poses), visible

    def _show(self, chunk, c2w: np.ndarray, edges: tuple[float, ...], now: float) -> None:
        frames = [Frame(picture, chunk.index) for picture in chunk.frames]
        frames[0] = replace(frames[0], edges=edges)
        self.pacer.put(frames, now, self._frame_period())
        if self.status.recording:
            self._write(chunk, c2w)
        self._tell(
            latent=self._session.latents,
            window=self._session.window,
            pose=c2w[-1],
            timings=tuple(chunk.timings.items()),
        )

    def _tell(self, **changes) -> None:
        self.status = replace(self.status, **changes)

    # ------------------------------------------------------------------------------------------- commands

    def _obey(self, command: str) -> None:
        if command == "pause":
            self._pause()
        elif command == "record":
            if self.status.recording:
                self._stop_recording()
            else:
                self._start_recording(self._scenes.recording_folder(self._options.recordings, self.status.scene))
        elif command == "restart":
            self._again(self.status.scene, "Back at the start")
        elif command == "next_mood":
            scene = self._scenes.next_mood(self.status.scene)
            self._again(scene, f"Mood: {scene.prompt}")
        elif command == "new_town":
            scene = self._scenes.new_town(self.status.scene)
            self._again(scene, f"A new town, seed {scene.seed}")
        else:
            raise ValueError(f"Unknown command {command!r} for the generator.")

    def _pause(self) -> None:
        if self.status.phase == "paused":
            self._controls.reset(self._pose)  # the time and the mouse motion of the pause do not count
            self._edges.clear()
            self._sampled = self.clock()
            self.pacer.release(self._sampled)
            self._tell(phase="running")
        else:
            self.pacer.hold()
            self._tell(phase="paused")

"""The generator thread: reads the input as late as it can, dreams one chunk, hands the frames to
the pacer.

No pygame and no torch in here: it drives whatever `Scenes` opens, on a clock that is passed in.
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from worldmodel.client.pacer import Frame, Pacer
from worldmodel.client.scenes import Scene, Scenes
from worldmodel.controls import Controls, Envelope
from worldmodel.errors import UserError
from worldmodel.files import recordings_folder
from worldmodel.pacing import MARGIN, RECENT, expected_duration

UNSTEERED = "This world has no camera weights: it dreams by itself, keys do nothing"


class Stopped(Exception):
    """The player left while the world was being opened."""


@dataclass(frozen=True)
class LoopOptions:
    """What happens from the first frame on."""

    scene: Scene = field(default_factory=Scene)
    path: Callable[[Envelope], np.ndarray] | None = (
        None  # c2w [N, 4, 4] to walk until a motion key takes over
    )
    replay: Path | None = None  # a recording to dream again instead
    record: Path | None = None  # folder of a recording that starts with the first frame
    recordings: Path = field(default_factory=recordings_folder)  # where F9 makes its folders


@dataclass(frozen=True)
class Status:
    """What the window may know; replaced as a whole."""

    phase: str = "opening"  # opening, running, paused, failed
    stage: str = "Waking up"  # while opening: what is being waited for
    progress: float = 0.0  # while opening: 0..1, reached when this stage ends
    error: str = ""  # one sentence when failed
    cause: Exception | None = None
    scene: Scene = field(default_factory=Scene)
    locked: frozenset[str] = frozenset()  # motions this world does not know
    latent: int = 0  # latents since the start of the session
    memory: int = 0  # latents that are remembered
    window: int = 0  # latents that the memory holds
    pose: np.ndarray | None = None  # c2w [4, 4] of the newest latent
    timings: tuple[tuple[str, float], ...] = ()  # milliseconds of the newest chunk, by part
    milliseconds: float = 0.0  # per latent, median of the last chunks
    speed: float = 1.0  # of real time
    recording: Path | None = None


class Loop:
    """Owns the session. A window calls `press`, `release`, `look`, `command`, and reads `status`,
    `notices`, `pacer`.

    open_scenes: called once, in the generator's thread, with a function (stage, progress) that the
    start screen shows.
    clock: seconds, the same for all times that are passed in. sleep: waits that many seconds, or
    less when woken.
    """

    def __init__(
        self,
        open_scenes: Callable[[Callable[[str, float], None]], Scenes],
        options: LoopOptions = LoopOptions(),
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] | None = None,
    ):
        self.clock = clock
        self.status = Status()
        self.notices: deque[str] = deque(maxlen=8)  # receipts for the player; the window takes them
        self.pacer: Pacer | None = None  # there when the world's frame rate is known
        self._open_scenes = open_scenes
        self._options = options
        self._wake = threading.Event()
        self._sleep = sleep or self._wake.wait
        self._commands: deque[str] = deque()
        self._edges: deque[tuple[float, str]] = deque()  # (seconds, motion), for the latency figure
        self._controls: Controls | None = None
        self._durations: deque[float] = deque(
            maxlen=RECENT
        )  # seconds from the start of a chunk until its frames were there
        self._busy: deque[float] = deque(
            maxlen=RECENT
        )  # seconds a chunk, with what is done after its frames are out
        self._stopping = False
        self._thread = None
        self._session = self._recorder = self._film = None

    # -------------------- for the window

    def start(self) -> None:
        """Run in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="generator", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the present chunk, close the recording, and wait for both."""
        self._stopping = True
        self._wake.set()
        if self._thread:
            self._thread.join()

    def command(self, name: str) -> None:
        """restart, next_mood, change_mood, new_town, pause or record: done between two chunks, with
        a notice when it is done.
        """
        self._commands.append(name)
        self._wake.set()

    def press(self, motion: str, now: float) -> None:
        """The key of `motion` went down at `now`; nothing before there is a world."""
        if self._controls:
            self._edges.append((now, motion))
            self._controls.press(motion, now)

    def release(self, motion: str, now: float) -> None:
        """The key of `motion` went up at `now`."""
        if self._controls:
            self._edges.append((now, motion))
            self._controls.release(motion, now)

    def look(self, dx: float, dy: float, now: float) -> None:
        """The captured mouse moved by dx, dy counts (right, down)."""
        if self._controls:
            self._controls.look(dx, dy, now)

    # -------------------- the loop

    def run(self) -> None:
        """Everything, until `stop` or an error; an error ends up in `status` as one sentence."""
        try:
            self.open()
            while not self._stopping:
                self.turn()
        except Stopped:
            pass
        except Exception as error:
            lines = str(error).strip().splitlines()
            self._tell(
                phase="failed", error=lines[0] if lines else type(error).__name__, cause=error
            )
        finally:
            self._stop_recording()

    def open(self) -> None:
        """Load the world and show its first picture."""
        self._scenes = self._open_scenes(self._open_stage)
        self._chunk_frames = self._scenes.chunk * self._scenes.frames_per_latent
        self._chunk_seconds = self._chunk_frames / self._scenes.fps
        self._path = deque(self._options.path(self._scenes.envelope) if self._options.path else ())
        controls = Controls(self._scenes.envelope, self._scenes.fps, self._scenes.frames_per_latent)
        self._open_stage("Dreaming the first picture", 0.98)
        self._tell(locked=frozenset(controls.locked))
        self.pacer = Pacer(self._scenes.fps)
        self._controls = controls
        if self._options.replay:
            self._film, scene = self._scenes.replay(self._options.replay)
            self._stand(np.eye(4), self.clock())
            self._tell(scene=scene, window=self._scenes.window)
        else:
            self._enter(self._options.scene, record=self._options.record is not None)
        self._tell(phase="running", progress=1.0)
        if not self._scenes.camera:
            self.notices.append(UNSTEERED)

    def _open_stage(self, stage: str, progress: float) -> None:
        if self._stopping:
            raise Stopped
        self._tell(stage=stage, progress=progress)

    def turn(self) -> None:
        """Obey what was commanded, then dream a chunk if it is time for it, or wait a little."""
        self._wake.clear()
        while self._commands:
            self._obey(self._commands.popleft())
        if self.status.phase == "paused":
            self._sleep(0.1)
            return
        left = self._begin_at() - self.clock()
        if left > 0:
            self._sleep(min(left, 0.1))
        else:
            self._dream()

    def _begin_at(self) -> float:
        """When to start the next chunk: as late as its frames are still in time, and at most one
        chunk ahead.
        """
        expected = expected_duration(self._durations, self._chunk_seconds)
        ahead = min(expected + MARGIN, self._period() * self._chunk_frames)
        return self.pacer.wanted_at(self.clock()) - ahead

    def _period(self) -> float:
        """Seconds between frames: the world's, or slower when this machine is, so that motion stays
        even.
        """
        typical = statistics.median(self._busy) if self._busy else 0.0
        return max(self._chunk_seconds, typical) / self._chunk_frames

    def _dream(self) -> None:
        begun = self.clock()
        early = []

        def show_early(pictures: np.ndarray) -> None:
            early.append(len(pictures))
            self._durations.append(self.clock() - begun)
            self._put(pictures, self.status.latent, edges, self._period())

        if self._film is None:
            c2w, edges = self._poses(begun)
            chunk = self._session.step(c2w, show_early)
        else:
            chunk, c2w = next(self._film, (None, None))
            self._edges.clear()
        if chunk is None:
            self._film_ends()
            return
        if not early:
            self._durations.append(self.clock() - begun)
        self._show(chunk, c2w, sum(early), self._period())
        if self._session:
            self._session.settle()  # while the frames are on their way to the screen
        self._busy.append(self.clock() - begun)
        typical = statistics.median(self._busy)
        speed = min(1.0, self._chunk_seconds / max(typical, 1e-9))
        self._tell(milliseconds=typical / self._scenes.chunk * 1000, speed=speed)

    def _poses(self, now: float) -> tuple[np.ndarray, tuple[float, ...]]:
        """The next chunk's c2w [chunk, 4, 4] and the key edges (seconds) that it is the first to
        show.
        """
        count = self._scenes.chunk
        since = self._sampled
        edges = []
        while self._edges and self._edges[0][0] <= now:
            edges.append(self._edges.popleft())
        if edges and self._path:
            self._path.clear()  # the player takes over
            self._stand(self._pose, since)
        if self._path:
            poses = [self._path.popleft() for _ in range(min(count, len(self._path)))]
            poses += poses[-1:] * (count - len(poses))
            self._stand(poses[-1], now)
        else:
            poses = [
                self._controls.pose_until(since + (now - since) * (k + 1) / count)
                for k in range(count)
            ]
        self._sampled = now
        self._pose = poses[-1]
        return np.stack(poses), tuple(t for t, motion in edges if motion not in self.status.locked)

    def _stand(self, c2w: np.ndarray, now: float) -> None:
        """Put the camera at `c2w` [4, 4], at rest, and let motion count from `now` on. Keys stay
        held.
        """
        self._controls.reset(c2w)
        self._controls.pose_until(now)
        self._sampled = now
        self._pose = c2w

    def _show(self, chunk, c2w: np.ndarray, early: int, period: float) -> None:
        """Shows and records a chunk, of which the first `early` frames are on their way already."""
        latent = chunk.index + len(c2w)
        timings = tuple(chunk.timings.items())
        self._tell(
            latent=latent,
            memory=min(latent, self._scenes.window),
            window=self._scenes.window,
            pose=c2w[-1],
            timings=timings,
        )
        self._put(
            chunk.frames[early:], chunk.index, (), period
        )  # after its figures, which the window may show with it
        if self._recorder and not self._recorder.write(chunk, c2w, self._controls.held):
            self._stop_recording()
        if chunk.notice:
            self.notices.append(chunk.notice)

    def _put(
        self, pictures: np.ndarray, latent: int, edges: tuple[float, ...], period: float
    ) -> None:
        """Sends pictures [n, H, W, 3] of a latent to the window; `edges`: the key edges that the
        first is the first to show.
        """
        frames = [
            Frame(picture, latent, edges if place == 0 else ())
            for place, picture in enumerate(pictures)
        ]
        if frames:
            self.pacer.put(frames, self.clock(), period)

    def _tell(self, **changes) -> None:
        self.status = replace(self.status, **changes)

    # -------------------- commands

    def _obey(self, command: str) -> None:
        scene = self.status.scene
        if command == "pause":
            self._pause()
        elif command == "record":
            self._toggle_recording()
        elif command == "restart":
            self._again(scene, "Back at the start")
        elif command == "next_mood":
            scene = self._scenes.next_mood(scene)
            self._again(scene, f"Mood: {scene.prompt}")
        elif command == "change_mood":
            self._change_mood()
        elif command == "new_town":
            scene = self._scenes.new_town(scene)
            self._again(scene, f"A new town: seed {scene.seed}")
        else:
            raise UserError(f"The generator knows no command {command!r}.")

    def _change_mood(self) -> None:
        """Another prompt for what is dreamed from here on; the place, and what is remembered of it,
        stay.
        """
        if self._session is None:
            self.notices.append("A replay keeps its moods")
            return
        prompt = self._scenes.next_mood(self.status.scene).prompt
        self._session.set_prompt(prompt)
        self._tell(scene=replace(self.status.scene, prompt=prompt))
        self.notices.append(f"The mood turns to {prompt}")

    def _pause(self) -> None:
        if self._film is None and self._session is None:
            self._again(self.status.scene, "Yours from here")  # a replay has ended
        elif self.status.phase == "paused":
            self._edges.clear()
            self._stand(
                self._pose, self.clock()
            )  # the time and the mouse motion of the pause do not count
            self.pacer.release(self._sampled)
            self._tell(phase="running")
        else:
            self.pacer.hold()
            self._tell(phase="paused")

    def _again(self, scene: Scene, receipt: str) -> None:
        """Another session: nothing of the old one stays queued; a running recording goes on in a
        new folder.
        """
        recording = self._recorder is not None
        self._stop_recording()
        self._film = None
        self._path.clear()
        self.pacer.restart()
        self._enter(scene, recording)
        self._tell(phase="running")
        self.notices.append(receipt)

    def _enter(self, scene: Scene, record: bool) -> None:
        """A new session and its first picture: the start picture, or a first dream seen from the
        origin.
        """
        self._session = None  # the old memory is given back before the new one is made
        self._session, scene = self._scenes.open(scene)
        self._tell(scene=scene, latent=0, window=self._scenes.window)
        if record:
            self._start_recording()
        poses = np.eye(4)[None]
        chunk = self._session.start()
        if chunk is None:
            poses = np.repeat(poses, self._scenes.chunk, 0)
            chunk = self._session.step(poses)
        self._edges.clear()
        self._stand(np.eye(4), self.clock())
        # one picture stands for as long as a chunk, so that the next one is in time
        self._show(chunk, poses, 0, self._chunk_seconds / len(chunk.frames))

    def _film_ends(self) -> None:
        self._film = None
        self._tell(
            phase="paused"
        )  # without holding the pacer: the last frames are still to be seen
        self.notices.append("The recording ends here; P or R walks on from its start")

    # -------------------- recording

    def _toggle_recording(self) -> None:
        if self._recorder:
            self._stop_recording()
        elif self._session is None:
            self.notices.append("A replay is not recorded again")
        else:
            self._start_recording()

    def _start_recording(self) -> None:
        try:
            recorder = self._scenes.record(self._free_folder(), self._session)
        except ValueError as error:
            if self.status.phase == "opening":
                raise  # it was asked for on the command line
            self.notices.append(str(error))
            return
        if self.status.latent == 1 and self._session.start() is not None:
            recorder.write(self._session.start(), np.eye(4)[None])  # shown before F9 was pressed
        self._recorder = recorder
        self._tell(recording=recorder.folder)
        self.notices.append(f"Recording since latent {self.status.latent}")

    def _stop_recording(self) -> None:
        if self._recorder:
            self._recorder.close()
            self.notices.append(self._recorder.error or f"Saved {self._recorder.folder}")
        self._recorder = None
        self._tell(recording=None)

    def _free_folder(self) -> Path:
        """The folder that was asked for, or one named by the hour; numbered when it is taken."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        wanted = self._options.record or self._options.recordings / f"{self._scenes.name}-{stamp}"
        folder = wanted
        number = 1
        while folder.exists() and any(folder.iterdir()):
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        return folder

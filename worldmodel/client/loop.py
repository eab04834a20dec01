"""The generator thread: read the input as late as possible, generate a chunk, pass it to the pacer.

Imports neither pygame nor torch: it drives what `open_scenes` opens, on a clock that is passed in.
"""

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from worldmodel.client.failure import Failure, describe
from worldmodel.client.pacer import Frame, Pacer
from worldmodel.client.paths import within_walls
from worldmodel.client.rewind import Past, RewindKey, step_of
from worldmodel.client.scenes import Scene, Scenes, receipt
from worldmodel.client.takes import Takes
from worldmodel.controls import Controls, Envelope
from worldmodel.errors import UserError
from worldmodel.files import recordings_folder
from worldmodel.pacing import MARGIN, RECENT, expected_duration

NO_CAMERA = "This model has no camera control: keys do nothing"
LONGEST_SLEEP = 0.1  # seconds between two looks at the queue of commands


class Closed(Exception):
    """The player left while the world was being opened."""


@dataclass(frozen=True)
class LoopOptions:
    """What happens from the first frame on."""

    scene: Scene = field(default_factory=Scene)
    # c2w [N, 4, 4] to walk until a motion key takes over
    path: Callable[[Envelope], np.ndarray] | None = None
    replay: Path | None = None  # a recording to play again instead
    record: Path | None = None  # folder of a recording that starts with the first frame
    recordings: Path = field(default_factory=recordings_folder)  # where F9 makes its folders


@dataclass(frozen=True)
class Status:
    """What the window may know; replaced as a whole."""

    phase: str = "opening"  # opening, running, paused, failed
    resting: bool = False  # while running: the picture stays until something moves
    stage: str = "Waking up"  # while opening: what is being waited for
    progress: float = 0.0  # while opening: 0..1, reached when this stage ends
    failure: Failure | None = None
    scene: Scene = field(default_factory=Scene)
    knowledge: str = ""  # "remembered" or "imagined", in worlds with places
    locked: frozenset[str] = frozenset()  # motions this world has not learned
    latent: int = 0  # latents since the start of the session
    cached: int = 0  # latents in the window of the cache
    window: int = 0  # latents that the window holds at most
    rewindable: float = 0.0  # seconds that can be taken back
    pose: np.ndarray | None = None  # c2w [4, 4] of the newest latent
    timings: tuple[tuple[str, float], ...] = ()  # milliseconds of the newest chunk, by part
    milliseconds: float = 0.0  # per latent, median of the last chunks
    speed: float = 1.0  # of real time
    recording: Path | None = None


class Loop:
    """Own the session. A window calls the methods of its section, and reads `status`, `notices` and
    `pacer`; none of that waits for the model.

    open_scenes: called once, in the generator thread, with a function (stage, progress) that the
    start screen shows. clock: seconds; every time that is passed in is on it. sleep: waits that
    many seconds, or less when woken.
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
        self.notices: deque[str] = deque(maxlen=8)  # for the player; the window takes them
        self.pacer: Pacer | None = None  # there when the world's frame rate is known
        self._open_scenes = open_scenes
        self._options = options
        self._wake = threading.Event()
        self._sleep = sleep or self._wake.wait
        self._commands: deque[str] = deque()
        self._rewind_key = RewindKey()
        self._edges: deque[tuple[float, str]] = deque()  # (seconds, motion), for the latency figure
        self._controls: Controls | None = None
        # seconds from the start of a chunk until its first frames were there, and until its end
        self._durations: deque[float] = deque(maxlen=RECENT)
        self._busy: deque[float] = deque(maxlen=RECENT)
        self._stopping = False
        self._thread = None
        self._session = None
        self._replayed = None  # chunks and poses of a recording that is played again
        self._takes: Takes | None = None

    # -------------------- for the window

    def start(self) -> None:
        """Run in a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="generator", daemon=True)
        self._thread.start()

    def request_stop(self) -> None:
        """Let the generator end after the present chunk and close the recording."""
        self._stopping = True
        self._wake.set()

    def stop(self) -> None:
        """Request a stop and wait until the generator has ended."""
        self.request_stop()
        if self._thread:
            self._thread.join()

    def command(self, name: str) -> None:
        """Ask for restart, next_prompt, change_prompt, new_seed, pause or record.

        It is executed between two chunks, and a notice confirms it.
        """
        self._commands.append(name)
        self._wake.set()

    def press_rewind(self) -> None:
        """Note that the rewind key went down: one step back, and more while it is held."""
        self._rewind_key.press()
        self._wake.set()

    def release_rewind(self) -> None:
        """Note that the rewind key went up."""
        self._rewind_key.release()
        self._wake.set()

    def press(self, motion: str, now: float) -> None:
        """Note that the key of `motion` went down at `now`; without effect before the world is
        there.
        """
        if self._controls:
            self._edges.append((now, motion))
            self._controls.press(motion, now)
            self._wake.set()

    def release(self, motion: str, now: float) -> None:
        """Note that the key of `motion` went up at `now`."""
        if self._controls:
            self._edges.append((now, motion))
            self._controls.release(motion, now)
            self._wake.set()

    def look(self, dx: float, dy: float, now: float) -> None:
        """Note that the captured mouse moved by dx, dy counts (right, down)."""
        if self._controls:
            self._controls.look(dx, dy, now)
            self._wake.set()

    # -------------------- the loop

    def run(self) -> None:
        """Open the world and generate until `stop` or an error, which ends up in `status`."""
        try:
            try:
                self.open()
                while not self._stopping:
                    self.turn()
            finally:
                if self._takes:
                    self._takes.stop()
                    self._update(recording=None)
        except Closed:
            pass
        except Exception as error:
            self._update(phase="failed", failure=describe(error))

    def open(self) -> None:
        """Load the world and show its first picture."""
        self._scenes = self._open_scenes(self._open_stage)
        self._chunk_frames = self._scenes.chunk * self._scenes.frames_per_latent
        self._chunk_seconds = self._chunk_frames / self._scenes.fps
        self._path = deque()
        if self._options.path:
            path = self._options.path(self._scenes.envelope)
            walls = self._scenes.walls(self._options.scene, self.notices.append)
            self._path.extend(within_walls(path, walls, self.notices.append))
        self._takes = Takes(
            self._scenes.name, self._options.record, self._options.recordings, self.notices.append
        )
        controls = Controls(self._scenes.envelope, self._scenes.fps, self._scenes.frames_per_latent)
        self._open_stage("Dreaming the first picture", 0.98)
        self._update(locked=frozenset(controls.locked))
        self.pacer = Pacer(self._scenes.fps)
        self._controls = controls
        if self._options.replay:
            self._replayed, scene = self._scenes.replay(self._options.replay)
            self._place_camera(np.eye(4), self.clock())
            self._enter(scene)
        else:
            self._begin(self._options.scene, record=self._options.record is not None)
        self._update(phase="running", progress=1.0)
        if not self._scenes.camera:
            self.notices.append(NO_CAMERA)

    def _enter(self, scene: Scene) -> None:
        """The camera meets the walls of `scene`, and the window learns where it is."""
        self._controls.walls = self._scenes.walls(scene, self.notices.append)
        knowledge = self._scenes.knowledge(scene)
        self._update(scene=scene, knowledge=knowledge, latent=0, window=self._scenes.window)

    def _open_stage(self, stage: str, progress: float) -> None:
        if self._stopping:
            raise Closed
        self._update(stage=stage, progress=progress)

    def turn(self) -> None:
        """Execute the queued commands, then generate a chunk if it is due, or wait a little."""
        self._wake.clear()
        while self._commands:
            self._execute(self._commands.popleft())
        if self._rewind_key.active:
            self._turn_back()
        elif self.status.phase == "paused":
            self._sleep(LONGEST_SLEEP)
        else:
            self._rest(self._at_rest())
            left = self._start_at() - self.clock()
            if left > 0:
                self._sleep(min(left, LONGEST_SLEEP))
            else:
                self._generate()

    def _at_rest(self) -> bool:
        """Whether nothing is to be generated until something moves."""
        waiting = self._session is not None and not self._path and self._controls.at_rest
        return waiting and self._session.at_rest(self._pose)

    def _rest(self, resting: bool) -> None:
        if self.status.resting and not resting:
            self.pacer.release(self.clock())  # the time at rest does not count as late
        if self.status.resting != resting:
            self._update(resting=resting)

    def _start_at(self) -> float:
        """When to start the next chunk: as late as its frames are still on time, and at most one
        chunk ahead. At rest: a frame's time after the first key, so that there is motion to show.
        """
        if self.status.resting:
            edge = self._controls.next_edge
            return math.inf if edge is None else edge + 1 / self._scenes.fps
        expected = expected_duration(self._durations, self._chunk_seconds)
        ahead = min(expected + MARGIN, self._period() * self._chunk_frames)
        return self.pacer.wanted_at(self.clock()) - ahead

    def _period(self) -> float:
        """Seconds between frames: the world's, or more on a slow machine, so that motion stays
        even.
        """
        typical = statistics.median(self._busy) if self._busy else 0.0
        return max(self._chunk_seconds, typical) / self._chunk_frames

    def _generate(self) -> None:
        """Generate the next chunk, or take it from the recording that is played again."""
        started = self.clock()
        edges = ()
        early = []

        def show_early(pictures: np.ndarray) -> None:
            early.append(len(pictures))
            self._durations.append(self.clock() - started)
            self._put(pictures, self.status.latent, edges, self._period())

        if self._replayed is None:
            c2w, edges = self._poses(started)
            if self._session.at_rest(c2w):
                self._hold_picture()
                return
            if self._takes.suspended:
                self._start_recording()
            self._rest(False)
            chunk = self._session.step(c2w, show_early)
        else:
            chunk, c2w = next(self._replayed, (None, None))
            self._edges.clear()
        if chunk is None:
            self._end_replay()
            return
        if not early:
            self._durations.append(self.clock() - started)
        self._show(chunk, c2w, sum(early), self._period())
        if self._session:
            self._session.commit_pending()  # while the frames are on their way to the screen
        self._busy.append(self.clock() - started)
        typical = statistics.median(self._busy)
        speed = min(1.0, self._chunk_seconds / max(typical, 1e-9))
        self._update(milliseconds=typical / self._scenes.chunk * 1000, speed=speed)

    def _hold_picture(self) -> None:
        """Show the last picture for the time of a chunk that has nothing new to show: a wait in a
        path, a key that moves nothing.
        """
        if self.status.resting:
            return
        latent = self.status.latent
        pictures = np.stack([self._past.at(latent)] * self._chunk_frames)
        self._put(pictures, latent - 1, (), self._period())

    def _poses(self, now: float) -> tuple[np.ndarray, tuple[float, ...]]:
        """Return c2w [chunk, 4, 4] of the next chunk, and the key edges (seconds) that it is the
        first to show.
        """
        count = self._scenes.chunk
        since = self._sampled
        edges = []
        while self._edges and self._edges[0][0] <= now:
            edges.append(self._edges.popleft())
        if edges and self._path:
            self._path.clear()  # the player takes over
            self._place_camera(self._pose, since)
        if self._path:
            poses = [self._path.popleft() for _ in range(min(count, len(self._path)))]
            poses += poses[-1:] * (count - len(poses))
            self._place_camera(poses[-1], now)
        else:
            poses = [
                self._controls.pose_until(since + (now - since) * (k + 1) / count)
                for k in range(count)
            ]
        self._sampled = now
        self._pose = poses[-1]
        return np.stack(poses), tuple(t for t, motion in edges if motion not in self.status.locked)

    def _place_camera(self, c2w: np.ndarray, now: float) -> None:
        """Put the camera at `c2w` [4, 4], at rest; motion counts from `now` on. Keys stay held."""
        self._controls.reset(c2w)
        self._controls.pose_until(now)
        self._sampled = now
        self._pose = c2w

    def _show(self, chunk, c2w: np.ndarray, early: int, period: float) -> None:
        """Show and record a chunk, of which the first `early` frames are in the pacer already."""
        latent = chunk.index + len(c2w)
        if self._session:
            oldest = latent - self._rewindable_latents(latent)
            self._past.add(latent, chunk.frames[-1], oldest)
        self._update_figures(latent, c2w[-1])
        self._update(timings=tuple(chunk.timings.items()))
        # after its figures, which the window may show with it
        self._put(chunk.frames[early:], chunk.index, (), period)
        self._takes.write(chunk, c2w, self._controls.held)
        self._update(recording=self._takes.folder)
        if chunk.notice:
            self.notices.append(chunk.notice)

    def _update_figures(self, latent: int, c2w: np.ndarray) -> None:
        """Tell the window where the session is: after `latent` latents, at `c2w` [4, 4]."""
        window = self._scenes.window
        seconds = self._scenes.frames_per_latent / self._scenes.fps
        self._update(
            latent=latent,
            cached=min(latent, window),
            window=window,
            rewindable=self._rewindable_latents(latent) * seconds,
            pose=c2w,
        )

    def _put(
        self, pictures: np.ndarray, latent: int, edges: tuple[float, ...], period: float
    ) -> None:
        """Pass pictures [n, H, W, 3] of a latent to the pacer; the first one is the first to show
        `edges`.
        """
        frames = [
            Frame(picture, latent, edges if place == 0 else ())
            for place, picture in enumerate(pictures)
        ]
        if frames:
            self.pacer.put(frames, self.clock(), period)

    def _update(self, **changes) -> None:
        self.status = replace(self.status, **changes)

    # -------------------- commands

    def _execute(self, command: str) -> None:
        scene = self.status.scene
        labels = self._scenes.labels
        if command == "pause":
            self._toggle_pause()
        elif command == "record":
            self._toggle_recording()
        elif command == "restart":
            self._restart(scene, "Back at the start")
        elif command == "next_prompt":
            scene = self._scenes.next_prompt(scene)
            self._restart(scene, receipt(labels.next_prompt, scene.prompt))
        elif command == "change_prompt":
            self._change_prompt()
        elif command == "new_seed":
            self._go_elsewhere()
        else:
            raise ValueError(f"the generator knows no command {command!r}")

    def _go_elsewhere(self) -> None:
        """Leave a place or return to it; stay where that cannot be opened."""
        try:
            scene, words = self._scenes.elsewhere(self.status.scene)
        except UserError as error:
            self.notices.append(str(error))
            return
        self._restart(scene, words)

    def _change_prompt(self) -> None:
        """Use the next prompt from the next chunk on; the place and the cache stay."""
        if self._session is None:
            self.notices.append("A replay keeps its prompts")
            return
        prompt = self._scenes.next_prompt(self.status.scene).prompt
        self._session.set_prompt(prompt)
        self._update(scene=replace(self.status.scene, prompt=prompt))
        self.notices.append(receipt(self._scenes.labels.change_prompt, prompt))

    def _toggle_pause(self) -> None:
        if self._replayed is None and self._session is None:
            self._restart(self.status.scene, "Yours from here")  # a replay has ended
        elif self.status.phase == "paused":
            self._resume()
            self._update(phase="running")
        else:
            self.pacer.hold()
            self._update(phase="paused")

    def _resume(self) -> None:
        """Resume at the current pose; ignore the time and the keys of the break."""
        self._edges.clear()
        self._place_camera(self._pose, self.clock())
        self.pacer.release(self._sampled)

    def _restart(self, scene: Scene, receipt: str) -> None:
        """Begin another session: nothing of the old one stays queued, and a running recording goes
        on in a new folder.
        """
        recording = self._takes.wanted
        self._takes.stop()
        self._replayed = None
        self._path.clear()
        self.pacer.restart()
        self._begin(scene, recording)
        self._update(phase="running")
        self.notices.append(receipt)

    def _begin(self, scene: Scene, record: bool) -> None:
        """Open a session and show its first picture: the start picture, or a generated one seen
        from the origin.
        """
        self._session = None  # frees the old cache before the new one is made
        self._session, scene = self._scenes.open(scene)
        self._past = Past()
        self._enter(scene)
        if record:
            self._start_recording()
        chunk = self._session.first
        poses = np.repeat(np.eye(4)[None], chunk.latents, 0)
        self._first = len(poses)
        self._edges.clear()
        self._place_camera(np.eye(4), self.clock())
        # one picture stands for as long as a chunk, so that the next one is on time
        self._show(chunk, poses, 0, self._chunk_seconds / len(chunk.frames))

    def _end_replay(self) -> None:
        self._replayed = None
        self._update(phase="paused")  # without `pacer.hold`: the last frames are still to be seen
        self.notices.append("The recording ends here; P or R walks on from its start")

    # -------------------- rewind

    def _turn_back(self) -> None:
        """Go a step back if it is due, or wait for that; then go on once the key is up."""
        if self._session is None:
            self._rewind_key.cancel()
            self.notices.append("A replay cannot be rewound; P or R walks on when it has ended")
            return
        now = self.clock()
        if self._rewind_key.take(now):
            self._rewind()
        else:
            self._sleep(min(self._rewind_key.wait(now), LONGEST_SLEEP))
        if not self._rewind_key.active and self.status.phase != "paused":
            self._resume()

    def _rewind(self) -> None:
        """Take back a step and show the picture that was there. Recording goes on in a new take."""
        latents = min(step_of(self._scenes.chunk), self._rewindable_latents(self.status.latent))
        if latents == 0:
            return
        self._takes.suspend()
        self._session.rewind(latents)
        self._path.clear()
        self._pose = self._session.poses[-1]
        latent = self._session.frames
        self._update_figures(latent, self._pose)
        self._update(recording=None)
        self.pacer.restart()
        self._put(self._past.at(latent)[None], latent - 1, (), self._chunk_seconds)

    def _rewindable_latents(self, latent: int) -> int:
        """Latents that can be taken back after `latent` latents; the first picture always stays."""
        if self._session is None:
            return 0
        return max(0, min(self._session.rewindable, latent - self._first))

    # -------------------- recording

    def _toggle_recording(self) -> None:
        if self._takes.wanted:
            self._takes.stop()
            self._update(recording=None)
        elif self._session is None:
            self.notices.append("A replay is not recorded again")
        else:
            self._start_recording()

    def _start_recording(self) -> None:
        """Begin a take. What prevents it is a notice, or an error if the command line asked."""
        session = self._session
        latent = self.status.latent
        try:
            recorder = self._takes.start(lambda path: self._scenes.record(path, session), latent)
        except UserError as error:
            if self.status.phase == "opening":
                raise
            self.notices.append(str(error))
            return
        if latent == session.first.latents:  # shown before the recording began
            recorder.write(session.first, session.poses)
        self._update(recording=recorder.folder)

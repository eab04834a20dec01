"""The client without a window: the loop on a clock that only the test turns, the command line, the
headless walk.
"""

import importlib.util
import itertools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from worldmodel.camera import rotation
from worldmodel.client.bindings import Bindings
from worldmodel.client.loop import NO_CAMERA, Loop, LoopOptions
from worldmodel.client.pacer import Frame, Pacer
from worldmodel.client.paths import MET_WALL, tour, within_walls, written_path
from worldmodel.client.rewind import FIRST_REPEAT, REPEAT
from worldmodel.client.scenes import Scene, Scenes
from worldmodel.controls import Envelope
from worldmodel.errors import UserError, user_log
from worldmodel.pacing import MARGIN
from worldmodel.recording import verify
from worldmodel.session import FrameChunk
from worldmodel.session_log import read_log
from worldmodel.walkable import WalkableMap
from worldmodel.worlds.config import WorldConfig
from worldmodel.worlds.labels import Labels
from worldmodel.worlds.place import Place

ROOT = Path(__file__).resolve().parents[1]
ENVELOPE = Envelope(forward=0.5, strafe=0.4, yaw=6.0, pitch=0.0)
LATENT = 0.25  # seconds of video
HISTORY = 20  # latents
TICK = 0.001  # seconds; how finely the fake clock moves


class FakeSession:
    """Takes `step_seconds` on the fake clock to the first frame, and `rest_seconds` for the others;
    its pictures are numbered, so that lost or stale ones show.
    """

    def __init__(self, machine, scene, number):
        self.machine = machine
        self.scene = scene
        self.number = number
        self.furthest = 0
        self.prompt = "meadow"
        self.changes = []
        latents = 1 if machine.scenes.pictures else machine.scenes.chunk
        self.poses = [np.eye(4)] * latents
        self.first = self._chunk(4 * latents - 3, 0, latents)

    def set_prompt(self, name):
        self.prompt = name
        self.changes.append((name, len(self.poses)))

    def step(self, c2w, early=None):
        self.machine.begun.append(self.machine.clock())
        self.machine.spend(self.machine.step_seconds())
        index = len(self.poses)
        latents = self.machine.scenes.chunk
        assert c2w.shape == (latents, 4, 4)
        self.poses.extend(c2w)
        self.furthest = max(self.furthest, self.frames)
        chunk = self._chunk(4 * latents, index, latents)
        if early:
            early(chunk.frames[:1])
            self.machine.spend(self.machine.rest_seconds) if self.machine.rest_seconds else None
        return chunk

    def at_rest(self, c2w):
        unchanged = not self.changes or self.changes[-1][1] < self.frames
        return self.machine.still and unchanged and bool(np.all(c2w == self.poses[-1]))

    def commit_pending(self):
        self.machine.committed += 1

    @property
    def frames(self):
        return len(self.poses)

    @property
    def rewindable(self):
        """Whole chunks, of the HISTORY latents before the furthest that it was."""
        chunk = self.machine.scenes.chunk
        return max(0, self.frames - max(self.furthest - HISTORY, 0)) // chunk * chunk

    def rewind(self, latents):
        assert latents <= self.rewindable and latents % self.machine.scenes.chunk == 0
        self.machine.rewound.append((self.machine.clock(), latents))
        del self.poses[-latents:]

    def _chunk(self, frames, index, latents):
        pictures = np.zeros((frames, 2, 2, 3), np.uint8)
        pictures[..., 0] = self.number
        return FrameChunk(
            pictures,
            index,
            latents,
            "meadow",
            {"network": 1.0},
            "Memory is full" if index == 5 else "",
        )


class FakeRecorder:
    def __init__(self, folder):
        self.folder = folder
        self.error = None
        self.taken = []
        self.closed = False

    def write(self, chunk, c2w, keys=()):
        self.taken.append((chunk.index, keys))
        return self.error is None

    def close(self):
        self.closed = True


class FakeScenes:
    name = "fake"
    fps = 16
    frames_per_latent = 4
    window = 12
    envelope = ENVELOPE
    labels = Labels()

    def __init__(self, machine, chunk=1, pictures=True, camera=True, walls=None):
        self.walls = lambda scene, notify: walls
        self.knowledge = lambda scene: ""
        self.machine = machine
        self.chunk = chunk
        self.pictures = pictures
        self.camera = camera
        self.sessions = []
        self.recorders = []

    def open(self, scene):
        self.sessions.append(FakeSession(self.machine, scene, len(self.sessions)))
        return self.sessions[-1], replace(scene, prompt=scene.prompt or "meadow")

    def record(self, folder, session):
        self.recorders.append(FakeRecorder(folder))
        return self.recorders[-1]

    def next_prompt(self, scene):
        return Scene("snow", None, scene.seed)


class Machine:
    """One thread plays all parts: while the generator sleeps or computes, the window ticks every
    millisecond.
    """

    def __init__(self, step_seconds=0.06, options=None, rest_seconds=0.0, still=False, **world):
        self.still = still
        self.slept = 0
        self.rest_seconds = rest_seconds
        self.step_seconds = step_seconds if callable(step_seconds) else lambda: step_seconds
        self.milliseconds = 0
        self.committed = 0
        self.begun = []
        self.rewound = []
        self.seen = []
        self.plan = []
        self.scenes = FakeScenes(self, **world)
        self.loop = Loop(
            lambda tell: self.scenes, options or LoopOptions(), clock=self.clock, sleep=self.sleep
        )

    def clock(self):
        return self.milliseconds / 1000

    def spend(self, seconds):
        for _ in range(max(1, round(seconds / TICK))):
            self.milliseconds += 1
            now = self.clock()
            while self.plan and self.plan[0][0] <= now:
                self.plan.pop(0)[1](now)
            frame = self.loop.pacer.take(now) if self.loop.pacer else None
            if frame:
                self.seen.append((now, frame))
                self.loop.pacer.shown(frame, now)

    def sleep(self, seconds):
        """As the loop's own: a command wakes it."""
        self.slept += 1
        for _ in range(max(1, round(seconds / TICK))):
            if self.loop._wake.is_set():
                break
            self.spend(TICK)

    def at(self, seconds, action):
        """Plan `action(now)`; the start of the loop is second 0."""
        self.plan = sorted([*self.plan, (seconds, action)], key=lambda item: item[0])

    def play(self, seconds):
        if self.loop.pacer is None:
            self.loop.open()
        while self.clock() < seconds:
            self.loop.turn()
        return self

    @property
    def gaps(self):
        return np.diff([moment for moment, _ in self.seen])


def test_a_key_is_on_screen_within_one_chunk_and_one_step():
    """The latency regression test: whatever the phase of the key, chunk + margin + time to the
    first frame is the most it may take.
    """
    machine = Machine(step_seconds=0.06, rest_seconds=0.02)
    presses = [2 + 0.433 * n for n in range(60)]  # 433 ms against 250 ms: every phase comes up
    for moment in presses:
        machine.at(moment, partial(machine.loop.press, "forward"))
        machine.at(moment + 0.2, partial(machine.loop.release, "forward"))
        machine.at(
            moment + 0.1, partial(machine.loop.press, "look_up")
        )  # locked here: shows nothing, counts nothing
    machine.play(29.0)
    samples = np.array(machine.loop.pacer._latencies)
    assert len(samples) == 2 * len(presses)
    assert samples.max() <= LATENT + 0.06 + MARGIN + 3 * TICK
    assert 0.06 < samples.min() < 0.06 + MARGIN + 0.02
    assert machine.loop.pacer.latency()[0] == pytest.approx(LATENT / 2 + 0.06 + MARGIN, abs=0.02)
    assert machine.loop.pacer.late == 0 and machine.loop.pacer.dropped == 0
    walked = machine.scenes.sessions[0].poses[-1][2, 3]
    assert walked == pytest.approx(60 * 0.2 / LATENT * ENVELOPE.forward, rel=1e-3)


def test_chunks_of_three_without_a_start_picture():
    machine = Machine(chunk=3, pictures=False)
    moments = [2.0 + 1.31 * n for n in range(16)]
    for moment in moments:
        machine.at(moment, partial(machine.loop.press, "forward"))
        machine.at(moment + 0.25, partial(machine.loop.release, "forward"))
    machine.play(24.0)
    path = np.array(machine.scenes.sessions[0].poses)
    assert np.array_equal(
        path[:3], np.tile(np.eye(4), (3, 1, 1))
    )  # the first chunk is seen from the origin
    assert path[-1, 2, 3] == pytest.approx(
        16 * ENVELOPE.forward, rel=1e-3
    )  # each press lasted one latent
    assert np.diff(path[:, 2, 3]).max() < ENVELOPE.forward + 1e-9
    assert machine.gaps[12:] == pytest.approx(1 / 16, abs=2 * TICK) and machine.loop.pacer.late == 0
    assert max(machine.loop.pacer._latencies) <= 3 * LATENT + 0.06 + MARGIN + 3 * TICK
    assert machine.loop.status.latent == len(path) and machine.loop.status.cached == 12


@pytest.mark.parametrize("step_seconds", [0.01, 0.12, 0.24])
def test_a_fast_generator_waits_for_the_screen(step_seconds):
    machine = Machine(step_seconds).play(10.0)
    assert machine.gaps[8:] == pytest.approx(1 / 16, abs=2 * TICK)
    chunks = [frame.latent for _, frame in machine.seen]
    assert chunks == sorted(chunks) and np.all(np.bincount(chunks)[1:-2] == 4)  # none is lost
    assert np.diff(machine.begun[4:]) == pytest.approx(LATENT, abs=3 * TICK)
    # never more than one chunk ahead: when a chunk begins, its first frame is due within a chunk's
    # time
    first_seen = {frame.latent: moment for moment, frame in reversed(machine.seen)}
    ahead = [
        first_seen[n + 1] - begun
        for n, begun in enumerate(machine.begun)
        if n + 1 in first_seen and n > 4
    ]
    assert max(ahead) <= min(step_seconds + MARGIN, LATENT) + 3 * TICK


def test_a_slow_generator_slows_the_world_evenly():
    machine = Machine(step_seconds=0.4).play(12.0)
    assert machine.gaps[20:] == pytest.approx(0.1, abs=3 * TICK)  # four frames in 0.4 s, no bursts
    assert machine.loop.pacer.dropped == 0
    assert machine.loop.status.speed == pytest.approx(LATENT / 0.4, abs=0.02)
    assert machine.loop.pacer.fps(machine.clock()) == pytest.approx(10, abs=0.3)


def test_one_slow_step_is_one_late_chunk():
    durations = iter([0.06] * 20 + [0.8] + [0.06] * 100)
    machine = Machine(lambda: next(durations)).play(12.0)
    assert machine.loop.pacer.late == 1 and machine.loop.pacer.dropped == 0
    assert np.sum(machine.gaps[1:] > 0.1) == 1
    assert np.diff(machine.begun[-8:]) == pytest.approx(
        LATENT, abs=3 * TICK
    )  # it did not start to run ahead


def test_a_late_window_drops_frames_but_no_key():
    pacer = Pacer(fps=16)
    pacer.put(
        [Frame(np.zeros((1, 1, 3), np.uint8), 1, edges) for edges in ((), (0.01,), (), ())],
        0.0,
        1 / 16,
    )
    assert pacer.take(0.0).edges == ()
    frame = pacer.take(0.2)  # the second and third frame were due meanwhile
    assert pacer.dropped == 2 and frame.edges == (0.01,)
    pacer.shown(frame, 0.2)
    assert pacer.latency() == pytest.approx((0.19, 0.19))


def test_restart_shows_nothing_stale_and_records_on(tmp_path):
    machine = Machine(options=LoopOptions(record=tmp_path / "walk", recordings=tmp_path))
    (tmp_path / "walk").mkdir()
    machine.at(1.0, partial(machine.loop.press, "forward"))
    machine.at(3.0, lambda now: machine.loop.command("next_prompt"))
    machine.play(5.0)
    sessions = machine.scenes.sessions
    recorders = machine.scenes.recorders
    numbers = [frame.picture[0, 0, 0] for _, frame in machine.seen]
    assert numbers == sorted(numbers) and set(numbers) == {0, 1}
    switched = next(moment for moment, frame in machine.seen if frame.picture[0, 0, 0] == 1)
    assert 3.0 < switched < 3.0 + 0.06 + 3 * TICK  # after the chunk that was under way at the most
    assert (
        machine.loop.status.scene.prompt == "snow" and "Next prompt: snow" in machine.loop.notices
    )
    assert (
        np.array_equal(sessions[1].poses[0], np.eye(4)) and sessions[1].poses[-1][2, 3] > 0
    )  # the key is still held
    assert recorders[0].closed and not recorders[1].closed
    assert [index for index, _ in recorders[1].taken][:3] == [0, 1, 2]
    assert recorders[0].taken[-1][1] == ("forward",)


@pytest.mark.parametrize("pictures", [True, False])
def test_a_frame_is_never_ahead_of_its_figures(monkeypatch, pictures):
    machine = Machine(pictures=pictures)
    shown = []
    put = Pacer.put

    def spy(pacer, frames, now, period):
        shown.append(
            (machine.loop.status.pose is None, frames[0].latent - machine.loop.status.latent)
        )
        put(pacer, frames, now, period)

    monkeypatch.setattr(Pacer, "put", spy)
    machine.play(3.0)
    assert shown[0] == (False, -1) and set(shown) == {
        (False, -1),
        (False, 0),
    }  # 0: the frame that is there early


def test_what_a_chunk_has_to_say_reaches_the_player():
    machine = Machine()
    machine.play(3.0)
    assert list(machine.loop.notices).count("Memory is full") == 1


@pytest.mark.parametrize("camera", [True, False])
def test_a_world_without_camera_weights_says_so_once(camera):
    machine = Machine(camera=camera, pictures=camera)
    machine.at(1.0, lambda now: machine.loop.command("restart"))
    machine.play(2.0)
    assert [words for words in machine.loop.notices if "camera" in words] == (
        [] if camera else [NO_CAMERA]
    )


def test_a_change_of_prompt_keeps_the_place():
    machine = Machine()
    machine.at(1.0, partial(machine.loop.press, "forward"))
    machine.at(3.0, lambda now: machine.loop.command("change_prompt"))
    machine.play(5.0)
    (session,) = machine.scenes.sessions
    ((name, latents),) = session.changes
    assert name == session.prompt == "snow" and 8 < latents < len(session.poses) - 4
    assert (
        "Change prompt: snow" in machine.loop.notices and machine.loop.status.scene.prompt == "snow"
    )
    assert (
        np.diff([pose[2, 3] for pose in session.poses])[latents - 2 : latents + 3].min() > 0
    )  # the walk goes on


def tap_rewind(loop, now):
    loop.press_rewind()
    loop.release_rewind()


def test_a_tap_takes_back_eight_latents_and_shows_where_it_leads():
    machine = Machine()
    places = []
    machine.at(1.0, partial(machine.loop.press, "forward"))
    machine.at(6.0, lambda now: places.extend(machine.scenes.sessions[0].poses))
    machine.at(6.0, partial(tap_rewind, machine.loop))
    machine.play(6.5)
    ((moment, latents),) = machine.scenes.sessions[0].machine.rewound
    assert latents == 8 and 6.0 <= moment < 6.0 + 0.06 + 3 * TICK  # after the chunk under way
    shown = [frame.latent for when, frame in machine.seen if when > moment]
    kept = shown[0] + 1
    assert kept in (len(places) - 8, len(places) - 7) and shown[1] == kept
    path = np.array(machine.scenes.sessions[0].poses)
    assert np.array_equal(path[:kept], np.array(places)[:kept])
    assert 0 < path[kept, 2, 3] - path[kept - 1, 2, 3] <= ENVELOPE.forward + 1e-9  # no leap
    assert machine.loop.pacer.late == 0
    seconds = machine.loop.status.rewindable
    assert seconds == pytest.approx((HISTORY - 8 + len(path) - kept) * LATENT)


@pytest.mark.parametrize(("chunk", "steps"), [(1, [8, 8, 4]), (3, [9, 9])])
def test_holding_rewind_repeats_to_the_limit_and_generates_nothing(chunk, steps):
    machine = Machine(chunk=chunk)
    machine.at(1.0, partial(machine.loop.press, "forward"))
    machine.at(6.5, lambda now: machine.loop.press_rewind())
    machine.at(8.5, lambda now: machine.loop.release_rewind())
    machine.play(8.5)
    rewound = machine.rewound
    assert [latents for _, latents in rewound] == steps
    waits = np.diff([moment for moment, _ in rewound])
    assert waits == pytest.approx([FIRST_REPEAT, REPEAT][: len(waits)], abs=3 * TICK)
    assert machine.loop.status.rewindable < chunk * LATENT
    assert not any(rewound[0][0] < begun < 8.5 for begun in machine.begun)
    frames = [frame.latent for when, frame in machine.seen if when > rewound[0][0]]
    assert len(frames) == len(steps) and frames == sorted(frames, reverse=True)
    before = machine.scenes.sessions[0].poses[-1][2, 3]
    machine.play(9.5)
    walked = machine.scenes.sessions[0].poses
    assert walked[-1][2, 3] > before and machine.loop.pacer.late == 0
    assert np.diff([pose[2, 3] for pose in walked]).max() <= ENVELOPE.forward + 1e-9


def test_rewind_never_takes_the_first_picture():
    machine = Machine(chunk=3, pictures=False)
    machine.at(2.0, lambda now: machine.loop.press_rewind())
    machine.play(6.0)
    assert len(machine.scenes.sessions[0].poses) == 3 and machine.loop.status.latent == 3
    assert machine.loop.status.rewindable == 0 and machine.loop.status.phase == "running"


def test_three_quick_taps_on_a_slow_machine_are_three_steps():
    machine = Machine(step_seconds=0.3)
    for _ in range(3):
        machine.at(8.0, partial(tap_rewind, machine.loop))  # while a chunk is under way
    machine.play(9.5)
    assert [latents for _, latents in machine.rewound] == [8, 8, 4]


def test_rewind_while_paused_stays_paused():
    machine = Machine()
    machine.at(4.0, lambda now: machine.loop.command("pause"))
    machine.at(5.0, partial(tap_rewind, machine.loop))
    machine.at(8.0, lambda now: machine.loop.command("pause"))
    machine.play(7.9)
    assert machine.loop.status.phase == "paused" and len(machine.rewound) == 1
    (frame,) = [frame for when, frame in machine.seen if when > 4.9]
    assert (
        frame.latent == machine.loop.status.latent - 1 == len(machine.scenes.sessions[0].poses) - 1
    )
    machine.play(9.0)
    assert machine.loop.status.phase == "running" and machine.loop.pacer.late == 0


def test_a_rewind_begins_a_new_take(tmp_path):
    machine = Machine(options=LoopOptions(record=tmp_path / "walk"))
    (tmp_path / "walk").mkdir()
    (tmp_path / "walk" / "log").touch()  # the first take, for the second to find
    machine.at(5.9, lambda now: machine.loop.press_rewind())
    machine.at(7.0, lambda now: machine.loop.release_rewind())
    machine.play(6.9)
    (first,) = machine.scenes.recorders  # a new take begins with the walk, not with each step back
    assert first.closed and machine.loop.status.recording is None
    machine.play(9.0)
    first, second = machine.scenes.recorders
    assert not second.closed and machine.loop.status.recording == second.folder
    indices = [index for index, _ in second.taken]
    assert indices[0] == first.taken[-1][0] + 1 - HISTORY and np.all(np.diff(indices) == 1)
    machine.at(9.1, lambda now: machine.loop.press_rewind())
    machine.at(9.3, lambda now: machine.loop.command("record"))  # ends it, though none is running
    machine.at(10.0, lambda now: machine.loop.release_rewind())
    machine.play(11.0)
    assert len(machine.scenes.recorders) == 2 and second.closed


def test_a_take_after_a_rewind_replays_exactly(tiny_world, tmp_path):
    torch.set_num_threads(1)
    now = itertools.count(0, 0.05)
    scenes = Scenes(tiny_world)
    options = LoopOptions(record=tmp_path / "take", path=partial(written_path, "w*3,l*30"))
    loop = Loop(lambda tell: scenes, options, lambda: next(now), lambda seconds: None)

    def walk_to(latent):
        while loop.status.latent < latent:
            loop.turn()

    loop.open()
    walk_to(12)
    tap_rewind(loop, 0)
    loop.turn()
    assert loop.status.latent == 4
    walk_to(8)
    loop.command("record")
    loop.turn()
    for folder, first, count in (("take", 0, 12), ("take-2", 4, 4)):
        assert read_log(tmp_path / folder).lines[0]["index"] == first
        result = verify(tmp_path / folder, tiny_world)
        assert result["exact"] and result["latents"] == count


def test_pause_freezes_and_costs_no_time():
    machine = Machine()
    machine.at(1.0, partial(machine.loop.press, "forward"))
    machine.at(4.0, lambda now: machine.loop.command("pause"))
    machine.at(5.0, partial(machine.loop.look, 5000, 0))
    machine.at(9.0, lambda now: machine.loop.command("pause"))
    machine.play(12.0)
    moments = np.array([moment for moment, _ in machine.seen])
    assert not np.any((moments > 4.15) & (moments < 9.0))
    assert not any(4.1 < begun < 8.9 for begun in machine.begun)
    path = np.array(machine.scenes.sessions[0].poses)
    steps = np.diff(path[:, 2, 3])
    assert steps.max() == pytest.approx(ENVELOPE.forward) and np.all(
        path[:, 0, 2] == 0
    )  # no leap, no turn
    frames = [frame.latent for _, frame in machine.seen]
    assert np.all(np.bincount(frames)[1:-2] == 4)  # what was queued is seen afterwards
    assert machine.loop.pacer.late == 0 and machine.loop.pacer.latency()[1] < 0.4


def test_at_rest_nothing_is_generated_until_a_key():
    """As `test_a_key_is_on_screen_within_one_chunk_and_one_step`, in a world that is still."""
    machine = Machine(step_seconds=0.06, rest_seconds=0.02, still=True)
    machine.play(2.0)
    assert machine.begun == [] and machine.loop.status.resting and len(machine.seen) == 1
    assert machine.slept < 2.0 / 0.1 + 5  # nor is the processor kept busy
    presses = [2 + 1.433 * n for n in range(20)]
    for moment in presses:
        machine.at(moment, partial(machine.loop.press, "forward"))
        machine.at(moment + 0.2, partial(machine.loop.release, "forward"))
        machine.at(moment + 0.6, partial(machine.loop.press, "look_up"))  # locked: stays at rest
    machine.play(31.0)
    samples = np.array(machine.loop.pacer._latencies)
    assert len(samples) == 2 * len(presses)
    assert samples.max() <= LATENT + 0.06 + MARGIN + 3 * TICK
    assert samples[::2].max() <= 1 / 16 + 0.06 + 3 * TICK  # the presses, which end the rest
    assert machine.loop.pacer.late == 0 and machine.loop.pacer.dropped == 0
    walked = machine.scenes.sessions[0].poses
    # the second chunk of each walk starts MARGIN early, so its share of a step is a little larger
    assert walked[-1][2, 3] == pytest.approx(20 * 0.2 / LATENT * ENVELOPE.forward, rel=0.02)
    assert len(walked) <= 1 + 2 * len(presses) and machine.loop.status.latent == len(walked)
    assert machine.loop.status.resting


def test_at_rest_the_mouse_and_chunks_of_three_answer():
    machine = Machine(chunk=3, pictures=False, still=True)
    machine.at(2.0, partial(machine.loop.look, 20, 0))
    machine.play(2.0 + 1 / 16 + 0.06 + 3 * TICK)
    machine.play(6.0)
    assert machine.begun[0] == pytest.approx(2.0 + 1 / 16, abs=2 * TICK)
    path = np.array(machine.scenes.sessions[0].poses)
    assert len(path) == 6 and np.array_equal(path[4], np.eye(4))
    assert np.degrees(np.arctan2(path[-1, 0, 2], path[-1, 2, 2])) == pytest.approx(2.0)


def test_at_rest_commands_work_and_a_prompt_is_generated(tmp_path):
    machine = Machine(still=True, options=LoopOptions(recordings=tmp_path))
    machine.at(1.0, partial(machine.loop.press, "forward"))
    machine.at(4.0, partial(machine.loop.release, "forward"))
    machine.at(5.0, partial(tap_rewind, machine.loop))
    machine.at(6.0, lambda now: machine.loop.command("record"))
    machine.at(7.0, lambda now: machine.loop.command("change_prompt"))
    machine.at(8.0, lambda now: machine.loop.command("pause"))
    machine.at(9.0, lambda now: machine.loop.command("pause"))
    machine.play(4.9)
    walked = machine.loop.status.latent
    machine.play(6.9)
    assert machine.loop.status.latent == walked - 8 and machine.loop.status.resting
    assert machine.seen[-1][1].latent == walked - 9  # the picture that was there
    (recorder,) = machine.scenes.recorders
    assert recorder.taken == []
    machine.play(9.9)
    assert machine.loop.status.latent == walked - 7 and machine.loop.status.resting
    assert [index for index, _ in recorder.taken] == [walked - 8]
    assert machine.loop.pacer.late == 0 and machine.loop.status.phase != "paused"
    machine.loop.command("restart")
    machine.play(12.0)
    assert machine.scenes.sessions[-1].frames == 1 and machine.loop.status.resting


def test_a_path_that_waits_keeps_its_time():
    path = partial(written_path, "w*4,wait*12,w*4")
    machine = Machine(still=True, options=LoopOptions(path=path)).play(8.0)
    assert len(machine.scenes.sessions[0].poses) == 1 + 8 and len(machine.begun) == 8
    assert np.diff(machine.begun)[3] == pytest.approx(13 * LATENT, abs=5 * TICK)
    moving = [moment for moment, _ in machine.seen if moment < 5.0]
    assert np.diff(moving)[4:] == pytest.approx(1 / 16, abs=3 * TICK)
    assert machine.loop.pacer.late == 0 and machine.loop.status.resting


@pytest.mark.parametrize(
    ("error", "sentence", "status"),
    [
        (UserError("No such\nprompt."), "No such prompt.", 2),
        (MemoryError("The card is full. Play on"), "not enough memory (The card is full)", 1),
        (ValueError("shapes differ\nhere"), "bug of the program", 1),
    ],
)
def test_an_error_becomes_one_sentence_and_completes_the_recording(
    tmp_path, monkeypatch, error, sentence, status
):
    """Bad input is its own sentence; any other error names the log, which holds its traceback."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def breaks():
        if len(machine.begun) > 5:
            raise error
        return 0.06

    machine = Machine(breaks, LoopOptions(record=tmp_path / "walk"))
    machine.loop.run()
    failure = machine.loop.status.failure
    assert machine.loop.status.phase == "failed" and failure.status == status
    assert sentence in failure.sentence and "\n" not in failure.sentence
    assert machine.scenes.recorders[0].closed
    if status == 1:
        assert str(user_log()) in failure.sentence and "in breaks" in user_log().read_text()
    else:
        assert not user_log().exists()


def test_a_full_disk_ends_the_recording_not_the_walk(tmp_path):
    machine = Machine(options=LoopOptions(recordings=tmp_path))
    machine.at(1.0, lambda now: machine.loop.command("record"))
    machine.at(
        2.0,
        lambda now: setattr(
            machine.scenes.recorders[0], "error", "Recording ended: the disk is full."
        ),
    )
    machine.play(4.0)
    assert "Recording ended: the disk is full." in machine.loop.notices
    assert machine.loop.status.recording is None and machine.loop.status.phase == "running"
    assert machine.scenes.recorders[0].taken[0][0] in (4, 5)  # it began in the middle


def test_a_path_is_walked_until_the_player_takes_over():
    machine = Machine(options=LoopOptions(path=partial(written_path, "w*4,l*50")))
    machine.at(3.0, partial(machine.loop.press, "back"))
    machine.play(5.0)
    poses = np.array(machine.scenes.sessions[0].poses)
    assert poses[4, 2, 3] == pytest.approx(4 * ENVELOPE.forward)
    turned = np.degrees(np.arctan2(poses[:, 0, 2], poses[:, 2, 2]))
    assert 30 < turned[-1] < 60 and turned[-1] == turned[-4]  # stopped turning at second 3
    assert poses[-1, 2, 3] < poses[4, 2, 3]


def test_a_replay_is_shown_at_the_worlds_rate_and_then_handed_over(tmp_path):
    machine = Machine(options=LoopOptions(replay=tmp_path))
    old = FakeSession(machine, None, 7)
    path = np.tile(np.eye(4), (8, 1, 1))

    def film(folder):
        chunks = ((old.step(path[k][None]) if k else old.first, path[k][None]) for k in range(8))
        return chunks, Scene("dunes", str(folder / "start.png"), 3)

    machine.scenes.replay = film
    machine.at(1.0, lambda now: machine.loop.press_rewind())
    machine.at(0.5, partial(machine.loop.press, "forward"))  # nobody steers a replay
    machine.at(4.0, lambda now: machine.loop.command("record"))
    machine.at(5.0, lambda now: machine.loop.command("pause"))
    machine.play(4.0)
    assert machine.loop.status.phase == "paused" and "ends here" in machine.loop.notices[-1]
    machine.play(7.0)
    assert any("cannot be rewound" in words for words in machine.loop.notices)
    assert "A replay is not recorded again" in machine.loop.notices and not machine.scenes.recorders
    numbers = [frame.picture[0, 0, 0] for _, frame in machine.seen]
    assert numbers[:29] == [7] * 29 and set(numbers[29:]) == {
        0
    }  # all of the replay, then a session of one's own
    assert machine.gaps[8:28] == pytest.approx(1 / 16, abs=2 * TICK)
    assert machine.scenes.sessions[0].scene == Scene("dunes", str(tmp_path / "start.png"), 3)
    assert machine.scenes.sessions[0].poses[-1][2, 3] > 0


def ahead_until(wall):
    """A place whose ground ends `wall` units ahead of its start, which looks along its x axis."""
    xz = np.stack(np.meshgrid(np.arange(-2, wall, 0.05), np.arange(-2, 2, 0.05)), -1)
    walkable = WalkableMap.from_positions(xz.reshape(-1, 2), 0.05, 0.0)
    start = np.eye(4)
    start[:3, :3] = rotation(90.0, 0.0)
    return Place("lane", "A lane", start, walkable)


def test_a_wall_stops_the_player_and_costs_nothing():
    machine = Machine(still=True, walls=ahead_until(1.5).walls)
    machine.at(1.0, partial(machine.loop.press, "forward"))
    machine.at(6.0, partial(machine.loop.press, "right"))
    machine.play(6.0)
    path = np.array(machine.scenes.sessions[0].poses)
    assert path[-1, 2, 3] == pytest.approx(1.5, abs=0.05) and np.abs(path[:, 0, 3]).max() < 1e-9
    begun = len(machine.begun)
    assert begun <= 6 and not machine.loop.status.resting  # the key is held, the picture stays
    machine.play(8.0)
    aside = np.array(machine.scenes.sessions[0].poses)[len(path) :]
    assert aside[-1, 0, 3] > 1.0 and aside[:, 2, 3].max() <= 1.5 + 1e-9
    assert machine.loop.pacer.late == 0


@pytest.mark.parametrize("with_walls", [True, False])
def test_a_written_path_slides_along_walls(tiny_world, with_walls, monkeypatch):
    monkeypatch.setattr(type(tiny_world), "place", lambda world, name: ahead_until(1.2))
    scenes = Scenes(tiny_world, with_walls=with_walls)
    said = []
    walls = scenes.walls(Scene(place="lane"), said.append)
    path = within_walls(written_path("w*2,wait*2,w+d*4,s*1", ENVELOPE), walls, said.append)
    assert path[1, 2, 3] == pytest.approx(1.0) and np.array_equal(path[2], path[3])
    assert said == ([MET_WALL] if with_walls else [])
    assert path[7, 0, 3] == pytest.approx(4 * 0.4)  # what is left of the diagonal
    assert path[7, 2, 3] == pytest.approx(1.2 if with_walls else 3.0, abs=0.05)
    assert path[8, 2, 3] == pytest.approx(path[7, 2, 3] - 0.5)


def test_a_walk_in_a_window_reports_a_wall_once():
    options = LoopOptions(path=partial(written_path, "w*9"))
    machine = Machine(walls=ahead_until(1.5).walls, options=options).play(5.0)
    assert list(machine.loop.notices).count(MET_WALL) == 1
    assert machine.scenes.sessions[0].poses[-1][2, 3] <= 1.5


def test_tour_and_written_path_stay_inside_the_envelope():
    path = np.concatenate([np.eye(4)[None], tour(ENVELOPE)])
    steps = np.linalg.inv(path[:-1]) @ path[1:]
    assert np.linalg.norm(steps[:, :3, 3], axis=1).max() <= ENVELOPE.forward + 1e-9
    turns = np.degrees(np.arctan2(steps[:, 0, 2], steps[:, 2, 2]))
    assert np.abs(turns).max() == pytest.approx(ENVELOPE.yaw) and np.all(path[:, 1, 2] == 0)
    yaw = np.degrees(np.arctan2(path[:, 0, 2], path[:, 2, 2]))
    assert yaw.max() >= 90 and abs(yaw[np.argmax(yaw) + 30]) < 1  # away and back
    with pytest.raises(ValueError, match="'i' is locked"):
        written_path("w*3,i*2", ENVELOPE)


def test_prompts_and_seeds_go_round(tiny_world):
    scenes = Scenes(tiny_world)
    scene = scenes.resolve(Scene())
    assert scene == Scene("grey", "grey-0", 0)
    assert scenes.new_seed(scene) == Scene("grey", "grey-1", 1)
    assert scenes.new_seed(scenes.new_seed(scene)) == Scene("grey", "grey-0", 2)
    assert scenes.next_prompt(scenes.next_prompt(scene)) == scene
    assert scenes.resolve(Scene(image="loud-1")).prompt == "loud"


def test_bindings_are_data():
    bindings = Bindings({"z": "forward"})
    assert (
        bindings.action("z") == "forward"
        and bindings.action("w") is None
        and bindings.action("w", 26) == "forward"
    )
    with pytest.raises(ValueError, match="Key 5 is bound to the unknown action 'jump'"):
        Bindings(scancodes={5: "jump"})
    with pytest.raises(ValueError, match="unknown action 'jump'"):
        Bindings({"space": "jump"})


@pytest.fixture(scope="module")
def play():
    spec = importlib.util.spec_from_file_location("play", ROOT / "play.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def torch_settings():
    """The program sets torch up for itself; the tests after it get theirs back."""
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--world", "atlantis"], "no world 'atlantis'"),
        (["--prompt", "gray"], "no prompt 'gray'; did you mean 'grey'?"),
        (["--image", "nobody.png"], "no start picture 'nobody.png'"),
        (["--steps", "0"], "whole number of at least 1, got '0'"),
        (["--steps", "many"], "got 'many'"),
        (["--seed", "x"], "--seed"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--speed", "9"], "Unrecognized arguments: --speed 9"),
        (["--headless", "--trajectory", "w*3,q*2"], "Trajectory key 'q' is unknown"),
        (["--headless", "--trajectory", "w*"], "'w*' is not KEY*COUNT"),
        (["--output", "x.mp4"], "add --headless"),
        (["--verify"], "--replay DIR"),
        (["--replay", "."], "is not a recording"),
        (["--recall-memory", "0"], "whole number of at least 1, got '0'"),
        (["--record", str(ROOT)], "not empty"),
    ],
)
def test_bad_input_is_one_sentence(play, tiny_bundle, capsys, arguments, reason):
    if "--world" not in arguments:
        arguments = ["--world", str(tiny_bundle), *arguments]
    assert play.main(arguments) == 2
    errors = capsys.readouterr().err
    assert reason in errors and len(errors.splitlines()) == 1


def test_headless_walk_record_replay_verify(play, tiny_bundle, tmp_path, capsys, torch_settings):
    world = ["--world", str(tiny_bundle)]
    film = tmp_path / "walk.mp4"
    take = tmp_path / "take"
    walk = ["--headless", "--trajectory", "w*3,l*2", "--seed", "5", "--threads", "1"]
    assert play.main([*world, *walk, "--output", str(film), "--record", str(take)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["latents"] == 6 and report["world"] == "tiny" and report["ms_per_latent"]["p50"] > 0
    )
    with av.open(str(film)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 21
    lines = [json.loads(line) for line in (take / "session.jsonl").read_text().splitlines()]
    recorded = np.array([line["c2w"] for line in lines if "c2w" in line])
    expected = written_path("w*3,l*2", WorldConfig.read(tiny_bundle / "world.yaml").envelope)
    assert np.allclose(recorded[1:], expected) and recorded[3][2, 3] == pytest.approx(1.5)

    assert play.main([*world, "--replay", str(take), "--verify", "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"] is True
    before = film.read_bytes()
    assert (
        play.main(
            [*world, "--replay", str(take), "--headless", "--output", str(tmp_path / "again.mp4")]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["latents"] == 6
    assert film.read_bytes() == before


@pytest.mark.parametrize("rest", [True, False])
def test_headless_rest_keeps_the_length_of_the_film(
    play, still_bundle, tmp_path, capsys, torch_settings, rest
):
    film = tmp_path / "walk.mp4"
    take = tmp_path / "take"
    world = ["--world", str(still_bundle), "--threads", "1"]
    walk = ["--headless", "--trajectory", "w*2,wait*5,w*1", *([] if rest else ["--no-rest"])]
    assert play.main([*world, *walk, "--output", str(film), "--record", str(take)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["latents"], report["rested"]) == ((4, 5) if rest else (9, 0))
    with av.open(str(film)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 4 * 9 - 3
    assert len(read_log(take).lines) == report["latents"]
    assert play.main([*world, "--replay", str(take), "--verify"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"] is True
    if not rest:
        assert play.main([*world, "--replay", str(take), "--verify", "--no-rest"]) == 2
        assert "--no-rest cannot be combined" in capsys.readouterr().err
        assert play.main([*world, "--replay", str(take), "--verify", "--recall", "1"]) == 2
        assert "--recall and --recall-memory cannot be combined" in capsys.readouterr().err


def test_a_walk_that_fails_leaves_the_old_film(
    play, tiny_bundle, tmp_path, capsys, torch_settings, monkeypatch
):
    film = tmp_path / "walk.mp4"
    film.write_bytes(b"older")

    def breaks(self, c2w):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("worldmodel.session.Session.step", breaks)
    assert (
        play.main(
            [
                "--world",
                str(tiny_bundle),
                "--headless",
                "--trajectory",
                "w*3",
                "--output",
                str(film),
            ]
        )
        == 1
    )
    assert "not enough memory" in capsys.readouterr().err
    assert film.read_bytes() == b"older" and [path.name for path in tmp_path.iterdir()] == [
        "walk.mp4"
    ]


def test_without_a_display_it_says_so_and_walks(
    play, tiny_bundle, tmp_path, capsys, torch_settings, monkeypatch
):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "walk.mp4").write_bytes(b"older")
    assert play.main(["--world", str(tiny_bundle), "--trajectory", "w*2"]) == 0
    printed = capsys.readouterr()
    assert "no display" in printed.err and json.loads(printed.out)["output"] == "out/walk-2.mp4"
    assert (tmp_path / "out" / "walk-2.mp4").stat().st_size > 500
    assert (tmp_path / "out" / "walk.mp4").read_bytes() == b"older"

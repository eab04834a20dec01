"""The real window: pygame on a virtual screen, real keys and a real mouse, the program as a player
starts it.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pygame
import pytest

from worldmodel.client.bindings import Bindings
from worldmodel.client.hud import Hud
from worldmodel.client.loop import NO_CAMERA, Loop, LoopOptions, Status
from worldmodel.client.pacer import Pacer
from worldmodel.client.rewind import STEP
from worldmodel.client.scenes import Scene
from worldmodel.client.window import (
    Window,
    WindowOptions,
    _describe_scene,
    _state,
    fit,
    open_display,
)
from worldmodel.controls import Envelope
from worldmodel.engine.engine import HISTORY
from worldmodel.errors import UserError, user_log
from worldmodel.session import FrameChunk
from worldmodel.session_log import read_log
from worldmodel.worlds.labels import Labels

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 120  # seconds until something that must happen is declared missing
QUICK = WindowOptions(error_seconds=0.2)
MISSING = [program for program in ("Xvfb", "xdotool") if shutil.which(program) is None]


def wait_for(condition, what):
    """The first true value of `condition()`."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    pytest.fail(f"{what} did not happen")


@pytest.fixture
def screen():
    """A virtual screen of 1280x800; gives the environment to use it."""
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", "1", "-screen", "0", "1280x800x24", "-nolisten", "tcp"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    display = server.stdout.readline().decode().strip()
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SDL_", "WAYLAND_"))
    }
    yield {**environment, "DISPLAY": f":{display}", "OMP_NUM_THREADS": "1"}
    server.terminate()
    server.wait()


def recorded(folder):
    """c2w [F,4,4] of a recording, also while it is being written."""
    try:
        rows = (folder / "session.jsonl").read_text().split("\n")[:-1]
    except OSError:
        return np.zeros((0, 4, 4))
    return np.array([row["c2w"] for row in map(json.loads, rows) if "c2w" in row]).reshape(-1, 4, 4)


def first_and_last(folder):
    """Indices of the first and the last latent of a recording."""
    lines = read_log(folder).lines
    return lines[0]["index"], lines[-1]["index"]


@pytest.mark.skipif(
    bool(MISSING), reason=f"needs {' and '.join(MISSING)} (Debian packages xvfb and xdotool)"
)
def test_play_in_a_real_window(screen, tiny_bundle, tmp_path):
    def xdotool(*words):
        subprocess.run(["xdotool", *map(str, words)], env=screen, check=True, timeout=20)

    take = tmp_path / "take"
    program = [
        sys.executable,
        str(ROOT / "play.py"),
        "--world",
        str(tiny_bundle),
        "--record",
        str(take),
    ]
    with subprocess.Popen(
        program, env=screen, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as game:
        try:
            wait_for(lambda: len(recorded(take)) > 3 or game.poll() is not None, "the first frames")
            xdotool("keydown", "w")
            wait_for(lambda: len(recorded(take)) and recorded(take)[-1][2, 3] > 1.5, "walking")
            xdotool("keyup", "w", "keydown", "Right")
            wait_for(lambda: recorded(take)[-1][0, 2] > 0.3, "turning right by the arrow")
            xdotool("keyup", "Right", "key", "F1", "key", "F12")
            picture = wait_for(lambda: list(tmp_path.glob("*[0-9].png")), "the screenshot")[0]
            xdotool("mousemove", 500, 400, "click", 1)
            turned = recorded(take)[-1][0, 2]
            for _ in range(20):
                xdotool("mousemove_relative", "--", -9, 0)
                time.sleep(0.02)
            wait_for(lambda: recorded(take)[-1][0, 2] < turned - 0.2, "turning left by the mouse")
            xdotool("key", "F9")
            wait_for(
                lambda: '"end"' in (take / "session.jsonl").read_text(), "the end of the recording"
            )
            xdotool("key", "F9")
            again = tmp_path / "take-2"
            wait_for(lambda: len(recorded(again)) > 1, "a second recording")
            xdotool("key", "Escape")  # only releases the mouse
            count = len(recorded(again))
            wait_for(
                lambda: len(recorded(again)) > count + 3 or game.poll() is not None, "playing on"
            )
            assert game.poll() is None
            xdotool("key", "BackSpace")
            tapped = tmp_path / "take-3"
            wait_for(lambda: len(recorded(tapped)) > 3, "a third recording, after the tap")
            xdotool("keydown", "BackSpace")
            time.sleep(5)  # more than it takes to reach the limit
            xdotool("keyup", "BackSpace")
            held = tmp_path / "take-4"
            wait_for(lambda: len(recorded(held)) > 1, "a fourth recording, after the hold")
            xdotool("key", "Escape")
            assert game.wait(timeout=PATIENCE) == 0, game.stderr.read()
        finally:
            game.kill()
    _, tap_from = first_and_last(again)
    tap_to, hold_from = first_and_last(tapped)
    assert tap_to == tap_from + 1 - STEP  # a take ends with the last latent before the rewind
    limit = max(tap_from, hold_from) + 1 - HISTORY
    assert first_and_last(held)[0] == (limit if limit > 1 else 0)  # 0: the start picture
    path = recorded(take)
    assert np.array_equal(path[0], np.eye(4)) and np.all(np.diff(path[:, 2, 3])[:4] >= 0)
    assert (
        '"end"' in (again / "session.jsonl").read_text()
        and (again / "video.mp4").stat().st_size > 0
    )
    pixels = pygame.surfarray.array3d(pygame.image.load(picture))
    assert pixels.shape == (960, 576, 3) and len(np.unique(pixels[480, :, :], axis=0)) > 10
    assert pixels[2, 288].max() == 0  # 48x32 pixels are shown in 864x576, between black bars


class StubRecorder:
    error = None
    closed = False

    def __init__(self, folder):
        self.folder = folder

    def write(self, *_):
        return True

    def close(self):
        self.closed = True


class OneRoom:
    """Scenes with one grey session whose steps wait until `go` is set."""

    name = "room"
    fps = 16
    chunk = 1
    frames_per_latent = 4
    window = 12
    envelope = Envelope(pitch=0.0)
    labels = Labels()
    camera = True
    rewindable = 0

    def __init__(self):
        self.go = threading.Event()
        self.entered = threading.Event()
        self.index = 0
        self.first = self._chunk(1)
        self.poses = np.eye(4)[None]

    def open(self, scene):
        return self, Scene("grey", None, 0)

    def walls(self, scene, notify):
        return None

    def knowledge(self, scene):
        return ""

    def record(self, folder, session):
        self.recorder = StubRecorder(folder)
        return self.recorder

    def step(self, c2w, early=None):
        self.entered.set()
        self.go.wait()
        self.index += 1
        return self._chunk(4)

    def at_rest(self, c2w):
        return False

    def commit_pending(self):
        pass

    def _chunk(self, count):
        return FrameChunk(np.full((count, 32, 48, 3), 128, np.uint8), self.index, 1, "grey", {})


@pytest.fixture
def dummy(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    assert open_display()
    yield
    pygame.quit()


def press(key, **place):
    pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key, **place))


def moved_by(envelope, *events):
    """Controls and notices after key events (type, key, scancode) of 0.1 s and a latent's time."""
    room = OneRoom()
    room.envelope = envelope
    room.go.set()
    window = Window(Loop(lambda tell: room))
    window.loop.open()
    for kind, key, scancode in events:
        window._handle(pygame.event.Event(kind, key=key, scancode=scancode))
    pose = window.loop._controls.pose_until(window.loop.clock() + 0.25)
    return pose[:3, 3], [words for words, _ in window._notices]


@pytest.mark.parametrize(
    ("key", "scancode", "axis", "sign"),
    [
        (pygame.K_w, pygame.KSCAN_W, 2, 1),
        (pygame.K_z, pygame.KSCAN_W, 2, 1),  # AZERTY writes Z where W lies, and Q where A lies
        (pygame.K_q, pygame.KSCAN_A, 0, -1),
        (0x446, pygame.KSCAN_W, 2, 1),  # Cyrillic
        (0x44B, pygame.KSCAN_S, 2, -1),
        (0x432, pygame.KSCAN_D, 0, 1),
        (pygame.K_SPACE, pygame.KSCAN_SPACE, 1, -1),  # y is down
        (pygame.K_LCTRL, pygame.KSCAN_LCTRL, 1, 1),
    ],
)
def test_movement_keys_are_places(dummy, key, scancode, axis, sign):
    place, notices = moved_by(
        Envelope(forward=0.1, strafe=0.1, vertical=0.1), (pygame.KEYDOWN, key, scancode)
    )
    assert (
        place[axis] * sign == pytest.approx(0.1, rel=0.05)
        and np.count_nonzero(np.abs(place) > 1e-9) == 1
        and not notices
    )


def test_what_only_looks_like_a_movement_key_moves_nothing(dummy):
    for key, scancode in (
        (pygame.K_w, pygame.KSCAN_Z),
        (pygame.K_a, pygame.KSCAN_Q),
    ):  # the letters of AZERTY
        assert not moved_by(Envelope(), (pygame.KEYDOWN, key, scancode))[0].any()
    down, up = ((kind, pygame.K_q, pygame.KSCAN_A) for kind in (pygame.KEYDOWN, pygame.KEYUP))
    assert np.abs(moved_by(Envelope(), down, up)[0]).max() < 0.01


def test_rising_is_locked_where_it_was_not_learned(dummy):
    place, notices = moved_by(Envelope(), (pygame.KEYDOWN, pygame.K_SPACE, pygame.KSCAN_SPACE))
    assert not place.any() and notices == [
        "Rising and sinking is locked: this world has not learned it"
    ]


def test_commands_are_letters_and_on_a_cyrillic_keyboard_places():
    bindings = Bindings()
    assert (
        bindings.action("m", pygame.KSCAN_SEMICOLON) == "change_prompt"
        and bindings.action(",", pygame.KSCAN_M) is None
    )  # AZERTY
    assert (
        bindings.action("\u044c", pygame.KSCAN_M) == "change_prompt"
        and bindings.action("\u043a", pygame.KSCAN_R) == "restart"
    )


@pytest.mark.parametrize("size", [(960, 576), (1920, 1080)])
def test_the_key_hints_fit_the_window(dummy, size):
    pygame.font.init()
    screen = pygame.Surface(size)
    screen.fill((1, 2, 3))
    Hud(screen).help(frozenset(), frozenset(("rise", "sink")), 1.0)
    touched = np.any(pygame.surfarray.array3d(screen) != (1, 2, 3), axis=2)
    assert touched.any() and not touched[[0, -1]].any()


def test_the_window_never_waits_for_the_network(dummy, tmp_path):
    """While a step hangs, keys are still answered: a screenshot is taken and a locked key is named.
    What the world had to say is there.
    """
    room = OneRoom()
    seen = {}
    room.camera = False
    window = Window(Loop(lambda tell: room), WindowOptions(screenshots=tmp_path))

    def notices():
        return [words for words, _ in window._notices]

    def player():
        room.entered.wait(PATIENCE)
        press(pygame.K_UP)
        press(pygame.K_F12)
        seen["pictures"] = wait_for(lambda: list(tmp_path.glob("*[0-9].png")), "the screenshot")
        wait_for(lambda: NO_CAMERA in notices(), "what the world had to say")
        seen["notices"] = notices()
        room.go.set()
        press(pygame.K_ESCAPE)

    thread = threading.Thread(target=player)
    thread.start()
    assert window.run() == 0
    thread.join()
    assert len(seen["pictures"]) == 1
    assert any(words.startswith("Looking up and down is locked") for words in seen["notices"])
    assert NO_CAMERA in seen["notices"]


def test_rest_is_shown(dummy):
    loop = Loop(lambda tell: None)
    window = Window(loop)
    window._open()
    loop.pacer = Pacer(16.0)
    corners = []
    for resting in (False, True):
        status = Status(phase="running", resting=resting)
        window._screen.fill((90, 120, 90))
        window._draw_play(status, 100.0)
        corners.append(pygame.surfarray.array3d(window._screen)[:100, :50])
        rate = {line.name: line.value for line in window._figures(status, 0.0)}
        assert (rate["frames per second"] == "at rest") is resting
    assert not np.array_equal(*corners)


def test_the_screen_tells_what_is_known():
    resting = Status(phase="running", resting=True, knowledge="remembered")
    assert _state(resting) == "remembered, at rest"
    assert _state(replace(resting, phase="paused")) == "remembered"
    assert _state(Status(phase="running", knowledge="imagined")) == "imagined"
    assert _state(Status(phase="running")) == ""
    scene = Scene("meadow", None, 1, "island")
    assert _describe_scene(replace(resting, scene=scene)) == "meadow, island (remembered), seed 1"


def test_figures_before_there_is_a_pose():
    window = Window(Loop(lambda tell: OneRoom()))
    window.loop.pacer = Pacer(16)
    figures = {figure.name: figure.value for figure in window._figures(Status(), 0.0)}
    assert figures["position"] == "x +0.00   y +0.00   z +0.00"


def shown_errors(monkeypatch):
    """The sentences that error screens show from here on, in order."""
    sentences = []
    draw = Hud.error

    def spy(hud, sentence, closing):
        sentences.append(sentence)
        draw(hud, sentence, closing)

    monkeypatch.setattr(Hud, "error", spy)
    return sentences


def test_bad_input_is_shown_and_closes_by_itself(dummy, capsys):
    def fails(tell):
        raise UserError("No such prompt.")

    window = Window(Loop(fails), WindowOptions(error_seconds=0.2))
    assert window.run() == 2
    assert capsys.readouterr().err == "play.py: No such prompt.\n"


@pytest.mark.parametrize("place", ["generator", "window"])
def test_a_bug_is_shown_with_its_log_until_the_player_closes_it(
    dummy, capsys, monkeypatch, tmp_path, place
):
    """An internal ValueError: in either thread it is a bug, and the recording is completed."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    sentences = shown_errors(monkeypatch)
    room = OneRoom()
    room.go.set()
    owner, name = (room, "step") if place == "generator" else (Hud, "notices")

    def planted_bug(*_):
        raise ValueError("zip() argument 2 is longer than argument 1")

    monkeypatch.setattr(owner, name, planted_bug)
    window = Window(Loop(lambda tell: room, LoopOptions(record=tmp_path / "take")), QUICK)

    def player():
        wait_for(lambda: len(sentences) > 3, "the error screen")
        time.sleep(3 * QUICK.error_seconds)  # it would have closed by itself
        wait_for(lambda: room.recorder.closed, "the end of the recording")
        press(pygame.K_ESCAPE)

    thread = threading.Thread(target=player)
    thread.start()
    assert window.run() == 1
    thread.join()
    log = user_log()
    assert log.is_relative_to(tmp_path) and "in planted_bug" in log.read_text()
    (sentence,) = set(sentences)
    assert str(log) in sentence and "zip() argument 2" in sentence and "\n" not in sentence
    assert capsys.readouterr().err == f"play.py: {sentence}\n"


def test_an_error_screen_that_cannot_be_drawn_ends_the_program(dummy, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def fails(tell):
        raise UserError("No such prompt.")

    def planted_bug(*_):
        raise ValueError("no font")

    monkeypatch.setattr(Hud, "error", planted_bug)
    with pytest.raises(ValueError, match="no font"):
        Window(Loop(fails)).run()


def test_a_long_path_in_an_error_is_broken_into_lines(dummy):
    pygame.font.init()
    hud = Hud(pygame.Surface((960, 576)))
    path = "/home/somebody/" + "a-long-folder-name/" * 9 + "worldmodel.log"
    lines = hud._wrap(f"The log file {path} holds the details.", 24, 700)
    assert "".join(lines).replace(" ", "").count(path.replace(" ", "")) == 1
    assert max(hud.text(line, 24).get_width() for line in lines) <= 700


@pytest.mark.parametrize(
    ("screen_size", "rect"),
    [
        ((960, 576), (0, 0, 960, 576)),
        ((1000, 600), (20, 12, 960, 576)),  # six times, not 6.25 times: every pixel equally large
        ((1920, 1080), (80, 12, 1760, 1056)),
        ((300, 300), (0, 60, 300, 180)),  # once instead of 1.875 times would waste the window
    ],
)
def test_pictures_are_undistorted_and_crisp(screen_size, rect):
    assert tuple(fit((160, 96), screen_size)) == rect

"""The window: shows frames when they are due, time-stamps the input, never waits for the model."""

import math
import os
import sys
import textwrap
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pygame

from worldmodel.cli import BAD_INPUT, print_line, print_progress
from worldmodel.client.bindings import Bindings
from worldmodel.client.failure import Failure, describe
from worldmodel.client.hud import ACCENT, GREEN, LOOKS, NIGHT, RED, WHITE, Figure, Hud
from worldmodel.client.loop import Loop, Status
from worldmodel.controls import MOTIONS
from worldmodel.errors import UserError
from worldmodel.files import recordings_folder, replacing_file
from worldmodel.worlds.labels import Labels

REFRESH = 1 / 25  # seconds between redraws while no frame arrives
REWIND_SECONDS = 1.5  # how long the seconds left to rewind are shown after the key went up
LOCKED = "{} is locked: this world has not learned it"
NAMES = {
    "forward": "Walking",
    "strafe": "Strafing",
    "vertical": "Rising and sinking",
    "yaw": "Turning",
    "pitch": "Looking up and down",
    "run": "Running",
}


@dataclass(frozen=True)
class WindowOptions:
    """How the window looks, and how long it shows what."""

    title: str = "world"
    size: tuple[int, int] = (960, 576)  # pixels
    bindings: Bindings = field(default_factory=Bindings)
    backdrop: Path | None = None  # picture behind the start screen
    labels: Labels = Labels()  # what the world calls its actions
    screenshots: Path = field(default_factory=recordings_folder)  # folder for F12
    help_seconds: float = 12.0  # how long the key hints stay
    notice_seconds: float = 3.5
    error_seconds: float = 20.0  # how long a screen for bad input stays; others stay until closed


def open_display() -> bool:
    """Start pygame's display; return False if there is no screen to show a window on.

    A driver that the user chose with SDL_VIDEODRIVER counts as a screen, the drivers that SDL falls
    back to do not.
    """
    asked = os.environ.get("SDL_VIDEODRIVER")
    if not asked and sys.platform.startswith("linux"):
        if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            return False
    try:
        pygame.display.init()
    except pygame.error:
        return False
    if asked or pygame.display.get_driver() not in ("offscreen", "dummy"):
        return True
    pygame.display.quit()
    return False


def fit(picture: tuple[int, int], screen: tuple[int, int]) -> pygame.Rect:
    """Return where a picture (w, h) goes on a screen (w, h): centred, undistorted, as large as
    possible.

    The scale is a whole number if that fills at least 85 % of the size, so that all pixels are
    equally large.
    """
    scale = min(screen[0] / picture[0], screen[1] / picture[1])
    if math.floor(scale) >= 0.85 * scale:
        scale = math.floor(scale)
    rect = pygame.Rect(0, 0, max(1, round(picture[0] * scale)), max(1, round(picture[1] * scale)))
    rect.center = (screen[0] // 2, screen[1] // 2)
    return rect


class Window:
    """One window on one Loop."""

    def __init__(self, loop: Loop, options: WindowOptions = WindowOptions()):
        self.loop = loop
        self.options = options
        self._picture: pygame.Surface | None = None
        self._held: set[str] = set()  # motions whose key is down
        self._notices: deque[tuple[str, float]] = deque(maxlen=4)  # (text, time)
        self._quit = False
        self._overlay = False
        self._captured = False
        self._rewinding = False  # whether the rewind key is down
        self._rewound_at = -math.inf  # when it last went down or up
        self._opened = None
        self._running_since = None
        self._recording_since = None
        self._failure: Failure | None = None
        self._failed_at = math.inf
        self._drawn = -math.inf
        self._progress = 0.0  # of the start screen's bar, which moves smoothly

    def run(self) -> int:
        """Open the window, play until the player leaves, and return the exit status.

        An error of the generator or of the window itself is shown until the player closes it; the
        recording is complete by then. Status: 2 for bad input, 1 for any other error.
        """
        self._open()
        self.loop.start()
        try:
            while not self._quit:
                self._turn()
        finally:
            self._capture(False)
            pygame.display.quit()
            self.loop.stop()
            for words in self.loop.notices:  # such as where the recording is
                print_line(words)
        self._failure = self._failure or self.loop.status.failure
        return self._failure.status if self._failure else 0

    def _open(self) -> None:
        pygame.font.init()
        self._screen = pygame.display.set_mode(self.options.size, pygame.RESIZABLE)
        pygame.display.set_caption(self.options.title)
        self._backdrop = self._load_backdrop()
        self._hud = Hud(self._screen, self.options.labels)
        self._opened = self.loop.clock()
        self._draw(self._opened)

    def _turn(self) -> None:
        """Handle what happened and show what is due; an error becomes the error screen."""
        try:
            for event in self._events():
                self._handle(event)
            self._tick()
        except Exception as error:
            if self._failure:
                raise  # the error screen itself does not work
            self._fail(describe(error))
            self.loop.request_stop()  # which also completes the recording

    def _fail(self, failure: Failure) -> None:
        self._failure = failure
        self._failed_at = self.loop.clock()
        print_progress(f"play.py: {failure.sentence}")
        self._capture(False)

    # -------------------- input

    def _events(self) -> list[pygame.event.Event]:
        """Return what happened; wait for it no longer than until the next frame is due."""
        due = self.loop.pacer.next_due() if self.loop.pacer and not self._failure else None
        until = min(self._drawn + REFRESH, math.inf if due is None else due)
        milliseconds = int((until - self.loop.clock()) * 1000)
        first = [pygame.event.wait(milliseconds)] if milliseconds > 0 else []
        return first + pygame.event.get()

    def _handle(self, event: pygame.event.Event) -> None:
        now = self.loop.clock()
        if event.type == pygame.QUIT:
            self._quit = True
        elif event.type in (pygame.KEYDOWN, pygame.KEYUP):
            action = self.options.bindings.action(
                pygame.key.name(event.key), event.dict.get("scancode")
            )
            self._handle_key(action, event.type == pygame.KEYDOWN, now)
        elif event.type == pygame.MOUSEMOTION and self._captured:
            self.loop.look(*event.rel, now)
        elif event.type == pygame.MOUSEBUTTONDOWN and event.button == 1:
            if self.loop.status.phase == "running" and not self._failure:
                self._capture(True)
        elif event.type == pygame.WINDOWFOCUSLOST:
            self._let_go(now)
        elif event.type in (pygame.VIDEORESIZE, pygame.WINDOWSIZECHANGED):
            self._screen = pygame.display.get_surface()
            self._hud = Hud(self._screen, self.options.labels)
            self._drawn = -math.inf

    def _handle_key(self, action: str | None, down: bool, now: float) -> None:
        if action in MOTIONS:
            self._move(action, down, now)
        elif action == "rewind":
            self._rewind(down, now)
        elif action and down:
            self._act(action)

    def _move(self, motion: str, down: bool, now: float) -> None:
        if down:
            self._held.add(motion)
            self.loop.press(motion, now)
            if motion in self.loop.status.locked:
                self._notice(LOCKED.format(NAMES[MOTIONS[motion][0]]))
        else:
            self._held.discard(motion)
            self.loop.release(motion, now)

    def _rewind(self, down: bool, now: float) -> None:
        if not down and self._rewinding:
            self._rewinding = False
            self._rewound_at = now
            self.loop.release_rewind()
        elif down and self.loop.status.phase in ("running", "paused"):
            self._rewinding = True
            self._rewound_at = now
            self.loop.press_rewind()

    def _act(self, action: str) -> None:
        phase = self.loop.status.phase
        if action == "escape":
            if self._captured:
                self._capture(False)
            else:
                self._quit = True
        elif action == "overlay":
            self._overlay = not self._overlay
        elif action == "screenshot":
            self._screenshot()
        elif phase in ("running", "paused"):
            self.loop.command(action)

    def _let_go(self, now: float) -> None:
        """Release everything: the keyboard belongs to another window now."""
        self._capture(False)
        self._rewind(False, now)
        for motion in sorted(self._held):
            self.loop.release(motion, now)
        self._held.clear()

    def _capture(self, on: bool) -> None:
        if on and self.loop.status.locked >= LOOKS:
            self._notice(LOCKED.format("Looking around"))
        elif on != self._captured:
            pygame.event.set_grab(on)
            pygame.mouse.set_relative_mode(on)
            self._captured = on
            if on:
                self._notice("The mouse looks around; Esc releases it")

    def _notice(self, words: str) -> None:
        if not any(words == known for known, _ in self._notices):
            self._notices.append((words, self.loop.clock()))

    def _screenshot(self) -> None:
        folder = self.options.screenshots
        path = (
            folder
            / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() // 1_000_000 % 1000:03d}.png"
        )
        try:
            with replacing_file(path) as unfinished:
                pygame.image.save(self._screen, unfinished)
        except (OSError, UserError, pygame.error) as error:
            self._notice(f"The picture could not be saved: {error}")
        else:
            self._notice(f"Saved {path}")

    # -------------------- drawing

    def _tick(self) -> None:
        """Show what is due."""
        now = self.loop.clock()
        status = self.loop.status
        self._follow(status, now)
        frame = self.loop.pacer.take(now) if self.loop.pacer and not self._failure else None
        if frame is not None:
            height, width = frame.picture.shape[:2]
            picture = np.ascontiguousarray(frame.picture)
            self._picture = pygame.image.frombuffer(picture, (width, height), "RGB").convert(
                self._screen
            )
        if frame is not None or now - self._drawn >= REFRESH:
            self._draw(now)
        if frame is not None:
            self.loop.pacer.shown(frame, self.loop.clock())

    def _follow(self, status: Status, now: float) -> None:
        """Take up what the generator has done since the last look."""
        while self.loop.notices:
            self._notice(self.loop.notices.popleft())
        while self._notices and now - self._notices[0][1] > self.options.notice_seconds:
            self._notices.popleft()
        if status.phase == "running" and self._running_since is None:
            self._running_since = now
            for motion in sorted(self._held):
                self.loop.press(motion, now)  # held since before there was a world
        if status.recording is None:
            self._recording_since = None
        elif self._recording_since is None:
            self._recording_since = now
        if status.failure and self._failure is None:
            self._fail(status.failure)
        self._quit |= self._closes_in(now) <= 0

    def _closes_in(self, now: float) -> float:
        """Seconds until the error screen closes by itself, which it does for bad input only."""
        if self._failure is None or self._failure.status != BAD_INPUT:
            return math.inf
        return self.options.error_seconds - (now - self._failed_at)

    def _draw(self, now: float) -> None:
        status = self.loop.status
        self._screen.fill(NIGHT if self._picture is None else (0, 0, 0))
        if self._picture is not None:
            rect = fit(self._picture.get_size(), self._screen.get_size())
            pygame.transform.scale(self._picture, rect.size, self._screen.subsurface(rect))
        elif self._backdrop is not None:
            self._draw_backdrop()
        if self._failure:
            self._hud.error(self._failure.sentence, self._closes_in(now))
        elif self._picture is None:
            share = 1 - math.exp(-min(now - self._drawn, 0.2) / 1.5)
            self._progress += max(status.progress - self._progress, 0.0) * share
            self._hud.start(self.options.title, status.stage, self._progress, now - self._opened)
            self._hud.help(self._lit(), status.locked, 1.0)
        else:
            self._draw_play(status, now)
        pygame.display.flip()
        self._drawn = now

    def _lit(self) -> frozenset[str]:
        """Actions whose key is down."""
        return frozenset((*self._held, "rewind") if self._rewinding else self._held)

    def _draw_backdrop(self) -> None:
        """Fill the window with the backdrop: smoothed, and cropped rather than stretched."""
        picture = self._backdrop.get_size()
        screen = self._screen.get_size()
        scale = max(screen[0] / picture[0], screen[1] / picture[1])
        covering = pygame.transform.smoothscale(
            self._backdrop, [math.ceil(side * scale) for side in picture]
        )
        self._screen.blit(covering, covering.get_rect(center=self._screen.get_rect().center))

    def _draw_play(self, status: Status, now: float) -> None:
        if status.phase == "paused":
            self._hud.paused()
        state = _state(status)
        if state and not self._overlay:  # whose figures say it, in the same corner
            self._hud.state(state)
        since = now - (self._running_since or now)
        opacity = min(max(self.options.help_seconds - since, 0.0), 1.0)
        if self._overlay or status.phase == "paused":
            opacity = 1.0
        if opacity > 0:
            self._hud.help(self._lit(), status.locked, opacity)
        if self._overlay:
            self._hud.figures(self._figures(status, now))
        if self._recording_since is not None:
            self._hud.recording(now - self._recording_since, now % 1.0)
        if self._rewinding or now - self._rewound_at < REWIND_SECONDS:
            self._hud.rewind(status.rewindable)
        life = self.options.notice_seconds
        self._hud.notices(
            [(words, min(1.0, 2 * (life - (now - then)))) for words, then in self._notices]
        )

    def _figures(self, status: Status, now: float) -> list[Figure]:
        """Return the lines of the F1 overlay."""
        slow = status.speed < 0.99
        rate = "at rest" if status.resting else f"{self.loop.pacer.fps(now):.1f}"
        parts = "  ".join(f"{name} {value:.0f}" for name, value in status.timings)
        dropped = self.loop.pacer.dropped
        late = f"{self.loop.pacer.late} chunks / {dropped} frames"
        cached = f"{status.cached} of {status.window} latents, {status.latent} since the start"
        return [
            Figure("frames per second", rate, ACCENT if slow else GREEN),
            Figure("speed", f"{status.speed:.2f} of real time", ACCENT if slow else WHITE),
            Figure("ms per latent", f"{status.milliseconds:.0f}   ({parts})"),
            Figure("key to pixel", self._latency()),
            *_camera_figures(status.pose),
            Figure("cache", cached),
            Figure("back", f"{status.rewindable:.1f} s"),
            Figure("late / dropped", late, RED if dropped else WHITE),
            Figure("scene", _describe_scene(status)),
        ]

    def _latency(self) -> str:
        latency = self.loop.pacer.latency()
        if latency is None:
            return "press a key"
        p50, p95 = (seconds * 1000 for seconds in latency)
        return f"p50 {p50:.0f} ms   p95 {p95:.0f} ms   ({self.loop.pacer.latency_count()})"

    def _load_backdrop(self) -> pygame.Surface | None:
        if self.options.backdrop is None:
            return None
        try:
            return pygame.image.load(self.options.backdrop).convert(self._screen)
        except (pygame.error, OSError):
            return None  # decoration only: the world reports a broken picture where it needs it


def _camera_figures(pose: np.ndarray | None) -> list[Figure]:
    """Position and angles of c2w [4, 4]; F1 may be pressed before there is one."""
    pose = np.eye(4) if pose is None else pose
    x, y, z = pose[:3, 3]
    ahead = pose[:3, 2]
    yaw = math.degrees(math.atan2(ahead[0], ahead[2]))
    pitch = -math.degrees(math.asin(np.clip(ahead[1], -1, 1)))
    return [
        Figure("position", f"x {x:+.2f}   y {y:+.2f}   z {z:+.2f}"),
        Figure("looking", f"yaw {yaw:+.1f}   pitch {pitch:+.1f}"),
    ]


def _state(status: Status) -> str:
    """The words in the corner: whether the scene is known, and whether the camera rests."""
    resting = status.resting and status.phase == "running"
    return ", ".join(filter(None, [status.knowledge, "at rest" if resting else ""]))


def _describe_scene(status: Status) -> str:
    scene = status.scene
    prompt = textwrap.shorten(scene.prompt or "", 40, placeholder=" ...")
    where = scene.place or Path(scene.image or "no picture").stem
    known = f" ({status.knowledge})" if status.knowledge else ""
    return f"{prompt}, {where}{known}, seed {scene.seed}"

"""The window: shows frames when they are due, stamps what the player does, never waits for the
network.
"""

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

from worldmodel.cli import print_line
from worldmodel.client.bindings import Bindings
from worldmodel.client.hud import ACCENT, GREEN, LOOKS, NIGHT, RED, WHITE, Figure, Hud
from worldmodel.client.loop import Loop
from worldmodel.controls import MOTIONS
from worldmodel.errors import UserError
from worldmodel.files import recordings_folder, replacing_file

REFRESH = 1 / 25  # seconds between redraws while no frame arrives (screens, fades, receipts)
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
    title: str = "world"
    size: tuple[int, int] = (960, 576)  # pixels
    bindings: Bindings = field(default_factory=Bindings)
    backdrop: Path | None = None  # picture behind the start screen
    screenshots: Path = field(default_factory=recordings_folder)  # folder for F12
    help_seconds: float = 12.0  # how long the key hints stay
    notice_seconds: float = 3.5
    error_seconds: float = 20.0  # an error screen nobody closes closes itself


def open_display() -> bool:
    """Start pygame's display; False when there is no screen to show a window on.

    A driver that the user chose with SDL_VIDEODRIVER counts as a screen, SDL's own silent
    fall-backs do not.
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
    """Where a picture (w, h) goes on a screen (w, h): centred, undistorted, as large as possible.

    A whole multiple is taken when it fills at least 85 % of that size, so that every pixel is
    equally large.
    """
    scale = min(screen[0] / picture[0], screen[1] / picture[1])
    if math.floor(scale) >= 0.85 * scale:
        scale = math.floor(scale)
    rect = pygame.Rect(0, 0, max(1, round(picture[0] * scale)), max(1, round(picture[1] * scale)))
    rect.center = (screen[0] // 2, screen[1] // 2)
    return rect


class Window:
    """One window on one Loop. `run` returns the process's exit status."""

    def __init__(self, loop: Loop, options: WindowOptions = WindowOptions()):
        self.loop = loop
        self.options = options
        self._picture: pygame.Surface | None = None
        self._held: set[str] = set()  # motions whose key is down
        self._notices: deque[tuple[str, float]] = deque(maxlen=4)  # (text, time)
        self._quit = False
        self._overlay = False
        self._captured = False
        self._opened = self._running_since = self._failed_at = self._recording_since = None
        self._drawn = -math.inf
        self._progress = (
            0.0  # of the start screen's bar, which creeps to where the present stage ends
        )

    def run(self) -> int:
        """Open the window, start the loop, and go on until the player leaves."""
        pygame.font.init()
        self._screen = pygame.display.set_mode(self.options.size, pygame.RESIZABLE)
        pygame.display.set_caption(self.options.title)
        self._backdrop = self._load_backdrop()
        self._hud = Hud(self._screen)
        self._opened = self.loop.clock()
        self._draw(self._opened)
        self.loop.start()
        try:
            while not self._quit:
                for event in self._events():
                    self._handle(event)
                self._tick()
        finally:
            self._capture(False)
            pygame.display.quit()
            self.loop.stop()
            for words in self.loop.notices:  # such as where the recording is
                print_line(words)
        if self.loop.status.phase != "failed":
            return 0
        return 2 if isinstance(self.loop.status.cause, UserError) else 1

    # -------------------- input

    def _events(self) -> list[pygame.event.Event]:
        """What happened; waits until the next frame is due, not longer."""
        due = self.loop.pacer.next_due() if self.loop.pacer else None
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
            if action in MOTIONS:
                self._move(action, event.type == pygame.KEYDOWN, now)
            elif action and event.type == pygame.KEYDOWN:
                self._act(action)
        elif event.type == pygame.MOUSEMOTION and self._captured:
            self.loop.look(*event.rel, now)
        elif (
            event.type == pygame.MOUSEBUTTONDOWN
            and event.button == 1
            and self.loop.status.phase == "running"
        ):
            self._capture(True)
        elif event.type == pygame.WINDOWFOCUSLOST:
            self._let_go(now)
        elif event.type in (pygame.VIDEORESIZE, pygame.WINDOWSIZECHANGED):
            self._screen = pygame.display.get_surface()
            self._hud = Hud(self._screen)
            self._drawn = -math.inf

    def _move(self, motion: str, down: bool, now: float) -> None:
        if down:
            self._held.add(motion)
            self.loop.press(motion, now)
            if motion in self.loop.status.locked:
                self._notice(LOCKED.format(NAMES[MOTIONS[motion][0]]))
        else:
            self._held.discard(motion)
            self.loop.release(motion, now)

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
        """The keyboard went to another window: nothing is held any more."""
        self._capture(False)
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
        frame = self.loop.pacer.take(now) if self.loop.pacer else None
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

    def _follow(self, status, now: float) -> None:
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
        if status.phase == "failed":
            if self._failed_at is None:
                self._failed_at = now
                print(f"play.py: {status.error}", file=sys.stderr)
            self._capture(False)
            self._quit |= now - self._failed_at > self.options.error_seconds

    def _draw(self, now: float) -> None:
        status = self.loop.status
        self._screen.fill(NIGHT if self._picture is None else (0, 0, 0))
        if self._picture is not None:
            rect = fit(self._picture.get_size(), self._screen.get_size())
            pygame.transform.scale(self._picture, rect.size, self._screen.subsurface(rect))
        elif self._backdrop is not None:
            self._draw_backdrop()
        if status.phase == "failed":
            left = self.options.error_seconds - (now - (self._failed_at or now))
            self._hud.error(status.error, max(left, 0.0))
        elif self._picture is None:
            share = 1 - math.exp(-min(now - self._drawn, 0.2) / 1.5)
            self._progress += max(status.progress - self._progress, 0.0) * share
            self._hud.start(self.options.title, status.stage, self._progress, now - self._opened)
            self._hud.help(frozenset(self._held), status.locked, 1.0)
        else:
            self._draw_play(status, now)
        pygame.display.flip()
        self._drawn = now

    def _draw_backdrop(self) -> None:
        """The backdrop softly over the whole window, cropped rather than stretched."""
        picture = self._backdrop.get_size()
        screen = self._screen.get_size()
        scale = max(screen[0] / picture[0], screen[1] / picture[1])
        covering = pygame.transform.smoothscale(
            self._backdrop, [math.ceil(side * scale) for side in picture]
        )
        self._screen.blit(covering, covering.get_rect(center=self._screen.get_rect().center))

    def _draw_play(self, status, now: float) -> None:
        if status.phase == "paused":
            self._hud.paused()
        since = now - (self._running_since or now)
        opacity = min(max(self.options.help_seconds - since, 0.0), 1.0)
        if self._overlay or status.phase == "paused":
            opacity = 1.0
        if opacity > 0:
            self._hud.help(frozenset(self._held), status.locked, opacity)
        if self._overlay:
            self._hud.figures(self._figures(status, now))
        if self._recording_since is not None:
            self._hud.recording(now - self._recording_since, now % 1.0)
        life = self.options.notice_seconds
        self._hud.notices(
            [(words, min(1.0, 2 * (life - (now - then)))) for words, then in self._notices]
        )

    def _figures(self, status, now: float) -> list[Figure]:
        pacer = self.loop.pacer
        latency = pacer.latency()
        pose = (
            np.eye(4) if status.pose is None else status.pose
        )  # F1 may be pressed before there is one
        position = pose[:3, 3]
        ahead = pose[:3, 2]
        yaw = math.degrees(math.atan2(ahead[0], ahead[2]))
        pitch = -math.degrees(math.asin(np.clip(ahead[1], -1, 1)))
        parts = "  ".join(f"{name} {value:.0f}" for name, value in status.timings)
        slow = status.speed < 0.99
        prompt = textwrap.shorten(status.scene.prompt or "", 40, placeholder=" ...")
        return [
            Figure("frames per second", f"{pacer.fps(now):.1f}", ACCENT if slow else GREEN),
            Figure("speed", f"{status.speed:.2f} of real time", ACCENT if slow else WHITE),
            Figure("ms per latent", f"{status.milliseconds:.0f}   ({parts})"),
            Figure(
                "key to pixel",
                "press a key"
                if latency is None
                else (
                    f"p50 {latency[0] * 1000:.0f} ms   p95 {latency[1] * 1000:.0f} ms   "
                    f"({pacer.latency_count()})"
                ),
            ),
            Figure("position", "x {:+.2f}   y {:+.2f}   z {:+.2f}".format(*position)),
            Figure("looking", f"yaw {yaw:+.1f}   pitch {pitch:+.1f}"),
            Figure(
                "memory",
                f"{status.memory} of {status.window} latents, {status.latent} since the start",
            ),
            Figure(
                "late / dropped",
                f"{pacer.late} chunks / {pacer.dropped} frames",
                RED if pacer.dropped else WHITE,
            ),
            Figure(
                "scene",
                (
                    f"{prompt}, {Path(status.scene.image or 'no picture').stem}, seed "
                    f"{status.scene.seed}"
                ),
            ),
        ]

    def _load_backdrop(self) -> pygame.Surface | None:
        if self.options.backdrop is None:
            return None
        try:
            return pygame.image.load(self.options.backdrop).convert(self._screen)
        except (pygame.error, OSError):
            return None  # only decoration; a broken picture is reported by the world that needs it

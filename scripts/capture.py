"""Capture README's moving picture from the real window, on a virtual screen.

    python scripts/capture.py docs/play.webp --screenshot docs/window.png

Starts Xvfb and play.py, presses keys through xdotool as in TIMELINE, and reads the screen at the
world's frame rate. Needs the programs Xvfb and xdotool (Debian packages xvfb and xdotool), and a
machine that plays the world in real time: other work on it shows in the picture.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import cv2
import numpy as np

from worldmodel.files import replacing_file
from worldmodel.images import write_png

ROOT = Path(__file__).resolve().parents[1]
SCREEN = (960, 576)  # pixels: the window's size, so that it fills the screen
FPS = 16
PATIENCE = 180  # seconds until the first frame
# (seconds, words for xdotool): three moods, and one step back
TIMELINE = (
    (0.0, "keydown w"),
    (1.5, "keydown Right"),
    (2.0, "keyup Right"),
    (3.0, "key n"),
    (4.5, "keydown Left"),
    (5.0, "keyup Left"),
    (6.0, "keyup w key BackSpace"),
    (7.0, "key n keydown w"),
    (8.0, "keydown Right"),
    (8.6, "keyup Right"),
)
SECONDS = 10.0
# after that, for the screenshot: back to the first mood, with figures
FIGURES = ((0.0, "key n"), (1.0, "key n"), (2.0, "key F1"), (3.6, "keyup w"))
FIGURES_SECONDS = 3.6


@contextmanager
def virtual_screen(folder: Path) -> Iterator[tuple[dict[str, str], np.ndarray]]:
    """Start Xvfb; yield the environment to use it, and its screen as BGRX uint8 [H, W, 4].

    The screen is the server's own memory, so that reading it costs next to nothing.
    """
    width, height = SCREEN
    words = ["Xvfb", "-displayfd", "1", "-screen", "0", f"{width}x{height}x24"]
    words += ["-fbdir", str(folder), "-nolisten", "tcp"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            display = server.stdout.readline().decode().strip()
            file = folder / "Xvfb_screen0"
            header = np.fromfile(file, ">u4", 25)  # of the format XWD
            offset = int(header[0] + 12 * header[19])  # header and colour map
            pixels = np.memmap(file, np.uint8, "r", offset, (height, width, 4))
            kept = {name: value for name, value in os.environ.items() if name[:4] != "SDL_"}
            yield {**kept, "DISPLAY": f":{display}"}, pixels
        finally:
            server.terminate()


def record(timeline, seconds: float, environment: dict[str, str], screen: np.ndarray) -> list:
    """Press the keys of `timeline`; return the pictures, uint8 [H, W, 3] RGB, at FPS."""
    pictures = []
    waiting = list(timeline)
    presses = []
    started = time.monotonic()
    while len(pictures) < seconds * FPS:
        while waiting and waiting[0][0] <= time.monotonic() - started:
            words = waiting.pop(0)[1].split()
            presses.append(subprocess.Popen(["xdotool", *words], env=environment))
        pictures.append(cv2.cvtColor(np.array(screen), cv2.COLOR_BGRA2RGB))
        time.sleep(max(0.0, len(pictures) / FPS - (time.monotonic() - started)))
    for _, words in waiting:
        presses.append(subprocess.Popen(["xdotool", *words.split()], env=environment))
    for process in presses:
        process.wait()
    return pictures


def write_webp(path: Path, pictures: list, quality: int) -> None:
    """Write an animated WebP that repeats without end."""
    with replacing_file(path) as temporary, av.open(str(temporary), "w") as container:
        options = {"quality": str(quality), "compression_level": "6"}
        stream = container.add_stream("libwebp_anim", rate=FPS, options=options)
        stream.width = SCREEN[0]
        stream.height = SCREEN[1]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def wait_for_frames(screen: np.ndarray) -> None:
    """Return when the first frame has replaced the start screen, which is darker at the top."""
    shade = 0.0
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        before = shade
        shade = float(screen[:40, :, :3].mean())
        if before > 0 and shade > before + 10:
            return
        time.sleep(0.1)
    raise SystemExit(f"play.py showed no frame within {PATIENCE} seconds")


def main() -> None:
    """Play, capture, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="animated WebP to write")
    parser.add_argument("--screenshot", type=Path, help="PNG of the window with figures to write")
    parser.add_argument("--quality", type=int, default=75, help="0 to 100 (default: 75)")
    parser.add_argument("--threads", default="1", help="CPU threads of play.py (default: 1)")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        virtual_screen(Path(folder)) as (environment, screen),
    ):
        play = [sys.executable, str(ROOT / "play.py"), "--threads", args.threads]
        with subprocess.Popen(play, env=environment) as game:
            try:
                wait_for_frames(screen)
                pictures = record(TIMELINE, SECONDS, environment, screen)
                figures = record(FIGURES, FIGURES_SECONDS, environment, screen)
                subprocess.run(["xdotool", "key", "Escape"], env=environment, check=True)
                game.wait(timeout=PATIENCE)
            finally:
                game.kill()
    write_webp(args.output, pictures, args.quality)
    if args.screenshot:
        write_png(args.screenshot, figures[-1])


if __name__ == "__main__":
    main()

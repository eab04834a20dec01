"""Play without a window: walk a path, write a film, report the speed."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from tqdm import tqdm

from worldmodel.cli import print_line, print_progress
from worldmodel.client.options import PlayOptions
from worldmodel.client.paths import tour, within_walls, written_path
from worldmodel.client.scenes import Scene, Scenes, open_scenes
from worldmodel.files import replacing_file

if TYPE_CHECKING:
    from worldmodel.recording import Recorder
    from worldmodel.session import FrameChunk

OUTPUT = Path("out/walk.mp4")


@contextmanager
def open_film(path: Path, fps: float) -> Iterator["Film"]:
    """An H.264 MP4 of `fps` frames a second; it takes the name `path` when the block ends well."""
    with (
        replacing_file(path) as temporary,
        av.open(str(temporary), "w", format="mp4") as container,
    ):
        film = Film(container, fps)
        yield film
        film.finish()


class Film:
    """Encodes frames, uint8 [H, W, 3] and all of one size, into an open container."""

    def __init__(self, container: av.container.OutputContainer, fps: float):
        self._container = container
        self._fps = Fraction(fps).limit_denominator(1001)
        self._stream = None

    def add(self, frames: np.ndarray) -> None:
        """Append uint8 [n, H, W, 3]."""
        if self._stream is None:
            self._stream = self._container.add_stream(
                "libx264", rate=self._fps, options={"crf": "14"}
            )
            height, width = frames.shape[1:3]
            self._stream.height = height - height % 2  # H.264 wants even sizes
            self._stream.width = width - width % 2
            self._stream.pix_fmt = "yuv420p"
        for picture in frames[:, : self._stream.height, : self._stream.width]:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Write the frames that the encoder still holds."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())


def walk(options: PlayOptions) -> int:
    """Write a walk along a path, the tour or a recording as MP4 and print one line of JSON.

    Returns the exit status. A recording that ends early (a full disk) raises OSError at the end,
    when the film is complete.
    """
    output = options.output or _free_name(OUTPUT)
    scenes = _open(options)
    chunks, total, recorder, scene = (
        _replayed(scenes, options) if options.replay else _walked(scenes, options)
    )
    spent = []
    timings = []
    latents = 0
    rested = 0
    try:
        with (
            recorder or nullcontext(),
            open_film(output, scenes.fps) as film,
            tqdm(total=total, desc="walking", unit="latent") as bar,
        ):
            begun = time.perf_counter()
            for chunk in chunks:
                if chunk.latents == 0:
                    rested += len(chunk.frames) // scenes.frames_per_latent
                elif chunk.index > 0:  # the first picture costs more than walking does
                    spent.append((time.perf_counter() - begun) * 1000 / chunk.latents)
                    timings.append(
                        {name: value / chunk.latents for name, value in chunk.timings.items()}
                    )
                if chunk.notice:
                    bar.write(chunk.notice, file=sys.stderr)
                film.add(chunk.frames)
                latents += chunk.latents
                bar.update(chunk.latents or scenes.chunk)
                begun = time.perf_counter()
    except av.FFmpegError as error:
        raise OSError(f"The film {output} could not be written: {error.strerror}.") from None
    print_line(
        json.dumps(_report(scenes, scene, output, (latents, rested), np.array(spent), timings))
    )
    if recorder and recorder.bug:
        raise recorder.bug
    if recorder and recorder.error:
        raise OSError(recorder.error)
    return 0


def verify_recording(options: PlayOptions) -> int:
    """Replay a recording and print the differences as JSON; return 0 if there is none, else 1."""
    from worldmodel.recording import verify

    result = verify(options.replay, _open(options).world)
    print_line(json.dumps(result))
    if result["exact"]:
        return 0
    changed = (
        f", since which {', '.join(result['engine_differs'])} changed"
        if result["engine_differs"]
        else ""
    )
    print_progress(
        f"verify: from latent {result['first_difference']} on the replay differs from the "
        f"recording{changed}. Expected: {result['expected']}."
    )
    return 1


def _open(options: PlayOptions) -> Scenes:
    """Open the world and print the progress."""
    return open_scenes(options, lambda stage, _: print_progress(f"{stage} ..."))


def _replayed(scenes: Scenes, options: PlayOptions) -> tuple[Iterator, None, None, Scene]:
    """Return the FrameChunks of a recording, as `_walked` does."""
    film, scene = scenes.replay(options.replay)
    return (chunk for chunk, _ in film), None, None, scene


def _walked(scenes: Scenes, options: PlayOptions) -> tuple[Iterator, int, "Recorder | None", Scene]:
    """Return the FrameChunks of a path, their number of latents, the recorder if wanted, and the
    scene.

    While the camera rests, a chunk of 0 latents repeats the last picture; it is not recorded.
    """
    path = (
        written_path(options.trajectory, scenes.envelope)
        if options.trajectory
        else tour(scenes.envelope)
    )
    scene = scenes.resolve(_scene(options))
    path = within_walls(path, scenes.walls(scene, print_progress), print_progress)
    path = np.concatenate([path, path[-1:].repeat(-len(path) % scenes.chunk, 0)])
    session, _ = scenes.open(scene)
    first = session.first.latents
    poses = np.concatenate([np.eye(4)[None].repeat(first, 0), path])
    recorder = scenes.record(options.record, session) if options.record else None

    def chunks() -> Iterator:
        chunk = session.first
        for place in (0, *range(first, len(poses), scenes.chunk)):
            c2w = poses[place : place + (scenes.chunk if place else first)]
            if place and session.at_rest(c2w):
                yield _still(chunk, len(c2w) * scenes.frames_per_latent)
                continue
            chunk = session.step(c2w) if place else chunk
            if recorder:
                recorder.write(chunk, c2w)
            yield chunk

    return chunks(), len(poses), recorder, scene


def _scene(options: PlayOptions) -> Scene:
    return Scene(options.prompt, options.image, options.seed, options.place)


def _still(chunk: "FrameChunk", frames: int) -> "FrameChunk":
    """Return `frames` repetitions of the last picture of `chunk`, which count as no latent."""
    pictures = np.repeat(chunk.frames[-1:], frames, 0)
    index = chunk.index + chunk.latents
    return replace(chunk, frames=pictures, index=index, latents=0, timings={}, notice="")


def _report(
    scenes: Scenes,
    scene: Scene,
    output: Path,
    latents: tuple[int, int],
    spent: np.ndarray,
    timings,
) -> dict:
    """Return the figures of a walk, and the machine they were measured on.

    latents: generated, and at rest. spent: milliseconds per latent of each chunk. timings: the same
    by part.
    """
    from worldmodel.bench.machine import describe_machine

    p50, p95 = np.percentile(spent, (50, 95)) if len(spent) else (0.0, 0.0)
    fps = scenes.frames_per_latent * 1000 / p50 if p50 else 0.0
    parts = {
        name: round(float(np.median([part[name] for part in timings])), 1)
        for name in (timings or [{}])[0]
    }
    return {
        "output": str(output),
        "world": scenes.name,
        "place": scene.place,
        "knowledge": scenes.knowledge(scene) or "imagined",
        "latents": latents[0],
        "rested": latents[1],
        "ms_per_latent": {"p50": round(float(p50), 1), "p95": round(float(p95), 1), **parts},
        "frames_per_second": round(fps, 1),
        "of_real_time": round(fps / scenes.fps, 2),
        "machine": describe_machine(scenes.device),
    }


def _free_name(path: Path) -> Path:
    """Return `path`, or `path` with a number if it exists: the default name replaces no film."""
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free

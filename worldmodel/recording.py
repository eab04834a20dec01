"""Record a session so that at most its last moment can be lost, and replay and verify recordings.

A recording is one unbroken take, and a training clip:

    video.mp4      fragmented H.264, readable at any moment; 4F-3 frames for F latents
    session.jsonl  a header, one line per latent, and an end line when it was closed properly
    poses.json     WorldPlay's format, one camera per latent
    meta.yaml      caption (the prompt), fps, source "play:<world>", licence
    start.png      the start image, if the session had one
    start/         the session's state, if recording began in the middle

A recording that began in the middle shows only the last frame of its first latent: pixel frame 0 is
latent 0.
"""

import hashlib
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Self

import av
import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from tqdm import tqdm

from worldmodel.camera import check_poses, write_pose_json
from worldmodel.config import as_dict
from worldmodel.device import is_out_of_memory
from worldmodel.engine.options import EngineOptions
from worldmodel.errors import UserError, first_line, log_bug
from worldmodel.files import lock
from worldmodel.images import read_image, write_png
from worldmodel.rollout import RECALL, RolloutConfig
from worldmodel.saved_session import place_values, saved_place
from worldmodel.session import FrameChunk, Session
from worldmodel.session_log import (
    FORMAT,
    FRAGMENTS,
    IMAGE,
    LOG,
    META,
    POSES,
    STATE,
    VIDEO,
    Log,
    read_log,
    recover,
)
from worldmodel.worlds.world import World

QUEUE = 8  # chunks that may wait for the encoder before play waits with them
KEYFRAME_SECONDS = 0.5  # a fragment of the video ends here: what a crash can cost
SYNC_LATENTS = 16  # latents between two forced writes of the log to the disk
_SYSTEM_ERRORS = (OSError, SafetensorError, av.FFmpegError)  # of files that cannot be written


class Recorder:
    """Writes every chunk of `session` into the new folder `folder`, in a thread of its own.

    Make it between two steps of the session. The session's first chunk is written before the second
    one when the caller has not written it.
    Raises UserError when the folder cannot be begun. Later nothing is raised: when the disk is
    full, or the session was rewound or reset, recording ends, `error` says why in one sentence, and
    what was written stays readable. After a bug of the recorder itself `bug` holds it too.
    """

    def __init__(self, folder, session: Session):
        self.folder = Path(folder)
        self.error: str | None = None
        self.bug: Exception | None = None
        self.latents = 0  # taken so far
        self._session = session
        self._begun = time.perf_counter()
        self._queue: queue.Queue = queue.Queue(QUEUE)
        if self.folder.is_file() or (self.folder.is_dir() and any(self.folder.iterdir())):
            raise UserError(f"{self.folder} exists already; record into a new folder.")
        middle = session.first is None or session.frames > session.first.latents
        self._next = session.frames if middle else 0  # index of the chunk that must come
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files = _Files(self.folder, session, middle)
        except Exception as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            # out of memory: for the copy of the session's state
            if isinstance(error, _SYSTEM_ERRORS) or is_out_of_memory(error):
                raise UserError(
                    f"Recording cannot begin in {self.folder}: {_reason(error)}."
                ) from None
            raise
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def write(self, chunk: FrameChunk, c2w, keys: Sequence[str] = ()) -> bool:
        """Takes a chunk just shown, its poses [4,4] or [F,4,4], and the keys held. False when
        recording has ended.

        Waits only when the encoder is `QUEUE` chunks behind; nothing is dropped.
        """
        if self.error or not self._thread.is_alive():
            return False
        first = self._session.first
        if self._next == 0 and first is not None and chunk.index == first.latents:
            self.write(first, self._session.poses[: first.latents])
        if self._next != chunk.index:
            self.error = (
                f"Recording ended: the session went from latent {self._next} to {chunk.index}, "
                "and a recording is one unbroken take; what was recorded before is kept in "
                f"{self.folder}."
            )
            self.close()
            return False
        poses = check_poses(c2w, chunk.latents, "Recorder.write")
        if not self._put((chunk, poses, tuple(keys), time.perf_counter() - self._begun)):
            return False
        self._next = chunk.index + chunk.latents
        self.latents += chunk.latents
        return True

    def close(self) -> None:
        """Ends the recording; returns when everything is on disk."""
        self._put(None)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _put(self, item) -> bool:
        """Hands an item to the thread, waiting for room; False when the thread has ended."""
        while self._thread.is_alive():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def _work(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                self._files.add(*item)
            if self._files.latents == 0:
                self.error = f"Nothing was recorded, so {self.folder} was not kept."
                return
            self._files.end()
        except _SYSTEM_ERRORS as error:
            self.error = (
                f"Recording ended: {_reason(error)}; what was recorded before is kept in "
                f"{self.folder}."
            )
        except Exception as error:
            self.bug = error
            self.error = (
                f"Recording ended by a bug of this program, whose log is {log_bug(error)}; what "
                f"was recorded before is kept in {self.folder}."
            )
        finally:
            self._files.abandon()
            if self._files.latents == 0:
                shutil.rmtree(self.folder, ignore_errors=True)


class _Files:
    """The open files of a recording; used by one thread."""

    def __init__(self, folder: Path, session: Session, middle: bool):
        config = session.world.config
        self._folder = folder
        self._config = config
        self._trim = middle
        self._poses: list[np.ndarray] = []
        self._written = 0  # latents in poses.json
        size = (config.width, config.height) * 2
        self._pixels = [
            share * pixels for share, pixels in zip(config.intrinsics, size, strict=True)
        ]  # fx, fy, cx, cy
        self._finished = False
        meta = {
            "caption": session.prompt,
            "fps": config.fps,
            "source": f"play:{config.name}",
            "licence": config.licence,
        }
        (folder / META).write_text(
            yaml.safe_dump(meta, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        if session.image is not None:
            write_png(folder / IMAGE, session.image)
        if middle:
            session.save(folder / STATE)
        self._log = (folder / LOG).open("w", encoding="utf-8")
        lock(self._log)
        self._line(_header(session, middle))
        self._raw = (folder / VIDEO).open("wb")
        self._container = av.open(self._raw, "w", format="mp4", options=FRAGMENTS)
        self._stream = self._container.add_stream(
            "libx264", rate=Fraction(config.fps).limit_denominator(1001)
        )
        self._stream.width = config.width
        self._stream.height = config.height
        self._stream.pix_fmt = "yuv420p"
        keyframe = str(max(4, round(config.fps * KEYFRAME_SECONDS)))
        # zerolatency: no frame waits inside the encoder, and any prefix of the stream can be cut
        # off and decoded
        self._stream.options = {
            "crf": "12",
            "preset": "veryfast",
            "tune": "zerolatency",
            "g": keyframe,
        }
        self._stream.codec_context.thread_count = 1

    @property
    def latents(self) -> int:
        """Latents written so far."""
        return len(self._poses)

    def add(
        self, chunk: FrameChunk, poses: np.ndarray, keys: tuple[str, ...], seconds: float
    ) -> None:
        for number, frames in enumerate(_by_latent(chunk)):
            for picture in frames[-1:] if self._trim and not self._poses else frames:
                self._container.mux(
                    self._stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
                )
            self._raw.flush()
            index = chunk.index + number
            self._line(
                {
                    "index": index,
                    "time": round(seconds, 4),
                    "keys": keys,
                    "prompt": chunk.prompt,
                    "c2w": poses[number].tolist(),
                    "K": self._pixels,
                    "chunk": chunk.latents,
                    "timings": {name: round(value, 3) for name, value in chunk.timings.items()},
                    "sha256": _checksum(frames),
                }
            )
            self._poses.append(poses[number])
            if len(self._poses) % SYNC_LATENTS == 0:
                os.fsync(self._log.fileno())
        if len(self._poses) - self._written >= max(SYNC_LATENTS, self._written // 8):
            self._write_poses()

    def end(self) -> None:
        """Closes everything properly."""
        self._container.mux(self._stream.encode())
        self._container.close()
        self._raw.close()
        self._write_poses()
        self._line({"end": True, "latents": len(self._poses)})
        os.fsync(self._log.fileno())
        self._finished = True

    def abandon(self) -> None:
        """Closes what is still open, whatever happens, and makes the most of what is on disk."""
        for close in (self._container.close, self._raw.close, self._log.close):
            try:
                close()
            except (OSError, av.FFmpegError):
                continue
        if not self._finished:
            try:
                recover(self._folder)
            except (OSError, UserError, av.FFmpegError):
                pass  # no room to tidy up: readers call `recover` themselves

    def _write_poses(self) -> None:
        if self._poses:
            config = self._config
            write_pose_json(
                self._folder / POSES,
                np.stack(self._poses),
                config.intrinsics,
                config.width,
                config.height,
            )
            self._written = len(self._poses)

    def _line(self, values: dict) -> None:
        self._log.write(json.dumps(values) + "\n")
        self._log.flush()


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


# -------------------- reading


def replay(folder, world: World) -> Iterator[FrameChunk]:
    """Generates a recording again from its log, chunk by chunk, with the threads and the precision
    it was made with. Raises UserError when the world is not the recorded one.
    """
    folder = Path(folder)
    recover(folder)
    log = read_log(folder)
    header = log.header
    if header["fingerprint"] not in world.fingerprints:
        raise UserError(
            f"{folder} was recorded in the world {header['world']!r} ({header['fingerprint']}), "
            f"not in {world.config.name!r} ({world.fingerprint}); open the same version of the "
            "same world."
        )
    for prompt in log.prompts:  # what cannot be embedded is reported before anything is generated
        world.prompt_encoder.embed(prompt)
    with _as_recorded(header["engine"]):
        yield from _generated_again(folder, log, _recalling(world, header["engine"]))


def _recalling(world: World, recorded: dict) -> World:
    """The world with the recall of a recording; an older one knew none."""
    return world.with_recall({"recall": 0, **recorded.get("rollout", {})})


def _generated_again(folder: Path, log: Log, world: World) -> Iterator[FrameChunk]:
    header = log.header
    lines = list(log.lines)
    if header["middle"]:
        session = Session.load(folder / STATE, world)
    else:
        image = read_image(folder / IMAGE) if header["image"] else None
        chunk = 1 if header["image"] else world.config.rollout.chunk
        if len(lines) < chunk:  # a chunk that was cut in two is not generated
            return
        session = Session(
            world,
            lines[0]["prompt"],
            image,
            header["seed"],
            header["steps"],
            c2w=None if header["image"] else np.array([line["c2w"] for line in lines[:chunk]]),
            place=saved_place(folder, header, world),
        )
        lines = lines[chunk:]
        yield session.first
    while len(lines) >= session.chunk:
        group = lines[: session.chunk]
        lines = lines[session.chunk :]
        if group[0]["prompt"] != session.prompt:
            session.set_prompt(group[0]["prompt"])
        yield session.step(np.array([line["c2w"] for line in group]))


def recorded_engine(
    folder: str | Path, options: EngineOptions
) -> tuple[torch.dtype | None, EngineOptions]:
    """The number type and the options that open a world as it was when `folder` was recorded;
    options other than "auto" stay. None = a record that does not name the type.
    """
    recorded = read_log(folder).header["engine"]
    named = getattr(torch, str(recorded.get("dtype")).removeprefix("torch."), None)
    dtype = named if isinstance(named, torch.dtype) else None
    weights = options.weights
    if weights == "auto":
        weights = recorded.get("weights", weights)
    compile = options.compile
    if compile == "auto" and "compiled" in recorded:
        compile = "on" if recorded["compiled"] else "off"
    return dtype, replace(options, weights=weights, compile=compile)


@contextmanager
def _as_recorded(recorded: dict) -> Iterator[None]:
    """Threads and matmul precision as they were when a recording was made: they decide about the
    last bits.
    """
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(recorded.get("threads", threads))
        torch.set_float32_matmul_precision(recorded.get("precision", precision))
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def engine(world: World, rollout: RolloutConfig) -> dict:
    """What decides about the last bit in addition to the world's weights: written into recordings,
    compared by `verify`.
    """
    return {
        "torch": torch.__version__,
        "device": world.device.type,
        "dtype": str(world.dtype),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "rollout": as_dict(rollout),
        "weights": world.engine.tier.weights,
        "compiled": world.engine.compiled is not None,
    }


def _engine_differences(now: dict, recorded: dict) -> list[str]:
    """Names of what is not as it was when recorded. A record that does not hold a name (an older
    one) says nothing of it; how many latents can be rewound decides no frame.
    """

    def deciding(value):
        if not isinstance(value, dict):
            return value
        older = dict.fromkeys(RECALL) if not value.get("recall") else {}  # decide nothing then
        return {name: (value | older).get(name) for name in now["rollout"] if name != "history"}

    shared = [name for name in now if name in recorded]
    return [name for name in shared if deciding(now[name]) != deciding(recorded[name])]


def verify(folder, world: World) -> dict:
    """Replay a recording and compare its frames.

    Returns "latents"; "exact" (every frame bit-identical); "first_difference" (latent or
    None); "psnr_mean" and "psnr_min" (decibels, against the lossy video, with which other machines
    can be judged); "engine_differs" (names of what is not as it was when recorded: torch, device,
    dtype, kernels, ...); "expected" ("exact" where nothing differs, else "40 dB" against the
    frames that were shown).
    """
    folder = Path(folder)
    recover(folder)
    log = read_log(folder)
    middle = log.header["middle"]
    wrong = []
    psnr = []
    shown = _pictures(folder / VIDEO)
    expected = iter(log.lines)
    with tqdm(total=len(log.lines), desc="verify", unit="latent") as bar:
        for chunk in replay(folder, world):
            for frames in _by_latent(chunk):
                line = next(expected)
                if line["sha256"] != _checksum(frames):
                    wrong.append(line["index"])
                first = middle and line is log.lines[0]
                psnr += [
                    _psnr(picture, next(shown)) for picture in (frames[-1:] if first else frames)
                ]
            bar.update(chunk.latents)
    recorded = log.header["engine"]
    with _as_recorded(recorded):
        now = engine(world, _recalling(world, recorded).rollout(log.header["steps"]))
    differences = _engine_differences(now, recorded)
    return {
        "latents": len(log.lines),
        "exact": not wrong,
        "first_difference": wrong[0] if wrong else None,
        "psnr_mean": float(np.mean(psnr)),
        "psnr_min": float(np.min(psnr)),
        "engine_differs": differences,
        "expected": "40 dB" if differences else "exact",
    }


# -------------------- inside


def _header(session: Session, middle: bool) -> dict:
    config = session.world.config
    # the first chunk was generated with its own prompt
    prompt = session.prompt if middle else session.first.prompt
    return {
        "format": FORMAT,
        "world": config.name,
        "fingerprint": session.world.fingerprint,
        "prompt": prompt,
        "image": session.image is not None,
        "seed": session.seed,
        "steps": session.steps,
        "middle": middle,
        **place_values(session.world, session.place),
        "fps": config.fps,
        "height": config.height,
        "width": config.width,
        "intrinsics": config.intrinsics,
        "engine": engine(session.world, session.config),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _by_latent(chunk: FrameChunk) -> list[np.ndarray]:
    """The frames of each latent: 4, and 1 for latent 0 of a session."""
    first = len(chunk.frames) - 4 * (chunk.latents - 1)
    return np.split(chunk.frames, range(first, len(chunk.frames), 4))


def _checksum(frames: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(frames)).hexdigest()


def _psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        height, width = theirs.shape[:2]
        raise UserError(
            f"{VIDEO} has frames of {height}x{width} pixels, this recording has "
            f"{ours.shape[0]}x{ours.shape[1]}; take an unchanged copy of the recording."
        )
    error = np.mean((ours.astype(np.float64) - theirs) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-2)))


def _pictures(path: Path) -> Iterator[np.ndarray]:
    """Frames uint8 [H,W,3] of a recording's video; UserError when more are asked for than it
    holds.
    """
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (av.FFmpegError, IndexError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); take an unchanged copy of the recording."
        ) from None
    raise UserError(f"{path} ends before {LOG} does; take an unchanged copy of the recording.")

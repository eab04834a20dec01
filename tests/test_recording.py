"""Recordings: exact replay, kill -9, a full disk, and what they are as training clips."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import make_tiny_bundle
from safetensors import SafetensorError

from distill.data.clips import read_clip
from worldmodel.camera import MotionStep, parse_trajectory
from worldmodel.client.loop import Loop, LoopOptions
from worldmodel.client.scenes import Scenes
from worldmodel.engine.options import EngineOptions
from worldmodel.recording import Recorder, recorded_engine, replay, verify
from worldmodel.session import Session
from worldmodel.session_log import read_log, recover
from worldmodel.worlds.world import World

WALK = parse_trajectory("w*6,w+l*8,s*6", MotionStep(0.5, 6.0), style="walk")[1:]

# the program that is killed: it plays without end
ENDLESS = """
import sys, time, numpy as np, torch
from worldmodel.recording import Recorder
from worldmodel.session import Session
from worldmodel.worlds.world import World
session = Session(World.from_pretrained(sys.argv[1], dtype=torch.float32), image="grey-0")
recorder = Recorder(sys.argv[2], session)
while True:
    recorder.write(session.step(np.eye(4)), np.eye(4))
    time.sleep(0.02)
"""


def play(folder, session, poses, prompts=None):
    """Plays `poses` into a recording; returns the frames shown."""
    shown = [session.first.frames] if session.first is not None and session.frames == 1 else []
    with Recorder(folder, session) as recorder:
        for k, pose in enumerate(poses):
            if prompts and k in prompts:
                session.set_prompt(prompts[k])
            chunk = session.step(pose)
            assert recorder.write(chunk, pose, ("forward",))
            shown.append(chunk.frames)
    assert recorder.error is None
    return np.concatenate(shown)


def replayed(folder, world):
    return np.concatenate([chunk.frames for chunk in replay(folder, world)])


def test_replay_is_exact(tiny_world, tmp_path):
    session = Session(tiny_world, image="loud-1", seed=5, steps=1)
    shown = play(tmp_path / "take", session, WALK, prompts={4: "loud"})
    np.testing.assert_array_equal(replayed(tmp_path / "take", tiny_world), shown)
    report = verify(tmp_path / "take", tiny_world)
    assert report["exact"] and report["latents"] == 21 and report["first_difference"] is None
    assert report["engine_differs"] == [] and report["psnr_min"] > 20


@pytest.mark.parametrize("rollout", [{"chunk": 2, "window": 6}, {"window": 3, "sinks": 1}])
def test_replay_of_other_rollouts(tmp_path, rollout):
    world = World.from_pretrained(
        make_tiny_bundle(tmp_path / "tiny", **rollout), dtype=torch.float32
    )
    for name, image in (("generated", None), ("pictured", "grey-0")):
        session = Session(world, image=image)
        play(tmp_path / name, session, WALK[:12].reshape(-1, session.chunk, 4, 4))
        assert verify(tmp_path / name, world)["exact"]


def test_a_take_that_begins_in_the_middle(tiny_world, tmp_path):
    session = Session(tiny_world, image="grey-1")
    for pose in WALK[:6]:
        session.step(pose)
    session.rewind(1)
    shown = play(tmp_path / "take", session, WALK[5:12])
    np.testing.assert_array_equal(replayed(tmp_path / "take", tiny_world), shown)
    assert verify(tmp_path / "take", tiny_world)["exact"]
    clip = read_clip(tmp_path / "take")
    assert len(clip.frames) == 4 * 7 - 3
    np.testing.assert_allclose(clip.c2w, WALK[5:12])


def test_verify_notices(tiny_world, tmp_path):
    play(tmp_path / "take", Session(tiny_world), WALK[:6])
    log = tmp_path / "take" / "session.jsonl"
    rows = [json.loads(row) for row in log.read_text().splitlines()]
    rows[4]["c2w"] = WALK[12].tolist()
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = verify(tmp_path / "take", tiny_world)
    assert not report["exact"] and report["first_difference"] == 3


def test_a_replay_takes_threads_and_precision_from_the_recording(tiny_world, tmp_path):
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    play(tmp_path / "take", Session(tiny_world), WALK[:3])
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("highest")
    report = verify(tmp_path / "take", tiny_world)
    assert report["exact"] and report["engine_differs"] == [] and report["expected"] == "exact"
    for _ in replay(tmp_path / "take", tiny_world):
        settings = torch.get_num_threads(), torch.get_float32_matmul_precision()
        assert settings == (1, "medium")
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (2, "highest")


def test_verify_says_what_another_machine_can_expect(tiny_world, tmp_path):
    play(tmp_path / "take", Session(tiny_world), WALK[:3])
    log = tmp_path / "take" / "session.jsonl"
    header, *lines = log.read_text().splitlines(keepends=True)
    header = json.loads(header)
    header["engine"] |= {"torch": "0.1", "dtype": "torch.bfloat16", "weights": "int8"}
    del header["engine"]["kernels"]  # as in older recordings
    log.write_text(json.dumps(header) + "\n" + "".join(lines))
    report = verify(tmp_path / "take", tiny_world)
    assert report["engine_differs"] == ["torch", "dtype", "weights"]
    assert report["expected"] == "40 dB"
    dtype, options = recorded_engine(tmp_path / "take", EngineOptions())
    assert (dtype, options.weights, options.compile) == (torch.bfloat16, "int8", "off")
    _, options = recorded_engine(tmp_path / "take", EngineOptions(weights="full", compile="on"))
    assert (options.weights, options.compile) == ("full", "on")


def test_a_recording_is_a_clip(tiny_world, tmp_path):
    shown = play(tmp_path / "take", Session(tiny_world, image="grey-0"), WALK[:8])
    clip = read_clip(tmp_path / "take")
    assert clip.frames.shape == shown.shape and len(clip.frames) == 4 * len(clip.c2w) - 3
    np.testing.assert_allclose(clip.c2w, [np.eye(4), *WALK[:8]])
    np.testing.assert_allclose(clip.intrinsics, tiny_world.config.intrinsics)
    assert (clip.caption, clip.fps, clip.source, clip.licence) == (
        "grey",
        16.0,
        "play:tiny",
        "CC0-1.0",
    )
    assert clip.caption in tiny_world.prompts
    line = read_log(tmp_path / "take").lines[-1]
    assert (
        line["index"] == 8 and line["keys"] == ["forward"] and line["K"] == [24.0, 24.0, 24.0, 16.0]
    )


@pytest.mark.slow
def test_kill_9(tiny_world, tiny_bundle, tmp_path):
    folder = tmp_path / "take"
    command = [sys.executable, "-c", ENDLESS, str(tiny_bundle), str(folder)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1]) as process:
        while process.poll() is None and (
            not (folder / "session.jsonl").is_file() or len(_rows(folder)) < 25
        ):
            time.sleep(0.02)
        with pytest.raises(ValueError, match="still being recorded"):
            recover(folder)
        process.send_signal(signal.SIGKILL)
    logged = len(_rows(folder)) - 1
    latents = recover(folder)
    assert 0 <= logged - latents <= 4, "at most one second (4 latents) is lost"
    clip = read_clip(folder)
    assert len(clip.c2w) == latents and len(clip.frames) == 4 * latents - 3
    report = verify(folder, tiny_world)
    assert report["exact"] and report["latents"] == latents
    assert recover(folder) == latents


def _rows(folder):
    return (folder / "session.jsonl").read_bytes().split(b"\n")[:-1]


def test_cut_anywhere(tiny_world, tmp_path):
    """Whatever byte the video and the log end at, what is left is a whole clip or one clear
    sentence.
    """
    whole = tmp_path / "take"
    play(whole, Session(tiny_world), WALK[:12])
    video = (whole / "video.mp4").read_bytes()
    rows = (whole / "session.jsonl").read_bytes().split(b"\n")
    log = b"\n".join(rows[:-2]) + b"\n"  # without the end line
    draw = np.random.default_rng(0)
    recovered = []
    for cut in range(20):
        folder = shutil.copytree(whole, tmp_path / f"cut{cut}")
        (folder / "video.mp4").write_bytes(video[: draw.integers(len(video) // 8, len(video))])
        (folder / "session.jsonl").write_bytes(log[: draw.integers(len(log) // 3, len(log))])
        recovered.append(recover(folder))
        clip = read_clip(folder)
        assert len(clip.c2w) == recovered[-1] and len(clip.frames) == 4 * recovered[-1] - 3
        np.testing.assert_allclose(clip.c2w, [np.eye(4), *WALK][: recovered[-1]])
    assert len(set(recovered)) > 2
    (folder / "session.jsonl").write_bytes(log[: len(rows[0]) + 5])
    with pytest.raises(ValueError, match="nothing can be recovered"):
        recover(folder)


def test_full_disk(tiny_world, tmp_path):
    """A file that cannot grow any more stands for the disk: recording ends with a sentence, play
    goes on.
    """
    session = Session(tiny_world)
    taken = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    recorder = Recorder(tmp_path / "take", session)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        for pose in np.tile(WALK, (3, 1, 1)):
            taken.append(recorder.write(session.step(pose), pose))
        recorder.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Recording ended: File too large; what was recorded before is kept in" in recorder.error
    assert taken[0] and not taken[-1] and session.frames == 61
    latents = recover(tmp_path / "take")
    assert 3 < latents < 60 and len(read_clip(tmp_path / "take").c2w) == latents
    assert verify(tmp_path / "take", tiny_world)["exact"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            r"I/O error: No space left on device \(os error 28\)",
        ),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("CUDA out of memory.\nTry"), "CUDA out of memory"),
    ],
)
def test_a_take_from_the_middle_onto_a_full_disk(tiny_world, tmp_path, monkeypatch, error, reason):
    """F9: the state cannot be saved, so one sentence says that, nothing is left, and the walk goes
    on.
    """
    scenes = Scenes(tiny_world)
    loop = Loop(lambda tell: scenes, LoopOptions(recordings=tmp_path / "takes"))
    loop.open()
    loop._generate()
    loop._generate()

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("worldmodel.session.save_file", full)
        loop.command("record")
        loop.turn()
    assert re.fullmatch(rf"Recording cannot begin in {tmp_path}\S+: {reason}\.", loop.notices[-1])
    assert list((tmp_path / "takes").iterdir()) == [] and loop.status.recording is None
    loop._generate()
    loop.command("record")  # there is room again
    loop.turn()
    loop._generate()
    loop.command("record")  # ends it
    loop.turn()
    loop.stop()
    (take,) = (tmp_path / "takes").iterdir()
    assert loop.status.latent >= 4 and verify(take, tiny_world)["exact"]


def test_one_unbroken_take(tiny_world, tmp_path):
    session = Session(tiny_world)
    recorder = Recorder(tmp_path / "take", session)
    for pose in WALK[:5]:
        recorder.write(session.step(pose), pose)
    session.rewind(2)
    assert not recorder.write(session.step(WALK[8]), WALK[8])
    assert "from latent 6 to 4" in recorder.error
    recorder.close()
    assert recover(tmp_path / "take") == 6 and verify(tmp_path / "take", tiny_world)["exact"]


def test_an_empty_take_is_not_kept(tiny_world, tmp_path):
    recorder = Recorder(tmp_path / "take", Session(tiny_world))
    recorder.close()
    assert "Nothing was recorded" in recorder.error and not (tmp_path / "take").exists()


def test_bad_folders(tiny_world, tmp_path):
    play(tmp_path / "take", Session(tiny_world), WALK[:3])
    with pytest.raises(ValueError, match="exists already"):
        Recorder(tmp_path / "take", Session(tiny_world))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="exists already"):
        Recorder(tmp_path / "file", Session(tiny_world))
    with pytest.raises(ValueError, match="cannot begin"):
        Recorder(tmp_path / "file" / "take", Session(tiny_world))
    with pytest.raises(ValueError, match="is not a recording"):
        read_log(tmp_path)
    other = make_tiny_bundle(tmp_path / "worlds" / "tiny", window=5)
    with pytest.raises(ValueError, match="was recorded in the world 'tiny' .* same version"):
        next(replay(tmp_path / "take", World.from_pretrained(other, dtype=torch.float32)))
    assert yaml.safe_load((tmp_path / "take" / "meta.yaml").read_text())["caption"] == "grey"

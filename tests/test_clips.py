"""The clip format on disk, the latent windows for training, and `distill collect`."""

import json
import os
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

from distill.__main__ import main
from distill.data.blocks.collect import BlocksConfig, collect_clip, town_of
from distill.data.blocks.renderer import render_source
from distill.data.clips import (
    INDEX,
    LATENTS,
    META,
    POSES,
    VIDEO,
    LatentClips,
    list_clips,
    read_clip,
    write_clip,
    write_latents,
)
from distill.data.collect import clip_name, make_missing
from worldmodel.camera import invert
from worldmodel.cli import run

ROOT = Path(__file__).resolve().parents[1]
LENS = (0.5, 0.8, 0.5, 0.5)


def poses_of(count: int, offset: float = 0.0) -> np.ndarray:
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, 2, 3] = offset + 0.1 * np.arange(count)
    return poses


def frames_of_pattern(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """A flat square that moves over a flat ground."""
    frames = np.full((count, height, width, 3), (40, 120, 200), np.uint8)
    for index, frame in enumerate(frames):
        frame[8:20, index : index + 12] = (230, 90, 30)
    return frames


def make_clip(root, name="a", latents=4, **changes):
    clip = {
        "frames": frames_of_pattern(4 * latents - 3),
        "c2w": poses_of(latents, 3.0),
        "intrinsics": LENS,
    }
    clip |= {"caption": "meadow", "fps": 16, "source": "blocks:meadow:0", "licence": "Apache-2.0"}
    return write_clip(root, name, **{**clip, **changes})


def test_clip_survives_the_disk(tmp_path):
    folder = make_clip(tmp_path, seed=5)
    clip = read_clip(folder)
    assert clip.frames.shape == (13, 32, 48, 3)
    assert (
        np.abs(clip.frames.astype(int) - frames_of_pattern(13)).mean() < 1.0
    )  # colours and edges survive the codec
    assert np.allclose(clip.c2w, poses_of(4, 3.0)) and np.allclose(clip.intrinsics, LENS)
    assert (clip.caption, clip.fps, clip.source, clip.extra) == (
        "meadow",
        16,
        "blocks:meadow:0",
        {"seed": 5},
    )
    entry = json.loads((folder / POSES).read_text())["3"]
    assert np.allclose(entry["extrinsic"], poses_of(4, 3.0)[3]) and np.allclose(
        np.diag(entry["K"]), [24, 25.6, 1]
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"c2w": poses_of(5)}, "expected 17 video frames for 5 poses"),
        ({"c2w": np.full((4, 4, 4), np.nan)}, "NaN"),
        ({"frames": np.zeros((13, 32, 47, 3), np.uint8)}, "even H and W"),
        ({"frames": np.zeros((13, 32, 48, 3), np.float32)}, "uint8"),
    ],
)
def test_what_is_no_clip_is_not_written(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        make_clip(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_nothing_and_existing_clip_stays(tmp_path, monkeypatch):
    folder = make_clip(tmp_path)
    before = (folder / VIDEO).read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        make_clip(tmp_path)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill.data.clips.write_pose_json", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_clip(tmp_path, "b")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", INDEX]
    assert (folder / VIDEO).read_bytes() == before


def test_index_follows_the_folders(tmp_path):
    names = ["a", "b", "c"]
    for name in names:
        make_clip(tmp_path, name)
    (tmp_path / ".half.7.tmp").mkdir()
    assert [folder.name for folder in list_clips(tmp_path)] == names
    for damage in ("", '{"name": "a"}\n{"na', '{"name": "a"}\n{"name": "b"}\n{"name": "gone"}\n'):
        (tmp_path / INDEX).write_text(damage)
        assert [folder.name for folder in list_clips(tmp_path)] == names
        lines = [json.loads(line) for line in (tmp_path / INDEX).read_text().splitlines()]
        assert [line["name"] for line in lines] == names and lines[0]["source"] == "blocks:meadow:0"
    with pytest.raises(ValueError, match="found none"):
        list_clips(tmp_path / "empty")


def test_broken_clips_are_named(tmp_path):
    def broken(name, damage):
        folder = make_clip(tmp_path, name)
        damage(folder)
        with pytest.raises(ValueError, match=name) as caught:
            read_clip(folder)
        return str(caught.value)

    assert "expected 17 video frames for 5 poses (4F - 3), got 13" in broken("more-poses", add_pose)
    assert "found none" in broken("no-video", lambda folder: (folder / VIDEO).unlink())
    assert "does not decode" in broken(
        "bad-video", lambda folder: (folder / VIDEO).write_bytes(b"no video at all")
    )
    assert "found none" in broken("no-poses", lambda folder: (folder / POSES).unlink())
    assert "caption and fps" in broken(
        "bare-meta", lambda folder: (folder / META).write_text("fps: 16")
    )
    assert "does not parse" in broken(
        "bad-meta", lambda folder: (folder / META).write_text("a: [1")
    )


def add_pose(folder):
    entries = json.loads((folder / POSES).read_text())
    entries[str(len(entries))] = entries["0"]
    (folder / POSES).write_text(json.dumps(entries))


def test_cut_off_recording_is_trimmed_on_request(tmp_path):
    folder = make_clip(tmp_path)
    add_pose(folder)
    clip = read_clip(folder, trim=True)
    assert len(clip.frames) == 13 and len(clip.c2w) == 4
    clip = read_clip(make_clip_with_short_poses(tmp_path), trim=True)
    assert len(clip.frames) == 9 and len(clip.c2w) == 3


def make_clip_with_short_poses(root):
    folder = make_clip(root, "short")
    entries = json.loads((folder / POSES).read_text())
    entries.pop("3")
    (folder / POSES).write_text(json.dumps(entries))
    return folder


def encoded(root, lengths=(6, 9, 3)):
    """Clips whose latents say where they come from: value = 100 * clip + latent."""
    for number, latents in enumerate(lengths):
        folder = make_clip(root, f"clip{number}", latents, caption=f"caption{number}")
        values = 100.0 * number + torch.arange(float(latents))
        write_latents(folder, values.view(1, -1, 1, 1).expand(2, -1, 3, 5))
    return root


def test_latent_windows(tmp_path):
    clips = LatentClips(encoded(tmp_path), frames=5, first_frame_prob=0.5, seed=3)
    again = LatentClips(tmp_path, frames=5, first_frame_prob=0.5, seed=3)
    assert len(clips) == 2  # the third is too short
    starts = []
    for index in range(200):
        item = clips[index]
        first = item["latents"][0, 0, 0, 0].item()
        number, start = divmod(int(first), 100)
        assert item["latents"].shape == (2, 5, 3, 5) and item["latents"].dtype == torch.float32
        assert item["latents"][0, :, 0, 0].tolist() == [first + k for k in range(5)]
        assert item["caption"] == f"caption{number}"
        assert np.allclose(
            item["viewmats"], invert(poses_of(5)), atol=1e-6
        )  # relative to the window's first
        assert np.allclose(item["intrinsics"], LENS)
        assert torch.equal(item["latents"], again[index]["latents"])
        starts.append((number, start))
    assert {number for number, _ in starts[:2]} == {0, 1}  # an epoch sees every clip
    assert {start for number, start in starts if number == 1} == {0, 1, 2, 3, 4}
    share = np.mean([start == 0 for _, start in starts])
    assert 0.5 < share < 0.8  # half by choice, and the rest by chance: 1/2 + 1/2 * (1/2 + 1/5) / 2
    other = LatentClips(tmp_path, frames=5, first_frame_prob=0.5, seed=4)
    assert any(not torch.equal(other[k]["latents"], clips[k]["latents"]) for k in range(20))


def test_latent_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="longest has 9; ask for fewer"):
        LatentClips(encoded(tmp_path), frames=10)
    (tmp_path / "clip1" / LATENTS).write_bytes(b"broken")
    with pytest.raises(ValueError, match="clip1.*safetensors"):
        LatentClips(tmp_path, frames=3)
    (tmp_path / "clip1" / LATENTS).unlink()
    with pytest.raises(ValueError, match="distill encode"):
        LatentClips(tmp_path, frames=3)
    write_latents(tmp_path / "clip1", torch.zeros(2, 12, 3, 5))
    with pytest.raises(ValueError, match="pose for each of 12 latents"):
        LatentClips(tmp_path, frames=3)


COLLECT = [
    "collect",
    "blocks",
    "--latents",
    "2",
    "--height",
    "24",
    "--width",
    "40",
    "--samples",
    "1",
]


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_collect_resumes_to_the_same_clips(tmp_path, workers):
    """Two processes or one, interrupted or not: the same clips, and their towns give the true
    frames back.
    """
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    assert main([*COLLECT, "--output", str(whole), "--clips", "4", "--workers", "1"]) == 0
    assert main([*COLLECT, "--output", str(parts), "--clips", "1", "--workers", "1"]) == 0
    stamp = (parts / "blocks-00000" / VIDEO).stat().st_mtime_ns
    assert main([*COLLECT, "--output", str(parts), "--clips", "4", "--workers", workers]) == 0
    assert (parts / "blocks-00000" / VIDEO).stat().st_mtime_ns == stamp
    for one, other in zip(list_clips(whole), list_clips(parts), strict=True):
        assert (one / VIDEO).read_bytes() == (other / VIDEO).read_bytes()
        assert (one / POSES).read_text() == (other / POSES).read_text()
    captions = [
        yaml.safe_load((folder / META).read_text())["caption"] for folder in list_clips(whole)
    ]
    assert captions == ["meadow", "dunes", "snow", "night"]
    clip = read_clip(whole / "blocks-00001")
    true = render_source(clip.source, clip.c2w, clip.intrinsics, 24, 40, samples=1).numpy()
    assert np.abs(clip.frames[::4].astype(int) - true).mean() < 2


def test_collect_refuses_other_settings(tmp_path, capsys):
    output = ["--output", str(tmp_path), "--workers", "1"]
    assert main([*COLLECT, *output, "--clips", "1"]) == 0
    assert main([*COLLECT, *output, "--clips", "2", "--seed", "1"]) == 2
    assert "choose another --output" in capsys.readouterr().err
    assert main([*COLLECT, *output, "--clips", "1", "--moods", "lava"]) == 2
    assert "meadow, dunes, snow, night" in capsys.readouterr().err
    assert main(["collect", "blocks", *output, "--height", "90"]) == 2
    assert "multiple of 8" in capsys.readouterr().err
    assert [folder.name for folder in list_clips(tmp_path)] == ["blocks-00000"]


def one_dies(config, index):
    """Collects, except that the second clip kills its process once the first is there."""
    if index == 1:
        while not (config.output / clip_name(config, 0)).is_dir():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return collect_clip(config, index)


@pytest.mark.slow
def test_a_killed_worker_is_one_sentence_and_finished_clips_stay(tmp_path, capsys):
    config = BlocksConfig(tmp_path, clips=2, latents=1, height=24, width=40, samples=1)
    assert run("collect", lambda: make_missing(config, one_dies, lambda config, index: {})) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "collect: a worker process died (out of memory?): run again, finished clips are kept; "
        "--workers 1 needs less"
    )
    assert [folder.name for folder in list_clips(tmp_path)] == ["blocks-00000"]


def test_two_collectors_do_not_share_a_folder(tmp_path, capsys):
    """The second one stops with a message and changes nothing; a killed process leaves no lock."""
    output = ["--output", str(tmp_path / "clips"), "--workers", "1", "--clips", "1"]
    holder = "import sys, time; from pathlib import Path; from worldmodel.files import exclusive\n"
    holder += "with exclusive(Path(sys.argv[1])): print('in', flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path / "clips"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as other:
        assert other.stdout.readline() == "in\n"
        half = tmp_path / "clips" / ".blocks-00000.7.tmp" / VIDEO
        half.parent.mkdir()
        half.write_bytes(b"half written")
        assert main([*COLLECT, *output]) == 2
        error = capsys.readouterr().err
        assert error == (
            f"collect: another process is writing into {tmp_path / 'clips'}: wait for its end, or "
            "choose another folder\n"
        )
        assert half.read_bytes() == b"half written"
        other.kill()
    assert main([*COLLECT, *output]) == 0
    assert [folder.name for folder in list_clips(tmp_path / "clips")] == [
        "blocks-00000"
    ] and not half.parent.exists()


def test_heldout_towns_never_occur_in_training(tmp_path):
    towns = {
        split: {
            town_of(BlocksConfig(tmp_path, seed=seed, split=split), k).seed
            for seed in range(4)
            for k in range(500)
        }
        for split in ("train", "heldout")
    }
    assert len(towns["train"]) == 2000 and not towns["train"] & towns["heldout"]


def test_copied_folder_is_a_clip(tmp_path):
    """Nothing but the folder itself makes a clip: it may be moved anywhere."""
    folder = make_clip(tmp_path / "one")
    shutil.copytree(folder, tmp_path / "two" / "moved")
    assert read_clip(list_clips(tmp_path / "two")[0]).caption == "meadow"

"""Import of WorldPlay's and minWM's footage against what the reference's own builder and dataset
made of it.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from distill.__main__ import main
from distill.data.clips import LatentClips, list_clips, read_clip
from distill.data.importers.worldplay import (
    ImportConfig,
    folder_suffixes,
    import_clips,
    read_entries,
    read_frames,
    resize,
)
from worldmodel.camera import invert, relative_to_first

GOLDEN = Path(__file__).parent / "golden"
DATA = GOLDEN / "data"
EXPECTED = load_file(GOLDEN / "lmdb_expected.safetensors")
FACTS = json.loads((GOLDEN / "lmdb_expected.json").read_text())


def check_cameras(c2w, intrinsics, index):
    assert np.allclose(
        invert(relative_to_first(c2w)), EXPECTED[f"latent.{index}.viewmats"], atol=1e-6
    )
    matrices = EXPECTED[f"latent.{index}.Ks"]
    assert np.allclose(
        intrinsics,
        [matrices[0, 0, 0], matrices[0, 1, 1], matrices[0, 0, 2], matrices[0, 1, 2]],
        atol=1e-6,
    )


def check_pixels(frames, index, mean, most):
    pixels = frames.astype(np.float32).transpose(3, 0, 1, 2) / 127.5 - 1
    expected = EXPECTED[f"latent.{index}.pixel_decoded"]
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).mean() < mean and np.abs(pixels - expected).max() < most


@pytest.fixture
def footage(tmp_path):
    shutil.copytree(
        DATA, tmp_path / "data", ignore=shutil.ignore_patterns("*lmdb*", "sharded", "ode_pt")
    )
    return tmp_path / "data"


@pytest.mark.parametrize("poses", ["json", "string"])
def test_clips_are_the_references_samples(footage, tmp_path, poses, capfd):
    if poses == "string":
        shutil.rmtree(footage / "pose_json")
    output = tmp_path / "clips"
    arguments = ["--frames", "15", "--height", "48", "--width", "80", "--output", str(output)]
    assert main(["import", "--input", str(footage / "preencode_input.json"), *arguments]) == 0
    assert (
        "2 clips imported" in (printed := capfd.readouterr()).out
        and "import: warning: 000002_w19" in printed.err
        and "skipped" in printed.err
    )
    folders = list_clips(output)
    assert [folder.name for folder in folders] == ["000000_w3right1d4", "000001_left2s5"]
    for index, folder in enumerate(folders):
        clip = read_clip(folder)
        check_cameras(clip.c2w, clip.intrinsics, index)
        check_pixels(clip.frames, index, mean=0.04, most=0.4)  # it went through H.264
        assert clip.caption == FACTS["prompts"][index] and clip.fps == 16
        assert clip.extra["trajectory"] == FACTS["pose_strings"][index]


def test_decoded_pixels():
    for index, entry in enumerate(read_entries(ImportConfig(DATA, Path("unused")))[:2]):
        frames, _ = read_frames(entry.video, FACTS["max_frames"])
        check_pixels(resize(frames, *FACTS["target_hw"]), index, mean=0.004, most=0.02)


def test_import_is_resumed(footage, tmp_path):
    config = ImportConfig(footage, tmp_path / "clips", height=48, width=80)
    assert import_clips(config) == 2 and import_clips(config) == 0
    shutil.rmtree(tmp_path / "clips" / "000001_left2s5")
    assert import_clips(config) == 1
    with pytest.raises(ValueError, match="expected a clip with height 96"):
        import_clips(ImportConfig(footage, tmp_path / "clips", height=96, width=160))


def test_poses_from_folder_names(footage, tmp_path):
    videos = tmp_path / "videos"
    shutil.copytree(
        footage / "videos" / "000000_w3right1d4", videos / "000000_w2d1"
    )  # 4 poses, 4 latents
    config = ImportConfig(videos, tmp_path / "clips", caption="garden")
    assert import_clips(config) == 1
    clip = read_clip(tmp_path / "clips" / "000000_w2d1")
    assert clip.caption == "garden" and np.allclose(clip.c2w[3, :3, 3], [0.08, 0, 0.16])
    (videos / "000000_w2d1").rename(videos / "000000_w29")
    with pytest.raises(ValueError, match="30 poses, the video 4 latent.*uncertain"):
        import_clips(ImportConfig(videos, tmp_path / "other", caption="garden"))


def test_both_folder_names_of_a_fraction(footage, tmp_path):
    assert folder_suffixes("w-2.9, Right-1") == ("w29right1", "w2.9Right1")
    source = footage / "preencode_input.json"
    entries = json.loads(source.read_text())
    del entries[0]["pose_json_path"]
    entries[0]["pose_str"] = "w-2.9, right-1"
    source.write_text(json.dumps(entries))
    for suffix in folder_suffixes("w-2.9, right-1"):
        next((footage / "videos").glob("000000_*")).rename(footage / "videos" / f"000000_{suffix}")
        assert read_entries(ImportConfig(footage, tmp_path))[0].video.is_file()


def corrupt_pose(footage):
    path = footage / "pose_json" / "000001.json"
    poses = json.loads(path.read_text())
    poses["2"]["extrinsic"][0][0] = float("nan")
    path.write_text(json.dumps(poses))


def shorten(footage):
    path = footage / "pose_json" / "000001.json"
    path.write_text(json.dumps(dict(list(json.loads(path.read_text()).items())[:2])))


def unknown_key(footage):
    shutil.rmtree(footage / "pose_json")
    source = footage / "preencode_input.json"
    source.write_text(source.read_text().replace("left-2, s-5", "x-2, s-5"))
    (footage / "videos" / "000001_left2s5").rename(footage / "videos" / "000001_x2s5")


def break_video(footage):
    (footage / "videos" / "000001_left2s5" / "gen.mp4").write_bytes(b"no video")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (corrupt_pose, "NaN"),
        (shorten, "4 poses are needed"),
        (unknown_key, "'x'"),
        (break_video, "does not decode"),
    ],
)
def test_one_broken_entry_spoils_no_other(footage, tmp_path, harm, message, capsys):
    harm(footage)
    assert main(["import", "--input", str(footage), "--output", str(tmp_path / "clips")]) == 2
    assert message in (text := capsys.readouterr().err.splitlines()[-1]) and "1 of 3" in text
    assert [folder.name for folder in list_clips(tmp_path / "clips")] == ["000000_w3right1d4"]


def test_input_of_no_known_kind(tmp_path):
    with pytest.raises(ValueError, match="cannot read it"):
        import_clips(ImportConfig(tmp_path / "absent", tmp_path / "clips"))
    with pytest.raises(ValueError, match="found none of them"):
        import_clips(ImportConfig(tmp_path, tmp_path / "clips"))
    (tmp_path / "preencode_input.json").write_text('{"caption": "not a list"}')
    with pytest.raises(ValueError, match="expected a JSON list"):
        import_clips(ImportConfig(tmp_path, tmp_path / "clips"))
    (tmp_path / "preencode_input.json").write_text('[{"caption": "lost", "pose_str": "w-3"}]')
    with pytest.raises(ValueError, match="no entry with a video"):
        import_clips(ImportConfig(tmp_path, tmp_path / "clips"))
    with pytest.raises(ValueError, match="multiple of 8"):
        ImportConfig(tmp_path, tmp_path, height=50, width=80)


def test_latent_lmdb(tmp_path):
    pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    output = tmp_path / "clips"
    assert import_clips(ImportConfig(DATA / "latent_lmdb", output)) == 2
    assert import_clips(ImportConfig(DATA / "latent_lmdb", output)) == 0
    samples = LatentClips(output, frames=4)
    by_caption = {samples[index]["caption"]: samples[index] for index in range(2)}
    for index, caption in enumerate(FACTS["prompts"]):
        sample = by_caption[caption]
        assert np.array_equal(
            sample["latents"], EXPECTED[f"latent.{index}.clean_latent"].transpose(1, 0, 2, 3)
        )
        check_cameras(invert(sample["viewmats"].numpy()), sample["intrinsics"], index)
    with pytest.raises(ValueError, match=r"latents_shape '2 6 3 16 4 6'"):
        import_clips(ImportConfig(DATA / "ode_lmdb", tmp_path / "ode"))
    (tmp_path / "data.mdb").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="does not open"):
        import_clips(ImportConfig(tmp_path, tmp_path / "broken"))

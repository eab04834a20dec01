"""ViZDoom footage: the lens, the engine's poses against its pictures, clips on disk."""

import shutil
import sys

import cv2
import numpy as np
import pytest

from distill.__main__ import main
from distill.data import vizdoom
from distill.data.clips import list_clips, read_clip
from distill.data.vizdoom import Game, Lens, VizdoomConfig, camera_pose, collect_clips, levels_of
from worldmodel.camera import invert, rotation

HEIGHT = 96
WIDTH = 160


@pytest.fixture(scope="module")
def game():
    pytest.importorskip("vizdoom", reason="ViZDoom is not installed (extra `collect`)")
    with Game("MAP01", Lens(HEIGHT, WIDTH)) as game:
        yield game


@pytest.fixture
def standing(game):
    """The player at rest in the first room of MAP01, on a floor of height 0, looking along it."""
    game.restart()
    game.warp(-192, -192)
    return game


def shot(game):
    return game.picture().astype(np.float32), camera_pose(game.variables())


def reproject(picture, new, old, floor=None):
    """`picture` of `old` as `new` would see it, if all is far or on a floor so far below `new`;
    where known.
    """
    camera = np.array(
        [[WIDTH / 2, 0, WIDTH / 2 - 0.5], [0, WIDTH / 2, HEIGHT / 2 - 0.5], [0, 0, 1]]
    )
    move = invert(old) @ new
    ray = move[:3, :3].copy()
    if floor is not None:
        ray += np.outer(move[:3, 3], [0, 1 / floor, 0])
    mapping = camera @ ray @ np.linalg.inv(camera)
    known = (
        cv2.warpPerspective(
            np.ones((HEIGHT, WIDTH)), mapping, (WIDTH, HEIGHT), flags=cv2.WARP_INVERSE_MAP
        )
        == 1
    )
    return cv2.warpPerspective(
        picture, mapping, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    ), known


def grey(picture):
    return cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)


@pytest.mark.parametrize(("turn", "look"), [(8.0, 0.0), (0.0, 12.0), (-6.0, -14.0)])
def test_turning_is_the_rotation_of_the_pose(standing, turn, look):
    before, old = shot(standing)
    standing.act(turn=turn, look=look, tics=1)
    after, new = shot(standing)
    assert np.allclose(new[:3, 3], old[:3, 3])
    assert np.allclose(
        old[:3, :3].T @ new[:3, :3], rotation(turn, look), atol=1e-3
    )  # the engine rounds angles
    predicted, known = reproject(before, new, old)
    assert np.abs(predicted - after)[known].mean() < 0.35 * np.abs(before - after)[known].mean()


def test_turning_right_moves_the_picture_left(standing):
    before, _ = shot(standing)
    standing.act(turn=3.0, tics=1)
    (x, y), _ = cv2.phaseCorrelate(grey(before), grey(shot(standing)[0]))
    assert -6 < x < -3 and abs(y) < 0.5  # 80 pixels * tan(3 degrees) = 4.2 in the middle


def test_walking_forward_follows_z_and_widens_the_picture(standing):
    before, old = shot(standing)
    standing.act(forward=25, tics=10)
    after, new = shot(standing)
    x, y, z = (invert(old) @ new)[:3, 3]
    assert z > 0.05 and abs(x) < 1e-6 and abs(y) < 1e-6
    pictures = [grey(picture).astype(np.uint8) for picture in (before, after)]
    field = cv2.calcOpticalFlowFarneback(*pictures, None, 0.5, 3, 15, 3, 5, 1.2, 0)[..., 0]
    assert np.median(field[:, : WIDTH // 2]) < -0.3 and np.median(field[:, WIDTH // 2 :]) > 0.3


def test_sideways_steps_are_to_scale(standing):
    """Only the true eye height, in the units of the steps, predicts how the floor moves; so the
    lens is right too.
    """
    before, old = shot(standing)
    standing.act(right=24, tics=8)
    after, new = shot(standing)
    x, y, z = (invert(old) @ new)[:3, 3]
    assert x > 0.03 and abs(y) < 1e-6 and abs(z) < 1e-6
    errors = []
    for scale in (0.8, 0.9, 1.0, 1.1, 1.2):
        predicted, known = reproject(
            before, new, old, floor=scale * 41 * vizdoom.UNITS_PER_MAP_UNIT
        )
        known[:66] = known[:, :40] = known[:, 120:] = False  # the rest is not floor
        errors.append(np.abs(predicted - after)[known].mean())
    assert np.argmin(errors) == 2 and errors[2] < 0.8 * min(errors[0], errors[4])


def options(folder, **changes):
    given = {
        "output": folder,
        "clips": 2,
        "latents": 3,
        "height": 48,
        "width": 80,
        "levels": ("map01",),
        "workers": 2,
    }
    return VizdoomConfig(**given | changes)


def test_clips_are_collected_resumed_and_repeated(game, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--clips",
        "2",
        "--latents",
        "3",
        "--height",
        "48",
        "--width",
        "80",
        "--levels",
        "map01",
    ]
    assert main(["collect", "vizdoom", "--output", str(tmp_path / "a"), *arguments]) == 0
    folders = list_clips(tmp_path / "a")
    assert [folder.name for folder in folders] == ["vizdoom-00000", "vizdoom-00001"]
    clip = read_clip(folders[1])
    assert clip.frames.shape == (9, 48, 80, 3) and clip.c2w.shape == (3, 4, 4) and clip.fps == 17.5
    assert clip.caption == "freedoom map01" and np.allclose(
        clip.intrinsics, [0.5, 0.5 * 80 / 48, 0.5, 0.5]
    )
    assert 0 < np.linalg.norm(clip.c2w[2, :3, 3] - clip.c2w[0, :3, 3]) < 1
    assert clip.frames.std() > 5 and not np.array_equal(clip.frames[0], clip.frames[8])

    assert [entry.name for entry in tmp_path.iterdir()] == [
        "a"
    ]  # the engine left nothing where the user stands

    shutil.rmtree(folders[1])
    kept = (folders[0] / "video.mp4").stat().st_mtime_ns
    collect_clips(options(tmp_path / "a"))
    assert (folders[0] / "video.mp4").stat().st_mtime_ns == kept
    again = read_clip(folders[1])
    assert again.frames.shape == clip.frames.shape and np.array_equal(again.c2w, clip.c2w)
    with pytest.raises(ValueError, match="expected a clip with source"):
        collect_clips(options(tmp_path / "a", seed=1))


def test_without_vizdoom(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    assert main(["collect", "vizdoom", "--output", str(tmp_path / "a")]) == 2
    assert "pip install" in (text := capsys.readouterr().err) and text.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_levels_of_the_two_splits_never_meet(tmp_path):
    train = levels_of(options(tmp_path, levels=()))
    held_out = levels_of(options(tmp_path, levels=(), split="heldout"))
    assert train and held_out and not set(train) & set(held_out)
    assert levels_of(options(tmp_path, levels=("e1m5",), split="heldout")) == ("E1M5",)
    wrong = [
        ("MAP40", "train", "got 'MAP40'"),
        ("MAP10", "train", "not belong"),
        ("E1M1", "heldout", "not belong"),
    ]
    for level, split, message in wrong:
        with pytest.raises(ValueError, match=message):
            levels_of(options(tmp_path, levels=(level,), split=split))


def test_pose_of_the_engine():
    pose = camera_pose(np.array([512.0, 0.0, 51.2, 90.0, 350.0]))  # north and 10 degrees up
    assert np.allclose(pose[:3, 3], [0, -0.1, 1])
    assert np.allclose(pose[:3, 0], [0, 0, 1])  # right is east
    assert np.allclose(
        pose[:3, 2], [-np.cos(np.deg2rad(10)), -np.sin(np.deg2rad(10)), 0]
    )  # y is down


def test_lens_keeps_within_the_picture():
    assert Lens(96, 160).most_pitch == vizdoom.MOST_PITCH and Lens(480, 832).render_size == (
        1600,
        1200,
    )
    assert 0 <= Lens(96, 96).most_pitch < vizdoom.MOST_PITCH
    with pytest.raises(ValueError, match="wider than tall"):
        Lens(160, 96)

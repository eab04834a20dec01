"""Poses against the public references (golden case 10); messages for bad poses and texts."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from worldmodel.camera import (
    MotionStep,
    advance,
    check_poses,
    invert,
    parse_trajectory,
    poses_to_vectors,
    read_pose_json,
    relative_to_first,
    rotation,
    vectors_to_poses,
    write_pose_json,
)
from worldmodel.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
META = json.loads((GOLDEN / "camera.json").read_text())


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "camera.safetensors")


@pytest.mark.parametrize("index", range(4))
def test_minwm_text(golden, index):
    c2w = parse_trajectory(META["trajectories"][index])
    np.testing.assert_allclose(invert(c2w), golden[f"traj{index}.viewmats"], atol=1e-6)


@pytest.mark.parametrize("index", range(3))
def test_worldplay_text(golden, index):
    c2w = parse_trajectory(META["pose_strings"][index])
    np.testing.assert_allclose(c2w[:20], golden[f"pose{index}.c2w"], atol=1e-12)
    np.testing.assert_allclose(
        poses_to_vectors(c2w[:20]), golden[f"pose{index}.poses_tq"], atol=1e-6
    )


def test_vectors(golden):
    c2w = vectors_to_poses(golden["raw.poses_tq"])
    np.testing.assert_allclose(invert(relative_to_first(c2w)), golden["raw.viewmats"], atol=2e-6)
    np.testing.assert_allclose(vectors_to_poses(poses_to_vectors(c2w)), c2w, atol=1e-12)


def test_pose_file(golden, tmp_path):
    c2w, intrinsics = read_pose_json(GOLDEN / "pose_worldplay.json")
    np.testing.assert_allclose(c2w[:20], golden["pose0.c2w"], atol=1e-12)
    np.testing.assert_allclose(intrinsics[0], golden["pose0.intrinsics"], atol=1e-7)
    write_pose_json(tmp_path / "poses.json", c2w, intrinsics, 1920, 1080)
    reference = json.loads((GOLDEN / "pose_worldplay.json").read_text())
    ours = json.loads((tmp_path / "poses.json").read_text())
    assert list(ours) == list(reference)
    for key in reference:
        np.testing.assert_allclose(ours[key]["extrinsic"], reference[key]["extrinsic"], atol=1e-12)
        np.testing.assert_allclose(ours[key]["K"], reference[key]["K"], atol=1e-9)
    assert [path.name for path in tmp_path.iterdir()] == ["poses.json"]


def test_text_grammar():
    step = MotionStep(move=0.5, turn=10.0)
    both = parse_trajectory("w+l*4", step)
    assert len(both) == 5 and both[4, 0, 3] > 0 and both[4, 2, 3] > 0
    halves = parse_trajectory("right-0.5, right-.5, w-1", step)
    np.testing.assert_allclose(halves, parse_trajectory("l*1,w*1", step), atol=1e-12)
    assert len(parse_trajectory("w*2.5")) == 4  # the last, unfinished latent counts
    np.testing.assert_allclose(parse_trajectory("w*2.5")[-1, 2, 3], 0.2)
    with pytest.raises(ValueError, match="'q' is unknown"):
        parse_trajectory("w*3, q*2")
    for text in ("", "w", "w*", "w*-2", "3*w", "w*2,,a*1"):
        with pytest.raises(ValueError, match="KEY"):
            parse_trajectory(text)


def test_walk_keeps_to_the_ground():
    c2w = parse_trajectory(
        "l*15,i*10,w*5", MotionStep(1.0, 6.0), style="walk"
    )  # right 90 degrees, up 60, forward
    np.testing.assert_allclose(c2w[-1, :3, 3], [5, 0, 0], atol=1e-12)
    np.testing.assert_allclose(
        c2w[-1, :3, 2], [0.5, -np.sqrt(0.75), 0], atol=1e-12
    )  # looks forward and up
    past_vertical = advance(advance(np.eye(4), [0, 0, 0], 0, 120, "walk"), [0, 0, 1], 0, 0, "walk")
    np.testing.assert_allclose(past_vertical[:3, 3], [0, 0, 1], atol=1e-12)
    flown = parse_trajectory("i*10,w*5", MotionStep(1.0, 6.0))
    assert flown[-1, 1, 3] < -4  # flying follows the view upwards (y is down)


def test_signs():
    assert rotation(10, 0)[0, 2] > 0, "positive yaw looks right (+x)"
    assert rotation(0, 10)[1, 2] < 0, "positive pitch looks up (-y)"
    ahead = np.array([0, 0, 5, 1.0])
    seen = invert(parse_trajectory("l*1")[-1]) @ ahead
    assert seen[0] < 0, "turning right moves the picture left"


def test_relative():
    c2w = parse_trajectory("w*3,j*4,u*2,k*3")
    world = advance(np.eye(4), [3, -2, 7], 40, 20)
    np.testing.assert_allclose(relative_to_first(world @ c2w), c2w, atol=1e-12)


def test_bad_poses(tmp_path):
    good = parse_trajectory("w*3,l*2")
    for fault, spoil in {
        "NaN": lambda p: p.__setitem__((0, 3), np.nan),
        "right angles": lambda p: p.__setitem__((0, 0), 1.5),
        "mirrors": lambda p: p.__setitem__((slice(0, 3), 0), -p[:3, 0]),
        "bottom row": lambda p: p.__setitem__((3, 0), 1.0),
    }.items():
        bad = good.copy()
        spoil(bad[4])
        with pytest.raises(ValueError, match=f"pose 4 .*{fault}"):
            check_poses(bad)
    with pytest.raises(ValueError, match="8 poses are needed .* got 6"):
        check_poses(good, count=8, source="walk.json")
    with pytest.raises(ValueError, match="shape"):
        check_poses(np.zeros((3, 3)))
    for text in ('{"0": {"extrin', "[1, 2]", '{"0": {"extrinsic": [1], "K": "x"}}'):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(UserError, match="WorldPlay's form"):
            read_pose_json(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_pose_json(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="centre"):
        write_pose_json(tmp_path / "p.json", good, [0.5, 0.8, 0.4, 0.5], 160, 96)

"""The town, the renderer and the walker: the fast path against the plain one, geometry against
arithmetic, walls against feet.
"""

import dataclasses

import numpy as np
import pytest
import torch

from distill.data.blocks.renderer import _rays, _View, render, render_source
from distill.data.blocks.town import CELL, MOODS, Town
from distill.data.blocks.walker import Gait, Walker, walk

LENS = (0.5, 0.5 * 160 / 96, 0.5, 0.5)


def pose_at(x, y, z, yaw=0.0, pitch=0.0, roll=0.0) -> np.ndarray:
    yaw, pitch, roll = np.radians([yaw, pitch, roll])
    about_y = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    about_x = np.array(
        [[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]]
    )
    about_z = np.array(
        [[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]]
    )
    pose = np.eye(4)
    pose[:3, :3] = about_y @ about_x @ about_z
    pose[:3, 3] = (x, y, z)
    return pose


def view_of(town: Town, pose: np.ndarray, height: int, width: int, reach: int = 7) -> _View:
    cell = tuple(int(np.floor(pose[k, 3] / CELL)) for k in (0, 2))
    rays = _rays(np.array(LENS), height, width, 1, "cpu")
    return _View(
        town,
        pose,
        np.array(LENS),
        rays,
        cell,
        reach,
        town.boxes(*cell, reach),
        *town.ground(*cell, reach),
    )


def test_bounded_path_equals_plain_path():
    """Walking height, six degrees of freedom, close to walls, above the roofs: the rectangles leave
    nothing out.
    """
    draws = np.random.default_rng(0)
    for mood in MOODS:
        town = Town(mood, 7)
        poses = [
            *walk(town, 9, 3)[::8],
            *(
                pose_at(*draws.uniform((-9, -0.9, -9), (9, -0.05, 9)), *draws.uniform(-90, 90, 3))
                for _ in range(4)
            ),
        ]
        fast, plain = (
            render(town, poses, LENS, 24, 40, plain=flag).int() for flag in (False, True)
        )
        assert fast.float().std() > 10  # there is something to see
        assert (
            (fast - plain).abs().amax(-1) > 1
        ).float().mean() < 2e-4  # rays that graze an edge may fall either way


def test_first_surface_and_shadow_against_arithmetic():
    """Every pixel's hit lies on the box (or the ground) that it names, nothing lies before it;
    shadows follow the sun ray.
    """
    town = Town("dunes", 3)
    place = walk(Town("dunes", 3), 1, 1)[0]
    view = view_of(town, place, 24, 40)
    depth, surface = view._trace()
    shadow = view._shade(depth).flatten().numpy()
    hits = (view.directions * depth).flatten(1).T.double().numpy()
    tiles = len(view.tiles) ** 2
    near = (depth.flatten() < 12).numpy()
    for hit, number in zip(hits[near], surface.flatten().numpy()[near]):
        if number < tiles:
            assert abs(hit[1] - view.ground_y) < 1e-4
            column = np.floor((hit[[0, 2]] - view.corner) * 3 / CELL + 1e-3).astype(int)
            row = divmod(number, len(view.tiles))
            assert np.abs(column - row).max() <= 1 and np.clip(
                row, 0, len(view.tiles) - 1
            ).tolist() == list(row)
        else:
            box, axis = divmod(number - tiles, 3)
            assert (hit > view.low[box] - 1e-4).all() and (hit < view.high[box] + 1e-4).all()
            assert (
                min(abs(hit[axis] - view.low[box][axis]), abs(hit[axis] - view.high[box][axis]))
                < 1e-4
            )
    steps = np.linspace(0.004, 3, 900)[:, None]  # march towards the sun through all boxes
    wrong = 0
    for hit, dark in list(zip(hits, shadow))[::11]:
        if np.linalg.norm(hit) < 6:
            points = (hit + steps * town.look.sun_direction)[:, None]
            inside = ((points > view.low + 2e-3) & (points < view.high - 2e-3)).all(-1).any()
            wrong += bool(inside) != bool(dark)
    assert 0 < shadow[near].mean() < 1 and wrong <= 2


def test_projection_and_axes():
    """A lone known box appears where x right, y down, z forward and the intrinsics say."""
    town = Town("meadow", 0)
    eye = np.array([0.37, -0.17, 0.41])
    view = view_of(town, pose_at(*eye), 96, 160)
    view.low = np.array([[0.5, -0.33, 2.0]])
    view.high = np.array([[0.7, 0.17, 2.4]])
    view.boxes = dataclasses.replace(
        view.boxes,
        **{name: getattr(view.boxes, name)[:1] for name in ("low", "high", "side", "top", "glow")},
    )
    surface = view._trace()[1][0]
    rows, columns = torch.nonzero(
        surface == len(view.tiles) ** 2 + 2, as_tuple=True
    )  # its face across z
    assert (columns.min(), columns.max() + 1) == (round(80 + 80 * 0.25), round(80 + 80 * 0.35))
    assert (rows.min(), rows.max() + 1) == (round(48 - 80 * 0.165), round(48 + 80 * 0.085))


def test_any_resolution_shows_the_same_place():
    town = Town("snow", 11)
    pose = walk(Town("snow", 11), 5, 2)[-1]
    small = render(town, pose, LENS, 24, 40, samples=8)[0].float()
    large = render(town, pose, LENS, 96, 160, samples=2)[0].float()
    assert (small - large.view(24, 4, 40, 4, 3).mean((1, 3))).abs().mean() < 0.6


def test_town_is_endless_and_seeded():
    """The same cells come out of any query, far away too, and other seeds and moods give other
    towns.
    """
    town = Town("meadow", 5)
    for i, j in ((0, 0), (-4, 9), (10_000_000, -10_000_000)):
        wide = town.boxes(i, j, 3)
        narrow = town.boxes(i + 1, j - 1, 1)
        assert len(narrow) and {tuple(row) for row in narrow.low} <= {
            tuple(row) for row in wide.low
        }
    assert not np.array_equal(Town("meadow", 6).boxes(0, 0, 3).low, town.boxes(0, 0, 3).low)
    far = pose_at(10_000_000.3, -0.17, 0.2, 20)
    fast, plain = (render(town, far, LENS, 24, 40, plain=flag).int() for flag in (False, True))
    assert ((fast - plain).abs().amax(-1) > 1).float().mean() < 5e-3 and fast.float().std() > 10
    assert Town.from_source(town.source) == town
    assert torch.equal(
        render_source(town.source, far, LENS, 24, 40), render(town, far, LENS, 24, 40)
    )


def test_moods_differ():
    means = [
        render(Town(mood, 1), walk(Town(mood, 1), 1, 0), LENS, 24, 40).float().mean((0, 1, 2))
        for mood in MOODS
    ]
    assert min((a - b).abs().max() for k, a in enumerate(means) for b in means[:k]) > 15


def test_walk_keeps_its_promises():
    """Seeded, level, inside the envelope, never inside a wall, half of the time forward."""
    gait = Gait()
    forward = []
    for seed in range(8):
        town = Town("night", seed)
        poses = walk(town, 161, seed)
        assert np.array_equal(poses, walk(town, 161, seed)) and not np.array_equal(
            poses, walk(town, 161, seed + 1)
        )
        assert np.allclose(poses[:, 1, 3], -gait.eye) and np.allclose(
            poses[:, 1, 0], 0
        )  # eye height, no roll
        assert np.degrees(np.arcsin(np.abs(poses[:, 1, 2]))).max() <= gait.pitch_limit + 1e-6
        step = np.linalg.norm(np.diff(poses[::4, :3, 3], axis=0), axis=-1)
        assert step.max() <= gait.walk * gait.run + 1e-6
        yaw = np.degrees(np.diff(np.unwrap(np.arctan2(poses[::4, 0, 2], poses[::4, 2, 2]))))
        assert np.abs(yaw).max() <= gait.yaw + 1e-6
        for pose in poses[::5]:
            boxes = town.boxes(*(int(np.floor(pose[k, 3] / CELL)) for k in (0, 2)), 1)
            body = boxes.high[:, 1] > -gait.eye
            gap = pose[[0, 2], 3] - np.clip(
                pose[[0, 2], 3], boxes.low[body][:, [0, 2]], boxes.high[body][:, [0, 2]]
            )
            assert np.linalg.norm(gap, axis=1).min(initial=1) > 0.9 * gait.radius
        ahead = (np.diff(poses[:, :3, 3], axis=0) * poses[1:, :3, 2]).sum(-1)
        forward.append((ahead > 0.01).mean())
    assert 0.35 < np.mean(forward) < 0.75


def test_turning_away_comes_back_exactly():
    walker = Walker(Town("meadow", 2), 0)
    walker.orders = []
    start = walker.yaw
    walker._clearance = lambda yaw: 9.0  # no wall interferes
    walker.orders = walker._turn(75, 0.6) + walker._turn(-75, 0.6) + walker._turn(0.2, 0.001)
    yaws = []
    while walker.orders:
        walker.step()
        yaws.append(walker.yaw - start)
    assert max(yaws) > 60 and abs(yaws[-1] - 0.2) < 0.05


@pytest.mark.parametrize(
    "mistake, words",
    [
        (lambda: Town("lava", 0), "one of the moods meadow"),
        (lambda: Town("meadow", -1), "town seed"),
        (lambda: Town.from_source("vizdoom:map01"), "blocks:meadow:12"),
        (lambda: render(Town("meadow", 0), np.full((1, 4, 4), np.nan), LENS), "finite"),
        (lambda: render(Town("meadow", 0), np.eye(4), LENS, height=0), "at least 1"),
    ],
)
def test_mistakes_are_named(mistake, words):
    with pytest.raises(ValueError, match=words):
        mistake()

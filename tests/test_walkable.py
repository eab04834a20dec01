"""The walkable map: where cameras were, and motion that slides along its border."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from worldmodel.camera import rotation
from worldmodel.errors import UserError
from worldmodel.walkable import PNG, YAML, WalkableMap, Walls
from worldmodel.worlds.place import PLACE, Place

CELL = 0.1
quick = settings(max_examples=150, deadline=None)
share = st.floats(0, 1, exclude_max=True)
coordinate = st.floats(-20, 20)
steps = st.tuples(coordinate, coordinate).map(np.array)


def ground(rows, cell=CELL, origin=(-1.0, 2.0)):
    """A map of text: '.' is walkable; the first line has the smallest z."""
    grid = np.array([[sign == "." for sign in row] for row in rows])
    return WalkableMap(grid, np.array(origin), cell)


ROOM = ground(["." * 40] * 30)
MAZE = ground(
    [
        "..........#..........",
        "..........#..........",
        "....####..#..........",
        "....#..#.....####....",
        "....#..#..#..#.......",
        "....#..#..#..#.......",
        "..........#..#.......",
        "###.#######..#.......",
        ".........#...........",
        "........#............",
        ".......#.............",
    ]
)


@st.composite
def random_maps(draw):
    seed = draw(st.integers(0, 10_000))
    grid = np.random.default_rng(seed).random((12, 14)) < draw(st.floats(0.3, 0.95))
    grid[5, 5] = True
    return WalkableMap(grid, np.array([-0.4, 0.3]), CELL)


def inside(walkable, number, x, z):
    """A walkable position: in the walkable cell with this number."""
    cells = np.argwhere(walkable.grid)
    row, column = cells[number % len(cells)]
    shift = np.clip([x, z], 1e-6, 1 - 1e-6)
    return walkable.origin + (np.array([column, row]) + shift) * walkable.cell


def part_of(walkable, xz):
    """The number of the connected part that a position lies in."""
    column, row = np.floor((xz - walkable.origin) / walkable.cell).astype(int)
    return ndimage.label(walkable.grid)[0][row, column]


@quick
@given(random_maps() | st.just(MAZE), st.integers(0, 5000), share, share, steps)
def test_a_step_ends_on_walkable_ground_and_tunnels_nowhere(walkable, number, x, z, step):
    before = inside(walkable, number, x, z)
    after = walkable.slide(before, before + step / 4)
    assert walkable.contains(after)
    assert part_of(walkable, before) == part_of(walkable, after)
    assert np.hypot(*(after - before)) <= np.hypot(*step) / 4 + 1e-9


@quick
@given(random_maps(), steps, steps)
def test_a_walker_off_the_map_returns_to_it(walkable, before, after):
    assert walkable.contains(walkable.slide(before, after))


@quick
@given(share, share, share, share)
def test_a_step_in_the_open_is_unchanged(x, z, u, v):
    size = np.array([40, 30]) * CELL
    before = ROOM.origin + size * (0.001 + 0.998 * np.array([x, z]))
    after = ROOM.origin + size * (0.001 + 0.998 * np.array([u, v]))
    assert np.array_equal(ROOM.slide(before, after), after)


@quick
@given(st.floats(-1, 1), st.floats(0.01, 1), st.integers(0, 3))
def test_a_straight_wall_keeps_the_motion_along_it(along, towards, side):
    """Against each wall of the room, away from its corners."""
    turn = np.round(rotation(90.0 * side, 0.0)[np.ix_([0, 2], [0, 2])])
    centre = ROOM.origin + np.array([20, 15]) * CELL
    reach = (20 if side % 2 else 15) * CELL
    before = centre + turn @ np.array([0.0, reach - 0.02])
    moved = turn.T @ (ROOM.slide(before, before + turn @ np.array([along, towards])) - before)
    assert moved[0] == pytest.approx(along, abs=1e-9) and -1e-9 <= moved[1] <= 0.02 + 1e-9


def test_a_slanted_wall_does_not_hold_the_walker():
    rows = ["".join("." if column < row else "#" for column in range(60)) for row in range(60)]
    slope = ground(rows)
    position = slope.origin + np.array([10, 13]) * CELL
    for _ in range(20):
        position = slope.slide(position, position + np.array([0.15, 0.0]))
    travelled = position - slope.origin - np.array([10, 13]) * CELL
    assert np.all(travelled > 0.3 * 20 * 0.15)


def test_positions_become_ground_and_small_holes_close():
    angle = np.linspace(0, 2 * np.pi, 200)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    wide = WalkableMap.from_positions(ring, 0.05, 0.2)
    assert wide.contains(ring).all() and not wide.contains([0, 0])
    assert wide.contains([1.17, 0]) and not wide.contains([1.3, 0]) and not wide.contains([99, 0])
    small = WalkableMap.from_positions(0.3 * ring, 0.05, 0.2)
    assert small.contains([0, 0])  # smaller than a camera's disc
    assert WalkableMap.from_positions([[3.0, 4.0]], 0.05, 0.0).grid.sum() == 1
    corner = wide.origin + np.array(wide.grid.shape)[::-1] * wide.cell
    assert np.all(wide.origin < -1.2) and np.all(corner > 1.2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (([[1.0, 2.0, 3.0]],), "positions .N, 2., got .1, 3."),
        ((np.zeros((0, 2)),), "positions .N, 2."),
        (([[np.nan, 0.0]],), "finite positions"),
        (([[0.0, 0.0]], 0.0), "a cell above 0"),
        (([[0.0, 0.0], [1e6, 1e6]],), "too large; raise cell"),
    ],
)
def test_bad_positions(arguments, reason):
    with pytest.raises(UserError, match=reason):
        WalkableMap.from_positions(*arguments)


def test_a_place_is_written_and_read(tmp_path):
    start = np.eye(4)
    start[:3, :3] = rotation(30.0, 0.0)
    start[:3, 3] = 0.3, -0.17, 2.4
    place = Place("quay", "A quay", start, MAZE)
    place.write(tmp_path)
    again = Place.read(tmp_path)
    assert (again.name, again.title) == ("quay", "A quay")
    np.testing.assert_array_equal(again.start, start)
    np.testing.assert_array_equal(again.walkable.grid, MAZE.grid)
    np.testing.assert_array_equal(again.walkable.origin, MAZE.origin)
    assert again.walkable.cell == CELL and isinstance(again.walls, Walls)
    Place("field", "A field", start, None).write(tmp_path / "field")
    field = Place.read(tmp_path / "field")
    assert field.walkable is None and field.walls is None


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (PLACE, None, "place.yaml cannot be read"),
        (PLACE, b"name: x\ntitle: y\n", "the key 'start' is missing"),
        (PLACE, b"name: x\ntitle: y\nstart: [[1.0]]\n", "expected poses"),
        (YAML, None, "walkable.yaml cannot be read"),
        (YAML, b"origin: [0.0]\ncell: 1.0\n", "expected origin"),
        (YAML, b"origin: [0.0, 0.0]\ncell: 0.0\n", "cell must be above 0"),
        (YAML, b"origin: [0.0, .nan]\ncell: 1.0\n", "finite numbers|must be"),
        (PNG, b"not a picture", "not a complete PNG"),
    ],
)
def test_damaged_places(tmp_path, name, content, reason):
    Place("quay", "A quay", np.eye(4), MAZE).write(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        Place.read(tmp_path)


def test_walls_are_where_the_place_has_them():
    start = np.eye(4)
    start[:3, :3] = rotation(90.0, 0.0)
    start[:3, 3] = ROOM.origin[0] + 2.0, -0.17, ROOM.origin[1] + 1.0
    walls = Walls(ROOM, start)
    ahead = np.eye(4)
    ahead[2, 3] = 1.5
    assert walls.slide(np.eye(4), ahead) is ahead
    beyond = np.eye(4)
    beyond[:3, 3] = -0.3, -0.2, 5.0  # left, up and through the wall, 2 units ahead
    reached = walls.slide(ahead, beyond)
    assert reached[0, 3] == pytest.approx(-0.3) and reached[1, 3] == pytest.approx(-0.2)
    assert 1.9 < reached[2, 3] <= 2.0
    turned = reached.copy()
    turned[:3, :3] = rotation(10.0, 0.0)
    pushed = walls.slide(reached, turned + np.outer([0, 0, 1, 0], [0, 0, 0, 0.3]))
    assert np.array_equal(pushed, turned)  # exactly, so that the camera rests at a wall

"""Edges to poses, on a clock made of numbers."""

import numpy as np
import pytest

from worldmodel.camera import invert
from worldmodel.controls import Controls, Envelope
from worldmodel.walkable import WalkableMap, Walls

LATENT = 0.25  # seconds: 4 frames at 16 fps
ENVELOPE = Envelope(
    forward=0.4, strafe=0.3, vertical=0.0, run=1.5, yaw=6.0, pitch=4.0, pitch_limit=30.0
)


def controls(**changes) -> Controls:
    values = {name: getattr(ENVELOPE, name) for name in ENVELOPE.__dataclass_fields__}
    made = Controls(Envelope(**{**values, **changes}), fps=16, sensitivity=0.1)
    made.pose_until(0.0)
    return made


def test_directions():
    for key, axis, sign in [("forward", 2, 1), ("back", 2, -1), ("right", 0, 1), ("left", 0, -1)]:
        made = controls()
        made.press(key, 0.0)
        moved = made.pose_until(LATENT)[:3, 3]
        assert sign * moved[axis] == pytest.approx(0.4 if axis == 2 else 0.3)
        assert np.count_nonzero(moved) == 1
    for turn_right in (lambda c: c.press("turn_right", 0.0), lambda c: c.look(60, 0, 0.1)):
        made = controls()
        turn_right(made)
        assert (invert(made.pose_until(LATENT)) @ [0, 0, 5, 1])[0] < 0, (
            "turning right moves the picture left"
        )
    made = controls()
    made.look(0, -20, 0.1)  # mouse up
    assert (invert(made.pose_until(LATENT)) @ [0, 0, 5, 1])[1] > 0, (
        "looking up moves the picture down"
    )


def test_time_is_exact():
    made = controls()
    made.press("forward", 0.05)
    made.release("forward", 0.10)
    assert made.pose_until(LATENT)[2, 3] == pytest.approx(0.4 * 0.2)
    assert made.pose_until(2 * LATENT)[2, 3] == pytest.approx(0.4 * 0.2)


def test_split_hold_is_the_same():
    """Many edges (key repeat, release and press at one instant, motion events) sum up to one
    hold.
    """
    one = controls(smoothing=0.4)
    many = controls(smoothing=0.4)
    one.press("forward", 0.03)
    one.look(30, -10, 0.2)
    one.release("forward", 0.9)
    for t in np.linspace(0.03, 0.9, 50):
        many.release("forward", t)
        many.press("forward", t)
        many.press("forward", t)
    many.release("forward", 0.9)
    for _ in range(10):
        many.look(3, -1, 0.2)
    for k in range(1, 7):
        np.testing.assert_allclose(
            many.pose_until(k * LATENT), one.pose_until(k * LATENT), atol=1e-12
        )


def test_opposite_keys_and_diagonals():
    made = controls(strafe=0.4)
    made.press("forward", 0.0)
    made.press("back", 0.10)  # the latest wins ...
    made.release("back", 0.20)  # ... and gives way again
    assert made.pose_until(LATENT)[2, 3] == pytest.approx(0.4 * (0.10 - 0.10 + 0.05) / LATENT)
    made = controls(strafe=0.4)
    made.press("forward", 0.0)
    made.press("right", 0.0)
    assert np.linalg.norm(made.pose_until(LATENT)[:3, 3]) == pytest.approx(0.4)
    made.press("run", LATENT)
    start = made.pose
    assert np.linalg.norm((made.pose_until(2 * LATENT) - start)[:3, 3]) == pytest.approx(0.4 * 1.5)


def test_mouse_is_counted_and_carried_one_latent():
    made = controls()
    made.look(100, 0, 0.1)  # 10 degrees, 6 fit
    made.pose_until(LATENT)
    assert made.velocity[3] == pytest.approx(6)
    made.pose_until(2 * LATENT)
    assert made.velocity[3] == pytest.approx(4)
    made.look(500, 0, 0.6)
    yaws = []
    for k in range(3, 7):
        made.pose_until(k * LATENT)
        yaws.append(made.velocity[3])
    assert yaws == pytest.approx([6, 6, 0, 0]), "what waited for one latent is dropped"
    made.look(100, 0, 1.6)
    made.pose_until(7 * LATENT)
    made.look(-100, 0, 1.8)
    made.pose_until(8 * LATENT)
    assert made.velocity[3] == pytest.approx(-6), "turning back answers at once"


def test_momentum():
    made = controls(smoothing=0.5)
    made.press("forward", 0.0)
    speeds = []
    for k in range(1, 5):
        made.release("forward", 0.5) if k == 3 else None
        made.pose_until(k * LATENT)
        speeds.append(made.velocity[0] / 0.4)
    assert speeds == pytest.approx([0.5, 0.75, 0.375, 0.1875])


def test_a_motion_comes_to_rest():
    made = controls(smoothing=0.5)
    assert made.at_rest and made.next_edge is None
    made.press("forward", 0.1)
    assert made.next_edge == 0.1
    made.release("forward", 0.2)
    poses = [made.pose_until(k * LATENT) for k in range(1, 9)]
    assert made.at_rest and np.array_equal(poses[-1], poses[-2])
    assert poses[-1][2, 3] == pytest.approx(0.4 * 0.4, abs=0.03 * 0.4)
    made.press("rise", 2.1)  # locked
    made.pose_until(2.25)
    assert made.at_rest
    made.look(1, 0, 2.3)
    made.pose_until(2.5)
    assert not made.at_rest


def test_pace():
    """A held key is one full step a latent whether poses are asked early or late; a late tap keeps
    its worth.
    """
    made = controls()
    made.press("forward", 0.0)
    for k, t in enumerate((0.2, 0.5, 1.7, 1.8), start=1):
        assert made.pose_until(t)[2, 3] == pytest.approx(0.4 * k)
    assert made.pose_until(1.8)[2, 3] == pytest.approx(0.4 * 4), "no time, no way"
    made = controls()
    made.press("forward", 0.4)
    made.release("forward", 0.5)
    assert made.pose_until(1.0)[2, 3] == pytest.approx(0.4 * 0.1 / LATENT)


def test_never_beyond_the_envelope():
    draw = np.random.default_rng(0)
    made = controls(smoothing=0.6)
    t = 0.0
    keys = [
        "forward",
        "back",
        "left",
        "right",
        "turn_left",
        "turn_right",
        "look_up",
        "look_down",
        "run",
        "rise",
    ]
    for _ in range(400):
        for when in np.sort(draw.uniform(t, t + 0.4, draw.integers(0, 5))):
            getattr(made, draw.choice(["press", "release"]))(draw.choice(keys), when)
            made.look(*draw.normal(0, 60, 2), when)
        t += draw.uniform(0.05, 0.6)
        pose = made.pose_until(t)
        share = made.velocity / np.array([0.4, 0.3, 1, 6, 4])
        assert (
            np.linalg.norm(share[:2]) <= 1.5 + 1e-9
            and abs(share[3]) <= 1 + 1e-9
            and abs(share[4]) <= 1 + 1e-9
        )
        assert share[2] == 0 and abs(np.degrees(np.arcsin(-pose[1, 2]))) <= 30 + 1e-6
        np.testing.assert_allclose(pose[1, 0], 0, atol=1e-9)  # a walker does not roll
    assert abs(pose[1, 3]) < 1e-9


def test_locked_and_reset():
    made = Controls(Envelope(strafe=0.0, pitch=0.0), fps=16)
    assert made.locked == ("right", "left", "rise", "sink", "look_up", "look_down", "run")
    made.press("right", 0.0)
    made.press("run", 0.0)
    made.pose_until(0.0)
    made.look(0, 50, 0.1)
    np.testing.assert_array_equal(made.pose_until(LATENT), np.eye(4))
    assert made.held == ("right", "run")
    made.press("forward", 0.3)
    made.reset(np.eye(4))
    np.testing.assert_array_equal(made.pose_until(60.0), np.eye(4), "the pause is not walked")
    assert made.pose_until(60.25)[2, 3] == pytest.approx(0.08), "the key is still held"
    made.release("right", 60.25)
    made.release("run", 60.25)
    made.release("forward", 60.25)
    assert made.pose_until(60.5)[2, 3] == pytest.approx(0.08)


@pytest.mark.parametrize("style", ["walk", "fly"])
def test_walls_take_the_speed_towards_them(style):
    xz = np.stack(np.meshgrid(np.arange(-3, 3, 0.05), np.arange(-3, 1, 0.05)), -1).reshape(-1, 2)
    walls = Walls(WalkableMap.from_positions(xz, 0.05, 0.0), np.eye(4))
    made = Controls(Envelope(0.4, 0.3, smoothing=0.5, style=style), fps=16, walls=walls)
    free = Controls(Envelope(0.4, 0.3, smoothing=0.5, style=style), fps=16)
    for one in (made, free):
        one.pose_until(0.0)
        one.press("forward", 0.0)
        one.press("right", 0.0)
    for k in range(1, 9):
        walled = made.pose_until(k * LATENT)
        reference = free.pose_until(k * LATENT)
        assert walled[0, 3] == pytest.approx(reference[0, 3])
    assert walled[2, 3] == pytest.approx(1.0, abs=0.1)
    forward, strafe, *_ = made.velocity
    assert forward == pytest.approx(0, abs=1e-9) and strafe == pytest.approx(free.velocity[1])


def test_bad_values():
    with pytest.raises(ValueError, match="Unknown motion 'x'"):
        controls().press("x", 0.0)
    with pytest.raises(ValueError, match="forward must be"):
        Envelope(forward=-1)
    with pytest.raises(ValueError, match="smoothing above 0"):
        Envelope(smoothing=0)
    with pytest.raises(ValueError, match="walk"):
        Envelope(style="swim")
    with pytest.raises(ValueError, match="reset: pose 0"):
        controls().reset(np.full((4, 4), np.nan))

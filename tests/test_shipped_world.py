"""What the shipped world `blocks` must still do: follow the camera, and stay near the true frames
on fixed paths. The renderer draws the truth, so nothing is stored but the floors.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from distill import metrics
from distill.data.blocks.renderer import render
from distill.data.blocks.scenes import scene_of
from distill.evaluate import scores
from distill.evaluate.cases import FLOWS, fidelity_cases, flow_cases
from worldmodel.camera import parse_trajectory, relative_to_first
from worldmodel.session import Session
from worldmodel.worlds.world import World

BLOCKS = Path(__file__).parent.parent / "assets" / "worlds" / "blocks"
HORIZONS = [1, 4, 8]
# Of `fidelity_cases(4, 8, seed=0)`, by kind: PSNR (dB) and correlation with the truth at HORIZONS,
# as measured in float32 at 192x320 pixels less 1 dB and 0.05. A better world passes too; raise them
# then.
FLOORS = {
    "walk": ([28.2, 21.9, 21.1], [0.92, 0.86, 0.83]),
    "forward": ([25.8, 23.7, 18.5], [0.91, 0.87, 0.70]),
    "turn": ([23.2, 15.8, 14.4], [0.78, 0.27, 0.06]),
    "strafe": ([33.5, 27.0, 23.8], [0.91, 0.81, 0.67]),
}
AROUND = "w*4,l*9,j*9,s*4"  # there, around to the right and back to the left, and back again
PLACE_FLOOR = 21.0  # dB at the last three latents; measured 22.0

pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(not (BLOCKS / "world.yaml").is_file(), reason="the world is not there"),
]


@pytest.fixture(scope="module")
def blocks():
    return World.from_pretrained(BLOCKS, dtype=torch.float32)


def true_frames(world, case, latents) -> np.ndarray:
    """The truth at the given latents of a case, uint8 [F, H, W, 3]."""
    config = world.config
    poses = case.latents[latents]
    return render(case.town, poses, config.intrinsics, config.height, config.width).numpy()


def generated_frames(world, case) -> list[np.ndarray]:
    """What a player sees along a case's path from its true first frame: an array [n, H, W, 3] for
    each latent.
    """
    first = true_frames(world, case, [0])
    session = Session(world, case.town.mood, first[0], seed=0)
    walk = [session.step(pose).frames for pose in relative_to_first(case.latents)[1:]]
    return [first, *walk]


def test_pictures_stay_near_the_truth(blocks):
    cases = fidelity_cases(4, max(HORIZONS), seed=0)
    measured = {}
    for case in cases:
        frames = generated_frames(blocks, case)
        image = metrics.to_unit(np.stack([frames[latent][-1] for latent in HORIZONS]))
        truth = metrics.to_unit(true_frames(blocks, case, HORIZONS))
        measured[case.kind] = (metrics.psnr(image, truth), metrics.correlation(image, truth))
    print(measured)  # what the floors are raised to, one day
    assert measured.keys() == FLOORS.keys()
    for kind, (psnr, correlation) in FLOORS.items():
        assert (measured[kind][0] >= torch.tensor(psnr)).all(), (kind, measured[kind])
        assert (measured[kind][1] >= torch.tensor(correlation)).all(), (kind, measured[kind])


def test_a_place_is_still_there_when_one_returns(blocks):
    place = blocks.place("island")
    scene = scene_of(place.source)
    session = Session(blocks, place=place, seed=0)
    path = parse_trajectory(AROUND, style="walk")
    frames = [session.step(pose).frames[-1] for pose in path[1:]]
    config = blocks.config
    poses = place.start @ np.stack(path[1:])
    truth = render(scene, poses[-3:], config.intrinsics, config.height, config.width)
    found = metrics.psnr(metrics.to_unit(np.stack(frames[-3:])), metrics.to_unit(truth))
    print(found)
    assert (found >= PLACE_FLOOR).all(), found


@pytest.mark.parametrize("count", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_picture_moves_as_the_camera_does(blocks, count):
    cases = flow_cases(count, seed=0)
    films = np.stack([np.concatenate(generated_frames(blocks, case)) for case in cases])
    right = scores.flow_directions(films, cases)
    assert right.keys() == set(FLOWS)
    assert right["right"] == right["left"] == 1
    assert min(right.values()) >= 0.75

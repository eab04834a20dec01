"""Evaluation in a place: scores that know the truth, masks in closed form, and whole runs in a tiny
random world that remembers the island.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_tiny_bundle, read_conditions

from distill.__main__ import main
from distill.data.blocks.island import Island
from distill.data.blocks.renderer import FAR, render, render_depth
from distill.data.blocks.town import MOODS
from distill.evaluate.against import localise, reprojected, warped_lookup
from distill.evaluate.generate import parse_variant
from distill.evaluate.knowable import earlier_latents, knowable
from distill.evaluate.place_cases import Ground
from distill.evaluate.place_report import plot
from distill.evaluate.place_run import evaluate_suites, parse_suites
from distill.evaluate.place_suites import (
    Bench,
    SuiteOptions,
    _against,
    masked_scores,
    masks,
    merged,
    statistics,
)
from distill.metrics import psnr, to_unit
from worldmodel.camera import advance
from worldmodel.errors import UserError
from worldmodel.models.prompts import PromptBook
from worldmodel.reprojection import RememberedViews
from worldmodel.session import Session
from worldmodel.walkable import WalkableMap
from worldmodel.worlds.place import Place
from worldmodel.worlds.place_views import write_views
from worldmodel.worlds.world import World

ISLAND = Island("meadow")
LENS = (0.5, 0.75, 0.5, 0.5)
SQUARE = np.array(
    [[1, 0, 0, 18 / 3 * 1.1], [0, 1, 0, -0.17], [0, 0, 1, 14.5 / 3 * 1.1], [0, 0, 0, 1.0]]
)  # on the market, looking north


class Nearby(Island):
    """The island without what stands far from the camera: pictures in a fraction of the time."""

    reach = 1


def around(count: int) -> np.ndarray:
    """Cameras that turn around on the market square, with small steps."""
    turn = 360 / count
    return np.stack([advance(SQUARE, [0, 0, 0.02 * k], turn * k, 0) for k in range(count)])


@pytest.fixture(scope="module")
def island_world(tmp_path_factory):
    """A tiny world with random weights that remembers the island's market, under the moods."""
    folder = make_tiny_bundle(tmp_path_factory.mktemp("evaluated") / "tiny")
    read_conditions(folder)
    moods = {mood: torch.full((3, 8), float(i)) for i, mood in enumerate((*MOODS, "grey", "loud"))}
    PromptBook(moods).save(folder / "prompts.safetensors")
    c2w = around(12)
    seen = RememberedViews(
        render(ISLAND, c2w, LENS, 32, 48), render_depth(ISLAND, c2w, LENS, 32, 48), c2w, LENS
    )
    walkable = ISLAND.walkable()
    for name, source in (("island", ISLAND.source), ("bare", "vizdoom:1")):
        place = Place(name, name, c2w[0], WalkableMap(walkable.T, np.zeros(2), 0.1), source=source)
        (folder / "places" / name).mkdir(parents=True)
        place.write(folder / "places" / name)
        write_views(folder / "places" / name, seen)
    return World.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def ground(island_world):
    return Ground(island_world, island_world.place("island"), seed=0)


def test_a_place_remembers_the_source_of_its_clips(tmp_path):
    place = Place("quay", "A quay", np.eye(4), None, source="island:meadow:1")
    place.write(tmp_path)
    assert Place.read(tmp_path).source == "island:meadow:1"
    replace(place, source="").write(tmp_path)
    assert "source" not in (tmp_path / "place.yaml").read_text()
    assert Place.read(tmp_path).source == ""


def test_paths_stay_on_the_ground_and_return(ground):
    walks = ground.walks(2, 6)
    assert all(np.array_equal(a.c2w, b.c2w) for a, b in zip(walks, ground.walks(2, 6)))
    assert not np.array_equal(walks[0].c2w, walks[1].c2w) and len(walks[0].latents) == 7
    returns = ground.returns(1)
    assert [case.kind for case in returns] == ["turn 90 degrees", "out and back"]
    for case in returns:
        start = case.latents[0]
        np.testing.assert_allclose(case.latents[case.back], start, atol=1e-3)
        assert ground.place.walkable.contains(case.c2w[:, [0, 2], 3]).all()
    turned, out = (case.latents[case.away] for case in returns)
    facing = np.degrees(np.arccos(returns[0].latents[0][:3, 2] @ turned[:3, 2]))
    assert facing == pytest.approx(90, abs=1)
    assert np.linalg.norm(out[:3, 3] - returns[1].latents[0][:3, 3]) == pytest.approx(2, abs=0.01)
    there, back = ground.routes(1, 5)
    assert np.array_equal(there[0].latents[-1], back[0].latents[-1])
    assert not np.array_equal(there[0].latents[0], back[0].latents[0])
    turns = ground.small_turns(1, 8)[0].latents
    aside = np.degrees(np.arccos(np.clip(turns[:, :3, 2] @ turns[0, :3, 2], -1, 1)))
    assert aside == pytest.approx([0, 3, 6, 3, 0, 3, 6, 3, 0], abs=1e-4)
    unfilmed = ground.unfilmed_walks(1, 2)[0]
    assert ISLAND.unfilmed(unfilmed.c2w[-1]).all()


def test_a_map_alone_holds_a_walk(island_world):
    bare = Ground(island_world, island_world.place("bare"), seed=0)
    assert bare.scene is None and bare.prompt == "grey"
    path = bare.walks(1, 30)[0].c2w
    assert bare.place.walkable.contains(path[:, [0, 2], 3]).all()
    assert np.allclose(path[:, 1, 3], -0.17) and np.ptp(path[:, [0, 2], 3], axis=0).max() > 0.5
    pictures = bare.first_pictures(bare.views.c2w[3:4])
    assert np.array_equal(pictures[0], bare.views.pictures[3].numpy())


def test_a_rollout_begins_as_a_session_and_sees_the_place(island_world, ground):
    """It begins with the same picture, and remembered frames are seen from where the walk is."""
    options = SuiteOptions(cases=1, seconds=1)
    walk = ground.walks(1, 3)
    bench = Bench(island_world, island_world.config.rollout, ground, options)
    film = bench.film(walk, [0, 3], "test")
    assert film[0].shape == (1, 1, 32, 48, 3) and film[3].shape == (1, 4, 32, 48, 3)
    place = replace(ground.place, start=walk[0].c2w[0])
    session = Session(island_world, image=bench.first(walk)[0], place=place)
    assert np.abs(session.first.frames.astype(int) - film[0][0]).max() <= 1
    far = [replace(walk[0], c2w=walk[0].c2w @ advance(np.eye(4), [0, 0, 0], 90, 0))]
    other = bench.film_from(far, bench.first(walk), [3], "test")
    assert np.abs(other[3].astype(int) - film[3]).max() > 0


def test_the_truth_scores_best(ground):
    true = ground.truth([case.c2w[-2:] for case in ground.walks(3, 2)])
    best = _against(true, true)
    assert best["psnr"] == {"mean": 60.0, "se": 0.0, "cases": 3} and best["psnr"]["mean"] >= 40
    assert best["sharpness"]["mean"] == 1 and best["correlation"]["mean"] > 0.999
    other = _against(true[:, :, :, ::-1].copy(), true)
    assert other["psnr"]["mean"] < 25 and other["correlation"]["mean"] < 0.9
    assert statistics([1.0, 3.0]) == {"mean": 2.0, "se": 1.0, "cases": 2}
    assert statistics([]) == {"mean": None, "se": None, "cases": 0}


def test_localisation_finds_the_pose_of_a_picture():
    """The truth is at the true pose, a picture from elsewhere is as far away as it is."""
    scene = Nearby("meadow")
    true = render(scene, SQUARE[None], LENS, 64, 96).numpy()[0]
    units, degrees = localise(true, SQUARE, scene, LENS, 0)
    assert units < 0.03 and degrees < 0.6
    moved = advance(SQUARE, [0.3, 0, 0], 0, 0)
    moved[:3, :3] = advance(SQUARE, [0, 0, 0], 8.0, 0)[:3, :3]
    shifted = render(scene, moved[None], LENS, 64, 96).numpy()[0]
    units, degrees = localise(shifted, SQUARE, scene, LENS, 0)
    assert units == pytest.approx(0.3, abs=0.06) and degrees == pytest.approx(8, abs=0.8)
    units, degrees = localise(np.full_like(true, 127), SQUARE, scene, LENS, 0)
    assert units > 0.3 and degrees > 8  # a picture of nothing is not found at the truth


def test_a_lookup_turns_a_remembered_frame_exactly():
    """A camera that only turned is seen through a homography; ECC starts from it."""
    views = RememberedViews(
        render(ISLAND, SQUARE[None], LENS, 64, 96),
        render_depth(ISLAND, SQUARE[None], LENS, 64, 96),
        SQUARE[None],
        LENS,
    )
    pose = advance(SQUARE, [0, 0, 0], 10, 0)
    true = render(ISLAND, pose[None], LENS, 64, 96).numpy()[0]
    inside = slice(0, 70)  # what the remembered frame shows too
    still = views.pictures[0].numpy()
    clear = {
        name: psnr(to_unit(film[None, :, inside]), to_unit(true[None, :, inside])).item()
        for name, film in (
            ("still", still),
            ("lookup", warped_lookup(views, pose, true)),
            ("reprojected", reprojected(views, 4, pose, (64, 96))),
        )
    }
    assert clear["lookup"] > clear["still"] + 5 and clear["reprojected"] > clear["still"] + 5


def test_knowable_pixels_in_closed_form():
    """A wall at z = 4 behind a screen at z = 2 that hides its left half from the earlier camera."""
    size = (16, 32)
    lens = (0.5, 1.0, 0.5, 0.5)
    wall = np.full(size, 4.0)
    earlier = wall.copy()
    earlier[:, :16] = 2.0
    mask, solid = knowable(wall, np.eye(4), lens, np.eye(4)[None], earlier[None])
    assert solid.all() and not mask[:, :16].any() and mask[:, 16:].all()
    near = earlier.copy()
    near[:, :16] = 4.0 / 1.015  # within 2 % of the depth
    assert knowable(wall, np.eye(4), lens, np.eye(4)[None], near[None])[0].all()
    # a camera one unit to the left sees the wall 32 * 0.5 * 1 / 4 = 4 pixels further to the right
    left = np.eye(4)
    left[0, 3] = -1.0
    mask, _ = knowable(wall, np.eye(4), lens, left[None], wall[None])
    assert mask[:, :28].all() and not mask[:, 28:].any()
    behind = advance(np.eye(4), [0, 0, 0], 180, 0)
    assert not knowable(wall, np.eye(4), lens, behind[None], wall[None])[0].any()
    sky = wall.copy()
    sky[:4] = FAR
    mask, solid = knowable(sky, np.eye(4), lens, np.eye(4)[None], sky[None])
    assert not mask[:4].any() and not solid[:4].any() and mask[4:].all()
    assert list(earlier_latents(3)) == [0, 1, 2] and len(earlier_latents(2000)) == 120


def test_masks_tell_given_frames_from_later_ones():
    """The first frame looks the other way, the second one sees the wall."""
    wall = np.full((8, 16), 4.0)
    behind = advance(np.eye(4), [0, 0, 0], 180, 0)
    found = masks(wall, np.eye(4), LENS, np.stack([behind, np.eye(4)]), np.stack([wall, wall]), 1)
    assert not found["given"][0].any() and found["earlier"][0].all()
    scored = [
        {
            name: masked_scores(*[np.zeros((8, 16, 3), np.uint8)] * 2, *pair)
            for name, pair in found.items()
        }
    ]
    entry = merged(scored)
    assert entry["given"]["knowable"]["share"]["mean"] == 0
    assert entry["given"]["other"]["psnr"] == {"mean": 60.0, "se": None, "cases": 1}
    assert entry["earlier"]["knowable"]["share"]["mean"] == 1


def test_masked_scores_of_a_known_error():
    true = np.zeros((4, 8, 3), np.uint8)
    ours = true.copy()
    ours[:, 4:] = 51  # an error of 0.2 on the right half
    mask = np.array([[True, True, False, False]] * 2)
    solid = np.array([[True, True, True, False]] * 2)
    entry = masked_scores(ours, true, mask, solid)
    assert entry["knowable"] == {"psnr": 60.0, "share": 0.5}
    assert entry["other"]["psnr"] == pytest.approx(13.979, abs=1e-2)
    assert entry["sky"]["share"] == 0.25


def test_suites_and_options_are_checked(tmp_path, island_world, capsys):
    assert parse_suites("atlas,rest,atlas", "island") == ["atlas", "rest"]
    assert len(parse_suites(None, "island")) == 8
    with pytest.raises(UserError, match="'moon'"):
        parse_suites("rest,moon", "island")
    with pytest.raises(UserError, match="--place"):
        parse_suites("rest", None)
    command = [
        "evaluate",
        "--world",
        str(island_world.folder),
        "--output",
        str(tmp_path / "a.json"),
    ]
    for wrong, word in (
        (["--seconds", "3"], "--suites"),
        (["--mask", "knowable"], "--suites"),
        (["--place", "island", "--latents", "3"], "--latents"),
        (["--place", "island", "--seconds", "0"], "seconds"),
        (["--place", "moon"], "no place 'moon'"),
    ):
        assert main([*command, *wrong]) == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


def test_a_place_without_a_renderer_has_suites_that_need_no_truth(island_world):
    (variant,) = parse_variant(
        f"tiny={island_world.folder / 'transformer'}@1", island_world.config.rollout
    )
    options = SuiteOptions(cases=2, seconds=1)
    results, pictures = evaluate_suites(
        island_world, variant, ["rest", "atlas", "routes"], "bare", options
    )
    assert list(results) == ["about", "rest", "atlas", "routes"]
    assert (
        "no renderer" in results["atlas"]["skipped"] and "vizdoom:1" in results["atlas"]["skipped"]
    )
    assert results["rest"]["1 s"]["psnr"]["cases"] == 2 and results["rest"]["small turns"]
    assert results["routes"]["same pose"]["cases"] == 2
    assert set(pictures) == {"rest", "routes"}


def test_plot_shows_a_line():
    curve = [{"seconds": 10, "mean": 20.0, "se": 0.5, "cases": 2}]
    flat = plot(curve)
    fallen = plot([*curve, {"seconds": 60, "mean": 15.0, "se": None, "cases": 1}])
    assert flat.shape == fallen.shape and (flat != fallen).any()


@pytest.mark.slow
def test_the_command_writes_every_suite(island_world, tmp_path, capsys):
    output = tmp_path / "place.json"
    command = ["evaluate", "--world", str(island_world.folder), "--place", "island"]
    command += ["--cases", "2", "--seconds", "1", "--steps", "1", "--workers", "1"]
    assert main([*command, "--mask", "knowable", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    suites = ["rest", "return", "atlas", "routes", "lookup", "localise", "unfilmed", "endless"]
    assert list(results) == ["about", *suites]
    assert results["atlas"]["1 s"]["knowable"]["earlier"]["knowable"]["share"]["mean"] > 0
    assert results["return"]["out and back"]["cases"] == 2
    assert "turn 90 degrees" in results["endless"]
    page = output.with_suffix(".md").read_text()
    assert "localise" in page and page in capsys.readouterr().out
    names = {path.name for path in tmp_path.glob("*.png")}
    assert {"place-atlas.png", "place-plot.png", "place-routes.png", "place-lookup.png"} <= names

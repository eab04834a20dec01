"""Evaluation: metrics in closed form, paths that keep their promises, and a whole run on a tiny
random world.
"""

import copy
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from distill import metrics
from distill.__main__ import main
from distill.data.blocks.renderer import render
from distill.data.blocks.town import MOODS
from distill.data.blocks.walker import Gait
from distill.evaluate import cases as towns
from distill.evaluate import scores
from distill.evaluate.evaluate import parse_window, recalling
from distill.evaluate.generate import (
    Variant,
    generate,
    load_transformer,
    parse_variant,
    reconstruct,
)
from worldmodel.camera import FRAMES_PER_LATENT
from worldmodel.models.prompts import PromptBook
from worldmodel.rollout import RolloutConfig
from worldmodel.worlds.world import World, save_world

LENS = (0.5, 0.8333, 0.5, 0.5)


@pytest.fixture(scope="module")
def picture():
    """A true picture [1, 3, 96, 160]."""
    case = towns.flow_cases(1, 0)[0]
    return metrics.to_unit(render(case.town, case.c2w[:1], LENS))


@pytest.fixture(scope="module")
def town_bundle(tmp_path_factory, tiny_world):
    """The tiny world under the town's moods, with a decoder of more contrast, so that differences
    are seen.
    """
    folder = tmp_path_factory.mktemp("worlds") / "town"
    prompts = PromptBook({mood: torch.full((3, 8), float(i)) for i, mood in enumerate(MOODS)})
    config = replace(
        tiny_world.config,
        name="town",
        prompts=replace(tiny_world.config.prompts, default="meadow"),
        images={},
    )
    autoencoder = copy.deepcopy(tiny_world.autoencoder)
    autoencoder.decoder[-1].weight.mul_(60)
    save_world(folder, config, tiny_world.transformer, autoencoder, prompts, {})
    return folder


def test_identical_pictures_score_best(picture):
    other = picture.flip(-1)
    assert metrics.psnr(picture, picture).item() == metrics.PSNR_LIMIT
    assert metrics.ssim(picture, picture).item() == pytest.approx(1)
    assert metrics.correlation(picture, picture).item() == pytest.approx(1, abs=1e-5)
    for measure in (metrics.psnr, metrics.ssim, metrics.correlation):
        assert measure(picture, other).item() < measure(picture, picture).item() - 0.1


def test_psnr_of_a_known_error():
    black = torch.zeros(2, 3, 16, 16)
    assert metrics.psnr(
        black + torch.tensor([0.1, 0.5]).view(2, 1, 1, 1), black
    ).tolist() == pytest.approx([20.0, 6.0206], abs=1e-3)


def test_ssim_of_flat_pictures_is_the_luminance_term():
    """Wang et al. 2004: without structure only (2ab + c1) / (a^2 + b^2 + c1) is left."""
    a = 0.4
    b = 0.8
    c1 = 1e-4
    score = metrics.ssim(torch.full((1, 3, 16, 16), a), torch.full((1, 3, 16, 16), b)).item()
    assert score == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-4)
    with pytest.raises(ValueError, match="11x11"):
        metrics.ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_correlation_ignores_brightness_and_contrast_and_grey_gains_nothing(picture):
    dark = 0.3 * picture + torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    # one gain on all channels and any offset a channel: still perfectly related
    assert metrics.correlation(dark, picture).item() == pytest.approx(1, abs=1e-4)
    assert metrics.correlation(1 - picture, picture).item() == pytest.approx(-1, abs=1e-4)
    assert metrics.correlation(torch.full_like(picture, 0.5), picture).item() == 0
    table = metrics.correlation_table(
        torch.cat([picture, dark]), torch.cat([picture, picture.flip(-1), picture * 0])
    )
    assert table[:, 0].tolist() == pytest.approx([1, 1], abs=1e-4) and table[:, 2].tolist() == [
        0,
        0,
    ]
    assert table[0, 1].item() == pytest.approx(
        metrics.correlation(picture, picture.flip(-1)).item(), abs=1e-5
    )


def test_sharpness_is_the_laplacian_energy():
    """A single white pixel: one centre of 16 and four neighbours of 1, over the 6x6 places of an
    8x8 picture.
    """
    point = torch.zeros(1, 3, 8, 8)
    point[..., 4, 4] = 1
    assert metrics.sharpness(point).item() == pytest.approx(20 / 36, rel=1e-5)


def test_blur_lowers_sharpness_and_noise_raises_it(picture):
    blurred = torch.nn.functional.avg_pool2d(picture, 3, 1, 1, count_include_pad=False)
    noisy = picture + 0.05 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    sharp, soft, rough = (metrics.sharpness(x).item() for x in (picture, blurred, noisy))
    assert soft < 0.5 * sharp < sharp < rough
    assert metrics.saturation(
        picture.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    ).item() == pytest.approx(0, abs=1e-6)


def test_pictures_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        metrics.to_unit(np.zeros((4, 4, 3), np.float32))


def test_retrieval_merges_frames_of_one_view():
    poses = np.tile(np.eye(4), (6, 1, 1))
    poses[:, 2, 3] = [
        0,
        0.1,
        0.2,
        0.2,
        0.3,
        0.1,
    ]  # stands once, and comes back to where latent 1 was
    views = metrics.distinct_poses(poses, 0.02, 0.5)
    assert views.size == 4 and views.group.tolist() == [0, 1, 2, 2, 3, 1]
    best = lambda index: np.eye(6)[index]  # noqa: E731
    assert [metrics.retrieve(best(i), 2, views) for i in range(6)] == [
        "other",
        "neighbour",
        "right",
        "right",
        "other",
        "neighbour",
    ]
    assert (
        metrics.retrieve(best(4), 3, views) == "neighbour"
        and metrics.retrieve(best(5), 1, views) == "right"
    )


def test_turning_is_a_different_view():
    poses = np.tile(np.eye(4), (2, 1, 1))
    poses[1, :3, :3] = cv2.Rodrigues(np.array([0.0, np.radians(0.6), 0.0]))[0]
    assert metrics.distinct_poses(poses, 0.02, 0.5).size == 2
    assert metrics.distinct_poses(poses, 0.02, 0.7).size == 1


def test_true_footage_flows_as_the_camera_moves():
    cases = towns.flow_cases(1, 3)
    frames = towns.ground_truth(cases, LENS, 96, 160)
    assert scores.flow_directions(frames, cases) == {"right": 1, "left": 1, "forward": 1, "back": 1}
    backwards = scores.flow_directions(frames[:, ::-1], cases)
    assert backwards["right"] == backwards["left"] == 0
    still = metrics.flow_signs(np.repeat(frames[:1, :1], 3, 1)[0])
    assert np.abs([still.right, still.growth]).max() < 0.01


def test_paths_are_seeded_held_out_and_free():
    cases = towns.fidelity_cases(5, 8, seed=1)
    again = towns.fidelity_cases(5, 8, seed=1)
    assert [case.kind for case in cases] == list(towns.KINDS)
    for case, twin in zip(cases, again, strict=True):
        np.testing.assert_array_equal(case.c2w, twin.c2w)
        assert case.town.seed % 2 == 1 and len(case.c2w) == 33 and len(case.latents) == 9
        assert towns.is_free(case.town, case.c2w)
    assert not np.array_equal(cases[1].c2w, towns.fidelity_cases(2, 8, seed=2)[1].c2w)
    forward, turn, strafe = (
        case.latents[0][:3, :3].T @ (case.latents[-1][:3, 3] - case.latents[0][:3, 3])
        for case in cases[1:4]
    )
    gait = Gait()
    assert forward[2] > 0.8 * 8 * gait.walk and abs(forward[0]) < 1e-6
    assert np.allclose(turn, 0) and abs(strafe[0]) > 0.8 * 8 * gait.strafe and abs(strafe[2]) < 1e-6


def test_a_path_through_a_house_is_not_free():
    case = towns.fidelity_cases(2, 8, seed=1)[1]
    boxes = case.town.boxes(*np.floor(case.c2w[0, [0, 2], 3] / 1.1).astype(int).tolist(), 3)
    inside = case.c2w[:1].copy()
    wall = int(np.argmax(boxes.high[:, 1] > -0.05))
    inside[0, [0, 2], 3] = (boxes.low[wall] + boxes.high[wall])[[0, 2]] / 2
    assert not towns.is_free(case.town, inside)


def test_leave_and_return_leaves_and_returns():
    for case in towns.return_cases(1, seed=0):
        start = case.latents[0]
        away = case.latents[case.away]
        back = case.latents[case.back]
        assert metrics.distinct_poses(np.stack([start, away, back]), 0.005, 0.1).group.tolist() == [
            0,
            1,
            0,
        ]
        assert (
            metrics.distinct_poses(case.latents[case.back :], 0.005, 0.1).size == 1
        )  # stands still to the end


def test_gain_is_over_the_away_baseline():
    """The truth gains all there is, a frozen picture and one that forgets gain nothing."""
    cases = towns.return_cases(1, seed=0)
    true = towns.ground_truth(cases, LENS, 48, 80, every=FRAMES_PER_LATENT)
    for entry in scores.leave_and_return(true, true, cases):
        assert (
            entry["return"] > 0.98
            and entry["gain"] > 0.2
            and entry["share"] == pytest.approx(1, abs=0.05)
        )
    frozen = np.repeat(true[:, :1], true.shape[1], 1)
    assert all(
        entry["gain"] == 0 and entry["share"] is None
        for entry in scores.leave_and_return(frozen, true, cases)
    )
    forgets = true.copy()
    for index, case in enumerate(cases):
        forgets[index, case.back] = true[index, case.away]
    assert all(entry["gain"] == 0 for entry in scores.leave_and_return(forgets, true, cases))


def test_scores_tell_truth_blur_and_frozen_apart():
    cases = towns.fidelity_cases(10, 8, seed=0)  # some of the free walks stand still for a while
    true = towns.ground_truth(cases, LENS, 48, 80, every=FRAMES_PER_LATENT)
    blurred = np.stack(
        [np.stack([cv2.GaussianBlur(frame, (0, 0), 1.5) for frame in film]) for film in true]
    )
    films = {"truth": true, "blurred": blurred, "frozen": np.repeat(true[:, :1], 9, 1)}
    rows = [
        {
            "name": n,
            "generated": n != "frozen",
            "horizons": scores.fidelity(f, true, cases, [1, 4, 8]),
        }
        for n, f in films.items()
    ]
    perfect, soft, frozen = (row["horizons"]["8"] for row in rows)
    assert (
        perfect["psnr"] == metrics.PSNR_LIMIT
        and perfect["sharpness"] == 1
        and perfect["retrieval"]["right"] == 1
    )
    assert soft["sharpness"] < 0.5 and soft["retrieval"]["right"] > 0.5
    assert frozen["retrieval"]["right"] == 0 and frozen["correlation"] < soft["correlation"] < 1
    passed = {
        (entry["name"], entry["threshold"].split()[0]): entry["passed"]
        for entry in scores.thresholds(rows, "frozen", "truth")
    }
    assert passed[("truth", "sharpness")] and not passed[("blurred", "sharpness")]
    assert (
        passed[("truth", "retrieval")]
        and passed[("truth", "correlation")]
        and not passed[("blurred", "correlation")]
    )


def test_drift_is_relative_to_the_start():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (1, 1, 32, 32, 3)).repeat(9, 1)
    fading = (128 + (noise - 128) * np.linspace(1, 0, 9).reshape(1, 9, 1, 1, 1)).astype(np.uint8)
    entry = scores.drift(fading, noise.astype(np.uint8), fps=16, spans=4)
    assert entry["seconds"] == [0.5, 1.0, 1.5, 2.0]
    assert entry["sharpness_of_truth"] == pytest.approx([1] * 4) and entry[
        "saturation_of_truth"
    ] == pytest.approx([1] * 4)
    assert entry["sharpness"] == pytest.approx(
        [np.mean([(1 - k / 8) ** 2 for k in pair]) for pair in ((1, 2), (3, 4), (5, 6), (7, 8))],
        abs=0.03,
    )


def test_lateness_is_what_late_frames_have_of_early_ones():
    rng = np.random.default_rng(0)
    early = np.tile(rng.integers(0, 256, (2, 1, 48, 64, 3)), (1, 4, 1, 1, 1)).astype(np.uint8)
    moving = np.stack([np.roll(early[:, 0], shift, 2) for shift in range(4)], 1)
    grey = np.repeat(moving.mean(-1, keepdims=True).astype(np.uint8), 3, -1)
    same = scores.lateness(moving, moving)
    assert same == {"sharpness": 1.0, "saturation": 1.0, "flow": 1.0}
    late = scores.lateness(moving, grey // 2)
    assert late["saturation"] == 0 and 0.1 < late["sharpness"] < 0.5
    assert scores.lateness(moving, early)["flow"] < 0.01


def test_variants_are_read_from_text(town_bundle):
    folder = town_bundle / "transformer"
    rollout = RolloutConfig()
    (own,) = parse_variant(str(folder), rollout)
    assert own.rollout == rollout and own.name == f"{folder}, 2 steps"
    many, two, one = parse_variant(f"stage 1={folder}@16e,2,1", rollout)
    assert (many.name, two.name, one.name) == (
        "stage 1, 16 steps (Euler)",
        "stage 1, 2 steps",
        "stage 1, 1 step",
    )
    assert (
        len(many.rollout.steps) == 16
        and many.rollout.sampler == "euler"
        and two.rollout.sampler == "renoise"
    )
    for text in (f"{folder}@x", f"{folder}@0", str(town_bundle / "nothing")):
        with pytest.raises(ValueError):
            parse_variant(text, rollout)


def test_cases_of_a_batch_are_independent(town_bundle):
    """Cases of a batch do not see each other, and the first frame is the ceiling's."""
    world = World.from_pretrained(town_bundle, dtype=torch.float32)
    world = replace(
        world, transformer=load_transformer(town_bundle / "transformer", world.device, world.dtype)
    )
    cases = towns.fidelity_cases(3, 4, seed=0)
    film = towns.ground_truth(cases, world.config.intrinsics, 32, 48)
    path = np.stack([case.latents for case in cases])
    prompts = towns.moods(cases)
    frames = [f for f in generate(world, world.config.rollout, film[:, 0], path, prompts, seed=5)]
    assert [f.shape for f in frames] == [(3, 1, 32, 48, 3)] + [(3, 4, 32, 48, 3)] * 4
    changed = film[:, 0].copy()
    changed[1:] = 255 - changed[1:]
    others = [f for f in generate(world, world.config.rollout, changed, path, prompts, seed=5)]
    apart = [
        np.abs(frames[4][case].astype(int) - others[4][case].astype(int)).max() for case in range(3)
    ]
    assert apart[0] <= 2 and min(apart[1:]) > 8
    ceiling = reconstruct(world.autoencoder, film, batch=2)
    assert ceiling.shape == (3, 5, 32, 48, 3)
    np.testing.assert_allclose(ceiling[:, 0].astype(int), frames[0][:, 0].astype(int), atol=1)


def test_windows_and_rows_of_recall():
    variant = Variant("a", Path("a"), RolloutConfig(window=12))
    assert recalling(variant, 4).rollout.recall == 4
    assert recalling(variant, 4).name == "a, recall 4"
    rollouts = [parse_window(text, variant).rollout for text in ("6", "6+1", "8+0+4", "8+1+2")]
    found = [(one.window, one.sinks, one.recall) for one in rollouts]
    assert found == [(6, 0, 0), (6, 1, 0), (8, 0, 4), (8, 1, 2)]


@pytest.mark.slow
def test_the_command_writes_tables_and_sheets(town_bundle, tmp_path, capsys):
    output = tmp_path / "results" / "town.json"
    command = ["evaluate", "--world", str(town_bundle), "--output", str(output)]
    command += [
        "--transformer",
        f"a={town_bundle / 'transformer'}@2e,1",
        "--reference",
        "a, 1 step",
    ]
    sizes = (
        "--cases 5 --latents 4 --returns 1 --flows 1 --drift-cases 1 --drift-latents 6 --batch 3 "
        "--workers 1 --windows 4 4+1 5+1+1 --late 20"
    )
    assert main(command + sizes.split()) == 0
    results = json.loads(output.read_text())
    assert [row["name"] for row in results["rows"]] == [
        "first frame frozen",
        "autoencoder of the true frame",
        "a, 2 steps (Euler)",
        "a, 1 step",
    ]
    assert set(results["rows"][0]["horizons"]) == {"1", "4"} and results["about"]["seed"] == 0
    assert {row["name"] for row in results["flow"]} == {
        "ground truth",
        "a, 2 steps (Euler)",
        "a, 1 step",
    }
    assert [row["name"] for row in results["windows"]] == ["ground truth", "4", "4+1", "5+1+1"]
    assert len(results["drift"]) == 2 and len(results["returns"]) == 9 and results["thresholds"]
    page = output.with_suffix(".md").read_text()
    assert page in capsys.readouterr().out and "a, 2 steps (Euler)" in page
    assert {path.name for path in output.parent.glob("*.png")} == {
        f"town-{kind}.png" for kind in (*towns.KINDS, "returns")
    }
    sheet = cv2.imread(str(output.parent / "town-walk.png"))
    assert sheet.shape == (24 + 4 * 36, 200 + 3 * 52, 3)


def test_bad_input_is_one_sentence(town_bundle, tiny_bundle, tmp_path, capsys):
    output = tmp_path / "x.json"
    for words in (
        ["--world", tiny_bundle, "--output", output],  # not a town
        ["--world", town_bundle, "--output", tmp_path / "x.txt"],
        ["--world", town_bundle, "--output", output, "--cases", 0],
        ["--world", town_bundle, "--output", output, "--reference", "nobody"],
        ["--world", town_bundle, "--output", output, "--windows", "4+x"],
        ["--world", town_bundle, "--output", output, "--windows", "4+1+0+0"],
        ["--world", town_bundle, "--output", output, "--recall", 0, 9],
        ["--world", tmp_path / "nowhere", "--output", output],
    ):
        assert main(["evaluate", *map(str, words)]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("evaluate: ") and "\n" not in error
    assert not list(tmp_path.iterdir())

"""A world of one's own game: clips with captions, pace and motion of their own -> all stages -> a
bundle that plays.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.__main__ import main
from distill.data.clips import write_clip, write_latents
from distill.data.footage import Footage, motions
from worldmodel.camera import MotionStep, parse_trajectory, rotation
from worldmodel.session import Session
from worldmodel.worlds.world import World

ROOT = Path(__file__).resolve().parents[1]
CASTLE = "a castle at dawn"
CAVE = "a cave, lit by 1/2 a torch; " + "very " * 40 + "dark"
STEP = MotionStep(move=0.3, turn=5.0, strafe=0.1, pitch=2.0)
STAGES = ("bidirectional", "teacher_forcing", "consistency", "dmd")
WIDTHS = [
    f"autoencoder.{name}"
    for name in (
        "encoder_widths=[8, 8, 8, 8]",
        "decoder_widths=[8, 8, 8, 8]",
        "encoder_blocks=[1, 1, 1]",
        "decoder_blocks=[1, 1, 1]",
        "window=2",
        "steps=2",
        "batch=2",
    )
]


def game_clip(root, name, caption, trajectory, style="walk", start=0.0, detail=60, **changes):
    """A clip of 48x64 pixels at 12 frames a second; the brightness of its first picture encodes
    the pitch of the camera.
    """
    c2w = parse_trajectory(trajectory, STEP, style)
    c2w[:, :3, :3] = c2w[:, :3, :3] @ rotation(0, start)
    frames = (
        np.random.default_rng(len(name))
        .integers(0, detail, (4 * len(c2w) - 3, 48, 64, 3))
        .astype(np.uint8)
    )
    frames[0] += np.uint8(100 + start)
    clip = {"caption": caption, "fps": 12, "source": "mygame:7", "licence": "CC-BY-4.0"}
    return write_clip(root, name, frames, c2w, (0.7, 0.98, 0.5, 0.5), **clip | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Clips, every stage trained for two steps, and the words that name the recipe."""
    root = tmp_path_factory.mktemp("own")
    for number, trajectory in enumerate(("w*3,w+l*2", "d*3,i*2", "s*2,j*3")):
        game_clip(root / "clips", f"castle-{number}", CASTLE, trajectory, start=2.0 * number)
    game_clip(root / "clips", "deep", CAVE, "w*5")
    return root, train_all(root)


def train_all(root, frames=4):
    """Every stage on the clips of `root`; the words that name the recipe."""
    options = [
        f"data.root={root / 'clips'}",
        f"run.folder={root / 'runs'}",
        f"data.frames={frames}",
        *WIDTHS,
    ]
    options += [f"{stage}.steps=2" for stage in STAGES]
    recipe = [
        str(ROOT / "configs/blocks/tiny.yaml"),
        *(word for option in options for word in ("--set", option)),
    ]
    assert main(["train", *recipe, "--stage", "autoencoder"]) == 0
    assert (
        main(
            [
                "encode",
                "--clips",
                str(root / "clips"),
                "--autoencoder",
                str(root / "runs/autoencoder/export"),
            ]
        )
        == 0
    )
    for stage in STAGES:
        assert main(["train", *recipe, "--stage", stage]) == 0, stage
    return recipe


def export(trained, output, *words):
    recipe = ["--config", *trained[1]]
    return main(
        [
            "export",
            *recipe,
            "--transformer",
            "dmd",
            "--autoencoder",
            "autoencoder",
            "--output",
            str(output),
            *map(str, words),
        ]
    )


def test_a_world_of_ones_own_game_plays(trained, tmp_path):
    assert export(trained, tmp_path / "mine", "--images", 2) == 0
    world = World.from_pretrained(tmp_path / "mine", dtype=torch.float32)
    config = world.config
    assert (config.height, config.width, config.fps, config.licence) == (48, 64, 12.0, "CC-BY-4.0")
    assert config.title == "Learned from 4 clips of mygame"
    np.testing.assert_allclose(config.intrinsics, (0.7, 0.98, 0.5, 0.5))
    envelope = config.envelope
    assert (envelope.forward, envelope.yaw, envelope.pitch) == (
        0.3,
        5.0,
        2.0,
    ) and envelope.style == "walk"
    assert (
        envelope.strafe == pytest.approx(0.1, abs=1e-3)
        and envelope.vertical == 0
        and envelope.pitch_limit == pytest.approx(6, abs=0.5)
    )
    assert world.prompts.names == tuple(sorted((CASTLE, CAVE))) and config.prompts.default == CASTLE
    assert [len(world.images(caption)) for caption in (CASTLE, CAVE)] == [2, 1]
    assert list((tmp_path / "mine/images").glob("a-castle-at-dawn-*.png"))
    for caption in (CASTLE, CAVE):
        session = Session(world, caption, world.images(caption)[0])
        assert session.first.frames.shape == (1, 48, 64, 3) and session.step(
            np.eye(4)
        ).frames.shape == (4, 48, 64, 3)
    text = (tmp_path / "mine" / "README.md").read_text()
    assert "Learned from 4 clips of mygame" in text and "CC-BY-4.0" in text


def test_what_the_footage_says_can_be_overruled(trained, tmp_path, capsys):
    words = ["--height", 32, "--width", 48, "--fps", 20, "--title", "Mine", "--images", 1]
    assert (
        export(
            trained, tmp_path / "mine", *words, "--envelope", "yaw=9", "vertical=0.05", "style=fly"
        )
        == 0
    )
    config = World.from_pretrained(tmp_path / "mine").config
    assert (config.height, config.width, config.fps, config.title) == (32, 48, 20.0, "Mine")
    assert (
        config.envelope.yaw,
        config.envelope.vertical,
        config.envelope.style,
        config.envelope.forward,
    ) == (9, 0.05, "fly", 0.3)
    for changes, reason in (
        (["fast=1"], "unknown key 'fast'"),
        (["yaw"], "AXIS=VALUE"),
        (["yaw=-3"], "at least 0"),
    ):
        assert export(trained, tmp_path / "other", "--envelope", *changes) == 2
        assert reason in capsys.readouterr().err
    assert (
        export(trained, tmp_path / "other", "--fps", 0) == 2
        and "--fps above 0" in capsys.readouterr().err
    )


def test_footage_that_is_not_the_models_own_is_refused(trained, tmp_path, capsys):
    assert export(trained, tmp_path / "mine", "--set", f"data.root={tmp_path / 'gone'}") == 2
    assert (
        "found none; make some" in (error := capsys.readouterr().err)
        and "start images from them" in error
    )
    game_clip(tmp_path / "clips", "other", "a forest", "w*2")
    assert export(trained, tmp_path / "mine", "--set", f"data.root={tmp_path / 'clips'}") == 2
    assert "not trained with the caption 'a forest'" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_clips_of_several_rates_need_a_choice(tmp_path):
    game_clip(tmp_path, "a", CASTLE, "w*2")
    game_clip(tmp_path, "b", CASTLE, "w*2", fps=24)
    with pytest.raises(ValueError, match="one frame rate, got 12 to 24; choose one with --fps"):
        print(Footage(tmp_path).fps)


def test_a_flight_is_told_by_its_roll(tmp_path):
    game_clip(tmp_path, "a", CASTLE, "i+l*6,u*3,w*4,dn*3", style="fly")
    envelope = Footage(tmp_path).envelope
    assert envelope.style == "fly" and (envelope.vertical, envelope.yaw, envelope.pitch) == (
        0.3,
        5.0,
        2.0,
    )
    assert envelope.pitch_limit > 10 and envelope.strafe == 0


@pytest.mark.parametrize("style", ["walk", "fly"])
def test_motions_are_those_that_made_the_poses(style):
    c2w = parse_trajectory("w*1,a*1,u*1,l*1,k*1,s*1", STEP, style)
    expected = [
        (0.3, 0, 0, 0, 0),
        (0, -0.1, 0, 0, 0),
        (0, 0, 0.3, 0, 0),
        (0, 0, 0, 5, 0),
        (0, 0, 0, 0, -2),
        (-0.3, 0, 0, 0, 0),
    ]
    c2w[:, :3, 3] += (5.0, -2.0, 9.0)
    np.testing.assert_allclose(motions(c2w, style), expected, atol=1e-9)


def test_start_images_are_level_and_sharp(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.data.footage.CANDIDATES", 2)
    for number, (tilt, detail) in enumerate(((9.0, 60), (0.0, 1), (-1.0, 60), (12.0, 60))):
        game_clip(tmp_path, f"clip-{number}", CASTLE, "w*1", start=tilt, detail=detail)
    (picture,) = Footage(tmp_path).pictures(48, 64, 1)[CASTLE]
    assert picture.mean() == pytest.approx(
        99 + 29.5, abs=3
    )  # neither the level wall (100) nor what looks up (138, 141)


def test_footage_of_latents_alone_has_no_pictures(tmp_path):
    folder = game_clip(tmp_path, "a", CASTLE, "w*2")
    (folder / "video.mp4").unlink()
    write_latents(folder, torch.zeros(16, 3, 6, 8))
    footage = Footage(tmp_path)
    assert footage.size(8) == (48, 64) and footage.pictures(48, 64, 4) == {}


def test_a_world_of_doom_plays(tmp_path):
    pytest.importorskip("vizdoom", reason="ViZDoom is not installed (extra `collect`)")
    words = [
        "--clips",
        "4",
        "--latents",
        "4",
        "--height",
        "48",
        "--width",
        "80",
        "--levels",
        "map01,map02",
        "--workers",
        "1",
    ]
    assert main(["collect", "vizdoom", "--output", str(tmp_path / "clips"), *words]) == 0
    assert export((tmp_path, train_all(tmp_path)), tmp_path / "doom", "--images", 1) == 0
    world = World.from_pretrained(tmp_path / "doom", dtype=torch.float32)
    config = world.config
    envelope = config.envelope
    assert (config.height, config.width, config.fps, config.licence) == (
        48,
        80,
        17.5,
        "BSD-3-Clause (Freedoom)",
    )
    assert world.prompts.names == ("freedoom map01", "freedoom map02") and envelope.style == "walk"
    assert 0.05 < envelope.forward < 0.3 and envelope.yaw > 1
    session = Session(world, "freedoom map02", world.images("freedoom map02")[0])
    assert session.step(np.eye(4)).frames.shape == (4, 48, 80, 3)

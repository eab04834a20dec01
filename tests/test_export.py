"""Export: a bundle that opens and plays, with what its README promises. And the benchmark, which
plays bundles.
"""

import json

import numpy as np
import pytest
import torch
import yaml

from distill.__main__ import main
from distill.data.blocks.town import MOODS
from distill.prompts import make_prompt_book
from worldmodel.bench import benchmark
from worldmodel.models.tiny_autoencoder import TinyAutoencoder
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.pacing import PRESSES, key_to_pixel
from worldmodel.session import Session
from worldmodel.worlds.world import World

BAR_NAMES = ("network", "clean", "decode", "total")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A recipe, and what its stages would have left: random networks, the prompts, and two lines of
    metrics.
    """
    root = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    transformer = CausalWanTransformer(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=8,
        freq_dim=16,
        ffn_dim=64,
        num_layers=1,
    )
    transformer.save_pretrained(root / "runs/dmd/export")
    make_prompt_book(MOODS, 2, 8).save(root / "runs/dmd/export/prompts.safetensors")
    widths = {
        "encoder_widths": (8,) * 4,
        "encoder_blocks": (1,) * 3,
        "decoder_widths": (8,) * 4,
        "decoder_blocks": (1,) * 3,
    }
    TinyAutoencoder(**widths).save_pretrained(root / "runs/autoencoder/export")
    lines = [{"step": 5, "seconds": 1800.0}, {"step": 9, "seconds": 3600.0}]
    (root / "runs/dmd/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "run": {"folder": str(root / "runs"), "seed": 3},
        "dmd": {"denoise": [1000, 400], "window": 6, "shift": 3.0},
    }
    recipe["data"] = {"root": str(root / "clips")}
    (root / "recipe.yaml").write_text("# how the footage was made\n" + yaml.safe_dump(recipe))
    return root


def export(trained, output, *more):
    command = [
        "export",
        "--config",
        trained / "recipe.yaml",
        "--transformer",
        "dmd",
        "--autoencoder",
        "autoencoder",
    ]
    sizes = ["--output", output, "--images", 1, "--height", 32, "--width", 48]
    return main([str(word) for word in [*command, *sizes, *more]])


def test_an_exported_bundle_plays(trained, tmp_path):
    assert export(trained, tmp_path / "worlds" / "blocks", "--images", 2) == 0
    world = World.from_pretrained(tmp_path / "worlds" / "blocks", dtype=torch.float32)
    assert world.prompts.names == tuple(sorted(MOODS)) and world.config.prompts.default == "meadow"
    assert [len(world.images(mood)) for mood in MOODS] == [2] * 4
    picture = world.image(world.images("night")[0])
    assert (
        picture.shape == (32, 48, 3)
        and picture.mean() < world.image(world.images("snow")[0]).mean() - 40
    )
    rollout = world.config.rollout
    envelope = world.config.envelope
    assert (rollout.steps, rollout.window, rollout.shift, rollout.sampler) == (
        (1000, 400),
        6,
        3.0,
        "renoise",
    )
    assert (envelope.forward, envelope.strafe, envelope.run, envelope.yaw, envelope.pitch) == (
        0.1,
        0.08,
        1.6,
        10,
        5,
    )
    assert (envelope.vertical, envelope.pitch_limit, envelope.smoothing, envelope.style) == (
        0,
        20,
        0.5,
        "walk",
    )
    np.testing.assert_allclose(world.config.intrinsics, (0.5, 0.75, 0.5, 0.5))
    session = Session(world, "snow", world.images("snow")[0], seed=1)
    assert session.first.frames.shape == (1, 32, 48, 3)
    assert session.step(np.eye(4)).frames.shape == (4, 32, 48, 3)


def test_weights_are_stored_in_the_type_asked_for(trained, tmp_path):
    stored = {}
    for dtype in ("bfloat16", "float32"):
        assert export(trained, tmp_path / dtype, "--dtype", dtype) == 0
        stored[dtype] = sum(
            path.stat().st_size for path in (tmp_path / dtype / "transformer").glob("*.safetensors")
        )
        exact = World.from_pretrained(
            tmp_path / dtype, dtype=torch.float32
        ).transformer.proj_out.weight
        trained_weight = CausalWanTransformer.from_pretrained(
            trained / "runs/dmd/export"
        ).proj_out.weight
        assert torch.equal(exact, trained_weight.to(getattr(torch, dtype)).float())
    assert stored["bfloat16"] < 0.6 * stored["float32"]


def test_the_readme_is_given_or_kept_or_short(trained, tmp_path):
    readme = tmp_path / "blocks" / "README.md"
    assert export(trained, tmp_path / "blocks") == 0
    short = readme.read_text()
    assert short.startswith("# blocks\n") and len(short.splitlines()) <= 5
    assert "32x48 pixels" in short and f"--world {tmp_path / 'blocks'}`" in short
    (tmp_path / "card.md").write_text("# My card — made by hand\n")
    assert export(trained, tmp_path / "blocks", "--readme", tmp_path / "card.md") == 0
    assert readme.read_text() == "# My card — made by hand\n"
    assert export(trained, tmp_path / "blocks") == 0
    assert readme.read_text() == "# My card — made by hand\n"


def test_one_step_and_euler_are_options(trained, tmp_path):
    assert export(trained, tmp_path / "teacher", "--steps", 8, "--sampler", "euler") == 0
    rollout = World.from_pretrained(tmp_path / "teacher", dtype=torch.float32).config.rollout
    assert (
        len(rollout.steps) == 8
        and rollout.first_steps == rollout.steps
        and rollout.sampler == "euler"
    )


def test_a_failed_export_leaves_the_old_bundle(trained, tmp_path, capsys, monkeypatch):
    assert export(trained, tmp_path / "blocks") == 0
    before = World.from_pretrained(tmp_path / "blocks").fingerprint
    (tmp_path / "bad.md").write_bytes(b"\xff\xfe")
    for words in (
        ["--transformer", "teacher_forcing"],
        ["--autoencoder", tmp_path / "nowhere"],
        ["--readme", tmp_path / "nowhere.md"],
        ["--readme", tmp_path / "bad.md"],
        ["--images", 0],
        ["--set", "dmd.windw=3"],
        ["--height", 40],
    ):
        capsys.readouterr()
        assert export(trained, tmp_path / "blocks", *words) == 2, words
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("export: "), error
    (tmp_path / "mine").mkdir()
    assert export(trained, tmp_path / "mine") == 2 and (tmp_path / "mine").is_dir()

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill.export.save_world", full_disk)
    assert export(trained, tmp_path / "blocks") != 0 and "No space left" in capsys.readouterr().err
    assert World.from_pretrained(tmp_path / "blocks").fingerprint == before
    assert {path.name for path in tmp_path.iterdir()} == {"blocks", "bad.md", "mine"}


# -------------------- benchmark


@pytest.mark.slow
def test_benchmark_reports_every_part_and_pairs_variants(tiny_bundle, capsys):
    words = [
        "--world",
        tiny_bundle,
        "--latents",
        16,
        "--set",
        "window=4",
        "--versus",
        "steps=8",
        "window=4",
    ]
    assert benchmark.main([str(word) for word in words]) == 0
    report = json.loads(capsys.readouterr().out)
    one, other = report["variants"]
    assert (
        one["chunks"] == other["chunks"] == 16
        and one["rollout"]["window"] == 4
        and len(other["rollout"]["steps"]) == 8
    )
    for variant in report["variants"]:
        times = variant["ms_per_latent"]
        assert set(times) == set(BAR_NAMES) and all(
            0 < t["p10"] <= t["median"] <= t["p90"] for t in times.values()
        )
        assert times["total"]["median"] >= max(
            times[part]["median"] for part in ("network", "decode")
        )
        assert variant["frames_per_second"] == pytest.approx(
            4000 / times["total"]["median"], rel=1e-2
        )
    assert report["ratio"]["network"] < 0.7  # 2 steps against 8
    assert (
        report["machine"]["threads"] == torch.get_num_threads()
        and report["parameters"]["transformer"] > 0
    )


def test_benchmark_of_random_weights_needs_no_files(capsys):
    words = [
        "--random-weights",
        "1x48x2",
        "--size",
        "32x48",
        "--latents",
        "8",
        "--steps",
        "1",
        "--set",
        "window=3",
    ]
    assert benchmark.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    (variant,) = report["variants"]
    assert report["world"] == "random" and "ratio" not in report and report["size"] == [32, 48]
    assert variant["rollout"]["steps"] == [1000] and variant["rollout"]["window"] == 3


def test_key_to_pixel_of_a_steady_machine():
    """A chunk takes 100 ms and shows for 250 ms: the keys are read 106 ms before it is due, and a
    press waits 0 to 250 ms for that.
    """
    delays = key_to_pixel(np.full(40, 100.0), np.full(40, 130.0), 250.0)[20 * PRESSES :]
    assert delays.min() == pytest.approx(106, abs=8) and delays.max() == pytest.approx(356, abs=8)
    assert delays.mean() == pytest.approx(231, abs=1)
    slow = key_to_pixel(np.full(40, 400.0), np.full(40, 400.0), 250.0)[20 * PRESSES :]
    assert slow.mean() == pytest.approx(
        600, abs=1
    )  # never idle: half a chunk of waiting, one of generating


def test_benchmark_refuses_what_it_cannot_do(tiny_bundle, capsys):
    for words in (
        ["--world", "nowhere"],
        ["--random-weights", "8x250x4"],
        ["--random-weights", "8x256"],
        ["--random-weights", "1x48x2", "--size", "33x48"],
        ["--world", str(tiny_bundle), "--latents", "2"],
        ["--world", str(tiny_bundle), "--threads", "0"],
        ["--world", str(tiny_bundle), "--set", "windw=3"],
        ["--world", str(tiny_bundle), "--steps", "99"],
        ["--world", str(tiny_bundle), "--weights", "int4"],
    ):
        assert benchmark.main(words) == 2, words
        error = capsys.readouterr().err.strip()
        assert error.startswith("benchmark: ") and "\n" not in error

"""`worldmodel benchmark --against CHECKOUT`: two checkouts compared by alternating processes."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
from scipy.stats import ttest_1samp

from worldmodel.bench import against, benchmark

ROOT = Path(__file__).parents[1]
# A checkout with the first edition's names, and no weights: `step` and `settle` take as long as
# WORLD says, and the frames are its seed.
WORLD_MODULE = """
import time
from types import SimpleNamespace


class World:
    engine = SimpleNamespace(compiled=None)
    dtype = "torch.float32"

    @classmethod
    def from_pretrained(cls, folder, device, dtype):
        assert folder.endswith("worlds/one") and device.type == "cpu" and dtype is None
        return cls()
"""
SESSION_MODULE = """
import time
from types import SimpleNamespace

import numpy as np


class Session:
    chunk = 2
    config = SimpleNamespace(window=4, steps=(1000, 500))

    def __init__(self, world, seed, steps, history):
        self.seed = seed
        self.frames = 0

    def step(self, poses, early=lambda frames: None):
        assert poses.shape == (2, 4, 4)
        time.sleep(STEP_SECONDS)
        early(None)
        self.frames += 2
        return SimpleNamespace(frames=np.full((8, 2, 2, 3), self.seed, np.uint8))

    def settle(self):
        assert self.frames
        time.sleep(COMMIT_SECONDS)
"""
WORDS = ["--pairs", "2", "--latents", "6"]


def fake_checkout(folder, step=0.004, commit=0.002):
    package = folder / "worldmodel"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "world.py").write_text(WORLD_MODULE)
    constants = f"STEP_SECONDS = {step}\nCOMMIT_SECONDS = {commit}\n"
    (package / "session.py").write_text(constants + SESSION_MODULE)
    return folder


@pytest.fixture
def world(tmp_path):
    folder = tmp_path / "worlds" / "one"
    folder.mkdir(parents=True)
    (folder / "world.yaml").touch()
    return folder


def test_the_ratio_of_pairs_has_the_interval_of_students_t():
    ratios = [1.02, 0.97, 1.05, 1.01, 0.99]
    found = against.paired_ratio(ratios, [1.0] * 5)
    low, high = ttest_1samp([math.log(ratio) for ratio in ratios], 0).confidence_interval(0.95)
    assert found["ratio"] == pytest.approx(math.prod(ratios) ** 0.2, abs=1e-4)
    assert found["interval_95"] == pytest.approx([math.exp(low), math.exp(high)], abs=1e-4)
    # what both processes of a pair share cancels out
    assert against.paired_ratio([8.0, 80.0], [4.0, 40.0]) == {
        "ratio": 2.0,
        "interval_95": [2.0, 2.0],
    }


@pytest.mark.parametrize(("ms", "within"), [(101.0, True), (103.0, False)])
def test_within_2_percent_is_what_the_interval_reaches(ms, within):
    figures = {"first_frames_ms": 50.0, "cpu_ms_per_latent": 90.0}
    ratios = against._ratios(
        [{"ms_per_latent": ms, **figures}] * 3, [{"ms_per_latent": 100.0, **figures}] * 3
    )
    assert ratios["speed_ratio"]["ratio"] == pytest.approx(100 / ms, abs=1e-4)
    assert ratios["within_2_percent"] is within


@pytest.mark.slow
def test_processes_of_two_checkouts_alternate(tmp_path, world, capsys, monkeypatch):
    """A fast checkout against one that takes twice as long per chunk; both of the first edition."""
    this = fake_checkout(tmp_path / "this", step=0.02, commit=0.02)
    other = fake_checkout(tmp_path / "other", step=0.04, commit=0.04)
    monkeypatch.setattr(against, "THIS", this)
    order = []
    walk = against._walk
    monkeypatch.setattr(
        against, "_walk", lambda *inputs: order.append(inputs[0].name) or walk(*inputs)
    )
    words = ["--against", other, "--world", world, "--pairs", "3", "--latents", "9", "--seed", "5"]
    output = tmp_path / "report.json"
    assert benchmark.main([*map(str, words), "--output", str(output)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(output.read_text()) == report
    assert order == ["this", "other", "other", "this", "this", "other"]
    assert [pair["first"] for pair in report["pairs"]] == ["this", "other", "this"]
    assert report["same_frames"] is True
    assert report["this"]["played"] == report["other"]["played"]
    assert report["this"]["played"]["chunk"] == 2
    low, high = report["speed_ratio"]["interval_95"]
    assert low < report["speed_ratio"]["ratio"] < high
    for pair in report["pairs"]:  # two latents per chunk
        assert pair["this_ms"] >= 20 and pair["other_ms"] >= 40
        assert pair["ratio"] == pytest.approx(pair["other_ms"] / pair["this_ms"], abs=1e-3)
    assert report["settings"]["pairs"] == 3 and report["settings"]["latents"] == 9
    assert not list(other.rglob("__pycache__"))


@pytest.mark.slow
def test_this_checkout_against_itself(tiny_bundle, capsys):
    assert benchmark.main(["--against", str(ROOT), "--world", str(tiny_bundle), *WORDS]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["same_frames"] is True
    assert report["this"]["commit"] == report["other"]["commit"]
    assert report["this"]["played"]["window"] == 4
    random = ["--random-weights", "1x48x2", "--size", "32x48", "--autoencoder", "none"]
    assert benchmark.main(["--against", str(ROOT), *random, *WORDS]) == 0
    assert json.loads(capsys.readouterr().out)["same_frames"] is True


def test_a_process_that_fails_is_one_sentence(tmp_path, world, capsys):
    other = fake_checkout(tmp_path / "other")
    (other / "worldmodel" / "session.py").write_text("raise OSError('the disk is gone')\n")
    settings = against.Settings(str(world), 4, 1, 0)
    with pytest.raises(against.UserError, match="failed with exit status 1: OSError: the disk is"):
        against._walk(other, settings)
    (other / "worldmodel" / "session.py").write_text("import nothing_here\n")
    with pytest.raises(against.UserError, match="No module named 'nothing_here'"):
        against._walk(other, settings)
    (other / "worldmodel" / "session.py").write_text("")
    with pytest.raises(against.UserError, match="no Session in worldmodel.session"):
        against._walk(other, settings)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--against", "nowhere"], "there is no folder nowhere"),
        (["--against", "EMPTY"], "contains worldmodel/session.py, but .* does not"),
        (["--against", "."], "at least 2 --pairs, .* got 1"),
        (["--pairs", "4"], "--pairs together with --against"),
        (["--against", ".", "--set", "window=3"], "cannot be combined with --set"),
        (["--against", ".", "--reference-loop"], "cannot be combined with --reference-loop"),
        (["--against", ".", "--size", "32x48"], "--size and --autoencoder with --random-weights"),
        (["--against", ".", "--random-weights", "wan9"], "expected wan2.1-1.3b"),
        (["--against", ".", "--world", "nowhere"], "There is no world 'nowhere'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(words, reason, tmp_path, world, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # no process is started
    words = [str(tmp_path) if word == "EMPTY" else word for word in words]
    if "--against" in words:
        words = [*words, "--pairs", "1"]
        if not {"--world", "--random-weights"} & set(words):
            words += ["--world", str(world)]
    assert benchmark.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmark: ") and error.count("\n") == 1
    assert re.search(reason, error)

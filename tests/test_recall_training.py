"""Training with recall: windows with remembered frames in stage 1, rollouts that recall in stage 3,
and both go on exactly.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill.config import load_recipe
from distill.data.clips import LatentClips, write_clip, write_latents
from distill.data.recall import RecallClips
from distill.stages import build_stage
from distill.stages.dmd import RolloutPlan
from distill.train import train
from worldmodel.camera import advance, invert
from worldmodel.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Path(__file__).parent.parent / "configs" / "blocks" / "tiny.yaml"
LATENTS = 8


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Clips that turn on the spot: two of a town, one of another, one of a player. Every latent
    holds 100 times its clip's number, plus its own.
    """
    root = tmp_path_factory.mktemp("clips")
    sources = ("town:1", "town:1", "town:2", "play:mine")
    for number, source in enumerate(sources):
        turned = [advance(np.eye(4), [0, 0, 0], 20.0 * i + 180 * number, 0) for i in range(LATENTS)]
        video = np.zeros((4 * LATENTS - 3, 32, 32, 3), np.uint8)
        folder = write_clip(
            root, f"c{number}", video, turned, [0.5, 0.8, 0.5, 0.5], "meadow", 16, source, "CC0"
        )
        numbers = 100.0 * number + torch.arange(LATENTS)
        write_latents(folder, numbers[None, :, None, None].expand(16, -1, 4, 4))
    return root


def test_remembered_frames_come_from_the_same_place_and_from_before(clips):
    plain = LatentClips(clips, 5, seed=3)
    windows = RecallClips(plain, 2, 1.0)
    asked = {number: set() for number in range(4)}
    for index in range(80):
        item = windows[index]
        shown = item["latents"][0, :, 0, 0].long().tolist()
        clip, start = divmod(shown[2], 100)
        assert clip == plain.clip_of(index)
        if not item["recalled"]:  # one frame before the segment is too few
            assert clip > 1 and torch.equal(item["latents"], plain[index]["latents"])
            continue
        assert start >= 1 and shown[2:] == list(range(shown[2], shown[2] + 3))
        assert shown[0] < shown[1]
        for number in shown[:2]:
            other, frame = divmod(number, 100)
            asked[clip].add(other)
            assert frame < start if other == clip else {other, clip} == {0, 1}
        c2w = [plain.clips[n // 100].c2w[n % 100] for n in shown]
        expected = torch.from_numpy(invert(invert(c2w[2]) @ np.stack(c2w))).float()
        torch.testing.assert_close(item["viewmats"], expected)
        again = RecallClips(plain, 2, 1.0)[index]
        assert all(torch.equal(again[key], item[key]) for key in ("latents", "viewmats"))
    assert asked == {0: {0, 1}, 1: {0, 1}, 2: {2}, 3: {3}}


def test_the_share_of_such_windows(clips):
    plain = LatentClips(clips, 5, seed=3)
    count = sum(bool(RecallClips(plain, 2, 0.5)[index]["recalled"]) for index in range(120))
    assert 25 < count < 75
    assert not any(RecallClips(plain, 2, 0.0)[index]["recalled"] for index in range(20))
    with pytest.raises(UserError, match="expected 1 to 4 recalled frames in windows of 5"):
        RecallClips(plain, 5, 0.5)


def recipe(clips, folder, *more):
    options = ("teacher_forcing.init=", "teacher_forcing.recall_frames=2", "dmd.recall=1")
    options += ("teacher_forcing.steps=2", "dmd.steps=2", "dmd.fake_score_updates=1")
    networks = [f"dmd.{name}={folder / 'teacher_forcing' / 'export'}" for name in ("init", "real")]
    data = (f"data.root={clips}", f"run.folder={folder}", "dmd.rollout=8", "data.frames=4")
    return load_recipe(TINY, [*data, *options, *networks, *more])


def test_only_frames_behind_the_remembered_ones_have_a_loss(clips, tmp_path):
    one = recipe(clips, tmp_path, "teacher_forcing.recall_share=1.0")
    stage = build_stage("teacher_forcing", one, torch.device("cpu"))
    batch = torch.utils.data.default_collate(
        [item for item in (stage.dataset()[index] for index in range(12)) if item["recalled"]][:2]
    )
    seen = []
    stage.student.register_forward_hook(lambda _, inputs, out: seen.append(out) or None)
    for weighting in (False, True):
        stage.config = replace(stage.config, weighting=weighting)
        generator = torch.Generator().manual_seed(1)
        ((name, loss, metrics),) = stage.losses(batch, 0, generator)
        seen[-1].retain_grad()
        loss.backward()
        gradient = seen[-1].grad[:, :, 4:].abs().sum((1, 3, 4))  # of the noisy half
        assert name == "student" and (gradient[:, :2] == 0).all() and (gradient[:, 2:] > 0).all()
        assert metrics.keys() == {"recall_first", "recall"}
        if not weighting:
            torch.testing.assert_close(loss.detach(), metrics["recall"])


@pytest.fixture(scope="module")
def straight(clips, tmp_path_factory) -> Path:
    """Both stages, trained without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    for name in ("teacher_forcing", "dmd"):
        train(recipe(clips, folder), name)
    return folder


@pytest.mark.parametrize("name", ["teacher_forcing", "dmd"])
def test_stages_with_recall_go_on_exactly(name, clips, straight, tmp_path):
    start = straight / "teacher_forcing" / "export"
    networks = (f"dmd.init={start}", f"dmd.real={start}")
    for steps in (1, 2):
        stopped = recipe(clips, tmp_path, *networks, f"{name}.steps={steps}")
        train(stopped, name, resume=True)
    ours, theirs = (
        load_file(folder / name / "checkpoints" / "step-00000002" / "student.safetensors")
        for folder in (tmp_path, straight)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_student_rolls_out_with_recall(clips, straight):
    batch = None
    samples = []
    for recall in (1, 0):
        one = recipe(clips, straight, f"dmd.recall={recall}")
        stage = build_stage("dmd", one, torch.device("cpu"))
        assert (stage.sampling().recall, stage.sampling().window) == (recall, 4)
        batch = batch or torch.utils.data.default_collate([stage.dataset()[i] for i in range(2)])
        stage._plan = lambda *_: RolloutPlan(0, 4)  # all eight latents
        windows = stage.prepare(batch, torch.Generator().manual_seed(1))
        draws = (torch.Generator().manual_seed(seed) for seed in (2, 4))
        samples.append(stage.generate_sample(windows, *draws, grad=True).latents)
    recalled, recent = samples
    assert recalled.requires_grad and recalled.shape == recent.shape
    assert not torch.allclose(recalled, recent)  # other frames were seen


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("teacher_forcing.recall_frames=4", "recall_frames must be 0, or a multiple .* got 4"),
        ("dmd.recall=3", "dmd.recall must be at most .* = 2, got 3"),
    ],
)
def test_a_recall_that_does_not_fit_is_one_sentence(option, message):
    with pytest.raises(UserError, match=message):
        load_recipe(TINY, [option])

"""The training loop: options, exact resume after a kill, averages, learning rate, and what each
stage's step does.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distill import train as training
from distill.__main__ import main
from distill.config import RENAMED, StageConfig, current_names, load_recipe
from distill.data.clips import write_clip, write_condition, write_latents
from distill.ema import MovingAverage
from distill.prompts import make_prompt_book
from distill.stages import STAGES, build_stage
from distill.train import learning_rate_factor, train
from worldmodel.errors import UserError
from worldmodel.files import LOCK, exclusive
from worldmodel.models.attention import Bidirectional
from worldmodel.worlds.checkpoint import load_transformer

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ROOT / "configs" / "blocks" / "tiny.yaml"
SMALL_AUTOENCODER = {
    "encoder_widths": "[8, 8, 8, 8]",
    "encoder_blocks": "[1, 1, 1]",
    "decoder_widths": "[8, 8, 8, 8]",
    "decoder_blocks": "[1, 1, 1]",
    "window": "2",
    "detail_weight": "0.5",
    "steps": "4",
    "batch": "2",
}

# Trains every stage in a process of its own, which is killed in its fourth step; the checkpoint is
# from the second.
KILLED = """
import os, signal, sys
import distill.train as training
from distill.config import load_recipe
build = training.build_stage

def mortal(name, recipe, device):
    stage = build(name, recipe, device)
    losses = stage.losses
    def until_killed(batch, step, generator):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from losses(batch, step, generator)
    stage.losses = until_killed
    return stage

training.build_stage = mortal
config, *stages = sys.argv[1].split(",")
for name in stages:
    child = os.fork()
    if not child:
        training.train(load_recipe(config, sys.argv[2:]), name)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, name
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Three clips of six latents: moving noise, each with its mood."""
    root = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    for index, mood in enumerate(["meadow", "dunes", "night"]):
        c2w = np.tile(np.eye(4), (6, 1, 1))
        c2w[:, 2, 3] = 0.1 * np.arange(6)
        video = random.integers(0, 255, (21, 32, 32, 3), np.uint8)
        folder = write_clip(
            root, f"clip-{index}", video, c2w, [0.5, 0.8, 0.5, 0.5], mood, 16, "test", "CC0"
        )
        generator = torch.Generator().manual_seed(index)
        write_latents(folder, torch.randn(16, 6, 4, 4, generator=generator))
        write_condition(folder, torch.randn(20, 6, 4, 4, generator=generator))
    return root


def overrides(clips: Path, folder: Path, *more: str) -> list[str]:
    small = [f"autoencoder.{key}={value}" for key, value in SMALL_AUTOENCODER.items()]
    data = [f"data.root={clips}", f"data.places={clips}"]
    return [*data, f"run.folder={folder}", "dmd.rollout=6", *small, *more]


@pytest.fixture(scope="module")
def straight(clips, tmp_path_factory) -> Path:
    """All stages trained to their end without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    for name in STAGES:
        train(load_recipe(TINY, overrides(clips, folder)), name)
    return folder


@pytest.fixture(scope="module")
def killed(clips, straight, tmp_path_factory) -> tuple[Path, list[str]]:
    """All stages killed in their fourth step, and the options they were trained with."""
    folder = tmp_path_factory.mktemp("killed")
    starts = [
        f"{name}.init={straight}/{init}/export"
        for name, init in (
            ("teacher_forcing", "bidirectional"),
            ("consistency", "teacher_forcing"),
            ("dmd", "consistency"),
            ("places", "dmd"),
        )
    ]
    options = overrides(clips, folder, *starts, f"dmd.real={straight}/bidirectional/export")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", KILLED, ",".join([str(TINY), *STAGES]), *options],
        check=True,
        env=environment,
        cwd=ROOT,
    )
    return folder, options


def make_former(checkpoint: Path) -> None:
    """Gives a checkpoint the names of options and files that the first edition wrote."""
    state = json.loads((checkpoint / "state.json").read_text())
    former = {new: old for old, new in RENAMED.items()}
    sections = {
        former.get(section, section): {
            former.get(f"{section}.{key}", f"{section}.{key}").partition(".")[2]: value
            for key, value in values.items()
        }
        for section, values in state["config"].items()
    }
    sections["dmd"] |= {"sigma_lookup": "exact", "cache_gradient": "detached"}
    del sections["dmd"]["context_sigma"]
    assert {"optimiser", "dmd"} < sections.keys() and "start_share" in sections["dmd"]
    (checkpoint / "state.json").write_text(json.dumps({**state, "config": sections}))
    for file in checkpoint.glob("*fake_score.safetensors"):
        file.rename(file.with_name(file.name.replace("fake_score", "critic")))
    assert (checkpoint / "critic.safetensors").is_file()


@pytest.mark.parametrize("name", list(STAGES))
def test_a_killed_run_goes_on_as_if_nothing_had_happened(name, clips, straight, killed):
    folder, options = killed
    assert [path.name for path in sorted((folder / name / "checkpoints").iterdir())] == [
        "step-00000002"
    ]
    starts = {
        "teacher_forcing": "bidirectional",
        "consistency": "teacher_forcing",
        "dmd": "consistency",
    }
    assert name not in starts or (straight / starts[name] / "export" / "config.json").is_file()
    if name == "dmd":  # as an older version left it
        make_former(folder / name / "checkpoints" / "step-00000002")
    train(load_recipe(TINY, options), name, resume=True)
    ours, theirs = (path / name / "checkpoints" / "step-00000004" for path in (folder, straight))
    files = sorted(path.name for path in theirs.glob("*.safetensors"))
    assert files == sorted(path.name for path in ours.glob("*.safetensors")) and len(files) >= 3
    for file in files:
        expected = load_file(theirs / file)
        actual = load_file(ours / file)
        assert expected.keys() == actual.keys() and expected
        assert all(torch.equal(expected[key], actual[key]) for key in expected), file
    logged = [
        [json.loads(line) for line in (path / name / "metrics.jsonl").open()]
        for path in (straight, folder)
    ]
    losses = [
        [(line["step"], *(v for k, v in line.items() if k.startswith("loss/"))) for line in lines]
        for lines in logged
    ]
    assert losses[0] == losses[1] and [line[0] for line in losses[0]] == [1, 2, 3, 4]


def test_the_export_is_the_average_and_carries_its_prompts(straight):
    for name in ("bidirectional", "teacher_forcing", "consistency", "dmd"):
        exported = load_file(straight / name / "export" / "diffusion_pytorch_model.safetensors")
        average, student = (
            load_file(straight / name / "checkpoints" / "step-00000004" / f"{part}.safetensors")
            for part in ("average", "student")
        )
        assert all(torch.equal(exported[key], average[key]) for key in average)
        assert any(not torch.equal(student[key], average[key]) for key in average)
        assert sorted(load_file(straight / name / "export" / "prompts.safetensors")) == [
            "dunes",
            "meadow",
            "night",
        ]


def test_a_run_folder_in_use_is_left_alone(clips, straight):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"holds a run already .*--resume"):
        train(load_recipe(TINY, overrides(clips, straight)), "bidirectional")
    with pytest.raises(ValueError, match=r"trained with optimizer.grad_clip = 1.0, not 2.0"):
        train(
            load_recipe(TINY, overrides(clips, straight, "optimizer.grad_clip=2")),
            "bidirectional",
            resume=True,
        )
    with pytest.raises(ValueError, match=r"trained with run.seed = 0, not 1"):
        train(load_recipe(TINY, overrides(clips, straight, "run.seed=1")), "dmd", resume=True)
    assert before == {
        path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.is_file()
    }


def test_a_run_older_than_an_option_goes_on_with_its_default(clips, tmp_path):
    options = overrides(clips, tmp_path)
    train(load_recipe(TINY, options), "bidirectional")
    state = tmp_path / "bidirectional/checkpoints/step-00000004/state.json"
    saved = json.loads(state.read_text())
    del saved["config"]["bidirectional"]["optimizer"], saved["config"]["optimizer"]
    state.write_text(json.dumps(saved))
    train(load_recipe(TINY, options), "bidirectional", resume=True)
    for change, was in (
        ("bidirectional.optimizer=muon", "adamw, not muon"),
        ("optimizer.grad_clip=2", "1.0, not 2.0"),
    ):
        with pytest.raises(ValueError, match=f"{change.partition('=')[0]} = {was}: set it back"):
            train(load_recipe(TINY, [*options, change]), "bidirectional", resume=True)


def test_two_trainings_do_not_share_a_run(clips, tmp_path):
    recipe = load_recipe(TINY, overrides(clips, tmp_path))
    with (
        exclusive(tmp_path / "bidirectional"),
        pytest.raises(ValueError, match="another process is writing into .*bidirectional"),
    ):
        train(recipe, "bidirectional", resume=True)
    assert [path.name for path in (tmp_path / "bidirectional").iterdir()] == [LOCK]
    train(recipe, "bidirectional")
    with exclusive(
        tmp_path / "bidirectional"
    ):  # the newest checkpoint of a run in progress may be exported
        train(recipe, "bidirectional", export_only=True)


def test_a_broken_checkpoint_is_one_sentence(clips, tmp_path):
    recipe = load_recipe(TINY, overrides(clips, tmp_path))
    train(recipe, "bidirectional")
    (tmp_path / "bidirectional/checkpoints/step-00000004/average.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"step-00000004 cannot be read.*remove that folder"):
        train(recipe, "bidirectional", resume=True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_training_leaves_a_checkpoint_and_no_export(
    clips, tmp_path, monkeypatch, capsys, number, status
):
    """`train --stage one && train --stage two` must not continue from half-trained weights."""

    def asked_to_stop(name, recipe, device):
        stage = build_stage(name, recipe, device)
        losses = stage.losses

        def losses_and_a_signal(batch, step, generator):
            if step == 2:
                os.kill(os.getpid(), number)
            yield from losses(batch, step, generator)

        stage.losses = losses_and_a_signal
        return stage

    options = overrides(clips, tmp_path, "run.checkpoint_every=0")
    command = [
        "train",
        str(TINY),
        "--stage",
        "bidirectional",
        *(word for option in options for word in ("--set", option)),
    ]
    handler = signal.getsignal(number)
    export = tmp_path / "bidirectional/export"
    export.mkdir(parents=True)
    (export / "older").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(training, "build_stage", asked_to_stop)
        assert main(command) == status
    assert (
        "train: stopped at step 3 of 4, export/ is unchanged; --resume continues"
        in capsys.readouterr().err.splitlines()[-1]
    )
    assert signal.getsignal(number) is handler
    assert [path.name for path in (tmp_path / "bidirectional/checkpoints").iterdir()] == [
        "step-00000003"
    ]
    assert [path.name for path in export.iterdir()] == ["older"]
    assert main([*command, "--resume"]) == 0
    assert (tmp_path / "bidirectional/checkpoints/step-00000004").is_dir() and (
        export / "config.json"
    ).is_file()


def test_a_loss_that_is_no_number_is_never_saved(clips, tmp_path, monkeypatch):
    def poisoned(name, recipe, device):
        stage = build_stage(name, recipe, device)
        losses = stage.losses
        stage.losses = lambda batch, step, generator: (
            (n, loss * (float("nan") if step == 3 else 1), m)
            for n, loss, m in losses(batch, step, generator)
        )
        return stage

    monkeypatch.setattr(training, "build_stage", poisoned)
    with pytest.raises(ValueError, match="became nan before step 4"):
        train(load_recipe(TINY, overrides(clips, tmp_path)), "bidirectional")
    assert [path.name for path in (tmp_path / "bidirectional/checkpoints").iterdir()] == [
        "step-00000002"
    ]


def test_exporting_a_checkpoint_leaves_the_run_alone(clips, straight, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(straight / "bidirectional", folder / "bidirectional")
    shutil.rmtree(folder / "bidirectional/checkpoints/step-00000004")
    metrics = (folder / "bidirectional/metrics.jsonl").read_text()
    train(load_recipe(TINY, overrides(clips, folder)), "bidirectional", export_only=True)
    exported = load_file(folder / "bidirectional/export/diffusion_pytorch_model.safetensors")
    average = load_file(folder / "bidirectional/checkpoints/step-00000002/average.safetensors")
    assert all(torch.equal(exported[key], average[key]) for key in average)
    assert (folder / "bidirectional/metrics.jsonl").read_text() == metrics
    with pytest.raises(ValueError, match="no checkpoint to export"):
        train(load_recipe(TINY, overrides(clips, folder)), "dmd", export_only=True)


def test_weights_that_are_missing_are_named_before_training(clips, tmp_path):
    with pytest.raises(ValueError, match=r"no exported transformer in .*bidirectional/export"):
        train(load_recipe(TINY, overrides(clips, tmp_path)), "teacher_forcing")
    with pytest.raises(ValueError, match=r"no exported autoencoder in .*autoencoder/export"):
        train(
            load_recipe(TINY, overrides(clips, tmp_path, "data.autoencoder=autoencoder")),
            "bidirectional",
        )


@pytest.mark.parametrize("form", ["file", "folder", "trainer"])
def test_weights_without_a_camera_become_pose_conditioned(clips, tmp_path, caplog, form):
    """A small Wan2.1 in its own names starts with the prediction it has without a camera; a step
    later the camera path has learned.
    """
    weights = load_file(ROOT / "tests/golden/weights_cd_teacher.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if "prope" not in name}
    (tmp_path / "wan").mkdir()
    file = tmp_path / "wan/weights.pt"
    torch.save({"generator": weights} if form == "trainer" else weights, file)
    (tmp_path / "wan/config.json").write_text(
        json.dumps({"_class_name": "WanModel", "dim": 48, "num_heads": 2})
    )
    init = f"bidirectional.init={f'{file.parent}/' if form == 'folder' else file}"
    recipe = load_recipe(
        TINY,
        overrides(clips, tmp_path / "runs", "model.text_dim=24", "bidirectional.steps=1", init),
    )
    stage = build_stage("bidirectional", recipe, torch.device("cpu"))
    plain = load_transformer(file)
    assert "has no camera weights: they start as zeros" in caplog.text
    latents = torch.randn(1, 16, 3, 4, 4)
    text = torch.randn(1, 2, 24)
    projmats = torch.randn(1, 3, 4, 4) + 4 * torch.eye(4)
    context = Bidirectional(stage.student.layout(*latents.shape[3:]), 3, projmats)
    with torch.no_grad():
        alone = Bidirectional(plain.layout(*latents.shape[3:]), 3)
        expected = plain(latents, torch.tensor([0.5]), text, alone)
        first = stage.student(latents, torch.tensor([0.5]), text, context)
    assert not plain.config.camera and stage.student.config.camera
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-5)
    train(recipe, "bidirectional")
    made = load_file(tmp_path / "runs/bidirectional/export/diffusion_pytorch_model.safetensors")
    assert all(
        tensor.abs().max() > 0 for name, tensor in made.items() if ".prope_out.weight" in name
    )
    teacher = load_recipe(TINY, overrides(clips, tmp_path / "runs", "model.text_dim=24"))
    assert build_stage(
        "teacher_forcing", teacher, torch.device("cpu")
    ).student.config.camera  # its export is a start like any other


def test_weights_stay_without_a_camera_where_the_recipe_has_none(clips, tmp_path, caplog):
    new = build_stage(
        "bidirectional",
        load_recipe(TINY, overrides(clips, tmp_path, "model.camera=false")),
        torch.device("cpu"),
    ).student
    new.save_pretrained(tmp_path / "own")
    recipe = load_recipe(
        TINY,
        overrides(clips, tmp_path, "model.camera=false", f"bidirectional.init={tmp_path / 'own'}"),
    )
    assert (
        not build_stage("bidirectional", recipe, torch.device("cpu")).student.config.camera
        and caplog.text == ""
    )


def test_it_learns(clips, tmp_path):
    options = overrides(
        clips,
        tmp_path,
        "teacher_forcing.init=",
        "teacher_forcing.steps=40",
        "teacher_forcing.weighting=false",
        "run.log_every=10",
        "run.checkpoint_every=0",
    )
    train(load_recipe(TINY, [*options, "teacher_forcing.lr=5e-3"]), "teacher_forcing")
    losses = [
        json.loads(line)["loss/student"]
        for line in (tmp_path / "teacher_forcing/metrics.jsonl").open()
    ]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]


def test_every_stage_draws_a_picture_with_an_autoencoder(clips, straight):
    for name in STAGES:
        recipe = load_recipe(
            TINY,
            overrides(
                clips,
                straight,
                "data.autoencoder=autoencoder",
                *(f"{s}.sample_steps=2" for s in ("bidirectional", "teacher_forcing")),
            ),
        )
        image = build_stage(name, recipe, torch.device("cpu")).sample(
            torch.Generator().manual_seed(0)
        )
        assert (
            image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.std() > 0
        )
        latents = 6 if name == "dmd" else 4  # dmd.rollout, data.frames
        assert name == "autoencoder" or image.shape == (4 * 32, latents * 32, 3)


@pytest.mark.parametrize(("reuse", "window"), [("false", 0), ("true", 2)])
def test_each_loss_of_dmd_moves_the_network_it_names_alone(clips, straight, reuse, window):
    options = f"dmd.reuse_rollouts={reuse}", f"dmd.score_window={window}"
    recipe = load_recipe(TINY, overrides(clips, straight, *options))
    stage = build_stage("dmd", recipe, torch.device("cpu"))
    assert stage.batches == (1 if recipe.dmd.reuse_rollouts else 3)
    batch = torch.utils.data.default_collate(
        [stage.dataset()[i] for i in range(stage.batches * recipe.dmd.batch)]
    )
    names = []
    for name, loss, _ in stage.losses(batch, 0, torch.Generator().manual_seed(0)):
        names.append(name)
        for module in (stage.student, stage.fake_score):
            module.zero_grad(set_to_none=True)
        loss.backward()
        touched = {
            kind
            for kind, module in (("student", stage.student), ("fake_score", stage.fake_score))
            if any(p.grad is not None for p in module.parameters())
        }
        assert touched == {name}
        assert all(p.grad is None for p in stage.real.parameters())
    assert names == ["student", "fake_score", "fake_score"]


def test_rollouts_of_dmd_end_anywhere_in_the_window_and_only_their_end_learns(clips, straight):
    stage = build_stage(
        "dmd",
        load_recipe(TINY, overrides(clips, straight, "dmd.gt_first_chunk_prob=1")),
        torch.device("cpu"),
    )
    windows = stage.prepare(
        torch.utils.data.default_collate([stage.dataset()[i] for i in range(2)]),
        torch.Generator().manual_seed(0),
    )
    assert windows.latents.shape[2] == 6
    starts = []
    for seed in range(24):
        draws = (torch.Generator().manual_seed(seed) for _ in range(2))
        samples, scored, anchored = stage.generate_sample(windows, *draws, grad=True)
        assert samples.shape[2] == scored.viewmats.shape[1] == 4
        start = next(
            i for i in range(3) if torch.equal(scored.viewmats, windows.viewmats[:, i : i + 4])
        )
        given = torch.equal(samples[:, :, 0], windows.latents[:, :, start])
        starts.append((start, given))
        assert anchored
        assert samples[:, :, -1].requires_grad
    # the scored part is the end of a longer rollout, or begins with the given first latent of a
    # shorter one, anywhere
    assert set(starts) == {(0, True), (1, True), (2, True), (1, False), (2, False)}


@pytest.mark.parametrize(
    ("option", "metric"),
    [("ground_truth_weight", "ground_truth"), ("ground_truth_low_pass_weight", "low_pass")],
)
@pytest.mark.parametrize("given", [0, 1])
def test_the_ground_truth_pulls_rollouts_that_began_with_it(clips, straight, given, option, metric):
    losses = []
    for weight in (0, 2):
        options = overrides(
            clips, straight, f"dmd.gt_first_chunk_prob={given}", f"dmd.{option}={weight}"
        )
        stage = build_stage("dmd", load_recipe(TINY, options), torch.device("cpu"))
        batch = torch.utils.data.default_collate(
            [stage.dataset()[i] for i in range(stage.batches * stage.config.batch)]
        )
        (_, loss, metrics), *_ = stage.losses(batch, 0, torch.Generator().manual_seed(0))
        losses.append(loss)
    assert (metric in metrics) == bool(given)
    torch.testing.assert_close(losses[1] - losses[0], 2 * metrics.get(metric, torch.tensor(0.0)))
    assert bool(given) == bool(losses[1] > losses[0])


def test_noise_on_the_context_changes_what_follows(clips, straight):
    samples = []
    for sigma in (0, 0.2):
        recipe = load_recipe(TINY, overrides(clips, straight, f"dmd.context_sigma={sigma}"))
        stage = build_stage("dmd", recipe, torch.device("cpu"))
        items = torch.utils.data.default_collate([stage.dataset()[i] for i in range(2)])
        windows = stage.prepare(items, torch.Generator().manual_seed(0))
        draws = (torch.Generator().manual_seed(0) for _ in range(2))
        samples.append(stage.generate_sample(windows, *draws, grad=False).latents)
    assert samples[0].shape == samples[1].shape and not torch.equal(*samples)


def test_scores_compare_at_noise_levels_of_their_own(clips, straight):
    drawn = {}
    for shift in (0, 1, 5):
        recipe = load_recipe(
            TINY, overrides(clips, straight, f"dmd.score_timestep_shift={shift}", "dmd.shift=5")
        )
        stage = build_stage("dmd", recipe, torch.device("cpu"))
        drawn[shift], _ = stage._score_draws(
            torch.zeros(400, 16, 1, 1, 1), torch.Generator().manual_seed(0)
        )
        assert stage._sigma_lookup()["shift"] == (shift or 5) and stage.sampling().shift == 5
    torch.testing.assert_close(drawn[0], drawn[5])
    torch.testing.assert_close(drawn[1].mean(), torch.tensor(0.5), atol=0.05, rtol=0)  # uniform
    assert (drawn[5] >= drawn[1]).all()


@pytest.mark.slow
def test_a_compiled_step_is_the_plain_step(clips, straight):
    pytest.importorskip("torch._inductor")
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    losses = []
    for option in ("false", "true"):
        recipe = load_recipe(
            TINY,
            overrides(
                clips, straight, f"run.compile={option}", "model.layers=1", "teacher_forcing.init="
            ),
        )
        torch.manual_seed(0)
        stage = build_stage("teacher_forcing", recipe, torch.device("cpu"))
        batch = torch.utils.data.default_collate([stage.dataset()[i] for i in range(2)])
        ((_, loss, _),) = stage.losses(batch, 0, torch.Generator().manual_seed(0))
        loss.backward()
        losses.append((loss.detach(), stage.student.patch_embedding.weight.grad))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)


def test_sigmas_stay_float32_under_bfloat16_and_the_context_is_noised(clips, straight):
    recipe = load_recipe(
        TINY,
        overrides(
            clips,
            straight,
            "teacher_forcing.context_sigma_max=0.3",
            "teacher_forcing.caption_dropout=1",
        ),
    )
    stage = build_stage("teacher_forcing", recipe, torch.device("cpu"))
    seen = []
    stage.student.register_forward_pre_hook(lambda module, args: seen.append(args))
    batch = torch.utils.data.default_collate([stage.dataset()[i] for i in range(2)])
    with torch.autocast("cpu", torch.bfloat16):
        list(stage.losses(batch, 0, torch.Generator().manual_seed(0)))
    latents, sigma, text, _ = seen[0]
    frames = batch["latents"].shape[2]
    assert sigma.dtype == latents.dtype == torch.float32 and sigma.shape == (2, 2 * frames)
    assert 0 < sigma[:, :frames].max() <= 0.3 < sigma[:, frames:].max()
    assert not torch.equal(latents[:, :, :frames], batch["latents"])
    assert not text.any()  # every caption dropped


def test_average_is_a_copy_until_it_starts():
    source = nn.Linear(3, 2)
    average = nn.Linear(3, 2)
    moving = MovingAverage(source, average, decay=0.9, start=1)
    moving.update(0)
    assert torch.equal(average.weight, source.weight) and not average.weight.requires_grad
    before = average.weight.clone()
    with torch.no_grad():
        source.weight.add_(1.0)
    moving.update(1)
    torch.testing.assert_close(average.weight, 0.9 * before + 0.1 * source.weight)


def test_learning_rate_rises_stays_and_falls():
    config = StageConfig(steps=100, warmup=10, decay="cosine", decay_from=0.5, lr_end=0.1)
    factors = [learning_rate_factor(config, step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[49] == 1.0
    assert factors[75] == pytest.approx(0.55) and factors[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[9:]))
    assert learning_rate_factor(replace(config, decay="constant", warmup=0), 99) == 1.0


def test_prompts_are_made_from_their_captions():
    book = make_prompt_book(["snow", "night"], 4, 64)
    again = make_prompt_book(["night"], 4, 64)
    assert book.names == ("night", "snow") and book.shape == (4, 64)
    assert torch.equal(book["night"], again["night"]) and not torch.equal(
        book["night"], book["snow"]
    )
    assert abs(book["night"].std() - 1) < 0.15


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "blocks").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_recipe_is_valid(path):
    recipe = load_recipe(path)
    assert recipe.export_folder("dmd") == Path(recipe.run.folder) / "dmd" / "export"
    assert (
        recipe.export_folder(recipe.dmd.init) == Path(recipe.run.folder) / "consistency" / "export"
    )


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "dmd: {fake_score_update: 3}",
            [],
            "unknown key 'fake_score_update'; did you mean 'fake_score_updates'",
        ),
        ("consistancy: {lr: 1}", [], "unknown key 'consistancy'; did you mean 'consistency'"),
        ("dmd: {lr: fast}", [], "lr must be a number, got 'fast'"),
        ("dmd: {steps: 1.5}", [], "steps must be a whole number"),
        ("dmd: {steps: 0}", [], "steps must be at least 1, got 0"),
        ("dmd: {chunk: 4}", [], "data.frames is 10, not a multiple of dmd.chunk = 4"),
        ("dmd: {rollout: 8}", [], "dmd.rollout must be 0, or at least data.frames = 10"),
        (
            "dmd: {score_window: 4}",
            [],
            "score_window must be 0 or a divisor of data.frames = 10",
        ),
        ("dmd: {sigma_lookup: grid}", [], "dmd.sigma_lookup = 'grid' is no longer supported"),
        ("", ["dmd.cache_gradient=straight_through"], "only 'detached' is: remove the option"),
        (
            "dmd: {critic: a, fake_score: b}",
            [],
            "its former name: keep 'fake_score'",
        ),
        (
            "optimiser: {}\noptimizer: {}",
            [],
            "its former name: keep 'optimizer'",
        ),
        ("dmd: [1]", [], "expected a mapping"),
        ("dmd: {lr: 1", [], "not valid YAML"),
        ("", ["dmd.lrr=1"], "did you mean 'lr'"),
        ("", ["steps"], "expected section.key=value"),
    ],
)
def test_a_wrong_option_is_one_sentence(tmp_path, text, overrides, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(tmp_path / "recipe.yaml", overrides)
    assert "\n" not in str(caught.value)


def test_former_names_of_options_are_read(tmp_path):
    text = """
    optimiser: {grad_clip: 2}
    data: {first_share: 0.5}
    teacher_forcing: {optimiser: muon}
    consistency: {sigma_lookup: exact}
    dmd: {critic: a, critic_lr: 1, critic_updates: 2, shared: true, judged: 5, skew: 3,
          start_share: 1, truth: 1, truth_scale: 0.5, truth_coarse: 2, score_shift: 3}
    """
    (tmp_path / "recipe.yaml").write_text(text)
    former = load_recipe(tmp_path / "recipe.yaml", ["dmd.truth=4", "optimiser.eps=1"])
    text = """
    optimizer: {grad_clip: 2, eps: 1}
    data: {first_frame_prob: 0.5}
    teacher_forcing: {optimizer: muon}
    dmd: {fake_score: a, fake_score_lr: 1, fake_score_updates: 2, reuse_rollouts: true,
          score_window: 5, length_exponent: 3, gt_first_chunk_prob: 1, ground_truth_weight: 4,
          ground_truth_scale: 0.5, ground_truth_low_pass_weight: 2, score_timestep_shift: 3}
    """
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml") == former
    saved = {"dmd": {"cache_gradient": "straight_through"}}
    with pytest.raises(UserError, match=r"step-8: dmd.cache_gradient = 'straight_through'.*remove"):
        current_names(saved, "step-8")


def test_numbers_are_read_as_people_write_them(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "dmd: {lr: 1e-4, clamp: [0, 1]}\nautoencoder: {start: some/folder}"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml", ["dmd.fake_score_lr=3"])
    assert (
        recipe.dmd.lr == 1e-4 and recipe.dmd.fake_score_lr == 3.0 and recipe.dmd.clamp == (0.0, 1.0)
    )
    assert recipe.autoencoder.start == "some/folder"


def test_muon_learns_and_goes_on_exactly(clips, tmp_path):
    """The joint optimizer is saved and restored like a plain one, and its updates are not
    AdamW's.
    """
    muon = ["bidirectional.optimizer=muon", "bidirectional.steps=4"]
    for folder, steps in (("straight", 4), ("stopped", 2), ("stopped", 4)):
        recipe = load_recipe(
            TINY, overrides(clips, tmp_path / folder, muon[0], f"bidirectional.steps={steps}")
        )
        train(recipe, "bidirectional", resume=True)
    name = "bidirectional/checkpoints/step-00000004/student.safetensors"
    straight = load_file(tmp_path / "straight" / name)
    stopped = load_file(tmp_path / "stopped" / name)
    assert all(torch.equal(straight[key], stopped[key]) for key in straight)
    train(load_recipe(TINY, overrides(clips, tmp_path / "adamw", muon[1])), "bidirectional")
    adamw = load_file(tmp_path / "adamw" / name)
    assert not torch.equal(
        adamw["blocks.0.attn1.to_q.weight"], straight["blocks.0.attn1.to_q.weight"]
    )


@pytest.mark.slow
def test_two_processes_train_one_run(clips, straight, tmp_path):
    """torchrun, the whole command: both processes take part, one of them writes."""
    options = overrides(
        clips,
        tmp_path,
        f"dmd.init={straight}/consistency/export",
        f"dmd.real={straight}/bidirectional/export",
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "distill",
        "train",
        str(TINY),
    ]
    command += ["--stage", "dmd", *(word for option in options for word in ("--set", option))]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [
        json.loads(line) for line in (tmp_path / "dmd" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    weights = load_file(tmp_path / "dmd" / "export" / "diffusion_pytorch_model.safetensors")
    alone = load_file(straight / "dmd" / "export" / "diffusion_pytorch_model.safetensors")
    assert any(
        not torch.equal(weights[name], alone[name]) for name in weights
    )  # the second process drew samples of its own
    assert all(tensor.isfinite().all() for tensor in weights.values())

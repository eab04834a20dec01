"""The commands that measure, at toy size: what they count, what they pair, what they refuse."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill import benchmark as training
from distill.stages.consistency import ConsistencyStage
from worldmodel.bench import benchmark, walk
from worldmodel.bench.flops import clean_flops, pass_flops
from worldmodel.bench.machine import PartClock, matmul_rate
from worldmodel.bench.random_world import Shape, random_config
from worldmodel.models import transformer
from worldmodel.models.attention import Bidirectional
from worldmodel.rollout import Rollout, RolloutConfig

TOY = ["--random-weights", "2x48x2x80", "--latents", "8", "--dtype", "float32"]
TINY = "configs/blocks/tiny.yaml"
COMMANDS = [
    line
    for line in (Path(__file__).parents[1] / "docs" / "gpu.md").read_text().splitlines()
    if line.startswith("python -m ")
]


def report_of(main, words, capsys, status=0):
    assert main([str(word) for word in words]) == status
    shown = capsys.readouterr()
    return json.loads(shown.out) if status == 0 else shown.err


@torch.no_grad()
@pytest.mark.parametrize("camera", [True, False])
def test_operations_are_those_that_torch_counts(camera):
    model = transformer.CausalWanTransformer(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=8,
        freq_dim=16,
        ffn_dim=80,
        num_layers=3,
        camera=camera,
    )
    rollout = Rollout(
        model,
        torch.randn(1, 5, 8),
        RolloutConfig(steps=(1000, 500), chunk=2, window=6),
        height=4,
        width=6,
    )
    place = torch.eye(4, dtype=torch.float64).expand(1, 2, 4, 4)
    lens = torch.tensor([[0.5, 0.8, 0.5, 0.5]])
    for _ in range(4):
        rollout.step(place, lens)
    tokens = 2 * 6  # one product with a frame's camera, 16 wide
    seen = 6 * 6
    cameras = 2 * (2 * 6) * 48 * 16 if camera else 0
    with FlopCounterMode(display=False) as counter:
        rollout.step(place, lens, defer_commit=True)
    expected = 2 * (
        pass_flops(model.config, tokens, seen, 5) + 3 * 4 * cameras
    )  # q, k, v and the result of each layer
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)
    with FlopCounterMode(display=False) as counter:
        rollout._commit(rollout.pending, rollout.pending.context)
    expected = clean_flops(model.config, tokens, seen, 5) + (2 * 4 + 2) * cameras
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)


def test_published_shapes():
    small, large = (
        Shape.parse(name).transformer(torch.device("meta"), torch.bfloat16)
        for name in ("Wan2.1-1.3B", "wan2.1-14b")
    )
    assert dict(small.config) == {
        **dict(large.config),
        "num_attention_heads": 12,
        "num_layers": 30,
        "ffn_dim": 8960,
    }
    assert (large.config.num_attention_heads, large.config.num_layers, large.config.ffn_dim) == (
        40,
        40,
        13824,
    )
    layers = small.blocks[0].attn1
    assert layers.to_q.weight.dtype == layers.prope_out.weight.dtype == torch.bfloat16
    assert (
        small.scale_shift_table.dtype
        == small.condition_embedder.time_embedder.linear_1.weight.dtype
        == torch.float32
    )
    assert sum(p.numel() for p in small.parameters()) == pytest.approx(
        1.49e9, rel=0.01
    )  # 1.42e9 and the cameras' layers


def test_weights_are_drawn_as_they_are_stored():
    network = Shape.parse("1x48x2x80").transformer(torch.device("cpu"), torch.bfloat16)
    assert (
        network.blocks[0].ffn.net[0].proj.weight.shape == (80, 48)
        and network.blocks[0].attn1.prope_out.weight.any()
    )
    with torch.no_grad():
        x = network(
            torch.randn(1, 16, 2, 4, 4),
            torch.tensor([0.5]),
            torch.randn(1, 4, 64),
            Bidirectional(network.layout(4, 4), 2, torch.eye(4).expand(1, 2, 4, 4)),
        )
    assert torch.isfinite(x).all() and 0.1 < x.std() < 10


def test_a_random_world_is_played_as_a_published_one(tiny_bundle):
    shape = Shape.parse("2x48x2")
    config = random_config(shape, Path("minwm-4step"), None)
    assert (config.height, config.width, config.envelope.style, config.rollout.window) == (
        480,
        832,
        "fly",
        20,
    )
    assert random_config(shape, tiny_bundle, None).rollout.window == 4
    assert (
        random_config(shape, None, None).height,
        random_config(Shape.parse("wan2.1-1.3b"), None, None).height,
    ) == (96, 480)
    assert random_config(shape, tiny_bundle, (64, 96)).width == 96


def test_variants_of_every_kind_take_turns(capsys):
    words = [
        *TOY,
        "--world",
        "minwm-4step",
        "--size",
        "32x48",
        "--as-published",
        "--rate",
        "--set",
        "steps=2",
        "window=4",
    ]
    words += [
        "--versus",
        "steps=4",
        "chunk=2",
        "window=4",
        "autoencoder=none",
        "--versus",
        "window=4",
        "memory=16",
    ]
    report = report_of(benchmark.main, words, capsys)
    published, ours, bare, planned = report["variants"]
    assert published["settings"][0] == "reference loop" and published["rollout"] == ours["rollout"]
    assert [v["rollout"]["chunk"] for v in report["variants"]] == [4, 4, 2, 4] and bare[
        "chunks"
    ] == 4
    assert (
        len(planned["rollout"]["steps"]) == 4
        and "as with 16 GB" in planned["engine"]
        and "as with 40 GB" in ours["engine"]
    )
    assert (
        "ratio" not in published
        and "ratio" not in report
        and all(v["ratio"]["total"] > 0 for v in (ours, bare, planned))
    )
    assert (
        0
        < bare["ms_per_latent"]["decode"]["median"]
        < 0.5 * ours["ms_per_latent"]["decode"]["median"]
    )
    work = ours["transformer"]["gflop_per_latent"]
    assert (
        work == published["transformer"]["gflop_per_latent"] and work["network"] > work["clean"] > 0
    )
    share = (
        ours["transformer"]["tflop_per_second"]["both"]
        / report["matmul_rate"]["tflop_per_second"]["median"]
    )
    assert ours["transformer"]["share_of_matmul_rate"]["both"] == pytest.approx(share, abs=2e-3)
    assert (
        all(v["peak_memory_mib"] > 0 for v in report["variants"])
        and report["world"] == "random, as minwm-4step"
    )


def test_a_full_memory_ends_one_variant_and_not_the_run(capsys, monkeypatch):
    plain = walk.Walk.chunk

    def chunk(self):
        if self.rollout.window > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        plain(self)

    monkeypatch.setattr(walk.Walk, "chunk", chunk)
    words = [*TOY, "--size", "32x48", "--set", "window=9", "--versus", "window=3"]
    most = 8
    full, kept = report_of(benchmark.main, words, capsys)["variants"]
    assert full["error"].startswith("CUDA out of memory") and "ms_per_latent" not in full
    assert kept["chunks"] == 8 and "ratio" not in kept
    most = 2
    assert "there is not enough memory" in report_of(benchmark.main, words, capsys, status=1)


def test_a_full_memory_does_not_change_what_is_measured(tiny_bundle):
    world = benchmark._of_one_tier(
        benchmark.World.from_pretrained(tiny_bundle, dtype=torch.float32)
    )
    with pytest.raises(MemoryError):
        world.engine.step_down()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["--random-weights", "2x48x2", "--world", "minwm-4stepp"],
            "or one of .*minwm-4step.*, got 'minwm-4stepp'",
        ),
        (["--size", "32x48"], "expected --size and --autoencoder with --random-weights alone"),
        (["--autoencoder", "wan"], "expected --size and --autoencoder with --random-weights alone"),
        (
            ["--versus", "autoencoder=none"],
            "expected --size and --autoencoder with --random-weights alone",
        ),
        (["--random-weights", "wan2.2"], "expected wan2.1-1.3b, wan2.1-14b or LAYERS"),
        ([*TOY, "--set", "compile=perhaps"], "compile must be one of auto, on, off, got 'perhaps'"),
        (
            [*TOY, "--set", "autoencoder=big"],
            "autoencoder must be one of tiny, wan, none, got 'big'",
        ),
        ([*TOY, "--size", "32"], "expected HEIGHTxWIDTH in pixels such as 96x160, got '32'"),
    ],
)
def test_nothing_is_ignored(words, reason, capsys):
    error = report_of(benchmark.main, words, capsys, status=2)
    assert error.startswith("benchmark: ") and error.count("\n") == 1
    assert re.search(reason, error)


def test_the_clock_tells_whole_parts():
    clock = PartClock(torch.device("cpu"))
    done = []
    outer = clock.timed("outer", lambda: clock.timed("inner", lambda: 3)())
    assert outer() == 3
    for piece in clock.timed_pieces("pieces", lambda n: iter(range(n)))(2):
        done.append(piece)
    spans = {span.part: span for span in clock.take()}
    assert list(spans) == ["inner", "outer", "pieces"] and done == [0, 1] and clock.take() == []
    assert spans["outer"].begin <= spans["inner"].begin <= spans["inner"].end <= spans["outer"].end
    assert spans["outer"].milliseconds >= spans["inner"].milliseconds >= 0


def test_matmul_rate():
    rate = matmul_rate(torch.device("cpu"), torch.float32, 64)
    assert rate["size"] == 64 and 1e-4 < rate["tflop_per_second"]["median"] < 100


# -------------------- training


@pytest.mark.slow
def test_every_stage_is_timed_with_and_without_checkpointing(capsys, monkeypatch):
    saved = []
    plain = transformer.checkpoint
    monkeypatch.setattr(
        transformer,
        "checkpoint",
        lambda *args, **options: saved.append(1) or plain(*args, **options),
    )
    report = report_of(training.main, [TINY, "--size", "32x48", "--steps", "1"], capsys)
    assert [(s["stage"], s["gradient_checkpointing"]) for s in report["stages"]] == [
        (stage, flag)
        for stage in ("bidirectional", "teacher_forcing", "consistency", "dmd")
        for flag in (False, True)
    ]
    for stage in report["stages"]:
        seconds = stage["seconds_per_sample"]
        assert set(seconds) == {"total", "student"} | (
            {"fake_score"} if stage["stage"] == "dmd" else set()
        )
        parts = sum(times["median"] for part, times in seconds.items() if part != "total")
        assert (
            seconds["total"]["median"] == pytest.approx(parts, rel=0.2, abs=2e-3)
            and stage["peak_memory_mib"] > 0
        )
    assert report["size"] == [32, 48] and report["frames"] == 4 and saved
    saved.clear()
    report_of(
        training.main,
        [
            TINY,
            "--size",
            "32x48",
            "--steps",
            "1",
            "--stages",
            "consistency",
            "--checkpointing",
            "off",
        ],
        capsys,
    )
    assert not saved


def test_the_stages_are_those_of_training():
    recipe = training.random_recipe(training.load_recipe(TINY, []))
    stage = training.random_stage("consistency", recipe, (4, 6), torch.device("cpu"))
    assert isinstance(stage, ConsistencyStage) and type(stage).losses is ConsistencyStage.losses
    item = stage.dataset()[5]
    assert (
        item["latents"].shape == (16, 4, 4, 6)
        and item["viewmats"].shape == (4, 4, 4)
        and item["intrinsics"].shape == (4,)
    )
    assert torch.equal(item["latents"], stage.dataset()[5]["latents"]) and not torch.equal(
        item["latents"], stage.dataset()[1]["latents"]
    )
    assert item["viewmats"][3, 2, 3] == pytest.approx(-0.24)


def test_one_variant_that_memory_does_not_hold(capsys, monkeypatch):
    plain = training.TimedStage._seconds

    def seconds(timed, *inputs):
        if not timed.checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return plain(timed, *inputs)

    monkeypatch.setattr(training.TimedStage, "_seconds", seconds)
    words = [TINY, "--size", "32x48", "--steps", "1", "--stages", "bidirectional"]
    full, kept = report_of(training.main, words, capsys)["stages"]
    assert full["error"].startswith("CUDA out of memory") and kept["steps"] == 1
    assert "not enough memory" in report_of(
        training.main, [*words, "--checkpointing", "off"], capsys, status=1
    )


def test_published_shapes_are_recipes():
    recipe = training.published_recipe("wan2.1-14b", ["data.frames=21", "consistency.chunk=3"])
    assert (
        recipe.model.layers,
        recipe.model.heads,
        recipe.model.head_dim,
        recipe.model.text_length,
    ) == (40, 40, 128, 512)
    assert recipe.run.precision == "bfloat16" and recipe.dmd.batch == 1 and recipe.data.frames == 21


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        # Wan2.1's own autoencoder takes most of a minute
        pytest.param(command, marks=pytest.mark.slow) if "autoencoder=wan" in command else command
        for command in COMMANDS
    ],
    ids=lambda command: command.split("docs/results/")[1],
)
def test_the_commands_for_a_gpu_run_at_toy_size(command, capsys, tmp_path):
    """As docs/gpu.md has them, except for the device, the shape, the size, the number of latents,
    and the compiler.
    """
    if "fp8" in command:
        pytest.importorskip("torchao")
    command = command.replace("docs/results", str(tmp_path)).replace("compile=on", "compile=off")
    package, subcommand, *words = command.removeprefix("python -m ").split()
    assert subcommand == "benchmark"
    play = package == "worldmodel"
    words = [
        {"cuda": "cpu", "wan2.1-1.3b": "1x48x2" if play else TINY, "48": "8"}.get(word, word)
        for word in words
    ]
    main = benchmark.main if play else training.main
    report = report_of(main, [*words, "--size", "32x48"], capsys)
    assert json.loads(next(tmp_path.iterdir()).read_text()) == report
    assert not any(
        "error" in part for part in report.get("variants", []) + report.get("stages", [])
    )
    assert len(COMMANDS) == 7


def test_training_benchmark_refuses_what_it_cannot_do(capsys):
    for words in (
        ["wan2.1-2b"],
        [TINY, "--size", "33x48"],
        [TINY, "--steps", "0"],
        [TINY, "--set", "dmd.btch=2"],
    ):
        error = report_of(training.main, words, capsys, status=2)
        assert error.startswith("benchmark: ") and error.count("\n") == 1

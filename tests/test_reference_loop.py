"""The reference loop generates what the rollout generates, driven as the public loops do it."""

import json

import pytest
import torch

from worldmodel.bench import benchmark
from worldmodel.bench.reference_loop import ReferenceLoop
from worldmodel.camera import MotionStep, invert, parse_trajectory
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.rollout import Rollout, RolloutConfig

LENS = torch.tensor([[0.5, 0.75, 0.5, 0.5]], dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("camera", [True, False])
@pytest.mark.parametrize(
    "config",
    [{"window": 4}, {"window": 5, "sinks": 1}, {"window": 6, "chunk": 2, "sinks": 1}],
    ids=str,
)
def test_it_generates_what_the_rollout_generates_at_absolute_positions(config, camera):
    torch.manual_seed(0)
    model = CausalWanTransformer(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=8,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
        camera=camera,
    ).eval()
    for block in model.blocks if camera else ():
        torch.nn.init.normal_(block.attn1.prope_out.weight, std=0.2)
    config = RolloutConfig(positions="absolute", **config)
    poses = (
        torch.from_numpy(
            invert(parse_trajectory("w*4,w+l*4,s*2", MotionStep(0.5, 6.0), style="walk")[1:])
        )
        .float()
        .double()
    )
    arguments = {
        "model": model,
        "text": torch.randn(1, 3, 8),
        "config": config,
        "height": 4,
        "width": 6,
    }
    ours = Rollout(**arguments)
    theirs = ReferenceLoop(**arguments)
    for start in range(0, 10, config.chunk):
        viewmats = poses[None, start : start + config.chunk]
        one, other = (
            loop.step(viewmats, LENS, generator=torch.Generator().manual_seed(start))
            for loop in (ours, theirs)
        )
        torch.testing.assert_close(one, other, atol=2e-4, rtol=0)
    assert ours.frames == theirs.frames == 10


def test_the_benchmark_puts_it_first_and_reports_the_gain(capsys):
    words = (
        "--random-weights 2x48x2 --size 32x48 --latents 8 --dtype float32 --threads 1 "
        "--reference-loop"
    )
    assert benchmark.main(words.split()) == 0
    report = json.loads(capsys.readouterr().out)
    published, ours = report["variants"]
    assert published["settings"] == ["reference loop"] and ours["settings"] == []
    assert published["ms_per_latent"]["clean"]["median"] > 0 and report["ratio"]["total"] > 0
    assert benchmark.main([*words.split(), "--latents", "901"]) == 2
    assert "expected at most 900 --latents" in capsys.readouterr().err
    assert benchmark.main([*words.split(), "--set", "sampler=euler"]) == 2
    assert "expected sampler renoise and guidance 1, got euler" in capsys.readouterr().err

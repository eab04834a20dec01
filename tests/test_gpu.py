"""What only a CUDA device can show; skipped where there is none."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.data.blocks.renderer import render
from distill.data.blocks.town import Town
from worldmodel.camera import advance
from worldmodel.engine.options import EngineOptions
from worldmodel.models.attention import TeacherForcing
from worldmodel.rollout import Rollout, RolloutConfig
from worldmodel.session import Session
from worldmodel.worlds.checkpoint import load_transformer
from worldmodel.worlds.world import World

WEIGHTS = Path(__file__).parent / "golden" / "weights_big.safetensors"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def generate(device, config):
    model = load_transformer(WEIGHTS, attention_head_dim=24).eval().to(device)
    rollout = Rollout(
        model, torch.ones(1, 5, 32, device=device), config, height=4, width=4, device=device
    )
    viewmats = torch.eye(4, dtype=torch.float64).repeat(1, 6, 1, 1)
    viewmats[0, :, 2, 3] = -0.1 * torch.arange(6)
    lens = torch.tensor([[0.5, 0.8, 0.5, 0.5]], device=device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        chunks = [
            rollout.step(viewmats[:, i : i + 1].to(device), lens, generator=generator)
            for i in range(6)
        ]
    return torch.cat(chunks, 2).cpu()


def test_rollout_on_cuda_matches_cpu():
    config = RolloutConfig(window=4, sinks=1)
    torch.testing.assert_close(generate("cuda", config), generate("cpu", config), atol=1e-3, rtol=0)


def test_no_chunk_waits_for_the_device():
    model = load_transformer(WEIGHTS, attention_head_dim=24).eval().to("cuda")
    config = RolloutConfig(window=4)
    rollout = Rollout(
        model, torch.ones(1, 5, 32, device="cuda"), config, height=4, width=4, device="cuda"
    )
    viewmats = torch.eye(4, dtype=torch.float64, device="cuda").view(1, 1, 4, 4)
    lens = torch.full((1, 4), 0.5, device="cuda")
    with torch.no_grad():
        rollout.step(viewmats, lens)  # libraries set themselves up
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(6):
                rollout.step(viewmats, lens, defer_commit=True)
            rollout.commit_pending()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_no_step_of_a_session_waits_for_the_device(tiny_bundle):
    session = Session(
        World.from_pretrained(tiny_bundle, "cuda", torch.float32, EngineOptions(compile="off")),
        image="grey-0",
    )
    poses = [advance(np.eye(4), [0.0, 0.0, 0.1 * step], 0.0, 0.0) for step in range(12)]
    for pose in poses[:4]:  # libraries set themselves up
        session.step(pose)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for pose in poses[4:]:  # the ring is rebuilt in between
            session.step(pose)
            session.commit_pending()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_ring_stays_where_it_is_on_cuda(tiny_bundle):
    session = Session(
        World.from_pretrained(tiny_bundle, "cuda", torch.float32, EngineOptions(compile="off")),
        image="grey-0",
    )
    rings = []
    for step in range(10):
        session.step(advance(np.eye(4), [0.0, 0.0, 0.1 * step], 0.0, 0.0))
        rings.append(
            [x.data_ptr() for layer in session.rollout.cache._ring.layers.values() for x in layer]
        )
    assert rings[0] and all(ring == rings[0] for ring in rings)


def test_decoding_in_a_stream_of_its_own_changes_no_frame(tiny_bundle):
    world = World.from_pretrained(tiny_bundle, "cuda", torch.float32, EngineOptions(compile="off"))
    streamed = Session(world)
    plain = Session(world)
    plain._decoder_stream = None
    for step in range(6):
        pose = advance(np.eye(4), [0.0, 0.0, 0.5 * step], 0.0, 0.0)
        ours, theirs = (session.step(pose).frames for session in (streamed, plain))
        np.testing.assert_array_equal(ours, theirs)


def test_compiled_blocks_agree_on_cuda(tiny_bundle):
    world = World.from_pretrained(tiny_bundle, "cuda", torch.float32, EngineOptions(compile="on"))
    compiled = Session(world, image="grey-0").step(np.eye(4)).frames
    assert world.engine.compiled.error == "" and world.engine.compiled.ready
    world = World.from_pretrained(tiny_bundle, "cuda", torch.float32, EngineOptions(compile="off"))
    plain = Session(world, image="grey-0").step(np.eye(4)).frames
    assert np.abs(compiled.astype(int) - plain).max() <= 1


def test_teacher_forcing_gradients_on_cuda_match_cpu():
    x = torch.randn(1, 16, 4, 4, 4)
    clean = torch.randn(1, 16, 4, 4, 4)
    text = torch.randn(1, 5, 32)
    sigma = torch.rand(1, 4)
    gradients = []
    for device in ("cpu", "cuda"):
        model = load_transformer(WEIGHTS, attention_head_dim=24).to(device)
        context = TeacherForcing(model.layout(4, 4), frames=4, chunk=1)
        both = torch.cat([clean, x], dim=2), torch.cat([torch.zeros(1, 4), sigma], dim=1)
        out = model(*(part.to(device) for part in both), text.to(device), context)
        out[:, :, 4:].square().mean().backward()
        gradients.append(model.blocks[0].attn1.to_k.weight.grad.cpu())
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()


def test_renderer_on_cuda_matches_cpu():
    pose = torch.eye(4, dtype=torch.float64)[None]
    pose[0, 1, 3] = -0.17
    town = Town("meadow", 3)
    lens = [0.5, 0.8333, 0.5, 0.5]
    ours, theirs = (
        render(town, pose.numpy(), lens, 48, 80, device=device).cpu().int()
        for device in ("cpu", "cuda")
    )
    assert (ours - theirs).abs().float().mean() < 0.5

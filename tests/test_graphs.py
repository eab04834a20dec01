"""Recorded passes. A tape stands in for the CUDA graph: it knows nothing but operations and the
tensors that they were done on.
"""

import gc
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_network import NoWaiting
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worldmodel.engine.engine import HISTORY, TIERS, EngineOptions, Tier, demand, start_engine
from worldmodel.graphs import CudaRecorder, Graphs
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.rollout import Rollout, RolloutConfig
from worldmodel.session import Session
from worldmodel.worlds.world import World


class Tape(TorchDispatchMode):
    """Remembers operations; `play` does them again on the same tensors and leaves results where
    they were.
    """

    def __init__(self):
        super().__init__()
        self.done = []
        self.played = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.done.append((operation, args, kwargs or {}, result))
        return result

    def play(self):
        self.played += 1
        for operation, args, kwargs, result in self.done:
            for old, new in zip(
                tree_leaves(result), tree_leaves(operation(*args, **kwargs)), strict=True
            ):
                if (
                    isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr()
                ):  # no view, not in place
                    old.copy_(new)


class Tapes:
    """As `CudaRecorder`; `failing`: the recordings with these numbers fail, half-way."""

    def __init__(self, failing=()):
        self.made = []
        self.failing = failing

    def __call__(self, work):
        work()
        with Tape() as tape:
            result = work()
        for tensor in (x for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            tensor.fill_(float("nan"))  # a CUDA graph computes nothing while it is recorded
        self.made.append(tape)
        if len(self.made) - 1 in self.failing:
            raise torch.OutOfMemoryError("CUDA out of memory.\nLong story")
        return result, tape.play


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    model = CausalWanTransformer(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=8,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
    )
    for block in model.blocks:
        torch.nn.init.normal_(block.attn1.prope_out.weight, std=0.2)
    return model.eval().requires_grad_(False)


def graphs_of(tapes, code=lambda: 0):
    return Graphs(lambda: tapes, code)


def begin(network, config, graphs=None):
    prompts = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(2))
    rollout = Rollout(
        network,
        prompts[0],
        config,
        height=4,
        width=4,
        unconditional=torch.zeros(5, 8),
        graphs=graphs,
    )
    return rollout, prompts


def on(rollout, latents, seed=1, settle=False):
    """The next latents, along a path that walks and turns."""
    c2w = torch.eye(4, dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    chunk = rollout.config.chunk
    dreamed = []
    angles = 0.1 * torch.arange(rollout.frames, rollout.frames + latents, dtype=torch.float64)
    c2w = c2w.repeat(latents, 1, 1)
    c2w[:, 0, 0] = c2w[:, 2, 2] = angles.cos()
    c2w[:, 0, 2] = angles.sin()
    c2w[:, 2, 0] = -angles.sin()
    c2w[:, 2, 3] = angles
    viewmats = torch.linalg.inv_ex(c2w).inverse[None]
    lens = torch.tensor([[0.5, 0.8, 0.5, 0.5]])
    with torch.no_grad():
        for i in range(0, latents, chunk):
            dreamed.append(
                rollout.step(viewmats[:, i : i + chunk], lens, generator=draw, settle=settle)
            )
            if not rollout.config.merge_clean:
                rollout.settle()
    return torch.cat(dreamed, 2)


CONFIGS = [
    RolloutConfig(window=4),
    RolloutConfig(window=5, sinks=1, steps=(1000,)),
    RolloutConfig(window=6, sinks=2, chunk=2),
    RolloutConfig(window=7, sinks=1, chunk=3, positions="absolute"),
    RolloutConfig(window=4, sinks=1, guidance=2.0, sampler="euler"),
    RolloutConfig(window=1),
]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    "config",
    CONFIGS,
    ids=lambda config: f"{config.window}-{config.sinks}-{config.chunk}-{config.guidance}",
)
def test_a_played_dream_is_the_plain_one(network, config, merge):
    config = replace(config, merge_clean=merge, history=20)
    tapes = Tapes()
    dreams = []
    for graphs in (None, graphs_of(tapes)):
        rollout, prompts = begin(network, config, graphs)
        length = 3 * config.window // config.chunk * config.chunk + 3 * config.chunk
        parts = [on(rollout, length, 1)]
        with torch.no_grad():
            rollout.set_text(prompts[1])
        parts.append(on(rollout, 2 * config.chunk, 2))
        rollout.rewind(rollout.frames - 4 * config.chunk)
        twin = rollout.fork()
        parts += [on(twin, 4 * config.chunk, 3), on(rollout, 4 * config.chunk, 4)]
        with torch.no_grad():
            rollout.set_text(prompts[0])
        parts.append(on(rollout, 3 * config.chunk, 5))
        dreams.append(torch.cat(parts, 2))
    torch.testing.assert_close(dreams[1], dreams[0], atol=1e-6, rtol=0)
    first = tapes.made[: 2 + (merge and len(config.steps) > 1)]
    assert len({len(tape.done) for tape in first}) == len(first)  # kinds of passes
    assert sum(tape.played for tape in tapes.made) > length // config.chunk * len(config.steps)
    assert graphs.fault == ""


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
def test_where_recording_fails_the_dream_goes_on_plainly(network, merge, failing):
    config = RolloutConfig(window=4, sinks=1, merge_clean=merge)
    tapes = Tapes({failing})
    graphs = graphs_of(tapes)
    expected = on(begin(network, config)[0], 10)
    rollout, _ = begin(network, config, graphs)
    torch.testing.assert_close(on(rollout, 10), expected, atol=1e-6, rtol=0)
    assert graphs.fault == (
        "Passes cannot be recorded as CUDA graphs here (CUDA out of memory); they run as they are."
    )
    assert len(tapes.made) == failing + 1  # nothing is tried again
    played = [tape.played for tape in tapes.made]
    on(rollout.fork(), 6)
    assert (
        len(tapes.made) == failing + 1
        and [tape.played for tape in tapes.made] == played
        and played[failing] == 0
    )


@pytest.mark.parametrize("merge", [False, True])
def test_nobody_waits_for_the_device(network, merge):
    tapes = Tapes()
    rollout, _ = begin(
        network, RolloutConfig(window=4, sinks=1, merge_clean=merge), graphs_of(tapes)
    )
    with NoWaiting():
        on(rollout, 12)
        rollout.settle()
    assert sum(tape.played for tape in tapes.made) > 12


def test_what_is_recorded_is_the_code_at_hand(network):
    tapes = Tapes()
    code = None
    rollout, _ = begin(
        network, RolloutConfig(window=3, steps=(1000,)), graphs_of(tapes, lambda: code)
    )
    on(rollout, 6)
    assert tapes.made == []  # the compiler is behind
    for now, recordings in ((1, 2), (2, 4)):
        code = now
        on(rollout, 1)
        assert len(tapes.made) == recordings - 2  # the new code's first passes
        on(rollout, 1)
        assert len(tapes.made) == recordings  # a step and a clean pass
    played = tapes.made[0].played
    code = None
    on(rollout, 2)
    assert len(tapes.made) == 4 and tapes.made[0].played == played == 1


def test_gradients_are_never_recorded(network):
    tapes = Tapes()
    rollout, _ = begin(network, RolloutConfig(window=3, steps=(1000,)), graphs_of(tapes))
    on(rollout, 6)
    made = len(tapes.made)
    played = [tape.played for tape in tapes.made]
    viewmats = torch.eye(4, dtype=torch.float64).view(1, 1, 4, 4)
    lens = torch.full((1, 4), 0.5)
    noise = torch.randn(1, 16, 1, 4, 4, requires_grad=True)
    for _ in range(3):
        rollout.step(viewmats, lens, noise=noise, grad=True).sum().backward()
    assert noise.grad.abs().sum() > 0 and (
        len(tapes.made),
        [tape.played for tape in tapes.made],
    ) == (made, played)


@pytest.mark.parametrize("merge", [False, True])
def test_recordings_go_with_their_rollout(network, merge):
    tapes = Tapes()
    rollout, _ = begin(
        network, RolloutConfig(window=4, sinks=1, merge_clean=merge), graphs_of(tapes)
    )
    on(rollout, 12)
    gone = [weakref.ref(rollout.cache), weakref.ref(rollout._passes)]
    gone += [
        weakref.ref(x)
        for recording in rollout._passes._recordings.values()
        if recording
        for x in recording.inputs
    ]
    tapes.made.clear()
    gc.disable()  # a cycle would keep a whole ring until somebody collects it
    try:
        del rollout
        assert len(gone) > 20 and not any(reference() is not None for reference in gone)
    finally:
        gc.enable()


def test_a_session_plays_and_says_once_that_it_cannot(tiny_bundle):
    world = World.from_pretrained(tiny_bundle, dtype=torch.float32)
    poses = []
    for step in range(12):
        poses.append(np.eye(4))
        poses[-1][2, 3] = 0.1 * step
    expected = Session(world, image="grey-0")
    expected = [expected.step(pose).frames for pose in poses]
    for tapes, notices in ((Tapes(), 0), (Tapes({1}), 1)):
        graphs = world.engine.graphs = graphs_of(tapes, world.engine.code)
        session = Session(world, image="grey-0")
        chunks = [session.step(pose) for pose in poses]
        for chunk, frames in zip(chunks, expected, strict=True):
            assert np.abs(chunk.frames.astype(int) - frames).max() <= 1
        said = [chunk.notice for chunk in chunks if chunk.notice]
        assert len(said) == notices and all("cannot be recorded" in notice for notice in said)
        assert world.engine.graphs is (None if notices else graphs) and len(tapes.made) == 2
        assert ("recorded as CUDA graphs" in world.engine.describe(session.config)) != notices


@pytest.mark.parametrize(
    ("choice", "device", "on"),
    [
        ("auto", "cuda", False),
        ("on", "cuda", True),
        ("off", "cuda", False),
        ("on", "cpu", False),
        ("auto", "mps", False),
    ],
)
def test_passes_are_recorded_on_cuda_for_who_asks_for_it(network, monkeypatch, choice, device, on):
    monkeypatch.setattr("worldmodel.engine.engine.CompiledBlocks", lambda blocks: None)
    engine = start_engine(
        EngineOptions(compile=choice, attention="torch"), TIERS, network, torch.device(device)
    )
    assert (engine.graphs is not None) == on and (
        not on or engine.graphs.recorder.func is CudaRecorder
    )


def test_what_is_recorded_is_compiled_and_has_these_weights(tiny_bundle, monkeypatch):
    done = threading.Event()

    def compile(half, **_):
        return lambda *inputs, **options: done.wait() and half(*inputs, **options)

    monkeypatch.setattr(torch, "compile", compile)
    world = World.from_pretrained(
        tiny_bundle, dtype=torch.float32, engine=EngineOptions(compile="on")
    )
    engine = world.engine
    tapes = Tapes()
    first = engine.code()
    engine.graphs = graphs_of(tapes, engine.code)
    session = Session(world)
    poses = [np.eye(4)] * 6
    for pose in poses:
        session.step(pose)
        session.settle()
    assert engine.code() is None and tapes.made == []
    done.set()
    engine.compiled.wait()
    assert engine.code() == first
    for pose in poses:
        session.step(pose)
    assert len(tapes.made) == 2
    engine.tiers = (Tier("small", "int8"),)
    assert engine.code() not in (None, first)


def test_memory_is_planned_for_recordings():
    model = CausalWanTransformer(
        num_attention_heads=2, attention_head_dim=24, text_dim=8, ffn_dim=64, num_layers=2
    ).to(torch.bfloat16)
    plain, recorded = (demand(model, 8, 8, 1, 0, 0, rows) for rows in (0, 512))
    config = RolloutConfig(window=4)
    more = recorded.of(TIERS[0], config, HISTORY) - plain.of(TIERS[0], config, HISTORY)
    prompt = 2 * 2 * 512 * 48 * 2  # keys and values, layers, rows, width, bytes
    assert more > prompt + recorded.stored and recorded.rest - plain.rest > prompt

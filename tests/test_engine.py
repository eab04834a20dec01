"""The engine: a world in little memory, in 8 bits, compiled while it is played. Devices are played
by numbers here.
"""

import gc
import itertools
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights

from worldmodel import session as session_room
from worldmodel.camera import MotionStep, parse_trajectory
from worldmodel.client.scenes import fastest_device
from worldmodel.device import open_device
from worldmodel.engine import engine
from worldmodel.engine.compile import CompiledBlocks
from worldmodel.engine.engine import (
    HISTORY,
    TIERS,
    Engine,
    Tier,
    choose_attention,
    demand,
    select_tiers,
    tiers_from,
)
from worldmodel.engine.options import CHOICES, EngineOptions
from worldmodel.engine.quantize import quantize
from worldmodel.models.attention import Bidirectional
from worldmodel.models.kv_cache import KVCache
from worldmodel.models.tiny_autoencoder import StreamingDecoder, StreamingEncoder
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.rollout import RolloutConfig
from worldmodel.session import Session
from worldmodel.worlds.world import World

GIB = 2**30
WALK = parse_trajectory("w*4,w+l*8", MotionStep(0.5, 6.0), style="walk")[1:]


@pytest.fixture
def world(tiny_bundle):
    """A tiny world of one's own, whose network may be changed."""
    return World.from_pretrained(tiny_bundle, dtype=torch.float32)


@pytest.fixture(scope="module")
def wan():
    """Memory that Wan2.1-1.3B with cameras needs at 480x832, frame by frame, with the tiny
    autoencoder (22 MB; 68 MB a state).
    """
    with init_empty_weights():
        model = CausalWanTransformer().to(torch.bfloat16)
    return demand(model, 60, 104, 1, rest=GIB, rewound=68 * 2**20)


@pytest.mark.parametrize(
    ("free", "tier"), [(80, 0), (39, 0), (22.5, 1), (15.3, 2), (11.2, 3), (7.4, 4)]
)
def test_memory_decides_the_tier(wan, free, tier):
    config = RolloutConfig(window=12)
    chosen = select_tiers(TIERS, wan, config, HISTORY, int(free * GIB))
    assert (chosen[0].name, chosen[1:]) == (TIERS[tier].name, TIERS[tier + 1 :])
    kept = chosen[0].rollout(config, HISTORY).history  # as many latents to rewind as fit
    assert wan.of(chosen[0], config, HISTORY) <= 0.95 * free * GIB
    more = replace(chosen[0], history=kept + 1)
    assert kept == HISTORY or wan.of(more, config, HISTORY) > 0.95 * free * GIB
    assert wan.of(TIERS[tier], config, HISTORY) < free * GIB
    assert (
        wan.of(TIERS[tier], replace(config, guidance=3.0), HISTORY)
        > wan.of(TIERS[tier], config, HISTORY) + config.chunk * wan.shown
    )


def test_full_device_is_one_sentence(wan):
    for free in (0, 2 * GIB):
        with pytest.raises(
            ValueError, match=r"needs \d+\.\d GiB .* are free: close other programs"
        ):
            select_tiers(TIERS, wan, RolloutConfig(), HISTORY, free)


def test_a_world_opens_in_what_is_free_or_asked_for(tiny_bundle, monkeypatch):
    monkeypatch.setattr(engine, "has_torchao", lambda: True)
    assert World.from_pretrained(tiny_bundle).engine.tiers == TIERS  # a CPU
    small = World.from_pretrained(tiny_bundle, engine=EngineOptions(memory="16"))
    assert small.engine.tiers == TIERS[2:] and Session(small, history=9).config.history == 1
    assert tiers_from(EngineOptions(weights="fp8"))[0] == Tier(TIERS[0].name, weights="fp8")
    monkeypatch.setattr("worldmodel.worlds.world.free_memory", lambda device: 0)
    with pytest.raises(ValueError, match="0.0 GiB are free"):
        World.from_pretrained(tiny_bundle)
    monkeypatch.setattr("worldmodel.worlds.world.free_memory", lambda device: GIB)
    assert World.from_pretrained(tiny_bundle).engine.tier == TIERS[0]


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_device_without_a_free_byte_is_not_an_unknown_one(monkeypatch, device):
    out_of_memory(
        monkeypatch,
        torch,
        "zeros",
        {0},
        RuntimeError,
        "CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA",
    )
    with pytest.raises(
        ValueError,
        match=(
            f"^The memory of the device '{device}' is full, not one number fits: close other "
            "programs"
        ),
    ):
        open_device(device)
    out_of_memory(
        monkeypatch, torch, "zeros", {0}, AssertionError, "Torch not compiled with CUDA enabled"
    )
    with pytest.raises(
        ValueError, match=f"expected a device that torch can compute on here, .* got '{device}'"
    ):
        open_device(device)


@pytest.mark.parametrize(("here", "device"), [("cuda mps", "cuda"), ("mps", "mps"), ("", "cpu")])
def test_play_takes_the_fastest_device(monkeypatch, here, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in here)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in here)
    assert fastest_device() == device


def test_a_tier_holds_a_chunk_and_the_sinks():
    config = TIERS[-1].rollout(RolloutConfig(window=21, chunk=3, sinks=1), HISTORY)
    assert (config.window, config.history) == (7, 1)


@pytest.mark.parametrize("option", ["memory", "weights", "compile", "attention"])
def test_unknown_values_are_named(option):
    with pytest.raises(ValueError, match=f"{option} must be one of .*, got 'much'"):
        EngineOptions(**{option: "much"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_kernel_that_is_not_there_is_refused():
    assert choose_attention("auto", torch.device("cpu")) == "torch"
    with pytest.raises(ValueError, match="FlashAttention 3 cannot be used here"):
        choose_attention("fa3", torch.device("cpu"))


def out_of_memory(
    monkeypatch, place, name, at, kind=torch.OutOfMemoryError, words="CUDA out of memory."
):
    """Lets the calls of `place.name` with the numbers `at` fail as on a full GPU."""
    plain = getattr(place, name)
    calls = itertools.count()

    def call(*inputs, **options):
        if next(calls) in at:
            raise kind(words)
        return plain(*inputs, **options)

    monkeypatch.setattr(place, name, call)


SMALL = Tier("small", window=3, history=1)
DOWN = "Memory is full: going on as with small"


@pytest.mark.parametrize(
    "failing", [{0, 1}, {1}]
)  # the clean pass of latent 6, twice; the first pass of latent 7
def test_a_full_memory_goes_down_a_tier_and_loses_nothing(world, monkeypatch, failing):
    def walked():
        session = Session(world, image="grey-0")
        for pose in WALK[:6]:
            assert session.step(pose).notice == ""
        return session

    session = walked()
    expected = walked()
    if 0 not in failing:
        expected.commit_pending()
    expected.rollout = expected.rollout.fork(SMALL.rollout(expected.config, HISTORY))
    world.engine.tiers = (TIERS[0], SMALL)
    out_of_memory(monkeypatch, world.transformer, "forward", failing)
    session.commit_pending()
    chunk = session.step(WALK[6])
    assert chunk.notice == DOWN
    np.testing.assert_array_equal(chunk.frames, expected.step(WALK[6]).frames)
    assert (chunk.index, session.frames, session.config.window, session.config.history) == (
        7,
        8,
        3,
        1,
    )
    assert len(session.rollout.cache.frames) <= 4 and len(session._states) <= 2
    assert all(session.step(pose).notice == "" for pose in WALK[7:])


def test_the_old_ring_is_gone_before_anything_new_is_made(world, monkeypatch):
    session = Session(world, image="grey-0")
    world.engine.tiers = (TIERS[0], SMALL)
    for pose in WALK[:4]:
        session.step(pose)
    old = weakref.ref(session.rollout.cache)
    ring = [
        weakref.ref(tensor)
        for layer in session.rollout.cache._ring.layers.values()
        for tensor in layer
    ]
    left = []  # of the old ring, when weights are stored and when the new window is made
    for place, name in ((Engine, "apply_tier"), (KVCache, "_filled_ring")):

        def watched(owner, *inputs, plain=getattr(place, name)):
            if owner is not old():
                left.append(sum(tensor() is not None for tensor in ring))
            return plain(owner, *inputs)

        monkeypatch.setattr(place, name, watched)
    out_of_memory(monkeypatch, world.transformer, "forward", {1})
    gc.disable()  # nobody collects cycles while memory is full
    try:
        assert session.step(WALK[4]).notice == DOWN
    finally:
        gc.enable()
    assert len(ring) == 4 and old() is None and left == [0, 0]


FULL = [
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
    (RuntimeError, "CUDA error: out of memory"),
    (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    (RuntimeError, "MPS backend out of memory (MPS allocated: 8.00 GB)"),
]


@pytest.mark.parametrize(("kind", "words"), FULL)
def test_every_failure_is_a_tier_until_there_is_none(world, monkeypatch, kind, words):
    world.engine.tiers = (TIERS[0], Tier("middle", window=4), SMALL)
    session = Session(world)
    session.step(WALK[0])
    out_of_memory(
        monkeypatch, world.transformer, "forward", {0, 1}, kind, words
    )  # the clean pass, and again with the middle tier
    chunk = session.step(WALK[1])
    assert (chunk.notice, chunk.index, world.engine.tiers) == (DOWN, 2, (SMALL,))
    out_of_memory(monkeypatch, world.transformer, "forward", {1}, kind, words)
    with pytest.raises(
        MemoryError, match=r"full in the smallest tier \(small\): close other programs"
    ):
        session.step(WALK[2])
    assert session.frames == 3 and session.step(WALK[2]).index == 3  # somebody did


@pytest.mark.parametrize(("place", "name"), [(KVCache, "_filled_ring"), (engine, "quantize")])
def test_a_failure_while_going_down_is_a_tier_too(world, monkeypatch, place, name):
    world.engine.tiers = (
        TIERS[0],
        Tier("middle", "int8", window=4),
        replace(SMALL, weights="int8"),
    )
    monkeypatch.setattr(engine, "quantize", lambda *_: None)
    session = Session(world)
    session.step(WALK[0])
    session.commit_pending()
    out_of_memory(monkeypatch, world.transformer, "forward", {0})
    out_of_memory(monkeypatch, place, name, {0})
    assert session.step(WALK[1]).notice == DOWN


def test_what_was_shown_before_memory_ran_out_is_shown_once(world, monkeypatch):
    plain = Session(world, image="grey-0").step(WALK[0])
    early = []
    session = Session(world, image="grey-0")
    world.engine.tiers = (TIERS[0], SMALL)
    out_of_memory(monkeypatch, session_room, "to_frames", {1})  # of the second frame
    chunk = session.step(WALK[0], early.append)
    assert (chunk.notice, len(early)) == (DOWN, 1)
    np.testing.assert_array_equal(early[0], chunk.frames[:1])
    np.testing.assert_array_equal(chunk.frames, plain.frames)


def test_another_error_is_none_of_memory(world, monkeypatch):
    session = Session(world)
    out_of_memory(
        monkeypatch, world.transformer, "forward", {0}, RuntimeError, "shapes cannot be multiplied"
    )
    with pytest.raises(RuntimeError, match="multiplied"):
        session.step(WALK[0])
    assert len(world.engine.tiers) == len(TIERS)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (StreamingEncoder, "step"),
        (StreamingDecoder, "frames"),
        (KVCache, "_filled_ring"),
        (CausalWanTransformer, "forward"),
        (CausalWanTransformer, "encode_text"),
    ],
)
def test_a_start_without_memory_goes_down_a_tier(world, monkeypatch, place, name):
    world.engine.tiers = (TIERS[0], SMALL)
    out_of_memory(monkeypatch, place, name, {0})
    session = Session(world, image="grey-0")
    assert session.first.notice == DOWN and session.config.window == 3 and session.frames == 1
    expected = Session(world, image="grey-0")
    np.testing.assert_array_equal(session.first.frames, expected.first.frames)
    np.testing.assert_array_equal(session.step(WALK[0]).frames, expected.step(WALK[0]).frames)


def test_a_prompt_without_memory_goes_down_a_tier(world, monkeypatch):
    session = Session(world)
    world.engine.tiers = (TIERS[0], SMALL)
    session.step(WALK[0])
    out_of_memory(monkeypatch, world.transformer, "encode_text", {0})
    session.set_prompt("loud")
    chunk = session.step(WALK[1])
    assert (chunk.notice, chunk.prompt, session.step(WALK[2]).notice) == (DOWN, "loud", "")


@pytest.mark.parametrize(("weights", "most"), [("int8", 0.02), ("fp8", 0.08)])
def test_eight_bits_are_close(world, weights, most):
    pytest.importorskip("torchao")
    x = torch.randn(1, 16, 2, 4, 6)
    text = torch.randn(1, 3, 8)
    sigma = torch.tensor([0.7])
    context = Bidirectional(world.transformer.layout(4, 6), 2, torch.eye(4).expand(1, 2, 4, 4))
    before = world.transformer(x, sigma, text, context)
    quantize(world.transformer, weights, torch.device("cpu"))
    after = world.transformer(x, sigma, text, context)
    assert 1e-4 < (after - before).norm() / before.norm() < most
    assert type(world.transformer.blocks[0].ffn.net[2].weight) is not torch.nn.Parameter
    assert type(world.transformer.blocks[0].attn1.prope_out.weight) is torch.nn.Parameter


def test_eight_bits_without_torchao_are_refused(tiny_bundle, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="torchao, which is not installed"):
        World.from_pretrained(
            tiny_bundle, dtype=torch.float32, engine=EngineOptions(weights="int8")
        )


def test_without_torchao_the_weights_stay_full(wan, world, monkeypatch):
    monkeypatch.setattr(engine, "has_torchao", lambda: False)
    world.engine.tiers = tiers_from(EngineOptions())
    session = Session(world)
    out_of_memory(monkeypatch, world.transformer, "forward", set(range(4)))
    assert (
        session.step(WALK[0]).notice == "Memory is full: going on as with 8 GB"
        and session.config.window == 4
    )
    described = world.engine.describe(session.config, HISTORY)
    assert "weights full (int8 with torchao, which is not installed)" in described
    with pytest.raises(
        ValueError, match=r"install torchao \(int8 weights need less\), or play a smaller world"
    ):
        select_tiers(tiers_from(EngineOptions()), wan, RolloutConfig(), HISTORY, 7 * GIB)
    assert tiers_from(EngineOptions(memory="8", weights="full"))[0].unavailable_weights == ""


def test_weights_that_change_are_compiled_again(tiny_bundle, monkeypatch):
    compiled_by = []

    def compile(half, **_):
        def run(*inputs, **options):
            compiled_by.append(threading.current_thread().name)
            return half(*inputs, **options)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    world = World.from_pretrained(tiny_bundle, dtype=torch.float32)
    world.engine.compiled = CompiledBlocks(world.transformer.blocks)
    session = Session(world)
    world.engine.tiers = (TIERS[0], replace(SMALL, weights="int8"))
    session.step(WALK[0])
    old = world.engine.compiled
    old.wait()
    session.step(WALK[1])
    assert old.ready and threading.main_thread().name in compiled_by  # taken over
    stopped = []
    monkeypatch.setattr(engine, "quantize", lambda *_: stopped.append(old._stopped))
    out_of_memory(monkeypatch, world.transformer, "forward", {0})
    compiled_by.clear()
    assert session.step(WALK[2]).notice == DOWN and stopped == [True]
    new = world.engine.compiled
    new.wait()
    # the new thread meets the new weights first
    assert compiled_by[0] == "compiler" and new is not old and new.ready


def test_compile_on_compiles_before_play(tiny_bundle, monkeypatch):
    compiled = []

    def compile(half, **_):
        seen = set()

        def run(block, *inputs, **options):
            kind = (half.__name__, *options.items())
            if kind not in seen:
                seen.add(kind)
                compiled.append(kind)
            return half(block, *inputs, **options)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    engine = EngineOptions(compile="on")
    world = World.from_pretrained(tiny_bundle, dtype=torch.float32, engine=engine)
    expected = Session(World.from_pretrained(tiny_bundle, dtype=torch.float32), image="grey-0")
    session = Session(world, image="grey-0")
    kinds = [("pre_attention",), ("pre_attention", ("queries", False)), ("post_attention",)]
    assert sorted(compiled) == sorted(kinds) and session.frames == 1
    ready = world.engine.compiled.ready
    for pose in WALK[:6]:
        np.testing.assert_array_equal(session.step(pose).frames, expected.step(pose).frames)
    assert sorted(compiled) == sorted(kinds) and world.engine.compiled.ready == ready
    assert "compiled before play" in world.engine.describe(session.config, 0)


@pytest.mark.slow
def test_compiled_blocks_take_over_and_agree(world):
    plain = [Session(world, image="grey-0").step(WALK[0]).frames]
    compiled = CompiledBlocks(world.transformer.blocks)
    eager = Session(world, image="grey-0")
    np.testing.assert_array_equal(
        eager.step(WALK[0]).frames, plain[0]
    )  # without waiting for the compiler
    compiled.wait()
    assert compiled.error == "" and compiled.ready >= 2
    with torch.compiler.set_stance("fail_on_recompile"):  # one code for all blocks
        frames = Session(world, image="grey-0").step(WALK[0]).frames
    assert np.abs(frames.astype(int) - plain[0]).max() <= 1


def test_a_compiler_that_fails_is_mentioned_once(tiny_bundle, monkeypatch):
    def broken(half, **_):
        def run(*_, **__):
            raise RuntimeError("no C++ compiler\nlong story")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    world = World.from_pretrained(
        tiny_bundle, dtype=torch.float32, engine=EngineOptions(compile="on")
    )
    session = Session(world)
    compiled = world.engine.compiled
    assert "cannot be compiled here (no C++ compiler)" in session.step(WALK[1]).notice
    assert (
        session.step(WALK[2]).notice == "" and world.engine.compiled is None and compiled.ready == 0
    )


def test_every_tier_can_be_chosen_by_its_memory():
    assert CHOICES["memory"] == ("auto", *(tier.name.split()[0] for tier in TIERS))

"""Encodings, schedule, the network and the rollout against the public reference implementations,
and our fast forms against plain ones.
"""

import gc
import json
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worldmodel import schedule, session
from worldmodel.camera import advance
from worldmodel.device import float64_device
from worldmodel.models import attention, prope, rope, transformer
from worldmodel.models.attention import Bidirectional, TeacherForcing
from worldmodel.models.kv_cache import Ring
from worldmodel.rollout import Rollout, RolloutConfig, TrainingStep, with_steps
from worldmodel.worlds.checkpoint import load_transformer

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    return load_file(GOLDEN / f"{name}.safetensors"), json.loads(
        (GOLDEN / f"{name}.json").read_text()
    )


@pytest.fixture(scope="module")
def network():
    return (
        load_transformer(GOLDEN / "weights_big.safetensors", attention_head_dim=24)
        .eval()
        .requires_grad_(False)
    )


def lenses(matrices):
    """3x3 intrinsics -> (fx, fy, cx, cy)."""
    return torch.stack(
        [matrices[..., 0, 0], matrices[..., 1, 1], matrices[..., 0, 2], matrices[..., 1, 2]], -1
    )


def walk(frames, batch=1, origin=0.0):
    """Cameras that walk and turn, w2c float64, and their lens."""
    c2w = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    for i in range(frames):
        angle = torch.tensor(0.1 * i, dtype=torch.float64)
        c2w[i, 0, 0] = c2w[i, 2, 2] = angle.cos()
        c2w[i, 0, 2] = angle.sin()
        c2w[i, 2, 0] = -angle.sin()
        c2w[i, :3, 3] = torch.tensor([0.02 * i, 0.0, 0.1 * i]) + origin
    return torch.linalg.inv(c2w).repeat(batch, 1, 1, 1), torch.tensor(
        [[0.5, 0.8, 0.5, 0.5]]
    ).repeat(batch, 1)


# --- encodings and schedule
# --------------------


@pytest.mark.parametrize("case", ["a", "b"])
def test_prope_matches_reference(case):
    data, about = golden("prope")
    heads = about["configs"][case]["heads"]
    frames = about["configs"][case]["frames"]

    def by_frame(x):  # [B, heads, L, D] -> [B, F, N, heads D]
        return x.transpose(1, 2).flatten(2).unflatten(1, (frames, -1))

    def by_head(x):
        return x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)

    for kind, focal in (("frame", lenses(data[f"{case}.Ks"])), ("noK", torch.ones(4))):
        for width in (4, 8):  # as they are, and repeated along a diagonal
            matrices = prope.camera_matrices(
                prope.projmats(data[f"{case}.viewmats"], focal), torch.float32, width
            )
            assert matrices.key.shape[-1] == width
            for name, matrix in (
                ("q", matrices.query),
                ("k", matrices.key),
                ("o", matrices.result),
            ):
                ours = by_head(prope.apply(matrix, by_frame(data[f"{case}.{name}"])))
                torch.testing.assert_close(
                    ours, data[f"{case}.{kind}.{name}_out"], atol=2e-5, rtol=1e-5
                )


@pytest.mark.parametrize("index", [0, 1])
def test_rope_matches_reference(index):
    data, about = golden("rope")
    case = about["cases"][index]
    for start in case["starts"]:
        cos, sin = rope.rope_table(
            torch.arange(start, start + case["F"]), case["H"], case["W"], case["head_dim"]
        )
        ours = rope.rotate(
            data[f"c{index}.x"].unflatten(1, (case["F"], -1)), cos.unsqueeze(2), sin.unsqueeze(2)
        ).flatten(1, 2)
        torch.testing.assert_close(ours, data[f"c{index}.start{start}"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("shift", [5, 8])
def test_schedule_matches_reference(shift):
    data, _ = golden("scheduler")
    case = {
        key.split(".", 1)[1]: value
        for key, value in data.items()
        if key.startswith(f"shift{shift}.")
    }
    for count in (48, 50, 1000):
        torch.testing.assert_close(
            schedule.sigma_grid(count, shift), case[f"N{count}.sigmas"], atol=1e-7, rtol=0
        )
    for key in (k for k in case if k.startswith("warp.")):
        steps = [int(step) for step in key.split(".")[1].split("_")]
        torch.testing.assert_close(
            schedule.warp_steps(steps, shift) * 1000, case[key], atol=1e-4, rtol=0
        )
    sigma = schedule.nearest_grid_sigma(case["t_query"] / 1000, shift)
    broadcast = sigma[:, None, None, None]
    noised = (1 - broadcast) * case["x0"] + broadcast * case["noise"]
    torch.testing.assert_close(noised, case["add_noise"], atol=1e-6, rtol=0)
    torch.testing.assert_close(
        schedule.training_weight(case["t_query"] / 1000, shift),
        case["training_weight"],
        atol=1e-5,
        rtol=1e-5,
    )
    x = case["add_noise"].unsqueeze(2)
    torch.testing.assert_close(
        schedule.to_x0(x, case["flow"].unsqueeze(2), sigma).squeeze(2),
        case["flow_to_x0"],
        atol=1e-5,
        rtol=1e-5,
    )


def test_noise_and_its_velocity_lead_back_to_the_clean_latents():
    x0 = torch.randn(2, 3, 4, 2, 2)
    noise = torch.randn(2, 3, 4, 2, 2)
    sigma = torch.rand(2, 4) * 0.9 + 0.1
    x = schedule.add_noise(x0, noise, sigma)
    torch.testing.assert_close(schedule.to_x0(x, noise - x0, sigma), x0, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="steps must fall"):
        schedule.warp_steps([250, 500], 5.0)


# --- forward passes
# --------------------


def test_bidirectional_matches_reference(network):
    data, _ = golden("wan_bidirectional")
    cameras = prope.projmats(data["viewmats"], lenses(data["Ks"]))
    layout = network.layout(*data["x"].shape[3:])
    for projmats, expected in ((cameras, "out_camera"), (None, "out_nocamera")):
        context = Bidirectional(layout, data["x"].shape[2], projmats)
        ours = network(data["x"], data["t"] / 1000, data["context"], context)
        torch.testing.assert_close(ours, data[expected], atol=2e-5, rtol=0)


def teacher_forced(model, data, chunk, sigma, cameras=None, clean_sigma=None):
    """Velocity of the noisy half of a golden case."""
    noisy = data["x"]
    clean = data["clean_x"]
    frames = noisy.shape[2]
    context = TeacherForcing(model.layout(*noisy.shape[3:]), frames, chunk, cameras)
    first = torch.zeros_like(sigma) if clean_sigma is None else clean_sigma
    both = torch.cat([clean, noisy], dim=2), torch.cat([first, sigma], dim=1)
    return model(*both, data["context"], context)[:, :, frames:]


@pytest.mark.parametrize("chunk", [1, 3])
def test_teacher_forcing_matches_reference(network, chunk):
    data, _ = golden(f"tf_block{chunk}")
    cameras = prope.projmats(data["viewmats"], lenses(data["Ks"]))
    sigma = data["t"] / 1000
    torch.testing.assert_close(
        teacher_forced(network, data, chunk, sigma), data["out_nocamera"], atol=2e-5, rtol=0
    )
    augmented = teacher_forced(network, data, chunk, sigma, cameras, data["aug_t"] / 1000)
    torch.testing.assert_close(augmented, data["out_aug"], atol=2e-5, rtol=0)
    model = load_transformer(GOLDEN / "weights_big.safetensors", attention_head_dim=24)
    out = teacher_forced(model, data, chunk, sigma, cameras)
    torch.testing.assert_close(out, data["out"], atol=2e-5, rtol=0)
    (out * data["loss_w"]).mean().backward()
    names = {
        "patch_embedding.weight": "patch_embedding.weight",
        "blocks.1.attn1.to_k.weight": "blocks.1.self_attn.k.weight",
        "condition_embedder.time_proj.bias": "time_projection.1.bias",
        "blocks.0.attn1.prope_out.weight": "blocks.0.self_attn.prope_o.weight",
    }
    for ours, theirs in names.items():
        expected = data[f"grad.{theirs}"]
        assert (model.get_parameter(ours).grad - expected).norm() < 1e-4 * expected.norm()
    torch.testing.assert_close(
        attention.teacher_forcing_mask(out.shape[2] // chunk, chunk).byte(), data["frame_mask"]
    )


@pytest.mark.parametrize("chunk", [4, 8])
def test_teacher_forcing_loop_equals_dense_mask(chunk):
    q, k, v = (torch.randn(2, 3, 48, 8) for _ in range(3))
    fast = attention.teacher_forcing(q, k, v, chunk)
    torch.testing.assert_close(
        fast, attention.dense_teacher_forcing(q, k, v, chunk), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("chunk", [1, 2])
def test_teacher_forcing_equals_cached_rollout(network, chunk):
    """Training and play are the same network: one pass over all chunks, or chunk by chunk from the
    cache.
    """
    frames = 6
    text = torch.randn(1, 5, 32)
    clean = torch.randn(1, 16, frames, 4, 4)
    noise = torch.randn(1, 16, frames, 4, 4)
    (viewmats, lens) = walk(frames)
    cameras = prope.projmats(viewmats.float(), lens[:, None])
    context = TeacherForcing(network.layout(4, 4), frames, chunk, cameras)
    sigma = torch.cat([torch.zeros(1, frames), torch.ones(1, frames)], dim=1)
    whole = network(torch.cat([clean, noise], dim=2), sigma, text, context)[:, :, frames:]
    rollout = Rollout(
        network,
        text,
        RolloutConfig(steps=(1000,), first_steps=(1000,), chunk=chunk, window=frames),
        height=4,
        width=4,
    )
    for i in range(0, frames, chunk):
        now = slice(i, i + chunk)
        twin = rollout.fork()
        x0 = twin.step(viewmats[:, now], lens, noise=noise[:, :, now])
        torch.testing.assert_close(noise[:, :, now] - x0, whole[:, :, now], atol=2e-5, rtol=0)
        rollout.commit(clean[:, :, now], viewmats[:, now], lens)


def test_gradient_checkpointing_changes_nothing():
    model = load_transformer(GOLDEN / "weights_big.safetensors", attention_head_dim=24).train()
    x = torch.randn(1, 16, 3, 4, 4)
    text = torch.randn(1, 5, 32)
    clean = torch.randn(1, 16, 3, 4, 4)
    gradients = []
    for on in (False, True):
        model.gradient_checkpointing = on
        model.zero_grad()
        sigma = torch.rand(1, 3, generator=torch.Generator().manual_seed(0))
        case = {"x": x, "clean_x": clean, "context": text}
        teacher_forced(model, case, 1, sigma).sum().backward()
        gradients.append(model.blocks[0].attn1.to_k.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_wrong_contexts_say_what_is_wrong(network):
    layout = network.layout(4, 4)
    with pytest.raises(ValueError, match="one camera a latent frame is needed, got 2 for 3 frames"):
        Bidirectional(layout, 3, torch.eye(4).expand(1, 2, 4, 4))
    with pytest.raises(ValueError, match="teacher forcing needs a multiple of 2 latent frames"):
        TeacherForcing(layout, 3, 2)
    with pytest.raises(ValueError, match="multiple of the patch .*, got 5x4 cells: resize"):
        network.layout(5, 4)


# --- rollout
# --------------------


def play_golden(network, data, about, config):
    """Replays a kv_* case with its recorded draws; returns latents in the reference's [B, F, C, H,
    W].
    """
    batch, frames = data["noise"].shape[:2]
    height, width = data["noise"].shape[-2:]
    start = about["initial_frames"]
    chunk = config.chunk
    viewmats = data["viewmats"] if about["camera"] else torch.eye(4).expand(batch, frames, 4, 4)
    lens = lenses(data["Ks"]) if about["camera"] else torch.ones(batch, frames, 4)
    rollout = Rollout(network, data["context"], config, batch=batch, height=height, width=width)
    outputs = []
    draw = 0
    for i in range(0, start, chunk):
        outputs.append(data["initial_latent"][:, i : i + chunk].transpose(1, 2))
        rollout.commit(outputs[-1], viewmats[:, i : i + chunk], lens[:, i : i + chunk])
    for i in range(0, frames, chunk):
        renoise = []
        for _ in config.steps[1:]:
            renoise.append(data[f"renoise_{draw:03d}"].unflatten(0, (batch, chunk)).transpose(1, 2))
            draw += 1
        now = slice(start + i, start + i + chunk)
        noise = data["noise"][:, i : i + chunk].transpose(1, 2)
        outputs.append(rollout.step(viewmats[:, now], lens[:, now], noise=noise, renoise=renoise))
    return torch.cat(outputs, 2).transpose(1, 2)


KV_CASES = sorted(path.stem for path in GOLDEN.glob("kv_*.json"))


@pytest.mark.parametrize("name", KV_CASES)
def test_rollout_matches_reference(network, name):
    data, about = golden(name)
    steps = tuple(about["denoising_step_list_raw"])
    local = about["local_attn_size"]
    model = (
        network
        if about["camera"]
        else load_transformer(
            GOLDEN / "weights_big.safetensors", attention_head_dim=24, camera=False
        )
    )
    config = RolloutConfig(
        steps,
        steps,
        chunk=about["num_frame_per_block"],
        window=local if local > 0 else 32,
        sinks=about["sink_size"],
        positions="absolute",
    )
    with torch.no_grad():
        torch.testing.assert_close(
            play_golden(model, data, about, config), data["latents"], atol=1e-4, rtol=0
        )
        if (
            about["sink_size"] == 0
        ):  # places in the window differ from frame numbers by a constant, which cancels
            relative = replace(config, positions="window")
            torch.testing.assert_close(
                play_golden(model, data, about, relative), data["latents"], atol=1e-4, rtol=0
            )


def test_many_guided_steps_match_reference():
    data, about = golden("unipc_causal")
    model = load_transformer(
        GOLDEN / "weights_cd_teacher.safetensors", attention_head_dim=24
    ).eval()
    count = about["sampling_steps"]
    steps = tuple(999 * (count - i) / count for i in range(count))
    config = RolloutConfig(
        steps,
        steps,
        window=20,
        positions="absolute",
        sampler="unipc",
        guidance=about["guidance_scale"],
    )
    rollout = Rollout(
        model, data["context"], config, height=4, width=4, unconditional=data["context_uncond"]
    )
    torch.testing.assert_close(
        torch.stack([level.sigma for level in rollout.levels]),
        data["sigmas"][:-1],
        atol=1e-6,
        rtol=0,
    )
    lens = data["Ks"].flatten(2)[:, :, [0, 4, 2, 5]]
    outputs = []
    with torch.no_grad():
        for frame in range(data["noise"].shape[1]):
            now = slice(frame, frame + 1)
            outputs.append(
                rollout.step(
                    data["viewmats"][:, now],
                    lens[:, now],
                    noise=data["noise"][:, now].transpose(1, 2),
                )
            )
            rollout = rollout.fork()  # takes both pasts along
    torch.testing.assert_close(
        torch.cat(outputs, 2).transpose(1, 2), data["latents"], atol=2e-4, rtol=0
    )


def test_unipc_begins_below_pure_noise():
    with pytest.raises(
        ValueError, match="unipc cannot start at pure noise, got steps from 1000: begin at 999"
    ):
        RolloutConfig(sampler="unipc")
    config = RolloutConfig(sampler="unipc", steps=(999, 500), first_steps=(999, 500))
    assert with_steps(config, 3).steps == (999, 666, 333)


def test_guidance_needs_an_embedding_of_no_prompt(network):
    with pytest.raises(ValueError, match="guidance 3.0 needs the embedding of no prompt"):
        Rollout(
            network,
            torch.ones(1, 5, network.config.text_dim),
            RolloutConfig(guidance=3.0),
            height=4,
            width=4,
        )


@pytest.mark.parametrize("steps", [1, 2])
def test_first_chunk_steps_match_reference(steps):
    data, about = golden(f"cf_first_chunk_{steps}step")
    model = load_transformer(
        GOLDEN / "weights_dmd_generator.safetensors", attention_head_dim=24, camera=False
    ).eval()
    config = RolloutConfig(
        tuple(about["raw_lists"]["other"]),
        tuple(about["raw_lists"]["first"]),
        window=32,
        positions="absolute",
    )
    rollout = Rollout(model, data["context"], config, height=4, width=4)
    draws = iter(
        data[k].unsqueeze(2)
        for k in sorted(data)
        if k.startswith("inference.draw_") and k.endswith("randn_like")
    )
    outputs = []
    with torch.no_grad():
        for i in range(data["noise"].shape[1]):
            renoise = [next(draws) for _ in (config.steps if i else config.first_steps)[1:]]
            noise = data["noise"][:, i : i + 1].transpose(1, 2)
            outputs.append(
                rollout.step(
                    torch.eye(4).expand(1, 1, 4, 4), torch.ones(1, 4), noise=noise, renoise=renoise
                )
            )
    expected = data.get("inference.output", data.get("inference.latents"))
    torch.testing.assert_close(torch.cat(outputs, 2).transpose(1, 2), expected, atol=1e-4, rtol=0)


def generate(network, config, frames=10, origin=0.0):
    rollout = Rollout(network, torch.ones(1, 5, network.config.text_dim), config, height=4, width=4)
    viewmats, lens = walk(frames, origin=origin)
    generator = torch.Generator().manual_seed(1)
    chunks = range(0, frames, config.chunk)
    with torch.no_grad():
        return torch.cat(
            [
                rollout.step(viewmats[:, i : i + config.chunk], lens, generator=generator)
                for i in chunks
            ],
            2,
        ), rollout


@pytest.mark.parametrize("positions", ["window", "absolute"])
def test_a_ring_prepared_ahead_and_one_with_gradients_give_the_same_rollout(network, positions):
    config = RolloutConfig(window=4, sinks=1, positions=positions)
    plain, _ = generate(network, config)
    viewmats, lens = walk(10)
    ahead, graded = (
        Rollout(network, torch.ones(1, 5, network.config.text_dim), config, height=4, width=4)
        for _ in range(2)
    )
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    for i in range(10):
        with torch.no_grad():
            latents = ahead.step(
                viewmats[:, i : i + 1], lens, generator=draws[0], defer_commit=True
            )
            ahead.commit_pending()  # prepares the ring before the next camera is known
        torch.testing.assert_close(latents, plain[:, :, i : i + 1], atol=2e-5, rtol=0)
        training = TrainingStep(exit_step=1 if i else 3)  # the last of 2, of 4 for the first chunk
        latents = graded.step(viewmats[:, i : i + 1], lens, generator=draws[1], training=training)
        torch.testing.assert_close(latents.detach(), plain[:, :, i : i + 1], atol=2e-5, rtol=0)


RINGS = [
    RolloutConfig(window=5),
    RolloutConfig(window=6, sinks=2, chunk=2),
    RolloutConfig(window=7, sinks=1, chunk=3),
    RolloutConfig(window=7, sinks=2, chunk=2, positions="absolute"),
    RolloutConfig(window=2, sinks=1),
    RolloutConfig(window=1),
]


@pytest.mark.parametrize(
    "config", RINGS, ids=lambda config: f"{config.window}-{config.sinks}-{config.chunk}"
)
def test_a_ring_that_lives_on_equals_one_from_the_store(network, config):
    lasting, rollout = generate(network, config, frames=18)
    viewmats, lens = walk(18)
    fresh = Rollout(network, rollout.text, config, height=4, width=4)
    generator = torch.Generator().manual_seed(1)
    for i in range(0, 18, config.chunk):
        fresh.cache.restore(fresh.cache.frames, fresh.cache.committed)
        with torch.no_grad():
            latents = fresh.step(viewmats[:, i : i + config.chunk], lens, generator=generator)
        torch.testing.assert_close(latents, lasting[:, :, i : i + config.chunk], atol=2e-5, rtol=0)


def ring(rollout):
    """Addresses of the tensors that attention reads."""
    if rollout.cache._ring is None:
        return []
    return [x.data_ptr() for layer in rollout.cache._ring.layers.values() for x in layer]


def test_the_ring_stays_where_it_is(network):
    config = RolloutConfig(window=4, sinks=1, history=6)  # a new reference every second latent
    _, rollout = generate(network, config, frames=3)
    first = ring(rollout)
    (viewmats, lens) = walk(10)
    assert len(first) == 2 * network.config.num_layers
    with torch.no_grad():
        for i in range(3, 10):
            rollout.step(viewmats[:, i : i + 1], lens)
            assert ring(rollout) == first
        rollout.rewind(6)
        twin = rollout.fork()
        for one in (rollout, twin):
            one.step(viewmats[:, 6:7], lens)
        assert ring(rollout) == first and not set(ring(twin)) & set(first)
    rollout.step(viewmats[:, 6:7], lens, training=TrainingStep(exit_step=1))
    assert ring(rollout) == []  # a graph may hold a ring of its own, and no other is kept


class Full(Exception):
    """No memory for a pass."""


def test_a_pass_that_failed_half_way_can_be_tried_again(network, monkeypatch):
    config = RolloutConfig(window=4, sinks=1)
    plain, broken = (generate(network, config, frames=7)[1] for _ in range(2))
    (viewmats, lens) = walk(9)
    write = Ring.write
    calls = iter(range(100))

    def failing(window, *inputs):
        if next(calls) == 1:  # the first layer has written already
            raise Full
        write(window, *inputs)

    def on(rollout):
        draw = torch.Generator().manual_seed(5)
        return torch.cat(
            [
                rollout.step(viewmats[:, i : i + 1], lens, generator=draw, defer_commit=True)
                for i in (7, 8)
            ],
            2,
        )

    with torch.no_grad():
        monkeypatch.setattr(Ring, "write", failing)
        with pytest.raises(Full):
            on(broken)
        broken.commit_pending()
        plain.commit_pending()
        torch.testing.assert_close(on(broken), on(plain), atol=2e-5, rtol=0)


def test_a_pass_for_the_cache_alone_stores_the_same(network):
    rollout = generate(network, RolloutConfig(window=4))[1]
    latents = torch.randn(1, network.config.in_channels, 1, 4, 4)
    viewmats, lens = walk(1)
    stored = []
    with torch.no_grad():
        for cache_only in (False, True):
            context = rollout.cache.begin_chunk(viewmats, lens[:, None])
            sigma = torch.zeros(1)
            result = network(latents, sigma, rollout.text, context, cache_only=cache_only)
            assert (result is None) == cache_only
            stored.append(context.new_kv)
    full, short = stored
    assert full.keys() == short.keys() and len(full) == network.config.num_layers
    assert all(torch.equal(a, b) for layer in full for a, b in zip(full[layer], short[layer]))


def test_a_context_is_freed_when_it_is_dropped(network):
    rollout = generate(network, RolloutConfig(window=4))[1]
    viewmats, lens = walk(1)
    latents = torch.zeros(1, network.config.in_channels, 1, 4, 4)
    with torch.no_grad():
        context = rollout.cache.begin_chunk(viewmats, lens[:, None])
        network(latents, torch.zeros(1), rollout.text, context)
    gone = weakref.ref(context)
    gc.disable()  # a cycle would be collected sooner or later, after gigabytes of rings
    try:
        del context
        rollout.cache.restore(rollout.cache.frames, rollout.cache.committed)
        assert gone() is None
    finally:
        gc.enable()


class NoWaiting(TorchDispatchMode):
    """Refuses every operation that makes the host wait for the device's result."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        waiting = (
            "_local_scalar_dense",
            "is_nonzero",
            "nonzero",
            "masked_select",
            "linalg_inv.default",
            "equal.default",
        )
        if any(word in str(operation) for word in waiting):
            raise AssertionError(f"{operation} makes the host wait")
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("positions", ["window", "absolute"])
def test_no_chunk_waits_for_the_device(network, positions):
    config = RolloutConfig(window=4, sinks=1, positions=positions)
    rollout = Rollout(network, torch.ones(1, 5, network.config.text_dim), config, height=4, width=4)
    viewmats, lens = walk(1)
    with torch.no_grad(), NoWaiting():
        for _ in range(6):
            rollout.step(viewmats, lens, defer_commit=True)
        rollout.commit_pending()
        with pytest.raises(AssertionError, match="makes the host wait"):
            lens[0, 0].item()


def test_no_step_of_a_session_waits_for_the_device(tiny_world, monkeypatch):
    uploads = []
    monkeypatch.setattr(
        session,
        "to_device_async",
        lambda tensor, device: uploads.append(tuple(tensor.shape)) or tensor,
    )
    player = session.Session(tiny_world, image="grey-0")
    assert uploads == [(1, 4), (32, 48, 3), (1, 1, 4, 4)]  # lens, picture, camera
    uploads.clear()
    with NoWaiting():
        for step in range(6):
            player.step(advance(np.eye(4), [0.0, 0.0, 0.1 * step], 0.0, 0.0))
            player.commit_pending()
    assert uploads == [(2, 1, 16, 1, 4, 6), (1, 1, 4, 4)] * 6  # noise and camera


class Elsewhere(TorchDispatchMode):
    """Plays a device, without numbers: one that has no float64 (MPS), or one that nothing may be
    sent back from (CUDA).
    """

    def __init__(self, exact):
        super().__init__()
        self.exact = exact

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if (
            self.exact == "cpu"
            and "_to_copy" in str(operation)
            and (kwargs or {}).get("device") == torch.device("cpu")
        ):
            return torch.zeros(
                args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype
            )  # "meta" itself refuses
        result = operation(*args, **(kwargs or {}))
        for tensor in (x for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            double = tensor.dtype == torch.float64
            assert not double or tensor.device.type == self.exact, (
                f"{operation} makes float64 numbers on {tensor.device}"
            )
        return result


@pytest.mark.parametrize("exact", ["cpu", "meta"])  # as on MPS, and as on CUDA
def test_float64_stays_where_it_is_supported(monkeypatch, exact):
    for module in (transformer, attention):
        monkeypatch.setattr(module, "float64_device", lambda device: torch.device(exact))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # "meta" has none
    config = RolloutConfig(window=4, sinks=1, history=4)
    model = transformer.CausalWanTransformer(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=8,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
    )
    rollout = Rollout(
        model.to("meta"),
        torch.ones(1, 5, 8, device="meta"),
        config,
        height=4,
        width=4,
        device="meta",
    )
    viewmats, lens = (
        torch.ones(1, *shape, dtype=torch.float64, device=exact) for shape in ((1, 4, 4), (4,))
    )
    with torch.no_grad(), Elsewhere(exact):
        for _ in range(6):
            rollout.step(viewmats, lens, defer_commit=True)
        rollout.commit_pending()
        rollout.rewind(4)
        latents = rollout.step(viewmats, lens)
        rollout.commit_pending()
    assert latents.device.type == rollout.cache.frames[-1].keys.device.type == "meta"
    assert rollout.cache.frames[-1].viewmats.device.type == exact


def test_exact_numbers_have_a_place():
    places = {name: str(float64_device(torch.device(name))) for name in ("cpu", "cuda:1", "mps:0")}
    assert places == {"cpu": "cpu", "cuda:1": "cuda:1", "mps:0": "cpu"}


def test_far_away_is_the_same_world(network):
    near, _ = generate(network, RolloutConfig(window=4))
    far, _ = generate(network, RolloutConfig(window=4), origin=10_000.0)
    assert (near - far).abs().max() < 1e-3


class Work(TorchDispatchMode):
    """Counts torch's operations by name and shape: what time depends on, without a clock."""

    def __init__(self):
        super().__init__()
        self.done = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.done[
            func, *(tuple(value.shape) for value in args if isinstance(value, torch.Tensor))
        ] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_long_rollouts_stay_finite_and_flat(count):
    model = load_transformer(
        GOLDEN / "weights_cd_teacher.safetensors", attention_head_dim=24
    ).eval()
    config = RolloutConfig(steps=(1000,), first_steps=(1000,), window=5, sinks=1, history=2)
    rollout = Rollout(model, torch.ones(1, 5, model.config.text_dim), config, height=4, width=4)
    latents = []
    work = []
    viewmats, lens = walk(count)
    generator = torch.Generator().manual_seed(1)  # the ring is rebuilt once per interval
    lap = 10 * rollout.cache.rebase_interval
    last = count // lap - 1
    with torch.no_grad():
        for index in range(count):
            if index % lap == 0:
                work.append(Work())
            with work[-1] if len(work) in (2, last + 1) else nullcontext():
                latents.append(
                    rollout.step(viewmats[:, index : index + 1], lens, generator=generator)
                )
    assert work[1].done == work[last].done and work[1].done.total() > 100 * lap  # flat in time
    assert all(latent.isfinite().all() for latent in latents) and rollout.frames == count
    assert (
        len(rollout.cache.frames) == 5 + 2 + 1
    )  # flat in memory: window, history, and the sink that outlives both


def test_rewind_and_fork_give_the_same_future(network):
    config = RolloutConfig(window=3, history=4)
    _, rollout = generate(network, config, frames=6)
    viewmats, lens = walk(9)
    twin = rollout.fork()
    future = []
    for one in (rollout, twin, rollout):
        one.rewind(6) if one.frames > 6 else None
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            future.append(
                torch.cat(
                    [
                        one.step(viewmats[:, i : i + 1], lens, generator=generator)
                        for i in range(6, 9)
                    ],
                    2,
                )
            )
    torch.testing.assert_close(future[0], future[1], atol=0, rtol=0)
    torch.testing.assert_close(future[2], future[0], atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="rewind less"):
        rollout.rewind(1)


def test_euler_sampler_follows_the_velocity(network):
    config = RolloutConfig(steps=(1000, 500), first_steps=(1000, 500), sampler="euler", window=4)
    rollout = Rollout(network, torch.ones(1, 5, 32), config, height=4, width=4)
    viewmats, lens = walk(1)
    noise = torch.randn(1, 16, 1, 4, 4)
    cameras = prope.projmats(torch.eye(4).expand(1, 1, 4, 4), lens[:, None])
    x = noise
    for sigma, after in ((1.0, 5 / 6), (5 / 6, 0.0)):
        context = Bidirectional(network.layout(4, 4), 1, cameras)
        velocity = network(x, torch.full((1, 1), sigma), torch.ones(1, 5, 32), context)
        x = x + (after - sigma) * velocity
    torch.testing.assert_close(rollout.step(viewmats, lens, noise=noise), x, atol=2e-5, rtol=0)


def test_chunks_that_do_not_fit_and_stale_contexts_are_bugs(network):
    rollout = generate(network, RolloutConfig(window=4, sinks=1), frames=3)[1]
    viewmats, lens = walk(4)
    with pytest.raises(ValueError, match="1 to 3 latents in a window of 4 with 1 sinks, got 4"):
        rollout.commit(torch.zeros(1, network.config.in_channels, 4, 4, 4), viewmats, lens)
    with torch.no_grad():
        stale = rollout.cache.begin_chunk(viewmats[:, :1], lens[:, None])
        rollout.cache.begin_chunk(viewmats[:, 1:2], lens[:, None])
    with pytest.raises(ValueError, match="out of date"):
        rollout.cache.commit(stale)


def test_bad_rollouts_are_refused():
    wrongs = (
        ({"chunk": 5, "window": 4}, "chunk must be"),
        ({"positions": "somewhere"}, "positions must be"),
        ({"steps": ()}, "steps"),
    )
    for wrong, message in wrongs:
        with pytest.raises(ValueError, match=message):
            RolloutConfig(**wrong)
    assert with_steps(RolloutConfig(), 4).steps == (1000, 750, 500, 250)
    with pytest.raises(ValueError, match="1 to 50"):
        with_steps(RolloutConfig(), 0)

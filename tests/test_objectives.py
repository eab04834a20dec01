"""The losses agree with the public reference implementations: values, tensors on the way, gradients
(tests/golden).
"""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.objectives.consistency import consistency_loss, draw_pair, predict_x0, teacher_step
from distill.objectives.distribution_matching import (
    distribution_gradient,
    distribution_loss,
    fake_score_loss,
    ground_truth_loss,
    low_pass_loss,
    noised,
    score_sigma,
)
from distill.objectives.flow_matching import flow_matching_loss, grid_sigma
from distill.stages.self_rollout import RolloutDraws, self_rollout
from distill.stages.stage import Windows, bidirectional, teacher_forced
from worldmodel.rollout import Rollout, RolloutConfig
from worldmodel.schedule import add_noise, sigma_grid, training_weight
from worldmodel.worlds.checkpoint import load_transformer

GOLDEN = Path(__file__).parent / "golden"
SHIFT = 5.0
NAMES = {
    "patch_embedding.bias": "patch_embedding.bias",
    "blocks.0.self_attn.prope_o.weight": "blocks.0.attn1.prope_out.weight",
    "blocks.0.self_attn.o.weight": "blocks.0.attn1.to_out.0.weight",
    "blocks.0.cross_attn.v.weight": "blocks.0.attn2.to_v.weight",
    "blocks.1.self_attn.k.weight": "blocks.1.attn1.to_k.weight",
    "head.modulation": "scale_shift_table",
}


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def network(name: str, **overrides):
    return load_transformer(
        GOLDEN / f"weights_{name}.safetensors", attention_head_dim=24, **overrides
    ).train()


def latents(tensor: torch.Tensor) -> torch.Tensor:
    """The reference's [B, F, C, H, W] -> [B, C, F, H, W]."""
    return tensor.transpose(1, 2)


def windows(case: dict, clean: torch.Tensor | None = None, text: str = "context") -> Windows:
    lens = case["Ks"].flatten(2)[:, :, [0, 4, 2, 5]]  # fx, fy, cx, cy
    return Windows(clean, case["viewmats"], lens, case[text])


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def check_gradients(model, case: dict, prefix: str) -> None:
    """Every stored gradient, to 1e-4 of its norm."""
    parameters = dict(model.named_parameters())
    stored = [name for name in NAMES if prefix + name in case]
    assert len(stored) >= 4
    for name in stored:
        expected = case[prefix + name]
        difference = (parameters[NAMES[name]].grad - expected).norm() / expected.norm()
        assert difference < 2e-4, f"{name}: {difference:.2e}"


@pytest.mark.parametrize("name", ["fm_bidirectional", "fm_ar_block1", "fm_ar_block2"])
def test_flow_matching_agrees_with_the_reference(name):
    case = golden(name)
    causal = "ar" in name
    model = network("cd_teacher" if causal else "dmd_real")
    clean = latents(case["clean"])
    noise = latents(case["draw_000_randn_like"])
    chunk = int(name[-1]) if causal else clean.shape[2]
    index = case["draw_001_randint"][:, ::chunk].repeat_interleave(chunk, dim=1)
    sigma = grid_sigma(index, SHIFT)
    close(sigma * 1000, case["timestep"], 1e-4)
    weight = training_weight(sigma, SHIFT)
    close(weight, case["weight"], 1e-5)
    batch = windows(case, clean)
    predict = teacher_forced(model, batch, chunk) if causal else bidirectional(model, batch)
    close(predict(add_noise(clean, noise, sigma), sigma), latents(case["flow"]))
    loss = flow_matching_loss(predict, clean, sigma, noise, weight)
    torch.testing.assert_close(loss, case["loss"], rtol=5e-5, atol=0)
    loss.backward()
    check_gradients(model, case, "grad.")


@pytest.mark.parametrize(
    ("name", "count", "index"), [("causal_cd_block1", 48, 17), ("causal_cd_block1_first", 50, 0)]
)
def test_consistency_agrees_with_the_reference(name, count, index):
    case = golden(name)
    clean = latents(case["clean"])
    noise = latents(case["noise"])
    sigma, sigma_next = (
        sigma_grid(count, SHIFT)[i].expand(case["t"].shape) for i in (index, index + 1)
    )
    x = add_noise(clean, noise, sigma)
    close(x, latents(case["latent_t"]), 1e-6)
    batch = windows(case, clean)
    teacher = network("cd_teacher")
    predict, unconditional = (
        teacher_forced(teacher, b, 1) for b in (batch, windows(case, clean, "context_uncond"))
    )
    x_next = teacher_step(predict, unconditional, x, sigma, sigma_next, guidance=3.0)
    close(x_next, latents(case["latent_t_next"]))
    model = network("cd_student")
    student = teacher_forced(model, batch, 1)
    average = teacher_forced(network("cd_ema"), batch, 1)
    close(predict_x0(student, x, sigma, "grid", SHIFT), latents(case["pred_t"]))
    loss = consistency_loss(
        student, average, x, sigma, x_next, sigma_next, lookup="grid", shift=SHIFT
    )
    torch.testing.assert_close(loss, case["loss"], rtol=5e-5, atol=0)
    loss.backward()
    check_gradients(model, case, "grad.")


def test_guidance_of_one_needs_no_unconditional_pass():
    x = torch.randn(1, 2, 1, 2, 2)
    sigma = torch.full((1, 1), 0.8)
    stepped = teacher_step(lambda x, s: x * 2, None, x, sigma, sigma - 0.3, guidance=1.0)
    close(stepped, x - 0.3 * 2 * x, 1e-6)


def test_pairs_are_neighbours_down_to_zero_and_shared_within_a_chunk():
    sigma, sigma_next = draw_pair(64, 6, 3, 8, SHIFT, torch.Generator().manual_seed(0))
    grid = [*sigma_grid(8, SHIFT).tolist(), 0.0]
    assert set(zip(sigma.flatten().tolist(), sigma_next.flatten().tolist(), strict=True)) == set(
        pairwise(grid)
    )
    assert torch.equal(sigma[:, 0], sigma[:, 2]) and not torch.equal(sigma[:, 0], sigma[:, 3])


DMD = [("dmd_block1_exit2", 1, 2), ("dmd_block1_exit3", 1, 3), ("dmd_block2_exit1", 2, 1)]


def replay(
    model, case: dict, part: str, chunk: int, exit_step: int, cache_gradient: str, grad: bool
) -> torch.Tensor:
    """The reference's self-rollout with its own draws."""
    draws = [case[key] for key in sorted(case) if key.startswith(f"{part}.draw_")]
    noise = latents(draws[1])
    per_chunk = draws[3:-2]
    batch, _, _, height, width = noise.shape
    renoise = [x.unflatten(0, (batch, chunk)).transpose(1, 2) for x in per_chunk]
    renoise = [renoise[i : i + exit_step] for i in range(0, len(renoise), exit_step)]
    config = RolloutConfig(
        steps=(1000, 750, 500, 250),
        chunk=chunk,
        window=20,
        positions="absolute",
    )
    assert draws[2][0] == exit_step
    rollout = Rollout(model, case["context"], config, batch=batch, height=height, width=width)
    cameras = windows(case)
    return self_rollout(
        rollout,
        cameras.viewmats,
        cameras.intrinsics,
        RolloutDraws(noise, exit_step, exit_step, renoise),
        grad=grad,
        cache_gradient=cache_gradient,
    )


@pytest.mark.parametrize(
    ("cache_gradient", "prefix"),
    [("straight_through", "gen.grad."), ("detached", "gen.grad_detached_cache.")],
)
@pytest.mark.parametrize(("name", "chunk", "exit_step"), DMD)
def test_distribution_matching_agrees_with_the_reference(
    name, chunk, exit_step, cache_gradient, prefix
):
    case = golden(name)
    model = network("dmd_generator")
    samples = replay(model, case, "gen", chunk, exit_step, cache_gradient, grad=True)
    close(samples, latents(case["gen.pred_image"]))
    *_, index, noise = [case[key] for key in sorted(case) if key.startswith("gen.draw_")]
    sigma = score_sigma(index, SHIFT, (0.02, 0.98)).expand(-1, samples.shape[2])
    close(sigma * 1000, case["gen.dmd_timestep"])
    noise = latents(noise)
    batch = windows(case)
    close(noised(samples, noise, sigma, "grid", SHIFT), latents(case["gen.dmd_noisy"]))
    fake = bidirectional(network("dmd_fake"), batch)
    real = network("dmd_real")
    gradient = distribution_gradient(
        samples.detach(),
        sigma,
        noise,
        fake=fake,
        real=bidirectional(real, batch),
        real_unconditional=bidirectional(real, windows(case, text="context_uncond")),
        guidance=3.0,
        lookup="grid",
        shift=SHIFT,
    )
    close(gradient, latents(case["gen.kl_grad"]), 5e-4)
    loss = distribution_loss(samples, gradient)
    torch.testing.assert_close(loss, case["gen.loss"].float(), rtol=2e-4, atol=0)
    loss.backward()
    check_gradients(model, case, prefix)


def test_the_ground_truth_term_saturates_far_from_it():
    truth = torch.zeros(1, 2, 1, 1, 2)
    samples = torch.tensor([0.1, 10.0]).expand(1, 2, 1, 1, 2).clone().requires_grad_()
    for scale, expected in ((0.0, [0.1, 10.0]), (0.2, [0.1 / 1.05, 10 / 501])):
        (gradient,) = torch.autograd.grad(ground_truth_loss(samples, truth, scale), samples)
        close(gradient[0, 0, 0, 0] * samples.numel(), torch.tensor(expected), 1e-6)


def test_the_low_pass_term_compares_means_of_four_cells():
    truth = torch.randn(1, 2, 3, 5, 6)
    samples = torch.randn(1, 2, 3, 5, 6)
    checks = torch.ones(5, 6)
    checks[::2, ::2] = checks[
        1::2, 1::2
    ] = -1  # sums to 0 in every cell of 2x2, the last row's of 1x2 too
    torch.testing.assert_close(low_pass_loss(truth + checks, truth), torch.tensor(0.0))
    torch.testing.assert_close(low_pass_loss(truth + 0.5, truth), torch.tensor(0.125))
    torch.testing.assert_close(
        low_pass_loss(samples + 3 * checks, truth), low_pass_loss(samples, truth)
    )


@pytest.mark.parametrize(("name", "chunk", "exit_step"), DMD)
def test_the_fake_score_agrees_with_the_reference(name, chunk, exit_step):
    case = golden(name)
    model = network("dmd_fake")
    with torch.no_grad():
        samples = replay(
            network("dmd_generator"), case, "critic", chunk, exit_step, "detached", grad=False
        )
    close(samples, latents(case["critic.generated"]))
    *_, index, noise = [case[key] for key in sorted(case) if key.startswith("critic.draw_")]
    sigma = score_sigma(index, SHIFT, (0.02, 0.98)).expand(-1, samples.shape[2])
    loss = fake_score_loss(
        bidirectional(model, windows(case)),
        samples,
        sigma,
        latents(noise),
        lookup="grid",
        shift=SHIFT,
    )
    torch.testing.assert_close(loss, case["critic.loss"].float(), rtol=5e-5, atol=0)
    loss.backward()
    check_gradients(model, case, "critic.grad.")


FIRST_CHUNK = [("cf_first_chunk_2step", (1000, 500), 2, 1), ("cf_first_chunk_1step", (1000,), 3, 0)]


@pytest.mark.parametrize(("name", "steps", "first_exit", "exit_step"), FIRST_CHUNK)
def test_first_chunk_has_its_own_steps_as_in_the_reference(name, steps, first_exit, exit_step):
    case = golden(name)
    model = network("dmd_generator", camera=False)
    noise = latents(case["noise"])
    frames = noise.shape[2]
    cells = noise.shape[3:]
    drawn = [
        case[key].unsqueeze(2) for key in sorted(case) if key.startswith("draw_") and "randn" in key
    ]
    renoise = []
    context = []
    for frame in range(frames):
        count = exit_step if frame else first_exit
        renoise.append([drawn.pop(0) for _ in range(count)])
        context.append(drawn.pop(0))
    assert not drawn
    config = RolloutConfig(
        steps=steps,
        window=20,
        positions="absolute",
    )
    rollout = Rollout(model, case["context"], config, height=cells[0], width=cells[1])
    cameras = torch.eye(4).expand(1, frames, 4, 4), torch.ones(1, frames, 4)
    draws = RolloutDraws(noise, exit_step, first_exit, renoise, torch.cat(context, dim=2))
    samples = self_rollout(
        rollout,
        *cameras,
        draws,
        grad=True,
        cache_gradient="straight_through",
        context_sigma=float(sigma_grid(1000, SHIFT)[-1]),
    )
    close(samples, latents(case["output"]))
    (samples * latents(case["loss_w"])).mean().backward()
    check_gradients(model, case, "grad.")

"""The loop: denoise a chunk, commit it. Play, self-rollout in training and evaluation all run it.

For each noise level of the step list: velocity -> clean estimate -> the next level. Then one pass
at sigma 0 leaves the clean keys and values in the cache. The first chunk has its own, longer step
list (Causal Forcing++, arXiv 2605.15141: the first-frame rule).
Source: Self-Forcing / minWM `CausalInferencePipeline`. Differs: window-relative positions and
camera-relative projections (see `models/kv_cache.py`).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from worldmodel.errors import UserError
from worldmodel.models.kv_cache import CachedContext, KVCache, LayerKV
from worldmodel.models.memory import RecallWindow, RecentWindow
from worldmodel.models.transformer import CausalWanTransformer, TextContext, TimeContext
from worldmodel.schedule import CLOCK, add_noise, to_x0, warp_steps

# options of a rollout that recordings and saves hold, as play may change them
RECALL = ("recall", "recall_memory", "recall_unit")


@dataclass(frozen=True)
class RolloutConfig:
    """How a world is generated, chunk after chunk."""

    steps: tuple[int, ...] = (1000, 500)  # noise clock before the shift, in (0, 1000], falling
    first_steps: tuple[int, ...] = (1000, 750, 500, 250)  # the same for the first chunk
    shift: float = 5.0
    chunk: int = 1  # latent frames denoised together
    window: int = 12  # latent frames attention may see, the current chunk included
    sinks: int = 0  # first latent frames, which never leave the window
    # rotary positions: "window" (relative to a recent frame) or "absolute" (frame numbers, as the
    # references)
    positions: str = "window"
    # between steps: "renoise" (few-step models), "euler" or "unipc" (diffusion models,
    # deterministic)
    sampler: str = "renoise"
    # velocity u + guidance (c - u), u without prompt; 1 = c alone, as distilled models want; any
    # other value doubles the work
    guidance: float = 1.0
    history: int = 0  # latent frames kept beyond the window for rewinding
    # latent frames of the window that are chosen among all older ones by view overlap; 0 = the
    # window is recent frames and sinks
    recall: int = 0
    recall_memory: int = 512  # MiB of ordinary memory for what can be recalled
    recall_unit: float = 1.0  # length, in units of the poses, of a small step in the world

    def __post_init__(self):
        choices = {
            "positions": ("window", "absolute"),
            "sampler": ("renoise", "euler", "unipc"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}: choose "
                    "one of them"
                )
        if not 0 <= self.guidance < math.inf:
            raise UserError(
                f"guidance must be at least 0, got {self.guidance}: 1 is none, 3 is usual"
            )
        for name in ("sinks", "history", "recall"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}: raise it")
        if not 1 <= self.chunk <= self.window - self.sinks:
            room = self.window - self.sinks
            raise UserError(
                f"chunk must be 1 to window - sinks = {room} latents, got {self.chunk}: change one "
                "of them"
            )
        self._check_recall()
        for steps in (self.steps, self.first_steps):
            warp_steps(steps, self.shift)
            if self.sampler == "unipc" and steps[0] >= CLOCK:
                raise UserError(
                    f"unipc cannot start at pure noise, got steps from {steps[0]}: begin at 999, "
                    "as published"
                )

    def _check_recall(self) -> None:
        if self.recall_memory < 1 or not 0 < self.recall_unit < math.inf:
            raise UserError(
                "recall_memory must be at least 1 MiB and recall_unit above 0, got "
                f"{self.recall_memory} and {self.recall_unit}: raise them"
            )
        if self.recall and self.positions == "absolute":
            raise UserError(
                "recall must be 0 where positions are absolute, as recalled frames have none of "
                f"their own, got {self.recall}: set positions to window"
            )
        room = self.window - self.sinks - 2 * self.chunk
        if self.recall > max(0, room):
            raise UserError(
                "recall must leave room for two chunks in the window: at most window - sinks - 2 "
                f"chunk = {max(0, room)} latents, got {self.recall}: change one of them"
            )

    @property
    def memory(self) -> RecentWindow:
        """Which remembered frames a chunk sees."""
        if not self.recall:
            return RecentWindow(self.window, self.sinks, self.positions == "absolute")
        return RecallWindow(
            self.window,
            self.sinks,
            recall=self.recall,
            unit=self.recall_unit,
            memory=self.recall_memory,
        )


@dataclass(frozen=True)
class TrainingStep:
    """What self-rollout in training changes about a step."""

    exit_step: int  # the chunk ends after this step, 0 = first
    grad: bool = True  # let gradients through the exit step, and through it alone
    # committed keys carry the gradient of the exit step ("straight_through", as the references,
    # whose cache keeps its graph), or none ("detached")
    cache_gradient: str = "detached"
    # noise on the chunk before its clean pass; Causal-Forcing trains with 0.00498, plays with 0
    context_sigma: float = 0.0
    context_noise: Tensor | None = None  # of the chunk's shape; None = drawn from the generator

    def __post_init__(self):
        if self.cache_gradient not in ("detached", "straight_through"):
            raise ValueError(f"cache_gradient: detached or straight_through, {self.cache_gradient}")


@dataclass
class NoiseLevel:
    """One level of a step list, and its embedding for passes without gradients, by the frames of
    a pass.
    """

    sigma: Tensor  # [], for the arithmetic
    network_sigma: Tensor  # [], what the network reads: UniPC's clock has whole numbers
    embedded: dict[int, TimeContext] = field(default_factory=dict)


class UncommittedChunk(NamedTuple):
    """A generated or given chunk whose clean pass is still to come.

    `context`: the one it was denoised in; None = one is begun for the clean pass.
    """

    latents: Tensor
    viewmats: Tensor
    intrinsics: Tensor
    context: CachedContext | None = None
    condition: Tensor | None = None


class Rollout:
    """A rollout in progress: the model, its prompt, and what it remembers.

    `height` and `width` count latent cells. Latents are `[B, C, F, H, W]` float32 outside the
    model; cameras come as w2c `viewmats` `[B, F, 4, 4]` (float64 keeps far-away places exact) and
    normalised `intrinsics`, `[B, 4]` or one per frame, `[B, F, 4]`, both on the
    `device.float64_device` of `device`.
    With guidance the rollout without prompt occupies further rows of the batch, with a past of
    its own; its embedding is `unconditional` `[L, D]` or `[B, L, D]`.
    """

    def __init__(
        self,
        model: CausalWanTransformer,
        text: Tensor | TextContext,
        config: RolloutConfig,
        *,
        batch: int = 1,
        height: int,
        width: int,
        device: torch.device | str = "cpu",
        unconditional: Tensor | None = None,
        cache: KVCache | None = None,
    ):
        self.model = model
        self.config = config
        self.batch = batch
        self.cells = (height, width)
        self.device = torch.device(device)
        self.guided = config.guidance != 1
        self._unconditional = unconditional
        self.levels = self._noise_levels(config.steps)
        self.first_levels = self._noise_levels(config.first_steps)
        zero = torch.zeros((), device=self.device)
        self._clean = NoiseLevel(zero, zero)
        self.cache = cache or KVCache(model.layout(height, width), config.memory, config.history)
        self.pending: UncommittedChunk | None = None
        # milliseconds: "network" of the last step, "clean" of the last clean pass
        self.timings = {"network": 0.0, "clean": 0.0}
        self.set_text(text)

    @property
    def frames(self) -> int:
        """Latent frames generated or given so far."""
        return self.cache.committed + (self.pending.latents.shape[2] if self.pending else 0)

    def set_text(self, text: Tensor | TextContext) -> None:
        """Changes the prompt from the next chunk on; what is remembered stays."""
        self.commit_pending()
        if isinstance(text, Tensor):
            if self.guided:
                text = torch.cat([self._batched(text), self._batched(self._no_prompt(text))])
            text = self.model.encode_text(text.to(self.device))
        self.text = text

    def step(
        self,
        viewmats: Tensor,
        intrinsics: Tensor,
        *,
        condition: Tensor | None = None,
        noise: Tensor | None = None,
        renoise: list[Tensor] | None = None,
        generator: torch.Generator | None = None,
        training: TrainingStep | None = None,
        defer_commit: bool = False,
    ) -> Tensor:
        """Generates the next chunk and commits it; returns its clean latents `[B, C, F, H, W]`.

        condition: `[B, K, F, H, W]`, what is known of the chunk (see `CausalWanTransformer`).
        noise: starts the chunk. renoise: added between steps, one per step but the last, same
        shape. What is not given is drawn from `generator`. training: see `TrainingStep`; None =
        play, without gradients of its own. With `defer_commit` the clean pass is left to
        `commit_pending`, or to the next step: the latents can be shown first.
        """
        self.commit_pending()
        levels = self.levels if self.frames else self.first_levels
        last = len(levels) - 1 if training is None else training.exit_step
        grad = training is not None and training.grad
        cameras = viewmats, per_frame(intrinsics, viewmats)
        viewmats, intrinsics, condition = self._rows(*cameras, condition)
        shape = (self.batch, self.model.config.out_channels, viewmats.shape[1], *self.cells)
        x = self._draw(shape, generator) if noise is None else noise

        def draw(index: int) -> Tensor:
            return renoise[index] if renoise else self._draw(shape, generator)

        next_level = self._sampler(levels, draw)
        started = time.perf_counter()
        with torch.set_grad_enabled(grad):  # the exit step may send gradients into the past
            context = self.cache.begin_chunk(viewmats, intrinsics)
        for i, level in enumerate(levels[: last + 1]):
            with torch.set_grad_enabled(grad and i == last):
                velocity = self._velocity(x, level, context, condition)
                x0 = to_x0(x, velocity, level.sigma)
            if i < last:
                x = next_level(i, x, x0, velocity)
        self.timings["network"] = (time.perf_counter() - started) * 1e3
        if training is None:
            self.pending = UncommittedChunk(x0.detach(), viewmats, intrinsics, context, condition)
            if not defer_commit:
                self._commit(self.pending, context)
        else:
            self._commit_training(x0, context, training, generator, condition)
        return x0

    def commit_pending(self) -> None:
        """Runs a deferred clean pass, if there is one, and prepares the ring for the next chunk."""
        if self.pending is None:
            return
        started = time.perf_counter()
        chunk = self.pending
        context = chunk.context
        with torch.no_grad():
            if not self.cache.is_current(context):
                context = self.cache.begin_chunk(chunk.viewmats, chunk.intrinsics)
                self.pending = chunk = chunk._replace(context=context)
            self._commit(chunk, context)
            self.cache.prepare(self.config.chunk)
        self.timings["clean"] = (time.perf_counter() - started) * 1e3

    def commit(
        self,
        latents: Tensor,
        viewmats: Tensor,
        intrinsics: Tensor,
        condition: Tensor | None = None,
    ) -> None:
        """Takes given clean latents (a start image, a recorded past) as the next chunk."""
        self.defer_commit(latents, viewmats, intrinsics, condition)
        self.commit_pending()

    def defer_commit(
        self,
        latents: Tensor,
        viewmats: Tensor,
        intrinsics: Tensor,
        condition: Tensor | None = None,
    ) -> None:
        """As `commit`, but the clean pass is left to `commit_pending` or to the next step."""
        self.commit_pending()
        *cameras, condition = self._rows(viewmats, per_frame(intrinsics, viewmats), condition)
        self.pending = UncommittedChunk(latents, *cameras, condition=condition)

    def rewind(self, frames: int) -> None:
        """Forgets all but the first `frames` latents. Raises ValueError when the cache no longer
        holds what the window then needs.
        """
        if self.pending is not None and frames <= self.cache.committed:
            self.pending = None  # forgotten anyway: it needs no clean pass
        self.commit_pending()
        self.cache.truncate(frames)

    def fork(self, config: RolloutConfig | None = None) -> "Rollout":
        """An independent rollout with the same past.

        config: of the new one, for example with a shorter window; None = the same.
        """
        config = config or self.config
        twin = Rollout(
            self.model,
            self.text,
            config,
            batch=self.batch,
            height=self.cells[0],
            width=self.cells[1],
            device=self.device,
            unconditional=self._unconditional,
            cache=self.cache.clone(config.memory, config.history),
        )
        if self.pending is not None:
            twin.pending = self.pending._replace(context=None)
        return twin

    # -------------------- inside

    def _noise_levels(self, steps: tuple[int, ...]) -> tuple[NoiseLevel, ...]:
        sigmas = warp_steps(steps, self.config.shift).to(self.device).unbind()
        if self.config.sampler != "unipc":
            return tuple(NoiseLevel(sigma, sigma) for sigma in sigmas)
        return tuple(NoiseLevel(sigma, torch.floor(sigma * CLOCK) / CLOCK) for sigma in sigmas)

    def _no_prompt(self, text: Tensor) -> Tensor:
        if self._unconditional is None:
            raise ValueError(
                f"guidance {self.config.guidance} needs the embedding of no prompt: pass "
                "unconditional, or set guidance to 1"
            )
        return self._unconditional.to(text)

    def _batched(self, text: Tensor) -> Tensor:
        return text.expand(self.batch, -1, -1)

    def _rows(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """The batch as the network sees it: with guidance twice, with prompt and without."""
        if not self.guided:
            return tensors
        return tuple(None if x is None else torch.cat([x, x]) for x in tensors)

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        device = generator.device if generator else self.device
        return torch.randn(shape, generator=generator, device=device).to(self.device)

    def _velocity(
        self, x: Tensor, level: NoiseLevel, context: CachedContext, condition: Tensor | None
    ) -> Tensor:
        """Guided velocity of `x` `[B, C, F, H, W]`."""
        time = self._time(level, x.shape[2])
        velocity = self.model(*self._rows(x), time, self.text, context, condition=condition)
        if not self.guided:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        return unconditional + self.config.guidance * (conditional - unconditional)

    def _time(self, level: NoiseLevel, frames: int) -> Tensor | TimeContext:
        """The level for a pass; embedded once, unless a gradient must reach the embedder."""
        (sigmas,) = self._rows(level.network_sigma.expand(self.batch, frames))
        if torch.is_grad_enabled():
            return sigmas
        if frames not in level.embedded:
            level.embedded[frames] = self.model.encode_time(sigmas)
        return level.embedded[frames]

    def _commit(self, chunk: UncommittedChunk, context: CachedContext) -> None:
        """The pass at sigma 0, then the chunk is part of the past."""
        self._clean_pass(chunk.latents, context, chunk.condition)
        self.cache.commit(context)
        self.pending = None  # not before: a pass that ran out of memory can be tried again

    def _clean_pass(
        self, latents: Tensor, context: CachedContext, condition: Tensor | None
    ) -> None:
        with torch.no_grad():
            time = self._time(self._clean, latents.shape[2])
            self.model(
                *self._rows(latents),
                time,
                self.text,
                context,
                condition=condition,
                cache_only=True,
            )

    def _commit_training(
        self,
        x0: Tensor,
        context: CachedContext,
        training: TrainingStep,
        generator: torch.Generator | None,
        condition: Tensor | None,
    ) -> None:
        """As `_commit`, with noise on the context and with gradients in the keys, as asked for."""
        noisy = dict(context.new_kv)
        latents = x0.detach()
        if training.context_sigma:
            noise = training.context_noise
            noise = self._draw(latents.shape, generator) if noise is None else noise
            sigma = torch.full((), training.context_sigma, device=self.device)
            latents = add_noise(latents, noise, sigma)
        self._clean_pass(latents, context, condition)
        if training.grad and training.cache_gradient == "straight_through":
            self.cache.commit(context, _straight_through(context.new_kv, noisy))
        else:
            self.cache.commit(context)

    def _sampler(
        self, levels: tuple[NoiseLevel, ...], draw: Callable[[int], Tensor]
    ) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        """How a chunk gets to its next noise level: a function of (index of the level, x, x0,
        velocity). `draw` gives the noise between steps.
        """
        sigmas = [level.sigma for level in levels]
        if self.config.sampler == "euler":
            return lambda i, x, x0, velocity: x + (sigmas[i + 1] - sigmas[i]) * velocity
        if self.config.sampler == "renoise":
            return lambda i, x, x0, velocity: add_noise(x0.detach(), draw(i), sigmas[i + 1])
        # diffusers' UniPC, as in minWM's `causal_diffusion_inference.py`; it counts the steps
        solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        solver.set_timesteps(sigmas=torch.stack(sigmas).cpu().numpy(), device=self.device)
        solver.set_begin_index(0)
        return lambda i, x, x0, velocity: solver.step(
            velocity, solver.timesteps[0], x, return_dict=False
        )[0]


def _straight_through(clean: LayerKV, noisy: LayerKV) -> LayerKV:
    """The values of the clean pass with the gradients of the noisy one."""
    return {
        layer: tuple(c + (n - n.detach()) for c, n in zip(clean[layer], noisy[layer], strict=True))
        for layer in clean
    }


def per_frame(intrinsics: Tensor, viewmats: Tensor) -> Tensor:
    """Intrinsics `[B, 4]` or `[B, F, 4]` -> `[B, F, 4]`."""
    if intrinsics.ndim == 3:
        return intrinsics
    return intrinsics[:, None].expand(-1, viewmats.shape[1], -1)


def with_steps(config: RolloutConfig, steps: int) -> RolloutConfig:
    """The same rollout with `steps` evenly spaced denoising steps a chunk (1 to 50) after the first
    chunk.
    """
    if not 1 <= steps <= 50:
        raise UserError(
            f"steps must be 1 to 50, got {steps}: 1, 2 and 4 are what few-step models are made for"
        )
    most = 999 if config.sampler == "unipc" else 1000
    return replace(config, steps=tuple(round(most * (steps - i) / steps) for i in range(steps)))

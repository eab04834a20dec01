"""THE loop: denoise a chunk, commit it. Play, self-rollout in training, trajectory data and
evaluation all run this one.

For each noise level of the step list: velocity -> clean estimate -> noise again to the next level;
then one pass at sigma 0 leaves the clean keys and values in the cache. The first chunk has its own,
longer step list (Causal Forcing++, arXiv 2605.15141: the first-frame rule).
Source: Self-Forcing / minWM `CausalInferencePipeline`. Differs: window-relative positions and
camera-relative projections (see `kv_cache`).
"""

import math
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from worldmodel.errors import UserError
from worldmodel.graphs import Graphs, RecordedPasses
from worldmodel.models.kv_cache import CacheView, KVCache
from worldmodel.models.transformer import CausalWanTransformer, TextContext, TimeContext
from worldmodel.schedule import CLOCK, add_noise, to_x0, warp_steps


@dataclass(frozen=True)
class RolloutConfig:
    """How a world is dreamed on."""

    steps: tuple[int, ...] = (1000, 500)  # noise clock before the shift, in (0, 1000], falling
    first_steps: tuple[int, ...] = (1000, 750, 500, 250)  # the same for the first chunk
    shift: float = 5.0
    chunk: int = 1  # latent frames denoised together
    window: int = 12  # latent frames attention may see, the current chunk included
    sinks: int = 0  # first latent frames that stay in the window for ever
    # rotary positions: "window" (places in the window) or "absolute" (frame numbers, as the
    # references)
    positions: str = "window"
    # between steps: "renoise" (few-step models), "euler" or "unipc" (diffusion models,
    # deterministic)
    sampler: str = "renoise"
    # velocity u + guidance (c - u), u without prompt; 1 = c alone, as distilled models want; else
    # twice the work
    guidance: float = 1.0
    merge_clean: bool = (
        False  # run the clean pass of a chunk together with the first step of the next
    )
    # in training, committed keys carry no gradient, or that of the last noisy pass:
    # "straight_through"
    cache_gradient: str = "detached"
    # noise on a dreamed chunk before its clean pass; Causal-Forcing trains with 0.00498, plays with
    # 0
    context_sigma: float = 0.0
    history: int = 0  # latent frames kept beyond the window for rewinding

    def __post_init__(self):
        choices = {
            "positions": ("window", "absolute"),
            "sampler": ("renoise", "euler", "unipc"),
            "cache_gradient": ("detached", "straight_through"),
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
        if not 1 <= self.chunk <= self.window - self.sinks:
            room = self.window - self.sinks
            raise UserError(
                f"chunk must be 1 to window - sinks = {room} latents, got {self.chunk}: change "
                "one of them"
            )
        for steps in (self.steps, self.first_steps):
            warp_steps(steps, self.shift)
            if self.sampler == "unipc" and steps[0] >= CLOCK:
                raise UserError(
                    f"unipc cannot start at pure noise, got steps from {steps[0]}: begin at 999, "
                    "as published"
                )


class Pending(NamedTuple):
    """A dreamed or given chunk before its clean pass, with the view of the past that it was dreamed
    from, if it was dreamed here.
    """

    latents: Tensor
    viewmats: Tensor
    intrinsics: Tensor
    view: CacheView | None = None
    projection: Tensor | None = None


class Rollout:
    """A dream in progress: the model, its prompt, and what it remembers.

    `height` and `width` count latent cells. Latents are `[B, C, F, H, W]` float32 outside the
    model; cameras come as w2c `viewmats` `[B, F, 4, 4]` (float64 keeps far-away places exact) and
    normalised `intrinsics`, `[B, 4]` or one a frame, `[B, F, 4]`, both on the `rope.float64_device`
    of `device`. With guidance the dream without prompt goes along as further rows of the batch,
    with a past of its own; its embedding is `unconditional` `[L, D]` or `[B, L, D]`. With `graphs`
    its passes are recorded (see there).
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
        graphs: Graphs | None = None,
    ):
        self.model = model
        self.config = config
        self.batch = batch
        self.device = torch.device(device)
        self.graphs = graphs
        self._passes = None if graphs is None else RecordedPasses(model, graphs)
        self.cells = (height, width)
        self.guided = config.guidance != 1
        self._unconditional = unconditional
        self.sigmas = warp_steps(config.steps, config.shift).to(self.device).unbind()
        self.first_sigmas = warp_steps(config.first_steps, config.shift).to(self.device).unbind()
        self._clean = torch.zeros((), device=self.device)
        # what the network is told of a sigma, by its id: UniPC's clock is published in whole
        # numbers
        self._told = {}
        if config.sampler == "unipc":
            self._told = {
                id(sigma): torch.floor(sigma * CLOCK) / CLOCK
                for sigma in (*self.sigmas, *self.first_sigmas)
            }
        self._times: dict[
            tuple[int, int], TimeContext
        ] = {}  # by the sigma's id (they live as long as we do) and the frames of a pass
        self.cache = KVCache(
            model.config.num_attention_heads,
            config.window,
            config.sinks,
            config.positions == "absolute",
            config.history,
            model.config.camera,
        )
        self.pending: Pending | None = None  # the chunk whose clean pass is still to come
        self.timings = {
            "network": 0.0,
            "clean": 0.0,
        }  # milliseconds: "network" of the last step, "clean" of the last clean pass
        self.set_text(text)

    @property
    def frames(self) -> int:
        """Latent frames dreamed or given so far."""
        return self.cache.committed + (self.pending.latents.shape[2] if self.pending else 0)

    def set_text(self, text: Tensor | TextContext) -> None:
        """Changes the prompt from the next chunk on; what is already remembered stays."""
        self.settle()
        if isinstance(text, Tensor):
            if self.guided:
                if self._unconditional is None:
                    missing = f"guidance {self.config.guidance} needs the embedding of no prompt"
                    raise ValueError(f"{missing}: pass unconditional, or set guidance to 1")
                text = torch.cat(
                    [
                        text.expand(self.batch, -1, -1),
                        self._unconditional.to(text).expand(self.batch, -1, -1),
                    ]
                )
            text = self.model.encode_text(text.to(self.device))
        self.text = text

    def step(
        self,
        viewmats: Tensor,
        intrinsics: Tensor,
        *,
        noise: Tensor | None = None,
        renoise: list[Tensor] | None = None,
        generator: torch.Generator | None = None,
        exit_step: int | None = None,
        grad: bool = False,
        context_noise: Tensor | None = None,
        settle: bool = True,
    ) -> Tensor:
        """Dreams the next chunk and commits it; returns its clean latents `[B, C, F, H, W]`.

        `noise` starts the chunk and `renoise` (one a step but the last, same shape) is added
        between steps; what is not given is drawn from `generator`; so is `context_noise`, wanted
        when `context_sigma` is above 0. Training: stop after step `exit_step` (0 = first), and with
        `grad` let gradients through that step alone. With `settle` false the clean pass is left to
        `settle()`,
        or to the next step: the latents can be shown first.
        """
        if grad or not self.config.merge_clean:
            self.settle()
        sigmas = self.first_sigmas if self.frames == 0 else self.sigmas
        last = len(sigmas) - 1 if exit_step is None else exit_step
        viewmats, intrinsics = self._rows(viewmats, a_frame(intrinsics, viewmats))
        shape = (self.batch, self.model.config.in_channels, viewmats.shape[1], *self.cells)
        x = self._draw(shape, generator) if noise is None else noise
        started = time.perf_counter()
        view = None
        projection = None
        x0 = None
        fresh = None
        solver = self._solver(sigmas)
        for i in range(last + 1):
            with torch.set_grad_enabled(grad and i == last):
                if self.pending is not None:
                    velocity, view, projection = self._first_pass_with_pending(
                        x, sigmas[i], viewmats, intrinsics
                    )
                else:
                    if view is None:
                        with torch.set_grad_enabled(
                            grad
                            # the window is read by the last step too, which may send gradient into
                            # it
                        ):
                            view, projection = self._view(viewmats, intrinsics)
                    velocity = self._velocity(x, sigmas[i], view, projection)
                fresh = dict(view.fresh) if grad else None
                x0 = to_x0(x, velocity, sigmas[i])
            if i < last:
                x = self._next_level(
                    x,
                    x0,
                    velocity,
                    sigmas[i],
                    sigmas[i + 1],
                    renoise[i] if renoise else None,
                    generator,
                    solver,
                )
        self.timings["network"] = (time.perf_counter() - started) * 1e3
        context = x0.detach()
        if self.config.context_sigma:
            context_noise = self._draw(shape, generator) if context_noise is None else context_noise
            context = add_noise(
                context,
                context_noise,
                torch.full((), self.config.context_sigma, device=self.device),
            )
        if not grad and (self.config.merge_clean or not settle):
            self.pending = Pending(context, viewmats, intrinsics, view, projection)
        else:
            self._clean_pass(Pending(context, viewmats, intrinsics, view, projection), fresh)
        return x0

    def settle(self) -> None:
        """Runs a clean pass that was put off, if there is one."""
        if self.pending is not None:
            started = time.perf_counter()
            chunk = self.pending
            if not self.cache.holds(chunk.view, chunk.latents.shape[2]):
                with torch.no_grad():
                    self.pending = chunk = Pending(*chunk[:3], *self._view(*chunk[1:3]))
            self._clean_pass(chunk)
            if (
                not self.config.merge_clean
            ):  # in play nobody waits for the next window now, and its cameras are not needed
                with torch.no_grad():
                    self.cache.prepare(self.config.chunk, *self._grid())
            self.timings["clean"] = (time.perf_counter() - started) * 1e3

    def commit(self, latents: Tensor, viewmats: Tensor, intrinsics: Tensor) -> None:
        """Takes given clean latents (a start image, a recorded past) as the next chunk."""
        self.put_off(latents, viewmats, intrinsics)
        self.settle()

    def put_off(self, latents: Tensor, viewmats: Tensor, intrinsics: Tensor) -> None:
        """As `commit`, but the clean pass is left to `settle()` or to the next step."""
        self.settle()
        self.pending = Pending(latents, *self._rows(viewmats, a_frame(intrinsics, viewmats)))

    def rewind(self, frames: int) -> None:
        """Forgets all but the first `frames` latents; ValueError when the cache no longer holds
        what the window then needs.
        """
        self.settle()
        self.cache.truncate(frames)

    def fork(self, config: RolloutConfig | None = None) -> "Rollout":
        """An independent rollout with the same past (the frames are shared, since they are never
        written again).

        `config`: that of the new one, e.g. with a shorter window; None = the same. Its ring is made
        by the pass that needs it first.
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
            graphs=self.graphs,
        )
        twin.cache.restore(self.cache.frames, self.cache.committed)
        if self.pending is not None:
            twin.pending = Pending(*self.pending[:3])
        return twin

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        return torch.randn(
            shape, generator=generator, device=generator.device if generator else self.device
        ).to(self.device)

    def _view(self, viewmats: Tensor, intrinsics: Tensor) -> tuple[CacheView, Tensor]:
        return self.cache.view(viewmats, intrinsics, *self._grid())

    def _grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        _, patch_h, patch_w = self.model.config.patch_size
        return self.cells[0] // patch_h, self.cells[1] // patch_w

    def _rows(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The batch as the network sees it: with guidance twice, with prompt and without."""
        return tuple(torch.cat([x, x]) if self.guided else x for x in tensors)

    def _velocity(
        self, x: Tensor, sigma: Tensor, view: CacheView, projection: Tensor, wanted: bool = True
    ) -> Tensor | None:
        """Velocity of `x` `[B, C, F, H, W]`, guided; `sigma` is one of our own noise levels or `[B,
        F]`.
        """
        sigma = self._told.get(id(sigma), sigma)
        time = self._time(sigma, x.shape[2]) if sigma.ndim == 0 else self._rows(sigma)[0]
        run = self._passes or self.model
        velocity = run(
            *self._rows(x), time, self.text, projection, mode="cached", view=view, velocity=wanted
        )
        if not self.guided or velocity is None:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        return unconditional + self.config.guidance * (conditional - unconditional)

    def _time(self, sigma: Tensor, frames: int) -> Tensor | TimeContext:
        """One of our own noise levels for a pass; embedded once, unless a gradient shall reach the
        embedder.
        """
        levels = self._rows(sigma.expand(self.batch, frames))[0]
        key = (id(sigma), frames)
        if torch.is_grad_enabled():
            return levels
        if key not in self._times:
            self._times[key] = self.model.encode_time(levels)
        return self._times[key]

    def _solver(self, sigmas: tuple[Tensor, ...]) -> UniPCMultistepScheduler | None:
        """diffusers' UniPC for one chunk, where it is the sampler (as in minWM's
        `causal_diffusion_inference.py`).
        """
        if self.config.sampler != "unipc":
            return None
        solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        solver.set_timesteps(sigmas=torch.stack(sigmas).cpu().numpy(), device=self.device)
        solver.set_begin_index(0)
        return solver

    def _next_level(self, x, x0, velocity, sigma, next_sigma, noise, generator, solver) -> Tensor:
        if self.config.sampler == "euler":
            return x + (next_sigma - sigma) * velocity
        if solver is not None:
            return solver.step(velocity, solver.timesteps[0], x, return_dict=False)[
                0
            ]  # it counts the steps itself
        return add_noise(
            x0.detach(), self._draw(x0.shape, generator) if noise is None else noise, next_sigma
        )

    def _clean_pass(self, chunk: Pending, noisy=None) -> None:
        """The pass at sigma 0. With `noisy` (keys and values of the pass that had gradients) its
        gradient flows on, its values do not.
        """
        with torch.no_grad():
            self._velocity(chunk.latents, self._clean, chunk.view, chunk.projection, wanted=False)
        fresh = chunk.view.fresh
        if noisy is not None and self.config.cache_gradient == "straight_through":
            fresh = {
                layer: tuple(
                    c + (n - n.detach()) for c, n in zip(fresh[layer], noisy[layer], strict=True)
                )
                for layer in fresh
            }
        self.cache.commit(chunk.view, chunk.viewmats.double(), chunk.intrinsics.double(), fresh)
        self.pending = None  # not before: a pass that ran out of memory can be tried again

    def _first_pass_with_pending(
        self, x: Tensor, sigma: Tensor, viewmats: Tensor, intrinsics: Tensor
    ):
        """The clean pass of the chunk before and the first step of this one in a single forward
        pass; both see their own window.
        """
        past = self.pending
        if viewmats.shape[1] != past.viewmats.shape[1]:
            raise UserError(
                "a merged clean pass needs chunks of one length: set merge_clean to false"
            )
        count = viewmats.shape[1]
        both = torch.cat([past.viewmats.double(), viewmats.double()], dim=1)
        lenses = torch.cat([past.intrinsics, intrinsics], dim=1)
        view, projection = self.cache.pair_view(both, count, lenses, *self._grid())
        sigma = self._told.get(id(sigma), sigma)
        levels = torch.cat(
            [torch.zeros(self.batch, count, device=self.device), sigma.expand(self.batch, count)],
            dim=1,
        )
        velocity = self._velocity(torch.cat([past.latents, x], dim=2), levels, view, projection)
        clean = {layer: (k[:, :count], v[:, :count]) for layer, (k, v) in view.fresh.items()}
        self.cache.commit(view, past.viewmats.double(), past.intrinsics.double(), clean)
        self.pending = None
        return velocity[:, :, count:], *self._view(viewmats, intrinsics)


def a_frame(intrinsics: Tensor, viewmats: Tensor) -> Tensor:
    """Intrinsics `[B, 4]` or `[B, F, 4]` -> `[B, F, 4]`."""
    return (
        intrinsics[:, None].expand(-1, viewmats.shape[1], -1)
        if intrinsics.ndim == 2
        else intrinsics
    )


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

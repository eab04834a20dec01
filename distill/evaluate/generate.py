"""Frames to evaluate: transformers, each with its steps and sampler, run along a batch of camera
paths.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from worldmodel.bench.machine import describe_commit, describe_machine
from worldmodel.camera import FRAMES_PER_LATENT, invert, relative_to_first
from worldmodel.errors import UserError
from worldmodel.images import to_frames, to_unit_range
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.models.wan_autoencoder import Autoencoder
from worldmodel.reprojection import ConditionStream
from worldmodel.rollout import Rollout, RolloutConfig, with_steps
from worldmodel.worlds.place import Place
from worldmodel.worlds.weights import load_network
from worldmodel.worlds.world import World

_STEPS = re.compile(r"^(\d+)(e?)$")


@dataclass(frozen=True)
class Variant:
    """A row of the table: one transformer and one way to sample it."""

    name: str
    transformer: Path
    rollout: RolloutConfig


def parse_variant(text: str, rollout: RolloutConfig) -> list[Variant]:
    """`[NAME=]FOLDER[@STEPS,...]` -> one variant per count of steps; an `e` after a count selects
    the Euler solver.

    Without STEPS the world's own steps are used. Example: `stage 1=runs/stage1/export@16e,2`.
    Few-step models re-noise between steps (no letter), diffusion models follow the velocity (`e`).
    Raises UserError for a folder without a transformer or a count that is not valid.
    """
    name, equals, rest = text.partition("=")
    rest = rest if equals else text
    folder, at, counts = rest.rpartition("@") if "@" in rest else (rest, "", "")
    name = name if equals else folder
    if not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"expected a transformer folder with a config.json in {text!r}, got {folder!r}: name "
            "an export"
        )
    if not at:
        return [Variant(f"{name}, {_describe(rollout)}", Path(folder), rollout)]
    variants = []
    for part in counts.split(","):
        match = _STEPS.match(part.strip())
        if match is None:
            raise UserError(
                f"expected counts of steps like @4,2,1 or @16e in {text!r}, got {part!r}"
            )
        config = replace(
            with_steps(rollout, int(match[1])), sampler="euler" if match[2] else "renoise"
        )
        variants.append(Variant(f"{name}, {_describe(config)}", Path(folder), config))
    return variants


def _describe(config: RolloutConfig) -> str:
    count = len(config.steps)
    return f"{count} step{'s' if count > 1 else ''}" + (
        " (Euler)" if config.sampler == "euler" else ""
    )


def load_transformer(
    folder: Path, device: torch.device, dtype: torch.dtype
) -> CausalWanTransformer:
    """The transformer of an export folder, for inference. Raises UserError when it cannot be
    read.
    """
    return load_network(CausalWanTransformer, folder, device, dtype).requires_grad_(False)


@torch.inference_mode()
def describe_run(world: World) -> dict:
    """What a report says of the command, the machine and the world."""
    return {
        "command": f"python -m distill {shlex.join(sys.argv[1:])}",
        "commit": describe_commit(),
        "hardware": describe_machine(world.device),
        "device": str(world.device),
        "dtype": str(world.dtype).removeprefix("torch."),
        "world": world.config.name,
    }


def generate(
    world: World,
    config: RolloutConfig,
    first: np.ndarray,
    c2w: np.ndarray,
    prompts: list[str],
    seed: int,
    label: str = "generate",
    place: Place | None = None,
) -> Iterator[np.ndarray]:
    """Generate frames from ground-truth first frames along given cameras; yields those of one
    latent at a time.

    Args:
        first: uint8 [B, H, W, 3], the ground-truth first frames; they become latent 0.
        c2w: [B, F, 4, 4], one camera per latent, in any coordinate frame.
        prompts: B names.
        seed: of all noise; equal seeds and batches give every variant the same first noise.
        label: of the progress bar.
        place: what is remembered of it conditions every latent, as in play; then `c2w` are in its
            coordinates. None = everything is imagined.
    Yields:
        uint8 [B, n, H, W, 3], n = 1 for latent 0 and 4 after it.
    """
    device = world.device
    batch = len(first)
    (height, width) = world.latent_size
    viewmats = torch.from_numpy(np.stack([invert(relative_to_first(path)) for path in c2w])).to(
        device
    )
    lens = torch.tensor(world.config.intrinsics, dtype=torch.float64, device=device).expand(
        batch, 4
    )
    generator = torch.Generator("cpu").manual_seed(seed)
    text = torch.stack([world.prompts[name] for name in prompts])
    rollout = Rollout(
        world.transformer,
        text,
        config,
        batch=batch,
        height=height,
        width=width,
        device=device,
        unconditional=world.prompts.unconditional,
    )
    decoder = world.autoencoder.streaming_decoder()
    streams = [world.conditions(place) for _ in range(batch)] if place else []
    latents = world.autoencoder.encode(to_video(first[:, None], world.autoencoder)).float()
    rollout.commit(latents, viewmats[:, :1], lens, _conditions(streams, c2w[:, :1]))
    yield to_frames(decoder.step(latents))
    count = viewmats.shape[1]
    chunk = config.chunk
    # the last chunk may need fewer frames than it has
    padded = torch.cat([viewmats, viewmats[:, -1:].expand(-1, chunk - 1, -1, -1)], 1)
    path = np.concatenate([c2w, np.repeat(c2w[:, -1:], chunk - 1, 1)], 1)
    with tqdm(total=count - 1, desc=label, unit="latent", leave=False) as bar:
        for start in range(1, count, chunk):
            condition = _conditions(streams, path[:, start : start + chunk])
            latents = rollout.step(
                padded[:, start : start + chunk], lens, condition=condition, generator=generator
            )
            for latent in latents[:, :, : count - start].split(1, 2):
                bar.update()
                yield to_frames(decoder.step(latent))


def _conditions(streams: list[ConditionStream], c2w: np.ndarray) -> Tensor | None:
    """The next condition of every case [B, K, F, h, w]; None without a place."""
    if not streams:
        return None
    return torch.cat([stream.step(poses) for stream, poses in zip(streams, c2w, strict=True)])


@torch.inference_mode()
def reconstruct(autoencoder: Autoencoder, frames: np.ndarray, batch: int = 8) -> np.ndarray:
    """Encode and decode frames uint8 [B, 4F-3, H, W, 3] -> the last frame of every latent [B, F, H,
    W, 3].

    This is the best that generated frames can be with this autoencoder.
    """
    clips = []
    for part in tqdm(
        np.array_split(frames, -(-len(frames) // batch)), "autoencoder", unit="batch", leave=False
    ):
        encoder = autoencoder.streaming_encoder()
        decoder = autoencoder.streaming_decoder()
        pieces = [
            part[:, :1],
            *np.split(part[:, 1:], (frames.shape[1] - 1) // FRAMES_PER_LATENT, 1),
        ]
        latents = (encoder.step(to_video(piece, autoencoder)) for piece in pieces)
        clips.append(np.stack([to_frames(decoder.step(z))[:, -1] for z in latents], 1))
    return np.concatenate(clips)


def to_video(frames: np.ndarray, autoencoder: Autoencoder) -> Tensor:
    """uint8 [B, T, H, W, 3] -> [B, 3, T, H, W] in [-1, 1], of the autoencoder's type and device."""
    video = torch.from_numpy(np.ascontiguousarray(frames)).to(autoencoder.device)
    return to_unit_range(video.permute(0, 4, 1, 2, 3)).to(autoencoder.dtype)

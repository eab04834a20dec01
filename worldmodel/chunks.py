"""What one step of a session draws and shows, and what it keeps for going back."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from worldmodel.models.streaming import StreamState


@dataclass(frozen=True)
class FrameChunk:
    """What one step shows."""

    # uint8 [n, H, W, 3] RGB; a session's first latent is 1 frame, later ones are 4 each
    frames: np.ndarray
    index: int  # number of the chunk's first latent
    latents: int  # latents in the chunk
    prompt: str  # the prompt it was generated with
    # milliseconds: "network", "clean" (of the chunk before), "decode", which includes what runs at
    # the same time
    timings: dict[str, float]
    notice: str = ""  # a sentence for the player, when something had to change


class StreamStates(NamedTuple):
    """What a session's autoencoder remembers: of decoding, and of encoding conditions."""

    decoder: StreamState
    conditions: tuple[StreamState, np.ndarray | None] | None


def draw_noise(seed: int, latents: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Noise `[steps, 1, C, F, h, w]` of latents, by number; `shape`: steps, C, h, w.

    Every latent has its own generator, seeded by (seed, number).
    """
    draws = []
    for number in latents:
        state = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]) >> 1)
        draws.append(torch.randn(shape, generator=generator))
    return torch.stack(draws, dim=2).unsqueeze(1)

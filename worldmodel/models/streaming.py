"""What streaming autoencoders share: state that can be taken and restored."""

from typing import NamedTuple

from torch import Tensor

from worldmodel.camera import FRAMES_PER_LATENT
from worldmodel.errors import UserError


class StreamState(NamedTuple):
    """What a stream remembers. The tensors are never written to, so keeping or sharing a state
    costs nothing.
    """

    started: bool  # whether the first frame (or latent) has passed
    memories: tuple[Tensor | None, ...]  # one for each layer that looks back; None: nothing yet

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The memories that exist, as `prefix.number`."""
        return {f"{prefix}.{i}": x for i, x in enumerate(self.memories) if x is not None}


class Stream:
    """An encoder or decoder together with its memory; `step` is the subclass's."""

    def __init__(self, memories: int):
        self._empty = StreamState(False, (None,) * memories)
        self._state = self._empty

    def state(self) -> StreamState:
        """The memory as it is now; later steps do not change it (rewind, fork)."""
        return self._state

    def restore(self, state: StreamState) -> None:
        """Continues from a state of this or another stream of the same model."""
        if not isinstance(state, StreamState) or len(state.memories) != len(self._empty.memories):
            raise UserError(
                f"expected the state of a stream with {len(self._empty.memories)} memories, got "
                f"{_describe(state)}: restore only what state() of the same kind of stream "
                "returned"
            )
        self._state = state

    def reset(self) -> None:
        """Forgets everything; the next step is the first."""
        self._state = self._empty

    def _check_batch(self, batch: int) -> None:
        if any(m is not None and m.numel() and m.shape[0] != batch for m in self._state.memories):
            raise ValueError(
                f"expected the batch size of the steps before, got {batch}: reset() before a new "
                "batch"
            )


def _check_video(video: Tensor, channels: int, factor: int, started: bool) -> None:
    if video.ndim != 5 or video.shape[1] != channels:
        raise ValueError(f"expected video [B,{channels},T,H,W], got shape {tuple(video.shape)}")
    frames, height, width = video.shape[2:]
    if frames == 0 or (frames - (0 if started else 1)) % FRAMES_PER_LATENT:
        rule = "4F frames after the first step" if started else "4F - 3 frames (1, 5, 9, ...)"
        raise UserError(
            f"expected {rule}, got {frames}: one frame is latent 0, then 4 frames are a latent"
        )
    if height % factor or width % factor:
        raise UserError(
            f"expected height and width in multiples of {factor}, got {height}x{width}: crop or "
            "resize"
        )


def _check_latents(latents: Tensor, channels: int) -> None:
    if latents.ndim != 5 or latents.shape[1] != channels or latents.shape[2] == 0:
        raise ValueError(
            f"expected latents [B,{channels},F,h,w] with F >= 1, got shape {tuple(latents.shape)}"
        )


def _describe(value: object) -> str:
    return (
        f"one with {len(value.memories)}"
        if isinstance(value, StreamState)
        else type(value).__name__
    )

"""What a player may decide about the engine. Without torch, so that command lines can check it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from worldmodel.errors import UserError

if TYPE_CHECKING:
    import torch

CHOICES = {
    "memory": ("auto", "40", "24", "16", "12", "8"),
    "weights": ("auto", "full", "int8", "fp8"),
    "compile": ("auto", "on", "off"),
    "attention": ("auto", "torch", "fa3"),
}


@dataclass(frozen=True)
class EngineOptions:
    """One of CHOICES each; "auto": what the device allows. Raises UserError for anything else."""

    memory: str = "auto"  # GB of the device to plan for, by the tiers of the engine
    weights: str = "auto"  # "auto": as the tier has it
    # blocks: "on" (compiled before play begins), "off"; "auto" = on CUDA, while playing
    compile: str = "auto"
    # "torch" (scaled_dot_product_attention as it is), "fa3" (FlashAttention 3 inside it); "auto" =
    # fa3 where it is installed
    attention: str = "auto"

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                )

    def compiles(self, device: torch.device) -> bool:
        """Whether blocks are compiled on `device`."""
        return self.compile == "on" or self.compile == "auto" and device.type == "cuda"

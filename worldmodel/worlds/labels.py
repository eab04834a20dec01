"""What a world calls its actions. Without torch, because the window shows them before it loads."""

from dataclasses import dataclass

from worldmodel.config import as_dict
from worldmodel.errors import UserError

MAX_LABEL = 16  # characters, so that all fit into the window's list of keys


@dataclass(frozen=True)
class Labels:
    """What the window calls the actions whose meaning depends on the world."""

    new_seed: str = "new seed"
    next_prompt: str = "next prompt"
    change_prompt: str = "change prompt"
    elsewhere: str = "leave, return"  # instead of new_seed, in worlds with places

    def __post_init__(self):
        for name, label in as_dict(self).items():
            if not 1 <= len(label.strip()) <= MAX_LABEL:
                raise UserError(f"{name} must have 1 to {MAX_LABEL} characters, got {label!r}.")

"""Which key does what. Data only: rebinding is a new `Bindings`, and nothing here needs pygame or torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from worldmodel.controls import MOTIONS

COMMANDS = ("restart", "next_mood", "change_mood", "new_town", "pause", "record", "screenshot", "overlay", "escape")

DEFAULT_KEYS = MappingProxyType(
    {
        "w": "forward",
        "s": "back",
        "a": "left",
        "d": "right",
        "left shift": "run",
        "right shift": "run",
        "left": "turn_left",
        "right": "turn_right",
        "up": "look_up",
        "down": "look_down",
        "r": "restart",
        "n": "next_mood",
        "m": "change_mood",
        "t": "new_town",
        "p": "pause",
        "f9": "record",
        "f12": "screenshot",
        "f1": "overlay",
        "escape": "escape",
    }
)


@dataclass(frozen=True)
class Bindings:
    """Key name, as `pygame.key.name` spells it, -> action (a motion that Controls knows, or one of COMMANDS)."""

    keys: Mapping[str, str] = field(default_factory=lambda: DEFAULT_KEYS)

    def __post_init__(self):
        for key, action in self.keys.items():
            if action not in (*MOTIONS, *COMMANDS):
                known = ", ".join((*MOTIONS, *COMMANDS))
                raise ValueError(f"Key {key!r} is bound to the unknown action {action!r}; use one of {known}.")

    def action(self, key: str) -> str | None:
        """The action of a key, or None for a key that means nothing here."""
        return self.keys.get(key)

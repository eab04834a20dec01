"""Key bindings as data: rebinding is a new `Bindings`. Needs neither pygame nor torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from worldmodel.controls import MOTIONS
from worldmodel.errors import UserError

COMMANDS = (
    "restart",
    "next_prompt",
    "change_prompt",
    "new_seed",
    "rewind",
    "pause",
    "record",
    "screenshot",
    "overlay",
    "escape",
)
# What the player reads for a command where world.yaml gives it no name of its own under `labels`.
LABELS = MappingProxyType(
    {"next_prompt": "next prompt", "change_prompt": "prompt here", "new_seed": "new seed"}
)

DEFAULT_KEYS = MappingProxyType(
    {
        "space": "rise",
        "left ctrl": "sink",
        "right ctrl": "sink",
        "left shift": "run",
        "right shift": "run",
        "left": "turn_left",
        "right": "turn_right",
        "up": "look_up",
        "down": "look_down",
        "backspace": "rewind",
        "r": "restart",
        "n": "next_prompt",
        "m": "change_prompt",
        "t": "new_seed",
        "p": "pause",
        "f9": "record",
        "f12": "screenshot",
        "f1": "overlay",
        "escape": "escape",
    }
)

# SDL scancodes (USB usage numbers), which name the place of a key, whatever letter a layout gives
# it. W A S D always go by place; the letters of commands do where the layout is not Latin.
DEFAULT_SCANCODES = MappingProxyType({26: "forward", 4: "left", 22: "back", 7: "right"})
NON_LATIN_SCANCODES = MappingProxyType(
    {21: "restart", 17: "next_prompt", 16: "change_prompt", 23: "new_seed", 19: "pause"}
)


@dataclass(frozen=True)
class Bindings:
    """Map keys to actions: a motion that Controls knows, or one of COMMANDS.

    keys: by name, as `pygame.key.name` spells it. scancodes: by scancode, before the name.
    non_latin: by scancode, for keys whose name is not ASCII. Raises UserError for an unknown
    action.
    """

    keys: Mapping[str, str] = field(default_factory=lambda: DEFAULT_KEYS)
    scancodes: Mapping[int, str] = field(default_factory=lambda: DEFAULT_SCANCODES)
    non_latin: Mapping[int, str] = field(default_factory=lambda: NON_LATIN_SCANCODES)

    def __post_init__(self):
        for bound in (self.keys, self.scancodes, self.non_latin):
            for key, action in bound.items():
                if action not in (*MOTIONS, *COMMANDS):
                    known = ", ".join((*MOTIONS, *COMMANDS))
                    raise UserError(
                        f"Key {key!r} is bound to the unknown action {action!r}; use one of "
                        f"{known}."
                    )

    def action(self, key: str, scancode: int | None = None) -> str | None:
        """Return the action of a key by its scancode or name; None for a key that is not bound."""
        if scancode in self.scancodes:
            return self.scancodes[scancode]
        if key in self.keys:
            return self.keys[key]
        return None if key.isascii() else self.non_latin.get(scancode)

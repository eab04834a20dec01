"""Which key does what. Data only: rebinding is a new `Bindings`, and nothing here needs pygame or
torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from worldmodel.controls import MOTIONS
from worldmodel.errors import UserError

COMMANDS = (
    "restart",
    "next_mood",
    "change_mood",
    "new_town",
    "pause",
    "record",
    "screenshot",
    "overlay",
    "escape",
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


# SDL's scancodes (USB's numbers): W A S D by where they lie, whatever letter a layout writes on
# them; the commands' letters likewise where the layout is of another alphabet.
DEFAULT_PLACES = MappingProxyType({26: "forward", 4: "left", 22: "back", 7: "right"})
FOREIGN_PLACES = MappingProxyType(
    {21: "restart", 17: "next_mood", 16: "change_mood", 23: "new_town", 19: "pause"}
)


@dataclass(frozen=True)
class Bindings:
    """What a key does: a motion that Controls knows, or one of COMMANDS."""

    keys: Mapping[str, str] = field(
        default_factory=lambda: DEFAULT_KEYS
    )  # by its name, as `pygame.key.name` spells it
    places: Mapping[int, str] = field(
        default_factory=lambda: DEFAULT_PLACES
    )  # by its scancode; comes before the name
    foreign: Mapping[int, str] = field(
        default_factory=lambda: FOREIGN_PLACES
    )  # by its scancode, if its name is not ASCII

    def __post_init__(self):
        for key, action in (*self.keys.items(), *self.places.items(), *self.foreign.items()):
            if action not in (*MOTIONS, *COMMANDS):
                known = ", ".join((*MOTIONS, *COMMANDS))
                raise UserError(
                    f"Key {key!r} is bound to the unknown action {action!r}; use one of {known}."
                )

    def action(self, key: str, place: int | None = None) -> str | None:
        """The action of a key by name and scancode, or None for a key that means nothing here."""
        return (
            self.places.get(place)
            or self.keys.get(key)
            or (None if key.isascii() else self.foreign.get(place))
        )

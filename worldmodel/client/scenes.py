"""Which mood, which start picture, which seed: the choices of the player, and a session for each of them."""

from dataclasses import dataclass, replace

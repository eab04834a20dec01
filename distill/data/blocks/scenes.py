"""What a renderer and a walker need of a place, and the place that a clip was filmed in."""

from typing import Protocol

import numpy as np

from distill.data.blocks.island import Island
from distill.data.blocks.town import Boxes, Mood, Town


class Scene(Protocol):
    """A place of boxes on tiled ground. Cell (i, j) covers x in CELL * [i, i + 1], z likewise."""

    mood: str

    @property
    def source(self) -> str:
        """Text from which `scene_of` makes the scene again."""

    @property
    def look(self) -> Mood:
        """Colours and light."""

    @property
    def reach(self) -> int:
        """Cells around the camera's that a picture shows."""

    def boxes(self, i: int, j: int, reach: int) -> Boxes:
        """All boxes of the cells within `reach` cells of cell (i, j)."""

    def ground(self, i: int, j: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
        """Tile colours around cell (i, j), near and far, [T, T, 3] each."""

    def sea(self, i: int, j: int, reach: int) -> np.ndarray | None:
        """Which of these tiles are water, bool [T, T]; None for a place without water."""

    def barriers(self, i: int, j: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
        """Footprints (low, high) [n, 2] in x and z that feet cannot enter, boxes aside."""


def scene_of(source: str) -> Town | Island:
    """The town or the island of a clip, from the `source` of its meta.yaml."""
    return (Island if source.startswith("island:") else Town).from_source(source)

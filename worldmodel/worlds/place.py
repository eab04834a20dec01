"""A place of a world: where its walk starts and what is seen there, and where a walker may go."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from worldmodel.camera import check_poses
from worldmodel.config import build, read_yaml
from worldmodel.files import write_file
from worldmodel.images import read_image, write_png
from worldmodel.walkable import PNG, YAML, WalkableMap, Walls

PLACES = "places"  # folder of a bundle, with a folder for each
PLACE = "place.yaml"
PICTURE = "start.png"


@dataclass(frozen=True)
class _Values:
    """`place.yaml`."""

    name: str
    title: str
    start: tuple[tuple[float, ...], ...]
    prompt: str = ""  # empty: the world's default
    source: str = ""  # of the clips; for readers only


@dataclass(frozen=True)
class Place:
    """One folder of `places/` in a bundle. The identity of its sessions is the pose `start`."""

    name: str
    title: str
    start: np.ndarray  # c2w [4, 4] in the place's coordinates
    walkable: WalkableMap | None
    picture: np.ndarray | None = None  # uint8 [H, W, 3], the view from `start`; None: generated
    prompt: str = ""  # of its sessions; empty: the world's default
    source: str = ""  # where its footage comes from, such as island:meadow:1

    @property
    def walls(self) -> Walls | None:
        """The map in the coordinates of a session; None = no walls."""
        return Walls(self.walkable, self.start) if self.walkable else None

    @classmethod
    def read(cls, folder) -> "Place":
        """Read `place.yaml`, and map and start picture if there are any. Raises UserError for
        damaged files.
        """
        folder = Path(folder)
        path = folder / PLACE
        values = build(_Values, read_yaml(path, "place"), str(path))
        start = check_poses(values.start, 1, f"{path}: start")[0]
        mapped = (folder / PNG).exists() or (folder / YAML).exists()
        walkable = WalkableMap.read(folder) if mapped else None
        picture = read_image(folder / PICTURE) if (folder / PICTURE).exists() else None
        return cls(
            values.name, values.title, start, walkable, picture, values.prompt, values.source
        )

    def write(self, folder) -> None:
        """Write what `read` reads into `folder`."""
        folder = Path(folder)
        start = np.asarray(self.start, np.float64).tolist()
        values = {"name": self.name, "title": self.title, "start": start}
        values |= {key: getattr(self, key) for key in ("prompt", "source") if getattr(self, key)}
        write_file(folder / PLACE, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        if self.walkable:
            self.walkable.write(folder)
        if self.picture is not None:
            write_png(folder / PICTURE, self.picture)

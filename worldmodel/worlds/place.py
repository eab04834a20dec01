"""A place of a world: where its walk starts, and where a walker may go."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from worldmodel.camera import check_poses
from worldmodel.config import build, parse_yaml
from worldmodel.errors import UserError, first_line
from worldmodel.files import write_file
from worldmodel.walkable import PNG, WalkableMap, Walls

PLACE = "place.yaml"


@dataclass(frozen=True)
class _Values:
    """`place.yaml`."""

    name: str
    title: str
    start: tuple[tuple[float, ...], ...]
    source: str = ""


@dataclass(frozen=True)
class Place:
    """One folder of `places/` in a bundle. The identity of its sessions is the pose `start`."""

    name: str
    title: str
    start: np.ndarray  # c2w [4, 4] in the place's coordinates
    walkable: WalkableMap | None
    # what the clips' meta.yaml calls their scene, for evaluation against its renderer; "" = unknown
    source: str = ""

    @property
    def walls(self) -> Walls | None:
        """The map in the coordinates of a session; None = no walls."""
        return Walls(self.walkable, self.start) if self.walkable else None

    @classmethod
    def read(cls, folder) -> "Place":
        """Read `place.yaml` and the map, if there is one. Raises UserError for damaged files."""
        path = Path(folder) / PLACE
        try:
            values = parse_yaml(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, UserError) as error:
            raise UserError(
                f"{path} cannot be read ({first_line(error)}); fetch the place again."
            ) from None
        values = build(_Values, values, str(path))
        start = check_poses(values.start, 1, f"{path}: start")[0]
        walkable = WalkableMap.read(folder) if (Path(folder) / PNG).exists() else None
        return cls(values.name, values.title, start, walkable, values.source)

    def write(self, folder) -> None:
        """Write what `read` reads into `folder`."""
        folder = Path(folder)
        start = np.asarray(self.start, np.float64).tolist()
        values = {"name": self.name, "title": self.title, "start": start}
        values |= {"source": self.source} if self.source else {}
        write_file(folder / PLACE, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        if self.walkable:
            self.walkable.write(folder)

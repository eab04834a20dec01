"""`world.yaml`, the description of a world: its keys, its format, what older formats mean."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from worldmodel.config import as_dict, build, read_yaml
from worldmodel.controls import Envelope
from worldmodel.errors import UserError
from worldmodel.rollout import RolloutConfig
from worldmodel.worlds.labels import Labels

FORMAT = 2
WORLD_YAML = "world.yaml"
# Rollout options of format 1 that format 2 does not have, with the values that changed nothing.
RETIRED = {"merge_clean": False, "cache_gradient": "detached", "context_sigma": 0.0}
_MAX_PIXELS = 4096
_MAX_FPS = 240

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptConfig:
    """Which prompt a session starts with when none is asked for."""

    default: str


@dataclass(frozen=True)
class WorldConfig:
    """`world.yaml`. Unknown keys and wrong types are errors."""

    name: str
    title: str  # one line for menus
    height: int  # pixels
    width: int  # pixels
    fps: float  # pixel frames a second
    intrinsics: tuple[float, ...]  # fx/W, fy/H, cx/W, cy/H
    envelope: Envelope
    rollout: RolloutConfig
    prompts: PromptConfig
    # prompt -> files in images/; the first is the default
    images: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # folder or hub id (diffusers' layout) of the encoder that made the prompts; empty: stored
    # prompts only
    text_encoder: str = ""
    place: str = ""  # where sessions of play begin, a folder of places/; empty: imagined
    views: int = 8  # remembered frames of a place that a latent's condition is made of
    labels: Labels = Labels()
    # things do not move: nothing is generated while the camera rests (`Session.at_rest`)
    still: bool = False
    licence: str = "unknown"  # of weights and pictures, copied into recordings
    # older fingerprints of the same weights: recordings and saves that name one belong to this
    # world
    earlier_fingerprints: tuple[str, ...] = ()
    format: int = FORMAT

    def __post_init__(self):
        fx, fy, *centre = self.intrinsics if len(self.intrinsics) == 4 else (0, 0, 0)
        if min(fx, fy) <= 0 or max(abs(c - 0.5) for c in centre) > 1e-6:
            raise UserError(
                "intrinsics must be [fx/W, fy/H, 0.5, 0.5] with positive focal lengths, got "
                f"{list(self.intrinsics)} (recordings cannot hold another principal point)."
            )
        for name, most in (("height", _MAX_PIXELS), ("width", _MAX_PIXELS), ("fps", _MAX_FPS)):
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"{name} must be 1 to {most}, got {getattr(self, name)}.")

    @classmethod
    def read(cls, path: str | Path) -> "WorldConfig":
        """Read a world.yaml of format 1 or 2.

        Raises UserError with one sentence for a foreign, newer or faulty file. Logs a warning where
        a file of format 1 sets a retired option to something else than its default.
        """
        path = Path(path)
        values = read_yaml(path, "world")
        found = values.get("format") if isinstance(values, dict) else None
        if found == 1:
            values, ignored = migrate(values)
            warn_ignored(path, ignored)
        elif found != FORMAT:
            newer = isinstance(found, int) and found > FORMAT
            todo = "update this program" if newer else "it is not one of this program's worlds"
            raise UserError(f"{path} has format {found!r}, format {FORMAT} is expected; {todo}.")
        return build(cls, values, str(path))

    def text(self) -> str:
        """The YAML that `read` reads."""
        plain = as_dict(self)
        return yaml.safe_dump(
            {"format": plain.pop("format"), **plain}, sort_keys=False, allow_unicode=True
        )


def migrate(values: Mapping) -> tuple[dict, dict]:
    """The content of a world.yaml of format 1 -> (the same world in format 2, ignored options).

    Exactly these keys of `rollout` are left out: `merge_clean`, `cache_gradient` and
    `context_sigma`. The ignored options are those of them whose value is not the default: the
    world plays without. Every other key stays and is checked by `config.build`.
    """
    rollout, ignored = without_retired(values.get("rollout"))
    migrated = {**values, "format": FORMAT}
    if "rollout" in values:
        migrated["rollout"] = rollout
    return migrated, ignored


def without_retired(rollout: object) -> tuple[object, dict]:
    """The section `rollout` without the options of `RETIRED`, and those that had another value
    than the default. What is not a mapping is returned as it is.
    """
    if not isinstance(rollout, Mapping):
        return rollout, {}
    kept = {key: value for key, value in rollout.items() if key not in RETIRED}
    ignored = {key: rollout[key] for key in RETIRED if key in rollout}
    return kept, {key: value for key, value in ignored.items() if value != RETIRED[key]}


def warn_ignored(path: Path, ignored: Mapping) -> None:
    """Log one warning that names the options of `path` that have no effect any more."""
    if ignored:
        options = ", ".join(f"{key}: {value}" for key, value in ignored.items())
        logger.warning(
            "%s asks for rollout options that this version does not have (%s): it plays without "
            "them, so frames differ from those of older versions.",
            path,
            options,
        )

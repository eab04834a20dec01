"""Fingerprints of a world: where they are equal, a recording can be replayed and a save loaded."""

import hashlib
import json
from pathlib import Path

import numpy as np
import yaml

from worldmodel.worlds.config import WORLD_YAML, WorldConfig
from worldmodel.worlds.place import PLACES, Place
from worldmodel.worlds.place_views import VIEWS

_DECIDING = (
    "steps",
    "first_steps",
    "shift",
    "chunk",
    "window",
    "sinks",
    "positions",
    "sampler",
    "guidance",
)


def fingerprint(folder: Path, config: WorldConfig) -> str:
    """Hash of what decides the pixels of a bundle, 16 hexadecimal digits.

    That is: picture size, intrinsics, the rollout options that `_DECIDING` names, the stored
    prompts, and the weights and configuration of both networks. Titles, labels, start images,
    places (`place_fingerprint`), other files in the folder, and the remarks of diffusers in
    config.json decide nothing.
    """
    rollout = {name: getattr(config.rollout, name) for name in _DECIDING}
    digest = hashlib.sha256()
    _add(digest, [config.height, config.width, config.intrinsics, rollout])
    for part in ("transformer", "autoencoder"):
        options = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
        kept = ("_class_name", *(name for name in options if not name.startswith("_")))
        _add(digest, {name: options.get(name) for name in kept})
    _add_files(digest, folder, [*folder.glob("*/*.safetensors"), folder / "prompts.safetensors"])
    return digest.hexdigest()[:16]


def place_fingerprint(folder: Path, place: Place, config: WorldConfig) -> str:
    """Hash of what decides the pixels of sessions in `place`, whose folder is `folder`, in addition
    to the world's fingerprint: remembered frames, start pose, frames for each latent.
    """
    digest = hashlib.sha256(np.asarray(place.start, np.float64).tobytes())
    _add(digest, config.views)
    _add_files(digest, folder, [folder / VIEWS])
    return digest.hexdigest()[:16]


def first_edition_fingerprint(folder: Path) -> str | None:
    """The fingerprint that the first edition gave to a bundle of format 1; None for other formats.

    It hashes the size, intrinsics and rollout options as world.yaml writes them, and every
    safetensors and JSON file in the folder, places aside: that edition had none.
    """
    values = yaml.safe_load((folder / WORLD_YAML).read_text(encoding="utf-8"))
    if values.get("format") != 1:
        return None
    digest = hashlib.sha256()
    _add(digest, {key: values.get(key) for key in ("height", "width", "intrinsics", "rollout")})
    files = [
        path
        for path in folder.rglob("*")
        if path.suffix in (".safetensors", ".json") and path.relative_to(folder).parts[0] != PLACES
    ]
    _add_files(digest, folder, files)
    return digest.hexdigest()[:16]


def _add(digest, values: object) -> None:
    digest.update(json.dumps(values, sort_keys=True).encode())


def _add_files(digest, folder: Path, files: list[Path]) -> None:
    """Names, relative to the folder, and contents."""
    for path in sorted(files):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())

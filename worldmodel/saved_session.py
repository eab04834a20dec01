"""A saved session on disk: session.yaml and session.safetensors, read and checked; how saves and
recordings name their place.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from worldmodel.config import parse_yaml
from worldmodel.errors import UserError
from worldmodel.models.frame_store import CachedFrame
from worldmodel.models.kv_cache import KVCache
from worldmodel.worlds.place import Place
from worldmodel.worlds.world import World

FORMAT = 1
FILES = ("session.yaml", "session.safetensors")
# what session.yaml holds in addition to its format
_SAVED = {
    "world": str,
    "fingerprint": str,
    "dtype": str,
    "prompt": str,
    "seed": int,
    "steps": int | None,
    "history": int,
    "frames": int,
    "decoder": dict,
}
# the same in sessions with recall; older saves have none of it
_RECALL = {"recall": int, "recall_memory": int, "recall_unit": float}
FRAME_PARTS = ("keys", "values", "viewmats", "intrinsics")
PENDING = ("latents", "viewmats", "intrinsics")  # stored as pending.0, pending.1, pending.2


def read_values(path: Path) -> dict:
    """What session.yaml holds. Raises UserError when something is absent or of another kind."""
    values = parse_yaml(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else values
        raise UserError(f"format {found!r} instead of {FORMAT}")
    for name, kind in _SAVED.items():
        if not isinstance(values.get(name), kind):
            raise UserError(f"{name} is {values.get(name)!r}")
    for name, kind in _RECALL.items():
        if not isinstance(values.get(name, kind()), kind):
            raise UserError(f"{name} is {values[name]!r}")
    decoder = values["decoder"]
    if not {"started", "memories"} <= decoder.keys():
        raise UserError(f"decoder is {decoder!r}")
    return values


def place_values(world: World, place: Place | None) -> dict[str, str | None]:
    """What a save or a recording keeps of its place, for `saved_place`."""
    fingerprint = world.place_fingerprint(place) if place else None
    return {"place": place.name if place else None, "place_fingerprint": fingerprint}


def saved_place(path, values: dict, world: World) -> Place | None:
    """The place of the save or recording at `path`, which holds `values`; None = imagined, as in
    those from before there were places.

    Raises UserError when the world no longer has the place, or remembers something else of it.
    """
    name = values.get("place")
    if not name:
        return None
    if name not in world.places:
        raise UserError(
            f"{path} was made in the place {name!r}, which the opened world "
            f"{world.config.name!r} does not have; open a copy of the world that has it."
        )
    place = world.place(name)
    now = world.place_fingerprint(place)
    then = values.get("place_fingerprint") or now
    if then != now:
        raise UserError(
            f"{path} was made in the place {name!r} as it was then ({then}), now it is another "
            f"({now}); open the same version of the world."
        )
    return place


def read_tensors(path: Path, values: dict, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a save, all that belong together: on `device`, `stored.` ones on the CPU."""
    tensors = {}
    for own, place in ((True, "cpu"), (False, str(device))):
        with safe_open(path, framework="pt", device=place) as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if name.startswith("stored.") == own:
                    tensors[name] = file.get_tensor(name)
    kinds = ("frame.", "stored.")
    frames = {name.rpartition(".")[0] for name in tensors if name.startswith(kinds)}
    wanted = {"poses", *(f"{frame}.{part}" for frame in frames for part in FRAME_PARTS)}
    if "pending.0" in tensors:
        wanted |= {f"pending.{number}" for number in range(len(PENDING))}
    if "recallable" in tensors:
        known = {int(frame.split(".")[1]) for frame in frames}
        for number in set(tensors["recallable"].tolist()) - known:
            wanted.add(f"stored.{number}.keys")
    missing = wanted - tensors.keys()
    if missing:
        raise UserError(f"the tensor {min(missing)} is missing")
    if len(tensors["poses"]) != values["frames"]:
        raise UserError(f"{len(tensors['poses'])} poses for {values['frames']} latents")
    return tensors


def cache_tensors(cache: KVCache) -> dict[str, Tensor]:
    """What a save holds of a cache: frames of the window ("frame"), then those that are only in
    the store of the whole session ("stored"), and the numbers of all frames in that store.
    """
    frames = {frame.index: frame for frame in cache.visible(1)}
    tensors = _named("frame", frames.values())
    if cache.store is not None:
        tensors |= _named("stored", (one for one in cache.store if one.index not in frames))
        tensors["recallable"] = torch.tensor([frame.index for frame in cache.store])
    return tensors


def restore_cache(cache: KVCache, tensors: dict[str, Tensor], committed: int) -> None:
    """Continues from what `cache_tensors` stored of a past of `committed` latents."""
    frames = _frames("frame", tensors)
    known = {frame.index: frame for frame in [*_frames("stored", tensors), *frames]}
    numbers = tensors["recallable"].tolist() if "recallable" in tensors else ()
    cache.restore(frames, committed, [known[number] for number in numbers])


def _named(kind: str, frames: Iterable[CachedFrame]) -> dict[str, Tensor]:
    return {
        f"{kind}.{frame.index}.{part}": getattr(frame, part)
        for frame in frames
        for part in FRAME_PARTS
    }


def _frames(kind: str, tensors: dict[str, Tensor]) -> list[CachedFrame]:
    parts = [name.split(".") for name in tensors]
    numbers = sorted({int(part[1]) for part in parts if part[0] == kind})
    return [
        CachedFrame(number, *(tensors[f"{kind}.{number}.{part}"] for part in FRAME_PARTS))
        for number in numbers
    ]

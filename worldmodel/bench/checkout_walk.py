"""Time a walk in the checkout that is the current folder: one process of `--against`.

A script: `python -P checkout_walk.py SETTINGS`, where SETTINGS is the JSON of
`worldmodel.bench.against.Settings`. Prints its figures as JSON in the last line of stdout.

It must run with any commit of this project, so it imports from its own package nothing at all, and
from the checkout only what every commit has: `World.from_pretrained`, `Session`, its `step`, and
its method that commits a chunk. Modules that have moved are tried by all their names.
"""

import hashlib
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

MODULES = {
    "World": ("worldmodel.worlds.world", "worldmodel.world"),
    "Session": ("worldmodel.session",),
    "EngineOptions": ("worldmodel.engine.options", "worldmodel.engine.engine", "worldmodel.engine"),
    "Shape": ("worldmodel.bench.random_world", "worldmodel.random_world"),
    "random_config": ("worldmodel.bench.random_world", "worldmodel.random_world"),
    "random_world": ("worldmodel.bench.random_world", "worldmodel.random_world"),
}
FORWARD = 0.08  # units per latent
TURN = 3.0  # degrees per latent, in the second half of each LEG
LEG = 16  # latents


def find(name: str):
    """The class or function `name` of the checkout. Raises ImportError where it has none."""
    for module in MODULES[name]:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there, but something that it imports is not
            continue
        if hasattr(found, name):
            return getattr(found, name)
    raise ImportError(f"no {name} in {' or '.join(MODULES[name])}")


def open_world(settings: dict):
    """The world of the settings, opened by the checkout."""
    import torch

    dtype = getattr(torch, settings["dtype"]) if settings["dtype"] else None
    device = torch.device(settings["device"])
    if settings["random_weights"] is None:
        return find("World").from_pretrained(settings["world"], device=device, dtype=dtype)
    shape = find("Shape").parse(settings["random_weights"])
    like = None if settings["world"] is None else Path(settings["world"])
    size = None if settings["size"] is None else tuple(settings["size"])
    config = find("random_config")(shape, like, size)
    world = find("random_world")(shape, config, settings["autoencoder"], device, dtype)
    return world.fitted(find("EngineOptions")())


def walk_poses(latents: int) -> list:
    """c2w [4,4] of a walk that goes straight and turns right, one per latent."""
    import numpy as np

    pose = np.eye(4)
    poses = []
    for index in range(latents):
        angle = math.radians(TURN) if index % LEG >= LEG // 2 else 0.0
        step = np.eye(4)
        step[0, 0] = step[2, 2] = math.cos(angle)
        step[0, 2] = math.sin(angle)
        step[2, 0] = -math.sin(angle)
        step[2, 3] = FORWARD
        pose = pose @ step
        poses.append(pose)
    return poses


def commit_of(session) -> Callable[[], object]:
    """The method that commits the last chunk to memory, by its newest name."""
    for name in ("commit_pending", "settle"):
        if hasattr(session, name):
            return getattr(session, name)
    raise AttributeError("Session has neither commit_pending nor settle")


def timed_chunk(session, commit: Callable[[], object], poses) -> tuple:
    """Generate and commit one chunk; return its frames, ms until the first of them, ms in all."""
    moments = [time.perf_counter()]
    chunk = session.step(poses, lambda _: moments.append(time.perf_counter()))
    commit()
    moments.append(time.perf_counter())
    began, first, ended = moments
    return chunk.frames, (first - began) * 1e3, (ended - began) * 1e3


def measure(settings: dict) -> dict:
    """Walk as the player does, and return the figures."""
    import numpy as np
    import torch

    torch.set_num_threads(settings["threads"])
    torch.set_float32_matmul_precision("medium")  # as in play
    world = open_world(settings)
    # no rewind: commits differ in how many latents they keep for it
    session = find("Session")(world, seed=settings["seed"], steps=settings["steps"], history=0)
    commit = commit_of(session)
    size = session.chunk
    if not session.frames:  # the first edition's sessions have no first chunk
        session.step(np.stack([np.eye(4)] * size))
    warm_up = -(-session.config.window // size) + 2  # chunks
    count = warm_up + -(-settings["latents"] // size)
    poses = np.stack(walk_poses(count * size))
    digest = hashlib.sha256()
    times = []
    for index in range(count):
        if index == warm_up and getattr(world.engine, "compiled", None):
            world.engine.compiled.wait()
        chosen = poses[index * size : (index + 1) * size]
        cpu = time.process_time()
        frames, first, total = timed_chunk(session, commit, chosen)
        cpu = time.process_time() - cpu
        digest.update(np.ascontiguousarray(frames))
        if index >= warm_up:
            times.append((total / size, first, cpu * 1e3 / size))
    total, first, cpu = np.median(times, axis=0).tolist()
    return {
        "ms_per_latent": total,
        "first_frames_ms": first,
        "cpu_ms_per_latent": cpu,
        "frames": digest.hexdigest(),
        "played": {
            "threads": torch.get_num_threads(),
            "dtype": str(world.dtype).removeprefix("torch."),
            "steps": list(session.config.steps),
            "chunk": size,
            "window": session.config.window,
        },
    }


def main() -> None:
    """Import from the current folder, measure and print."""
    checkout = Path.cwd()
    sys.path.insert(0, str(checkout))
    # an editable installation would supply the modules that this checkout does not have
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if not getattr(finder, "__module__", "").startswith("__editable__")
    ]
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in play; read when torch is imported
    import worldmodel

    imported = Path(worldmodel.__file__).resolve().parents[1]
    if imported != checkout.resolve():
        raise ImportError(f"worldmodel was imported from {imported}, not from {checkout}")
    print(json.dumps(measure(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()

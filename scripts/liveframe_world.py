"""A backend for LiveFrame's neutral measurements (PyPI `liveframe[world]`, its own environment).

    liveframe world run scripts/liveframe_world.py:BlocksWorld --suite quick --python python3

`--python` names the interpreter of an environment with this project installed, in which LiveFrame
starts this file.
Plays the world that WORLDMODEL_WORLD names (a folder, or a name such as "blocks": the default) in
its first place where it has one, with its walls and the rule of rest, as play does. The harness's
start pictures show scenes of other worlds: of them only a number is used, which with the seed of
the case selects the noise and, outside of a place, a start picture of the world. WORLDMODEL_STEPS
sets the denoising steps (default: the world's).
"""

import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from worldmodel.camera import FRAMES_PER_LATENT, advance
from worldmodel.files import data_folder
from worldmodel.session import Session
from worldmodel.worlds.config import WORLD_YAML, WorldConfig
from worldmodel.worlds.world import World

# token -> forward, strafe, yaw, pitch as shares of the world's limits
TOKENS = {
    "W": (1, 0, 0, 0),
    "S": (-1, 0, 0, 0),
    "A": (0, -1, 0, 0),
    "D": (0, 1, 0, 0),
    "L": (0, 0, -1, 0),
    "R": (0, 0, 1, 0),
    "U": (0, 0, 0, 1),
    "N": (0, 0, 0, -1),
    "0": (0, 0, 0, 0),
}


class BlocksWorld:
    """LiveFrame's contract of a bridged adapter: actions in, a chunk of native frames out."""

    def __init__(self):
        name = os.environ.get("WORLDMODEL_WORLD", "blocks")
        folder = Path(name) if Path(name).is_dir() else data_folder("worlds") / name
        steps = os.environ.get("WORLDMODEL_STEPS")
        self._folder = folder
        self._config = WorldConfig.read(folder / WORLD_YAML)
        self._steps = int(steps) if steps else None
        self._world: World | None = None
        self._place = None
        self._session: Session | None = None

    def capabilities(self) -> dict:
        """What the harness asks before the weights are loaded."""
        config = self._config
        return {
            "name": f"worldmodel-{config.name}",
            "interaction_mode": "interactive",
            "native_fps": config.fps,
            "chunk_frames": FRAMES_PER_LATENT * config.rollout.chunk,
            "resolution": [config.height, config.width],
            "actions": sorted(TOKENS),
            "action_magnitudes": {
                "units_per_latent": config.envelope.forward,
                "yaw_degrees_per_latent": config.envelope.yaw,
            },
            "license_notice": config.licence,
        }

    def load(self) -> None:
        """Open the world and its first place."""
        self._world = World.from_pretrained(self._folder)
        names = self._world.places
        self._place = self._world.place(names[0]) if names else None

    def reset(self, image, prompt: str | None, seed: int) -> None:
        """Begin a walk at the start of the place, elsewhere at a start picture of the world."""
        number = zlib.crc32(np.ascontiguousarray(image)) + seed
        default = self._config.prompts.default
        prompt = prompt if prompt in self._world.prompts.names else default
        pictures = () if self._place else self._world.images(prompt)
        self._session = Session(
            self._world,
            prompt,
            pictures[number % len(pictures)] if pictures else None,
            seed=number,
            steps=self._steps,
            place=self._place,
        )
        self._frame = self._session.first.frames[-1]
        self._pose = np.eye(4)
        self._pitch = 0.0

    def step(self, actions: Sequence[str]) -> Iterator[np.ndarray]:
        """The frames uint8 [n, H, W, 3] of one chunk under the actions, such as "W" or "W+L"."""
        tokens = [token for action in actions for token in action.split("+")]
        poses = np.stack([self._next_pose(tokens) for _ in range(self._session.chunk)])
        if self._session.at_rest(poses):
            frames = np.repeat(self._frame[None], FRAMES_PER_LATENT * len(poses), 0)
        else:
            frames = self._session.step(poses).frames
            self._session.commit_pending()
        self._frame = frames[-1]
        yield frames

    def close(self) -> None:
        """Forget the walk."""
        self._session = None

    # -------------------- inside

    def _next_pose(self, tokens: list[str]) -> np.ndarray:
        limits = self._config.envelope
        forward, strafe, yaw, pitch = np.sum([TOKENS[token] for token in tokens], axis=0)
        limit = limits.pitch_limit
        before = self._pitch
        self._pitch = float(np.clip(before + pitch * limits.pitch, -limit, limit))
        wanted = advance(
            self._pose,
            [strafe * limits.strafe, 0.0, forward * limits.forward],
            yaw * limits.yaw,
            self._pitch - before,
            limits.style,
        )
        if not (forward or strafe or yaw or pitch):
            wanted = self._pose  # exactly: only then is it rest
        walls = self._place.walls if self._place else None
        self._pose = walls.slide(self._pose, wanted) if walls else wanted
        return self._pose

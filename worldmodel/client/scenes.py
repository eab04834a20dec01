"""Which mood, which start picture, which seed: the player's choices, and a session for each of
them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from worldmodel.cli import print_progress
from worldmodel.client.options import PlayOptions

if TYPE_CHECKING:  # torch is imported by the generator's thread, long after the window is there
    from worldmodel.recording import Recorder
    from worldmodel.session import Session
    from worldmodel.worlds.world import World


@dataclass(frozen=True)
class Scene:
    """Where a session starts. None: as the world has it."""

    prompt: str | None = None  # a stored name, or any text in a world with a text encoder
    image: str | None = None  # name of a start picture of the world, or a picture file
    seed: int = 0


def open_scenes(options: PlayOptions, tell: Callable[[str, float], None]) -> "Scenes":
    """Import torch, open the world that was asked for; `tell` hears each stage and the progress
    (0..1) at its end.
    """
    tell("Waking torch", 0.45)
    import torch

    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("medium")  # twice as fast on CPUs that compute in float32
    tell("Opening the world", 0.8)
    from worldmodel.engine.engine import EngineOptions
    from worldmodel.worlds.world import World

    engine = EngineOptions(options.memory, options.weights, options.compile, options.attention)
    world = World.from_pretrained(options.world, device=fastest_device(), engine=engine)
    if world.device.type != "cpu":
        print_progress(world.engine.describe(world.config.rollout))
    return Scenes(world, options.steps, tell)


def fastest_device() -> str:
    """ "cuda", "mps" or "cpu": the first of them that is here."""
    import torch

    return (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )


class Scenes:
    """The sessions that a world can start: moods in the order of its menu, start pictures in the
    order of its list.

    tell: hears of what takes long, as in `open_scenes`.
    """

    def __init__(
        self,
        world: "World",
        steps: int | None = None,
        tell: Callable[[str, float], None] | None = None,
    ):
        from worldmodel.camera import FRAMES_PER_LATENT

        self.world = world
        self._steps = steps
        self._tell = tell or (lambda stage, progress: None)
        self.name = world.config.name
        self.envelope = world.config.envelope
        self.fps = world.config.fps
        self.chunk = world.config.rollout.chunk
        self.camera = world.transformer.config.camera  # whether poses steer the dream
        self.frames_per_latent = FRAMES_PER_LATENT
        self.device = world.device

    @property
    def window(self) -> int:
        """Latents that a dream remembers; fewer once memory has run out."""
        return self.world.engine.tier.rollout(self.world.config.rollout, 0).window

    @property
    def moods(self) -> tuple[str, ...]:
        """Prompts to walk through: those with start pictures, or all when none has."""
        return tuple(self.world.config.images) or self.world.prompts.names

    def resolve(self, scene: Scene) -> Scene:
        """`scene` with the world's own choices filled in."""
        prompt = scene.prompt
        if prompt is None:
            prompt = self._owner(scene.image) or self.world.config.prompts.default
        pictures = self._pictures(prompt)
        return replace(
            scene, prompt=prompt, image=scene.image or (pictures[0] if pictures else None)
        )

    def _owner(self, image: str | None) -> str | None:
        """The mood that a start picture belongs to."""
        return next((mood for mood in self.moods if image in self.world.images(mood)), None)

    def _pictures(self, prompt: str) -> tuple[str, ...]:
        """Start pictures of a prompt; one in the player's own words has none."""
        return self.world.images(prompt) if prompt in self.world.prompts else ()

    def _read(self, prompts: Iterable[str]) -> None:
        """Embed what the player wrote before a session asks for it, which would be silent."""
        for prompt in prompts:
            if prompt not in self.world.prompt_encoder:
                self.world.prompt_encoder.embed(prompt, lambda stage: self._tell(stage, 0.98))
                self._tell("Dreaming the first picture", 0.98)

    def open(self, scene: Scene) -> tuple["Session", Scene]:
        """A session at the start of `scene`, and the scene with nothing left open."""
        from worldmodel.session import Session

        scene = self.resolve(scene)
        self._read([scene.prompt])
        return Session(
            self.world, prompt=scene.prompt, image=scene.image, seed=scene.seed, steps=self._steps
        ), scene

    def record(self, folder: Path, session: "Session") -> "Recorder":
        """A recording of `session` in the new folder `folder`."""
        from worldmodel.recording import Recorder

        return Recorder(folder, session)

    def replay(self, folder: Path) -> tuple[Iterator, Scene]:
        """Dream a recording again: (FrameChunk, c2w [F, 4, 4]) chunk by chunk, and the scene it was
        made in.
        """
        from worldmodel.recording import IMAGE, read_log, replay

        log = read_log(folder)
        if (
            log.header["fingerprint"] in self.world.fingerprints
        ):  # `replay` has a sentence for another world
            self._read(log.prompts)
        image = str(folder / IMAGE) if log.header["image"] else None
        return _with_poses(replay(folder, self.world), log.c2w), Scene(
            log.header["prompt"], image, log.header["seed"]
        )

    def next_mood(self, scene: Scene) -> Scene:
        """The mood after this one, at its first start picture."""
        moods = self.moods
        following = (
            moods[(moods.index(scene.prompt) + 1) % len(moods)]
            if scene.prompt in moods
            else moods[0]
        )
        return self.resolve(Scene(following, None, scene.seed))

    def new_town(self, scene: Scene) -> Scene:
        """Another place of the same mood: the next start picture and the next seed."""
        pictures = self._pictures(scene.prompt)
        after = pictures.index(scene.image) + 1 if scene.image in pictures else 0
        image = pictures[after % len(pictures)] if pictures else None
        return Scene(scene.prompt, image, scene.seed + 1)


def _with_poses(chunks: Iterator, c2w: np.ndarray) -> Iterator:
    done = 0
    for chunk in chunks:
        yield chunk, c2w[done : done + chunk.latents]
        done += chunk.latents

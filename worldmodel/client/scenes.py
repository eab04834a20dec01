"""The player's choices (prompt, start picture, seed) and a session for each of them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from worldmodel.cli import print_progress
from worldmodel.client.options import PlayOptions

if TYPE_CHECKING:  # the generator thread imports torch, after the window is open
    from worldmodel.recording import Recorder
    from worldmodel.session import Session
    from worldmodel.walkable import Walls
    from worldmodel.worlds.place import Place
    from worldmodel.worlds.world import World

NO_MAP = "The place {} has no map of its walls: nothing stops the camera"


@dataclass(frozen=True)
class Scene:
    """Where a session starts. None means the place's or the world's default."""

    prompt: str | None = None  # a stored name, or any text in a world with a text encoder
    image: str | None = None  # name of a start picture of the world, or a picture file
    seed: int = 0
    place: str | None = None  # name of a place that the world remembers; None = imagined


def open_scenes(options: PlayOptions, tell: Callable[[str, float], None]) -> "Scenes":
    """Import torch and open the world that was asked for.

    tell: called with each stage and the progress (0..1) at its end. Raises UserError for a world
    that cannot be opened.
    """
    tell("Loading torch", 0.45)
    import torch

    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("medium")  # twice as fast on CPUs that compute in float32
    tell("Opening the world", 0.8)
    from worldmodel.engine.options import EngineOptions
    from worldmodel.worlds.world import World

    engine = EngineOptions(options.memory, options.weights, options.compile, options.attention)
    dtype = None
    if options.replay:
        from worldmodel.recording import recorded_engine

        dtype, engine = recorded_engine(options.replay, engine)
    world = World.from_pretrained(options.world, fastest_device(), dtype, engine)
    recall = {"recall": options.recall, "recall_memory": options.recall_memory}
    world = world.with_recall(recall)
    if world.device.type != "cpu":
        print_progress(world.engine.describe(world.config.rollout, world.history))
    return Scenes(world, options.steps, tell, options.rest, options.walls)


def fastest_device() -> str:
    """Return the first of "cuda", "mps" and "cpu" that is available."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class Scenes:
    """The sessions that a world can start. Prompts and start pictures keep the order of world.yaml.

    steps: denoising steps a chunk; None = the world's. tell: called before what takes long, as in
    `open_scenes`. rest: whether sessions follow the world's rule of rest. with_walls: whether the
    walls of places stop the camera.
    """

    def __init__(
        self,
        world: "World",
        steps: int | None = None,
        tell: Callable[[str, float], None] | None = None,
        rest: bool = True,
        with_walls: bool = True,
    ):
        from worldmodel.camera import FRAMES_PER_LATENT

        self.world = world
        self._steps = steps
        self._rest = rest
        self._with_walls = with_walls
        self._unmapped: set[str] = set()  # places whose lack of walls was reported
        self._home = world.config.place or next(iter(world.places), None)
        self._tell = tell or (lambda stage, progress: None)
        self.name = world.config.name
        self.labels = world.config.labels
        self.envelope = world.config.envelope
        self.fps = world.config.fps
        self.chunk = world.config.rollout.chunk
        self.camera = world.transformer.config.camera  # whether poses have an effect
        self.frames_per_latent = FRAMES_PER_LATENT
        self.device = world.device

    @property
    def window(self) -> int:
        """Latents in the window of the cache; fewer once the device's memory has run out."""
        return self.world.engine.tier.rollout(self.world.config.rollout, 0).window

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts to walk through: those with start pictures, or all if none has one."""
        return tuple(self.world.config.images) or self.world.prompts.names

    def resolve(self, scene: Scene) -> Scene:
        """Return `scene` with the defaults of its place or the world filled in."""
        place = self._place(scene)
        prompt = scene.prompt or (place and place.prompt)
        if not prompt:
            prompt = self._owner(scene.image) or self.world.config.prompts.default
        pictures = () if place else self._pictures(prompt)
        return replace(
            scene, prompt=prompt, image=scene.image or (pictures[0] if pictures else None)
        )

    def _place(self, scene: Scene) -> "Place | None":
        return self.world.place(scene.place) if scene.place else None

    def walls(self, scene: Scene, notify: Callable[[str], object]) -> "Walls | None":
        """Return the walls of `scene`; None = nothing stops the camera.

        notify: receives one sentence, once, for a place without a walkable map.
        """
        place = self._place(scene)
        if place is None or not self._with_walls:
            return None
        if place.walkable is None and place.name not in self._unmapped:
            self._unmapped.add(place.name)
            notify(NO_MAP.format(place.name))
        return place.walls

    def knowledge(self, scene: Scene) -> str:
        """Return what the screen calls `scene`: "remembered" or "imagined"; nothing in worlds
        without places.
        """
        if scene.place:
            return "remembered"
        return "imagined" if self.world.places else ""

    def _owner(self, image: str | None) -> str | None:
        """Return the prompt that a start picture belongs to."""
        return next((name for name in self.prompts if image in self.world.images(name)), None)

    def _pictures(self, prompt: str) -> tuple[str, ...]:
        """Return the start pictures of a prompt; one in the player's own words has none."""
        return self.world.images(prompt) if prompt in self.world.prompts else ()

    def _embed(self, prompts: Iterable[str]) -> None:
        """Embed the player's own prompts now, with progress: a session would do it silently."""
        for prompt in prompts:
            if prompt not in self.world.prompt_encoder:
                self.world.prompt_encoder.embed(prompt, lambda stage: self._tell(stage, 0.98))
                self._tell("Dreaming the first picture", 0.98)

    def open(self, scene: Scene) -> tuple["Session", Scene]:
        """Return a session at the start of `scene`, and the resolved scene."""
        from worldmodel.session import Session

        scene = self.resolve(scene)
        self._home = scene.place or self._home
        self._embed([scene.prompt])
        session = Session(
            self.world,
            prompt=scene.prompt,
            image=scene.image,
            seed=scene.seed,
            steps=self._steps,
            rest=self._rest,
            place=self._place(scene),
        )
        return session, scene

    def record(self, folder: Path, session: "Session") -> "Recorder":
        """Return a recorder of `session` in the new folder `folder`."""
        from worldmodel.recording import Recorder

        return Recorder(folder, session)

    def replay(self, folder: Path) -> tuple[Iterator, Scene]:
        """Play a recording again: return an iterator of (FrameChunk, c2w [F, 4, 4]), and the scene
        that it was made in.
        """
        from worldmodel.recording import replay
        from worldmodel.session_log import IMAGE, read_log

        log = read_log(folder)
        if (
            log.header["fingerprint"] in self.world.fingerprints
        ):  # `replay` has a sentence for another world
            self._embed(log.prompts)
        image = str(folder / IMAGE) if log.header["image"] else None
        return _with_poses(replay(folder, self.world), log.c2w), Scene(
            log.header["prompt"], image, log.header["seed"], log.header.get("place")
        )

    def next_prompt(self, scene: Scene) -> Scene:
        """Return the prompt after this one, at its first start picture: imagined, as a place has
        its own prompt.
        """
        prompts = self.prompts
        number = prompts.index(scene.prompt) + 1 if scene.prompt in prompts else 0
        return self.resolve(Scene(prompts[number % len(prompts)], None, scene.seed))

    def new_seed(self, scene: Scene) -> Scene:
        """Return another scene of the same prompt: the next start picture and the next seed."""
        pictures = self._pictures(scene.prompt)
        number = pictures.index(scene.image) + 1 if scene.image in pictures else scene.seed
        image = pictures[number % len(pictures)] if pictures else None
        return Scene(scene.prompt, image, scene.seed + 1)

    def elsewhere(self, scene: Scene) -> tuple[Scene, str]:
        """Return where the key for somewhere else leads from `scene`, and the receipt for it: from
        a place to somewhere imagined, from there to the last place, or to the world's first; in
        worlds without places to the next imagined scene.

        Raises UserError for a place that cannot be opened.
        """
        if scene.place or not self._home:
            scene = self.new_seed(scene)
            return scene, receipt(self.labels.new_seed, scene.seed)
        place = self.world.place(self._home)
        self.world.conditions(place)
        home = self.resolve(Scene(seed=scene.seed, place=place.name))
        return home, f"Back in {place.title}"


def receipt(label: str, value: object) -> str:
    """Return the notice that confirms a command."""
    return f"{label[:1].upper()}{label[1:]}: {value}"


def _with_poses(chunks: Iterator, c2w: np.ndarray) -> Iterator:
    """Pair each chunk with its poses."""
    done = 0
    for chunk in chunks:
        yield chunk, c2w[done : done + chunk.latents]
        done += chunk.latents

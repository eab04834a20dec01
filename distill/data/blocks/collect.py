"""Footage of the towns and the island of blocks, rendered with exact camera poses."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from distill.data.blocks.island import PALETTES, Island
from distill.data.blocks.renderer import render, render_depth
from distill.data.blocks.scenes import Scene
from distill.data.blocks.town import MOODS, Town
from distill.data.blocks.walker import walk
from distill.data.clips import frames_of, write_clip
from distill.data.collect import SPLITS, CollectConfig, clip_name, make_missing
from worldmodel.camera import FRAMES_PER_LATENT
from worldmodel.errors import UserError

FPS = 16
LICENCE = "Apache-2.0"
SCENES = {"town": tuple(MOODS), "island": tuple(PALETTES)}  # and their moods
MAX_ATTEMPTS = 400  # of a walk that keeps out of what is not filmed


@dataclass(frozen=True)
class BlocksConfig(CollectConfig):
    """What to render. Train and held-out clips never share a town; on the island they share the
    place, not the walks.
    """

    source: ClassVar[str] = "blocks"

    moods: tuple[str, ...] = tuple(MOODS)
    samples: int = 2  # rays along each side of a pixel
    scene: str = "town"  # a town per clip, or the one island
    depth: bool = False  # write the depth at the latents' poses too
    unfilmed: bool = False  # keep the marked disc and views of the island out of the train split

    def __post_init__(self):
        super().__post_init__()
        self._check_range("samples", 1)
        if self.scene not in SCENES:
            raise UserError(f"expected --scene {' or '.join(SCENES)}, got {self.scene!r}")
        if self.unfilmed and (self.scene, self.split) != ("island", "train"):
            raise UserError(
                "expected --unfilmed with --scene island and --split train, got scene "
                f"{self.scene}, split {self.split}"
            )


def collect_clips(config: BlocksConfig) -> None:
    """Render the missing clips; see `make_missing`."""
    make_missing(config, collect_clip, _identity)


def collect_clip(config: BlocksConfig, index: int) -> Path:
    """Render and write clip number `index`; the same numbers give the same clip on every
    machine.
    """
    scene = scene_of_clip(config, index)
    poses = poses_of_clip(config, index)
    lens = config.intrinsics
    frames = render(scene, poses, lens, config.height, config.width, config.samples).numpy()
    depth = None
    if config.depth:
        latents = poses[::FRAMES_PER_LATENT]
        depth = render_depth(scene, latents, lens, config.height, config.width)
    return write_clip(
        config.output,
        clip_name(config, index),
        frames,
        poses[::FRAMES_PER_LATENT],
        lens,
        caption=scene.mood,
        fps=FPS,
        licence=LICENCE,
        depths=depth,
        **_identity(config, index),
    )


def scene_of_clip(config: BlocksConfig, index: int) -> Scene:
    """The town or the island of clip `index`."""
    if config.scene == "island":
        return Island(config.moods[index % len(config.moods)])
    return town_of(config, index)


def poses_of_clip(config: BlocksConfig, index: int) -> np.ndarray:
    """Poses of the video frames of clip `index`, [T, 4, 4]. On the island the starts cover the
    ground and the headings evenly; with `unfilmed` a walk that enters what is not filmed is drawn
    again.
    """
    scene = scene_of_clip(config, index)
    frames = frames_of(config.latents)
    seed = [config.seed, SPLITS.index(config.split), index]
    if not isinstance(scene, Island):
        return walk(scene, frames, seed)
    number, mood = divmod(index, len(config.moods))
    shift = np.random.default_rng([*seed[:2], mood]).random(3)
    start = scene.start(number, shift, config.unfilmed)
    for attempt in range(MAX_ATTEMPTS):
        poses = walk(scene, frames, [*seed, attempt], start=start)
        if not (config.unfilmed and scene.unfilmed(poses).any()):
            return poses
    raise UserError(
        f"expected a walk of {config.latents} latents outside of what --unfilmed omits, found none "
        f"in {MAX_ATTEMPTS} attempts; collect shorter clips"
    )


def town_of(config: BlocksConfig, index: int) -> Town:
    """The town of clip `index`: each clip has its own; train towns have even seeds, held-out towns
    odd ones.
    """
    seed = 2 * (config.seed * 1_000_003 + index) + SPLITS.index(config.split)
    return Town(config.moods[index % len(config.moods)], seed)


def parse_moods(text: str, scene: str = "town") -> tuple[str, ...]:
    """Moods of a comma-separated list, or of "all" that the scene has. Raises UserError for an
    unknown mood or none.
    """
    known = SCENES[scene]
    names = known if text == "all" else tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in known:
            raise UserError(f"expected --moods all or some of {', '.join(known)}, got {name!r}")
    if not names:
        raise UserError("expected at least one mood, got none; omit --moods for all of them")
    return names


def _identity(config: BlocksConfig, index: int) -> dict:
    identity = {
        "source": scene_of_clip(config, index).source,
        "latents": config.latents,
        "height": config.height,
        "width": config.width,
        "samples": config.samples,
    }
    if config.scene == "island":
        identity["unfilmed"] = config.unfilmed
    if config.depth:
        identity["depth"] = True
    return identity

"""Footage of the town of blocks, rendered with exact camera poses."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from distill.data.blocks.renderer import render
from distill.data.blocks.town import MOODS, Town
from distill.data.blocks.walker import walk
from distill.data.clips import frames_of, write_clip
from distill.data.collect import SPLITS, CollectConfig, clip_name, make_missing
from worldmodel.camera import FRAMES_PER_LATENT
from worldmodel.errors import UserError

FPS = 16
LICENCE = "Apache-2.0"


@dataclass(frozen=True)
class BlocksConfig(CollectConfig):
    """What to render. Train and held-out clips never share a town."""

    source: ClassVar[str] = "blocks"

    moods: tuple[str, ...] = tuple(MOODS)
    samples: int = 2  # rays along each side of a pixel

    def __post_init__(self):
        super().__post_init__()
        self._check_range("samples", 1)


def collect_clips(config: BlocksConfig) -> None:
    """Render the missing clips; see `make_missing`."""
    make_missing(config, collect_clip, _identity)


def collect_clip(config: BlocksConfig, index: int) -> Path:
    """Render and write clip number `index`; the same numbers give the same clip on every
    machine.
    """
    town = town_of(config, index)
    poses = walk(town, frames_of(config.latents), [config.seed, SPLITS.index(config.split), index])
    frames = render(
        town, poses, config.intrinsics, config.height, config.width, config.samples
    ).numpy()
    return write_clip(
        config.output,
        clip_name(config, index),
        frames,
        poses[::FRAMES_PER_LATENT],
        config.intrinsics,
        caption=town.mood,
        fps=FPS,
        licence=LICENCE,
        **_identity(config, index),
    )


def town_of(config: BlocksConfig, index: int) -> Town:
    """The town of clip `index`: each clip has its own; train towns have even seeds, held-out towns
    odd ones.
    """
    seed = 2 * (config.seed * 1_000_003 + index) + SPLITS.index(config.split)
    return Town(config.moods[index % len(config.moods)], seed)


def parse_moods(text: str) -> tuple[str, ...]:
    """Moods of a comma-separated list, or of "all". Raises UserError for an unknown mood or
    none.
    """
    names = tuple(MOODS) if text == "all" else tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in MOODS:
            raise UserError(f"expected --moods all or some of {', '.join(MOODS)}, got {name!r}")
    if not names:
        raise UserError("expected at least one mood, got none; omit --moods for all of them")
    return names


def _identity(config: BlocksConfig, index: int) -> dict:
    return {
        "source": town_of(config, index).source,
        "latents": config.latents,
        "height": config.height,
        "width": config.width,
        "samples": config.samples,
    }

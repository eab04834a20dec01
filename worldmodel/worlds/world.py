"""A world: a folder with two networks, prompts, start images and `world.yaml`, opened and checked
as one thing.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from worldmodel.camera import FRAMES_PER_LATENT
from worldmodel.device import fast_dtype, free_memory, open_device
from worldmodel.engine.engine import (
    HISTORY,
    Demand,
    Engine,
    demand,
    select_tiers,
    start_engine,
    tiers_from,
)
from worldmodel.engine.options import EngineOptions
from worldmodel.engine.quantize import quantize
from worldmodel.errors import UserError
from worldmodel.files import data_folder, replacing_folder
from worldmodel.images import fit_picture, read_image, write_png
from worldmodel.models.prompts import PromptBook
from worldmodel.models.text_encoder import PromptEncoder
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.models.wan_autoencoder import Autoencoder
from worldmodel.reprojection import ConditionStream, RememberedViews
from worldmodel.rollout import RECALL, RolloutConfig, with_steps
from worldmodel.worlds.config import WORLD_YAML, WorldConfig
from worldmodel.worlds.fingerprint import (
    fingerprint,
    first_edition_fingerprint,
    place_fingerprint,
)
from worldmodel.worlds.place import PLACE, PLACES, Place
from worldmodel.worlds.place_views import read_views
from worldmodel.worlds.weights import load_network, open_autoencoder

# numbers a pixel that a decoder has in hand at its widest (Wan2.1's: 4 frames of 96 channels, four
# times)
_DECODER_WORK = 1500
SHARD_SIZE = "16MB"  # of a small world, whose files live in a repository
_EVERYTHING = (
    WORLD_YAML,
    "transformer/config.json",
    "autoencoder/config.json",
    "prompts.safetensors",
)


@dataclass(frozen=True)
class World:
    """An opened bundle. The networks are in evaluation mode, without gradients, on one device and
    of one type.
    """

    folder: Path
    config: WorldConfig
    transformer: CausalWanTransformer
    autoencoder: Autoencoder
    prompts: PromptBook
    device: torch.device
    dtype: torch.dtype
    engine: Engine = field(default_factory=Engine)  # its tier may go down while the world is played
    _views: dict[str, RememberedViews] = field(default_factory=dict)  # of places, when asked for

    @classmethod
    def from_pretrained(
        cls,
        folder,
        device="cpu",
        dtype: torch.dtype | None = None,
        engine: EngineOptions = EngineOptions(),
    ) -> "World":
        """Open a bundle.

        folder: the bundle, or the name of one that comes with this program, such as "blocks".
        device: where to compute. dtype: type of the networks; None = `fast_dtype(device)`. engine:
        see `worldmodel/engine/engine.py`.
        Raises UserError with one sentence for anything that is absent, cut off, foreign or does not
        fit together.
        """
        own = data_folder("worlds") / folder
        folder = Path(folder)
        if not folder.is_dir() and own.is_dir():
            folder = own
        config = _check_bundle(folder)
        device = open_device(device)
        dtype = fast_dtype(device) if dtype is None else dtype
        transformer = load_network(
            CausalWanTransformer, folder / "transformer", dtype=dtype
        ).requires_grad_(False)
        autoencoder = open_autoencoder(folder / "autoencoder", dtype=dtype).requires_grad_(False)
        world = cls(
            folder,
            config,
            transformer,
            autoencoder,
            PromptBook.load(folder / "prompts.safetensors"),
            device,
            dtype,
        )
        check_fit(world)
        return world.fitted(engine)

    def fitted(self, options: EngineOptions) -> "World":
        """The same world, its networks stored and running as `options` and the device allow;
        UserError when they cannot.
        """
        tiers = tiers_from(options)
        free = free_memory(self.device)
        if options.memory == "auto" and free is not None:
            parameters = self.transformer.parameters()
            # weights that are on the device already
            free += sum(p.nbytes for p in parameters if p.device.type == self.device.type)
            tiers = select_tiers(tiers, self.demand(), self.config.rollout, self.history, free)
        quantize(self.transformer, tiers[0].weights, self.device)
        transformer = self.transformer.to(self.device)
        autoencoder = self.autoencoder.to(self.device)
        engine = start_engine(options, tiers, transformer, self.device)
        return replace(self, transformer=transformer, autoencoder=autoencoder, engine=engine)

    @property
    def history(self) -> int:
        """Latents to rewind that a session keeps unless it asks for another number."""
        return self.config.rollout.history or HISTORY

    def rollout(self, steps: int | None = None, history: int | None = None) -> RolloutConfig:
        """How a session is generated, as far as the device's memory goes.

        steps: denoising steps of later chunks, None = the world's. history: latents to rewind, None
        = `history`. Raises UserError for wrong `steps`.
        """
        config = self.config.rollout if steps is None else with_steps(self.config.rollout, steps)
        return self.engine.tier.rollout(config, self.history if history is None else history)

    def with_recall(self, values: Mapping) -> "World":
        """The same world with those options of `rollout.RECALL` that `values` has; None = as it is.

        Raises UserError for values that do not fit the world's window.
        """
        given = {name: values[name] for name in RECALL if values.get(name) is not None}
        rollout = replace(self.config.rollout, **given)
        return replace(self, config=replace(self.config, rollout=rollout))

    def demand(self) -> Demand:
        """The memory that a session of this world needs; to be asked before the networks are on
        their device.
        """
        rows, columns = self.latent_size
        weights = sum(p.numel() * p.dtype.itemsize for p in self.autoencoder.parameters())
        pixels = rows * columns * self.autoencoder.spatial_factor**2
        with torch.no_grad():
            decoder = self.autoencoder.streaming_decoder()
            decoder.step(torch.zeros(1, self.autoencoder.latent_channels, 2, 2, 2))
        rewound = (
            sum(m.nbytes for m in decoder.state().memories if m is not None) * rows * columns // 4
        )
        work = pixels * _DECODER_WORK * self.dtype.itemsize
        rest = weights + 2 * rewound + work
        return demand(self.transformer, rows, columns, self.config.rollout.chunk, rest, rewound)

    @cached_property
    def prompt_encoder(self) -> PromptEncoder:
        """Embeds stored prompts and, where world.yaml names a text encoder, any text."""
        return PromptEncoder(
            self.prompts, self.config.text_encoder, self.folder, self.device, self.dtype
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what decides the pixels, see `worlds/fingerprint.py`."""
        return fingerprint(self.folder, self.config)

    @cached_property
    def fingerprints(self) -> tuple[str, ...]:
        """All fingerprints that this world answers to: its own, then those of older versions."""
        first = first_edition_fingerprint(self.folder)
        earlier = self.config.earlier_fingerprints + ((first,) if first else ())
        return self.fingerprint, *earlier

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns of a latent frame."""
        factor = self.autoencoder.spatial_factor
        return self.config.height // factor, self.config.width // factor

    def images(self, prompt: str) -> tuple[str, ...]:
        """Names of the start images of a prompt (none for a prompt without)."""
        self.prompts[prompt]
        return tuple(Path(file).stem for file in self.config.images.get(prompt, ()))

    def image(self, name: str) -> np.ndarray:
        """Start image `name` (with or without its file extension) -> uint8 [H,W,3] RGB."""
        files = [file for group in self.config.images.values() for file in group]
        for file in files:
            if name in (file, Path(file).stem):
                return read_image(self.folder / "images" / file)
        near = difflib.get_close_matches(name, [Path(file).stem for file in files], 1, 0)
        hint = f"did you mean {near[0]!r}?" if near else "it has no start images."
        raise UserError(f"World {self.config.name!r} has no start image {name!r}; {hint}")

    def picture(self, image) -> np.ndarray:
        """A start image's name, a picture file or uint8 [h,w,3] -> uint8 [H,W,3] of the world's
        size.
        """
        if isinstance(image, (str, Path)):
            names = {Path(file).stem for group in self.config.images.values() for file in group}
            known = Path(image).name == str(image) and Path(image).stem in names
            is_file = not known and Path(image).is_file()
            image = read_image(image) if is_file else self.image(str(image))
        return fit_picture(image, self.config.height, self.config.width)

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the places that the bundle remembers."""
        return tuple(sorted(path.parent.name for path in self.folder.glob(f"{PLACES}/*/{PLACE}")))

    def place(self, name: str) -> Place:
        """The place `name`. Raises UserError where there is none, or it is damaged."""
        if name not in self.places:
            known = ", ".join(self.places) or "none"
            raise UserError(
                f"World {self.config.name!r} has no place {name!r}, its places: {known}; choose "
                "one of them."
            )
        return replace(Place.read(self.folder / PLACES / name), name=name)

    def place_fingerprint(self, place: Place) -> str:
        """Hash of what decides the pixels in `place`, see `worlds/fingerprint.py`."""
        return place_fingerprint(self.folder / PLACES / place.name, place, self.config)

    def views(self, name: str) -> RememberedViews:
        """What is remembered of the place `name`; read once."""
        if name not in self._views:
            self._views[name] = read_views(self.folder / PLACES / name)
        return self._views[name]

    def conditions(self, place: Place | None) -> ConditionStream | None:
        """Conditions along a walk in `place`, from its first latent on; None without a place.

        Raises UserError where the transformer cannot read them.
        """
        if place is None:
            return None
        expected = self.autoencoder.latent_channels + FRAMES_PER_LATENT
        found = self.transformer.condition_channels
        if found != expected:
            raise UserError(
                f"World {self.config.name!r} has the place {place.name!r}, but its transformer "
                f"reads {found} condition channels, {expected} are needed; export it again after "
                "the stage places."
            )
        return ConditionStream(self.views(place.name), self.autoencoder, self.config.views)


# -------------------- reading


def _check_bundle(folder: Path) -> WorldConfig:
    """Everything that can be known without loading a weight."""
    if not folder.is_dir():
        worlds = sorted(path.parent.name for path in folder.parent.glob("*/world.yaml"))
        raise UserError(
            f"There is no world at {folder}; "
            f"{'there are ' + ', '.join(worlds) if worlds else 'none is'} there."
        )
    absent = [name for name in _EVERYTHING if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder} is not a complete world: {absent[0]} is missing.")
    config = WorldConfig.read(folder / WORLD_YAML)
    for name in (file for group in config.images.values() for file in group):
        if not (folder / "images" / name).is_file():
            raise UserError(f"{folder} is not a complete world: images/{name} is missing.")
    if config.place and not (folder / PLACES / config.place / PLACE).is_file():
        raise UserError(
            f"{folder} is not a complete world: it begins in the place {config.place!r}, but "
            f"{PLACES}/{config.place}/{PLACE} is missing."
        )
    return config


def check_fit(world: World) -> None:
    """UserError when transformer, autoencoder, prompts and picture size do not belong together."""
    config = world.config
    latent = world.autoencoder.latent_channels
    factor = world.autoencoder.spatial_factor
    patch = world.transformer.config.patch_size
    faults = {
        (
            f"prompts have {world.prompts.shape[1]} features, the transformer reads "
            f"{world.transformer.config.text_dim}"
        ): (world.prompts.shape[1] != world.transformer.config.text_dim),
        (
            f"the autoencoder makes {latent} channels, the transformer reads "
            f"{world.transformer.config.out_channels}"
        ): (latent != world.transformer.config.out_channels),
        (
            f"{config.height}x{config.width} pixels do not divide into tokens of "
            f"{factor * patch[1]}x{factor * patch[2]}"
        ): (config.height % (factor * patch[1]) != 0 or config.width % (factor * patch[2]) != 0),
    }
    for sentence, wrong in faults.items():
        if wrong:
            raise UserError(f"{world.folder} does not fit together: {sentence}; export it again.")
    for prompt in [config.prompts.default, *config.images]:
        try:
            world.prompts[prompt]
        except UserError as error:
            raise UserError(f"{world.folder / WORLD_YAML}: {error}") from None


# -------------------- writing


def save_world(
    folder,
    config: WorldConfig,
    transformer: CausalWanTransformer,
    autoencoder: Autoencoder,
    prompts: PromptBook,
    images: Mapping[str, list[np.ndarray]],
    readme: str = "",
    shard_size: str = SHARD_SIZE,
) -> None:
    """Writes a bundle that `World.from_pretrained` opens; an older one of that name is replaced
    only by a complete one.

    images: prompt -> uint8 [H,W,3] start images, stored as images/<prompt>-<n>.png (they replace
    `config.images`); of a prompt that is not a file name, its letters and digits.
    readme: README.md of the bundle. The networks are stored in the type they have, in files of at
    most `shard_size`.
    """
    folder = Path(folder)
    stems = _file_stems(images)
    names = {
        prompt: tuple(f"{stems[prompt]}-{n}.png" for n in range(len(group)))
        for prompt, group in images.items()
    }
    config = replace(config, images=names)
    for prompt in [config.prompts.default, *images]:
        prompts[prompt]
    with replacing_folder(folder) as temporary:
        (temporary / "images").mkdir()
        for name, network in (("transformer", transformer), ("autoencoder", autoencoder)):
            network.save_pretrained(
                temporary / name, safe_serialization=True, max_shard_size=shard_size
            )
        prompts.save(temporary / "prompts.safetensors")
        for prompt, group in images.items():
            for file, picture in zip(names[prompt], group, strict=True):
                _check_picture(file, picture, config)
                write_png(temporary / "images" / file, picture)
        if readme:
            (temporary / "README.md").write_text(readme, encoding="utf-8")
        (temporary / WORLD_YAML).write_text(config.text(), encoding="utf-8")
        _check_bundle(temporary)


def _file_stems(prompts: Iterable[str]) -> dict[str, str]:
    """A short file name for every prompt, each another."""
    stems: dict[str, str] = {}
    for prompt in prompts:
        stem = re.sub(r"[^\w-]+", "-", prompt)[:40].strip("-") or "prompt"
        stems[prompt] = f"{stem}-{len(stems)}" if stem in stems.values() else stem
    return stems


def _check_picture(name: str, picture: np.ndarray, config: WorldConfig) -> None:
    if picture.dtype != np.uint8 or picture.shape != (config.height, config.width, 3):
        raise ValueError(
            f"Start image {name} must be uint8 [{config.height},{config.width},3], got "
            f"{picture.dtype} {list(picture.shape)}."
        )

"""The worlds that this program knows by name: its own, and those of published weights."""

import logging
from collections.abc import Callable
from pathlib import Path

from worldmodel.errors import UserError
from worldmodel.files import data_folder, world_cache

TINY = "-tiny"  # suffix of a published world's name: with the tiny autoencoder, for small GPUs

logger = logging.getLogger(__name__)


def published_worlds() -> Path:
    """The folder of NAME.yaml, the worlds that are made of published weights."""
    return data_folder("configs") / "worlds"


def find_world(name: str, progress: Callable[[str], object] = logger.info) -> Path:
    """The name of a world, or a bundle's folder -> the bundle's folder.

    A published world is fetched and converted on first use, into the user's cache; with `TINY`
    after its name it is another one, with the tiny autoencoder. progress: is called with a sentence
    before each step that takes long. Raises UserError when there is no such world, or it cannot be
    made.
    """
    worlds = data_folder("worlds")
    recipes = published_worlds()
    for folder in (worlds / name, Path(name)):
        if (folder / "world.yaml").is_file():
            return folder
    for stem in (name, name.removesuffix(TINY)):
        recipe = recipes / f"{stem}.yaml"
        if recipe.is_file() and Path(stem).name == stem:
            return _published_world(name, recipe, name != stem, progress)
    known = sorted(path.parent.name for path in worlds.glob("*/world.yaml"))
    listed = (
        f"the worlds here are {', '.join(known)}" if known else f"there is none in {worlds} yet"
    )
    published = sorted(path.stem for path in recipes.glob("*.yaml"))
    if published:
        listed += (
            f"; those of published weights, fetched on first use, are {', '.join(published)} "
            f"(NAME{TINY}: for less memory)"
        )
    raise UserError(f"There is no world {name!r} (a name or a folder with a world.yaml); {listed}.")


def _published_world(
    name: str, recipe: Path, tiny: bool, progress: Callable[[str], object]
) -> Path:
    """The world in the user's cache; it is made on first use."""
    folder = world_cache(name)
    if (folder / "world.yaml").is_file():
        return folder
    progress(f"{name} is played for the first time: its weights are fetched and made into {folder}")
    # torch is imported only when there is something to convert
    from worldmodel.worlds.convert import Conversion, PublishedWorld, convert

    try:
        published = PublishedWorld.read(recipe)
        asked = Conversion(autoencoder=published.tiny_autoencoder if tiny else "")
        convert(published, folder, asked, progress)
    except UserError as error:
        raise UserError(
            f"The world {name} could not be made: {error} With weights of your own: "
            f"worldmodel convert SOURCE --world {recipe} --output "
            f"{folder}{' --autoencoder SOURCE' if tiny else ''}"
        ) from None
    return folder

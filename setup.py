"""The build: worlds and configs of the repository become data of the package `worldmodel`.

They stay at assets/worlds and configs in a checkout; `worldmodel.files.data_folder` finds either.
Everything else about the build is in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TRAINING_ALONE = "stages"  # of a world: weights that training starts from, and nothing plays


class BuildWithData(build_py):
    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # modules that are gone since
        super().run()
        if self.editable_mode:
            return
        data = Path(self.build_lib) / "worldmodel" / "data"
        shutil.copytree(ROOT / "configs", data / "configs")
        for description in (ROOT / "assets" / "worlds").glob("[!.]*/world.yaml"):
            world = description.parent
            shutil.copytree(
                world, data / "worlds" / world.name, ignore=shutil.ignore_patterns(TRAINING_ALONE)
            )


setup(cmdclass={"build_py": BuildWithData})

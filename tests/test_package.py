"""The package: what it exports, and a wheel that plays away from the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import av
import pytest

import worldmodel
from worldmodel.__main__ import COMMANDS, main
from worldmodel.files import data_folder, find_config, recordings_folder, user_cache
from worldmodel.recording import Recorder, read_log
from worldmodel.session import Session
from worldmodel.worlds.world import World

ROOT = Path(__file__).parent.parent


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package folder as the build leaves it, with one world and one recipe."""
    package = tmp_path / "site-packages" / "worldmodel"
    (package / "data" / "worlds" / "blocks").mkdir(parents=True)
    (package / "data" / "configs" / "blocks").mkdir(parents=True)
    (package / "data" / "configs" / "blocks" / "cpu.yaml").write_text("run: {}")
    monkeypatch.setattr("worldmodel.files._PACKAGE", package)
    monkeypatch.chdir(tmp_path)
    return package


def test_what_the_package_exports():
    assert (worldmodel.World, worldmodel.Session, worldmodel.Recorder) == (World, Session, Recorder)
    assert set(worldmodel.__all__) <= set(dir(worldmodel))
    with pytest.raises(AttributeError, match="no attribute 'Word'"):
        worldmodel.Word  # noqa: B018


def test_the_six_lines_of_the_readme_run(tmp_path, monkeypatch):
    section = (ROOT / "README.md").read_text().split("\n## Use from Python\n")[1]
    code = section.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) == 6
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    log = read_log("recordings/scripted")
    assert len(log.lines) == 7 and log.closed and log.header["world"] == "blocks"


def test_the_folders_of_a_checkout():
    assert (data_folder("worlds") / "blocks" / "world.yaml").is_file()
    assert data_folder("configs") == ROOT / "configs"
    assert recordings_folder() == Path("recordings")


def test_the_folders_of_an_installed_package(installed, tmp_path, monkeypatch):
    assert data_folder("worlds") == installed / "data" / "worlds"
    assert recordings_folder().is_absolute() and installed not in recordings_folder().parents
    assert user_cache().name == "worldmodel"
    packaged = installed / "data" / "configs" / "blocks" / "cpu.yaml"
    assert find_config("configs/blocks/cpu.yaml") == packaged
    assert find_config("configs/blocks/none.yaml") == Path("configs/blocks/none.yaml")
    assert find_config("other/blocks/cpu.yaml") == Path("other/blocks/cpu.yaml")
    (tmp_path / "configs" / "blocks").mkdir(parents=True)
    own = tmp_path / "configs" / "blocks" / "cpu.yaml"
    own.write_text("run: {}")
    assert find_config("configs/blocks/cpu.yaml").resolve() == own


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and f"usage: worldmodel {command}" in capsys.readouterr().out


def test_verify(tiny_bundle, tmp_path, capsys, play):
    take = tmp_path / "take"
    walk = ["--headless", "--trajectory", "w*2", "--output", str(tmp_path / "walk.mp4")]
    options = ["--world", str(tiny_bundle), "--threads", "1"]
    assert play([*walk, *options, "--record", str(take)]) == 0
    capsys.readouterr()
    assert main(["verify", str(take), *options]) == 0
    assert json.loads(capsys.readouterr().out)["exact"] is True
    assert main(["verify", str(tmp_path / "none"), *options]) == 2
    assert capsys.readouterr().err.startswith(f"verify: {tmp_path / 'none'} is not a recording")


def copy_sources(folder: Path) -> Path:
    """The files that git knows, so that the build leaves nothing in the checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.mark.slow
def test_the_wheel_plays_away_from_the_checkout(tmp_path):
    pip = [sys.executable, "-m", "pip"]
    sources = copy_sources(tmp_path / "sources")
    build = [*pip, "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), "."]
    subprocess.run(build, cwd=sources, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 60_000_000
    names = zipfile.ZipFile(wheel).namelist()
    assert "worldmodel/data/configs/blocks/cpu.yaml" in names and "worldmodel/py.typed" in names
    assert not [name for name in names if "stages/" in name and name.startswith("worldmodel/data")]
    # an empty environment; the dependencies are those of the running one
    environment = tmp_path / "environment"
    venv.create(environment)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    python = str(scripts / "python")
    install = [*pip, "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(install, check=True)
    base = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", vars=base))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    away = tmp_path / "away"
    away.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    walk = ["play", "--headless", "--trajectory", "w*5", "--output", "walk.mp4"]
    done = subprocess.run(
        [scripts / "worldmodel", *walk], cwd=away, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["world"], report["latents"]) == ("blocks", 6)
    with av.open(str(away / "walk.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == 21 and min(frame.std() for frame in frames) > 20
    assert [path.name for path in away.iterdir()] == ["walk.mp4"]
    where = "import worldmodel; print(worldmodel.__file__)"
    shown = subprocess.run(
        [python, "-c", where], cwd=away, env=variables, capture_output=True, text=True
    )
    assert Path(shown.stdout.strip()).is_relative_to(packages)

"""Rules of the project itself: who may import whom, what importing may do, what README promises,
what the repository may weigh.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The wings in the order of docs/architecture.md: a wing may import only wings named before it.
WINGS = [
    "worldmodel.errors",
    "worldmodel.files",
    "worldmodel.device",
    "worldmodel.images",
    "worldmodel.config",
    "worldmodel.schedule",
    "worldmodel.camera",
    "worldmodel.controls",
    "worldmodel.pacing",
    "worldmodel.cli",
    "worldmodel.models",
    "worldmodel.graphs",
    "worldmodel.rollout",
    "worldmodel.engine",
    "worldmodel.worlds",
    "worldmodel.session",
    "worldmodel.recording",
    "worldmodel.bench",
    "worldmodel.client",
    "play",
    "distill",
]
SOURCES = [*ROOT.glob("worldmodel/**/*.py"), *ROOT.glob("distill/**/*.py"), ROOT / "play.py"]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def wing_of(module: str) -> str | None:
    return next((room for room in WINGS if module == room or module.startswith(room + ".")), None)


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_upwards(path):
    name = module_name(path)
    room = wing_of(name)
    assert room is not None or name == "worldmodel", (
        f"{name} belongs to no room: name it in docs/architecture.md and here"
    )
    for other in imported(path):
        target = wing_of(other)
        if target is None or room is None or target == room:
            continue
        allowed = WINGS.index(target) < WINGS.index(room)
        assert allowed and not (room == "distill" and target in ("worldmodel.client", "play")), (
            f"{name} must not import {other}"
        )


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("worldmodel.controls", {"torch", "pygame"}),
        ("worldmodel.camera", {"torch", "pygame"}),
        ("worldmodel.session", {"pygame"}),
    ],
)
def test_light_rooms_stay_light(room, forbidden):
    code = f"import sys, {room}; print([m for m in {sorted(forbidden)} if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip()
        == "[]"
    )


def test_files_and_functions_stay_small():
    for path in SOURCES:
        text = path.read_text()
        assert len(text.splitlines()) <= 700, f"{path} is longer than 700 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 71, (
                    f"{path}: {node.name} is longer than 70 lines"
                )
        assert not {"utils", "misc", "base", "common", "helpers"} & set(
            path.relative_to(ROOT).with_suffix("").parts
        ), path


def test_no_configuration_is_guessed():
    for path in SOURCES:
        assert not re.search(r"getattr\((cfg|config)\w*,", path.read_text()), (
            f"{path} guesses a missing option"
        )
        assert "sys.path" not in path.read_text(), f"{path} edits sys.path"


def test_play_is_small():
    assert len((ROOT / "play.py").read_text().splitlines()) < 60


def readme_line(heading: str) -> str:
    section = (ROOT / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return section.split("```")[1].split("\n", 1)[1].strip().splitlines()[0]


def test_readme_commands():
    play = readme_line("Play")
    test = readme_line("Test")
    assert play.rstrip().endswith("play.py") and "pytest" in test
    environments = [re.search(r"-m venv (\S+)", line).group(1) for line in (play, test)]
    assert len(set(environments)) == 2, "each line makes its own virtual environment"
    assert (
        subprocess.run(["bash", "-n", "-c", f"{play}\n{test}"], capture_output=True).returncode == 0
    )


def test_documented_files_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / name).exists(), f"README names {name}, which is not there"


def test_worlds_are_light():
    for world in (ROOT / "assets" / "worlds").glob("*/"):
        size = sum(f.stat().st_size for f in world.rglob("*") if f.is_file())
        assert size <= 60_000_000, f"{world} weighs {size / 1e6:.0f} MB; 60 are allowed"


def test_style():
    ruff = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--quiet", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ruff.returncode == 0, ruff.stdout

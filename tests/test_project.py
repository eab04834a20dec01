"""Rules of the project itself: how code is written, what README promises, what the repository may
weigh. Who may import whom: test_imports.py.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [*ROOT.glob("worldmodel/**/*.py"), *ROOT.glob("distill/**/*.py"), ROOT / "play.py"]
PYTHON = [*SOURCES, *ROOT.glob("tests/**/*.py")]


def test_files_stay_small():
    lengths = {str(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: lines for path, lines in lengths.items() if lines > 550} == {}


def test_functions_stay_small():
    lengths = {
        f"{path}: {node.name}": node.end_lineno - node.lineno + 1
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > 70} == {}


def test_files_have_names_that_say_something():
    empty = {"utils", "misc", "base", "common", "helpers"}
    assert not [
        path for path in SOURCES if empty & set(path.relative_to(ROOT).with_suffix("").parts)
    ]


def test_no_configuration_is_guessed():
    for path in SOURCES:
        assert not re.search(r"getattr\((cfg|config)\w*,", path.read_text()), (
            f"{path} guesses a missing option"
        )
        # a script that runs in another checkout imports from there
        if path.name != "checkout_walk.py":
            assert "sys.path" not in path.read_text(), f"{path} edits sys.path"


def test_play_is_small():
    assert len((ROOT / "play.py").read_text().splitlines()) < 80


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


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    ruff = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--quiet", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ruff.returncode == 0, ruff.stdout + ruff.stderr


def packed_assignments(source: str) -> list[int]:
    """Lines that assign several values at once, as in `a, b = 1, 2`, swaps aside."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
            continue
        values = {ast.unparse(value) for value in node.value.elts}
        for target in node.targets:
            if isinstance(target, ast.Tuple):
                names = {ast.unparse(name) for name in target.elts}
                lines += [] if names == values else [node.lineno]
    return lines


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_assignment_a_line(path):
    assert packed_assignments(path.read_text(encoding="utf-8")) == []


def test_packed_assignments_are_found():
    assert packed_assignments("a, b = b, a\nc, d = f()\n(e) = 1, 2\ng = h = 0") == []
    assert packed_assignments("a, b = 1, 2\n\nx.y, z[0] = z[0], 3") == [1, 3]

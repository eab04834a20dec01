"""Who imports whom: the order of the wings, and no circle between files. Imports inside functions
count, and so do strings that are the name of a module: tables of what `importlib` imports.
"""

import ast
import subprocess
import sys
from functools import cache
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
    "worldmodel.walkable",
    "worldmodel.controls",
    "worldmodel.pacing",
    "worldmodel.cli",
    "worldmodel.models",
    "worldmodel.reprojection",
    "worldmodel.rollout",
    "worldmodel.engine",
    "worldmodel.worlds",
    "worldmodel.saved_session",
    "worldmodel.overlap",
    "worldmodel.chunks",
    "worldmodel.session",
    "worldmodel.session_log",
    "worldmodel.recording",
    "worldmodel",  # the package's own file: names what a library user imports
    "worldmodel.bench",
    "worldmodel.client",
    "worldmodel.__main__",
    "play",
    "distill",
]
PLAYING = ("worldmodel.client", "worldmodel.__main__", "play")  # nothing that training may import


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {
    module_name(path): path
    for path in sorted(
        [*ROOT.glob("worldmodel/**/*.py"), *ROOT.glob("distill/**/*.py"), ROOT / "play.py"]
    )
}


def wing_of(module: str) -> str | None:
    """The wing that a module belongs to: the longest name that begins its own."""
    wings = [wing for wing in WINGS if module == wing or module.startswith(wing + ".")]
    wing = max(wings, key=len, default=None)
    return None if wing == "worldmodel" and module != wing else wing


def imported_modules(source: str, modules) -> set[str]:
    """Those of `modules` that a file's text imports, anywhere and in any way."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not used here"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules
            # `from package import module` reads nothing from the package's own file
            if not submodules <= set(modules):
                found.add(node.module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            found |= {name} if "." in name else set()  # a package's name alone is a mere word
    return found & set(modules)


@cache
def import_graph() -> dict[str, frozenset[str]]:
    return {
        name: frozenset(imported_modules(path.read_text(encoding="utf-8"), SOURCES) - {name})
        for name, path in SOURCES.items()
    }


def circles(graph: dict[str, frozenset[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node):
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], index[other])
        if lowest[node] == index[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_no_file_imports_itself_around_a_circle():
    assert circles(import_graph()) == []


@pytest.mark.parametrize("name", SOURCES)
def test_imports_follow_the_order_of_the_wings(name):
    wing = wing_of(name)
    assert wing, f"{name} belongs to no wing: name it in docs/architecture.md and here"
    for other in import_graph()[name]:
        target = wing_of(other)
        allowed = WINGS.index(target) <= WINGS.index(wing)
        assert allowed and not (wing == "distill" and target in PLAYING), (
            f"{name} must not import {other}"
        )


def test_every_way_of_importing_is_found():
    modules = ["a", "a.b", "a.c", "a.d", "a.e"]
    source = "import a.b\ndef f():\n    from a import c\n    from a.d import name\n"
    assert imported_modules(source, modules) == {"a.b", "a.c", "a.d"}
    assert imported_modules("from a import name", modules) == {"a"}
    table = "TABLE = {'a': ('a.e:Kind', 'a.b is named in a sentence')}"
    assert imported_modules(table, modules) == {"a.e"}
    # the tables of this project are read
    assert "distill.stages.dmd" in import_graph()["distill.stages"]
    assert "distill.train" in import_graph()["distill.__main__"]


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a", "e"}}
    assert sorted(circles(graph)) == [["b", "c"], ["d", "e"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("worldmodel", {"torch", "pygame", "numpy"}),
        ("worldmodel.controls", {"torch", "pygame"}),
        ("worldmodel.camera", {"torch", "pygame"}),
        ("worldmodel.walkable", {"torch", "pygame"}),
    ],
)
def test_light_modules_stay_light(module, forbidden):
    code = f"import sys, {module}; print([m for m in {sorted(forbidden)} if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert shown.stdout.strip() == "[]"


def test_a_session_needs_no_window():
    reached = {"worldmodel.session", "worldmodel.recording"}
    while further := set().union(*(import_graph()[name] for name in reached)) - reached:
        reached |= further
    trees = [ast.parse(SOURCES[name].read_text(encoding="utf-8")) for name in reached]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Import)]
    names = {alias.name for node in imports for alias in node.names}
    assert "torch" in names and "pygame" not in names

"""The language of code and documents: none of the phrases of docs/words.txt."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LIST = ROOT / "docs" / "words.txt"
FOLDERS = ("worldmodel", "distill", "scripts", "tests", "docs", "configs", "assets", ".ci")
ENDINGS = (".py", ".md", ".yaml", ".toml")
# what past commands printed, the notes of the reference tensors, what an older edition wrote
SKIPPED = ("docs/results/", "tests/golden/", "tests/first_edition/")
GAP = r"[\s#\"']+"  # a space, or a line break inside a comment or a string


class Phrase(NamedTuple):
    """A line of docs/words.txt."""

    pattern: re.Pattern
    instead: str
    allowed: tuple[str, ...]  # paths, or what they begin with


def phrases() -> list[Phrase]:
    """The lines of docs/words.txt."""
    read = []
    for line in LIST.read_text().splitlines():
        if not line.startswith("#"):
            expression, instead, *allowed = line.split("\t")
            pattern = re.compile(expression.replace(" ", GAP), re.IGNORECASE)
            read.append(Phrase(pattern, instead, tuple(" ".join(allowed).split())))
    return read


def texts() -> dict[str, str]:
    """The files that people read, by their path in the checkout."""
    paths = [
        *ROOT.glob("*"),
        *(path for name in FOLDERS for path in ROOT.joinpath(name).rglob("*")),
    ]
    kept = {path.relative_to(ROOT).as_posix(): path for path in paths if path.is_file()}
    return {
        name: path.read_text(encoding="utf-8")
        for name, path in sorted(kept.items())
        if (name.endswith(ENDINGS) or name == ".ci/run") and not name.startswith(SKIPPED)
    }


def hits(name: str, text: str) -> list[str]:
    """`path:line: phrase` of every banned phrase in the text of a file."""
    return [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {' '.join(match.group().split())!r}; "
        f"write instead: {phrase.instead}"
        for phrase in phrases()
        if not name.startswith(phrase.allowed)
        for match in phrase.pattern.finditer(text)
    ]


def test_plain_words():
    found = [hit for name, text in texts().items() for hit in hits(name, text)]
    assert not found, "\n".join(found)


def test_a_phrase_is_found_across_a_line_break():
    comment = "# the cache is built\n    # once" + "\n    # more for the next chunk"
    (hit,) = hits("cache.py", comment)
    assert hit.startswith("cache.py:2: ")
    assert not hits("cache.py", "# the cache is rebuilt for the next chunk")

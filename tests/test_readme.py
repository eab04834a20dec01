"""README's way to a world of one's own, with a recipe of seconds in place of the one of hours."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from distill.__main__ import main as distill
from worldmodel.worlds.world import World

ROOT = Path(__file__).parent.parent
# What a newcomer's recipe of seconds says otherwise than configs/blocks/tiny.yaml: the order of the
# stages in README, and an autoencoder of its own.
TINY = {
    "autoencoder": {
        "encoder_widths": [8, 8, 8, 8],
        "encoder_blocks": [1, 1, 1],
        "decoder_widths": [8, 8, 8, 8],
        "decoder_blocks": [1, 1, 1],
        "window": 2,
        "steps": 2,
        "batch": 2,
    },
    "teacher_forcing": {"init": ""},
    "bidirectional": {"init": "teacher_forcing"},
}
# Options of the commands by name: smaller values, and what keeps them short.
SMALL = {
    "collect": {"--clips": 4, "--latents": 6, "--height": 48, "--width": 80, "--workers": 1},
    "evaluate": dict(
        [
            *{"--cases": 5, "--latents": 4, "--returns": 1, "--flows": 1, "--batch": 3}.items(),
            *{"--drift-cases": 1, "--drift-latents": 6, "--workers": 1}.items(),
        ]
    ),
    "play": {"--headless": None, "--trajectory": "w*3", "--output": "walk.mp4", "--threads": 1},
}


def commands() -> list[list[str]]:
    """The commands of the first block of README that trains, as words."""
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```")[1::2]
    lines = next(block for block in blocks if "distill train" in block).splitlines()
    return [words for line in lines[1:] if (words := shlex.split(line, comments=True))]


def recipe_of(words: list[str]) -> str | None:
    """The recipe that a command names."""
    return next((word for word in words if word.endswith(".yaml")), None)


def prepare_recipe(folder: Path, name: str) -> None:
    """Writes the recipe `name` under `folder`: the folders of README's, the sizes of the tiny."""
    theirs = yaml.safe_load((ROOT / name).read_text())
    recipe = yaml.safe_load((ROOT / "configs/blocks/tiny.yaml").read_text())
    recipe["run"]["folder"] = theirs["run"]["folder"]
    recipe["data"]["root"] = theirs["data"]["root"]
    for section, values in TINY.items():
        recipe.setdefault(section, {}).update(values)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(yaml.safe_dump(recipe))


def program(words: list[str]) -> list[str]:
    """The words behind `python -m distill`; `play` and the words behind play.py."""
    if words[:3] == ["python", "-m", "distill"]:
        return words[3:]
    if words[0] == "worldmodel-distill":
        return words[1:]
    assert words[:2] in (["python", "play.py"], ["worldmodel", "play"]), words
    return ["play", *words[2:]]


@pytest.mark.slow
def test_train_your_own(tmp_path, monkeypatch, capsys, play):
    lines = [program(words) for words in commands()]
    assert {name for name, *_ in lines} >= {"collect", "train", "encode", "export", "evaluate"}
    (recipe,) = {name for words in lines if (name := recipe_of(words))}
    prepare_recipe(tmp_path, recipe)
    monkeypatch.chdir(tmp_path)
    for name, *words in lines:
        for option, value in SMALL.get(name, {}).items():
            if option in words:
                words[words.index(option) + 1] = str(value)
            else:
                words += [option] if value is None else [option, str(value)]
        capsys.readouterr()
        status = play(words) if name == "play" else distill([name, *words])
        assert status == 0, (name, words, capsys.readouterr().err)
    assert name == "play" and json.loads(capsys.readouterr().out)["latents"] == 4
    world = World.from_pretrained(tmp_path / words[words.index("--world") + 1])
    assert len(world.prompts.names) == 4 and (tmp_path / "walk.mp4").is_file()

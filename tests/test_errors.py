"""Errors, logs and files: a bug keeps its traceback and ends with 1, bad input is one sentence and
2, outputs are checked before work begins.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distill.__main__ import COMMANDS
from distill.__main__ import main as distill
from distill.data.clips import write_clip
from worldmodel import errors
from worldmodel.__main__ import COMMANDS as PLAYING
from worldmodel.__main__ import main as worldmodel
from worldmodel.cli import BAD_INPUT, FAILED, Parser, run
from worldmodel.errors import UserError, log_bug, user_log
from worldmodel.files import check_output, check_output_folder, replacing_file, replacing_folder
from worldmodel.models.tiny_autoencoder import TinyAutoencoder

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "blocks" / "tiny.yaml"
WIDTHS = {
    "encoder_widths": [8, 8, 8, 8],
    "encoder_blocks": [1, 1, 1],
    "decoder_widths": [8, 8, 8, 8],
    "decoder_blocks": [1, 1, 1],
}


def planted(*_, **__):
    raise ValueError("zip() argument 2 is shorter than argument 1")


@pytest.fixture
def is_a_bug(capfd):
    """Runs a command line and checks that it ends as a bug does."""

    def check(main, *words) -> None:
        capfd.readouterr()
        assert main([str(word) for word in words]) == FAILED
        shown = capfd.readouterr().err
        assert "Traceback (most recent call last)" in shown and "in planted" in shown
        assert "ValueError: zip() argument 2 is shorter than argument 1\n" in shown
        last = shown.splitlines()[-1]
        assert last.endswith(f"a bug of the program, not of your input. Its log is {user_log()}.")

    return check


@pytest.fixture
def clips(tmp_path):
    """A folder with one clip of three latents."""
    video = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), np.uint8)
    c2w = np.tile(np.eye(4), (3, 1, 1))
    lens = [0.5, 0.8, 0.5, 0.5]
    write_clip(tmp_path / "clips", "clip", video, c2w, lens, "meadow", 16, "test", "CC0")
    return tmp_path / "clips"


# -------------------- bugs


@pytest.mark.parametrize(
    "place", ["worldmodel.rollout.Rollout.step", "worldmodel.recording._Files.add"]
)
def test_a_bug_in_the_loop(is_a_bug, play, tiny_bundle, tmp_path, monkeypatch, place):
    monkeypatch.setattr(place, planted)
    film = ["--output", tmp_path / "walk.mp4", "--record", tmp_path / "take"]
    walk = ["--headless", "--trajectory", "w*2", "--threads", "1"]
    is_a_bug(play, "--world", tiny_bundle, *walk, *film)


def test_a_bug_in_a_stage(is_a_bug, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(TinyAutoencoder, "encode", planted)
    options = {**WIDTHS, "window": 2, "steps": 1, "batch": 1}
    settings = [f"autoencoder.{name}={value}" for name, value in options.items()]
    settings += [f"data.root={clips}", f"run.folder={tmp_path / 'runs'}"]
    words = [word for setting in settings for word in ("--set", setting)]
    is_a_bug(distill, "train", TINY, "--stage", "autoencoder", *words)


def test_a_bug_in_a_data_command(is_a_bug, clips, tmp_path, monkeypatch):
    TinyAutoencoder(**WIDTHS).save_pretrained(tmp_path / "autoencoder")
    monkeypatch.setattr("distill.data.encode.encode_frames", planted)
    is_a_bug(distill, "encode", "--clips", clips, "--autoencoder", tmp_path / "autoencoder")
    monkeypatch.setattr("distill.data.blocks.collect.render", planted)
    collect = ["--clips", "1", "--latents", "1", "--height", "8", "--width", "8", "--workers", "1"]
    is_a_bug(distill, "collect", "blocks", "--output", tmp_path / "new", *collect)


def test_a_bug_is_logged_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    error = ValueError("größe → 0")
    assert log_bug(error) == log_bug(error) == user_log()
    assert user_log().read_text(encoding="utf-8").count("ValueError: größe → 0") == 1


def test_the_log_stays_small(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(errors, "_LOG_LIMIT", 100)
    for number in range(3):
        log_bug(ValueError(f"bug {number}"))
    assert "bug 2" in user_log().read_text() and "bug 1" not in user_log().read_text()
    assert "bug 1" in user_log().with_suffix(".old").read_text()


def test_a_log_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    path = log_bug(ValueError("bug"))
    assert path.parent == tmp_path / "temporary" and "ValueError: bug" in path.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    assert log_bug(ValueError("another bug")) is None


# -------------------- the log on stderr


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ([], "game: warning: three\n"),
        (["-v"], "game: two\ngame: warning: three\n"),
        (["walk", "--verbose"], "game: two\ngame: warning: three\n"),
        (
            ["--debug", "walk"],
            "game: debug: worldmodel.test: one\ngame: worldmodel.test: two\n"
            "game: warning: worldmodel.test: three\n",
        ),
    ],
)
def test_verbose_and_debug(capsys, words, shown):
    logger = logging.getLogger("worldmodel.test")

    def work():
        parser = Parser(prog="game")
        parser.add_subparsers().add_parser("walk")
        assert vars(parser.parse_args(words)) == {}
        logger.debug("one")
        logger.info("two")
        logger.warning("three")

    before = [(logger.level, list(logger.handlers)) for logger in (logger.parent, logger)]
    assert run("game", work) == 0
    assert capsys.readouterr().err == shown
    assert before == [(logger.level, list(logger.handlers)) for logger in (logger.parent, logger)]


def test_they_may_come_before_the_command(capsys):
    for words in (["-v", "collect"], ["collect", "-v"]):
        assert distill([*words, "blocks", "--output", "x", "--clips", "0"]) == BAD_INPUT
        assert capsys.readouterr().err == "collect: expected --clips of at least 1, got 0\n"


def test_debug_shows_where_a_user_error_came_from(capsys):
    def work(words):
        Parser(prog="game").parse_args(words)
        raise UserError("expected a number, got 'x': give one.")

    assert run("game", lambda: work([])) == BAD_INPUT
    assert capsys.readouterr().err == "game: expected a number, got 'x': give one.\n"
    assert run("game", lambda: work(["--debug"])) == BAD_INPUT
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("game: expected a number, got 'x': give one.\n")


@pytest.mark.parametrize(
    ("main", "words"),
    [
        *(("distill", [name]) for name in COMMANDS),
        ("distill", ["collect", "blocks"]),
        *(("worldmodel", [name]) for name in PLAYING),
        ("play", []),
    ],
)
def test_every_command_has_them(capsys, play, main, words):
    main = {"distill": distill, "worldmodel": worldmodel, "play": play}[main]
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "-v, --verbose" in shown and "--debug" in shown


def test_what_an_encoding_cannot_write_is_escaped():
    code = (
        "from worldmodel.cli import Parser, print_line, run\n"
        "def work():\n"
        "    print_line('wörld is ready →')\n"
        "    Parser(prog='game', description='Größe').parse_args(['--help'])\n"
        "raise SystemExit(run('game', work))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "w\\xf6rld is ready \\u2192\n" in done.stdout and "Gr\\xf6\\xdfe" in done.stdout


# -------------------- files


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "target.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "target.txt")
    with pytest.raises(KeyError), replacing_file(tmp_path / "link.txt") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert (tmp_path / "target.txt").read_text() == "old"
    with replacing_file(tmp_path / "link.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "target.txt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.txt", "target.txt"]


def test_a_folder_is_replaced_behind_its_symlink(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with replacing_folder(tmp_path / "link") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target/file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_outputs_that_cannot_be_written(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path, "got the folder"),
        (tmp_path / "fifo", "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
        (tmp_path / "file/below/it", "is a file"),
    ):
        with pytest.raises(UserError, match=reason):
            check_output(path)
    for path, reason in (
        (tmp_path / "fifo", "not a folder"),
        (tmp_path / "file/below", "is a file"),
    ):
        with pytest.raises(UserError, match=reason):
            check_output_folder(path)
    assert check_output(tmp_path / "a/b.txt") == tmp_path / "a/b.txt"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for check in (check_output, check_output_folder):
        with pytest.raises(UserError, match=f"the folder {tmp_path} cannot be written"):
            check(tmp_path / "a/b")


@pytest.mark.parametrize(
    ("main", "words"),
    [
        ("play", ["--world", "WORLD", "--headless", "--output", "FIFO"]),
        ("play", ["--world", "WORLD", "--headless", "--record", "FILE/take"]),
        (worldmodel, ["benchmark", "--world", "WORLD", "--output", "FIFO"]),
        (distill, ["evaluate", "--world", "WORLD", "--output", "FIFO"]),
        (distill, ["collect", "blocks", "--output", "FILE/clips"]),
        (distill, ["import", "--input", "WORLD", "--output", "FILE/clips"]),
        (distill, ["train", TINY, "--stage", "autoencoder", "--set", "run.folder=FILE/runs"]),
        (distill, ["export", "--config", TINY, "--transformer=x", "--autoencoder=x", "--output"]),
        (worldmodel, ["convert", "WORLD", "--world", "YAML", "--output"]),
    ],
)
def test_outputs_are_checked_first(capsys, play, tiny_bundle, tmp_path, monkeypatch, main, words):
    monkeypatch.setattr("worldmodel.worlds.world.World.from_pretrained", planted)
    monkeypatch.setattr("worldmodel.worlds.convert.fetch", planted)
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "file").write_text("kept")
    names = {"WORLD": tiny_bundle, "FIFO": tmp_path / "fifo.json", "FILE": tmp_path / "file"}
    names["YAML"] = next((ROOT / "configs/worlds").glob("*.yaml"))
    words = [str(word) for word in (*words, *(["FILE/world"] if words[-1] == "--output" else []))]
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    assert (play if main == "play" else main)(words) == BAD_INPUT
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and ("not a regular file" in shown or "is a file" in shown)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo.json", "file"]

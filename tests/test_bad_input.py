"""Bad input end to end: every command answers with one sentence and a status, and what existed
stays as it was.
"""

import errno
import importlib.util
import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import Payload
from safetensors import SafetensorError
from safetensors.torch import save_file

from distill.__main__ import main as distill
from distill.data.clips import write_clip, write_latents
from worldmodel import cli as command_line
from worldmodel import recording
from worldmodel.__main__ import main as worldmodel
from worldmodel.bench.benchmark import main as benchmark
from worldmodel.errors import Stopped, UserError, user_log

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "blocks" / "tiny.yaml"
WEIGHTS = "diffusion_pytorch_model.safetensors"
WIDTHS = (
    "encoder_widths=[8, 8, 8, 8]",
    "encoder_blocks=[1, 1, 1]",
    "decoder_widths=[8, 8, 8, 8]",
    "decoder_blocks=[1, 1, 1]",
)
PROGRESS = re.compile(r"%\||\d+\w+ \[|\.\.\.$|^\w+: warning: ")  # bars, "Opening the world ..."


def load_play():
    spec = importlib.util.spec_from_file_location("play", ROOT / "play.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


play = load_play()


@pytest.fixture(scope="module", autouse=True)
def torch_settings():
    """play.py sets torch up for itself; the tests after it get theirs back."""
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def factory(tmp_path_factory):
    """Two clips of six latents, an autoencoder and a short run: `clips/`, `runs/`, and the words
    that train there.
    """
    root = tmp_path_factory.mktemp("factory")
    random = np.random.default_rng(0)
    for index, mood in enumerate(["meadow", "night"]):
        c2w = np.tile(np.eye(4), (6, 1, 1))
        video = random.integers(0, 255, (21, 32, 32, 3), np.uint8)
        folder = write_clip(
            root / "clips",
            f"clip-{index}",
            video,
            c2w,
            [0.5, 0.8, 0.5, 0.5],
            mood,
            16,
            "test",
            "CC0",
        )
        write_latents(folder, torch.randn(16, 6, 4, 4))
    options = [
        f"data.root={root / 'clips'}",
        f"run.folder={root / 'runs'}",
        "autoencoder.window=2",
        "autoencoder.steps=1",
    ]
    words = [
        word
        for option in [*options, *(f"autoencoder.{width}" for width in WIDTHS)]
        for word in ("--set", option)
    ]
    for stage in ("autoencoder", "bidirectional"):
        assert distill(["train", str(TINY), "--stage", stage, *words]) == 0
    return root, words


@pytest.fixture(scope="module")
def take(tiny_bundle, tmp_path_factory):
    """A recording of four latents."""
    folder = tmp_path_factory.mktemp("takes")
    words = [
        "--world",
        tiny_bundle,
        "--headless",
        "--trajectory",
        "w*3",
        "--threads",
        "1",
        "--output",
        folder / "walk.mp4",
    ]
    assert play([str(word) for word in [*words, "--record", folder / "takes" / "take"]]) == 0
    return folder / "takes" / "take"


@pytest.fixture
def says(capfd):
    """Runs a command line and checks that it fails with one sentence that matches; returns the
    sentence.
    """

    def check(reason: str, main, *words, status: int = command_line.BAD_INPUT) -> str:
        capfd.readouterr()
        assert main([str(word) for word in words]) == status
        lines = [
            line
            for line in re.split(r"[\r\n]+", capfd.readouterr().err)
            if line.strip() and not PROGRESS.search(line)
        ]
        assert len(lines) == 1 and re.search(reason, lines[0]), lines
        return lines[0]

    return check


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(path: Path, **values):
    """Changes keys of a YAML or JSON file."""
    path.write_text(json.dumps({**yaml.safe_load(path.read_text()), **values}))


# -------------------- play


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--trajectory", "w*10,q*3"], "key 'q' is unknown"),
        (["--trajectory", "w*99999999999"], "of 99999999999 latents is longer than"),
        (["--threads", "100000"], "expected at most 256, got 100000"),
        (["--steps", "²"], "whole number of at least 1, got '²'"),
        (["--steps", "51"], "steps must be 1 to 50, got 51"),
        (["--seed", str(2**70)], "seed must be a whole number from 0"),
        (["--image", str(TINY)], "tiny.yaml is not a complete PNG or JPEG"),
        (["--prompt", "海边的红房子"], "has no prompt '海边的红房子'; there are grey, loud"),
        (
            ["--prompt", "a red house " * 1000],
            r"has no prompt 'a red [a-z ]{1,60} \.\.\.'; there are grey, loud",
        ),
        (["--output", str(ROOT)], "must be a file such as .*walk.mp4, got the folder"),
    ],
)
def test_play(says, tiny_bundle, tmp_path, words, reason):
    film = [] if "--output" in words else ["--output", tmp_path / "walk.mp4"]
    says(reason, play, "--world", tiny_bundle, "--headless", *film, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"GIF89a" + bytes(40), b"%PDF-1.4", b""])
def test_a_picture_of_the_wrong_kind(says, tiny_bundle, tmp_path, content):
    (tmp_path / "photo.jpg").write_bytes(content)
    walk = [
        "--world",
        tiny_bundle,
        "--headless",
        "--output",
        tmp_path / "walk.mp4",
        "--image",
        tmp_path / "photo.jpg",
    ]
    says("photo.jpg is not a complete PNG or JPEG file", play, *walk)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_no_free_memory(says, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("worldmodel.worlds.world.free_memory", lambda device: 0)
    says(
        "0.0 GiB are free: close other programs",
        play,
        "--world",
        tiny_bundle,
        "--headless",
        "--output",
        tmp_path / "walk.mp4",
    )


@pytest.mark.parametrize(
    ("save", "reason"),
    [
        (
            lambda path: torch.save({"generator": Payload(path.parent / "executed")}, path),
            "could run code, so it was not loaded",
        ),
        (
            lambda path: path.write_bytes(pickle.dumps(Payload(path.parent / "executed"))),
            "could run code, so it was not loaded",
        ),
        (
            lambda path: (torch.save({"a": torch.zeros(999)}, path), cut(path)),
            "damaged or incomplete .*: fetch it again",
        ),
        (
            lambda path: (save_file({"a": torch.zeros(999)}, path), cut(path)),
            "damaged or incomplete .*: fetch it again",
        ),
    ],
    ids=["code", "bare-code", "half", "half-safetensors"],
)
def test_weights(says, tmp_path, save, reason):
    save(tmp_path / "weights.pt")
    says(reason, worldmodel, "inspect", tmp_path / "weights.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


@pytest.mark.parametrize(("width", "height"), [(20_000, 1), (1, 20_000)])
def test_a_thin_picture(says, tiny_bundle, tmp_path, width, height):
    cv2.imwrite(str(tmp_path / "thin.png"), np.zeros((height, width, 3), np.uint8))
    walk = [
        "--world",
        tiny_bundle,
        "--headless",
        "--output",
        tmp_path / "walk.mp4",
        "--image",
        tmp_path / "thin.png",
    ]
    says(f"start picture of {width}x{height} pixels is too thin or too small", play, *walk)
    assert [path.name for path in tmp_path.iterdir()] == ["thin.png"]


def test_a_wide_picture_is_played(tiny_bundle, tmp_path):
    cv2.imwrite(str(tmp_path / "wide.png"), np.zeros((300, 20_000, 3), np.uint8))
    walk = [
        "--world",
        tiny_bundle,
        "--headless",
        "--trajectory",
        "w*1",
        "--threads",
        "1",
        "--image",
        tmp_path / "wide.png",
    ]
    assert (
        play([str(word) for word in [*walk, "--output", tmp_path / "walk.mp4"]]) == 0
        and (tmp_path / "walk.mp4").is_file()
    )


def cut(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def electron(bundle):
    shutil.rmtree(bundle)
    (bundle / "resources").mkdir(parents=True)
    (bundle / "resources" / "app.asar").write_bytes(b"\x04\0\0\0")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (electron, "no world .*world.yaml"),
        (lambda b: cut(b / "transformer" / WEIGHTS), "cut off or damaged"),
        (
            lambda b: shutil.copy(b / "autoencoder" / WEIGHTS, b / "transformer" / WEIGHTS),
            "transformer: .* not fit .*not expected",
        ),
        (
            lambda b: change(b / "transformer" / "config.json", ffn_dim=32),
            r"wrong shape: .*\[64\] instead of \[32\]",
        ),
        (
            lambda b: change(b / "transformer" / "config.json", num_attention_heads="x"),
            "config.json describes no CausalWan",
        ),
        (lambda b: change(b / "autoencoder" / "config.json", colour=1), "unknown key 'colour'"),
        (
            lambda b: change(b / "autoencoder" / "config.json", _class_name="AutoencoderKL"),
            "holds a AutoencoderKL",
        ),
        (lambda b: cut(b / "images" / "grey-0.png"), "grey-0.png is not a complete"),
        (lambda b: (b / "world.yaml").write_bytes(bytes(range(256))), "cannot be read as YAML"),
        (
            lambda b: change(b / "world.yaml", fps=float("inf")),
            "fps must be a number, got 'Infinity'",
        ),
        (lambda b: change(b / "world.yaml", width=10**9), "width must be 1 to 4096"),
        (lambda b: change(b / "world.yaml", format=99), "format 99, .*update this program"),
        (
            lambda b: save_file({"grey": torch.zeros(8)}, b / "prompts.safetensors"),
            "Prompts .*of one shape",
        ),
        (
            lambda b: save_file(
                {"grey": torch.zeros(2, 8)}, b / "prompts.safetensors", {"texts": "[1]"}
            ),
            "texts are no table",
        ),
    ],
)
def test_bundles(says, tiny_bundle, tmp_path, spoil, reason):
    shutil.copytree(tiny_bundle, tmp_path / "world")
    spoil(tmp_path / "world")
    film = tmp_path / "walk.mp4"
    film.write_bytes(b"older")
    says(
        reason,
        play,
        "--world",
        tmp_path / "world",
        "--headless",
        "--trajectory",
        "w*1",
        "--threads",
        "1",
        "--output",
        film,
    )
    assert film.read_bytes() == b"older" and torch.get_default_dtype() == torch.float32


def test_a_full_disk_while_recording(says, tiny_bundle, tmp_path, monkeypatch):
    add = recording._Files.add

    def until_full(files, *item):
        if files.latents == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(files, *item)

    monkeypatch.setattr(recording._Files, "add", until_full)
    world = ["--world", tiny_bundle, "--threads", "1"]
    film = tmp_path / "walk.mp4"
    folder = tmp_path / "take"
    walk = ["--headless", "--trajectory", "w*9", "--output", film, "--record", folder]
    says(
        "Recording ended: No space left on device; .* is kept in .*take",
        play,
        *world,
        *walk,
        status=command_line.FAILED,
    )
    with av.open(str(film)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 37  # the walk went on
    assert recording.recover(folder) == 5
    assert play([str(word) for word in [*world, "--replay", folder, "--verify"]]) == 0


def row(number: int, **values):
    def spoil(folder):
        rows = [json.loads(line) for line in (folder / "session.jsonl").read_text().splitlines()]
        rows[number] |= values
        (folder / "session.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "reason", "status"),
    [
        (row(0, fingerprint=None), "session.jsonl is damaged: expected 'fingerprint'", 2),
        (row(0, fingerprint="other"), "was recorded in the world 'tiny'", 2),
        (row(2, c2w=[[1.0]]), "session.jsonl: expected poses", 2),
        (row(2, sha256="other"), "from latent 1 on the replay differs from the recording", 1),
        (
            lambda f: (f / "video.mp4").write_bytes((f / "video.mp4").read_bytes()[:1200]),
            "video.mp4 (cannot be read|ends before)",
            2,
        ),
        (lambda f: (f / "session.jsonl").write_text("[]\n"), "is not a recording", 2),
    ],
)
def test_recordings(says, tiny_bundle, take, tmp_path, spoil, reason, status):
    shutil.copytree(take, tmp_path / "take")
    spoil(tmp_path / "take")
    before = contents(tmp_path)
    says(
        reason,
        play,
        "--world",
        tiny_bundle,
        "--replay",
        tmp_path / "take",
        "--verify",
        "--threads",
        "1",
        status=status,
    )
    assert contents(tmp_path) == before


# -------------------- the factory


def pose(index: int, place: tuple[int, int], value: float):
    def spoil(clip):
        entries = json.loads((clip / "poses.json").read_text())
        entries[str(index)]["extrinsic"][place[0]][place[1]] = value
        (clip / "poses.json").write_text(json.dumps(entries))

    return spoil


def too_few_poses(clip):
    entries = json.loads((clip / "poses.json").read_text())
    (clip / "poses.json").write_text(json.dumps({key: entries[key] for key in "01234"}))


def other_film(frames: int, height: int = 32):
    def spoil(clip):
        with av.open(str(clip / "video.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=16)
            stream.width = 32
            stream.height = height
            stream.pix_fmt = "yuv420p"
            for _ in range(frames):
                container.mux(
                    stream.encode(
                        av.VideoFrame.from_ndarray(
                            np.zeros((height, 32, 3), np.uint8), format="rgb24"
                        )
                    )
                )
            container.mux(stream.encode())

    return spoil


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (pose(2, (0, 3), float("nan")), "pose 2 holds NaN"),
        (pose(2, (0, 0), 3.0), "pose 2 is not a rotation"),
        (pose(2, (0, 0), -1.0), "pose 2 is not a rotation .*mirrors"),
        (too_few_poses, "expected 17 video frames for 5 poses .*got 21"),
        (other_film(20), "expected 21 video frames for 6 poses .*got 20"),
        (other_film(21, height=36), "multiples of 8, got 36x32"),
        (lambda clip: (clip / "video.mp4").write_bytes(b"no film"), "video.mp4: expected a video"),
        (lambda clip: change(clip / "meta.yaml", caption=["a", "b"]), "caption as a text"),
    ],
)
def test_clips(says, factory, tmp_path, spoil, reason):
    root, words = factory
    shutil.copytree(root / "clips", tmp_path / "clips")
    (tmp_path / "clips" / "clip-1" / "latents.safetensors").unlink()
    spoil(tmp_path / "clips" / "clip-1")
    encode = [
        "encode",
        "--clips",
        tmp_path / "clips",
        "--autoencoder",
        root / "runs/autoencoder/export",
    ]
    says(reason, distill, *encode)
    assert sorted(path.name for path in (tmp_path / "clips" / "clip-1").iterdir()) == [
        "meta.yaml",
        "poses.json",
        "video.mp4",
    ]


@pytest.mark.parametrize(
    ("text", "setting", "reason"),
    [
        (
            "bidirectionl: {steps: 2}",
            None,
            "unknown key 'bidirectionl'; did you mean 'bidirectional'",
        ),
        ("bidirectional: {stepz: 2}", None, "unknown key 'stepz'; did you mean 'steps'"),
        (
            "bidirectional: {steps: many}",
            None,
            "bidirectional: steps must be a whole number, got 'many'",
        ),
        ("- a", None, "expected sections"),
        ("a: [", None, "is not valid YAML"),
        (None, "data.frames=[", "a value in YAML after --set data.frames="),
        (None, "data.frames=0", "frames must be at least 1, got 0"),
        (None, "bidirectional.lr=nan", "lr must be a number, got 'nan'"),
        (
            None,
            "bidirectional.caption_dropout=7",
            "caption_dropout must be at least 0 and at most 1, got 7",
        ),
        (None, "optimiser.betas=[0.9]", "betas must be a list of 2"),
        (None, "dmd.clamp=[0.9, 0.1]", "clamp must rise"),
        (None, "run.log_every=0", "log_every must be at least 1"),
        (None, "model.channels=8", "latents of 8 channels .* have 16"),
        (None, "model.patch=[1, 3, 2]", "patches of 3x2 latent cells, the clips .* have 4x4"),
        (
            None,
            "bidirectional.init=WORLD/transformer",
            "prompts of width 8, the clips .* the prompts 16",
        ),
        (
            None,
            "bidirectional.init=WORLD/autoencoder",
            "holds a TinyAutoencoder, a CausalWanTransformer is expected",
        ),
        (None, "data.root=nowhere", "expected a folder of clips"),
    ],
)
def test_recipes(says, factory, tiny_bundle, tmp_path, text, setting, reason):
    _, words = factory
    recipe = TINY
    if text:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text)
    settings = [word for word in (setting, f"run.folder={tmp_path / 'runs'}") if word]
    more = [
        word.replace("WORLD", str(tiny_bundle))
        for setting in settings
        for word in ("--set", setting)
    ]
    says(reason, distill, "train", recipe, "--stage", "bidirectional", *words, *more)
    assert not (tmp_path / "runs").exists()


def test_resuming(says, factory, tmp_path):
    """A finished stage resumes to nothing and exports again; another config or a broken checkpoint
    changes no file.
    """
    root, words = factory
    runs = tmp_path / "runs"
    shutil.copytree(root / "runs", runs)
    train = ["train", TINY, "--stage", "bidirectional", *words, "--set", f"run.folder={runs}"]
    before = contents(runs / "bidirectional/export")
    metrics = (runs / "bidirectional/metrics.jsonl").read_bytes()
    for option in ("--resume", "--export-only"):
        shutil.rmtree(runs / "bidirectional/export")
        assert distill([str(word) for word in [*train, option]]) == 0
        assert (
            contents(runs / "bidirectional/export") == before
            and (runs / "bidirectional/metrics.jsonl").read_bytes() == metrics
        )
    before = contents(runs)
    says("holds a run already", distill, *train)
    says(
        r"trained with bidirectional.lr = 0.001, not 0.5",
        distill,
        *train,
        "--resume",
        "--set",
        "bidirectional.lr=0.5",
    )
    assert contents(runs) == before
    state = runs / "bidirectional/checkpoints/step-00000004/state.json"
    for broken in (b"[]", bytes(range(256)), b'{"step": "x"}'):
        state.write_bytes(broken)
        says("step-00000004 cannot be read .*: remove that folder", distill, *train, "--resume")


def test_a_full_disk_while_training(says, factory, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("distill.run_folder.save_file", full)
    train = [
        "train",
        TINY,
        "--stage",
        "bidirectional",
        *factory[1],
        "--set",
        f"run.folder={tmp_path / 'runs'}",
    ]
    says("No space left on device .*see to the disk", distill, *train, status=command_line.FAILED)
    assert list((tmp_path / "runs/bidirectional/checkpoints").iterdir()) == []


def test_encoding_twice_and_a_recording(factory, take, tmp_path, capsys):
    shutil.copytree(take.parent, tmp_path / "takes")
    encode = [
        "encode",
        "--clips",
        str(tmp_path / "takes"),
        "--autoencoder",
        str(factory[0] / "runs/autoencoder/export"),
    ]
    for made in (1, 0):
        assert distill(encode) == 0 and capsys.readouterr().out.startswith(
            f"{made} of 1 clips encoded"
        )


def test_encoding_beside_a_recording_that_goes_on(says, factory, take, tmp_path):
    """One that is being recorded and one that holds nothing do not keep the others from being
    encoded.
    """
    for name in ("a", "b", "c"):
        shutil.copytree(take, tmp_path / "takes" / name)
        (tmp_path / "takes" / name / "latents.safetensors").unlink(missing_ok=True)
    for name, rows in (("a", -1), ("b", 1)):  # neither has an end line
        log = tmp_path / "takes" / name / "session.jsonl"
        log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:rows]))
    encode = [
        "encode",
        "--clips",
        tmp_path / "takes",
        "--autoencoder",
        factory[0] / "runs/autoencoder/export",
    ]
    with (tmp_path / "takes/a/session.jsonl").open("a") as file:
        assert recording.lock(file)
        says(
            "a is still being recorded; close it first; 2 of 3 clips could not be encoded",
            distill,
            *encode,
        )
    assert [(tmp_path / "takes" / name / "latents.safetensors").exists() for name in "abc"] == [
        False,
        False,
        True,
    ]


COLLECT = ["collect", "blocks", "--output", "OUT", "--clips", "1", "--latents", "1"]
EXPORT = [
    "export",
    "--config",
    TINY,
    "--output",
    "OUT",
    "--autoencoder",
    "ROOT/runs/autoencoder/export",
]
EVALUATE = ["evaluate", "--output", "OUT.json"]


@pytest.mark.parametrize(
    ("main", "words", "reason"),
    [
        (distill, [], "arguments are required: command; python -m distill --help"),
        (distill, ["evalute"], "invalid choice: 'evalute'"),
        (distill, ["train", TINY, "--stage", "zz"], "^train: .*invalid choice: 'zz'"),
        (distill, [*COLLECT, "--clips", "x"], "--clips: invalid int value: 'x'"),
        (distill, [*COLLECT, "--height", "33"], "multiple of 8"),
        (
            distill,
            ["collect", "vizdoom", "--output", "OUT"],
            "not installed: run `python -m pip install vizdoom`",
        ),
        (
            distill,
            ["import", "--input", "OUT", "--output", "OUT"],
            "expected a folder or preencode_input.json",
        ),
        (distill, [*EXPORT, "--transformer", "nowhere"], "nowhere holds no CausalWanTransformer"),
        (
            distill,
            [*EXPORT, "--transformer", "ROOT/runs/autoencoder/export"],
            "holds a TinyAutoencoder",
        ),
        (
            distill,
            [*EXPORT, "--transformer", "ROOT/runs/bidirectional/export", "--stages", "dmdd"],
            "dmdd holds no",
        ),
        (distill, EVALUATE, "arguments are required: --world"),
        (distill, [*EVALUATE, "--world", "OUT"], "There is no world at"),
        (distill, [*EVALUATE, "--world", "WORLD"], "only towns can be evaluated"),
        (
            distill,
            [*EVALUATE, "--world", "WORLD", "--device", "abacus"],
            "a device that torch can compute on here.*'abacus'",
        ),
        (worldmodel, ["inspect", TINY], "neither a safetensors file nor a torch.save file"),
        (
            worldmodel,
            ["inspect", "ROOT/runs/autoencoder/export/" + WEIGHTS],
            "not the weights of a Wan transformer",
        ),
        (benchmark, ["--world", "WORLD", "--set", "window=["], "a value in YAML"),
        (benchmark, ["--world", "WORLD", "--steps", "0"], "at least 1, got '0'"),
        (
            benchmark,
            ["--world", "WORLD", "--device", "meta"],
            "a device that torch can compute on here",
        ),
    ],
)
def test_commands(says, factory, tiny_bundle, tmp_path, monkeypatch, main, words, reason):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    places = {"OUT": tmp_path / "out", "ROOT": factory[0], "WORLD": tiny_bundle}
    for name, folder in places.items():
        words = [str(word).replace(name, str(folder)) for word in words]
    says(reason, main, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (KeyboardInterrupt(), 130, "game: stopped before the end."),
        (Stopped(15, "Halfway; go on."), 143, "game: Halfway; go on.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            1,
            "game: a/b: No space left on device; make room and start again.",
        ),
        (UserError("two\n  lines"), 2, "game: two lines\n"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"),
            1,
            "game: there is not enough memory (CUDA out of memory)",
        ),
    ],
)
def test_what_stops_a_command(capsys, error, status, sentence):
    def work():
        raise error

    assert command_line.run("game", work) == status
    assert capsys.readouterr().err.startswith(sentence)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("zip() argument 2 is shorter than argument 1"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        KeyError("frames"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_bug_keeps_its_traceback(capsys, error):
    def work():
        raise error

    assert command_line.run("game", work) == command_line.FAILED
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown and "in work" in shown
    assert f"{type(error).__name__}: {error}" in shown
    assert shown.splitlines()[-1] == (
        f"game: this is a bug of the program, not of your input. Its log is {user_log()}."
    )
    assert str(error) in user_log().read_text()

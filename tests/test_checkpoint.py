"""Checkpoints: the reference's names and wrappers, strictness, safety."""

import json
import pickle
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import Payload
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from worldmodel.__main__ import main
from worldmodel.client.loop import NO_CAMERA, Loop
from worldmodel.client.paths import tour
from worldmodel.client.scenes import Scenes
from worldmodel.controls import MOTIONS
from worldmodel.models.attention import Bidirectional
from worldmodel.models.prompts import PromptBook
from worldmodel.models.tiny_autoencoder import TinyAutoencoder
from worldmodel.session import Session
from worldmodel.worlds.catalog import find_world, published_worlds
from worldmodel.worlds.checkpoint import (
    find_weights,
    inspect,
    load_transformer,
    read_state,
)
from worldmodel.worlds.convert import Conversion, PublishedWorld, convert, open_vae
from worldmodel.worlds.hub import parse_source
from worldmodel.worlds.state_dict import CheckpointError, inspect_state, to_diffusers_names
from worldmodel.worlds.world import World

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
NAMES = json.loads((GOLDEN / "state_dict_names.json").read_text())
HEAD_DIM = NAMES["diffusers_config"]["attention_head_dim"]
FSDP = "model._fsdp_wrapped_module."


@pytest.fixture(scope="module")
def weights():
    return load_file(GOLDEN / "weights_big.safetensors")


def without_camera(state):
    return {name: tensor for name, tensor in state.items() if "prope" not in name}


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def test_names_are_the_verified_map(weights):
    expected = {
        name: new or name.replace("self_attn.prope_o", "attn1.prope_out")
        for name, new in NAMES["map_reference_to_diffusers"].items()
    }
    renamed = to_diffusers_names(weights)
    assert set(renamed) == set(expected.values())
    assert all(renamed[new] is weights[name] for name, new in expected.items())
    theirs = WanTransformer3DModel(**NAMES["diffusers_config"]).state_dict()
    assert {name: tensor.shape for name, tensor in without_camera(renamed).items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    assert to_diffusers_names(renamed) == renamed


@pytest.mark.parametrize(
    ("wrap", "part", "prefix"),
    [
        (lambda state: state, "", ""),
        (lambda state: prefixed(state, "model."), "", "model."),
        (
            lambda state: {"generator": prefixed(state, "model."), "critic": {}, "step": 3},
            "generator",
            "model.",
        ),
        (lambda state: {"generator_ema": prefixed(state, FSDP)}, "generator_ema", FSDP),
        (lambda state: {"model": prefixed(state, "module.")}, "model", "module."),
    ],
    ids=["bare", "wrapper", "trainer", "trainer-ema", "model"],
)
def test_wrappers_are_seen_through(weights, wrap, part, prefix):
    info = inspect_state(wrap(weights))
    assert (info.family, info.part, info.prefix, info.camera) == ("wan", part, prefix, True)
    config = info.config(attention_head_dim=HEAD_DIM)
    assert {
        key: list(value) if isinstance(value, tuple) else value for key, value in config.items()
    }.items() >= {
        key: value for key, value in NAMES["diffusers_config"].items() if key in config
    }.items()
    assert info.parameters == sum(tensor.numel() for tensor in weights.values())
    assert to_diffusers_names(wrap(weights)) == to_diffusers_names(weights)


def test_parts_and_checkpointed_blocks(weights):
    ema = {name: tensor + 1 for name, tensor in weights.items()}
    state = {"generator": prefixed(weights, "model."), "generator_ema": prefixed(ema, FSDP)}
    assert inspect_state(state).part == "generator_ema" and inspect_state(state).other_parts == (
        "generator",
    )
    assert torch.equal(
        to_diffusers_names(state, "generator")["proj_out.bias"], weights["head.head.bias"]
    )
    deep = {
        name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): tensor
        for name, tensor in weights.items()
    }
    assert to_diffusers_names(deep) == to_diffusers_names(weights)
    with pytest.raises(CheckpointError, match="has no part critic"):
        inspect_state(state, "critic")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_files_load_into_the_transformer(weights, tmp_path, kind):
    path = tmp_path / "weights.bin"  # the name says nothing
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(
            {"generator_ema": prefixed(weights, FSDP)},
            path,
            _use_new_zipfile_serialization=kind == "zip",
        )
    model = load_transformer(path, attention_head_dim=HEAD_DIM)
    expected = to_diffusers_names(weights)
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys() and all(
        torch.equal(loaded[name], expected[name]) for name in expected
    )
    assert model.config.num_attention_heads == 4 and model.config.camera


def test_model_agrees_with_diffusers_and_owns_its_memory(weights):
    state = without_camera(weights)
    theirs = WanTransformer3DModel(**NAMES["diffusers_config"]).eval()
    theirs.load_state_dict(to_diffusers_names(state))
    ours = load_transformer(
        state, attention_head_dim=HEAD_DIM, camera=True
    )  # the camera path starts at zero
    torch.manual_seed(0)
    latents = torch.randn(1, 16, 2, 4, 6)
    text = torch.randn(1, 5, 32)
    sigma = torch.tensor([0.5])
    projmats = torch.randn(1, 2, 4, 4) + 4 * torch.eye(4)
    context = Bidirectional(ours.layout(*latents.shape[3:]), 2, projmats)
    with torch.no_grad():
        expected = theirs(latents, 1000 * sigma, text, return_dict=False)[0]
        got = ours(latents, sigma, text, context)
        ours.proj_out.bias.zero_()
    assert torch.allclose(got, expected, atol=2e-5)
    assert weights["head.head.bias"].abs().max() > 0
    plain = load_transformer(
        weights, attention_head_dim=HEAD_DIM, camera=False, dtype=torch.bfloat16
    )
    assert plain.dtype == torch.bfloat16 and not any("prope" in name for name in plain.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.1.ffn.2.bias"), r"missing: blocks\.1\.ffn\.net\.2\.bias"),
        (
            lambda state: state.pop("blocks.2.self_attn.prope_o.bias"),
            r"missing: blocks\.2\.attn1\.prope_out\.bias",
        ),
        (lambda state: state.pop("patch_embedding.weight"), r"patch_embedding\.weight is missing"),
        (
            lambda state: state.update({"blocks.0.cross_attn.k_img.weight": torch.zeros(2)}),
            r"no such tensors: blocks\.0\.cross_attn\.k_img\.weight",
        ),
        (
            lambda state: state.update({"head.head.bias": torch.zeros(3)}),
            r"wrong shape: proj_out\.bias \[3\] instead of \[64\]",
        ),
        (
            lambda state: state.update({"model.head.head.bias": torch.zeros(64)}),
            r"two tensors for head\.head\.bias",
        ),
        (lambda state: state.update({"step": 5}), "found other things: step"),
        (lambda state: state.clear(), "nothing in it"),
    ],
)
def test_misfits_are_named(weights, change, message):
    state = dict(weights)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        load_transformer(state, attention_head_dim=HEAD_DIM)


def test_what_shapes_do_not_tell_is_asked_for(weights):
    with pytest.raises(CheckpointError, match="give attention_head_dim"):
        load_transformer(weights)
    with pytest.raises(CheckpointError, match="unknown configuration key 'heads'"):
        load_transformer(weights, attention_head_dim=HEAD_DIM, heads=4)
    assert load_transformer(weights, num_attention_heads=4).config.attention_head_dim == HEAD_DIM
    with pytest.raises(
        CheckpointError, match=r"not the weights of a Wan transformer.*found conv\.weight"
    ):
        inspect_state({"conv.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    "save",
    [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))],
    ids=["torch", "pickle"],
)
def test_code_in_a_file_never_runs(tmp_path, save):
    path = tmp_path / "weights.pt"
    made = tmp_path / "executed"
    save({"generator": Payload(made)}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        read_state(path)
    assert not made.exists()
    pickle.loads(pickle.dumps(Payload(made)))  # the payload is real
    assert made.exists()


def test_broken_files_are_refused(weights, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        read_state(path)
    torch.save(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        read_state(path)
    for left in (
        b"version https://git-lfs.github.com/spec/v1",
        b"",
        b"\x10\x00",
    ):  # git without lfs; a download that hardly began
        path.write_bytes(left)
        with pytest.raises(
            CheckpointError,
            match=f"stands for a file that was not fetched, it holds {len(left)} bytes",
        ):
            read_state(path)
    path.write_bytes(b"<!DOCTYPE html><html>")
    with pytest.raises(CheckpointError, match="neither"):
        read_state(path)
    with pytest.raises(FileNotFoundError, match="no weights file"):
        read_state(tmp_path / "absent")


def shards(state, folder, count=2):
    """The state as sharded safetensors with an index; returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {}
    names = sorted(state)
    for number in range(count):
        file = f"diffusion_pytorch_model-{number + 1:05}-of-{count:05}.safetensors"
        part = names[number::count]
        save_file({name: state[name].contiguous() for name in part}, folder / file)
        table |= dict.fromkeys(part, file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return index


def training(state, folder, stage="dmd", **networks):
    """A checkpoint folder as our training leaves it."""
    folder.mkdir(parents=True)
    for name, tensors in {"student": state, **networks}.items():
        save_file(tensors, folder / f"{name}.safetensors")
    save_file({"0.step": torch.zeros(1)}, folder / "optimizer-student.safetensors")
    config = {
        "data": {},
        "optimiser": {},
        stage: {"lr": 1e-3},
        "model": {"head_dim": HEAD_DIM},
        "run": {},
    }
    (folder / "state.json").write_text(json.dumps({"step": 12, "drawn": 96, "config": config}))
    return folder


def test_sharded_weights(weights, tmp_path):
    index = shards(weights, tmp_path / "wan")
    read = read_state(index)
    assert read.keys() == weights.keys() and all(
        torch.equal(read[name], weights[name]) for name in weights
    )
    assert read_state(tmp_path / "wan").keys() == weights.keys()
    second = index.with_name("diffusion_pytorch_model-00002-of-00002.safetensors")
    tensors = load_file(second)
    name = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, second)
    with pytest.raises(CheckpointError, match=rf"00002-of-00002.safetensors lacks {name}:"):
        read_state(index)
    save_file({**tensors, "stray": torch.zeros(1)}, second)
    with pytest.raises(CheckpointError, match="also holds stray:"):
        read_state(index)
    second.write_bytes(second.read_bytes()[:500])
    with pytest.raises(
        CheckpointError, match=r"00002-of-00002.safetensors is damaged or incomplete"
    ):
        read_state(index)
    second.unlink()
    with pytest.raises(
        CheckpointError,
        match=r"00002-of-00002.safetensors is missing, which diffusion_pytorch_model",
    ):
        read_state(index)
    index.write_text(index.read_text()[:100])
    with pytest.raises(ValueError, match="is not an index of weights files"):
        read_state(index)


def test_folders(weights, tmp_path):
    (wan := tmp_path / "wan").mkdir()
    with pytest.raises(CheckpointError, match="wan holds no transformer's weights: name the file"):
        read_state(wan)
    torch.save({"encoder.conv1.weight": torch.zeros(1)}, wan / "vae.pth")
    save_file({"shared.weight": torch.zeros(1)}, wan / "a_text_encoder.safetensors")
    save_file(weights, wan / "zz.safetensors")  # neither its name nor its place says it
    assert find_weights(wan).name == "zz.safetensors" and inspect(wan).head_dim is None
    (wan / "config.json").write_text(
        json.dumps({"_class_name": "WanModel", "dim": 96, "num_heads": 4})
    )
    assert (
        inspect(wan).head_dim == HEAD_DIM
        and load_transformer(str(wan)).config.num_attention_heads == 4
    )
    (wan / "config.json").write_text(json.dumps({"_class_name": "UMT5", "dim": 96, "num_heads": 4}))
    assert inspect(wan).head_dim is None
    save_file(weights, wan / "another.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"holds 2 transformers, another.safetensors, zz.safetensors: name the file",
    ):
        read_state(wan)


def test_our_training(weights, tmp_path):
    average = {name: tensor + 1 for name, tensor in weights.items()}
    folder = training(
        to_diffusers_names(weights),
        tmp_path / "step-12",
        average=to_diffusers_names(average),
        critic={"x": torch.zeros(1)},
    )
    info = inspect(folder)
    assert (info.part, info.other_parts, info.stage, info.head_dim) == (
        "average",
        ("critic", "student"),
        "dmd, step 12",
        HEAD_DIM,
    )
    assert torch.equal(load_transformer(folder).proj_out.bias, average["head.head.bias"])
    assert torch.equal(
        load_transformer(folder, part="student").proj_out.bias, weights["head.head.bias"]
    )
    (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="state.json is damaged or of another program"):
        inspect(folder)
    (coder := tmp_path / "step-3").mkdir()
    (coder / "state.json").write_text(json.dumps({"step": 3, "config": {"autoencoder": {}}}))
    with pytest.raises(
        CheckpointError, match="holds no transformer's weights: name the checkpoint of a stage"
    ):
        inspect(coder)


def test_half_precision_keeps_what_diffusers_keeps(weights):
    model = load_transformer(weights, attention_head_dim=HEAD_DIM, dtype=torch.bfloat16)
    precise = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert precise == {
        name
        for name in model.state_dict()
        if any(part in name for part in ("time_embedder", "scale_shift_table", "norm2"))
    }


def test_inspect_command(weights, tmp_path, capsys):
    path = tmp_path / "any.name"
    torch.save({"generator": prefixed(weights, "model."), "critic": {}, "step": 600}, path)
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert all(
        words in said
        for words in (
            "wan, prefix 'model.'",
            "PRoPE",
            "96",
            "step 600",
            "critic",
            "unknown: give their width",
        )
    )
    assert main(["inspect", str(training(to_diffusers_names(weights), tmp_path / "s"))]) == 0
    assert (
        "4 of 24, from the file next to the weights" in (said := capsys.readouterr().out)
        and "dmd, step 12" in said
    )
    for source, reason in (
        (tmp_path / "absent", "no file or folder"),
        ("no where", "no file or folder"),
        (path, "neither"),
    ):
        path.write_bytes(b"nothing at all")
        assert main(["inspect", str(source)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("inspect: ") and reason in said and said.count("\n") == 1


# -------------------- worlds of published weights

SIZE = "height: 32\nwidth: 48\n"
YAML = (
    """
title: Noise of others
source: {source}
autoencoder: {autoencoder}
licence: Apache-2.0.
prompt: a street of noise
"""
    + SIZE
    + """
envelope: {{forward: 0.08, strafe: 0.08, yaw: 3.0, pitch: 3.0, style: fly}}
rollout: {{steps: [1000, 500], first_steps: [1000, 750], window: 6, chunk: {chunk}}}
"""
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder: `vae/` and `prompts.safetensors` to go with the weights, which are returned too."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(3)
    AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1).save_pretrained(folder / "vae")
    PromptBook(
        {"default": torch.randn(4, 24), "other": torch.randn(4, 24)}, {"default": "noise"}
    ).save(folder / "prompts.safetensors")
    return folder, load_file(GOLDEN / "weights_cd_teacher.safetensors")


def recipe(folder, published, chunk=1, source="no/where/x.pt"):
    path = folder / "mine.yaml"
    path.write_text(YAML.format(source=source, autoencoder=published[0] / "vae", chunk=chunk))
    return path


def original(state, folder):
    """Wan-AI/Wan2.1-T2V-14B: the original names in shards."""
    shards(without_camera(state), folder)
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "WanModel", "dim": 48, "num_heads": 2})
    )
    return folder, {}


def diffusers(state, folder):
    """Wan-AI/Wan2.1-T2V-1.3B-Diffusers."""
    load_transformer(without_camera(state), attention_head_dim=HEAD_DIM).save_pretrained(
        folder / "transformer"
    )
    return folder, {}


def minwm(state, folder):
    """MIN-Lab/minWM: a trainer's file with camera weights."""
    torch.save({"generator": prefixed(state, FSDP), "step": 9}, folder / "model.pt")
    return folder / "model.pt", {"--head-dim": HEAD_DIM}


def forcing(state, folder):
    """zhuhz22/Causal-Forcing, gdhe17/Self-Forcing: the average next to the generator, no camera."""
    wrong = {name: tensor + 1 for name, tensor in without_camera(state).items()}
    torch.save(
        {
            "generator": prefixed(wrong, "model."),
            "generator_ema": prefixed(without_camera(state), FSDP),
        },
        folder / "dmd.pt",
    )
    return folder / "dmd.pt", {"--head-dim": HEAD_DIM}


def ours(state, folder):
    """runs/X/dmd/checkpoints/step-12."""
    wrong = {name: tensor + 1 for name, tensor in to_diffusers_names(state).items()}
    return training(wrong, folder / "step-12", average=to_diffusers_names(state)), {}


@pytest.mark.parametrize(
    ("form", "camera", "chunk"),
    [
        (original, False, 1),
        (diffusers, False, 1),
        (minwm, True, 4),
        (forcing, False, 3),
        (ours, True, 1),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_published_form_is_played(published, tmp_path, play, form, camera, chunk, capsys):
    """Converted, and played for 30 latents (with whole chunks, 32) as a user does it."""
    (tmp_path / "in").mkdir()
    source, options = form(published[1], tmp_path / "in")
    output = tmp_path / "worlds" / "theirs"
    command = ["convert", source, "--world", recipe(tmp_path, published, chunk), "--output", output]
    command += [
        "--prompts",
        published[0] / "prompts.safetensors",
        *(word for pair in options.items() for word in pair),
    ]
    assert main([str(word) for word in command]) == 0, capsys.readouterr().err
    world = World.from_pretrained(output, dtype=torch.float32)
    assert torch.equal(
        world.transformer.proj_out.weight, published[1]["head.head.weight"].bfloat16().float()
    )
    assert (world.config.name, world.prompts.names, world.transformer.config.camera) == (
        "theirs",
        ("default", "other"),
        camera,
    )
    assert set(world.config.envelope.locked) == (
        {"rise", "sink", "run"} if camera else set(MOTIONS)
    )
    assert str(source) in world.config.licence and "Apache-2.0" in world.config.licence
    assert ("cannot be steered" in world.config.title) == (not camera)
    assert not (output / "README.md").exists()
    loop = Loop(lambda tell: Scenes(world))
    loop.open()
    assert (NO_CAMERA in loop.notices) == (not camera)
    path = f"w*12,l*{18 - chunk}" if camera else f"wait*{30 - chunk}"
    walk = ["--headless", "--trajectory", path, "--threads", "1"]
    words = ["--world", str(output), *walk, "--output", str(tmp_path / "walk.mp4")]
    capsys.readouterr()
    assert play(words) == 0
    printed = capsys.readouterr().out
    report = json.loads(printed)
    assert (report["world"], report["latents"]) == ("theirs", 32 if chunk == 4 else 30)
    with av.open(str(tmp_path / "walk.mp4")) as film:
        pictures = [frame.to_ndarray(format="rgb24").astype(int) for frame in film.decode(video=0)]
    assert (
        len(pictures) == 4 * report["latents"] - 3
        and min(picture.std() for picture in pictures) > 0
    )
    assert (
        np.abs(pictures[-1] - pictures[4 * chunk]).mean() > 1
    )  # it moves on by itself, or is steered


def test_a_published_world_that_cannot_be_steered_refuses_keys(published, tmp_path, play, capsys):
    source, _ = diffusers(published[1], tmp_path)
    asked = Conversion(source=str(source), prompts=published[0] / "prompts.safetensors")
    world = convert(PublishedWorld.read(recipe(tmp_path, published)), tmp_path / "theirs", asked)
    assert len(tour(world.config.envelope)) >= 24  # standing still
    session = Session(world)
    frames = [session.step(np.eye(4)).frames for _ in range(2)]
    session.rewind(1)
    assert np.array_equal(session.step(np.eye(4)).frames, frames[1])
    assert (
        play(
            [
                "--world",
                str(tmp_path / "theirs"),
                "--headless",
                "--trajectory",
                "w*3",
                "--output",
                str(tmp_path / "walk.mp4"),
            ]
        )
        == 2
    )
    assert "'w' is locked: this world has not learned that motion" in capsys.readouterr().err


def test_worlds_are_converted_too(tiny_bundle, tmp_path):
    """A bundle gives both networks; another number type, another size of steps."""
    book = tmp_path / "prompts.safetensors"
    PromptBook({"grey": torch.randn(3, 8)}).save(book)
    path = tmp_path / "again.yaml"
    path.write_text(YAML.format(source=tiny_bundle, autoencoder=tiny_bundle, chunk=1))
    world = convert(
        PublishedWorld.read(path), tmp_path / "again", Conversion(prompts=book, dtype="float32")
    )
    opened = World.from_pretrained(tmp_path / "again", dtype=torch.float32)
    stored = load_file(tiny_bundle / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(
        torch.equal(tensor, stored[name])
        for name, tensor in opened.transformer.state_dict().items()
    )
    assert (
        opened.config == world.config
        and opened.config.prompts.default == "grey"
        and not opened.config.text_encoder
    )


def cached_repository(cache, name):
    """An empty snapshot of a repository in the hub library's cache."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots/0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs/main").write_text(snapshot.name)
    return snapshot


def test_a_repository_on_the_hub(published, tmp_path, monkeypatch):
    """One diffusers repository gives transformer, autoencoder and the text encoder's name, another
    the tiny autoencoder.
    """
    repository = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    tiny = PublishedWorld.tiny_autoencoder
    snapshot, light = (
        cached_repository(tmp_path / "hub", name) for name in (repository, "lightx2v/Autoencoders")
    )
    diffusers(published[1], snapshot)
    shutil.copytree(published[0] / "vae", snapshot / "vae")
    torch.save(TinyAutoencoder().state_dict(), light / "taew2_1.pth")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = []

    def embed(text, place, shape, device, dtype, progress):
        asked.append((text, place, shape))
        return torch.full(shape, float(len(asked)))

    monkeypatch.setattr("worldmodel.worlds.convert.embed_text", embed)
    monkeypatch.setattr("worldmodel.worlds.convert.libraries", lambda *_: None)
    monkeypatch.setattr("worldmodel.worlds.catalog.published_worlds", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    text = (
        YAML.format(source=repository, autoencoder=repository, chunk=1)
        + f"text_encoder: {repository}\nnegative: a grey blur\n"
    )
    (tmp_path / "mine.yaml").write_text(text)
    folder = find_world("mine")
    assert folder == tmp_path / "user/worldmodel/worlds/mine"
    assert asked == [
        (sentence, repository, (512, 24)) for sentence in ("a street of noise", "a grey blur")
    ]
    world = World.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(
        world.prompts.unconditional, torch.full((512, 24), 2.0)
    ) and world.prompts.names == ("default",)
    assert (
        world.prompts.text("default") == "a street of noise"
        and world.config.text_encoder == repository
    )
    assert Session(world).first.frames.shape == (1, 32, 48, 3)
    world = World.from_pretrained(find_world("mine-tiny"), dtype=torch.float32)
    assert (world.folder.name, world.config.name) == ("mine-tiny", "mine-tiny") and isinstance(
        world.autoencoder, TinyAutoencoder
    )
    assert f"autoencoder {tiny}." in world.config.licence
    assert Session(world).first.frames.shape == (1, 32, 48, 3)
    shutil.rmtree(tmp_path / "hub")
    assert find_world("mine") == folder and len(asked) == 4  # made once
    shutil.rmtree(folder.parent)
    with pytest.raises(
        ValueError,
        match=(
            rf"mine could not be made: transformer/.* of {repository} cannot be had: "
            rf"HF_HUB_OFFLINE"
        ),
    ):
        find_world("mine")
    assert not folder.exists()
    with pytest.raises(
        ValueError,
        match=(
            r"mine-tiny could not be made: .*/mine.yaml --output \S+/mine-tiny "
            r"--autoencoder SOURCE"
        ),
    ):
        find_world("mine-tiny")
    with pytest.raises(
        ValueError,
        match=(
            "no world 'min'.*those of published weights, fetched on first use, are mine .NAME-tiny:"
        ),
    ):
        find_world("min")


@pytest.mark.parametrize("missing", ["transformers", "ftfy"])
def test_what_the_text_encoder_needs_is_asked_for_before_anything_is_fetched(
    published, tmp_path, monkeypatch, missing
):
    for name in ("transformers", "ftfy"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else sys)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(
        "worldmodel.worlds.convert.fetch", lambda *_: pytest.fail("something was fetched")
    )
    with pytest.raises(
        ValueError,
        match=(
            rf"minwm-4step could not be made: .* needs {missing}, .*pip install "
            rf"transformers ftfy.*--prompts"
        ),
    ):
        find_world("minwm-4step")
    with pytest.raises(ValueError, match="A world needs a stored prompt"):
        convert(PublishedWorld.read(recipe(tmp_path, published)), tmp_path / "theirs")


def test_the_worlds_of_this_repository(tmp_path, monkeypatch):
    monkeypatch.setattr("worldmodel.worlds.convert.libraries", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    causal = "zhuhz22/Causal-Forcing"
    own = "MIN-Lab/minWM/Wan21/Action2V"
    expected = {
        "minwm-4step": (f"{own}/dmd/model.pt", 4, 4, 20, 0.08),
        "causal-forcing-4step": (f"{causal}/framewise/causal_forcing.pt", 4, 1, 21, None),
        "causal-forcing-2step": (f"{causal}/causal-forcing++/framewise-2step.pt", 2, 1, 21, None),
        "causal-forcing-1step": (f"{causal}/causal-forcing++/framewise-1step.pt", 1, 1, 21, None),
        "causal-forcing-chunk-4step": (f"{causal}/chunkwise/causal_forcing.pt", 4, 3, 21, None),
        "self-forcing-chunk-4step": (
            "gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt",
            4,
            3,
            21,
            None,
        ),
    }
    assert {path.stem for path in published_worlds().glob("*.yaml")} == expected.keys()
    for name, (source, steps, chunk, window, speed) in expected.items():
        world = PublishedWorld.read(published_worlds() / f"{name}.yaml")
        assert (
            world.source,
            len(world.rollout.steps),
            world.rollout.chunk,
            world.rollout.window,
        ) == (source, steps, chunk, window)
        assert (
            world.height,
            world.width,
            world.fps,
            world.rollout.shift,
            len(world.rollout.first_steps),
        ) == (480, 832, 16.0, 5.0, 4)
        assert speed is None or (world.envelope.forward, world.envelope.yaw) == (speed, 3.0)
        place = parse_source(source)
        reason = re.escape(
            f"The world {name} could not be made: {place.path} of {place.repository} cannot be "
            "had: HF_HUB_OFFLINE is set"
        )
        with pytest.raises(ValueError, match=f"{reason}.* --output"):
            find_world(name)


def test_tiny_autoencoders(tmp_path):
    tiny = TinyAutoencoder()
    torch.save(tiny.state_dict(), tmp_path / "taew2_1.pth")
    for path in (tmp_path, tmp_path / "taew2_1.pth"):
        opened = open_vae(path, torch.bfloat16)
        assert torch.equal(opened.decoder[1].weight, tiny.decoder[1].weight.bfloat16())
    video = torch.rand(1, 3, 1, 16, 16)
    assert torch.equal(open_vae(path).encode(video), tiny.encode(video))
    torch.save({"encoder.conv1.weight": torch.zeros(1)}, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(
        ValueError,
        match=r"Wan2.1_VAE.pth is not a tiny autoencoder.*missing: encoder.0.weight.*give vae/",
    ):
        open_vae(tmp_path / "Wan2.1_VAE.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no autoencoder"):
        open_vae(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"--world": "absent.yaml"},
            r"absent.yaml cannot be read as a published world \(No such file or directory\)",
        ),
        (
            {"--world": "mine.yaml", "text": "title: x\nsauce: y"},
            "mine.yaml: unknown key 'sauce'; did you mean 'source'",
        ),
        ({"--world": "mine.yaml", "text": "title: x"}, "the key 'source' is missing"),
        ({"--output": "full"}, "expected the output as a new name or an older world"),
        ({"--prompts": "absent.safetensors"}, "absent.safetensors cannot be read"),
        ({"--prompts": None}, "A world needs a stored prompt: give --prompts"),
        ({"--prompts": "wide.safetensors"}, "prompts have 25 features, the transformer reads 24"),
        ({"--autoencoder": "full"}, "full holds no autoencoder"),
        ({"--autoencoder": "nowhere.pth"}, "there is no file or folder 'nowhere.pth'"),
        ({"--head-dim": "20"}, "do not make the width 48"),
        ({"--part": "critic"}, "has no part critic"),
        ({"--dtype": "int8"}, "invalid choice: 'int8'"),
        ({"source": "half.pt"}, r"half.pt is damaged or incomplete"),
        ({"source": "code.pt"}, "could run code, so it was not loaded"),
        ({"source": "full"}, "full holds no transformer's weights"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_conversions_that_cannot_be(published, tmp_path, monkeypatch, capsys, change, reason):
    monkeypatch.chdir(tmp_path)
    source, _ = minwm(published[1], tmp_path)
    recipe(tmp_path, published)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "half.pt").write_bytes(source.read_bytes()[:9000])
    torch.save({"generator": Payload(tmp_path / "executed")}, tmp_path / "code.pt")
    PromptBook({"default": torch.zeros(2, 25)}).save(tmp_path / "wide.safetensors")
    if "text" in change:
        (tmp_path / "mine.yaml").write_text(change["text"])
    before = sorted(path.name for path in tmp_path.iterdir())
    given = {
        "--world": "mine.yaml",
        "--output": "theirs",
        "--prompts": str(published[0] / "prompts.safetensors"),
        "--head-dim": "24",
    }
    given |= {key: value for key, value in change.items() if key.startswith("--")}
    words = [word for key, value in given.items() if value is not None for word in (key, value)]
    assert main(["convert", change.get("source", str(source)), *words]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("convert: ") and re.search(reason, said), said
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == before
        and (tmp_path / "full/notes.txt").is_file()
    )


def test_an_older_world_stays_until_the_new_one_is_there(published, tmp_path):
    source, _ = minwm(published[1], tmp_path)
    world = PublishedWorld.read(recipe(tmp_path, published))
    good = Conversion(
        source=str(source), prompts=published[0] / "prompts.safetensors", head_dim=HEAD_DIM
    )
    convert(world, tmp_path / "theirs", good)
    before = (tmp_path / "theirs/world.yaml").read_text()
    with pytest.raises(CheckpointError):
        convert(world, tmp_path / "theirs", replace(good, head_dim=7))
    assert (tmp_path / "theirs/world.yaml").read_text() == before
    convert(replace(world, title="Second"), tmp_path / "theirs", good)
    assert World.from_pretrained(tmp_path / "theirs").config.title == "Second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "model.pt", "theirs"]

"""Checkpoints: the reference's names and wrappers, strictness, safety."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from worldmodel.checkpoint import CheckpointError, inspect_state, load_transformer, main, read_state, to_diffusers_names

GOLDEN = Path(__file__).parent / "golden"
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
        (lambda state: {"generator": prefixed(state, "model."), "critic": {}, "step": 3}, "generator", "model."),
        (lambda state: {"generator_ema": prefixed(state, FSDP)}, "generator_ema", FSDP),
        (lambda state: {"model": prefixed(state, "module.")}, "model", "module."),
    ],
    ids=["bare", "wrapper", "trainer", "trainer-ema", "model"],
)
def test_wrappers_are_seen_through(weights, wrap, part, prefix):
    info = inspect_state(wrap(weights))
    assert (info.family, info.part, info.prefix, info.camera) == ("wan", part, prefix, True)
    config = info.config(attention_head_dim=HEAD_DIM)
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}.items() >= {
        key: value for key, value in NAMES["diffusers_config"].items() if key in config
    }.items()
    assert info.parameters == sum(tensor.numel() for tensor in weights.values())
    assert to_diffusers_names(wrap(weights)) == to_diffusers_names(weights)


def test_parts_and_checkpointed_blocks(weights):
    ema = {name: tensor + 1 for name, tensor in weights.items()}
    state = {"generator": prefixed(weights, "model."), "generator_ema": prefixed(ema, FSDP)}
    assert inspect_state(state).part == "generator_ema" and inspect_state(state).other_parts == ("generator",)
    assert torch.equal(to_diffusers_names(state, "generator")["proj_out.bias"], weights["head.head.bias"])
    deep = {
        name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): tensor for name, tensor in weights.items()
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
        torch.save({"generator_ema": prefixed(weights, FSDP)}, path, _use_new_zipfile_serialization=kind == "zip")
    model = load_transformer(path, attention_head_dim=HEAD_DIM)
    expected = to_diffusers_names(weights)
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert model.config.num_attention_heads == 4 and model.config.camera


def test_model_agrees_with_diffusers_and_owns_its_memory(weights):
    state = without_camera(weights)
    theirs = WanTransformer3DModel(**NAMES["diffusers_config"]).eval()
    theirs.load_state_dict(to_diffusers_names(state))
    ours = load_transformer(state, attention_head_dim=HEAD_DIM, camera=True)  # the camera path starts at zero
    torch.manual_seed(0)
    latents, text, sigma = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 5, 32), torch.tensor([0.5])
    projection = torch.randn(1, 2, 4, 4) + 4 * torch.eye(4)
    with torch.no_grad():
        expected = theirs(latents, 1000 * sigma, text, return_dict=False)[0]
        got = ours(latents, sigma, text, projection)
        ours.proj_out.bias.zero_()
    assert torch.allclose(got, expected, atol=2e-5)
    assert weights["head.head.bias"].abs().max() > 0
    plain = load_transformer(weights, attention_head_dim=HEAD_DIM, camera=False, dtype=torch.bfloat16)
    assert plain.dtype == torch.bfloat16 and not any("prope" in name for name in plain.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.1.ffn.2.bias"), r"missing: blocks\.1\.ffn\.net\.2\.bias"),
        (lambda state: state.pop("blocks.2.self_attn.prope_o.bias"), r"missing: blocks\.2\.attn1\.prope_out\.bias"),
        (lambda state: state.pop("patch_embedding.weight"), r"patch_embedding\.weight is missing"),
        (
            lambda state: state.update({"blocks.0.cross_attn.k_img.weight": torch.zeros(2)}),
            r"no such tensors: blocks\.0\.cross_attn\.k_img\.weight",
        ),
        (
            lambda state: state.update({"head.head.bias": torch.zeros(3)}),
            r"wrong shape: proj_out\.bias \[3\] instead of \[64\]",
        ),
        (lambda state: state.update({"model.head.head.bias": torch.zeros(64)}), r"two tensors for head\.head\.bias"),
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
    with pytest.raises(CheckpointError, match=r"not the weights of a Wan transformer.*found conv\.weight"):
        inspect_state({"conv.weight": torch.zeros(1)})


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["torch", "pickle"]
)
def test_code_in_a_file_never_runs(tmp_path, save):
    path, made = tmp_path / "weights.pt", tmp_path / "executed"
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
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match="neither"):
        read_state(path)
    with pytest.raises(FileNotFoundError, match="no weights file"):
        read_state(tmp_path / "absent")


def test_inspect_command(weights, tmp_path, capsys):
    path = tmp_path / "any.name"
    save_file(prefixed(weights, "model."), path)
    assert main(["inspect", str(path)]) == 0
    assert "wan, prefix 'model.'" in (text := capsys.readouterr().out) and "PRoPE" in text and "96" in text
    path.write_bytes(b"nothing")
    assert main(["inspect", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1

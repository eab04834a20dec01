"""Bundles: written, opened, and what broken ones are told."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml

from worldmodel.device import fast_dtype
from worldmodel.images import read_image
from worldmodel.models.prompts import PromptBook
from worldmodel.worlds.world import World, WorldConfig, save_world


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "tiny")


def edit(bundle, **changes):
    path = bundle / "world.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def test_round_trip(tiny_world, tmp_path):
    pictures = {
        name: [tiny_world.image(image) for image in tiny_world.images(name)]
        for name in tiny_world.config.images
    }
    folder = tmp_path / "again"
    save_world(
        folder,
        tiny_world.config,
        tiny_world.transformer,
        tiny_world.autoencoder,
        tiny_world.prompts,
        pictures,
    )
    again = World.from_pretrained(folder, dtype=torch.float32)
    assert again.config == tiny_world.config and again.prompts.text("grey") == "grey noise"
    for part in ("transformer", "autoencoder"):
        before = getattr(tiny_world, part).state_dict()
        after = getattr(again, part).state_dict()
        assert before.keys() == after.keys() and all(
            torch.equal(before[name], after[name]) for name in before
        )
    np.testing.assert_array_equal(again.image("loud-1.png"), tiny_world.image("loud-1"))
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    assert again.latent_size == (4, 6) and again.fingerprint != ""


def test_opens_in_the_fast_type(tiny_bundle):
    world = World.from_pretrained(tiny_bundle)
    assert world.dtype == fast_dtype("cpu") == world.transformer.patch_embedding.weight.dtype
    assert not any(parameter.requires_grad for parameter in world.transformer.parameters())


def test_fingerprint(tiny_world, copy):
    edit(copy, title="A better title")
    assert World.from_pretrained(copy).fingerprint == tiny_world.fingerprint
    edit(copy, rollout={"window": 5})
    assert World.from_pretrained(copy).fingerprint != tiny_world.fingerprint
    edit(copy, rollout=yaml.safe_load(tiny_world.config.text())["rollout"])
    assert World.from_pretrained(copy).fingerprint == tiny_world.fingerprint
    book = PromptBook.load(copy / "prompts.safetensors")
    PromptBook({name: book[name] + 1e-3 for name in book.names}).save(copy / "prompts.safetensors")
    assert World.from_pretrained(copy).fingerprint != tiny_world.fingerprint


def test_what_guided_dreams_keep_away_from_is_no_prompt(tmp_path):
    rows = {"grey": torch.ones(2, 3), "": torch.full((2, 3), 0.5)}
    PromptBook(rows).save(tmp_path / "book.safetensors")
    book = PromptBook.load(tmp_path / "book.safetensors")
    assert book.names == ("grey",) and "" not in book and torch.equal(book.unconditional, rows[""])
    assert torch.equal(PromptBook({"grey": rows["grey"]}).unconditional, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="Unknown prompt ''"):
        book[""]


def test_failed_save_keeps_the_old_world(tiny_world, copy):
    before = sorted(path.name for path in copy.parent.iterdir())
    parts = tiny_world.config, tiny_world.transformer, tiny_world.autoencoder, tiny_world.prompts
    with pytest.raises(ValueError, match="uint8"):
        save_world(copy, *parts, {"grey": [np.zeros((5, 5, 3), np.uint8)]})
    assert sorted(path.name for path in copy.parent.iterdir()) == before
    assert World.from_pretrained(copy).fingerprint == tiny_world.fingerprint
    save_world(copy, *parts, {})
    assert World.from_pretrained(copy).images("grey") == ()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: (b / "world.yaml").unlink(), "world.yaml is missing"),
        (lambda b: shutil.rmtree(b / "autoencoder"), "autoencoder/config.json is missing"),
        (lambda b: (b / "images" / "loud-0.png").unlink(), "images/loud-0.png is missing"),
        (lambda b: edit(b, format=2), "format 2, .*update this program"),
        (lambda b: edit(b, format="doom"), "format 'doom', .*not one of"),
        (lambda b: edit(b, heigth=3), "unknown key 'heigth'; did you mean 'height'"),
        (lambda b: edit(b, height="tall"), "height must be a whole number, got 'tall'"),
        (
            lambda b: edit(b, envelope={"foward": 1.0}),
            "envelope: unknown key 'foward'; did you mean 'forward'",
        ),
        (lambda b: edit(b, rollout={"window": 0}), "rollout: chunk must be"),
        (lambda b: edit(b, intrinsics=[0.5, 0.5, 0.3, 0.5]), "intrinsics must be"),
        (lambda b: edit(b, height=36), "do not divide into tokens of 16x16"),
        (lambda b: edit(b, prompts={"default": "gray"}), "did you mean 'grey'"),
        (lambda b: (b / "world.yaml").write_text("a: ["), "cannot be read as YAML"),
        (
            lambda b: (b / "prompts.safetensors").write_bytes(b"12345"),
            "prompts.safetensors cannot be read",
        ),
        (lambda b: (b / "transformer" / "config.json").write_text("{"), "config.json is damaged"),
        (
            lambda b: (b / "transformer" / "config.json").write_text('{"_class_name": "UNet"}'),
            "holds a UNet",
        ),
    ],
)
def test_broken_bundles(copy, spoil, message):
    spoil(copy)
    with pytest.raises(ValueError, match=message) as caught:
        World.from_pretrained(copy)
    assert "\n" not in str(caught.value)


def test_broken_weights(copy):
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cut off or damaged"):
        World.from_pretrained(copy)
    weights.unlink()
    with pytest.raises(
        ValueError, match="transformer/diffusion_pytorch_model.safetensors is missing"
    ):
        World.from_pretrained(copy)
    weights.write_bytes(whole)
    config = json.loads((copy / "transformer" / "config.json").read_text())
    for change in ({"ffn_dim": 32}, {"num_layers": 3}, {"num_layers": 1}):
        (copy / "transformer" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match="transformer"):
            World.from_pretrained(copy)


def test_unknown_names(tiny_world, tiny_bundle):
    with pytest.raises(ValueError, match="no world at .*there are tiny"):
        World.from_pretrained(tiny_bundle.parent / "blokcs")
    with pytest.raises(ValueError, match="did you mean 'loud'"):
        tiny_world.prompts["load"]
    with pytest.raises(ValueError, match="did you mean 'grey-1'"):
        tiny_world.image("gray-1")
    with pytest.raises(ValueError, match="no complete PNG"):
        read_image(tiny_bundle / "world.yaml")
    with pytest.raises(ValueError, match="missing"):
        WorldConfig.read(_yaml(tiny_bundle, "title"))


def _yaml(bundle, without):
    values = yaml.safe_load((bundle / "world.yaml").read_text())
    values.pop(without)
    path = bundle.parent / "partial.yaml"
    path.write_text(yaml.safe_dump(values))
    return path

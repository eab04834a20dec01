"""Bundles: writing, opening, and the messages for broken ones."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from worldmodel.device import fast_dtype
from worldmodel.errors import UserError
from worldmodel.images import read_image
from worldmodel.models.prompts import PromptBook
from worldmodel.worlds.config import WorldConfig
from worldmodel.worlds.world import World, save_world

ROOT = Path(__file__).parent.parent


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


def as_format_1(bundle, **retired):
    """Rewrite world.yaml as the first edition wrote it."""
    path = bundle / "world.yaml"
    values = yaml.safe_load(path.read_text()) | {"format": 1}
    defaults = {"merge_clean": False, "cache_gradient": "detached", "context_sigma": 0.0}
    values["rollout"] |= defaults | retired
    for key in ("labels", "earlier_fingerprints"):
        del values[key]
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def test_format_1_is_read(tiny_world, copy, caplog):
    as_format_1(copy)
    world = World.from_pretrained(copy)
    own, first_edition = world.fingerprints
    assert own == world.fingerprint == tiny_world.fingerprint and first_edition != own
    assert tiny_world.fingerprints == (own,) and world.config == tiny_world.config
    assert not caplog.records


def test_retired_options_are_named(copy, caplog):
    as_format_1(copy, merge_clean=True, context_sigma=0.005)
    config = WorldConfig.read(copy / "world.yaml")
    assert config.format == 2 and len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "(merge_clean: True, context_sigma: 0.005)" in message and "\n" not in message
    values = yaml.safe_load((copy / "world.yaml").read_text())
    values["rollout"]["merge_cleen"] = True
    (copy / "world.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="unknown key 'merge_cleen'"):
        WorldConfig.read(copy / "world.yaml")


def test_the_embedded_world_answers_to_its_first_edition():
    """Recordings of the first edition hold this fingerprint; the wheel leaves stages/ out, so it
    cannot be computed there.
    """
    world = ROOT / "assets" / "worlds" / "blocks"
    assert "b549866752f504a3" in WorldConfig.read(world / "world.yaml").earlier_fingerprints


def test_only_what_decides_pixels_is_hashed(tiny_world, copy):
    (copy / "stages" / "teacher_forcing").mkdir(parents=True)
    (copy / "stages" / "teacher_forcing" / "config.json").write_text("{}")
    (copy / "stages" / "teacher_forcing" / "weights.safetensors").write_bytes(b"")
    config = copy / "transformer" / "config.json"
    options = json.loads(config.read_text())
    config.write_text(json.dumps(options | {"_name_or_path": "elsewhere"}))
    rollout = yaml.safe_load(tiny_world.config.text())["rollout"]
    edit(copy, rollout=rollout | {"history": 7}, labels={"new_seed": "new town"})
    world = World.from_pretrained(copy)
    assert world.fingerprint == tiny_world.fingerprint
    assert world.config.labels.new_seed == "new town"
    assert world.config.labels.next_prompt == "next prompt"
    for changed in ({"guidance": 2.0}, {"shift": 4.0}, {"first_steps": [1000]}):
        edit(copy, rollout=rollout | changed)
        assert World.from_pretrained(copy).fingerprint != tiny_world.fingerprint


def test_the_negative_prompt_cannot_be_chosen(tmp_path):
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
        (lambda b: edit(b, format=3), "format 3, .*update this program"),
        (lambda b: edit(b, format="doom"), "format 'doom', .*not one of"),
        (lambda b: edit(b, heigth=3), "unknown key 'heigth'; did you mean 'height'"),
        (lambda b: edit(b, height="tall"), "height must be a whole number, got 'tall'"),
        (
            lambda b: edit(b, envelope={"foward": 1.0}),
            "envelope: unknown key 'foward'; did you mean 'forward'",
        ),
        (lambda b: edit(b, labels={"new_town": "x"}), "unknown key 'new_town'"),
        (lambda b: edit(b, labels={"new_seed": " "}), "new_seed must have 1 to 16 characters"),
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
    with pytest.raises(ValueError, match="not a complete PNG"):
        read_image(tiny_bundle / "world.yaml")
    with pytest.raises(ValueError, match="missing"):
        WorldConfig.read(_yaml(tiny_bundle, "title"))


def _yaml(bundle, without):
    values = yaml.safe_load((bundle / "world.yaml").read_text())
    values.pop(without)
    path = bundle.parent / "partial.yaml"
    path.write_text(yaml.safe_dump(values))
    return path

"""Places: made of clips, begun in, left and returned to, saved, and everything wrong with them."""

import argparse
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from conftest import make_street_bundle, make_tiny_bundle, street

from distill.__main__ import main
from distill.data.blocks.renderer import render, render_depth
from distill.data.clips import DEPTH, LATENTS, LatentClips, write_clip, write_latents
from worldmodel.camera import advance
from worldmodel.client.loop import Loop, LoopOptions
from worldmodel.client.options import add_arguments, first_picture, read_options, world_labels
from worldmodel.client.paths import MET_WALL
from worldmodel.client.scenes import NO_MAP, Scene, Scenes
from worldmodel.errors import UserError
from worldmodel.recording import Recorder, verify
from worldmodel.saved_session import FILES
from worldmodel.session import Session
from worldmodel.session_log import IMAGE, LOG, read_log
from worldmodel.walkable import PNG, YAML
from worldmodel.worlds.place import PICTURE, PLACE, Place
from worldmodel.worlds.place_views import VIEWS
from worldmodel.worlds.world import World

WALK = [advance(np.eye(4), [0, 0, 0.1 * k], 4.0 * k, 0) for k in range(1, 7)]
LENS = (0.5, 0.75, 0.5, 0.5)


@pytest.fixture(scope="module")
def world(street_bundle):
    return World.from_pretrained(street_bundle, dtype=torch.float32)


@pytest.fixture
def copied(street_bundle, tmp_path):
    """A bundle with a street, to be changed."""
    return shutil.copytree(street_bundle, tmp_path / "copied")


def set_value(folder, **values):
    path = folder / "world.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def write_walk(root, c2w, name="clip", lens=LENS, height=32, width=48):
    town, _ = street(1)
    frames = render(town, c2w, lens, height, width).repeat_interleave(4, 0)[3:].numpy()
    depth = render_depth(town, c2w, lens, height, width)
    return write_clip(root, name, frames, c2w, lens, "grey", 16, town.source, "CC0", depths=depth)


def take_of(session, folder):
    with Recorder(folder, session) as recorder:
        for pose in WALK[:3]:
            recorder.write(session.step(pose), pose)
    return folder


# -------------------- place add


def test_place_add_makes_a_place_that_plays(filmed, tmp_path, capsys):
    bundle = make_tiny_bundle(tmp_path / "plain")
    before = World.from_pretrained(bundle, dtype=torch.float32).transformer.state_dict()
    bundle = make_street_bundle(tmp_path / "tiny", filmed, "--views", "7")
    assert "7 frames" in capsys.readouterr().out
    world = World.from_pretrained(bundle, dtype=torch.float32)
    assert before.keys() == world.transformer.state_dict().keys()
    place = world.place("street")
    assert len(world.views("street")) == 7 and place.walkable.contains(place.start[[0, 2], 3])
    assert place.prompt == "grey" and place.source == "blocks:meadow:7"
    assert place.picture.shape == (32, 48, 3)
    command = ["place", "add", str(bundle), "--clips", str(filmed), "--name"]
    assert main([*command, "street"]) == 2  # exists
    assert main([*command, "The Street"]) == 2


def test_the_start_is_the_picture_of_its_pose(world, filmed, copied):
    """Of the clip, up to the video codec; of a level camera; the same every time."""
    town, poses = street(10)
    command = ["place", "add", str(copied), "--clips", str(filmed), "--name"]
    assert main([*command, "named", "--start", "clip-1:2"]) == 0
    assert main([*command, "again"]) == 0
    read = {name: Place.read(copied / "places" / name) for name in ("street", "again", "named")}
    np.testing.assert_array_equal(read["named"].start, poses[7])
    np.testing.assert_array_equal(read["street"].start, read["again"].start)
    for place in read.values():
        truth = render(town, place.start[None], LENS, 32, 48)[0].numpy()
        assert np.abs(place.picture.astype(float) - truth).mean() < 4
    for wrong in ("clip-1:99", "clip-9:0", "clip-1", "clip-1:x"):
        assert main([*command, "wrong", "--start", wrong]) == 2


def test_a_place_leaves_the_worlds_fingerprint(world, copied):
    shutil.rmtree(copied / "places")
    plain = World.from_pretrained(copied, dtype=torch.float32)
    assert plain.fingerprints == world.fingerprints


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda root: (root / "clip-0" / DEPTH).unlink(), "--depth"),
        (lambda root: change_meta(root / "clip-1"), "one coordinate system"),
        (lambda root: write_walk(root, street(2)[1] + shift(300)), "overlaps the others"),
        (lambda root: write_walk(root, street(2)[1], lens=(0.6, 0.9, 0.5, 0.5)), "one lens"),
        (lambda root: only(root, street(2)[1], lens=(0.6, 0.9, 0.5, 0.5)), "the world's lens"),
        (lambda root: only(root, street(2)[1], height=24, width=36), "a multiple, got 24x36"),
        (lambda root: only(root, tilted(street(2)[1])), "level camera"),
    ],
)
def test_clips_that_are_no_place(spoil, reason, filmed, street_bundle, tmp_path, capsys):
    root = shutil.copytree(filmed, tmp_path / "clips")
    spoil(root)
    command = ["place", "add", str(street_bundle), "--clips", str(root), "--name", "other"]
    assert main(command) == 2
    assert reason in capsys.readouterr().err
    assert not (street_bundle / "places" / "other").exists()


def change_meta(folder):
    meta = folder / "meta.yaml"
    meta.write_text(meta.read_text().replace("meadow:7", "meadow:8"))


def shift(units):
    moved = np.zeros((4, 4))
    moved[0, 3] = units
    return moved


def tilted(c2w):
    return np.stack([advance(pose, [0, 0, 0], 0, 20.0) for pose in c2w])


def only(root, c2w, **options):
    shutil.rmtree(root)
    write_walk(root, c2w, **options)


def test_no_map_can_be_made(filmed, street_bundle, monkeypatch, capsys):
    monkeypatch.setattr("worldmodel.walkable.MOST_CELLS", 4)
    command = ["place", "add", str(street_bundle), "--clips", str(filmed), "--name", "other"]
    assert main(command) == 2
    assert "too large" in capsys.readouterr().err
    assert not (street_bundle / "places" / "other").exists()


def test_clips_of_two_encoders(filmed, street_bundle, tmp_path, capsys):
    root = shutil.copytree(filmed, tmp_path / "clips")
    for number, encoder in enumerate(("aaaa", "bbbb")):
        write_latents(root / f"clip-{number}", torch.zeros(16, 5, 4, 6), {"encoder": encoder})
    with pytest.raises(UserError, match="of one encoder .aaaa., .*of another .bbbb."):
        LatentClips(root, 3)
    autoencoder = str(street_bundle / "autoencoder")
    assert main(["condition", "--clips", str(root), "--autoencoder", autoencoder]) == 2
    assert "of another (aaaa)" in capsys.readouterr().err
    (root / "clip-1" / LATENTS).unlink()
    write_latents(root / "clip-1", torch.zeros(16, 5, 4, 6))  # older latents name none
    assert len(LatentClips(root, 3)) == 2


# -------------------- sessions


def test_sessions_begin_with_the_places_picture(world, tmp_path):
    place = world.place("street")
    session = Session(world, place=place)
    np.testing.assert_array_equal(session.image, place.picture)
    assert session.first.latents == 1 and session.prompt == "grey"
    take = take_of(session, tmp_path / "take")
    assert (take / IMAGE).is_file() and verify(take, world)["exact"]
    session.save(tmp_path / "saved")
    loaded = Session.load(tmp_path / "saved", world)
    assert loaded.place.name == "street"
    np.testing.assert_array_equal(loaded.image, place.picture)


def test_a_first_picture_that_was_generated_is_generated_again(world, tmp_path):
    session = Session(world, place=world.place("street"), c2w=np.eye(4))
    assert session.image is None
    assert verify(take_of(session, tmp_path / "take"), world)["exact"]


def test_saves_and_recordings_of_a_place_that_is_gone_or_another(world, copied, tmp_path):
    session = Session(world, place=world.place("street"))
    take = take_of(session, tmp_path / "take")
    session.save(tmp_path / "saved")
    path = copied / "places" / "street" / PLACE
    values = yaml.safe_load(path.read_text())
    values["start"][0][3] += 0.5
    path.write_text(yaml.safe_dump(values))
    for change, reason in ((None, "another"), (path.unlink, "does not have")):
        if change:
            change()
        other = World.from_pretrained(copied, dtype=torch.float32)
        with pytest.raises(UserError, match=f"saved was made in the place 'street'.*{reason}"):
            Session.load(tmp_path / "saved", other)
        with pytest.raises(UserError, match=f"take was made in the place 'street'.*{reason}"):
            verify(take, other)


def test_saves_and_recordings_from_before_places_are_imagined(world, tmp_path):
    session = Session(world, image="grey-0")
    take = take_of(session, tmp_path / "take")
    session.save(tmp_path / "saved")
    saved = tmp_path / "saved" / FILES[0]
    kept = {k: v for k, v in yaml.safe_load(saved.read_text()).items() if "place" not in k}
    saved.write_text(yaml.safe_dump(kept))
    header, *lines = (take / LOG).read_text().splitlines()
    kept = {k: v for k, v in json.loads(header).items() if "place" not in k}
    (take / LOG).write_text("\n".join([json.dumps(kept), *lines, ""]))
    assert Session.load(tmp_path / "saved", world).place is None
    assert verify(take, world)["exact"]


# -------------------- play


def walk(play, bundle, folder, *words):
    """Report and log header of two latents without a window."""
    files = ["--output", str(folder / "walk.mp4"), "--record", str(folder / "take")]
    fixed = ["--world", str(bundle), "--headless", "--trajectory", "w*2"]
    assert play([*fixed, *files, *words]) == 0
    return read_log(folder / "take").header


def test_play_begins_in_a_place_and_its_walls_hold(street_bundle, tmp_path, play, capsys):
    take = tmp_path / "take"
    walk = ["--world", str(street_bundle), "--place", "street", "--headless"]
    walk += ["--trajectory", "a*4"]
    ends = {}
    for name, more in (("walls", []), ("open", ["--no-walls"])):
        files = ["--output", str(tmp_path / f"{name}.mp4"), "--record", f"{take}-{name}"]
        assert play([*walk, *more, *files]) == 0
        ends[name] = read_log(f"{take}-{name}").c2w[-1, :3, 3]
        assert read_log(f"{take}-{name}").header["place"] == "street"
    error = capsys.readouterr().err
    assert error.count(MET_WALL) == 1
    assert np.linalg.norm(ends["walls"]) < 0.5 * np.linalg.norm(ends["open"])
    assert play([*walk, "--image", "grey-0"]) == 2
    assert play([*walk, "--imagined"]) == 2
    assert play(["--world", str(street_bundle), "--place", "moon", "--headless"]) == 2
    assert "its places: street" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ([], "street"),
        (["--imagined"], None),
        (["--prompt", "loud"], None),
        (["--image", "grey-1"], None),
        (["--prompt", "loud", "--place", "street"], "street"),
    ],
)
def test_a_world_may_begin_in_its_place(words, place, copied):
    assert asked(copied, *words).place == ("street" if "--place" in words else None)
    set_value(copied, place="street")
    options = asked(copied, *words)
    assert options.place == place
    picture = first_picture(options)
    assert (picture.name == PICTURE) is (place is not None) and picture.is_file()


def asked(bundle, *words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_options(parser.parse_args(["--world", str(bundle), *words]))


def test_headless_reports_whether_the_scene_is_remembered(copied, tmp_path, play, capsys):
    set_value(copied, place="street")
    for name in (PNG, YAML):
        (copied / "places" / "street" / name).unlink()
    header = walk(play, copied, tmp_path)
    out, error = capsys.readouterr()
    report = json.loads(out.splitlines()[-1])
    assert header["place"] == report["place"] == "street" and header["image"]
    assert report["knowledge"] == "remembered"
    assert error.count(NO_MAP.format("street")) == 1  # without its map nothing stops the camera


def test_a_bundle_that_names_a_place_it_lacks(copied, play, capsys):
    set_value(copied, place="moon")
    assert play(["--world", str(copied), "--headless", "--imagined"]) == 2
    assert "begins in the place 'moon', but places/moon/place.yaml" in capsys.readouterr().err


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda place: cut(place / VIEWS), "remembered frames"),
        (lambda place: (place / VIEWS).unlink(), "remembered frames"),
        (lambda place: cut(place / PICTURE), "not a complete PNG"),
        (lambda place: (place / PNG).unlink(), PNG),
        (lambda place: (place / YAML).unlink(), YAML),
    ],
)
def test_damaged_places(spoil, reason, copied, world):
    spoil(copied / "places" / "street")
    damaged = replace(world, folder=copied, _views={})
    with pytest.raises(UserError, match=reason):
        Session(damaged, place=damaged.place("street"))


def test_with_no_walls_a_missing_map_is_no_news(copied, world):
    for name in (PNG, YAML):
        (copied / "places" / "street" / name).unlink()
    scenes = Scenes(replace(world, folder=copied), with_walls=False)
    said = []
    assert scenes.walls(Scene(place="street"), said.append) is None and not said


def ordered(loop, command):
    """Execute a command as the generator does, and return the last notice."""
    loop.command(command)
    loop._execute(loop._commands.popleft())
    return loop.notices[-1]


def test_a_key_leaves_a_place_and_returns(world):
    scenes = Scenes(world)
    loop = Loop(lambda tell: scenes, LoopOptions(Scene(place="street")))
    loop.open()
    assert loop.status.knowledge == "remembered" and loop._controls.walls
    picture = world.place("street").picture
    assert ordered(loop, "new_seed") == "New seed: 1"
    assert loop.status.knowledge == "imagined" and loop._controls.walls is None
    assert loop._session.place is None and loop.status.scene.image == "grey-0"
    ordered(loop, "restart")
    assert loop._session.place is None and loop.status.scene.image == "grey-0"
    assert ordered(loop, "new_seed") == "Back in street"
    np.testing.assert_array_equal(loop._session.image, picture)
    ordered(loop, "restart")
    assert loop.status.knowledge == "remembered" and loop._controls.walls
    ordered(loop, "new_seed")
    assert loop.status.scene.seed == 2 and loop.status.scene.image == "grey-1"
    ordered(loop, "next_prompt")
    assert loop.status.scene == Scene("loud", "loud-0", 2)


def test_a_place_that_cannot_be_opened_keeps_the_player_where_he_is(copied):
    cut(copied / "places" / "street" / VIEWS)
    scenes = Scenes(World.from_pretrained(copied, dtype=torch.float32))
    loop = Loop(lambda tell: scenes)
    loop.open()
    session = loop._session
    assert "fetch the place again" in ordered(loop, "new_seed")
    assert loop._session is session and loop.status.knowledge == "imagined"


def test_worlds_without_places_have_nothing_to_leave(tiny_world, tiny_bundle, street_bundle):
    scenes = Scenes(tiny_world)
    scene = scenes.resolve(Scene())
    assert scenes.knowledge(scene) == ""
    assert scenes.elsewhere(scene) == (Scene("grey", "grey-1", 1), "New seed: 1")
    assert world_labels(tiny_bundle).new_seed == "new seed"
    assert world_labels(street_bundle).new_seed == "leave, return"


# -------------------- pictures of twice the encoder's resolution


def test_twice_the_resolution(filmed, tmp_path, play, capsys):
    """Play, recordings, saves, rewind and places, of 64x96 pixels over latents of 4x6."""
    bundle = make_street_bundle(tmp_path / "large", filmed, upscale=2)
    world = World.from_pretrained(bundle, dtype=torch.float32)
    assert world.latent_size == (4, 6) and world.views("street").size == (32, 48)
    assert world.place("street").picture.shape == (64, 96, 3)
    session = Session(world, history=4, place=world.place("street"))
    assert session.first.frames.shape == (1, 64, 96, 3)
    for pose in WALK[:2]:
        session.step(pose)
    session.save(tmp_path / "saved")
    loaded = Session.load(tmp_path / "saved", world)
    wanted = session.step(WALK[2]).frames
    assert wanted.shape == (4, 64, 96, 3)
    assert np.abs(loaded.step(WALK[2]).frames.astype(int) - wanted).max() <= 1
    session.rewind(1)
    assert np.abs(session.step(WALK[2]).frames.astype(int) - wanted).max() <= 1
    small = np.full((32, 48, 3), 90, np.uint8)  # a picture file of another size is enlarged
    assert Session(world, image=small).first.frames.shape == (1, 64, 96, 3)
    walk(play, bundle, tmp_path, "--place", "street", "--no-walls", "--no-rest")
    assert play(["--world", str(bundle), "--replay", str(tmp_path / "take"), "--verify"]) == 0
    loop = Loop(lambda tell: Scenes(world))
    loop.open()
    loop._generate()
    assert loop._past.at(2).shape == (64, 96, 3)

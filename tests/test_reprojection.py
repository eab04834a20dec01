"""Remembered frames seen from other cameras, their files, and sessions in a place."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_tiny_bundle, read_conditions, street

from distill.data.blocks.renderer import render, render_depth
from distill.data.conditions import spread
from distill.stages.places import with_condition
from worldmodel.camera import advance
from worldmodel.errors import UserError
from worldmodel.models.attention import Bidirectional
from worldmodel.models.tiny_autoencoder import TinyAutoencoder
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.recording import Recorder, verify
from worldmodel.reprojection import ConditionStream, RememberedViews, filled, poses_between
from worldmodel.session import Session
from worldmodel.worlds.place import Place
from worldmodel.worlds.place_views import VIEWS, read_views, write_views
from worldmodel.worlds.world import World

LENS = (0.5, 0.5 * 160 / 96, 0.5, 0.5)
WALK = [advance(np.eye(4), [0, 0, 0.1 * k], 4.0 * k, 0) for k in range(1, 7)]


@pytest.fixture(scope="module")
def views():
    town, c2w = street()
    pictures = render(town, c2w, LENS, 48, 80)
    return RememberedViews(pictures, render_depth(town, c2w, LENS, 48, 80), c2w, LENS)


def test_own_camera_sees_the_picture_itself(views):
    picture, known = views.reproject([4], views.c2w[4])
    assert known.float().mean() > 0.98
    assert torch.equal(picture[known], views.pictures[4][known])


def test_reprojection_agrees_with_the_renderer(views):
    """Against the truth: far better than the nearest frame as it is."""
    others = [0, 2, 3, 5, 6, 8]
    picture, known = views.reproject(others, views.c2w[4])
    full = (filled(picture, known).permute(1, 2, 0) + 1) * 127.5
    truth = views.pictures[4].float()
    error = (full - truth).square().mean()
    frozen = (views.pictures[3].float() - truth).square().mean()
    assert known.float().mean() > 0.8
    assert error < 0.3 * frozen


def test_a_wall_hides_what_is_behind_it():
    """Two frames of planes z = 4 (white) and z = 2 (black): the nearer one is seen."""
    pictures = torch.stack([torch.full((8, 8, 3), 255), torch.zeros(8, 8, 3)]).to(torch.uint8)
    depth = torch.stack([torch.full((8, 8), 4.0), torch.full((8, 8), 2.0)])
    c2w = np.stack([np.eye(4)] * 2)
    plane = RememberedViews(pictures, depth, c2w, (0.5, 0.5, 0.5, 0.5))
    picture, known = plane.reproject([0, 1], np.eye(4))
    assert known.all() and not picture.any()


def test_points_keep_their_place():
    """A point at depth 2 seen after a step of 0.5 to the right moves by f 0.5 / 2 to the left."""
    pictures = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    pictures[0, 8, 8] = 255
    view = RememberedViews(
        pictures, torch.full((1, 16, 16), 2.0), np.eye(4)[None], (1, 1, 0.5, 0.5)
    )
    picture, _ = view.reproject([0], advance(np.eye(4), [0.5, 0, 0], 0, 0))
    assert picture[8, 8 - 4].tolist() == [255] * 3  # 16 px * 0.25
    assert int((picture.sum(2) == 765).sum()) == 1


def test_choice_prefers_what_the_camera_sees(views):
    assert views.choose(views.c2w[4], 1) == [4]
    without = np.zeros(len(views), bool)
    without[4] = True
    assert 4 not in views.choose(views.c2w[4], 5, without)
    behind = advance(views.c2w[4], [0, 0, 0], 180.0, 0)
    far = advance(behind, [0, 0, 40.0], 0, 0)
    assert len(views.choose(far, 8)) <= 1
    assert not views.reproject([], far)[1].any()


def test_filling_keeps_what_is_known():
    picture = torch.randint(0, 256, (12, 20, 3), dtype=torch.uint8)
    known = torch.rand(12, 20) > 0.3
    full = filled(picture, known)
    exact = picture.permute(2, 0, 1).float() / 127.5 - 1
    assert (full - exact)[:, known].abs().max() < 1e-5
    assert full.abs().max() <= 1
    assert not filled(picture, torch.zeros(12, 20, dtype=torch.bool)).any()


def test_poses_between_are_evenly_spaced():
    after = advance(np.eye(4), [0.4, 0, 0.8], 40.0, 0)
    poses = poses_between(np.eye(4), after)
    np.testing.assert_array_equal(poses[-1], after)
    step = poses[0]
    np.testing.assert_allclose(step[:3, :3] @ step[:3, :3], poses[1][:3, :3], atol=1e-12)
    np.testing.assert_allclose(poses[1][:3, 3], after[:3, 3] / 2)


def test_condition_is_mask_then_latents(views):
    torch.manual_seed(0)
    autoencoder = TinyAutoencoder(encoder_widths=(8, 8, 8, 8), encoder_blocks=(1, 1, 1)).eval()
    stream = ConditionStream(views, autoencoder, 4)
    with torch.no_grad():
        first = stream.step(views.c2w[:1])
        state = stream.state()
        rest = stream.step(views.c2w[1:4])
        stream.restore(state)
        apart = [stream.step(pose[None]) for pose in views.c2w[1:4]]
    assert first.shape == (1, 20, 1, 6, 10) and rest.shape == (1, 20, 3, 6, 10)
    assert first[:, :4].min() >= 0 and first[:, :4].max() <= 1
    torch.testing.assert_close(torch.cat(apart, 2), rest, rtol=1e-4, atol=1e-5)
    video = (views.pictures[:1].permute(3, 0, 1, 2)[None].float() / 127.5) - 1
    with torch.no_grad():
        encoded = autoencoder.encode(video)
    assert (first[:, 4:] - encoded).abs().mean() < 0.2 * encoded.abs().mean()


def test_files_of_views_come_back(views, tmp_path):
    write_views(tmp_path, views)
    back = read_views(tmp_path)
    assert torch.equal(back.pictures, views.pictures)
    near = views.depth < 100
    ratio = back.depth.float()[near] / views.depth[near]
    assert (ratio - 1).abs().max() < 3e-3
    np.testing.assert_array_equal(back.c2w, views.c2w)
    data = (tmp_path / VIEWS).read_bytes()
    (tmp_path / VIEWS).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="fetch the place again"):
        read_views(tmp_path)


def test_spread_takes_the_farthest_poses():
    poses = np.stack([advance(np.eye(4), [x, 0, 0], 0, 0) for x in (0, 0.01, 0.02, 5, 5.01, 9)])
    assert sorted(spread(poses, 3)) == [0, 3, 5]
    assert len(spread(poses, 99)) == 6


def test_new_condition_channels_change_nothing():
    network = CausalWanTransformer(
        num_attention_heads=2, attention_head_dim=8, text_dim=8, ffn_dim=32, num_layers=1
    ).eval()
    x = torch.randn(1, 16, 2, 4, 4)
    text = torch.randn(1, 3, 8)
    context = Bidirectional(network.layout(4, 4), 2)
    with torch.no_grad():
        before = network(x, torch.full((1, 2), 0.5), text, context)
        with_condition(network, 20)
        after = network(
            x, torch.full((1, 2), 0.5), text, context, condition=torch.randn(1, 20, 2, 4, 4)
        )
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
        torch.nn.init.normal_(network.patch_embedding.weight[:, 16:], std=0.1)
        other = network(
            x, torch.full((1, 2), 0.5), text, context, condition=torch.ones(1, 20, 2, 4, 4)
        )
    assert not torch.allclose(other, before, atol=1e-3)
    with pytest.raises(UserError, match="20"):
        with_condition(network, 7)


# -------------------- sessions in a place


@pytest.fixture(scope="module")
def place_world(tmp_path_factory):
    """A tiny world with random weights that remembers a street."""
    folder = make_tiny_bundle(tmp_path_factory.mktemp("places") / "tiny")
    read_conditions(folder)
    town, c2w = street()
    lens = (0.5, 0.75, 0.5, 0.5)
    pictures = render(town, c2w, lens, 32, 48)
    seen = RememberedViews(pictures, render_depth(town, c2w, lens, 32, 48), c2w, lens)
    place = Place("street", "A street", c2w[0], None)
    (folder / "places" / "street").mkdir(parents=True)
    place.write(folder / "places" / "street")
    write_views(folder / "places" / "street", seen)
    return World.from_pretrained(folder, dtype=torch.float32)


def frames_of(session, poses):
    return [session.step(pose).frames for pose in poses]


def test_what_is_remembered_matters(place_world):
    place = place_world.place("street")
    known = frames_of(Session(place_world, image="grey-0", place=place), WALK[:3])
    again = frames_of(Session(place_world, image="grey-0", place=place), WALK[:3])
    imagined = frames_of(Session(place_world, image="grey-0"), WALK[:3])
    assert all(np.array_equal(a, b) for a, b in zip(known, again))
    assert not np.array_equal(known[-1], imagined[-1])
    elsewhere = Place("street", "", place.start @ advance(np.eye(4), [0, 0, 0.2], 30, 0), None)
    moved = frames_of(Session(place_world, image="grey-0", place=elsewhere), WALK[:3])
    assert not np.array_equal(known[-1], moved[-1])


def test_rewind_fork_save_and_load_in_a_place(place_world, tmp_path):
    place = place_world.place("street")
    session = Session(place_world, image="grey-0", place=place, history=6)
    straight = frames_of(session, WALK)
    session.rewind(3)
    twin = session.fork()
    session.save(tmp_path / "saved")
    loaded = Session.load(tmp_path / "saved", place_world)
    assert loaded.place.name == "street"
    for one in (session, twin, loaded):
        for frames, wanted in zip(frames_of(one, WALK[3:]), straight[3:]):
            assert np.abs(frames.astype(int) - wanted).max() <= 1


def test_less_memory_leaves_the_conditions_where_they_are(place_world, monkeypatch):
    """A pass that ran out of memory is tried again; what is known of the chunk was made once."""
    session = Session(place_world, image="grey-0", place=place_world.place("street"))
    frames_of(session, WALK[:2])
    monkeypatch.setattr(type(place_world.engine), "step_down", lambda engine: "")
    session._condition(WALK[2][None])
    encoder, pose = session._conditions.state()
    session._step_down()
    again, at = session._conditions.state()
    assert at is pose and again is encoder


def test_recordings_know_the_place(place_world, tmp_path):
    session = Session(place_world, image="grey-0", place=place_world.place("street"))
    with Recorder(tmp_path / "take", session) as recorder:
        for pose in WALK[:4]:
            recorder.write(session.step(pose), pose)
    assert verify(tmp_path / "take", place_world)["exact"]


def test_unknown_places_and_worlds_without_conditions(place_world, tiny_world):
    with pytest.raises(UserError, match="no place 'moon', its places: street"):
        place_world.place("moon")
    with pytest.raises(UserError, match="its places: none"):
        tiny_world.place("street")
    other = replace(place_world, transformer=tiny_world.transformer)
    with pytest.raises(UserError, match="condition channels"):
        Session(other, image="grey-0", place=place_world.place("street"))

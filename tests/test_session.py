"""Sessions: same inputs, same frames; rewind, fork, save and load lose nothing."""

import threading

import numpy as np
import pytest
import torch
from conftest import make_tiny_bundle
from safetensors.torch import load_file, save_file

from worldmodel.camera import MotionStep, advance, parse_trajectory
from worldmodel.errors import UserError
from worldmodel.images import fit_picture
from worldmodel.rollout import Rollout
from worldmodel.session import Session
from worldmodel.worlds.world import World

WALK = parse_trajectory("w*4,w+l*6,s*3", MotionStep(0.5, 6.0), style="walk")[1:]


def generate(session, poses):
    return [session.step(pose).frames for pose in poses]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


VARIANTS = [
    {"chunk": 1},
    {"chunk": 2, "window": 6},
    {"guidance": 3.0},
    pytest.param({"wan": True}, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    """(world, walk cut into what a step takes) frame-wise, chunk-wise, with
    guidance, with Wan2.1's autoencoder.
    """
    folder = make_tiny_bundle(tmp_path_factory.mktemp("variant") / "tiny", **request.param)
    chunk = request.param.get("chunk", 1)
    return World.from_pretrained(folder, dtype=torch.float32), WALK[:12].reshape(-1, chunk, 4, 4)


def test_shapes_and_bookkeeping(tiny_world):
    session = Session(tiny_world, c2w=WALK[0])
    first = session.first
    second = session.step(WALK[1])
    assert first.frames.shape == (1, 32, 48, 3) and second.frames.shape == (4, 32, 48, 3)
    assert first.frames.dtype == np.uint8 and (first.index, second.index, session.frames) == (
        0,
        1,
        2,
    )
    assert set(second.timings) == {"network", "clean", "decode"} and all(
        v >= 0 for v in second.timings.values()
    )
    np.testing.assert_array_equal(session.poses, WALK[:2])
    pictured = Session(tiny_world, image="loud-0")
    assert pictured.first.frames.shape == (1, 32, 48, 3) and pictured.frames == 1
    assert pictured.step(WALK[0]).frames.shape == (4, 32, 48, 3)


def test_inputs_matter(tiny_world):
    plain = generate(Session(tiny_world), WALK[:3])
    same(plain, generate(Session(tiny_world), WALK[:3]))
    for other in (
        Session(tiny_world, seed=1),
        Session(tiny_world, prompt="loud"),
        Session(tiny_world, steps=1),
        Session(tiny_world, image="grey-0"),
    ):
        assert not np.array_equal(generate(other, WALK[:3])[-1], plain[-1])
    turned = generate(
        Session(tiny_world),
        [advance(pose, [0, 0, 0], 30.0 * k, 0) for k, pose in enumerate(WALK[:3])],
    )
    assert not np.array_equal(turned[-1], plain[-1])


def test_only_relative_poses_matter(tiny_world):
    away = advance(np.eye(4), [10_000.0, 3.0, -20_000.0], 130.0, 10.0)
    here = generate(Session(tiny_world, c2w=WALK[0]), WALK[1:6])
    there = generate(Session(tiny_world, c2w=away @ WALK[0]), away @ WALK[1:6])
    for one, other in zip(here, there, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1  # one step of rounding


def test_noise_is_the_latents_own(tiny_world, variant):
    """Latent k draws the same noise whatever came before: chunks and restarts do not shift it."""
    framewise = Session(tiny_world)
    chunked = Session(variant[0])
    noise, renoise = chunked._noise(4)
    one, again = framewise._noise(4)
    assert torch.equal(noise[:, :, :1], one) and torch.equal(renoise[0][:, :, :1], again[0])
    assert not torch.equal(one, framewise._noise(5)[0])


def test_rewind_and_fork(variant):
    world, walk = variant
    straight = generate(Session(world, seed=3, image="grey-1"), walk)
    session = Session(world, seed=3, image="grey-1")
    generate(session, walk[:3])
    fork = session.fork()
    generate(fork, walk[::-1])  # somewhere else altogether
    same(generate(session, walk[3:]), straight[3:])
    session.rewind(2 * session.chunk)
    assert session.frames == 1 + len(WALK[:12]) - 2 * session.chunk
    for one, other in zip(generate(session, walk[-2:]), straight[-2:], strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_rewind_is_exact_and_bounded(tiny_world):
    session = Session(tiny_world, image="grey-0", history=6)
    straight = generate(session, WALK[:10])
    before = session.poses
    with pytest.raises(ValueError, match="Cannot take back 7 latents: .* at most 6"):
        session.rewind(7)
    np.testing.assert_array_equal(session.poses, before)
    session.rewind(6)
    same(generate(session, WALK[4:10]), straight[4:])
    fresh = Session(tiny_world, image="grey-0")
    fresh.step(WALK[0])
    with pytest.raises(ValueError, match="at most 1 "):  # the start image itself stays
        fresh.rewind(2)
    fresh.rewind(1)
    same(generate(fresh, WALK[:2]), straight[:2])


def test_the_clean_pass_beside_the_decoder_changes_nothing(variant, monkeypatch):
    world, walk = variant
    torch.set_num_threads(1)
    films = []
    threads = set()
    commit = Rollout.commit_pending
    monkeypatch.setattr(
        Rollout,
        "commit_pending",
        lambda rollout: threads.add(threading.get_ident()) or commit(rollout),
    )
    for cores in (1, 2):  # the second has a core to spare
        monkeypatch.setattr("worldmodel.session.cores", lambda count=cores: count)
        session = Session(world, image="grey-1")
        with torch.inference_mode():  # a mode of a thread
            films.append(generate(session, walk))
    same(*films)
    assert len(threads) == 2 and session.rollout.pending is None


def test_an_error_of_the_clean_pass_beside_the_decoder_is_told(tiny_world, monkeypatch):
    def fail(rollout):
        raise RuntimeError("the clean pass is broken")

    torch.set_num_threads(1)
    monkeypatch.setattr("worldmodel.session.cores", lambda: 2)
    session = Session(tiny_world)
    monkeypatch.setattr(Rollout, "commit_pending", fail)
    with pytest.raises(RuntimeError, match="is broken"):
        session.step(WALK[0])


def test_memory_is_bounded(tiny_world):
    session = Session(tiny_world, history=5)
    generate(session, np.tile(WALK, (3, 1, 1)))
    assert (
        len(session._states) == 6
        and len(session.rollout.cache.frames) <= tiny_world.config.rollout.window + 5
    )


def test_save_and_load(variant, tmp_path):
    world, walk = variant
    session = Session(world, prompt="loud", image="loud-1", seed=11, steps=1)
    generate(session, walk[:3])
    session.save(tmp_path / "save")
    future = generate(session, walk[3:])
    loaded = Session.load(tmp_path / "save", world)
    assert (loaded.prompt, loaded.seed, loaded.steps, loaded.first) == ("loud", 11, 1, None)
    np.testing.assert_array_equal(loaded.image, session.image)
    same(generate(loaded, walk[3:]), future)
    np.testing.assert_array_equal(loaded.poses, session.poses)
    session.save(tmp_path / "save")  # over an older save
    assert Session.load(tmp_path / "save", world).frames == session.frames
    assert [path.name for path in tmp_path.iterdir()] == ["save"]


def test_bad_saves(tiny_world, tiny_bundle, tmp_path):
    session = Session(tiny_world)
    session.step(WALK[0])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not a saved session; choose another name"):
        session.save(tmp_path / "mine")
    session.save(tmp_path / "save")
    with pytest.raises(ValueError, match="with dtype torch.float32, .* has torch.bfloat16"):
        Session.load(tmp_path / "save", World.from_pretrained(tiny_bundle, dtype=torch.bfloat16))
    text = (tmp_path / "save" / "session.yaml").read_text()
    (tmp_path / "save" / "session.yaml").write_text(text.replace("seed: 0", "seed: many"))
    with pytest.raises(UserError, match="not a complete saved session .seed is 'many'"):
        Session.load(tmp_path / "save", tiny_world)
    (tmp_path / "save" / "session.yaml").write_text(text)
    weights = tmp_path / "save" / "session.safetensors"
    tensors = load_file(weights)
    save_file({name: x for name, x in tensors.items() if name != "frame.0.values"}, weights)
    with pytest.raises(UserError, match="the tensor frame.0.values is missing"):
        Session.load(tmp_path / "save", tiny_world)
    save_file(tensors, weights)
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match="not a complete saved session"):
        Session.load(tmp_path / "save", tiny_world)
    with pytest.raises(ValueError, match="not a complete saved session"):
        Session.load(tmp_path / "nothing", tiny_world)


def test_prompt_and_restart(tiny_world):
    session = Session(tiny_world, image="grey-0")
    session.step(WALK[0])
    session.set_prompt("loud")
    other = session.step(WALK[1])
    plain = generate(Session(tiny_world, image="grey-0"), WALK[:2])
    assert other.prompt == "loud" and not np.array_equal(other.frames, plain[1])
    with pytest.raises(ValueError, match="did you mean 'loud'"):
        session.reset(0, "load")
    assert session.frames == 3
    session.reset(0, "grey", "grey-0")
    same(generate(session, WALK[:2]), plain)


def test_a_still_world_rests(tiny_world, still_bundle, tmp_path):
    world = World.from_pretrained(still_bundle, dtype=torch.float32)
    assert world.fingerprint == tiny_world.fingerprint
    session = Session(world, image="grey-0")
    assert session.at_rest(np.eye(4)) and not session.at_rest(WALK[0])
    session.step(WALK[0])
    frames = session.frames
    assert session.at_rest(WALK[0]) and session.fork().at_rest(WALK[0])
    assert not session.at_rest(np.nextafter(WALK[0], 2.0))
    session.set_prompt("grey")
    assert session.at_rest(WALK[0])  # as it was
    session.set_prompt("loud")
    assert not session.at_rest(WALK[0]) and session.frames == frames
    session.step(WALK[0])
    assert session.at_rest(WALK[0])
    session.step(WALK[1])
    session.rewind(2)
    assert not session.at_rest(WALK[0])  # its picture has the older prompt
    session.step(WALK[0])
    assert session.at_rest(WALK[0])
    session.save(tmp_path / "save")
    loaded = Session.load(tmp_path / "save", world)
    assert not loaded.at_rest(WALK[0])
    loaded.step(WALK[0])
    assert loaded.at_rest(WALK[0])
    session.reset(0, None, "grey-1")
    assert session.at_rest(np.eye(4))


def test_other_worlds_never_rest(tiny_world, still_bundle):
    world = World.from_pretrained(still_bundle, dtype=torch.float32)
    for session in (Session(tiny_world), Session(world, rest=False)):
        session.step(np.eye(4))
        assert not session.at_rest(np.eye(4))
    same(generate(Session(world), WALK[:3]), generate(Session(tiny_world), WALK[:3]))


def test_bfloat16(tiny_bundle):
    world = World.from_pretrained(tiny_bundle, dtype=torch.bfloat16)
    session = Session(world, image="grey-0")
    assert generate(session, WALK[:6])[-1].shape == (4, 32, 48, 3)


def test_bad_input(tiny_world, tmp_path):
    session = Session(tiny_world)
    with pytest.raises(ValueError, match="pose 0 holds NaN"):
        session.step(np.full((4, 4), np.nan))
    with pytest.raises(ValueError, match="1 poses are needed .* got 2"):
        session.step(WALK[:2])
    assert session.frames == 1
    for seed in (-1, 2**63, 0.5, "x"):
        with pytest.raises(ValueError, match="seed"):
            Session(tiny_world, seed=seed)
    with pytest.raises(ValueError, match="no start image 'grey-9'"):
        Session(tiny_world, image="grey-9")
    (tmp_path / "broken.png").write_bytes(b"PNG")
    with pytest.raises(ValueError, match="not a complete PNG"):
        Session(tiny_world, image=tmp_path / "broken.png")
    with pytest.raises(ValueError, match="uint8"):
        Session(tiny_world, image=np.zeros((8, 8, 3)))
    with pytest.raises(ValueError, match="steps"):
        Session(tiny_world, steps=0)


def test_fit_picture():
    wide = np.zeros((20, 100, 3), np.uint8)
    wide[:, 40:60] = 255  # the middle survives the crop
    fitted = fit_picture(wide, 32, 32)
    assert fitted.shape == (32, 32, 3) and fitted.min() > 200
    assert fit_picture(np.zeros((500, 300, 3), np.uint8), 32, 48).shape == (32, 48, 3)
    exact = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    np.testing.assert_array_equal(fit_picture(exact, 32, 48), exact)
    tall = np.zeros((300, 20, 3), np.uint8)
    tall[145:155] = 255
    assert fit_picture(tall, 32, 64).min() > 200


def test_fit_picture_of_any_width():
    assert fit_picture(np.zeros((300, 20_000, 3), np.uint8), 480, 832).shape == (480, 832, 3)
    assert fit_picture(np.zeros((20_000, 300, 3), np.uint8), 480, 832).shape == (480, 832, 3)
    for rows, columns in ((1, 20_000), (20_000, 1), (1, 1), (0, 9)):
        with pytest.raises(ValueError, match=f"{columns}x{rows} pixels is too thin or too small"):
            fit_picture(np.zeros((rows, columns, 3), np.uint8), 480, 832)

"""Recall: frames of the whole session, chosen by view overlap, in a window of constant size."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from worldmodel.camera import advance, invert
from worldmodel.client.options import PlayOptions
from worldmodel.client.scenes import Scene, open_scenes
from worldmodel.engine.engine import TIERS, Engine, Tier, demand
from worldmodel.errors import UserError
from worldmodel.models import attention
from worldmodel.models.frame_store import CachedFrame, FrameStore
from worldmodel.models.kv_cache import KVCache
from worldmodel.models.memory import RecallWindow, RecentWindow, Selection, Slot
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.models.view_overlap import choose_views
from worldmodel.recording import Recorder, verify
from worldmodel.rollout import Rollout, RolloutConfig
from worldmodel.session import Session

LENS = torch.tensor([0.5, 0.8, 0.5, 0.5], dtype=torch.float64)
STEPS = {"steps": (1000, 500), "first_steps": (1000,)}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    model = CausalWanTransformer(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    for block in model.blocks:
        torch.nn.init.normal_(block.attn1.prope_out.weight, std=0.2)
    return model.eval().requires_grad_(False)


def cameras(poses):
    """c2w from (x, z, yaw in degrees) -> w2c [1, F, 4, 4]."""
    x, z, yaw = np.array(poses, np.float64).T
    c2w = np.tile(np.eye(4), (len(x), 1, 1))
    c2w[:, 0, 0] = c2w[:, 2, 2] = np.cos(np.radians(yaw))
    c2w[:, 0, 2] = np.sin(np.radians(yaw))
    c2w[:, 2, 0] = -c2w[:, 0, 2]
    c2w[:, 0, 3] = x
    c2w[:, 2, 3] = z
    return torch.from_numpy(invert(c2w))[None]


def turning(frames, degrees=30.0):
    return cameras([(0.0, 0.05 * i, degrees * i) for i in range(frames)])


def rollout_of(network, config, batch=1):
    text = torch.ones(1, 5, 8)
    return Rollout(network, text, config, batch=batch, height=4, width=4)


def walk(rollout, viewmats, seed=1, first=0):
    draw = torch.Generator().manual_seed(seed)
    chunk = rollout.config.chunk
    lens = LENS.expand(viewmats.shape[0], 4)
    with torch.no_grad():
        for i in range(first, viewmats.shape[1], chunk):
            yield rollout.step(viewmats[:, i : i + chunk], lens, generator=draw)


def choose(candidates, asked, count, **options):
    w2c = candidates[0, :, :3]
    focal = LENS[:2].expand(len(w2c), 2)
    return choose_views(w2c, focal, asked[0], LENS.expand(asked.shape[1], 4), count, **options)


def test_the_frames_chosen_look_where_the_camera_looks():
    around = cameras([(0.0, 0.0, 30.0 * i) for i in range(12)])
    asked = cameras([(0.0, 0.0, 92.0)])
    assert choose(around, asked, 1) == [3]
    assert choose(around, cameras([(0.0, 0.0, 106.0)]), 2) == [3, 4]
    # one camera, or a chunk of them that look to both sides
    assert choose(around, cameras([(0.0, 0.0, 60.0), (0.0, 0.0, 330.0)]), 2) == [2, 11]
    # turned away, far away, beyond what is asked for, facing it from behind, near, elsewhere
    spread = cameras(
        [(0, 0, 180), (0, -40, 0), (0, 3.9, 0), (0, 2, 180), (0.3, -0.5, 0), (40, 0, 0)]
    )
    assert choose(spread, cameras([(0, 0, 0)]), 1) == [4]
    # other units of length change nothing else
    wide = around.clone()
    wide[..., :3, 3] *= 100
    assert choose(wide, cameras([(0.0, 0.0, 106.0)]), 2, unit=100.0) == [3, 4]


def test_frames_complement_each_other_and_ties_are_settled():
    same = cameras([(0.0, 0.0, 0.0)] * 5 + [(0.0, 0.0, 25.0), (0.0, 0.0, 180.0)])
    # one of five equal ones, the oldest; the neighbour; nothing more to gain: the last ones
    assert choose(same, cameras([(0.0, 0.0, 0.0)]), 1) == [0]
    assert choose(same, cameras([(0.0, 0.0, 12.0)]), 2) == [0, 5]
    assert choose(same, cameras([(0.0, 0.0, 0.0)]), 3) == [0, 5, 6]
    dropped = torch.tensor([True, False, False, False, False, False, False])
    assert choose(same, cameras([(0.0, 0.0, 0.0)]), 1, dropped=dropped) == [1]
    assert choose(same, cameras([(0.0, 0.0, 0.0)]), 9) == list(range(7))


def test_a_rough_look_at_many_candidates_finds_the_same_frames():
    draw = np.random.default_rng(0)
    poses = np.stack([draw.normal(0, 8, 2000), draw.normal(0, 8, 2000), draw.uniform(0, 360, 2000)])
    candidates = cameras(poses.T)
    asked = cameras([(1.0, 2.0, 40.0)])
    chosen = choose(candidates, asked, 4)
    facing = (np.abs((poses[2] - 40.0 + 180) % 360 - 180) < 90).nonzero()[0]
    near = facing[np.hypot(*(poses[:2, facing] - [[1.0], [2.0]])).argsort()[:500]]
    expected = choose(candidates[:, np.sort(near)], asked, 4)
    assert chosen == [int(np.sort(near)[i]) for i in expected]
    # far from the origin the same frames are seen
    candidates[..., :3, 3] -= candidates[..., :3, :3] @ torch.tensor([1e6, 0.0, -1e6]).double()
    asked[..., :3, 3] -= asked[..., :3, :3] @ torch.tensor([1e6, 0.0, -1e6]).double()
    assert choose(candidates, asked, 4) == chosen


def test_without_recall_nothing_is_stored_and_the_policy_is_the_plain_one():
    config = RolloutConfig(window=6, sinks=1)
    assert type(config.memory) is RecentWindow and config.memory.store() is None


CONFIGS = [
    RolloutConfig(window=7, recall=3, **STEPS),
    RolloutConfig(window=8, sinks=1, recall=2, **STEPS),
    RolloutConfig(window=9, sinks=2, recall=3, chunk=2, **STEPS),
]


def names(config):
    return f"{config.window}-{config.sinks}-{config.recall}-{config.chunk}"


@pytest.mark.parametrize("config", CONFIGS, ids=names)
def test_a_window_that_holds_all_is_the_plain_one(network, config):
    views = turning(config.window // config.chunk * config.chunk)
    recalling = list(walk(rollout_of(network, config), views))
    plain = list(walk(rollout_of(network, replace(config, recall=0)), views))
    torch.testing.assert_close(torch.cat(recalling, 2), torch.cat(plain, 2), atol=2e-5, rtol=0)


class Listed:
    """The reference: keys of listed frames, projected again for every call from their own cameras,
    one after the other at the given positions.
    """

    def __init__(self, layout, frames, first, viewmats):
        self.layout = layout
        self.frames = frames
        self.new_kv = {}
        count = viewmats.shape[1]
        self.rope = layout.rope(torch.arange(len(frames), len(frames) + count) + first)
        everyone = torch.cat([*(f.viewmats[:, None] for f in frames), viewmats], 1)
        relative = everyone @ torch.linalg.inv(viewmats[:, :1])
        focal = torch.ones(1, everyone.shape[1], 4, dtype=torch.float64)
        focal[..., :2] = LENS[:2]
        matrices = focal[..., None] * relative
        self.past = layout.cameras(matrices[:, : len(frames)].float())
        self.cameras = layout.cameras(matrices[:, len(frames) :].float())
        self.positions = layout.rope(torch.arange(len(frames)) + first)

    def attend(self, layer, q, k, v):
        if self.frames:
            keys, values = (
                torch.stack([getattr(f, part)[layer] for f in self.frames], 1)
                for part in ("keys", "values")
            )
            past = attention.project_kv(
                keys, values, self.positions, self.past.key, self.layout.heads
            )
            k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def store(self, layer, key, value):
        self.new_kv[layer] = key, value


@pytest.mark.parametrize("config", CONFIGS, ids=names)
def test_the_ring_equals_attention_over_the_listed_frames(network, config):
    count = 15 - 15 % config.chunk
    views = turning(count, 47.0)
    rollout = rollout_of(network, config)
    kept = {}  # all frames that were ever committed
    shapes = set()
    layout = network.layout(4, 4)
    jumped = 0
    for i in range(0, count, config.chunk):
        chunk = views[:, i : i + config.chunk]
        lens = LENS.expand(1, config.chunk, 4)
        latents = torch.randn(1, 16, config.chunk, 4, 4)
        sigma = torch.full((1, config.chunk), 0.4)
        with torch.no_grad():
            context = rollout.cache.begin_chunk(chunk, lens)
            fast = network(latents, sigma, rollout.text, context)
            oldest = max(config.sinks, i - (config.memory.recent - config.chunk))
            pool = list(range(config.sinks, oldest))
            chosen = [pool[n] for n in choose(views[:, pool], chunk, config.recall)] if pool else []
            jumped += bool(chosen) and chosen != list(range(oldest - len(chosen), oldest))
            seen = [*range(min(config.sinks, i)), *chosen, *range(oldest, i)]
            listed = Listed(layout, [kept[n] for n in seen], 0, chunk)
            plain = network(latents, sigma, rollout.text, listed)
        torch.testing.assert_close(fast, plain, atol=5e-5, rtol=0)
        if i >= config.window:
            held = [
                x[:, :, : context._used] for layer in context.ring.layers.values() for x in layer
            ]
            shapes.add((context._used, tuple(x.data_ptr() for x in held)))
        with torch.no_grad():
            rollout.commit(latents, chunk, lens)
        kept |= {frame.index: frame for frame in rollout.cache.frames}
    assert jumped, "the recalled frames were always those before the recent ones"
    assert len(shapes) == 1  # one number of tokens, in one memory
    assert next(iter(shapes))[0] == config.window * layout.tokens


def test_each_row_of_a_batch_recalls_for_itself(network):
    config = CONFIGS[1]
    paths = [turning(14, degrees) for degrees in (40.0, -25.0)]
    noise = torch.randn(2, 16, 14, 4, 4)
    renoise = torch.randn(2, 16, 14, 4, 4)

    def walked(rows):
        rollout = rollout_of(network, config, len(rows))
        views = torch.cat([paths[row] for row in rows])
        with torch.no_grad():
            return torch.cat(
                [
                    rollout.step(
                        views[:, i : i + 1],
                        LENS.expand(len(rows), 4),
                        noise=noise[rows, :, i : i + 1],
                        renoise=[renoise[rows, :, i : i + 1]],
                    )
                    for i in range(14)
                ],
                2,
            )

    both = walked([0, 1])
    for row in (0, 1):
        torch.testing.assert_close(both[row : row + 1], walked([row]), atol=1e-4, rtol=0)


def test_rewound_and_forked_rollouts_recall_the_same(network):
    config = replace(CONFIGS[1], history=6)
    views = turning(20, 47.0)
    rollout = rollout_of(network, config)
    straight = list(walk(rollout, views[:, :14]))
    twin = rollout.fork()
    on = next(walk(rollout, views[:, 14:15], 5))
    assert torch.equal(next(walk(twin, views[:, 14:15], 5)), on)
    list(walk(rollout, views[:, 15:], 9))
    rollout.rewind(14)
    assert [frame.index for frame in rollout.cache.store] == list(range(14))
    assert torch.equal(next(walk(rollout, views[:, 14:15], 5)), on)
    assert len(straight) == 14


def frame(index, w2c, size=4):
    features = torch.zeros(1, 1, size, 8)
    return CachedFrame(index, features, features.clone(), w2c[None], LENS[None])


def stored(poses, capacity, sinks=1):
    """A store of so many frames after a walk along `poses`, and the comparisons it made."""
    views = cameras(poses)[0]
    store = FrameStore(1, sinks, 4, 1.0)
    store.memory = capacity * 256 / 2**20  # a frame has 256 bytes
    calls = []
    plain = store._gaps
    store._gaps = lambda signature: calls.append(len(store)) or plain(signature)
    for index, w2c in enumerate(views):
        store.add(frame(index, w2c))
    return store, calls


def test_a_full_store_keeps_every_view_once_and_the_sinks():
    round_and_round = [(0.0, 0.0, 30.0 * i + 0.1 * (i // 12)) for i in range(60)]
    store, _ = stored(round_and_round, 13, sinks=2)
    numbers = [one.index for one in store]
    assert len(store) == 13 and numbers[:2] == [0, 1]
    assert numbers[:12] == list(range(12))  # the first round: nothing newer replaces it
    still, _ = stored([(0.0, 0.0, 0.0)] * 30, 6, sinks=2)
    assert [one.index for one in still][:2] == [0, 1] and len(still) == 6
    # what a frame is most similar to, kept up to date, is what a search finds
    draw = np.random.default_rng(1)
    store, _ = stored(draw.normal(0, 20, (300, 3)), 50)
    again = FrameStore(store.memory, 1, 4, 1.0)
    again.refill(store)
    for number in range(300, 400):
        w2c = cameras(draw.normal(0, 20, (1, 3)))[0, 0]
        for one in (store, again):
            one.add(frame(number, w2c))
        assert [f.index for f in store] == [f.index for f in again]


def test_a_long_walk_needs_bounded_memory_and_work(network):
    draw = np.random.default_rng(2)
    turns = np.cumsum(draw.normal(0, 4, 15_000))
    steps = 0.1 * np.stack([np.sin(np.radians(turns)), np.cos(np.radians(turns))])
    x, z = np.cumsum(steps, axis=1) % 6.0  # the same ground again and again
    views = cameras(np.stack([x, z, turns], 1))
    config = RolloutConfig(window=8, sinks=1, recall=3, **STEPS)
    cache = KVCache(network.layout(4, 4), replace(config.memory, memory=1))
    cache.store.memory = 200 * 2 * 2 * 4 * 48 * 4 / 2**20  # 200 frames
    calls = []
    plain = cache.store._gaps
    cache.store._gaps = lambda signature: calls.append(len(cache.store)) or plain(signature)
    shape = (1, 1, 4, 48)
    sizes = []
    work = []
    with torch.no_grad():
        for i in range(15_000):
            viewmats = views[:, i : i + 1]
            if i % 500 == 0:  # the choice and the ring, now and then
                context = cache.begin_chunk(viewmats, LENS[None, None])
                assert len(context.selection.remembered) == min(i, 7)
                kv = torch.zeros(shape), torch.zeros(shape)
                cache.commit(context, {layer: kv for layer in range(2)})
                sizes.append(cache.store.nbytes)
                work.append(len(calls))
            else:  # what a commit leaves
                kv = torch.zeros(2, 1, 4, 48)
                one = CachedFrame(i, kv, kv.clone(), viewmats[:, 0], LENS[None])
                cache.frames.append(one)
                cache.store.add(one)
                cache.committed += 1
                cache._drop_old_frames()
    assert len(cache.store) == 200 and max(sizes) == sizes[-1] <= 200 * 2 * 2 * 4 * 48 * 4
    assert len(cache.frames) <= 10 and cache.store[0].index == 0
    assert max(calls) <= 200 and len(cache.store._numbers) == 200
    spent = np.diff(work)[1:]  # comparisons in 500 latents
    assert spent.max() <= 500 * 4 and spent[-5:].mean() <= 1.5 * spent[2:7].mean()


def test_memory_that_is_too_small_is_one_sentence():
    store = FrameStore(1, 1, 5000, 1.0)
    with pytest.raises(
        UserError, match="1 MiB .* hold 4096 latents .* 5000 are needed: .* to 2 or"
    ):
        store.add(frame(0, torch.eye(4, dtype=torch.float64)))


def test_a_part_of_a_chunk_does_not_keep_the_chunk():
    store = FrameStore(1, 0, 1, 1.0)
    keys = torch.zeros(2, 1, 3, 4, 8)
    eye = torch.eye(4, dtype=torch.float64)[None]
    store.add(CachedFrame(0, keys[:, :, 1], keys[:, :, 2], eye, LENS[None]))
    assert store[0].keys.untyped_storage().nbytes() == 2 * 4 * 8 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 6, "sinks": 1, "recall": 4}, "at most window .* = 3 latents, got 4"),
        ({"recall": -1}, "recall must be at least 0, got -1"),
        ({"recall": 2, "positions": "absolute"}, "recall must be 0 where positions are absolute"),
        ({"recall_memory": 0}, "recall_memory must be at least 1 MiB"),
        ({"recall_unit": 0.0}, "recall_unit above 0"),
    ],
)
def test_a_recall_that_does_not_fit_is_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        RolloutConfig(**options)


@pytest.fixture(scope="module")
def plain(tiny_world):
    """The tiny world with a window that has room for recall."""
    rollout = replace(tiny_world.config.rollout, window=6, sinks=1, history=4)
    return replace(tiny_world, config=replace(tiny_world.config, rollout=rollout))


@pytest.fixture(scope="module")
def recalling(plain):
    return plain.with_recall({"recall": 2})


def path(frames):
    pose = np.eye(4)
    for _ in range(frames):
        pose = advance(pose, [0.0, 0.0, 0.1], 25.0, 0.0)
        yield pose


def test_a_saved_session_recalls_what_it_would_have_recalled(recalling, plain, tmp_path):
    poses = list(path(16))
    session = Session(recalling, image="grey-0")
    for pose in poses[:12]:
        session.step(pose)
    session.save(tmp_path / "saved")
    expected = [session.step(pose).frames for pose in poses[12:]]
    loaded = Session.load(tmp_path / "saved", plain)  # the save knows its recall
    assert loaded.config.recall == 2
    assert [f.index for f in loaded.rollout.cache.store][:12] == list(range(12))
    for pose, frames in zip(poses[12:], expected, strict=True):
        np.testing.assert_array_equal(loaded.step(pose).frames, frames)
    tensors = load_file(tmp_path / "saved" / "session.safetensors")
    del tensors["stored.3.values"]
    save_file(tensors, tmp_path / "saved" / "session.safetensors")
    with pytest.raises(UserError, match="stored.3.values is missing"):
        Session.load(tmp_path / "saved", plain)
    text = yaml.safe_load((tmp_path / "saved" / "session.yaml").read_text())
    (tmp_path / "saved" / "session.yaml").write_text(yaml.safe_dump(text | {"recall": "two"}))
    with pytest.raises(UserError, match="recall is 'two'"):
        Session.load(tmp_path / "saved", plain)


def test_a_recording_repeats_its_choices_in_a_world_without_recall(recalling, plain, tmp_path):
    for middle in (False, True):
        folder = tmp_path / str(middle)
        session = Session(recalling, image="grey-0")
        poses = list(path(14))
        for pose in poses[: 9 * middle]:
            session.step(pose)
        with Recorder(folder, session) as recorder:
            for pose in poses[9 * middle :]:
                recorder.write(session.step(pose), pose)
        result = verify(folder, plain)
        assert (result["exact"], result["engine_differs"]) == (True, [])


def test_an_older_recording_knows_no_recall(plain, recalling, tmp_path):
    session = Session(plain.with_recall({"recall": None}), image="grey-0")
    with Recorder(tmp_path / "r", session) as recorder:
        for pose in path(8):
            recorder.write(session.step(pose), pose)
    lines = (tmp_path / "r" / "session.jsonl").read_text().replace('"recall', '"former')
    (tmp_path / "r" / "session.jsonl").write_text(lines)
    result = verify(tmp_path / "r", recalling)
    assert (result["exact"], result["engine_differs"]) == (True, [])


def test_play_asks_for_recall(tiny_bundle):
    options = PlayOptions(tiny_bundle, recall=1, recall_memory=3)
    scenes = open_scenes(options, lambda *_: None)
    session, _ = scenes.open(Scene())
    assert (session.config.recall, session.config.recall_memory) == (1, 3)
    with pytest.raises(UserError, match="recall must leave room .* got 3"):
        open_scenes(replace(options, recall=3), lambda *_: None)


def test_less_memory_on_the_device_recalls_less_and_forgets_nothing(recalling):
    world = replace(recalling, engine=Engine((TIERS[0], Tier("small", window=4, history=1))))
    session = Session(world, image="grey-0")
    for pose in list(path(12))[:10]:
        session.step(pose)
    session.commit_pending()
    assert session.config.recall == 2
    session._step_down()
    assert (session.config.window, session.config.recall) == (4, 1)
    session.step(list(path(12))[10])
    session.commit_pending()
    assert [f.index for f in session.rollout.cache.store] == list(range(12))
    needs = [demand(world.transformer, 4, 6, 1, 0, 0).of(TIERS[0], world.config.rollout, 0)]
    plain = replace(world.config.rollout, recall=0)
    needs.append(demand(world.transformer, 4, 6, 1, 0, 0).of(TIERS[0], plain, 0))
    assert needs[0] > needs[1]


def test_a_chunk_selects_positions_in_front_of_the_recent_ones():
    policy = RecallWindow(7, 1, recall=2)
    store = policy.store()
    views = turning(12, 47.0)
    for index in range(12):
        store.add(frame(index, views[0, index]))
    # the camera of latent 3 again: 3 itself, and one that shows what lies next to it
    selection = policy.select(store, 12, views[:, 3:4], LENS[None, None])
    first, second = selection.remembered[1:3]
    assert (3,) in (first.frame, second.frame) and first.frame < second.frame
    assert selection == Selection(
        (
            Slot(0, 0, 6),
            Slot(first.frame, 5, 7),
            Slot(second.frame, 6, 8),
            *(Slot(i, 1 + (i - 1) % 4, i) for i in (9, 10, 11)),
        ),
        (4,),
        12,
    )

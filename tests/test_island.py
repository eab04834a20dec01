"""The island: its pictures and depth, where feet can go, what footage covers and what it omits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_renderer import LENS, pose_at

from distill.__main__ import main
from distill.data.blocks.collect import BlocksConfig, poses_of_clip
from distill.data.blocks.island import PLAN, TILE, UNFILMED_DISC, Island
from distill.data.blocks.renderer import FAR, render, render_depth, render_source
from distill.data.blocks.scenes import scene_of
from distill.data.blocks.town import CELL, Town
from distill.data.blocks.walker import walk
from distill.data.clips import DEPTH, list_clips, read_clip, read_depth, write_depth
from worldmodel.errors import UserError

ISLAND = Island("meadow")
COLLECT = ["collect", "blocks", "--scene", "island", "--moods", "meadow", "--workers", "1"]
COLLECT += ["--height", "24", "--width", "40"]


def config(**options) -> BlocksConfig:
    return BlocksConfig(Path(), latents=25, **{"moods": ("meadow",), "scene": "island", **options})


def test_bounded_path_equals_plain_path():
    draws = np.random.default_rng(0)
    poses = [
        *(walk(ISLAND, 1, k, start=ISLAND.start(k))[0] for k in range(6)),
        *(
            pose_at(*draws.uniform((-2, -3, -2), (15, -0.05, 15)), *draws.uniform(-90, 90, 3))
            for _ in range(6)
        ),
    ]
    fast, near = render(ISLAND, poses, LENS, 24, 40, depth=True)
    plain, far = render(ISLAND, poses, LENS, 24, 40, plain=True, depth=True)
    assert fast.float().std() > 10
    assert ((fast.int() - plain.int()).abs().amax(-1) > 1).float().mean() < 2e-4
    assert ((near - far).abs() > 1e-3).float().mean() < 2e-4
    assert torch.equal(fast, render(ISLAND, poses, LENS, 24, 40))


def test_depth_against_arithmetic():
    """Sea and sky from a camera over open water; a wall from the front, constant over its
    columns.
    """
    eye = 0.17
    sea = render_depth(ISLAND, pose_at(8.5, -eye, -4, 180), LENS, 24, 40)[0].double().numpy()
    rise = ((np.arange(24) + 0.5) / 24 - LENS[3]) / LENS[1]
    expected = np.where(rise > 0, eye / np.where(rise > 0, rise, 1), FAR)
    assert sea.shape == (24, 40) and np.allclose(sea, expected[:, None], rtol=1e-4)
    # the eastern wall of the market house at x = 11.9 tiles, its door 0.07 tiles before it
    front = pose_at(13 * TILE, -eye, 15.1 * TILE, -90)
    middle = render_depth(ISLAND, front, LENS, 24, 40)[0, :12, 10:30].double().numpy()
    door = 1.03 * TILE
    wall = 1.1 * TILE
    assert np.minimum(np.abs(middle - door), np.abs(middle - wall)).max() < 1e-5
    assert abs(middle[0, 9] - wall) < 1e-5 and abs(middle[11, 9] - door) < 1e-5
    town = Town("night", 4)
    assert render_depth(town, walk(town, 1, 0), LENS, 24, 40).shape == (1, 24, 40)


def test_sun_lies_on_the_sea():
    """The water below the sun is brighter than the water aside, on the island only."""
    looks = [pose_at(6.6, -0.17, 16, yaw) for yaw in (35, 125)]
    under, aside = render(ISLAND, looks, LENS, 24, 40).float()[:, 15:22, 18:22].mean((1, 2, 3))
    assert under > aside + 10


def test_feet_stay_on_land():
    """Walks from everywhere keep away from walls and water, and the pier can be walked on."""
    low, high = ISLAND.barriers(6, 6, 20)
    boxes = ISLAND.boxes(6, 6, 20)
    body = boxes.high[:, 1] > -0.2
    low = np.concatenate([low, boxes.low[body][:, [0, 2]]])
    high = np.concatenate([high, boxes.high[body][:, [0, 2]]])
    starts = [ISLAND.start(k) for k in range(20)]
    starts += [(np.array([18 * TILE, 5 * TILE]), 180.0)]  # on the pier, towards its head
    for seed, start in enumerate(starts):
        walked = walk(ISLAND, 97, seed, start=start)[:, [0, 2], 3]
        gap = walked[:, None] - np.clip(walked[:, None], low, high)
        assert np.linalg.norm(gap, axis=-1).min() > 0.9 * 0.12
        assert (walked > 0).all() and (walked < PLAN * CELL).all()
    mask = ISLAND.walkable()
    assert mask[int(18 * TILE / 0.1), int(4 * TILE / 0.1)]  # the pier
    assert not mask[int(14 * TILE / 0.1), int(8 * TILE / 0.1)]  # the harbour
    assert 0.3 < mask.mean() < 0.6


def test_a_walk_begins_at_its_start():
    start = (np.array([18.5 * TILE, 14.5 * TILE]), 77.0)
    first = walk(ISLAND, 5, 0, start=start)[0]
    assert np.allclose(first, pose_at(*start[0][:1], -0.17, start[0][1], start[1]))


def test_starts_cover_ground_and_headings():
    """Every quarter has its share of the starts, and every direction too."""
    starts = [ISLAND.start(k, (0.1, 0.6, 0.3)) for k in range(200)]
    places = np.stack([place for place, _ in starts])
    mask = ISLAND.walkable()
    half = len(mask) // 2
    for east in (0, 1):
        for north in (0, 1):
            part = mask[half * east : half * (east + 1), half * north : half * (north + 1)].sum()
            found = ((places > half * 0.1) == (bool(east), bool(north))).all(1).mean()
            assert abs(found - part / mask.sum()) < 0.06
    sectors = np.bincount([int(heading // 60) for _, heading in starts], minlength=6)
    assert sectors.min() > 24 and sectors.max() < 43


def test_train_clips_omit_what_stays_unfilmed():
    train = [poses_of_clip(config(unfilmed=True), k) for k in range(30)]
    assert not ISLAND.unfilmed(np.concatenate(train)).any()
    heldout = [poses_of_clip(config(split="heldout"), k) for k in range(30)]
    assert 0.02 < ISLAND.unfilmed(np.concatenate(heldout)).mean() < 0.3
    x, z, radius = UNFILMED_DISC
    near = [pose_at(x + 0.99 * radius, -0.17, z), pose_at(x + 1.01 * radius, -0.17, z)]
    assert ISLAND.unfilmed(near).tolist() == [True, False]
    looks = [pose_at(3, -0.17, 3, yaw) for yaw in (45, 74, 76, 16, 14, -135)]
    assert ISLAND.unfilmed(looks).tolist() == [True, True, False, True, False, False]
    assert ISLAND.walkable()[int(x / 0.1), int(z / 0.1)]  # the disc is ground that could be filmed


def test_collect_with_depth(tmp_path, capsys):
    """The same island in every clip, other walks in the other split, and the renderer's depth."""
    arguments = [*COLLECT, "--latents", "3", "--samples", "1", "--clips", "2", "--depth"]
    folders = [tmp_path / "train", tmp_path / "heldout"]
    assert main([*arguments, "--unfilmed", "--output", str(folders[0])]) == 0
    assert main([*arguments, "--split", "heldout", "--output", str(folders[1])]) == 0
    clips = [folder for root in folders for folder in list_clips(root)]
    read = [read_clip(folder) for folder in clips]
    assert {clip.source for clip in read} == {"island:meadow:1"}
    assert len({clip.c2w.tobytes() for clip in read}) == 4
    for folder, clip in zip(clips, read, strict=True):
        depth = read_depth(folder)
        true = render_depth(scene_of(clip.source), clip.c2w, clip.intrinsics, 24, 40)
        assert depth.dtype == torch.float16 and depth.shape == (3, 24, 40)
        assert ((depth.float() - true).abs() < 2e-3 * true).float().mean() > 0.99
        shown = render_source(clip.source, clip.c2w, clip.intrinsics, 24, 40, samples=1).numpy()
        assert np.abs(clip.frames[::4].astype(int) - shown).mean() < 4  # H.264
    assert main([*arguments, "--output", str(folders[0])]) == 2
    assert "unfilmed False, found True" in capsys.readouterr().err


def test_a_wrong_depth_is_one_sentence(tmp_path):
    assert main([*COLLECT, "--latents", "2", "--clips", "1", "--output", str(tmp_path)]) == 0
    (folder,) = list_clips(tmp_path)
    with pytest.raises(UserError, match="--depth"):
        read_depth(folder)
    with pytest.raises(UserError, match=r"expected the depth .* as \[2, 24, 40\], got \[3, 24, 40"):
        write_depth(folder, torch.zeros(3, 24, 40), (2, 24, 40))
    write_depth(folder, torch.zeros(2, 24, 32), (2, 24, 32))
    with pytest.raises(UserError, match=r"\[2, 24, 40\], got \[2, 24, 32\]"):
        read_depth(folder)
    (folder / DEPTH).write_bytes(b"nothing")
    with pytest.raises(UserError, match="a tensor `depth`"):
        read_depth(folder)


def test_a_source_names_its_scene():
    assert scene_of(ISLAND.source) == ISLAND
    assert scene_of("blocks:snow:12") == Town("snow", 12)


@pytest.mark.parametrize(
    "mistake, words",
    [
        (lambda: Island("lava"), "a mood of the island"),
        (lambda: scene_of("island:meadow"), "island:meadow:1"),
        (lambda: scene_of("island:meadow:0"), "version 1"),
        (lambda: scene_of("vizdoom:map01"), "blocks:meadow:12"),
        (lambda: config(scene="moon"), "--scene town or island"),
        (lambda: config(unfilmed=True, split="heldout"), "--unfilmed with --scene island"),
        (lambda: config(unfilmed=True, scene="town"), "--unfilmed with --scene island"),
    ],
)
def test_mistakes_are_named(mistake, words):
    with pytest.raises(UserError, match=words):
        mistake()

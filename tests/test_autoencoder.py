"""The tiny autoencoder: published layout and values, streams equal clips, its training stage and
`distill encode`.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file

from distill.__main__ import main
from distill.config import AutoencoderConfig
from distill.data.clips import LATENTS, VideoWindows, write_clip
from distill.data.encode import encode_clips, encoder_fingerprint
from distill.data.encoders import encoder_of
from distill.objectives.reconstruction import detail_term
from distill.stages.autoencoder import AutoencoderStage
from worldmodel.models.tiny_autoencoder import TinyAutoencoder
from worldmodel.models.wan_autoencoder import WanAutoencoder
from worldmodel.worlds.weights import open_autoencoder

GOLDEN = Path(__file__).parent / "golden"
TINY = {
    "encoder_widths": (8, 8, 8, 8),
    "encoder_blocks": (1, 1, 1),
    "decoder_widths": (12, 8, 8, 8),
    "decoder_blocks": (1, 1, 1),
}


def tiny(seed: int = 0, **overrides) -> TinyAutoencoder:
    torch.manual_seed(seed)
    model = TinyAutoencoder(**{**TINY, "strides": (1, 2, 2), "patch_size": 2, **overrides})
    model.set_latent_statistics(torch.linspace(-0.5, 0.5, 16), torch.linspace(0.5, 2, 16))
    return model


def footage(frames: int, height: int = 16, width: int = 24, seed: int = 0) -> np.ndarray:
    """A smooth moving picture, uint8 [T,H,W,3]."""
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    wave = np.sin(0.3 * x[..., None] + 0.2 * y[..., None] + 0.2 * t[..., None] + phase)
    return ((wave + 1) * 127).astype(np.uint8)


def clip(root: Path, name: str, frames: int = 9, seed: int = 0) -> Path:
    latents = (frames + 3) // 4
    write_clip(
        root,
        name,
        footage(frames, seed=seed),
        np.tile(np.eye(4), (latents, 1, 1)),
        np.array([0.5, 0.9, 0.5, 0.5]),
        caption="meadow",
        fps=16,
        source="test",
        licence="CC0-1.0",
    )
    return root / name


@pytest.fixture(scope="module")
def published() -> tuple[TinyAutoencoder, dict[str, torch.Tensor]]:
    """The published widths with the golden recipe's weights."""
    golden = json.loads((GOLDEN / "taehv.json").read_text())
    generator = np.random.default_rng(golden["weight_seed"])
    weights = {}
    for name, shape in golden["state_dict"]:
        values = generator.standard_normal(shape)
        values = (
            0.05 * values
            if name.endswith("bias")
            else values * np.sqrt(2 / np.prod(shape[1:])) * 0.8
        )
        weights[name] = torch.from_numpy(values.astype(np.float32))
    model = TinyAutoencoder()
    model.load_state_dict(weights, strict=True)
    return model, load_file(GOLDEN / "taehv.safetensors")


def test_published_names_and_shapes(published):
    expected = json.loads((GOLDEN / "taehv_state_dict.json").read_text())
    assert [
        [name, list(tensor.shape)] for name, tensor in published[0].state_dict().items()
    ] == expected


@torch.no_grad()
def test_published_values(published):
    model, golden = published
    latents = golden["latent_in"].transpose(1, 2)
    decoder = model.streaming_decoder()
    decoded = golden["decoded"].transpose(1, 2) * 2 - 1
    torch.testing.assert_close(
        decoder.step(latents, clamp=False), decoded[:, :, 3:], atol=1e-4, rtol=0
    )
    # The reference keeps the three frames that we drop, and encodes four different frames where our
    # stream has begun.
    encoder = model.streaming_encoder()
    video = golden["video"].transpose(1, 2) * 2 - 1
    first = torch.cat([video[:, :, :1]] * 4, 2)
    memory = encoder.state()._replace(started=True)
    encoder.restore(memory)
    torch.testing.assert_close(
        encoder.step(video), golden["encoded"].transpose(1, 2), atol=1e-4, rtol=0
    )
    encoder.restore(memory)
    torch.testing.assert_close(
        model.encode(video[:, :, :1]), encoder.step(first), atol=1e-5, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("shape", [{}, {"strides": (2, 2, 2), "patch_size": 1}])
def test_stream_equals_clip(shape):
    model = tiny(**shape)
    video = torch.rand(2, 3, 13, 16, 24) * 2 - 1
    encoder = model.streaming_encoder()
    decoder = model.streaming_decoder()
    latents = model.encode(video)
    assert latents.shape == (2, 16, 4, 2, 3)
    pieces = [encoder.step(piece) for piece in video.split([1, 4, 8], 2)]
    torch.testing.assert_close(torch.cat(pieces, 2), latents, atol=1e-5, rtol=1e-5)
    decoded = model.decode(latents, clamp=False)
    assert decoded.shape == video.shape
    pieces = [decoder.step(piece, clamp=False) for piece in latents.split(1, 2)]
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4, 4]
    torch.testing.assert_close(torch.cat(pieces, 2), decoded, atol=1e-5, rtol=1e-5)
    assert (model.decode(20 * latents) <= 1).all()
    decoder.reset()
    frames = [
        frame for piece in latents.split(1, 2) for frame in decoder.frames(piece)
    ]  # one by one: the first of a latent is early
    assert [frame.shape[2] for frame in frames] == [1] * 13
    torch.testing.assert_close(torch.cat(frames, 2), decoded.clamp(-1, 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_state_goes_back_and_forks():
    model = tiny()
    latents = torch.randn(1, 16, 4, 2, 3)
    decoder = model.streaming_decoder()
    fork = model.streaming_decoder()
    decoder.step(latents[:, :, :2])
    state = decoder.state()
    third = decoder.step(latents[:, :, 2:3])
    other = decoder.step(latents[:, :, 3:4])
    fork.restore(state)
    assert torch.equal(fork.step(latents[:, :, 2:3]), third)
    decoder.restore(state)
    assert not torch.equal(decoder.step(latents[:, :, 3:4]), other)  # another past, another picture
    decoder.restore(state)
    assert torch.equal(decoder.step(latents[:, :, 2:3]), third)
    decoder.reset()
    torch.testing.assert_close(decoder.step(latents), model.decode(latents))
    with pytest.raises(ValueError, match="expected the state of a stream with 3 memories"):
        decoder.restore((True, ()))


def test_wrong_input_is_named():
    model = tiny()
    for shape, message in [
        ((1, 3, 4, 16, 24), "4F - 3"),
        ((1, 3, 5, 12, 24), "multiples of 8"),
        ((3, 5, 16, 24), "got shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="expected latents"):
        model.decode(torch.zeros(1, 4, 2, 2, 3))
    encoder = model.streaming_encoder()
    encoder.step(torch.zeros(1, 3, 1, 16, 24))
    with pytest.raises(ValueError, match="4F frames after the first"):
        encoder.step(torch.zeros(1, 3, 5, 16, 24))
    with pytest.raises(ValueError, match="strides of 1 or 2"):
        TinyAutoencoder(strides=(4, 2, 1))


def test_save_and_load(tmp_path):
    model = tiny()
    latents = torch.randn(1, 16, 2, 2, 3)
    model.save_pretrained(tmp_path)
    loaded = TinyAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.decode(latents), model.decode(latents))
    assert encoder_fingerprint(loaded) == encoder_fingerprint(model)
    half = TinyAutoencoder.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.decode(latents).dtype == torch.bfloat16


def small_stage(clips: Path, **overrides) -> AutoencoderStage:
    sizes = {**TINY, "strides": (1, 2, 2), "patch_size": 2, "window": 2, "lr": 2e-3, "ema": 0.5}
    return AutoencoderStage(AutoencoderConfig(**{**sizes, **overrides}), clips)


def train(stage: AutoencoderStage, steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    values = []
    windows = stage.dataset()
    batch = {"video": torch.stack([windows[index]["video"] for index in range(len(windows))])}
    for step in range(steps):
        for name, loss, metrics in stage.losses(batch, step, generator):
            stage.optimizers[name].zero_grad()
            loss.backward()
            stage.optimizers[name].step()
            stage.averages[name].update(step)
            values.append(metrics["l1"])
    return values


def test_stage_learns_and_exports_normalised_latents(tmp_path):
    torch.manual_seed(0)
    for index in range(2):
        clip(tmp_path / "clips", f"{index}", seed=index)
    windows = VideoWindows(tmp_path / "clips", 2)
    assert len(windows) == 10 and windows[4]["video"].shape == (3, 5, 16, 24)
    assert torch.equal(windows[0]["video"][:, 1:], windows[1]["video"][:, :-1])
    stage = small_stage(tmp_path / "clips")
    values = train(stage, 30)
    assert values[-1] < 0.85 * values[0], values
    picture = stage.sample(torch.Generator().manual_seed(0))
    assert picture.dtype == np.uint8 and picture.shape == (32, 8 * 24, 3)
    stage.export(tmp_path / "trained")
    trained = TinyAutoencoder.from_pretrained(tmp_path / "trained")
    videos = torch.stack([whole.permute(3, 0, 1, 2) for whole in windows.clips]).float() / 127.5 - 1
    latents = trained.encode(videos).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(16), atol=1e-3, rtol=0)

    # The decoder may go on learning while the latents stay what they are.
    finetune = small_stage(tmp_path / "clips", start=str(tmp_path / "trained"), freeze_encoder=True)
    train(finetune, 2)
    finetune.export(tmp_path / "finetuned")
    finetuned = TinyAutoencoder.from_pretrained(tmp_path / "finetuned")
    assert encoder_fingerprint(finetuned) == encoder_fingerprint(trained)
    ones = latents.new_ones(1, 16, 1, 2, 3)
    assert not torch.equal(finetuned.decode(ones), trained.decode(ones))

    # So may a decoder of another size; another encoder is refused.
    wider = small_stage(
        tmp_path / "clips",
        start=str(tmp_path / "trained"),
        freeze_encoder=True,
        decoder_blocks=(1, 1, 2),
    )
    assert list(wider.autoencoder.config.decoder_blocks) == [1, 1, 2]
    assert encoder_fingerprint(wider.autoencoder) == encoder_fingerprint(trained)
    with pytest.raises(
        ValueError, match=r"an autoencoder with encoder_widths .* set autoencoder.encoder_widths"
    ):
        small_stage(
            tmp_path / "clips",
            start=str(tmp_path / "trained"),
            freeze_encoder=True,
            encoder_widths=(8, 8, 8, 16),
        )


def test_a_grown_autoencoder_does_what_the_small_one_did_and_learns_more(tmp_path):
    torch.manual_seed(0)
    clip(tmp_path / "clips", "clip")
    small = small_stage(tmp_path / "clips")
    small.export(tmp_path / "small")
    old = TinyAutoencoder.from_pretrained(tmp_path / "small")
    sizes = {
        "encoder_widths": (8, 16, 16, 24),
        "encoder_blocks": (2, 1, 3),
        "decoder_widths": (24, 16, 16, 8),
        "decoder_blocks": (2, 3, 2),
    }
    stage = small_stage(tmp_path / "clips", start=str(tmp_path / "small"), **sizes)
    new = stage.autoencoder
    video = torch.rand(2, 3, 9, 16, 24) * 2 - 1
    latents = old.encode(video)
    torch.testing.assert_close(new.encode(video), latents)
    torch.testing.assert_close(new.decode(latents), old.decode(latents))
    train(stage, 3)  # what was silent at first takes part
    assert all(
        weight.grad.any() for name, weight in new.named_parameters() if name.endswith("weight")
    )
    with pytest.raises(ValueError, match=r"an autoencoder with decoder_widths .* cannot shrink"):
        small_stage(tmp_path / "clips", start=str(tmp_path / "small"), decoder_widths=(8, 8, 8, 4))


def test_the_detail_term_asks_how_crisp_a_place_is_and_not_where_its_edges_run():
    video = torch.zeros(1, 3, 2, 16, 24)
    video[..., 12:] = 1.0
    blurred = torch.nn.functional.avg_pool3d(
        video, (1, 1, 5), 1, (0, 0, 2), count_include_pad=False
    )
    moved = video.roll(1, -1)
    moved[..., 0] = 0.0
    assert (blurred - video).abs().mean() < 1.5 * (
        moved - video
    ).abs().mean()  # point by point nearly as wrong
    assert detail_term(video, video) == 0
    assert detail_term(blurred, video) > 2 * detail_term(moved, video) > 0


def test_crops_are_parts_of_the_window_and_repeat(tmp_path):
    clip(tmp_path, "clip")
    whole = VideoWindows(tmp_path, 2)[3]["video"]
    parts = VideoWindows(tmp_path, 2, crop=(8, 16))
    part = parts[3]["video"]
    assert part.shape == (3, 5, 8, 16) and torch.equal(part, parts[3]["video"])
    assert any(
        torch.equal(part, whole[:, :, y : y + 8, x : x + 16]) for y in range(9) for x in range(9)
    )
    with pytest.raises(ValueError, match="at most 16x24 pixels"):
        VideoWindows(tmp_path, 2, crop=(24, 24))


def test_stage_refuses_short_clips(tmp_path):
    clip(tmp_path, "short", frames=5)
    with pytest.raises(ValueError, match="at least 9 frames"):
        VideoWindows(tmp_path, 3)
    with pytest.raises(ValueError, match="expected `start` with freeze_encoder"):
        small_stage(tmp_path, freeze_encoder=True)


@pytest.fixture(scope="module")
def wan() -> WanAutoencoder:
    """Wan2.1's own layout with few channels and random weights."""
    torch.manual_seed(0)
    return WanAutoencoder(AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1).eval())


@pytest.fixture
def two_threads():
    """With one, oneDNN multiplies a 1x1x1 convolution over one latent and over several in another
    order: a last bit differs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def test_wan_streams_equal_the_whole_clip_to_the_bit(wan, two_threads):
    video = torch.rand(2, 3, 13, 16, 24) * 2 - 1
    mean, std = wan.latent_statistics()
    whole = (wan.network.encode(video).latent_dist.mode() - mean) / std
    encoder = wan.streaming_encoder()
    decoder = wan.streaming_decoder()
    pieces = [encoder.step(piece) for piece in video.split([1, 4, 8], 2)]
    assert (
        torch.equal(torch.cat(pieces, 2), whole)
        and torch.equal(wan.encode(video), whole)
        and whole.shape == (2, 16, 4, 2, 3)
    )
    decoded = wan.network.decode(whole * std + mean).sample
    pieces = [decoder.step(piece) for piece in whole.split(1, 2)]
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4, 4]
    assert torch.equal(torch.cat(pieces, 2), decoded) and torch.equal(wan.decode(whole), decoded)


@torch.no_grad()
def test_wan_streams_go_back_fork_and_keep_tensors_alone(wan):
    latents = torch.randn(1, 16, 4, 2, 3)
    decoder = wan.streaming_decoder()
    fork = wan.streaming_decoder()
    results = []
    states = []
    for piece in latents.split(1, 2):
        states.append(decoder.state())
        results.append(decoder.step(piece))
    for index, state in enumerate(states):
        assert all(m is None or isinstance(m, torch.Tensor) for m in state.memories)
        fork.restore(state)
        assert torch.equal(fork.step(latents[:, :, index : index + 1]), results[index])
    with pytest.raises(ValueError, match="expected the batch size of the steps before, got 2"):
        fork.step(latents[:, :, :1].expand(2, -1, -1, -1, -1))
    with pytest.raises(ValueError, match="expected the state of a stream with"):
        fork.restore(wan.streaming_encoder().state())
    with pytest.raises(ValueError, match="4F frames after the first step"):
        encoder = wan.streaming_encoder()
        encoder.step(torch.zeros(1, 3, 1, 16, 24))
        encoder.step(torch.zeros(1, 3, 5, 16, 24))


def test_wan_opens_from_its_folder_and_names_its_encoding(wan, tmp_path):
    wan.save_pretrained(tmp_path / "wan")
    opened = open_autoencoder(tmp_path / "wan")
    assert isinstance(opened, WanAutoencoder) and encoder_fingerprint(
        opened
    ) == encoder_fingerprint(wan)
    for part, changes in (("decoder", False), ("encoder", True)):
        with torch.no_grad():
            next(getattr(opened.network, part).parameters()).add_(1)
        assert (encoder_fingerprint(opened) != encoder_fingerprint(wan)) == changes
    with pytest.raises(ValueError, match=r"autoencoder of Wan2\.1, got that of Wan2\.2"):
        WanAutoencoder(AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1, patch_size=2))


def test_encode_resumes_and_follows_the_encoder(tmp_path, capsys):
    root = tmp_path / "clips"
    model = tiny()
    folders = [clip(root, name, seed=seed) for seed, name in enumerate("abc")]
    model.save_pretrained(tmp_path / "ae")
    command = ["encode", "--clips", str(root), "--autoencoder", str(tmp_path / "ae")]
    assert main([*command, "--workers", "2"]) == 0
    assert [(folder / LATENTS).exists() for folder in folders] == [True, False, True]
    stamps = [(folder / LATENTS).stat().st_mtime_ns for folder in folders[::2]]
    (folders[1] / LATENTS).write_bytes(b"cut off")
    assert main(command) == 0
    assert [(folder / LATENTS).stat().st_mtime_ns for folder in folders[::2]] == stamps
    assert all(encoder_of(folder / LATENTS) == encoder_fingerprint(model) for folder in folders)

    frames = VideoWindows(root, 3)[1]["video"]
    whole = model.encode(frames[None].float() / 127.5 - 1)[0].half()
    stored = load_file(folders[1] / LATENTS)["latents"]
    assert stored.dtype == torch.float16
    torch.testing.assert_close(stored, whole, atol=2e-3, rtol=2e-3)

    other = tiny(seed=1)
    assert encode_clips(folders, other) == 3 and encode_clips(folders, other) == 0
    assert not torch.equal(load_file(folders[1] / LATENTS)["latents"], stored)
    assert not [path for path in root.rglob(".*") if path.is_file()]


def test_encode_names_what_is_wrong(tmp_path, capsys):
    root = tmp_path / "clips"
    good, bad, later, empty = (clip(root, name) for name in "abcd")
    tiny().save_pretrained(tmp_path / "ae")
    command = ["encode", "--clips", str(root), "--autoencoder", str(tmp_path / "ae")]
    shutil.copy(clip(tmp_path, "short", frames=5) / "video.mp4", bad)  # fewer frames than poses
    (empty / "session.jsonl").write_text('{"format": 1}\n')
    assert main(command) == 2
    reported = capsys.readouterr()
    error = reported.err.splitlines()[-1]
    assert (
        error.startswith(f"encode: {bad}: expected 9 video frames")
        and "; 2 of 4 clips could not be encoded, the others are" in error
    )
    assert f"encode: warning: {bad}: expected 9" in reported.err
    assert f"encode: warning: {empty / 'session.jsonl'} is damaged" in reported.err
    assert [(folder / LATENTS).exists() for folder in (good, bad, later, empty)] == [
        True,
        False,
        True,
        False,
    ]
    assert main(["encode", "--clips", str(root), "--autoencoder", str(tmp_path / "none")]) == 2
    assert "train one first" in capsys.readouterr().err
    assert main([*command, "--device", "nowhere"]) == 2
    assert "expected a device" in capsys.readouterr().err
    assert main([*command, "--worker", "2", "--workers", "2"]) == 2

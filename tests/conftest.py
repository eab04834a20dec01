"""A tiny random world, made on the spot: 32x48 pixels, two layers, seconds on one core."""

import importlib.util
import os
from pathlib import Path

# before torch is imported: idle OpenMP threads must not spin where cores are shared
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from distill.__main__ import main as distill
from distill.data.blocks.renderer import render, render_depth
from distill.data.blocks.town import Town
from distill.data.clips import write_clip
from distill.stages.places import with_condition
from worldmodel.camera import advance
from worldmodel.controls import Envelope
from worldmodel.models.prompts import PromptBook
from worldmodel.models.tiny_autoencoder import TinyAutoencoder
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.models.wan_autoencoder import WanAutoencoder
from worldmodel.rollout import RolloutConfig
from worldmodel.worlds.config import PromptConfig, WorldConfig
from worldmodel.worlds.weights import load_network
from worldmodel.worlds.world import World, save_world


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def make_tiny_bundle(folder, wan=False, still=False, upscale=1, **rollout):
    """Writes a complete bundle with random weights; `wan`: with Wan2.1's autoencoder; `still`: its
    things do not move; `upscale`: as TinyAutoencoder's; `rollout` overrides its RolloutConfig.
    """
    torch.manual_seed(7)
    transformer = CausalWanTransformer(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=8,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
    )
    for block in transformer.blocks:  # zero at the start of training; here the camera must matter
        torch.nn.init.normal_(block.attn1.prope_out.weight, std=0.2)
    autoencoder = TinyAutoencoder(
        encoder_widths=(8, 8, 8, 8),
        encoder_blocks=(1, 1, 1),
        decoder_widths=(8, 8, 8, 8),
        decoder_blocks=(1, 1, 1),
        upscale=upscale,
    )
    torch.nn.init.normal_(
        autoencoder.decoder[-1].weight, std=0.02
    )  # soft pictures, which a video codec can keep
    if wan:
        autoencoder = WanAutoencoder(AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1))
    config = WorldConfig(
        name="tiny",
        title="Random noise to walk in",
        height=32 * upscale,
        width=48 * upscale,
        fps=16.0,
        intrinsics=(0.5, 0.75, 0.5, 0.5),
        envelope=Envelope(forward=0.5, strafe=0.5, yaw=6.0, pitch=4.0),
        rollout=RolloutConfig(**{"window": 4, **rollout}),
        prompts=PromptConfig(default="grey"),
        still=still,
        licence="CC0-1.0",
    )
    draw = np.random.default_rng(0)
    size = (config.height, config.width, 3)
    pictures = {
        name: [draw.integers(0, 256, size, dtype=np.uint8) for _ in range(2)]
        for name in ("grey", "loud")
    }
    prompts = PromptBook(
        {"grey": torch.randn(3, 8), "loud": torch.randn(3, 8)}, {"grey": "grey noise"}
    )
    save_world(folder, config, transformer, autoencoder, prompts, pictures, readme="# tiny\n")
    return folder


def street(count=9):
    """Cameras along a street of a town, half a unit apart in all."""
    town = Town("meadow", 7)
    start = np.eye(4)
    start[:3, 3] = 0.55, -0.17, 0.0
    return town, np.stack([advance(start, [0, 0, 0.06 * k], 2.0 * k, 0) for k in range(count)])


def read_conditions(folder, std=0.1):
    """Gives a tiny bundle's transformer condition channels, their weights drawn with this
    deviation.
    """
    network = with_condition(load_network(CausalWanTransformer, folder / "transformer"), 20)
    with torch.no_grad():
        network.patch_embedding.weight[:, 16:].normal_(std=std)
    network.save_pretrained(folder / "transformer")


def make_street_bundle(folder, clips, *words, **options):
    """Writes a tiny bundle that reads conditions and remembers the street of `clips`; `words`: more
    of `place add`; `options`: of `make_tiny_bundle`.
    """
    make_tiny_bundle(folder, **options)
    read_conditions(folder, 0.0)
    assert (
        distill(["place", "add", str(folder), "--clips", str(clips), "--name", "street", *words])
        == 0
    )
    return folder


@pytest.fixture(scope="session")
def filmed(tmp_path_factory):
    """Two clips of one street, with depth, at the tiny world's size."""
    root = tmp_path_factory.mktemp("filmed")
    town, c2w = street(10)
    lens = (0.5, 0.75, 0.5, 0.5)
    for number in range(2):
        poses = c2w[5 * number : 5 * number + 5]
        frames = render(town, poses, lens, 32, 48).repeat_interleave(4, 0)[3:].numpy()
        depth = render_depth(town, poses, lens, 32, 48)
        name = f"clip-{number}"
        write_clip(root, name, frames, poses, lens, "grey", 16, town.source, "CC0", depths=depth)
    return root


@pytest.fixture(scope="session")
def street_bundle(filmed, tmp_path_factory):
    """Folder of the tiny world, which remembers a street; read only."""
    return make_street_bundle(tmp_path_factory.mktemp("worlds") / "street", filmed)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory):
    """Folder of the tiny world; read only."""
    return make_tiny_bundle(tmp_path_factory.mktemp("worlds") / "tiny")


@pytest.fixture(scope="session")
def still_bundle(tmp_path_factory):
    """Folder of the tiny world, whose things do not move; read only."""
    return make_tiny_bundle(tmp_path_factory.mktemp("worlds") / "still", still=True)


@pytest.fixture(scope="session")
def tiny_world(tiny_bundle):
    """The tiny world, opened in float32 on the CPU."""
    return World.from_pretrained(tiny_bundle, dtype=torch.float32)


@pytest.fixture(scope="module")
def one_thread():
    """Bit-identical sums need the same number of threads in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def own_log(tmp_path_factory):
    """Tracebacks of planted bugs stay out of the user's log."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def own_torch():
    """Restore torch's settings (`--threads`, the precision that play sets) after each test: frames
    are bit-identical only under equal settings.
    """
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def play():
    """play.py's `main`."""
    spec = importlib.util.spec_from_file_location("play", Path(__file__).parents[1] / "play.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main

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

from worldmodel.controls import Envelope
from worldmodel.models.prompts import PromptBook
from worldmodel.models.tiny_autoencoder import TinyAutoencoder
from worldmodel.models.transformer import CausalWanTransformer
from worldmodel.models.wan_autoencoder import WanAutoencoder
from worldmodel.rollout import RolloutConfig
from worldmodel.worlds.config import PromptConfig, WorldConfig
from worldmodel.worlds.world import World, save_world


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def make_tiny_bundle(folder, wan=False, still=False, **rollout):
    """Writes a complete bundle with random weights; `wan`: with Wan2.1's autoencoder; `still`: its
    things do not move; `rollout` overrides its RolloutConfig.
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
    )
    torch.nn.init.normal_(
        autoencoder.decoder[-1].weight, std=0.02
    )  # soft pictures, which a video codec can keep
    if wan:
        autoencoder = WanAutoencoder(AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1))
    config = WorldConfig(
        name="tiny",
        title="Random noise to walk in",
        height=32,
        width=48,
        fps=16.0,
        intrinsics=(0.5, 0.75, 0.5, 0.5),
        envelope=Envelope(forward=0.5, strafe=0.5, yaw=6.0, pitch=4.0),
        rollout=RolloutConfig(**{"window": 4, **rollout}),
        prompts=PromptConfig(default="grey"),
        still=still,
        licence="CC0-1.0",
    )
    draw = np.random.default_rng(0)
    pictures = {
        name: [draw.integers(0, 256, (32, 48, 3), dtype=np.uint8) for _ in range(2)]
        for name in ("grey", "loud")
    }
    prompts = PromptBook(
        {"grey": torch.randn(3, 8), "loud": torch.randn(3, 8)}, {"grey": "grey noise"}
    )
    save_world(folder, config, transformer, autoencoder, prompts, pictures, readme="# tiny\n")
    return folder


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

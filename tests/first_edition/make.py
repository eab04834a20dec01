"""Makes the examples in this folder: a bundle, recordings, saves and run folders as the first
edition (commit 006a75a) writes them.

It runs in a checkout of 006a75a and refuses any other code:

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/first_edition/make.py

    bundle/          a world of random weights: format 1, camera, four start images, every rollout
    key of the first edition named recordings/      begun: from a start image, the prompt changes on
    the way; middle: begins after three latents, so it holds a save;
                     merged: in the bundle with `merge_clean: true`, without a start image saves/
                     settled: nothing is left to do; pending: the last chunk's clean pass is still
                     to come; merged: the same where `merge_clean` is true run/
                     recipe.yaml, clips/ and runs/: teacher_forcing (AdamW) and dmd (Muon, two
                     optimisers), stopped after 2 of 4 steps frames/          what was shown,
                     without loss: NAME.png holds the last frame of every latent, one under the
                     other expected.json    fingerprints, checksums, the losses of steps 3 and 4,
                     and the machine that made all this

Seeds are fixed: a second run differs in the dates and times of the recordings' logs and in the
metrics' seconds alone, on the same machine. On another one the last bits of frames, weights and
losses differ.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from worldmodel.autoencoder import TinyAutoencoder
from worldmodel.command_line import Stopped
from worldmodel.machine import describe_machine
from worldmodel.options import as_dict
from worldmodel.text import PromptBook
from worldmodel.transformer import CausalWanTransformer
from worldmodel.world import PromptConfig, World, WorldConfig, save_world

import distill.train as training
from distill.config import load_recipe
from distill.data.clips import write_clip, write_latents
from distill.stages import build_stage
from worldmodel.camera import MotionStep, parse_trajectory
from worldmodel.controls import Envelope
from worldmodel.recording import Recorder
from worldmodel.rollout import RolloutConfig
from worldmodel.session import Session

COMMIT = "006a75a"
HERE = Path(__file__).resolve().parent
WALK = parse_trajectory("w*3,w+l*6,s*4", MotionStep(0.5, 6.0), style="walk")[1:]
ROLLOUT = RolloutConfig(window=4, sinks=1, history=2)
# Other rollout sections that a world.yaml of the first edition may hold, as written there.
ROLLOUTS = {
    "nothing": {},
    "few keys": {"window": 4, "steps": [1000]},
    "whole numbers": {"window": 4, "shift": 5, "guidance": 3, "context_sigma": 0},
    "gradient": {"cache_gradient": "straight_through"},
    "noise": {"context_sigma": 0.00498},
    "diffusion": {
        "sampler": "unipc",
        "positions": "absolute",
        "steps": [999, 666, 333],
        "first_steps": [999, 666, 333],
        "guidance": 3.0,
    },
    "chunks": {"sampler": "euler", "chunk": 2, "window": 6, "history": 5},
    "merged": {**as_dict(ROLLOUT), "merge_clean": True},
}
RECIPE = """\
run: {folder: runs, seed: 3, device: cpu, log_every: 1, sample_every: 0,
  checkpoint_every: 0, checkpoint_minutes: 0}
data: {root: clips, frames: 4, first_share: 0.5}
model: {layers: 1, heads: 2, head_dim: 8, ffn_dim: 32, freq_dim: 16, channels: 4,
  text_dim: 8, text_length: 2}
optimiser: {betas: [0.8, 0.95], eps: 1.0e-6, weight_decay: 0.1, grad_clip: 0.5}
teacher_forcing: {steps: 4, batch: 2, lr: 2.0e-2, warmup: 3, weighting: false,
  context_sigma_max: 0.1}
dmd:
  {steps: 4, batch: 2, lr: 1.0e-2, critic_lr: 2.0e-2, warmup: 0, optimiser: muon,
   init: teacher_forcing, real: teacher_forcing, critic_updates: 2, rollout: 6,
   window: 4, sinks: 1, start_share: 0.5,
   truth: 1.0, cache_gradient: detached, sigma_lookup: exact}
"""
STAGES = ("teacher_forcing", "dmd")
STOPPED = 2  # steps


def main() -> None:
    changed = subprocess.run(
        ["git", "diff", "--quiet", COMMIT, "--", "worldmodel", "distill"], cwd=HERE
    ).returncode
    if changed:
        raise SystemExit(
            f"make.py: this is not the code of {COMMIT}: run it in a checkout of that commit"
        )
    torch.set_num_threads(1)
    for name in ("bundle", "recordings", "saves", "run", "frames"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / "frames").mkdir()
    expected = {"commit": COMMIT, "machine": machine()}
    make_bundle(HERE / "bundle")
    with tempfile.TemporaryDirectory() as folder:
        expected["bundle"] = {
            "fingerprint": opened(HERE / "bundle").fingerprint,
            "rollouts": other_rollouts(Path(folder)),
        }
        worlds = {"plain": opened(HERE / "bundle"), "merged": opened(Path(folder) / "merged")}
        expected["recordings"] = make_recordings(worlds)
        expected["saves"] = make_saves(worlds)
    make_run(HERE / "run")
    expected["run"] = {name: next_losses(name) for name in STAGES}
    text = json.dumps(expected, indent=1)
    (HERE / "expected.json").write_text(
        re.sub(r"\[[^\[\]{}]*\]", lambda row: " ".join(row[0].split()), text) + "\n"
    )  # a row a line


def machine() -> dict:
    """What decides about the last bit; of these a recording's `engine` names torch alone."""
    return {
        "torch": torch.__version__,
        "processor": describe_machine(torch.device("cpu"))["processor"],
        "kernels": torch.backends.cpu.get_cpu_capability(),
    }


def opened(folder: Path) -> World:
    return World.from_pretrained(folder, dtype=torch.float32)


# -------------------- worlds


def make_bundle(folder: Path) -> None:
    """Weights are stored in bfloat16, as `distill export` does."""
    torch.manual_seed(7)
    transformer = CausalWanTransformer(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=8,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        camera=True,
    )
    for block in transformer.blocks:  # zero at the start of training; here the camera must matter
        torch.nn.init.normal_(block.attn1.prope_out.weight, std=0.3)
    autoencoder = TinyAutoencoder(
        encoder_widths=(8, 8, 8, 8),
        encoder_blocks=(1, 1, 1),
        decoder_widths=(8, 8, 8, 8),
        decoder_blocks=(1, 1, 1),
    )
    torch.nn.init.normal_(autoencoder.decoder[-1].weight, std=0.05)
    config = WorldConfig(
        name="first-edition",
        title="Random weights of the first edition",
        height=32,
        width=48,
        fps=16.0,
        intrinsics=(0.5, 0.75, 0.5, 0.5),
        envelope=Envelope(forward=0.5, strafe=0.5, yaw=6.0, pitch=4.0),
        rollout=ROLLOUT,
        prompts=PromptConfig(default="grey"),
        licence="CC0-1.0",
    )
    prompts = PromptBook(
        {"grey": torch.randn(3, 8), "loud": torch.randn(3, 8)}, {"grey": "grey noise"}
    )
    pictures = {
        name: [soft_picture(2 * number + place) for place in range(2)]
        for number, name in enumerate(("grey", "loud"))
    }
    networks = (network.to(torch.bfloat16) for network in (transformer, autoencoder))
    save_world(
        folder,
        config,
        *networks,
        prompts,
        pictures,
        readme="# first-edition\n\nRandom weights, see make.py.\n",
    )


def soft_picture(seed: int, height: int = 32, width: int = 48) -> np.ndarray:
    """uint8 [height, width, 3]"""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def other_rollouts(folder: Path) -> dict:
    """The bundle with other rollout sections, in `folder`; what they are and what fingerprint each
    has.
    """
    fingerprints = {
        name: with_rollout(folder / name, rollout).fingerprint for name, rollout in ROLLOUTS.items()
    }
    return {
        name: {"rollout": rollout, "fingerprint": fingerprints[name]}
        for name, rollout in ROLLOUTS.items()
    }


def with_rollout(folder: Path, rollout: dict) -> World:
    shutil.copytree(HERE / "bundle", folder)
    values = yaml.safe_load((folder / "world.yaml").read_text(encoding="utf-8"))
    (folder / "world.yaml").write_text(
        yaml.safe_dump({**values, "rollout": rollout}, sort_keys=False), encoding="utf-8"
    )
    return opened(folder)


# -------------------- walks


def make_recordings(worlds: dict[str, World]) -> dict:
    middle = Session(worlds["plain"], image="loud-1", seed=9, steps=1)
    for pose in WALK[:2]:
        middle.step(pose)
    return {
        "begun": record(
            "begun", Session(worlds["plain"], image="grey-0", seed=5), WALK[:7], {3: "loud"}
        ),
        "middle": record("middle", middle, WALK[2:8], {}),
        "merged": record("merged", Session(worlds["merged"], seed=6), WALK[:7], {}),
    }


def record(name: str, session: Session, poses: np.ndarray, prompts: dict[int, str]) -> dict:
    shown = [session.start().frames] if session.start() is not None and session.frames == 1 else []
    with Recorder(HERE / "recordings" / name, session) as recorder:
        for k, pose in enumerate(poses):
            if k in prompts:
                session.set_prompt(prompts[k])
            chunk = session.step(pose)
            assert recorder.write(chunk, pose, ("forward", "turn_right") if k % 2 else ("forward",))
            shown.append(chunk.frames)
    assert recorder.error is None
    keep_frames(name, shown)
    rollout = "merged" if session.config.merge_clean else "plain"
    return {
        "rollout": rollout,
        "fingerprint": session.world.fingerprint,
        "sha256": [checksum(frames) for frames in shown],
    }


def make_saves(worlds: dict[str, World]) -> dict:
    settled = Session(worlds["plain"], image="loud-0", seed=11)
    for pose in WALK[:5]:
        settled.step(pose)
    settled.settle()
    saved = {"settled": save("save-settled", settled)}
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(
        0, {min(cores)}
    )  # on a single core the clean pass does not run beside the decoder: a step leaves it for later
    try:
        pending = Session(worlds["plain"], prompt="loud", seed=12, steps=1)
        for pose in WALK[:6]:
            pending.step(pose)
        saved["pending"] = save("save-pending", pending)
    finally:
        os.sched_setaffinity(0, cores)
    merged = Session(worlds["merged"], image="grey-1", seed=13)
    for pose in WALK[:5]:
        merged.step(pose)
    saved["merged"] = save("save-merged", merged)
    return saved


def save(name: str, session: Session) -> dict:
    """Saves a session; says what comes next."""
    session.save(HERE / "saves" / name.removeprefix("save-"))
    told = {
        "rollout": "merged" if session.config.merge_clean else "plain",
        "pending": session.rollout.pending is not None,
        "frames": session.frames,
        "prompt": session.prompt,
        "seed": session.seed,
        "steps": session.steps,
    }
    poses = WALK[session.frames : session.frames + 3]
    shown = [session.step(pose).frames for pose in poses]
    keep_frames(name, shown)
    return {**told, "c2w": poses.tolist(), "sha256": [checksum(frames) for frames in shown]}


def keep_frames(name: str, shown: list[np.ndarray]) -> None:
    sheet = np.concatenate([frames[-1] for frames in shown])
    assert cv2.imwrite(str(HERE / "frames" / f"{name}.png"), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))


def checksum(frames: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(frames)).hexdigest()


# -------------------- training


def make_run(folder: Path) -> None:
    """The run of stage 3 begins with stage 1's export."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    for index, mood in enumerate(("meadow", "dunes", "night")):
        c2w = np.tile(np.eye(4), (6, 1, 1))
        c2w[:, 2, 3] = 0.1 * np.arange(6)
        c2w[:, 0, 3] = 0.02 * index * np.arange(6)
        video = np.stack([soft_picture(10 + index, 32, 32)] * 21)
        clip = write_clip(
            folder / "clips",
            f"clip-{index}",
            video,
            c2w,
            [0.5, 0.8, 0.5, 0.5],
            mood,
            16,
            "random",
            "CC0-1.0",
        )
        write_latents(clip, torch.randn(4, 6, 4, 4, generator=torch.Generator().manual_seed(index)))
    for name in STAGES:
        stop_in(folder, name)
        training.train(recipe_in(folder), name, export_only=True)
        if name != "teacher_forcing":
            shutil.rmtree(folder / "runs" / name / "export")  # nothing begins with it
        shutil.rmtree(
            folder / "runs" / name / "tensorboard", ignore_errors=True
        )  # holds the machine's name


def stop_in(folder: Path, name: str) -> None:
    """Trains a stage and asks it to stop during its step number STOPPED, as Ctrl-C or SIGTERM
    would.
    """

    def mortal(*args):
        stage = build_stage(*args)
        losses = stage.losses

        def losses_and_a_signal(batch, step, generator):
            if step == STOPPED - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield from losses(batch, step, generator)

        stage.losses = losses_and_a_signal
        return stage

    training.build_stage = mortal
    try:
        training.train(recipe_in(folder), name)
    except Stopped:
        return
    finally:
        training.build_stage = build_stage
    raise AssertionError(f"{name} was not stopped")


def recipe_in(folder: Path):
    return load_recipe(
        folder / "recipe.yaml", [f"run.folder={folder / 'runs'}", f"data.root={folder / 'clips'}"]
    )


def next_losses(name: str) -> list[dict]:
    """What a resumed run logs: the losses of step 3 come from the weights, those of step 4 from the
    optimisers' state too.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = shutil.copytree(HERE / "run", Path(folder) / "run")
        training.train(recipe_in(run), name, resume=True)
        lines = [
            json.loads(line)
            for line in (run / "runs" / name / "metrics.jsonl").read_text().splitlines()
        ]
    later = [line for line in lines if line["step"] > STOPPED]
    return [
        {key: value for key, value in line.items() if key == "step" or key.startswith("loss/")}
        for line in later
    ]


if __name__ == "__main__":
    main()

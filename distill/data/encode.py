"""`python -m distill encode`: clips -> latents, one file in each clip's folder. There may be any
number of workers, and each may be killed and restarted.
"""

import argparse
import hashlib
import json
import logging
from pathlib import Path

import torch
from tqdm import tqdm

from distill.data.clips import LATENTS, list_clips, read_clip, write_latents
from distill.data.encoders import encoder_of
from worldmodel.camera import FRAMES_PER_LATENT
from worldmodel.cli import print_line
from worldmodel.device import open_device
from worldmodel.errors import UserError
from worldmodel.images import to_unit_range
from worldmodel.models.wan_autoencoder import Autoencoder
from worldmodel.session_log import recover
from worldmodel.worlds.weights import open_autoencoder

logger = logging.getLogger(__name__)

RECORDING = "session.jsonl"  # marks a recording made by play


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `encode`."""
    parser.add_argument(
        "--clips",
        type=Path,
        required=True,
        help="folder of clips, or of recordings made by play.py",
    )
    parser.add_argument(
        "--autoencoder", type=Path, required=True, help="folder of a trained autoencoder"
    )
    parser.add_argument(
        "--device", default="cpu", help="where to compute: cpu, cuda, ... (default: cpu)"
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16: 3x faster, 1 %% less exact (default: float32)",
    )
    parser.add_argument(
        "--worker", type=int, default=0, help="number of this worker, from 0 (default: 0)"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="how many workers share the clips (default: 1)"
    )


def run(args: argparse.Namespace) -> None:
    """Encode the clips without latents, or with those of another encoder."""
    if not 0 <= args.worker < args.workers:
        raise UserError(
            f"expected --worker between 0 and {args.workers - 1} (--workers {args.workers}), got "
            f"{args.worker}"
        )
    autoencoder = open_autoencoder(args.autoencoder, open_device(args.device))
    folders = list_clips(args.clips)
    with torch.autocast(
        autoencoder.device.type, torch.bfloat16, enabled=args.precision == "bfloat16"
    ):
        made = encode_clips(folders[args.worker :: args.workers], autoencoder)
    print_line(
        f"{made} of {len(folders)} clips encoded, the others had latents already or belong to "
        "other workers"
    )


def encode_clips(folders: list[Path], autoencoder: Autoencoder) -> int:
    """Write `latents.safetensors` into each clip's folder that lacks it; return how many were
    written.

    File: "latents" float16 [C,F,h,w], normalised; the metadata `encoder` identifies the encoder.

    Raises:
        UserError: clips that are broken, empty, still being recorded or of a size that does not
        fit; all others are encoded first.
    """
    encoder = encoder_fingerprint(autoencoder)
    made = 0
    errors = []
    for folder in tqdm(folders, "encode", unit="clip"):
        try:
            made += _encode_clip(folder, autoencoder, encoder)
        except UserError as error:
            errors.append(str(error).rstrip("."))
            logger.warning(errors[-1])
    if errors:
        raise UserError(
            f"{errors[0]}; {len(errors)} of {len(folders)} clips could not be encoded, the others "
            "are: remove them, or encode again when they are complete"
        )
    return made


def _encode_clip(folder: Path, autoencoder: Autoencoder, encoder: str) -> bool:
    """Encode one clip, unless it has latents of this encoder; return whether it was encoded."""
    if encoder_of(folder / LATENTS) == encoder:
        return False
    recorded = (folder / RECORDING).is_file()
    if recorded:  # play may have been killed in the middle of a latent
        recover(folder)
    frames = read_clip(folder, trim=recorded).frames
    try:
        latents = encode_frames(autoencoder, torch.from_numpy(frames))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    write_latents(folder, latents, {"encoder": encoder})
    return True


@torch.inference_mode()
def encode_frames(autoencoder: Autoencoder, frames: torch.Tensor, piece: int = 8) -> torch.Tensor:
    """frames uint8 [4F-3,H,W,3] -> normalised latents float32 [C,F,h,w] on the CPU.

    Args:
        piece: latents encoded at a time, which bounds the memory; the result does not depend on it.
    """
    video = frames.permute(3, 0, 1, 2)[None]
    autoencoder.check_video(video)
    stream = autoencoder.streaming_encoder()
    first = FRAMES_PER_LATENT * (piece - 1) + 1
    parts = [video[:, :, :first], *video[:, :, first:].split(FRAMES_PER_LATENT * piece, 2)]
    latents = [
        stream.step(to_unit_range(part.to(autoencoder.device))) for part in parts if part.shape[2]
    ]
    return torch.cat(latents, 2)[0].float().cpu()


def encoder_fingerprint(autoencoder: Autoencoder) -> str:
    """16 hex digits of everything that latents depend on; further training of the decoder does not
    change it.
    """
    options, tensors = autoencoder.encoding_parts()
    digest = hashlib.sha256(json.dumps(options).encode())
    mean, std = autoencoder.latent_statistics()
    for name, tensor in [*tensors, ("mean", mean), ("std", std)]:
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

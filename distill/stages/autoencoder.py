"""Trains the tiny autoencoder on windows of footage: crisp edges, bounded latents, a decoder that
forgives small errors.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset
from tqdm import tqdm

from distill.config import AutoencoderConfig
from distill.data.clips import list_clips, read_clip
from distill.ema import MovingAverage
from distill.growth import grow_autoencoder
from distill.metrics import luma, second_differences, sharpness
from distill.stages.stage import Loss, Stage
from worldmodel.camera import FRAMES_PER_LATENT
from worldmodel.errors import UserError
from worldmodel.images import to_uint8, to_unit_range
from worldmodel.models.tiny_autoencoder import TinyAutoencoder
from worldmodel.worlds.weights import load_network


class VideoWindows(Dataset):
    """Every window of the footage, {"video": uint8 [3,T,H,W]} with T = 4 * window - 3; the index
    says clip, first frame and crop.

    `crop`: height and width in pixels of the part that is shown, () = the whole frame: smaller
    parts of more scenes teach faster. All frames are held in memory as uint8 (a clip of 161 frames
    at 96x160 is 7.4 MB).
    """

    def __init__(self, root: Path, window: int, crop: Sequence[int] = ()):
        self.crop = tuple(crop)
        self.frames = FRAMES_PER_LATENT * (window - 1) + 1
        folders = list_clips(root)
        self.clips = [
            torch.from_numpy(read_clip(folder).frames)
            for folder in tqdm(folders, "frames", unit="clip")
        ]
        short = [
            folder
            for folder, clip in zip(folders, self.clips, strict=True)
            if len(clip) < self.frames
        ]
        if short or not folders:
            what = f"{short[0]} is shorter" if short else f"{root} holds none"
            raise UserError(
                f"expected clips of at least {self.frames} frames, but {what}: collect longer clips"
            )
        height, width = (min(clip.shape[axis] for clip in self.clips) for axis in (1, 2))
        if self.crop and (
            len(self.crop) != 2 or not (0 < self.crop[0] <= height and 0 < self.crop[1] <= width)
        ):
            raise UserError(
                f"expected crop [height, width] of at most {height}x{width} pixels (the smallest "
                f"clip), got {list(self.crop)}"
            )
        self._ends = np.cumsum([len(clip) - self.frames + 1 for clip in self.clips])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        clip = int(np.searchsorted(self._ends, index, side="right"))
        start = index - (int(self._ends[clip - 1]) if clip else 0)
        video = self.clips[clip][start : start + self.frames].permute(3, 0, 1, 2)
        if self.crop:
            room = [video.shape[2 + axis] - self.crop[axis] for axis in range(2)]
            top, left = (
                int(
                    torch.randint(r + 1, (), generator=torch.Generator().manual_seed(2 * index + i))
                )
                for i, r in enumerate(room)
            )
            video = video[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        return {"video": video}


class AutoencoderStage(Stage):
    """The stage `autoencoder`: one network, whose `average` follows it and is exported."""

    def __init__(self, config: AutoencoderConfig, clips: Path, device: torch.device | str = "cpu"):
        self.config = config
        self.clips = Path(clips)
        self.device = torch.device(device)
        self.autoencoder = build_autoencoder(config).to(self.device)
        self.average = copy.deepcopy(self.autoencoder)
        self.autoencoder.encoder.requires_grad_(not config.freeze_encoder)
        self.modules = {"autoencoder": self.autoencoder, "average": self.average}
        trained = [
            parameter for parameter in self.autoencoder.parameters() if parameter.requires_grad
        ]
        options = {
            "lr": config.lr,
            "betas": (0.9, 0.99),
            "weight_decay": config.weight_decay,
            "fused": True,
        }
        self.optimizers = {"autoencoder": torch.optim.AdamW(trained, **options)}
        self.averages = {
            "autoencoder": MovingAverage(
                self.autoencoder, self.average, config.ema, config.ema_start
            )
        }
        self._windows: VideoWindows | None = None

    def dataset(self) -> VideoWindows:
        """All footage; decoded once."""
        if self._windows is None:
            self._windows = VideoWindows(self.clips, self.config.window, self.config.crop)
        return self._windows

    def losses(self, batch: dict, step: int, generator: torch.Generator) -> Iterator[Loss]:
        """The reconstruction of a batch {"video": uint8 [B,3,T,H,W]}."""
        video = to_unit_range(batch["video"].to(self.device))
        latents = self.autoencoder.encode(video).float()
        _, std = self.autoencoder.latent_statistics()
        noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(
            self.device
        )
        scale = self.config.latent_noise * latents.detach().std((0, 2, 3, 4), keepdim=True)
        decoded = self.autoencoder.decode(latents + noise * scale, clamp=False).float()
        pixel, edge, coarse = reconstruction_terms(decoded, video)
        norm = (latents * std).square().mean()
        square = (decoded - video).square().mean()
        detail = detail_term(decoded, video)
        weights = self.config
        loss = (
            pixel
            + weights.edge_weight * edge
            + weights.coarse_weight * coarse
            + weights.square_weight * square
        )
        loss = loss + weights.detail_weight * detail + weights.latent_weight * norm
        metrics = {
            "l1": pixel,
            "edge": edge,
            "detail": detail,
            "latent_norm": norm,
            "psnr": psnr(decoded.clamp(-1, 1), video),
        }
        energy, truth = (
            sharpness(film.detach().transpose(1, 2).flatten(0, 1)).mean()
            for film in (decoded, video)
        )
        metrics["sharpness"] = energy / truth.clamp(min=1e-9)
        yield "autoencoder", loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> np.ndarray:
        """Truth above, reconstruction below: first and last frames of four windows, uint8 [2H, 8W,
        3].
        """
        windows = self.dataset()
        chosen = torch.randint(
            len(windows), (4,), generator=generator, device=generator.device
        ).tolist()
        video = to_unit_range(
            torch.stack([windows[index]["video"] for index in chosen]).to(self.device)
        )
        decoded = self.average.decode(self.average.encode(video)).float()
        rows = [torch.cat([clip[:, :, 0], clip[:, :, -1]]) for clip in (video, decoded)]
        picture = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
        return to_uint8(picture.permute(1, 2, 0)).cpu().numpy()

    def export(self, folder: Path) -> None:
        """Measures the latents' mean and std over the footage and writes the averaged autoencoder
        to a folder.

        With `freeze_encoder` the statistics stay as they are: latents made before remain valid.
        """
        if not self.config.freeze_encoder:
            measure_latents(self.average, self.dataset().clips, self.device)
        self.average.save_pretrained(folder)


def build_autoencoder(config: AutoencoderConfig) -> TinyAutoencoder:
    """A network of the config's sizes; with `start` it goes on from the trained one there, which
    may be smaller (see `distill.growth`).
    """
    if config.freeze_encoder and not config.start:
        raise UserError(
            "expected `start` with freeze_encoder: an untrained encoder cannot be kept; name a "
            "trained folder"
        )
    names = (
        "latent_channels",
        "encoder_widths",
        "encoder_blocks",
        "decoder_widths",
        "decoder_blocks",
        "strides",
        "patch_size",
    )
    network = TinyAutoencoder(**{name: vars(config)[name] for name in names})
    if config.start:
        trained = load_network(TinyAutoencoder, config.start)
        grow_autoencoder(network, trained, config.start, same_encoder=config.freeze_encoder)
    return network


def reconstruction_terms(decoded: Tensor, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean absolute errors [B,3,T,H,W]: of pixels, of differences to the right and lower neighbour,
    of 4x4 means.
    """
    error = decoded - video
    edge = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean(), edge, functional.avg_pool2d(error.flatten(0, 2), 4).abs().mean()


def detail_term(decoded: Tensor, video: Tensor) -> Tensor:
    """How far the local edge energy of `decoded` [B,3,T,H,W] is from that of `video`, at least 0.

    The energies are means of squares over 5x5 pixels; their distance is Poisson's deviance, whose
    optimum is the expected energy. So what the latents leave open is drawn as crisp as the truth
    is, somewhere near, where pointwise terms average it away. Of the luma, since the energies of
    three colours can be matched with coloured noise.
    Source: local filter energies as in texture models (Portilla and Simoncelli 2000; DISTS, arXiv
    2004.07728).
    """
    pairs = zip(_edge_energies(decoded), _edge_energies(video), strict=True)
    return sum((true * (true / ours).log() - true + ours).mean() for ours, true in pairs)


def _edge_energies(video: Tensor) -> Iterator[Tensor]:
    """Local energy [B*T,1,H',W'] of the luma's first and second differences along both axes and of
    its Laplacian, above 0.
    """
    grey = luma(video.transpose(1, 2).flatten(0, 1))
    across, down = second_differences(grey)
    for edges in (grey.diff(dim=-1), grey.diff(dim=-2), across, down, across + down):
        yield functional.avg_pool2d(edges.square(), 5, 2) + 3e-4


def psnr(decoded: Tensor, video: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of video in [-1, 1], over all elements."""
    return -10 * torch.log10((decoded - video).square().mean() / 4)


@torch.no_grad()
def measure_latents(
    autoencoder: TinyAutoencoder, clips: Sequence[Tensor], device: torch.device, frames: int = 17
) -> None:
    """Sets the autoencoder's per-channel statistics from the raw latents of the middle `frames` (4F
    - 3) of every clip.

    clips: uint8 [T,H,W,3] each.
    """
    channels = autoencoder.config.latent_channels
    autoencoder.set_latent_statistics(torch.zeros(channels), torch.ones(channels))
    latents = []
    for clip in tqdm(clips, "latent statistics", unit="clip"):
        length = min(frames, len(clip) - (len(clip) - 1) % FRAMES_PER_LATENT)
        start = (len(clip) - length) // 2
        video = to_unit_range(clip[start : start + length].to(device)).permute(3, 0, 1, 2)
        latents.append(autoencoder.encode(video[None])[0].flatten(1).float())
    std, mean = torch.std_mean(torch.cat(latents, 1), 1)
    autoencoder.set_latent_statistics(mean, std.clamp(min=1e-6))

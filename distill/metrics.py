"""Distances between generated frames and ground truth: plain functions of pictures, each with a
closed-form test.

Pictures are float32 `[N, 3, H, W]` in [0, 1] (`to_unit` makes them of uint8 `[N, H, W, 3]`);
results are float32 `[N]`.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from worldmodel.errors import UserError

PSNR_LIMIT = 60.0  # dB, of identical pictures: JSON cannot hold the formula's infinity
FLAT = 1e-8  # variance below which a picture has no structure to compare
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def to_unit(frames: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 `[..., H, W, 3]` -> float32 `[..., 3, H, W]` in [0, 1]. Raises ValueError for another
    type or layout.
    """
    frames = torch.as_tensor(frames)
    if frames.dtype != torch.uint8 or frames.ndim < 3 or frames.shape[-1] != 3:
        raise ValueError(
            f"pictures must be uint8 [..., H, W, 3], got {frames.dtype} {list(frames.shape)}"
        )
    return frames.movedim(-1, -3).float() / 255.0


def psnr(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB over all pixels and channels, at most `PSNR_LIMIT`."""
    error = (image - target).square().flatten(1).mean(1)
    return (-10 * torch.log10(error.clamp_min(1e-12))).clamp_max(PSNR_LIMIT)


def ssim(
    image: torch.Tensor, target: torch.Tensor, window: int = 11, sigma: float = 1.5
) -> torch.Tensor:
    """Structural similarity of the luma in [-1, 1]; Wang et al. 2004, Gaussian window, no padding,
    K = 0.01 and 0.03.

    Raises UserError when a picture is smaller than the window.
    """
    if min(image.shape[-2:]) < window:
        raise UserError(
            f"SSIM needs pictures of at least {window}x{window} pixels, got "
            f"{tuple(image.shape[-2:])}"
        )
    offsets = torch.arange(window, dtype=torch.float32, device=image.device) - (window - 1) / 2
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), 0)

    def smooth(x):
        x = F.conv2d(x, kernel.view(1, 1, 1, -1))
        return F.conv2d(x, kernel.view(1, 1, -1, 1))

    a = luma(image)
    b = luma(target)
    mean_a = smooth(a)
    mean_b = smooth(b)
    var_a = smooth(a * a) - mean_a**2
    var_b = smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1 = 0.01**2
    c2 = 0.03**2
    score = (
        (2 * mean_a * mean_b + c1)
        * (2 * covariance + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return score.flatten(1).mean(1)


def correlation(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Zero-mean normalised correlation in [-1, 1]; each channel's own mean is subtracted, a flat
    picture scores 0.

    Unlike PSNR it ignores brightness and contrast, and a grey picture scores nothing.
    """
    a = _centred(image)
    b = _centred(target)
    spread_a = a.square().mean(1)
    spread_b = b.square().mean(1)
    scale = (spread_a * spread_b).clamp_min(FLAT**2).sqrt()
    flat = (spread_a < FLAT) | (spread_b < FLAT)
    return torch.where(flat, torch.zeros_like(scale), (a * b).mean(1) / scale)


def correlation_table(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`correlation` of every image `[N,3,H,W]` with every target `[M,3,H,W]`: `[N, M]`."""
    a = _centred(images)
    b = _centred(targets)
    a, b = (x / x.norm(dim=1, keepdim=True).clamp_min((FLAT * x.shape[1]) ** 0.5) for x in (a, b))
    return a @ b.T


def sharpness(image: torch.Tensor) -> torch.Tensor:
    """Laplacian energy: mean square of the 4-neighbour Laplacian of the luma. Compare pictures by
    its ratio.
    """
    across, down = second_differences(luma(image))
    return (across + down).square().flatten(1).mean(1)


def second_differences(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Second differences of `[..., H, W]` along rows and along columns, `[..., H - 2, W - 2]` each;
    their sum is the 4-neighbour Laplacian.
    """
    return image.diff(n=2, dim=-1)[..., 1:-1, :], image.diff(n=2, dim=-2)[..., 1:-1]


def saturation(image: torch.Tensor) -> torch.Tensor:
    """Mean over the pixels of (largest - smallest channel), in [0, 1]; drift shows as a rise or
    fall over time.
    """
    return (image.amax(1) - image.amin(1)).flatten(1).mean(1)


def luma(image: torch.Tensor) -> torch.Tensor:
    """`[N,3,H,W]` -> `[N,1,H,W]`."""
    return (image * image.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _centred(image: torch.Tensor) -> torch.Tensor:
    return (image - image.mean((2, 3), keepdim=True)).flatten(1)


@dataclass(frozen=True)
class Candidates:
    """The true frames of one clip that retrieval chooses from: latents with (nearly) the same pose
    count as one.
    """

    group: np.ndarray  # [F] int: number of latent k's pose, in order of first appearance
    size: int  # distinct poses


def distinct_poses(c2w: np.ndarray, distance: float, angle: float) -> Candidates:
    """Groups the poses `[F,4,4]` of a clip: closer than `distance` (units) and `angle` (degrees) =
    the same view.
    """
    group = []
    kept = []
    for pose in c2w:
        same = next(
            (i for i, other in enumerate(kept) if _near(pose, other, distance, angle)), len(kept)
        )
        kept += [pose] if same == len(kept) else []
        group.append(same)
    return Candidates(np.array(group), len(kept))


def _near(a: np.ndarray, b: np.ndarray, distance: float, angle: float) -> bool:
    between = np.degrees(np.arccos(np.clip((np.trace(a[:3, :3].T @ b[:3, :3]) - 1) / 2, -1, 1)))
    return np.linalg.norm(a[:3, 3] - b[:3, 3]) < distance and between < angle


def retrieve(scores: np.ndarray, latent: int, candidates: Candidates) -> str:
    """Which true frame is most similar to the generated one of `latent`: "right", "neighbour" or
    "other".

    scores: `[F]` similarity of the generated frame to each true frame. Right = the true view at
    `latent`, neighbour = the view of the latent before or after. Latents with the same view share
    its best score.
    """
    best = candidates.group[int(np.argmax(scores))]
    if best == candidates.group[latent]:
        return "right"
    around = candidates.group[[max(latent - 1, 0), min(latent + 1, len(candidates.group) - 1)]]
    return "neighbour" if best in around else "other"


@dataclass(frozen=True)
class FlowSigns:
    """Mean optical flow of a film. Turning right moves the picture left: `right` < 0. Walking
    forward: `growth` > 0.
    """

    right: float  # horizontal, pixels per frame, positive = rightward
    growth: float  # share per frame by which the picture grows around its centre


def flow_signs(frames: np.ndarray) -> FlowSigns:
    """Optical flow (Farneback) between neighbouring frames uint8 `[T >= 2, H, W, 3]`, averaged over
    time.
    """
    flow = _flow(frames).mean(0)
    height, width = flow.shape[:2]
    y, x = np.mgrid[:height, :width]
    arm = np.stack([x - (width - 1) / 2, y - (height - 1) / 2], -1)
    mean = flow.mean((0, 1))
    growth = ((flow - mean) * arm).sum() / (arm**2).sum()
    return FlowSigns(right=float(mean[0]), growth=float(growth))


def flow_magnitude(frames: np.ndarray) -> float:
    """Mean length of the optical flow in pixels per frame, between neighbouring frames uint8 `[T >=
    2, H, W, 3]`.
    """
    return float(np.linalg.norm(_flow(frames), axis=-1).mean())


def _flow(frames: np.ndarray) -> np.ndarray:
    """Farneback's flow between neighbouring frames uint8 `[T >= 2, H, W, 3]`: `[T - 1, H, W,
    2]`.
    """
    if frames.ndim != 4 or len(frames) < 2:
        raise ValueError(
            "optical flow needs at least two frames [T, H, W, 3], got an array of shape "
            f"{frames.shape}"
        )
    grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in frames]
    pairs = zip(grey, grey[1:], strict=False)
    return np.stack(
        [cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 4, 15, 3, 5, 1.2, 0) for a, b in pairs]
    )

"""Reconstruction terms of the autoencoder, on video `[B, 3, T, H, W]` in [-1, 1]."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from distill.metrics import luma, second_differences


def reconstruction_terms(decoded: Tensor, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean absolute errors: of pixels, of differences to the right and lower neighbour, of 4x4
    means.
    """
    error = decoded - video
    edge = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean(), edge, functional.avg_pool2d(error.flatten(0, 2), 4).abs().mean()


def detail_term(decoded: Tensor, video: Tensor) -> Tensor:
    """Distance between the local edge energies of `decoded` and `video`, at least 0.

    The energies are means of squares over 5x5 pixels; their distance is the Poisson deviance, whose
    optimum is the expected energy. So details that the latents do not determine are drawn as crisp
    as in the video, near their place, where pointwise terms would average them away. The energies
    are of the luma, since coloured noise can match those of three colours.
    Source: local filter energies as in texture models (Portilla and Simoncelli 2000; DISTS, arXiv
    2004.07728).
    """
    pairs = zip(_edge_energies(decoded), _edge_energies(video), strict=True)
    return sum((true * (true / ours).log() - true + ours).mean() for ours, true in pairs)


def _edge_energies(video: Tensor) -> Iterator[Tensor]:
    """Local energies [B*T,1,H',W'], above 0: of the luma's first and second differences along both
    axes and of its Laplacian.
    """
    grey = luma(video.transpose(1, 2).flatten(0, 1))
    across, down = second_differences(grey)
    for edges in (grey.diff(dim=-1), grey.diff(dim=-2), across, down, across + down):
        yield functional.avg_pool2d(edges.square(), 5, 2) + 3e-4


def psnr(decoded: Tensor, video: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over all elements."""
    return -10 * torch.log10((decoded - video).square().mean() / 4)

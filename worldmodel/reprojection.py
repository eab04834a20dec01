"""Remembered frames with depth, seen again from other cameras.

A rigid scene that was filmed with its depth can be looked at from anywhere near the film's cameras:
the pixels of a few remembered frames are points in space, and the nearest point along every ray of
the new camera gives its colour. The picture has holes (what no frame showed) and small errors
(edges, points of different resolution); it is a condition of the network, which repairs it, not a
picture for the screen. Sources: Gen3C (arXiv 2503.03751) and Voyager (2506.04225) condition on
rendered point caches; Context-as-Memory (2506.03141) chooses frames by view overlap.

Depth is along the camera's z axis; coordinates become relative to the asking camera in float64
before they become float32.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional

from worldmodel.camera import FRAMES_PER_LATENT, invert
from worldmodel.models.streaming import StreamState
from worldmodel.models.view_overlap import greedy_cover

NEAR = 0.02  # units; nothing nearer is seen
SKY = 500.0  # units; depths beyond are infinitely far
CELLS = (12, 20)  # rows and columns of the picture in which overlap is counted
PROBES = (6, 10)  # rows and columns of points that stand for a remembered frame
OCCLUSION = 1.25  # a probe this much farther than the nearest one in its cell counts as hidden
SLACK = (
    1.12  # a point this much farther than most of its neighbours shines through a nearer surface
)
RADIUS = 1  # pixels: the neighbours
MOST = 0.55  # share of the neighbours


@dataclass(frozen=True)
class RememberedViews:
    """N frames of one place.

    pictures: uint8 [N, H, W, 3]. depth: [N, H, W], units along z. c2w: float64 [N, 4, 4].
    intrinsics: fx/W, fy/H, cx/W, cy/H.
    """

    pictures: Tensor
    depth: Tensor
    c2w: np.ndarray
    intrinsics: tuple[float, float, float, float]

    def __len__(self) -> int:
        return len(self.c2w)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return tuple(self.depth.shape[1:])

    @cached_property
    def probes(self) -> tuple[Tensor, Tensor]:
        """Points that each frame sees, spread over its picture: [N, P, 3] float64 in the place, and
        their depth [N, P].
        """
        height, width = self.size
        rows = ((torch.arange(PROBES[0]) + 0.5) * height / PROBES[0]).long()
        columns = ((torch.arange(PROBES[1]) + 0.5) * width / PROBES[1]).long()
        depth = self.depth[:, rows][:, :, columns].double().clamp(max=SKY).flatten(1)
        rays = self._rays[:, rows][:, :, columns].flatten(1).double()
        points = (rays * depth[:, None]).transpose(1, 2)
        c2w = torch.from_numpy(self.c2w)
        points = points @ c2w[:, :3, :3].transpose(1, 2) + c2w[:, None, :3, 3]
        return points, depth.float()

    def choose(self, c2w: np.ndarray, count: int, without: np.ndarray | None = None) -> list[int]:
        """Numbers of the `count` frames (or fewer) that together show most of what a camera at
        `c2w` [4, 4] sees, each at a similar distance.

        without: bool [N], frames that must not be chosen.
        """
        quality = self._quality(c2w)
        if without is not None:
            quality[torch.from_numpy(without)] = 0
        return greedy_cover(quality, count)

    def reproject(self, chosen: list[int], c2w: np.ndarray) -> tuple[Tensor, Tensor]:
        """The frames `chosen` as a camera at `c2w` [4, 4] sees their points: uint8 [H, W, 3] (grey
        where nothing is known) and bool [H, W], what is known.
        """
        height, width = self.size
        picture = torch.full((height * width, 3), 127, dtype=torch.uint8)
        known = torch.zeros(height * width, dtype=torch.bool)
        if not chosen:
            return picture.view(height, width, 3), known.view(height, width)
        z, pixel, source = self._project(chosen, c2w)
        nearest = torch.full((height * width,), SKY * 4)
        nearest.scatter_reduce_(0, pixel, z, "amin")
        first = z == nearest[pixel]
        pixel = pixel[first]
        # of several points as near the one of the lowest number, whatever the order of the threads
        owner = torch.full((height * width,), len(chosen) * height * width)
        owner.scatter_reduce_(0, pixel, source[first], "amin")
        known[pixel] = True
        picture[known] = self.pictures[chosen].view(-1, 3)[owner[known]]
        known.logical_and_(_shines_through(nearest.view(height, width)).flatten().logical_not_())
        return picture.view(height, width, 3), known.view(height, width)

    # -------------------- inside

    @cached_property
    def _rays(self) -> Tensor:
        """Camera-space directions with z = 1, [3, H, W]."""
        height, width = self.size
        fx, fy, cx, cy = self.intrinsics
        v = ((torch.arange(height) + 0.5) / height - cy) / fy
        u = ((torch.arange(width) + 0.5) / width - cx) / fx
        y, x = torch.meshgrid(v, u, indexing="ij")
        return torch.stack([x, y, torch.ones_like(x)])

    def _quality(self, c2w: np.ndarray) -> Tensor:
        """How well each frame shows each cell of the asking camera's picture, [N, cells] in
        [0, 1].
        """
        points, own = self.probes
        w2c = torch.from_numpy(invert(c2w[None])[0])
        seen = (points @ w2c[:3, :3].T + w2c[:3, 3]).float()
        z = seen[..., 2]
        fx, fy, cx, cy = self.intrinsics
        depth = z.clamp(min=NEAR)
        column = ((seen[..., 0] / depth * fx + cx) * CELLS[1]).floor()
        row = ((seen[..., 1] / depth * fy + cy) * CELLS[0]).floor()
        inside = (z > NEAR) & (column >= 0) & (column < CELLS[1]) & (row >= 0) & (row < CELLS[0])
        cell = (row * CELLS[1] + column).long()
        view, probe = inside.nonzero(as_tuple=True)
        cell = cell[view, probe]
        z = z[view, probe]
        nearest = torch.full((CELLS[0] * CELLS[1],), SKY * 4)
        nearest.scatter_reduce_(0, cell, z, "amin")
        ratio = z / own[view, probe].clamp(min=NEAR)
        score = torch.minimum(ratio, 1 / ratio)
        score = score * (z <= OCCLUSION * nearest[cell])
        quality = torch.zeros(len(self) * len(nearest))
        quality.scatter_reduce_(0, view * len(nearest) + cell, score, "amax")
        return quality.view(len(self), -1)

    def _project(self, chosen: list[int], c2w: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Points of the frames `chosen` that fall into the picture of a camera at `c2w`: z, number
        of the pixel, number of the source pixel, [M] each.
        """
        height, width = self.size
        fx, fy, cx, cy = self.intrinsics
        relative = torch.from_numpy(invert(c2w[None])[0] @ self.c2w[chosen]).float()
        depth = self.depth[chosen].float().clamp(max=SKY).flatten(1)
        rays = relative[:, :3, :3] @ self._rays.flatten(1)
        seen = torch.addcmul(relative[:, :3, 3:], rays, depth[:, None])
        x, y, z = seen.unbind(1)
        scale = 1 / z.clamp(min=NEAR)
        column = (x * scale).mul_(fx * width).add_(cx * width).floor_()
        row = (y * scale).mul_(fy * height).add_(cy * height).floor_()
        inside = (z > NEAR) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
        source = inside.flatten().nonzero().squeeze(1)
        pixel = row.mul_(width).add_(column).flatten()[source].long()
        return z.flatten()[source], pixel, source


def _shines_through(depth: Tensor) -> Tensor:
    """Where most neighbours belong to a nearer surface, whose points stand too far apart here to
    hide what is behind it: bool [H, W].
    """
    size = 2 * RADIUS + 1
    padded = functional.pad(depth[None, None], [RADIUS] * 4, value=SKY * 4)
    patches = functional.unfold(padded, size).view(size * size, *depth.shape)
    nearer = (patches * SLACK < depth).sum(0)
    return nearer > MOST * (size * size - 1)


class ConditionStream:
    """Condition latents along a camera's path, a latent at a time.

    A condition is `[1, 4 + C, F, h, w]` float32: for each of a latent's four video frames the known
    share of every latent cell, then the encoded reprojection (Wan2.1's image-to-video networks read
    the same: a mask of four channels, then latents). The four frames are seen from poses between
    the last latent's and this one's.

    autoencoder: its encoder; pictures of the views have the encoder's resolution. count: views that
    a latent is made of. without: see `RememberedViews.choose`.
    """

    def __init__(
        self,
        views: RememberedViews,
        autoencoder,
        count: int,
        without: np.ndarray | None = None,
    ):
        self.views = views
        self.count = count
        self.without = without
        self._device = autoencoder.device
        self._encoder = autoencoder.streaming_encoder(reduced=True)
        self._pose: np.ndarray | None = None

    def state(self) -> tuple[StreamState, np.ndarray | None]:
        """What the next step depends on."""
        return self._encoder.state(), self._pose

    def restore(self, state: tuple[StreamState, np.ndarray | None]) -> None:
        """Continues from a state."""
        encoder, self._pose = state
        self._encoder.restore(encoder)

    def step(self, c2w: np.ndarray) -> Tensor:
        """The condition of the next F latents, whose poses are `c2w` [F, 4, 4] in the place's
        coordinates.
        """
        films = []
        shares = []
        for pose in c2w:
            chosen = self.views.choose(pose, self.count, self.without)
            between = [pose] if self._pose is None else poses_between(self._pose, pose)
            seen = [self.views.reproject(chosen, one) for one in between]
            films += [filled(picture, known) for picture, known in seen]
            share = torch.stack([known for _, known in seen]).float()
            shares.append(share.expand(FRAMES_PER_LATENT, -1, -1))
            self._pose = pose
        video = torch.stack(films, dim=1)[None]
        latents = self._encoder.step(video.to(self._device)).float()
        size = latents.shape[3:]
        mask = functional.adaptive_avg_pool2d(torch.stack(shares, dim=1), size)[None]
        return torch.cat([mask.to(self._device), latents], dim=1)


def poses_between(before: np.ndarray, after: np.ndarray) -> list[np.ndarray]:
    """Poses [4, 4] of the video frames of a latent, evenly spaced; the last is `after`."""
    turn = Rotation.from_matrix(before[:3, :3].T @ after[:3, :3]).as_rotvec()
    poses = []
    for number in range(1, FRAMES_PER_LATENT):
        share = number / FRAMES_PER_LATENT
        pose = after.copy()
        pose[:3, :3] = before[:3, :3] @ Rotation.from_rotvec(share * turn).as_matrix()
        pose[:3, 3] = before[:3, 3] + share * (after[:3, 3] - before[:3, 3])
        poses.append(pose)
    return [*poses, after]


def filled(picture: Tensor, known: Tensor) -> Tensor:
    """uint8 [H, W, 3] with holes -> [3, H, W] in [-1, 1], every hole with the mean of what is known
    around it (grey where nothing is).
    """
    weight = known.float()[None, None]
    colour = (picture.permute(2, 0, 1)[None].float() / 127.5 - 1) * weight
    levels = [(colour, weight)]
    while min(levels[-1][1].shape[2:]) > 1:
        levels.append(tuple(functional.avg_pool2d(x, 2, ceil_mode=True) for x in levels[-1]))
    fill = levels[-1][0] / levels[-1][1].clamp(min=1e-6)
    for colour, weight in reversed(levels[:-1]):
        fill = functional.interpolate(fill, colour.shape[2:], mode="nearest")
        share = (weight * 4).clamp(max=1)
        fill = torch.lerp(fill, colour / weight.clamp(min=1e-6), share)
    return fill[0]

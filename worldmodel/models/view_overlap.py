"""Which remembered cameras show what another camera asks for, without depth.

Points on the asking camera's rays, at a few depths, stand for what it may see. A remembered camera
scores at a point that falls into its picture, more when it saw the point at a similar distance and
looked the same way (from behind, a wall shows its other side); the chosen cameras complement each
other. Source: Context-as-Memory (arXiv 2506.03141), whose cameras
move in a plane. Differs: any pose, several depths, and a greedy cover.
"""

from typing import NamedTuple

import torch
from torch import Tensor

DEPTHS = (0.5, 1.0, 2.0, 4.0)  # of the test points along z, times the world's unit
ACROSS = (-1 / 3, 0.0, 1 / 3)  # rays, from the middle of the picture, in picture widths and heights
NEAR = 0.02  # smallest depth, times the world's unit
FEW = 256  # candidates that the test points are projected into
_TINY = 1e-5  # gains below are rounding


def choose_views(
    w2c: Tensor,
    focal: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    count: int,
    unit: float = 1.0,
    dropped: Tensor | None = None,
) -> list[int]:
    """Numbers, rising, of `count` candidates (all, if there are fewer) that together show most of
    what the asking cameras may see; where nothing more is gained, the last candidates.

    w2c `[N, 3, 4]` and focal `[N, 2]` (fx/W, fy/H): the candidates, oldest first; of equal ones the
    oldest is chosen. viewmats `[F, 4, 4]` w2c and intrinsics `[F, 4]`: the asking cameras. All
    float64 on the CPU. unit: length, in the poses' units, that the depths are multiples of.
    dropped: bool `[N]`, candidates that count as showing nothing.
    """
    total = len(w2c)
    if total <= count:
        return list(range(total))
    few = torch.arange(total)
    if total > FEW:
        rough = _nearness(w2c, viewmats, unit)
        if dropped is not None:
            rough[dropped] = 0
        least = rough.topk(FEW).values[-1]
        more = (rough > least).nonzero().squeeze(1)
        ties = (rough == least).nonzero().squeeze(1)[: FEW - len(more)]
        few = torch.cat([more, ties]).sort().values
    quality = _quality(w2c[few], focal[few], _test_points(viewmats, intrinsics, unit), unit)
    if dropped is not None:
        quality[dropped[few]] = 0
    chosen = [int(few[place]) for place in greedy_cover(quality, count, _TINY)]
    rest = (number for number in reversed(range(total)) if number not in chosen)
    while len(chosen) < count:
        chosen.append(next(rest))
    return sorted(chosen)


class TestPoints(NamedTuple):
    """Points that stand for what the asking cameras may see."""

    places: Tensor  # [P, 3], in the world
    axes: Tensor  # [P, 3], where their camera looks
    depth: Tensor  # [P], along that axis


def _nearness(w2c: Tensor, viewmats: Tensor, unit: float) -> Tensor:
    """Whether a candidate stands near an asking camera and looks the same way, `[N]` in [0, 1]: a
    rough order of many.
    """
    heading = (w2c[:, 2, :3] @ viewmats[:, 2, :3].T).clamp_(min=0)
    places = torch.linalg.inv(viewmats)[:, :, 3]
    away = (w2c.flatten(0, 1) @ places.T).unflatten(0, (-1, 3)).square_().sum(1)
    return (heading / (1 + away / (2 * unit) ** 2)).amax(1)


def _test_points(viewmats: Tensor, intrinsics: Tensor, unit: float) -> TestPoints:
    axes = (torch.tensor(axis, dtype=torch.float64) for axis in (ACROSS, ACROSS, DEPTHS))
    y, x, z = (grid.flatten() for grid in torch.meshgrid(*axes, indexing="ij"))
    lens = torch.ones(len(viewmats), 1, 3, dtype=torch.float64)
    lens[:, 0, :2] = intrinsics[:, :2]
    seen = torch.stack([x, y, torch.ones_like(x)], dim=1) / lens * (z * unit)[:, None]
    rotation = viewmats[:, :3, :3]
    places = (seen - viewmats[:, None, :3, 3]) @ rotation  # the inverse of a rotation
    looking = rotation[:, 2:].expand(-1, len(x), -1)
    depth = (z * unit).repeat(len(viewmats))
    return TestPoints(places.flatten(0, 1), looking.flatten(0, 1), depth)


def _quality(w2c: Tensor, focal: Tensor, points: TestPoints, unit: float) -> Tensor:
    """How well every candidate shows every point, `[N, P]` in [0, 1]."""
    # float64, because play lets float32 products round to bfloat16
    seen = (w2c[:, :, :3].flatten(0, 1) @ points.places.T).unflatten(0, (-1, 3)) + w2c[:, :, 3:]
    heading = (w2c[:, 2, :3] @ points.axes.T).float().clamp_(min=0)
    x, y, z = seen.float().unbind(1)
    lens = 2 * focal.float()
    inside = (x.abs() * lens[:, :1] <= z) & (y.abs() * lens[:, 1:] <= z) & (z > NEAR * unit)
    ratio = z.clamp_(min=NEAR * unit) / points.depth.float()
    return torch.minimum(ratio, 1 / ratio) * heading * inside


def greedy_cover(quality: Tensor, count: int, least: float = 0.0) -> list[int]:
    """At most `count` rows of `quality` `[N, P]`, one after the other, that add most to what the
    ones before show, as long as they add more than `least`.
    """
    chosen = []
    best = torch.zeros(quality.shape[1])
    for _ in range(count):
        gain = (quality - best).clamp_(min=0).sum(1)
        place = int(gain.argmax())
        if gain[place] <= least:
            break
        chosen.append(place)
        best = torch.maximum(best, quality[place])
    return chosen

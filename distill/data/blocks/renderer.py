"""Ray caster for towns and the island, in torch: flat shading, hard shadows, fog, sky, sun on the
sea; exact for any camera, resolution and device.

Every pixel gets samples x samples rays on a regular grid, averaged. A box is tested only against
the pixels inside the screen rectangle that bounds it, and its shadow only inside the rectangle that
bounds its shadow volume. Both rectangles are conservative, so the picture equals that of the plain
path (`plain=True`: every ray against every box), which is the reference. At 96x160 with 2x2 rays
one CPU core renders about 75 pictures per second. Coordinates become relative to the camera in
float64 before they become float32, so that no detail is lost far from the origin.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

from distill.data.blocks.scenes import Scene, scene_of
from distill.data.blocks.town import CELL, TILES, Boxes

FAR = 1e3  # depth of the sky, units; the fog hides every surface there
NEAR = 1e-3  # nothing nearer than this is drawn, units
# length inside a box from which a shadow ray is stopped by it (a face does not shade itself)
SKIN = 1e-3
# ambient light on faces across x, y, z: unlit faces stay distinct
FACE_LIGHT = np.array([0.92, 1.0, 0.80])
# distances at which the tiles of the ground begin and end to blend into one tone, units
TILE_FADE = (1.4, 3.4)
GLITTER_WIDTH = 14.0  # of the sun's reflection on the sea, degrees to each side


def render(
    scene: Scene,
    c2w,
    intrinsics,
    height: int = 96,
    width: int = 160,
    samples: int = 2,
    device="cpu",
    plain: bool = False,
    depth: bool = False,
):
    """Pictures of a town or an island.

    Args:
        c2w: camera-to-world matrices [N, 4, 4] (or [4, 4]) in world units, numpy or torch.
        intrinsics: fx/W, fy/H, cx/W, cy/H, [4] or [N, 4].
        samples: rays along each side of a pixel (2 = four rays per pixel).
        plain: test every ray against every box; slow, the reference for the default.
        depth: return the depth too, see `render_depth`.
    Returns:
        uint8 [N, height, width, 3] on `device`; with `depth`, a pair of it and the depth.
    Raises:
        ValueError: shapes that do not fit, poses that are not finite, sizes below 1.
    """
    cameras = _cameras(c2w, intrinsics, height, width, samples)
    frames = torch.empty(len(cameras[0]), height, width, 3, dtype=torch.uint8, device=device)
    for index, view in enumerate(_views(scene, *cameras, height, width, samples, device)):
        frames[index] = view.picture(plain)
    if not depth:
        return frames
    return frames, render_depth(scene, c2w, intrinsics, height, width, device, plain)


def render_depth(
    scene: Scene,
    c2w,
    intrinsics,
    height: int = 96,
    width: int = 160,
    device="cpu",
    plain: bool = False,
) -> torch.Tensor:
    """Depth of the first surface along the ray through the centre of every pixel: its z in camera
    coordinates, units, float32 [N, height, width]. The sea is a surface; the sky is at FAR.

    Arguments and errors as in `render`.
    """
    cameras = _cameras(c2w, intrinsics, height, width, 1)
    depth = torch.empty(len(cameras[0]), height, width, dtype=torch.float32, device=device)
    for index, view in enumerate(_views(scene, *cameras, height, width, 1, device)):
        depth[index] = view.depth(plain)
    return depth


def render_source(
    source: str, c2w, intrinsics, height: int = 96, width: int = 160, samples: int = 2, device="cpu"
) -> torch.Tensor:
    """Pictures of the scene of a clip (`source` of its meta.yaml) at any poses; see `render`."""
    return render(scene_of(source), c2w, intrinsics, height, width, samples, device)


def _cameras(
    c2w, intrinsics, height: int, width: int, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """The arguments of `render`, checked: camera-to-world [N, 4, 4], intrinsics [N, 4]."""
    c2w = np.asarray(c2w, dtype=np.float64).reshape(-1, *np.shape(c2w)[-2:])
    intrinsics = np.broadcast_to(np.asarray(intrinsics, dtype=np.float64), (len(c2w), 4))
    if c2w.shape[1:] != (4, 4) or not np.isfinite(c2w).all():
        raise ValueError(
            f"expected finite camera-to-world matrices [N, 4, 4], got shape {c2w.shape}"
        )
    if min(height, width, samples) < 1:
        raise ValueError(
            f"expected a height, width and sample count of at least 1, got {height}, {width}, "
            f"{samples}"
        )
    return c2w, intrinsics


def _views(
    scene: Scene, c2w, intrinsics, height: int, width: int, samples: int, device
) -> Iterator["_View"]:
    """One view per camera; what neighbouring cameras share is computed once."""
    rays = {}  # of the last lens
    surroundings = {}  # of the last cell
    for pose, lens in zip(c2w, intrinsics):
        cell = tuple(math.floor(pose[k, 3] / CELL) for k in (0, 2))
        if cell not in surroundings:
            boxes = scene.boxes(*cell, scene.reach)
            surroundings = {cell: (boxes, *scene.ground(*cell, scene.reach))}
        key = tuple(lens)
        if key not in rays:
            rays = {key: _rays(lens, height, width, samples, device)}
        yield _View(scene, pose, lens, rays[key], cell, scene.reach, *surroundings[cell])


def _rays(lens: np.ndarray, height: int, width: int, samples: int, device) -> torch.Tensor:
    """Camera-space directions with z = 1, [3, samples^2, height, width]: one plane per sample
    position in the pixel.
    """
    offset = (np.arange(samples) + 0.5) / samples
    v = ((np.arange(height) + offset[:, None]) / height - lens[3]) / lens[1]  # [samples, height]
    u = ((np.arange(width) + offset[:, None]) / width - lens[2]) / lens[0]
    grid = np.empty((3, samples, samples, height, width), dtype=np.float32)
    grid[0] = u[None, :, None, :]
    grid[1] = v[:, None, :, None]
    grid[2] = 1.0
    return torch.from_numpy(grid.reshape(3, samples * samples, height, width)).to(device)


class _View:
    """One picture: the boxes around one camera, in coordinates relative to it."""

    def __init__(
        self, scene, pose, lens, rays, cell, reach, boxes: Boxes, near: np.ndarray, far: np.ndarray
    ):
        self.look = scene.look
        self.sea = scene.sea(*cell, reach)
        self.lens = lens
        self.device = rays.device
        self.rotation = pose[:3, :3]
        self.eye = pose[:3, 3]
        self.height, self.width = rays.shape[-2:]
        self.boxes = boxes
        self.low = boxes.low - self.eye
        self.high = boxes.high - self.eye
        self.ground_y = -self.eye[1]
        self.corner = (np.array(cell) - reach) * CELL - self.eye[[0, 2]]  # of the tile map
        self.tiles = self._tile_colours(near, far)
        rotation = torch.tensor(self.rotation, dtype=torch.float32, device=self.device)
        self.directions = (rotation @ rays.flatten(1)).view_as(rays)
        self.directions[self.directions.abs() < 1e-9] = 1e-9
        self.inverse = self.directions.reciprocal()
        self.length = rays.square().sum(0).sqrt_()

    def picture(self, plain: bool) -> torch.Tensor:
        """uint8 [height, width, 3]."""
        depth, surface = (self._trace_plain if plain else self._trace)()
        shadow = (self._shade_plain if plain else self._shade)(depth)
        lookup = surface.mul_(2).add_(shadow).flatten()
        clear = (
            (depth * self.length)
            .mul_(math.sqrt(-math.log(0.02)) / self.look.visibility)
            .square_()
            .neg_()
            .exp_()
        )
        colours = torch.tensor(
            self._colours().T, dtype=torch.float32, device=self.device
        ).contiguous()
        glitter = self._glitter(lookup)
        pixels = []
        for sky, table, glare in zip(self._sky(), colours, self.look.disc):
            solid = table.index_select(0, lookup).view_as(depth)
            if glitter is not None:
                solid += glitter * (glare - solid)
            pixels.append(solid.sub_(sky).mul_(clear).add_(sky).mean(0))
        return torch.stack(pixels, dim=-1).mul_(255).round_().clamp_(0, 255).to(torch.uint8)

    def depth(self, plain: bool) -> torch.Tensor:
        """Depth of the first surface along each pixel's first ray, float32 [height, width]."""
        return (self._trace_plain if plain else self._trace)()[0][0]

    def _glitter(self, lookup: torch.Tensor) -> torch.Tensor | None:
        """Share of the sun's light in every ray's colour, [samples^2, H, W]: a band on the sunlit
        sea from the camera to the horizon below the sun. None where no water is near.
        """
        if self.sea is None or not self.look.glitter:
            return None
        lit = np.zeros(2 * (self.sea.size + 3 * len(self.boxes)), dtype=np.float32)
        lit[: 2 * self.sea.size : 2] = self.look.glitter * self.sea.ravel()
        sun = self.look.sun_direction[[0, 2]] / np.hypot(*self.look.sun_direction[[0, 2]])
        x = self.directions[0]
        z = self.directions[2]
        aside = (x * float(sun[0])).add_(z * float(sun[1])).div_((x * x).addcmul_(z, z).sqrt_())
        spread = 1 / math.radians(GLITTER_WIDTH) ** 2
        share = aside.sub_(1).mul_(spread).exp_()
        return share.mul_(torch.from_numpy(lit).to(self.device)[lookup].view_as(share))

    def _ground(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Depth along the rays and tile number of the ground, both [samples^2, H, W]; FAR where no
        ground is hit.
        """
        depth = self.inverse[1] * self.ground_y
        depth.masked_fill_((depth <= 0) | (depth > FAR), FAR)
        surface = torch.zeros_like(depth)
        for axis, start in ((0, self.corner[0]), (2, self.corner[1])):
            tile = (
                (self.directions[axis] * depth)
                .sub_(start)
                .mul_(TILES / CELL)
                .floor_()
                .clamp_(0, len(self.tiles) - 1)
            )
            surface.mul_(len(self.tiles)).add_(tile)
        return depth, surface.to(torch.int32)

    def _trace(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First surface along every ray: depth (z = 1 is one unit), number (a tile, or tiles + 3 *
        box + face axis).
        """
        depth, surface = self._ground()
        rectangles = self._rectangles(_corners(self.low, self.high))
        for box in np.flatnonzero(rectangles[:, 0] < rectangles[:, 1]):
            top, bottom, left, right = rectangles[box].tolist()
            window = (slice(None), slice(top, bottom), slice(left, right))
            hit = _enter(
                self.inverse[(slice(None), *window)],
                self.low[box].tolist(),
                self.high[box].tolist(),
            )
            if hit is None:
                continue
            entry, leave, faces = hit
            before = depth[window]
            number = surface[window]
            nearer = entry < torch.minimum(leave, before)
            torch.where(nearer, entry, before, out=before)
            first = self.tiles.shape[0] ** 2 + 3 * int(box)
            number.masked_fill_(nearer, first + faces[0][0])
            for axis, own in faces[1:]:
                number.masked_fill_(nearer.logical_and(own == entry), first + axis)
        return depth, surface

    def _shade(self, depth: torch.Tensor) -> torch.Tensor:
        """Whether the visible surface lies in the shadow of a box, bool [samples^2, H, W]."""
        shadow = torch.zeros(depth.shape, dtype=torch.bool, device=self.device)
        sun = self.look.sun_direction
        # distance back along the sun ray
        minus = [self.directions[axis] * depth / float(-sun[axis]) for axis in range(3)]
        start, end = self._sun_slabs()
        corners = _corners(self.low, self.high)
        # distance along the sun ray from the ground to the corner
        fall = (corners[..., 1:2] - self.ground_y) / sun[1]
        rectangles = self._rectangles(np.concatenate([corners, corners - fall * sun], axis=1))
        for box in np.flatnonzero(rectangles[:, 0] < rectangles[:, 1]):
            top, bottom, left, right = rectangles[box].tolist()
            x, y, z = (plane[:, top:bottom, left:right] for plane in minus)
            (x0, y0, z0) = start[box].tolist()
            (x1, y1, z1) = end[box].tolist()
            leave = torch.minimum(torch.minimum(x.add(x1), z.add(z1)), y.add(y1))
            enter = torch.maximum(torch.maximum(x.add(x0), z.add(z0)), y.add(y0)).clamp_(min=0)
            shadow[:, top:bottom, left:right].logical_or_(leave > enter.add_(SKIN))
        return shadow

    def _trace_plain(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_trace`: the textbook slab test of every ray against every box."""
        depth, surface = self._ground()
        for box, (low, high) in enumerate(zip(self.low.tolist(), self.high.tolist())):
            one = torch.stack([self.inverse[axis] * low[axis] for axis in range(3)])
            other = torch.stack([self.inverse[axis] * high[axis] for axis in range(3)])
            entry, axis = torch.minimum(one, other).max(0)
            leave = torch.maximum(one, other).amin(0)
            nearer = (entry < leave) & (entry > 0) & (entry < depth)
            depth = torch.where(nearer, entry, depth)
            surface = torch.where(nearer, self.tiles.shape[0] ** 2 + 3 * box + axis.int(), surface)
        return depth, surface

    def _shade_plain(self, depth: torch.Tensor) -> torch.Tensor:
        """As `_shade`, with every surface point against every box."""
        sun = torch.tensor(self.look.sun_direction, dtype=torch.float32, device=self.device).view(
            3, 1, 1, 1
        )
        shadow = torch.zeros(depth.shape, dtype=torch.bool, device=self.device)
        scaled = self.directions * depth / sun
        for start, end in zip(*self._sun_slabs()):
            start, end = (
                torch.tensor(side, dtype=torch.float32, device=self.device).view(3, 1, 1, 1)
                for side in (start, end)
            )
            shadow |= (end - scaled).amin(0) > (start - scaled).amax(0).clamp(min=0) + SKIN
        return shadow

    def _sun_slabs(self) -> tuple[np.ndarray, np.ndarray]:
        """Where a ray from the camera to the sun enters and leaves the slabs of every box, [M, 3]
        each.
        """
        one = self.low / self.look.sun_direction
        other = self.high / self.look.sun_direction
        return np.minimum(one, other), np.maximum(one, other)

    def _rectangles(self, points: np.ndarray) -> np.ndarray:
        """Pixel rectangles (top, bottom, left, right; ends excluded) that bound the convex hulls of
        points [M, n, 3].

        A hull that the near plane cuts is bounded through the cuts of all its point-to-point
        segments. Empty: top = bottom.
        """
        seen = points @ self.rotation  # camera coordinates
        front = seen[..., 2] > NEAR
        cut = front.any(1) & ~front.all(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            flat = seen[..., :2] / seen[..., 2:]
            low = np.where(front[..., None], flat, np.inf).min(1)
            high = np.where(front[..., None], flat, -np.inf).max(1)
        if cut.any():
            first, second = np.triu_indices(points.shape[1], 1)
            a = seen[cut][:, first]
            b = seen[cut][:, second]
            crossing = ((a[..., 2] > NEAR) != (b[..., 2] > NEAR))[..., None]
            share = np.divide(
                NEAR - a[..., 2:],
                b[..., 2:] - a[..., 2:],
                where=crossing,
                out=np.zeros_like(a[..., 2:]),
            )
            flat = (a + share * (b - a))[..., :2] / NEAR
            low[cut] = np.minimum(low[cut], np.where(crossing, flat, np.inf).min(1))
            high[cut] = np.maximum(high[cut], np.where(crossing, flat, -np.inf).max(1))
        low[~front.any(1)] = 0
        high[~front.any(1)] = 0
        size = np.array([self.width, self.height])
        low = np.clip(
            np.floor((low * self.lens[:2] + self.lens[2:]) * size - 0.01), 0, size
        ).astype(int)
        high = np.clip(
            np.ceil((high * self.lens[:2] + self.lens[2:]) * size + 0.01), 0, size
        ).astype(int)
        empty = ~front.any(1) | (low >= high).any(1)
        bounds = np.stack([low[:, 1], high[:, 1], low[:, 0], high[:, 0]], axis=1)
        return np.where(empty[:, None], 0, bounds)

    def _tile_colours(self, near: np.ndarray, far: np.ndarray) -> np.ndarray:
        """Tile colours [T, T, 3], blended into their far tone by distance, before they become too
        small to sample.
        """
        centres = (np.arange(len(near)) + 0.5) * CELL / TILES
        distance = np.hypot(
            (centres + self.corner[0])[:, None], (centres + self.corner[1])[None, :]
        )
        weight = np.clip((distance - TILE_FADE[0]) / (TILE_FADE[1] - TILE_FADE[0]), 0, 1)[..., None]
        return near + weight * (far - near)

    def _colours(self) -> np.ndarray:
        """Colour of every surface number, lit and shaded alternating: [2 * (T * T + 3 * M), 3]."""
        look = self.look
        sun = look.sun_direction
        light = np.array(look.light)
        ambient = np.array(look.ambient)
        tiles = self.tiles.reshape(-1, 3)
        ground = np.stack([tiles * (ambient - light * sun[1]), tiles * ambient], axis=1)
        # of the visible face across each axis: low side (normal -1) or high side
        toward = np.where(self.low > 0, -sun, sun)
        # [M, axis, 3]
        albedo = np.stack([self.boxes.side, self.boxes.top, self.boxes.side], axis=1)
        glow = self.boxes.glow[:, None, None]
        shade = albedo * (glow + (1 - glow) * FACE_LIGHT[None, :, None] * ambient)
        lit = shade + albedo * (1 - glow) * np.maximum(toward, 0)[..., None] * light
        return np.concatenate([ground, np.stack([lit, shade], axis=2).reshape(-1, 2, 3)]).reshape(
            -1, 3
        )

    def _sky(self) -> list[torch.Tensor]:
        """Three colour planes [samples^2, H, W]: the horizon's colour below it, a gradient above,
        the disc on it.
        """
        rise = (self.directions[1] / self.length).mul_(-1.7).clamp_(0, 1)
        sun = self.look.sun_direction
        towards = sum(self.directions[axis] * float(sun[axis]) for axis in range(3))
        disc = towards > self.length * math.cos(math.radians(self.look.disc_radius))
        planes = []
        for horizon, sky, glare in zip(self.look.horizon, self.look.sky, self.look.disc):
            planes.append((rise * (sky - horizon)).add_(horizon).masked_fill_(disc, glare))
        return planes


def _corners(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The eight corners of every box, [M, 8, 3]."""
    pick = np.array([[(k >> axis) & 1 for axis in range(3)] for k in range(8)], dtype=bool)
    return np.where(pick, high[:, None], low[:, None])


def _enter(inverse: torch.Tensor, low: list, high: list):
    """Slab test of the rays [3, ...] from the origin against one box -> (entry, leave, [(axis, its
    entry), ...]) or None.

    Only faces towards the origin are entry faces; a box around the origin has none. A ray away from
    the box leaves before it enters, so no sign test is needed.
    """
    faces = []
    leave = None
    for axis in range(3):
        ray = inverse[axis]
        if low[axis] > 0:
            faces.append((axis, ray * low[axis]))
            end = ray * high[axis]
        elif high[axis] < 0:
            faces.append((axis, ray * high[axis]))
            end = ray * low[axis]
        else:
            end = torch.maximum(ray * low[axis], ray * high[axis])
        leave = end if leave is None else torch.minimum(leave, end)
    if not faces:
        return None
    entry = faces[0][1]
    for _, own in faces[1:]:
        entry = torch.maximum(entry, own)
    return entry, leave, faces

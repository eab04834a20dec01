"""The clip format: one folder per clip, written by collectors, importers and play itself, read by
training.

A clip folder holds `video.mp4` (H.264), `poses.json` (WorldPlay's format: per latent frame
camera-to-world and K in pixels), `meta.yaml` (caption, fps, source, licence) and, after `distill
encode`, `latents.safetensors` (one float16 tensor `latents` [C, F, h, w]). Rendered clips may hold
`depth.safetensors` (one float16 tensor `depth` [F, H, W]: z in camera coordinates at the pose of
every latent, in the units of the poses). The folder of clips holds `index.jsonl`, one line per
clip. F latents are 4F - 3 video frames, see `worldmodel.camera.FRAMES_PER_LATENT`.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from distill.data.encoders import check_encoders
from worldmodel.camera import (
    FRAMES_PER_LATENT,
    check_poses,
    invert,
    read_pose_json,
    relative_to_first,
    write_pose_json,
)
from worldmodel.config import parse_yaml
from worldmodel.errors import UserError, first_line
from worldmodel.files import replacing_file, replacing_folder, write_file

VIDEO = "video.mp4"
POSES = "poses.json"
META = "meta.yaml"
LATENTS = "latents.safetensors"
DEPTH = "depth.safetensors"
CONDITION = "condition.safetensors"
INDEX = "index.jsonl"


@dataclass(frozen=True)
class Clip:
    """One clip in memory."""

    frames: np.ndarray  # uint8 [T, H, W, 3], T = 4F - 3
    c2w: np.ndarray  # float64 [F, 4, 4], camera-to-world in the clip's own world
    intrinsics: np.ndarray  # float64 [4]: fx/W, fy/H, cx/W, cy/H
    caption: str
    fps: float  # video frames per second
    source: str  # origin, e.g. blocks:meadow:12
    licence: str
    extra: dict = field(default_factory=dict)  # the other entries of meta.yaml


def frames_of(latents: int) -> int:
    """Number of video frames of `latents` latent frames."""
    return FRAMES_PER_LATENT * (latents - 1) + 1


def latents_of(frames: int) -> int:
    """Number of complete latent frames in `frames` video frames."""
    return (frames - 1) // FRAMES_PER_LATENT + 1


def write_clip(
    root,
    name: str,
    frames,
    c2w,
    intrinsics,
    caption: str,
    fps: float,
    source: str,
    licence: str,
    depths: torch.Tensor | None = None,
    **extra,
) -> Path:
    """Write the clip folder root/name under a temporary name and rename it, so that a clip is
    complete or absent.

    Args:
        frames: uint8 [T, H, W, 3], T = 4F - 3, H and W even.
        c2w: [F, 4, 4], one pose per latent frame.
        intrinsics: [4] normalised, constant over the clip.
        depths: [F, H, W], the depth at every pose; None writes no file of it.
        extra: further entries of meta.yaml (plain values).
    Raises:
        UserError: the frames do not fit the poses, the depth does not fit either, a pose is not
        valid, or a clip of this name exists.
        ValueError: the frames are not uint8 pictures of even height and width.
    """
    root = Path(root)
    frames = np.asarray(frames)
    if (
        frames.ndim != 4
        or frames.shape[-1] != 3
        or frames.dtype != np.uint8
        or frames.shape[1] % 2
        or frames.shape[2] % 2
    ):
        raise ValueError(
            f"{name}: expected uint8 frames [T, H, W, 3] with even H and W, got {frames.dtype} "
            f"{list(frames.shape)}"
        )
    c2w = check_poses(c2w, source=name)
    _check_count(len(frames), len(c2w), name)
    if (root / name).exists():
        raise UserError(f"{root / name} exists already; remove it or choose another name")
    meta = {"caption": caption, "fps": fps, "source": source, "licence": licence, **extra}
    with replacing_folder(root / name) as partial:
        _write_video(partial / VIDEO, frames, fps)
        write_pose_json(partial / POSES, c2w, intrinsics, frames.shape[2], frames.shape[1])
        write_meta(partial, meta)
        if depths is not None:
            write_depth(partial, depths, (len(c2w), *frames.shape[1:3]))
    with open(root / INDEX, "a", encoding="utf-8") as index:
        index.write(json.dumps(_index_entry(root / name)) + "\n")
    return root / name


def read_clip(folder, trim: bool = False) -> Clip:
    """Read a clip folder (or a recording made by play).

    trim: keep the latents for which video and poses are both complete (a recording that was
    interrupted) instead of raising.
    Raises:
        UserError: a file is missing or broken, intrinsics change within the clip, or the counts do
        not fit (T = 4F - 3).
    """
    folder = Path(folder)
    meta = read_meta(folder)
    if not (folder / POSES).is_file():
        raise UserError(f"{folder}: expected {POSES} in a clip folder, found none")
    c2w, intrinsics = read_pose_json(folder / POSES)
    if np.abs(intrinsics - intrinsics[0]).max() > 1e-6:
        raise UserError(
            f"{folder / POSES}: expected one K for the whole clip, got several; split the clip "
            "where the zoom changes"
        )
    frames = _read_video(folder / VIDEO)
    if trim:
        latents = min(len(c2w), latents_of(len(frames)))
        frames = frames[: frames_of(latents)]
        c2w = c2w[:latents]
    _check_count(len(frames), len(c2w), str(folder))
    known = {key: meta.pop(key) for key in ("caption", "fps", "source", "licence")}
    return Clip(frames, c2w, intrinsics[0], **known, extra=meta)


def read_meta(folder) -> dict:
    """meta.yaml of a clip, with at least caption, fps, source and licence (the last two "" where
    the file has none).

    Raises UserError when the file is missing, is not YAML, or has no valid caption or fps.
    """
    path = Path(folder) / META
    if not path.is_file():
        raise UserError(f"{folder}: expected a clip folder with {META}, found none")
    try:
        meta = parse_yaml(path.read_text(encoding="utf-8"))
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: expected YAML, got a file that does not parse ({first_line(error)})"
        ) from error
    if not isinstance(meta, dict) or not {"caption", "fps"} <= meta.keys():
        raise UserError(
            f"{path}: expected entries caption and fps, got "
            f"{sorted(meta) if isinstance(meta, dict) else meta!r}"
        )
    if (
        not isinstance(meta["caption"], str)
        or not isinstance(meta["fps"], (int, float))
        or not 0 < meta["fps"] < math.inf
    ):
        found = f"{meta['caption']!r} and {meta['fps']!r}"
        raise UserError(
            f"{path}: expected the caption as a text and fps as a number above 0, got {found}"
        )
    return {"source": "", "licence": "", **meta}


def write_meta(folder, meta: dict) -> None:
    """Write meta.yaml of a clip."""
    text = yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)
    (Path(folder) / META).write_text(text, encoding="utf-8")


def list_clips(root) -> list[Path]:
    """Folders of all clips under `root`, by name. Rebuilds index.jsonl when it does not name
    exactly these.

    Raises UserError when there are none.
    """
    root = Path(root)
    names = sorted(
        entry.parent.name
        for entry in root.glob(f"*/{META}")
        if not entry.parent.name.startswith(".")
    )
    if not names:
        raise UserError(
            f"{root}: expected a folder of clips (each with {META}), found none; make some with "
            "`python -m distill collect`"
        )
    if sorted(_indexed(root)) != names:
        lines = [json.dumps(_index_entry(root / name)) + "\n" for name in names]
        write_file(root / INDEX, "".join(lines))
    return [root / name for name in names]


def write_latents(folder, latents: torch.Tensor, metadata: dict[str, str] | None = None) -> Path:
    """Write latents [C, F, h, w] into a clip's folder, as float16; a reader sees the whole file or
    none.
    """
    return _write_tensor(folder, LATENTS, "latents", latents, metadata)


def write_depth(folder, depths: torch.Tensor, size: Sequence[int]) -> Path:
    """Write the depth [F, H, W] of a clip, as float16; a reader sees the whole file or none.

    size: F, H, W of the clip. Raises UserError for another shape.
    """
    _check_depth(list(depths.shape), list(size), Path(folder) / DEPTH)
    return _write_tensor(folder, DEPTH, "depth", depths)


def read_depth(folder) -> torch.Tensor:
    """The depth of a clip, float16 [F, H, W]: z in camera coordinates of what the centre of a pixel
    shows, at the pose of every latent.

    Raises UserError when the file is missing or broken, or does not fit the clip's poses and size.
    """
    folder = Path(folder)
    path = folder / DEPTH
    if not path.is_file():
        raise UserError(
            f"{folder}: expected {DEPTH} in the clip's folder, found none; collect the clip with "
            "--depth"
        )
    try:
        with safe_open(path, framework="pt") as file:
            depth = file.get_tensor("depth")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: expected a safetensors file with a tensor `depth` [F, H, W], got {error}"
        ) from error
    c2w, _ = read_pose_json(folder / POSES)
    _check_depth(list(depth.shape), [len(c2w), *_video_size(folder / VIDEO)], path)
    return depth


def write_condition(folder, condition: torch.Tensor, encoder: str = "") -> Path:
    """Write the whole condition [4 + C, F, h, w] of a clip and its encoder's fingerprint."""
    return _write_tensor(folder, CONDITION, "condition", condition, {"encoder": encoder})


def _write_tensor(
    folder, file: str, name: str, tensor: torch.Tensor, metadata: dict[str, str] | None = None
) -> Path:
    path = Path(folder) / file
    stored = tensor.detach().to("cpu", torch.float16).contiguous()
    with replacing_file(path) as temporary:
        save_file({name: stored}, temporary, metadata)
    return path


class LatentClips(torch.utils.data.Dataset):
    """Random windows of `frames` latents from the clips under `root` that are long enough.

    Item i depends on (seed, i) only: every len(self) items visit all clips once in a new order, and
    any i >= 0 is valid, so consecutive indices give new windows without end and training resumes
    anywhere. With probability `first_frame_prob` a window begins at the clip's first latent (which
    stands for one video frame, not four). An item: "latents" [C, F, h, w] float32, "viewmats" [F,
    4, 4] float32 world-to-camera relative to the first, "intrinsics" [4] float32, "caption".
    Raises UserError when clips have no latents, do not fit their poses, or none is long enough.
    """

    def __init__(
        self,
        root,
        frames: int,
        first_frame_prob: float = 0.3,
        seed: int = 0,
        conditions: bool = False,
    ):
        self.conditions = conditions
        self.frames = frames
        self.first_frame_prob = first_frame_prob
        self.seed = seed
        clips = [_LatentClip.open(folder) for folder in list_clips(root)]
        if conditions:
            for clip in clips:
                _check_condition(clip)
        names = (LATENTS, CONDITION) if conditions else (LATENTS,)
        check_encoders(root, [clip.path.with_name(name) for clip in clips for name in names])
        other = next((clip for clip in clips if clip.size != clips[0].size), None)
        if other:
            raise UserError(
                f"{root}: expected latents of one size, {clips[0].path} is {clips[0].size}, "
                f"{other.path} {other.size}"
            )
        self.channels, *self.cells = clips[0].size  # of a latent; cells: rows and columns
        self.clips = [clip for clip in clips if len(clip.c2w) >= frames]
        if not self.clips:
            longest = max(len(clip.c2w) for clip in clips)
            raise UserError(
                f"{root}: expected clips of at least {frames} latents, the longest has {longest}; "
                "ask for fewer frames"
            )

    def __len__(self) -> int:
        return len(self.clips)

    def clip_of(self, index: int) -> int:
        """Number of the clip that item `index` is a window of."""
        if index < 0:
            raise IndexError(f"expected an index of at least 0, got {index}")
        epoch, position = divmod(index, len(self.clips))
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.clips))
        return int(order[position])

    def __getitem__(self, index: int) -> dict:
        clip = self.clips[self.clip_of(index)]
        draws = np.random.default_rng([self.seed, 1, index])
        start = 0
        if draws.random() >= self.first_frame_prob:
            start = int(draws.integers(0, len(clip.c2w) - self.frames + 1))
        window = slice(start, start + self.frames)
        with safe_open(clip.path, framework="pt") as file:
            latents = file.get_slice("latents")[:, window]
        item = {}
        if self.conditions:
            with safe_open(clip.path.with_name(CONDITION), framework="pt") as file:
                item["condition"] = file.get_slice("condition")[:, window].float()
        return item | {
            "latents": latents.float(),
            "viewmats": torch.from_numpy(invert(relative_to_first(clip.c2w[window]))).float(),
            "intrinsics": torch.from_numpy(clip.intrinsics).float(),
            "caption": clip.caption,
        }


class VideoWindows(torch.utils.data.Dataset):
    """Every window of the footage under `root`: {"video": uint8 [3, T, H, W]}, T = 4 * window - 3.

    The index determines clip, first frame and crop. All frames are held in memory as uint8 (a clip
    of 161 frames at 96x160 is 7.4 MB).

    crop: height and width in pixels of the visible part, () = the whole frame: small parts of many
    scenes teach faster.
    Raises UserError when a clip is shorter than a window, or smaller than the crop.
    """

    def __init__(self, root, window: int, crop: Sequence[int] = ()):
        self.crop = tuple(crop)
        self.frames = frames_of(window)
        folders = list_clips(root)
        self.clips = [
            torch.from_numpy(read_clip(folder).frames)
            for folder in tqdm(folders, "frames", unit="clip")
        ]
        for folder, clip in zip(folders, self.clips, strict=True):
            if len(clip) < self.frames:
                raise UserError(
                    f"expected clips of at least {self.frames} frames, but {folder} is shorter: "
                    "collect longer clips"
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

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
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


@dataclass(frozen=True)
class _LatentClip:
    """The part of a clip that LatentClips keeps in memory."""

    path: Path
    size: tuple[int, int, int]  # C, h, w
    c2w: np.ndarray
    intrinsics: np.ndarray
    caption: str

    @classmethod
    def open(cls, folder: Path) -> "_LatentClip":
        path = folder / LATENTS
        if not path.is_file():
            raise UserError(
                f"{folder}: expected {LATENTS} in the clip's folder, found none; run `python -m "
                "distill encode` first"
            )
        try:
            with safe_open(path, framework="pt") as file:
                channels, count, *cells = file.get_slice("latents").get_shape()
        except (SafetensorError, OSError, ValueError) as error:  # ValueError: of other dimensions
            raise UserError(
                f"{path}: expected a safetensors file with a tensor `latents` [C, F, h, w], got "
                f"{error}"
            ) from error
        c2w, intrinsics = read_pose_json(folder / POSES)
        if count > len(c2w):
            raise UserError(
                f"{folder}: expected a pose for each of {count} latents, got {len(c2w)}; encode "
                "the clip again"
            )
        return cls(
            path, (channels, *cells), c2w[:count], intrinsics[0], read_meta(folder)["caption"]
        )


def _check_condition(clip: _LatentClip) -> None:
    """UserError unless the clip has a condition for each of its latents."""
    path = clip.path.with_name(CONDITION)
    expected = [clip.size[0] + FRAMES_PER_LATENT, len(clip.c2w), *clip.size[1:]]
    try:
        with safe_open(path, framework="pt") as file:
            found = list(file.get_slice("condition").get_shape())
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path.parent}: expected {CONDITION} in the clip's folder, got {first_line(error)}; "
            "run `python -m distill condition` first"
        ) from error
    if found != expected:
        raise UserError(
            f"{path}: expected a condition {expected} for the clip's latents, got {found}; remove "
            "it and run `python -m distill condition` again"
        )


def _check_count(frames: int, latents: int, name: str) -> None:
    if frames != frames_of(latents):
        raise UserError(
            f"{name}: expected {frames_of(latents)} video frames for {latents} poses (4F - 3), "
            f"got {frames}"
        )


def _check_depth(shape: list[int], expected: list[int], path: Path) -> None:
    if shape != expected:
        raise UserError(f"{path}: expected the depth [F, H, W] as {expected}, got {shape}")


def _write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """H.264 with full colour resolution, which keeps the edges of flat colours; equal frames give
    equal files.

    Without lookahead: there libx264 reads uninitialised memory, and the files differ from run to
    run.
    """
    with _system_errors(path), av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height = frames.shape[1]
        stream.width = frames.shape[2]
        stream.pix_fmt = "yuv444p"
        stream.options = {"crf": "12", "preset": "veryfast", "rc-lookahead": "0"}
        stream.codec_context.thread_count = 1
        for picture in frames:
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                )
            )
        container.mux(stream.encode())


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """FFmpeg's errors of a file that is written, such as a full disk, as OSError."""
    try:
        yield
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _read_video(path: Path) -> np.ndarray:
    """All frames, uint8 [T, H, W, 3]."""
    if not path.is_file():
        raise UserError(f"{path.parent}: expected {path.name} in a clip folder, found none")
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise UserError(
            f"{path}: expected a video, got a file that does not decode ({error})"
        ) from error
    if not frames:
        raise UserError(f"{path}: expected a video with at least one frame, got none")
    return np.stack(frames)


def _video_size(path: Path) -> tuple[int, int]:
    """Height and width of a video."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return stream.height, stream.width
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{path}: expected a video, got none that opens ({error})") from error


def _index_entry(folder: Path) -> dict:
    meta = read_meta(folder)
    return {
        "name": folder.name,
        **{key: meta[key] for key in ("caption", "fps", "source", "licence")},
    }


def _indexed(root: Path) -> list[str]:
    """Names in index.jsonl; none for a missing file or a broken line."""
    names = []
    if (root / INDEX).is_file():
        for line in (root / INDEX).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                names.append(json.loads(line)["name"])
            except (ValueError, KeyError, TypeError):
                continue
    return names

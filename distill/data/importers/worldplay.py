"""`python -m distill import`: footage of WorldPlay and minWM -> clips that every stage trains on.

Three kinds of input are read:
- `preencode_input.json` (or its folder): a list of entries with `caption`, `pose_str` ("w-3,
  right-1, d-4") and, optionally, `pose_json_path`; the video of entry i is `{i:06d}_{pose_str
  without punctuation}/gen.mp4`. A pose file takes precedence over the string, since it also holds
  the intrinsics. An entry without a video is reported and skipped, as in the reference.
- a folder of such video folders alone; the poses are then derived from the folders' names.
- minWM's latent LMDB (package `lmdb`): latents, poses and captions without videos. One motion of a
  pose string is one LATENT frame (0.08 units or 3 degrees).
"""

import argparse
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from tqdm import tqdm

from distill.data.clips import (
    POSES,
    frames_of,
    latents_of,
    read_meta,
    write_clip,
    write_latents,
    write_meta,
)
from worldmodel.camera import (
    check_poses,
    parse_trajectory,
    read_pose_json,
    vectors_to_poses,
    write_pose_json,
)
from worldmodel.cli import print_line
from worldmodel.errors import UserError
from worldmodel.files import (
    check_output_folder,
    exclusive,
    remove_leftovers,
    replacing_folder,
)

logger = logging.getLogger(__name__)

ENTRIES = "preencode_input.json"
VIDEO = "gen.mp4"
LMDB = "data.mdb"
# The reference's camera: 969.7 pixels of 1920 x 1080. Pose strings do not hold it.
INTRINSICS = (32000 / 33 / 1920, 32000 / 33 / 1080, 0.5, 0.5)
LMDB_FPS = 16.0  # Wan's rate; the LMDB does not hold it
PIXELS_PER_CELL = 8  # of a Wan latent
_FOLDER = re.compile(r"(\d{6})_(.+)")
_SUFFIX = re.compile(r"(right|left|up|down|w|a|s|d)(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class ImportConfig:
    """What to import. Raises UserError for values that do not fit."""

    input: Path  # preencode_input.json, its folder, a folder of video folders, or an LMDB
    output: Path  # folder of clips
    # folder of the video folders; None = `videos` next to the JSON, else the JSON's folder
    videos: Path | None = None
    frames: int = 0  # most video frames per clip, cut to 4F - 3; 0 = all
    height: int = 0  # pixels; 0 = the video's
    width: int = 0  # pixels; 0 = the video's
    caption_key: str = "caption"  # of an entry of the JSON
    caption: str | None = None  # for entries without one
    licence: str = "unknown"

    def __post_init__(self):
        for name in ("height", "width"):
            if vars(self)[name] < 0 or vars(self)[name] % 8:
                raise UserError(
                    f"expected --{name} to be a multiple of 8 (one latent cell), got "
                    f"{vars(self)[name]}"
                )
        if bool(self.height) != bool(self.width):
            raise UserError(
                f"expected --height and --width together, got {self.height} and {self.width}"
            )
        if self.frames < 0:
            raise UserError(f"expected --frames of at least 1, or 0 for all, got {self.frames}")


@dataclass(frozen=True)
class Entry:
    """One video with poses."""

    name: str  # of the video folder and the clip
    video: Path
    caption: str | None
    pose_text: str
    pose_file: Path | None = None  # takes precedence over the text
    exact: bool = False  # the text was derived from the name and must fit the video exactly


class NoVideo(UserError):
    """An entry whose video does not exist: reported, not an error."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `import`."""
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        help=f"{ENTRIES}, its folder, video folders, or an LMDB",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the clips; clips in it are kept"
    )
    parser.add_argument(
        "--videos",
        type=Path,
        help="folder of the video folders (default: videos/ next to the JSON)",
    )
    parser.add_argument(
        "--frames",
        type=int,
        default=0,
        help="most video frames per clip, cut to 4F-3 (default: all)",
    )
    parser.add_argument("--height", type=int, default=0, help="pixels (default: the video's)")
    parser.add_argument("--width", type=int, default=0, help="pixels (default: the video's)")
    parser.add_argument(
        "--caption-key", default="caption", help="an entry's key for its caption (default: caption)"
    )
    parser.add_argument("--caption", help="caption of entries that have none")
    parser.add_argument(
        "--licence", default="unknown", help="licence of the footage, noted in the clips"
    )


def run(args: argparse.Namespace) -> None:
    """Import the requested footage. Raises UserError for entries that could not be imported."""
    options = {
        key: value for key, value in vars(args).items() if key in ImportConfig.__dataclass_fields__
    }
    import_clips(ImportConfig(**options))


def import_clips(config: ImportConfig) -> int:
    """Import every missing entry; return how many. May be killed and restarted at any time.

    Raises:
        UserError: the input is of no known kind or has nothing to import, another process writes
        into the output, or entries are broken (all others are imported first).
    """
    check_output_folder(config.output)
    jobs = list(_lmdb_jobs(config) if (config.input / LMDB).is_file() else _video_jobs(config))
    with exclusive(config.output):
        remove_leftovers(config.output)
        return _import(config, jobs)


def _import(config: ImportConfig, jobs: list[tuple[str, str, Callable]]) -> int:
    made = 0
    kept = 0
    errors = []
    for name, source, job in tqdm(jobs, "import", unit="clip"):
        try:
            if _is_finished(config, name, source):
                kept += 1
            else:
                job()
                made += 1
        except NoVideo as error:
            logger.warning(f"{error}; skipped")
        except UserError as error:
            errors.append(str(error))
            logger.warning(str(error))
    if errors:
        raise UserError(
            f"{len(errors)} of {len(jobs)} entries could not be imported, the first because "
            f"{errors[0]}"
        )
    if not made + kept:
        raise UserError(
            f"{config.input}: expected footage, found no entry with a video; give the videos' "
            "folder with --videos"
        )
    print_line(f"{made} clips imported, {kept} existed, {len(jobs) - made - kept} without a video")
    return made


# -------------------- videos


def read_entries(config: ImportConfig) -> list[Entry]:
    """The entries of a `preencode_input.json`, or of a folder of video folders.

    Raises UserError for a file that is not a list of entries with pose strings, and for input of no
    known kind.
    """
    path = config.input / ENTRIES if config.input.is_dir() else config.input
    if not path.exists() and config.input.is_dir():
        return _entries_of_folders(config.videos or config.input)
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
        texts = [str(item["pose_str"]) for item in items]
        captions = [
            None if item.get(config.caption_key) is None else str(item[config.caption_key])
            for item in items
        ]
        pose_files = [
            path.parent / str(item.get("pose_json_path") or ".") for item in items
        ]  # "." is no file
    except OSError as error:
        raise UserError(
            f"{path}: expected a folder or {ENTRIES}, cannot read it ({error.strerror})"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f'{path}: expected a JSON list of entries {{"caption", "pose_str", ...}}, '
            "got another file"
        ) from error
    videos = config.videos or next(
        folder for folder in (path.parent / "videos", path.parent) if folder.is_dir()
    )
    entries = []
    for index, (text, caption, pose_file) in enumerate(
        zip(texts, captions, pose_files, strict=True)
    ):
        folders = [videos / f"{index:06d}_{suffix}" for suffix in folder_suffixes(text)]
        folder = next((folder for folder in folders if (folder / VIDEO).is_file()), folders[0])
        entries.append(
            Entry(
                folder.name,
                folder / VIDEO,
                caption,
                text,
                pose_file if pose_file.is_file() else None,
            )
        )
    return entries


def folder_suffixes(pose_text: str) -> tuple[str, str]:
    """The two forms of a pose string in the reference's folder names; they differ for fractions."""
    lower = pose_text.lower()
    return re.sub(r"[^a-z0-9]", "", lower), re.sub(r"[\s,-]", "", pose_text)


def read_frames(path: Path, most: int = 0) -> tuple[np.ndarray, float]:
    """A video's first frames, uint8 [T,H,W,3], T = 4F - 3 and at most `most` (0: no limit); its
    frames per second.
    """
    frames = []
    try:
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate or Fraction(16)
            for frame in container.decode(video=0):
                frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == most:
                    break
    except (av.FFmpegError, IndexError) as error:
        raise UserError(
            f"{path}: expected a video, got a file that does not decode ({error})"
        ) from error
    if not frames:
        raise UserError(f"{path}: expected a video with at least one frame, got none")
    return np.stack(frames[: frames_of(latents_of(len(frames)))]), float(rate)


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [T,h,w,3] -> uint8 [T,height,width,3]. Differs: shrinking averages, where the reference
    interpolates.
    """
    if frames.shape[1:3] == (height, width):
        return frames
    shrinks = height <= frames.shape[1] and width <= frames.shape[2]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.stack([cv2.resize(frame, (width, height), interpolation=method) for frame in frames])


def import_entry(entry: Entry, config: ImportConfig) -> Path:
    """Read one video with its poses and write the clip."""
    if not entry.video.is_file():
        raise NoVideo(f"{entry.name}: no video {entry.video}")
    caption = config.caption if entry.caption is None else entry.caption
    if caption is None:
        raise UserError(
            f"{entry.name}: expected a caption under {config.caption_key!r}, found none; give "
            "--caption TEXT"
        )
    c2w, intrinsics = read_poses(entry)
    frames, fps = read_frames(entry.video, config.frames)
    latents = latents_of(len(frames))
    if entry.exact and latents != len(c2w):
        raise UserError(
            f"{entry.name}: the name has {len(c2w)} poses, the video {latents} latent frames, so "
            f"the poses are uncertain; give {ENTRIES}"
        )
    c2w = check_poses(c2w, latents, source=entry.name)[:latents]
    height, width = (config.height, config.width) if config.height else frames.shape[1:3]
    if height % 8 or width % 8:
        raise UserError(
            f"{entry.name}: expected a multiple of 8 pixels, the video has {height} x {width}; "
            "give --height, --width"
        )
    frames = resize(frames, height, width)
    extra = {**_settings(config), "trajectory": entry.pose_text}
    source = _source(entry.name)
    return write_clip(
        config.output,
        entry.name,
        frames,
        c2w,
        intrinsics,
        caption,
        fps,
        source,
        config.licence,
        **extra,
    )


def read_poses(entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    """Poses of an entry: c2w [F,4,4] in any coordinate frame, intrinsics [4] normalised."""
    if entry.pose_file is None:
        return parse_trajectory(entry.pose_text), np.array(INTRINSICS)
    c2w, intrinsics = read_pose_json(entry.pose_file)
    if np.abs(intrinsics - intrinsics[0]).max() > 1e-6:
        raise UserError(f"{entry.pose_file}: expected one K for the whole clip, got several")
    return c2w, intrinsics[0]


def _video_jobs(config: ImportConfig) -> Iterator[tuple[str, str, Callable]]:
    for entry in read_entries(config):
        yield entry.name, _source(entry.name), partial(import_entry, entry, config)


def _entries_of_folders(root: Path) -> list[Entry]:
    """Entries from names such as 000000_w3right1d4. "w29" may stand for w-2.9, hence `exact`."""
    entries = []
    for video in sorted(root.glob(f"*/{VIDEO}")):
        match = _FOLDER.fullmatch(video.parent.name)
        if match and re.fullmatch(f"(?:{_SUFFIX.pattern})+", match[2]):
            text = ", ".join(f"{key}-{count}" for key, count in _SUFFIX.findall(match[2]))
            entries.append(Entry(video.parent.name, video, None, text, exact=True))
    if not entries:
        raise UserError(
            f"{root}: expected {ENTRIES}, folders such as 000000_w3right1/{VIDEO}, or {LMDB}, "
            "found none of them"
        )
    return entries


def _source(name: str) -> str:
    return f"worldplay:{name}"


def _settings(config: ImportConfig) -> dict:
    return {"most_frames": config.frames, "height": config.height, "width": config.width}


def _is_finished(config: ImportConfig, name: str, source: str) -> bool:
    """Whether the clip exists. Raises UserError when it was made from another entry or with other
    settings.
    """
    folder = config.output / name
    if not folder.exists():
        return False
    meta = read_meta(folder)
    for key, value in {"source": source, **_settings(config)}.items():
        if meta.get(key) != value:
            raise UserError(
                f"{folder}: expected a clip with {key} {value}, found {meta.get(key)}; choose "
                "another --output"
            )
    return True


# -------------------- LMDB


def _lmdb_jobs(config: ImportConfig) -> Iterator[tuple[str, str, Callable]]:
    """One job per row. Raises UserError without the package `lmdb`, and for an LMDB with other
    contents.
    """
    try:
        import lmdb
    except ImportError as error:
        raise UserError(
            f"{config.input} is an LMDB: expected the package lmdb, run `python -m pip install "
            "lmdb`"
        ) from error
    if config.frames or config.height or config.videos:
        raise UserError(
            "an LMDB holds latents, not videos: --frames, --height, --width and --videos do not "
            "apply"
        )
    try:
        environment = lmdb.open(str(config.input), readonly=True, lock=False)
        with environment.begin() as rows:
            shape = (rows.get(b"latents_shape") or b"").split()
    except lmdb.Error as error:
        raise UserError(
            f"{config.input}: expected an LMDB, {LMDB} in it does not open ({error})"
        ) from error
    if len(shape) != 5 or not all(part.isdigit() for part in shape):
        found = f"latents_shape {b' '.join(shape).decode(errors='replace')!r}"
        raise UserError(
            f"{config.input}: expected latents [rows, F, C, h, w] as minWM's builder stores them, "
            f"found {found}"
        )
    for row in range(int(shape[0])):
        name = f"{config.input.resolve().name}-{row:06d}"
        shape_of_row = tuple(map(int, shape[1:]))
        yield (
            name,
            f"lmdb:{name}",
            partial(import_row, environment, row, shape_of_row, name, config),
        )


def import_row(
    environment, row: int, shape: tuple[int, ...], name: str, config: ImportConfig
) -> Path:
    """Write one row of a latent LMDB as a clip without video: `shape` is (F, C, h, w), float16."""
    with environment.begin() as rows:
        stored = {
            key: rows.get(f"{key}_{row}_data".encode())
            for key in ("latents", "poses", "intrinsics", "prompts")
        }
    sizes = {"latents": 2 * int(np.prod(shape)), "poses": 4 * 7 * shape[0], "intrinsics": 4 * 4}
    for key, size in sizes.items():
        if stored[key] is None or len(stored[key]) != size:
            raise UserError(
                f"{name}: expected {size} bytes of {key}, got {len(stored[key] or b'')}; the LMDB "
                "is corrupt"
            )
    latents = np.frombuffer(stored["latents"], np.float16).reshape(shape).transpose(1, 0, 2, 3)
    try:
        c2w = vectors_to_poses(np.frombuffer(stored["poses"], np.float32).reshape(-1, 7))
        caption = config.caption if stored["prompts"] is None else stored["prompts"].decode("utf-8")
    except ValueError as error:  # a quaternion of length 0, or a caption that is no text
        raise UserError(f"{name}: {error}; the LMDB is corrupt") from None
    if caption is None:
        raise UserError(f"{name}: expected a caption, the LMDB has none; give --caption TEXT")
    intrinsics = np.frombuffer(stored["intrinsics"], np.float32)
    height = PIXELS_PER_CELL * shape[2]
    width = PIXELS_PER_CELL * shape[3]
    meta = {
        "caption": caption,
        "fps": LMDB_FPS,
        "source": f"lmdb:{name}",
        "licence": config.licence,
        **_settings(config),
    }
    with replacing_folder(config.output / name) as folder:
        write_pose_json(folder / POSES, c2w, intrinsics, width, height)
        write_latents(
            folder, torch.from_numpy(latents.copy()), {"encoder": "Wan2.1 (minWM's LMDB)"}
        )
        write_meta(folder, meta)
    return config.output / name

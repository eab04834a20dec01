"""A recording on disk: names of its files, its log, and how a cut-off recording becomes whole."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from worldmodel.camera import check_poses, write_pose_json
from worldmodel.errors import UserError
from worldmodel.files import lock, replacing_file, write_file

VIDEO = "video.mp4"
LOG = "session.jsonl"
POSES = "poses.json"
META = "meta.yaml"
IMAGE = "start.png"
STATE = "start"
FORMAT = 1
# What is read back from the log, and its kinds.
_HEADER = {
    "world": str,
    "fingerprint": str,
    "prompt": str,
    "image": bool,
    "seed": int,
    "steps": int | None,
    "middle": bool,
    "height": int,
    "width": int,
    "intrinsics": list,
    "engine": dict,
}
_LINE = {"index": int, "prompt": str, "c2w": list, "sha256": str}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}


@dataclass(frozen=True)
class Log:
    """The contents of session.jsonl."""

    header: dict
    lines: tuple[dict, ...]  # one per latent
    closed: bool  # whether the recording was ended properly

    @property
    def c2w(self) -> np.ndarray:
        return np.array([line["c2w"] for line in self.lines], np.float64).reshape(-1, 4, 4)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of the recording, in the order of their first use."""
        return tuple(
            dict.fromkeys([self.header["prompt"], *(line["prompt"] for line in self.lines)])
        )


def read_log(folder) -> Log:
    """Reads session.jsonl; a last line that was cut off is left out. UserError when it is no log
    of ours.
    """
    path = Path(folder) / LOG
    try:
        rows = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(
            f"{folder} is not a recording: {LOG} cannot be read ({error.strerror})."
        ) from None
    values = []
    for row in rows[:-1]:  # what follows the last line break is empty or cut off
        try:
            value = json.loads(row)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            # a crash of the whole machine can leave a torn block; nothing after it is trusted
            break
        values.append(value)
    if not values or values[0].get("format") != FORMAT:
        raise UserError(
            f"{path} is not a session log of format {FORMAT}; this program cannot replay it."
        )
    lines = tuple(value for value in values[1:] if "index" in value)
    for row, kinds in ((values[0], _HEADER), *((line, _LINE) for line in lines)):
        wrong = next(
            (name for name, kind in kinds.items() if not isinstance(row.get(name), kind)), None
        )
        if wrong:
            raise UserError(
                f"{path} is damaged: expected {wrong!r} of another kind than {row.get(wrong)!r}; "
                "take an unchanged copy."
            )
    lens = values[0]["intrinsics"]
    if len(lens) != 4 or not all(isinstance(number, int | float) for number in lens):
        raise UserError(
            f"{path} is damaged: expected intrinsics as 4 numbers, got {lens}; take an unchanged "
            "copy."
        )
    if lines:
        check_poses([line["c2w"] for line in lines], source=str(path))
    return Log(values[0], lines, any("end" in value for value in values))


def recover(folder) -> int:
    """Makes a recording that was cut off a whole clip again and returns its latents; does nothing
    to a whole one.

    Keeps the latents that both the log and the video hold: poses.json is rebuilt, extra video
    frames are cut off without encoding again. UserError for a recording that is still being
    written, or that holds no latent.
    """
    folder = Path(folder)
    log = read_log(folder)
    if log.closed:
        return len(log.lines)
    with (folder / LOG).open("a", encoding="utf-8") as file:
        if not lock(file):
            raise UserError(f"{folder} is still being recorded; close it first.")
        frames = _count_frames(folder / VIDEO)
        latents = min(len(log.lines), (frames + 3) // 4)
        if latents == 0:
            raise UserError(
                f"{folder} was cut off before its first latent was on disk; nothing can be "
                "recovered."
            )
        _cut_video(
            folder / VIDEO, 4 * latents - 3
        )  # even if the count fits: half a packet may follow
        header = log.header
        write_pose_json(
            folder / POSES,
            log.c2w[:latents],
            header["intrinsics"],
            header["width"],
            header["height"],
        )
        kept = [header, *log.lines[:latents], {"end": True, "latents": latents, "recovered": True}]
        write_file(folder / LOG, "".join(json.dumps(row) + "\n" for row in kept))
    return latents


def _count_frames(path: Path) -> int:
    """Frames that can be decoded before the video ends or is cut off. Every packet is one frame
    (see `_Files`).
    """
    count = 0
    try:
        with av.open(str(path)) as container:
            container.streams.video[
                0
            ].thread_type = "SLICE"  # frame threads would hold frames back at the cut
            for _ in container.decode(video=0):
                count += 1
    except (av.FFmpegError, IndexError):
        return count  # 0 when killed before the first fragment
    return count


def _cut_video(path: Path, frames: int) -> None:
    """Keeps the first `frames` frames, by copying packets."""

    def write(temporary: Path) -> None:
        with (
            av.open(str(path)) as source,
            av.open(str(temporary), "w", format="mp4", options=FRAGMENTS) as target,
        ):
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in itertools.islice(source.demux(video=0), frames):
                packet.stream = stream
                target.mux(packet)

    with replacing_file(path) as temporary:
        write(temporary)

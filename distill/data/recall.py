"""Training windows that begin with remembered frames, as a rollout with recall sees them."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import safe_open

from distill.data.clips import LatentClips, read_meta
from worldmodel.camera import invert
from worldmodel.errors import UserError
from worldmodel.models.view_overlap import choose_views

DROPPED = (0.35, 0.65)  # share of the candidates that count as showing nothing


@dataclass(frozen=True)
class _Scene:
    """All latents of the clips of one coordinate system, clip after clip."""

    clip: np.ndarray  # [N], number in `LatentClips.clips`
    frame: np.ndarray  # [N]
    c2w: np.ndarray  # [N, 4, 4]
    w2c: torch.Tensor  # [N, 3, 4]


class RecallClips(torch.utils.data.Dataset):
    """Windows of `clips`; with probability `share` one of them is `recalled` frames, followed by
    consecutive ones.

    The recalled frames are chosen by view overlap with one of the consecutive ones, among the
    earlier frames of their clip and all frames of other clips with the same `source` and
    intrinsics; a random share of the candidates counts as showing nothing, so that what is
    remembered is never complete. They stand in the order of clips and frames. A clip without a
    source, or recorded by play (whose poses start at the identity), has no others. Where
    there are fewer than `recalled` candidates, the window is a plain one.
    Item i depends on the seed and i alone. Items as those of `LatentClips`, with "recalled": the
    number of frames in front; cameras are relative to the first frame behind them.
    """

    def __init__(self, clips: LatentClips, recalled: int, share: float, unit: float = 1.0):
        if not 0 < recalled < clips.frames:
            raise UserError(
                f"expected 1 to {clips.frames - 1} recalled frames in windows of {clips.frames} "
                f"latents, got {recalled}: change teacher_forcing.recall_frames or data.frames"
            )
        self.clips = clips
        self.recalled = recalled
        self.share = share
        self.unit = unit
        members = defaultdict(list)
        self._scene_of = [_scene_key(clip) for clip in clips.clips]
        for number, key in enumerate(self._scene_of):
            members[key].append(number)
        self._scenes = {key: self._scene(numbers) for key, numbers in members.items()}

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict:
        draws = np.random.default_rng([self.clips.seed, 3, index])
        if draws.random() < self.share:
            item = self._recalling(self.clips.clip_of(index), draws)
            if item is not None:
                return item | {"recalled": self.recalled}
        return self.clips[index] | {"recalled": 0}

    # -------------------- inside

    def _scene(self, numbers: list[int]) -> _Scene:
        paths = [self.clips.clips[number].c2w for number in numbers]
        lengths = [len(path) for path in paths]
        c2w = np.concatenate(paths)
        return _Scene(
            np.repeat(numbers, lengths),
            np.concatenate([np.arange(length) for length in lengths]),
            c2w,
            torch.from_numpy(invert(c2w)[:, :3].copy()),
        )

    def _recalling(self, number: int, draws: np.random.Generator) -> dict | None:
        """A window of clip `number` with recalled frames; None where there are too few."""
        clip = self.clips.clips[number]
        length = self.clips.frames - self.recalled
        # never the first latent, which stands for one video frame and has no past
        start = int(draws.integers(1, len(clip.c2w) - length + 1))
        asked = start + int(draws.integers(length))
        scene = self._scenes[self._scene_of[number]]
        known = ((scene.clip != number) | (scene.frame < start)).nonzero()[0]
        dropped = draws.random(len(known)) < draws.uniform(*DROPPED)
        if len(known) < self.recalled:
            return None
        lens = torch.from_numpy(clip.intrinsics).double()
        chosen = known[
            choose_views(
                scene.w2c[known],
                lens[:2].expand(len(known), 2),
                torch.from_numpy(invert(clip.c2w[asked : asked + 1])),
                lens[None],
                self.recalled,
                self.unit,
                torch.from_numpy(dropped),
            )
        ]
        parts = [self._latents(scene.clip[i], scene.frame[i], 1) for i in chosen]
        parts.append(self._latents(number, start, length))
        c2w = np.concatenate([scene.c2w[chosen], clip.c2w[start : start + length]])
        return {
            "latents": torch.cat(parts, dim=1).float(),
            "viewmats": torch.from_numpy(invert(invert(clip.c2w[start]) @ c2w)).float(),
            "intrinsics": lens.float(),
            "caption": clip.caption,
        }

    def _latents(self, number: int, start: int, count: int) -> torch.Tensor:
        with safe_open(self.clips.clips[number].path, framework="pt") as file:
            return file.get_slice("latents")[:, int(start) : int(start) + count]


def _scene_key(clip) -> tuple:
    """What clips of one coordinate system have in common."""
    source = read_meta(clip.path.parent)["source"]
    alone = not source or source.startswith("play:")
    return (str(clip.path) if alone else source, *clip.intrinsics)

"""Footage of places and endless footage as one data set."""

import numpy as np
import torch

from distill.data.clips import LatentClips
from distill.data.encoders import check_encoders
from worldmodel.camera import FRAMES_PER_LATENT
from worldmodel.errors import UserError


class MixedClips(torch.utils.data.Dataset):
    """Windows of places and of endless footage: item i is one of a place with probability `share`.

    Items as those of `LatentClips`, with "place" (bool) and "condition" [K, F, h, w] (zeros where
    nothing is known).
    """

    def __init__(self, places: LatentClips, endless: LatentClips, share: float, seed: int):
        if (places.channels, places.cells) != (endless.channels, endless.cells):
            raise UserError(
                f"expected places and endless footage with latents of one size, got "
                f"{places.channels}x{places.cells} and {endless.channels}x{endless.cells}: encode "
                "both at one resolution"
            )
        every = [clip.path for clip in (*places.clips, *endless.clips)]
        check_encoders("data.places and data.root", every)
        self.places = places
        self.endless = endless
        self.share = share
        self.seed = seed
        self.channels = places.channels
        self.cells = places.cells
        self.clips = places.clips + endless.clips
        self.condition_channels = places.channels + FRAMES_PER_LATENT

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict:
        place = np.random.default_rng([self.seed, 2, index]).random() < self.share
        item = (self.places if place else self.endless)[index]
        if not place:
            size = (self.condition_channels, *item["latents"].shape[1:])
            item["condition"] = torch.zeros(size)
        return item | {"place": torch.tensor(place)}

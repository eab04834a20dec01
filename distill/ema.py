"""Exponential moving average of a network's weights."""

import torch
from torch import nn


class MovingAverage:
    """Updates `average` after every step: `average = decay average + (1 - decay) source`.

    Before step `start` (counted from 0) the average is a plain copy. Differs: the decay is
    constant, where diffusers' EMAModel ramps it up from 0.
    """

    def __init__(self, source: nn.Module, average: nn.Module, decay: float, start: int = 0):
        self.decay = decay
        self.start = start
        self._source = list(source.parameters())
        self._average = list(average.parameters())
        average.requires_grad_(False)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`."""
        if step < self.start:
            torch._foreach_copy_(self._average, self._source)
        else:
            torch._foreach_lerp_(self._average, self._source, 1.0 - self.decay)

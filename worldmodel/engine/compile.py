"""Compiled transformer blocks: before play begins, or taking over while the world is played."""

import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import partial

import torch
from torch import Tensor, nn

from worldmodel.errors import first_line
from worldmodel.models.transformer import WanBlock

logger = logging.getLogger(__name__)
_HALVES = ("pre_attention", "post_attention")


class CompiledBlocks:
    """Runs the two halves of `blocks` around attention through torch.compile.

    The halves depend on no past, so there is one code for all blocks and every length of the
    window. before_play: each kind of pass is compiled by the pass that comes first, which waits for
    it; otherwise a thread compiles it with that pass's inputs, and the plain blocks run until the
    code is ready. Where something cannot be compiled (no C++ compiler, no Triton) all stay plain,
    and `error` says why. Passes that need gradients are plain too.
    """

    def __init__(self, blocks: nn.ModuleList, before_play: bool = False):
        self.before_play = before_play
        self.error = ""
        self._compiled = {
            name: torch.compile(getattr(WanBlock, name), dynamic=False) for name in _HALVES
        }
        self._ready: set[tuple] = set()
        self._requested: set[tuple] = set()
        self._jobs: queue.Queue = queue.Queue()
        self._stopped = False
        for block in blocks:
            for name in _HALVES:
                setattr(block, name, partial(self._run, name, block))
        if not before_play:
            threading.Thread(target=self._work, name="compiler", daemon=True).start()

    def wait(self) -> None:
        """Waits until everything requested is compiled, or cannot be."""
        self._jobs.join()

    def stop(self) -> None:
        """Lets all blocks run plain from now on, and ends the thread after what it is compiling;
        for blocks that are about to change.
        """
        self._stopped = True
        self._jobs.put(None)

    @property
    def ready(self) -> int:
        """How many kinds of halves run compiled."""
        return len(self._ready)

    def describe(self) -> str:
        """When the blocks are compiled, for the player."""
        return "compiled before play" if self.before_play else "compiled while playing"

    def _run(self, name: str, block: WanBlock, *inputs, **options):
        if torch.is_grad_enabled() or self.error or self._stopped:
            return getattr(WanBlock, name)(block, *inputs, **options)
        kind = (name, torch.is_inference_mode_enabled(), *options.items(), *_layouts(inputs))
        if kind not in self._requested:
            self._requested.add(kind)
            if self.before_play:
                self._compile(kind, block, inputs, options)
            else:
                self._jobs.put((kind, block, inputs, options))
        run = self._compiled[name] if kind in self._ready else getattr(WanBlock, name)
        return run(block, *inputs, **options)

    def _work(self) -> None:
        while (job := self._jobs.get()) and not self._stopped:
            kind, *_ = job
            try:
                with torch.inference_mode(kind[1]), torch.no_grad():
                    self._compile(*job)
            finally:
                del job
                self._jobs.task_done()

    def _compile(self, kind: tuple, block: WanBlock, inputs: tuple, options: dict) -> None:
        try:
            self._compiled[kind[0]](block, *inputs, **options)
            self._ready.add(kind)
        except Exception as error:  # a compiler can fail in any way; the plain blocks go on
            logger.info("blocks cannot be compiled", exc_info=True)
            self.error = f"Blocks cannot be compiled here ({first_line(error)}); they run as is."


def _layouts(value) -> Iterator[tuple]:
    """Type, shape and strides of every tensor in nested tuples and dataclasses: what compiled code
    is made for.
    """
    if isinstance(value, Tensor):
        yield value.dtype, value.shape, value.stride()
    elif isinstance(value, tuple):
        for part in value:
            yield from _layouts(part)
    elif is_dataclass(value):
        for part in fields(value):
            yield from _layouts(getattr(value, part.name))
    else:
        yield (value,)

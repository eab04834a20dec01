"""Compiled transformer blocks that take over while the world is being played."""

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

_HALVES = ("enter", "leave")


class CompiledBlocks:
    """Runs the two halves of `blocks` through torch.compile, each kind of pass from when its code
    is ready; until then the plain ones.

    The halves know nothing of a past, so there is one code for all blocks and for every length of
    the memory: one for a chunk's passes, one more for merged ones. A thread of its own compiles
    with the first inputs that come, so nobody waits. Where something cannot be compiled (no C++
    compiler, no Triton) all stay plain, and `fault` says why. Passes that need gradients are plain
    too.
    """

    def __init__(self, blocks: nn.ModuleList):
        self.fault = ""
        self._compiled = {
            name: torch.compile(getattr(WanBlock, name), dynamic=False) for name in _HALVES
        }
        self._ready: set[tuple] = set()
        self._asked: set[tuple] = set()
        self._jobs: queue.Queue = queue.Queue()
        self._stopped = False
        for block in blocks:
            for name in _HALVES:
                setattr(block, name, partial(self._run, name, block))
        threading.Thread(target=self._work, name="compiler", daemon=True).start()

    def wait(self) -> None:
        """Until everything that has been asked for is compiled, or cannot be."""
        self._jobs.join()

    def stop(self) -> None:
        """All blocks run as they are from now on, and the thread ends with what it is compiling;
        for blocks that are to be changed.
        """
        self._stopped = True
        self._jobs.put(None)

    @property
    def ready(self) -> int:
        """How many kinds of halves run compiled."""
        return len(self._ready)

    @property
    def behind(self) -> bool:
        """Whether something that has been asked for is still to be compiled."""
        return not self.fault and len(self._ready) < len(self._asked)

    def _run(self, name: str, block: WanBlock, *inputs, **options):
        if not torch.is_grad_enabled() and not self.fault and not self._stopped:
            kind = (name, torch.is_inference_mode_enabled(), *options.items(), *_layouts(inputs))
            if kind in self._ready:
                return self._compiled[name](block, *inputs, **options)
            if kind not in self._asked:
                self._asked.add(kind)
                self._jobs.put((kind, block, inputs, options))
        return getattr(WanBlock, name)(block, *inputs, **options)

    def _work(self) -> None:
        while (job := self._jobs.get()) and not self._stopped:
            kind, block, inputs, options = job
            name, inference = kind[:2]
            try:
                with torch.inference_mode(inference), torch.no_grad():
                    self._compiled[name](block, *inputs, **options)
                self._ready.add(kind)
            except Exception as error:  # a compiler can fail in any way; the plain blocks go on
                logger.info("blocks cannot be compiled", exc_info=True)
                self.fault = (
                    f"Blocks cannot be compiled here ({first_line(error)}); they run as they are."
                )
            finally:
                del job, block, inputs
                self._jobs.task_done()


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

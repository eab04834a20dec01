"""Work at the same time as a decoder: a thread for clean passes, copies to pinned memory."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from worldmodel.images import to_pixels


@cache
def second_thread() -> ThreadPoolExecutor:
    """Runs clean passes while the decoder works."""
    return ThreadPoolExecutor(1, "clean pass")


def as_here(work: Callable[[], object], threads: int) -> Callable[[], None]:
    """`work` for another thread, which inherits neither autograd modes nor torch's number of
    threads.
    """
    inference = torch.is_inference_mode_enabled()

    def there() -> None:
        torch.set_num_threads(threads)
        with torch.inference_mode(inference), torch.no_grad():
            work()

    return there


def to_pinned_memory(video: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """Pixels on their way to the computer's memory, and the event of their arrival."""
    pixels = to_pixels(video)
    copy = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
    copy.copy_(pixels, non_blocking=True)
    return copy, torch.cuda.current_stream().record_event()

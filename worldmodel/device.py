"""The device that computes: its cores, memory, number types, and copies to it.

torch is imported inside the functions: command lines count cores before torch is loaded.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from worldmodel.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FULL = ("out of memory", "cublas_status_alloc_failed", "cudnn_status_alloc_failed")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2


def usual_threads() -> int:
    """CPU threads of torch in play: all cores but one, which the window and the recorder need."""
    return max(1, cores() - 1)


def open_device(name: str | torch.device) -> torch.device:
    """ "cpu", "cuda", "cuda:1", ... as a torch.device that can compute.

    Raises UserError for one that cannot compute here, or whose memory is full.
    """
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # unknown name, not compiled in, no driver
        if is_out_of_memory(error):
            raise UserError(
                f"The memory of the device {str(name)!r} is full, not one number fits: close "
                "other programs that use it, or choose another."
            ) from None
        raise UserError(
            "expected a device that torch can compute on here, such as cpu or cuda, got "
            f"{str(name)!r}."
        ) from None
    return device


def fast_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively (CUDA, CPUs with AVX512_BF16 or AMX), else
    float32.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if kind == "cpu" and native else torch.float32


def float64_device(device: torch.device) -> torch.device:
    """Where float64 numbers of a device are kept: the device itself, the CPU for MPS, which has no
    float64.
    """
    import torch

    return torch.device("cpu") if device.type == "mps" else device


def to_device_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to `device`; on CUDA through pinned memory, so that the host does not
    wait.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int | None:
    """Free bytes of an accelerator; None for a CPU, whose memory is not the limit."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory is full: torch's own type, or what driver,
    cuBLAS and cuDNN report as RuntimeError.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in message for words in _FULL)

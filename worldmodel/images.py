"""Pictures: files, crops, and uint8 pixels from and to the networks' [-1, 1]."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from worldmodel.errors import UserError
from worldmodel.files import write_file

if TYPE_CHECKING:
    from torch import Tensor


def read_image(path: str | Path) -> np.ndarray:
    """A picture file as uint8 `[H, W, 3]` RGB. Raises UserError when it cannot be read."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"Picture {path} cannot be read: {error.strerror}.") from None
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except cv2.error:  # larger than OpenCV reads
        picture = None
    finally:
        cv2.utils.logging.setLogLevel(level)
    if picture is None:
        raise UserError(f"Picture {path} is not a complete PNG or JPEG file; give another one.")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def write_png(path: str | Path, picture: np.ndarray) -> None:
    """Writes uint8 `[H, W, 3]` RGB as a PNG file, whole or not at all."""
    try:
        done, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    except cv2.error:  # larger than the format holds
        done = False
    if not done:
        height, width = picture.shape[:2]
        raise UserError(f"A picture of {width}x{height} pixels cannot be written as PNG: {path}.")
    write_file(path, data.tobytes())


def fit_picture(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 `[h, w, 3]` of any size -> uint8 `[height, width, 3]`: cropped around the centre to the
    same shape, then scaled.

    Raises UserError for anything else, and for a picture so thin or small that less than 2 pixels
    in a direction are left of it.
    """
    if not _is_picture(picture):
        is_array = isinstance(picture, np.ndarray)
        found = f"{picture.dtype} {list(picture.shape)}" if is_array else type(picture).__name__
        raise UserError(f"A start picture must be uint8 [H,W,3], got {found}.")
    rows, columns = picture.shape[:2]
    high = min(rows, round(columns * height / width))
    wide = min(columns, round(rows * width / height))
    if min(high, wide) < 2:
        raise UserError(
            f"A start picture of {columns}x{rows} pixels is too thin or too small: {wide}x{high} "
            f"of it have the shape of this world's pictures ({width}x{height}); give one of about "
            "that shape."
        )
    top = (rows - high) // 2
    left = (columns - wide) // 2
    cropped = np.ascontiguousarray(picture[top : top + high, left : left + wide])
    method = cv2.INTER_AREA if height < high else cv2.INTER_CUBIC
    return cv2.resize(cropped, (width, height), interpolation=method)


def _is_picture(picture: object) -> bool:
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
        return False
    return picture.ndim == 3 and picture.shape[2] == 3


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_uint8(values: Tensor) -> Tensor:
    """Values in [-1, 1] of any shape -> uint8 on the same device; what is outside is clamped."""
    import torch

    return ((values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pixels(video: Tensor) -> Tensor:
    """`[B, 3, T, H, W]` in [-1, 1] -> uint8 `[B, T, H, W, 3]` on the same device."""
    return to_uint8(video).permute(0, 2, 3, 4, 1).contiguous()


def to_frames(video: Tensor) -> np.ndarray:
    """As `to_pixels`, as a numpy array."""
    return to_pixels(video).cpu().numpy()

"""Pixels <-> PNG bytes. PNG at compression level 1: lossless, the same bytes every time, and fast.

Not here: other codecs on the way out; pictures that are read may be anything PIL opens.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from alignkit.errors import DataError, NumericsError

if TYPE_CHECKING:
    from torch import Tensor


def quantise(pixels: Tensor) -> np.ndarray:
    """Float pixels [B, 3, H, W] in [0, 1] -> uint8 [B, H, W, 3] on the CPU; NumericsError where one is not finite."""
    import torch

    if not torch.isfinite(pixels).all():
        raise NumericsError("a picture holds NaN or infinite pixels; run the model (or its VAE) in bf16 or fp32")
    scaled = pixels.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def image_size(data: bytes, *, where: str) -> tuple[int, int]:
    """(height, width) from the header; DataError naming `where` for bytes that are no picture."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise _broken(data, where) from error


def decode(data: bytes, *, where: str) -> np.ndarray:
    """Picture bytes -> uint8 RGB [H, W, 3]; DataError naming `where` for truncated bytes."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise _broken(data, where) from error


def _broken(data: bytes, where: str) -> DataError:
    what = "empty (zero bytes)" if not data else f"truncated or no picture ({len(data)} bytes)"
    return DataError(f"{where}: the picture is {what}; replace the picture or drop its row")

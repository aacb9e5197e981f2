"""Pictures that PIL and torch resample alike, and as tensors."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def photograph(height, width, seed):
    """Smooth enough for PIL's and torch's resampling to agree, as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def tensor(picture):
    """[3, H, W] in [0, 1], float64."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).double().div(255)

"""The image and video processors of Qwen's vision-language models as differentiable torch: resize, normalise, patchify.

A row of the result is one patch [channel, temporal, height, width] flattened; rows are ordered by (time, merged row,
merged column, row and column within the merged patch), as the vision tower expects. Equal to the library's processor
on pictures up to PIL's rounding to 8 bits; for clips, where none runs without torchvision, tests derive it anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.errors import DataError
from rewards.media import CLIP_MEAN, CLIP_STD, resize

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_ASPECT = 200


@dataclass(frozen=True, slots=True)
class Patches:
    """How media become patches. Pixel bounds hold per frame."""

    patch: int = 14
    merge: int = 2
    temporal: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, media: Tensor) -> tuple[Tensor, Tensor]:
        """Patches [B * N, 3 * temporal * patch**2] and grids [B, 3] (time, rows, columns of patches).

        `media`: [B, 3, H, W], or clips [B, F, 3, H, W]; a picture is repeated in time, an odd clip's last frame once.
        """
        import torch

        clips = media if media.dim() == 5 else media[:, None]
        batch, frames, _, *size = clips.shape
        height, width = smart_resize(*size, self.patch * self.merge, self.min_pixels, self.max_pixels)
        flat = resize(clips.flatten(0, 1), height, width)
        mean, std = (flat.new_tensor(values).reshape(3, 1, 1) for values in (self.mean, self.std))
        clips = ((flat - mean) / std).unflatten(0, (batch, frames))
        missing = -frames % self.temporal
        clips = torch.cat([clips, clips[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        time, rows, columns = clips.shape[1] // self.temporal, height // self.patch, width // self.patch
        cut = clips.unflatten(1, (time, self.temporal))
        cut = cut.unflatten(-1, (columns // self.merge, self.merge, self.patch))
        cut = cut.unflatten(-4, (rows // self.merge, self.merge, self.patch))
        # axes: 0 batch, 1 time, 2 frame in patch, 3 channel, 4-6 row (merged, in merge, pixel), 7-9 column alike
        patches = cut.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).flatten(6).flatten(0, 5)
        return patches, torch.tensor([[time, rows, columns]] * batch, device=media.device)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The nearest size whose sides are multiples of `factor` and whose area lies between the bounds.

    Raises DataError for a picture more than 200 times as long as wide, which the models refuse.
    """
    if max(height, width) > LONGEST_ASPECT * min(height, width):
        raise DataError(f"a picture of {height} x {width} is over {LONGEST_ASPECT} times as long as wide; crop it")
    rows, columns = (round(side / factor) * factor for side in (height, width))
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        return tuple(max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    if rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        return tuple(math.ceil(side * scale / factor) * factor for side in (height, width))
    return rows, columns

"""The image and video processors of Qwen's vision-language models as differentiable torch: resize, normalise, patchify.

A row of the result is one patch [channel, temporal, height, width] flattened; rows are ordered by (time, merged row,
merged column, row and column within the merged patch), as the vision tower expects. Equal to the library's processor
on images up to PIL's rounding to 8 bits; for clips, whose processor needs torchvision, tests have a reference of their
own.
Sources: Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (2502.13923), Qwen3-VL (2511.21631). Not here: reading video files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, DataError, MissingFileError
from rewards.models.media import CLIP_MEAN, CLIP_STD, resize

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_ASPECT = 200
HALF = (0.5, 0.5, 0.5)
# Defaults of the library where a processor's file lacks them: (patch, least and most pixels, mean, std)
_IMAGES = (14, 56 * 56, 28 * 28 * 1280, CLIP_MEAN, CLIP_STD)
_CLIPS = (14, 128 * 28 * 28, 28 * 28 * 768, CLIP_MEAN, CLIP_STD)
_CLIPS_3 = (16, 128 * 32 * 32, 32 * 32 * 768, HALF, HALF)


@dataclass(frozen=True, slots=True)
class Patches:
    """How media become patches.

    Pixel bounds hold per frame; with `whole_clip` (Qwen3-VL) for all frames of a clip together. `cap` > 0 is
    `max_video_tokens` of processors with `cap_pixels_per_frame`: long clips get smaller frames.
    """

    patch: int = 14
    merge: int = 2
    temporal: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    whole_clip: bool = False
    cap: int = 0

    def __call__(self, media: Tensor, *, eight_bit: bool = False) -> tuple[Tensor, Tensor]:
        """Patches [B * N, 3 * temporal * patch**2] and grids [B, 3] (time, rows, columns of patches).

        `media`: [B, 3, H, W], or clips [B, F, 3, H, W]; an image is repeated in time, a clip's last frame if needed.
        `eight_bit`: round to 8 bits before and after resizing, as files and PIL do; no gradient passes.
        """
        import torch

        clips = media if media.dim() == 5 else media[:, None]
        batch, frames, _, *size = clips.shape
        height, width = self.size(*size, frames if media.dim() == 5 else 0)
        flat = resize(clips.flatten(0, 1), height, width, eight_bit=eight_bit)
        mean, std = (flat.new_tensor(values).reshape(3, 1, 1) for values in (self.mean, self.std))
        clips = ((flat - mean) / std).unflatten(0, (batch, frames))
        missing = -frames % self.temporal
        clips = torch.cat([clips, clips[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
        time, rows, columns = clips.shape[1] // self.temporal, height // self.patch, width // self.patch
        cut = clips.unflatten(1, (time, self.temporal))
        cut = cut.unflatten(-1, (columns // self.merge, self.merge, self.patch))
        cut = cut.unflatten(-4, (rows // self.merge, self.merge, self.patch))
        # axes: 0 batch, 1 time, 2 frame in patch, 3 channel, 4-6 row (merged, in merge, pixel), 7-9 column likewise
        patches = cut.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).flatten(6).flatten(0, 5)
        return patches, torch.tensor([[time, rows, columns]] * batch, device=media.device)

    def size(self, height: int, width: int, frames: int = 0) -> tuple[int, int]:
        """The size that an image (`frames` = 0) or a clip's frames are resized to."""
        factor, longest = self.patch * self.merge, self.max_pixels
        least = int(self.min_pixels * 1.05)
        if frames and self.whole_clip:
            if self.cap:
                longest = max(min(self.cap * factor**2, longest // frames), least) * frames
            return _resize_clip(frames, (height, width), self, longest)
        if frames and self.cap:
            budget = int(self.cap * factor**2 * 0.9)
            longest = max(min(longest, budget * self.temporal // frames), least)
        return smart_resize(height, width, factor, self.min_pixels, longest)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The nearest size whose sides are multiples of `factor` and whose area lies between the bounds.

    Raises DataError for an aspect ratio over 200, which the models refuse.
    """
    rows, columns = _nearest(height, width, factor)
    return _bounded((height, width), factor, rows * columns, (min_pixels, max_pixels)) or (rows, columns)


def _resize_clip(frames: int, size: tuple[int, int], patches: Patches, max_pixels: int) -> tuple[int, int]:
    """Qwen3-VL's rule for clips: the bounds hold for frames x height x width; small frames are enlarged first."""
    factor = patches.patch * patches.merge
    if frames < patches.temporal:
        raise DataError(f"a clip of {frames} frames; this model reads {patches.temporal} at a time")
    enlarge = max(factor / size[0], factor / size[1])
    height, width = (int(side * enlarge) for side in size) if enlarge > 1 else size
    rows, columns = _nearest(height, width, factor)
    area = round(frames / patches.temporal) * patches.temporal * rows * columns
    bounds = patches.min_pixels, max_pixels
    return _bounded((height, width), factor, area, bounds, frames) or (rows, columns)


def _nearest(height: int, width: int, factor: int) -> tuple[int, int]:
    if max(height, width) > LONGEST_ASPECT * min(height, width):
        raise DataError(f"an image of {height} x {width} is over {LONGEST_ASPECT} times as long as wide; crop it")
    return round(height / factor) * factor, round(width / factor) * factor


def _bounded(
    size: tuple[int, int], factor: int, area: int, bounds: tuple[int, int], frames: int = 1
) -> tuple[int, int] | None:
    """The size scaled so that `frames` frames are within the bounds, or None if `area` is already within them."""
    least, most = bounds
    if area > most:
        scale = math.sqrt(frames * size[0] * size[1] / most)
        return tuple(max(factor, math.floor(side / scale / factor) * factor) for side in size)
    if area < least:
        scale = math.sqrt(least / (frames * size[0] * size[1]))
        return tuple(math.ceil(side * scale / factor) * factor for side in size)
    return None


def sample_frames(clips: Tensor, count: int) -> Tensor:
    """`count` frames [B, count, 3, H, W] of clips [B, F, 3, H, W], evenly from the first to the last."""
    import torch

    if not 1 <= count <= clips.shape[1]:
        raise DataError(f"{count} frames of a clip of {clips.shape[1]}; ask for 1 to {clips.shape[1]}")
    return clips[:, torch.linspace(0, clips.shape[1] - 1, count).round().long().to(clips.device)]


def read_patches(model: str, config: Any, *, video: bool) -> Patches:
    """The processor of a model folder or hub id with its transformers `config`, for images or for clips.

    As in the library, the first of these files is read: processor_config.json, video_preprocessor_config.json (clips),
    preprocessor_config.json; missing values are the class's defaults. Raises MissingFileError if there is no file, and
    ConfigError if its patches are not those of the model's vision tower.
    """
    stored = _stored(model, "video" if video else "image")
    third = video and config.model_type.startswith("qwen3")
    patch, least, most, mean, std = _CLIPS_3 if third else _CLIPS if video else _IMAGES
    size = stored.get("size") or {}
    patches = Patches(
        patch=stored.get("patch_size", patch),
        merge=stored.get("merge_size", 2),
        temporal=stored.get("temporal_patch_size", 2),
        min_pixels=stored.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or least,
        max_pixels=stored.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or most,
        mean=tuple(stored.get("image_mean") or mean),
        std=tuple(stored.get("image_std") or std),
        whole_clip=third,
        cap=stored.get("max_video_tokens", 768 if third else 128000) if stored.get("cap_pixels_per_frame") else 0,
    )
    tower = config.vision_config
    own = (tower.patch_size, tower.spatial_merge_size, tower.temporal_patch_size)
    if (patches.patch, patches.merge, patches.temporal) != own:
        raise ConfigError(
            f"'{model}': its processor cuts (patch, merge, temporal) = "
            f"{(patches.patch, patches.merge, patches.temporal)}, its vision tower takes {own}; correct the JSON"
        )
    return patches


def _stored(model: str, kind: str) -> Mapping[str, Any]:
    whole = read_json(model, "processor_config.json") or {}
    inside = whole.get(f"{kind}_processor")
    files = (["video_preprocessor_config.json"] if kind == "video" else []) + ["preprocessor_config.json"]
    for stored in [inside, *(read_json(model, file) for file in files)]:
        if stored:
            return stored
    raise MissingFileError(f"'{model}' has no {files[-1]}; get it with: hf download {model} --include '*.json'")


def read_json(model: str, file: str) -> Mapping[str, Any] | None:
    """The JSON file of a model folder or hub id, or None where it has no such file."""
    from transformers.utils import cached_file

    path = Path(model) / file
    if not Path(model).is_dir():
        cached = cached_file(model, file, _raise_exceptions_for_missing_entries=False)
        path = Path(cached) if cached else path
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

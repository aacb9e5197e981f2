"""Differentiable preparation of media for the models of rewards: check, resize, normalise.

Media are float tensors [B, 3, H, W] (images) or [B, F, 3, H, W] (clips) in [0, 1]. Everything is plain torch, so
gradients reach the pixels and torchvision is not needed. Not here: reading files, patches of vision-language models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from alignkit.errors import ConfigError, DataError
from alignkit.protocols import Reward
from alignkit.records import Prompt

if TYPE_CHECKING:
    from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RANGE_TOLERANCE = 1e-3  # decoders exceed the range by rounding; more than this is an error


def check_media(media: Tensor, prompts: Sequence[Prompt], reward: Reward) -> Tensor:
    """Returns `media` unchanged if `reward` can score them.

    Raises DataError naming the reward and the fault: shape or channel axis (NHWC), fewer than 2 frames for a video
    reward, integer pixels, NaN or infinity with its row, a range other than [0, 1], another number of prompts than of
    media, an empty prompt for a reward that needs one.
    """
    check_pixels(media, reward.name, reward.modality)
    if len(prompts) != len(media):
        raise DataError(f"{reward.name}: {len(media)} media with {len(prompts)} prompts; give each its own prompt")
    if reward.needs_prompt:
        for row, prompt in enumerate(prompts):
            if not prompt.text.strip():
                raise DataError(f"{reward.name}: the prompt of row {row} is empty and this reward reads it")
    return media


def check_pixels(media: Tensor, name: str, modality: str) -> None:
    """The checks of `check_media` on the media alone, for a critic `name` that is not a reward."""
    _check_shape(media, name, modality)
    _check_values(media, name)


def _check_shape(media: Tensor, name: str, modality: str) -> None:
    expected = {"image": "[B, 3, H, W]", "video": "[B, F, 3, H, W]"}[modality]
    shape = list(media.shape)
    if media.dim() != (5 if modality == "video" else 4):
        advice = "; a clip is judged frame by frame as its own batch" if media.dim() == 5 else ""
        raise DataError(f"{name}: media are {shape}, expected {expected}{advice}")
    if shape[-3] != 3:
        advice = "; channels come last (NHWC): permute them before height and width" if shape[-1] == 3 else ""
        raise DataError(f"{name}: media are {shape}, expected {expected} with 3 channels{advice}")
    if 0 in shape[:1] + shape[-2:]:
        raise DataError(f"{name}: media are {shape}; nothing to judge")
    if modality == "video" and shape[1] < 2:
        raise DataError(f"{name}: clips of {shape[1]} frames; a video reward needs at least 2")


def _check_values(media: Tensor, name: str) -> None:
    import torch

    if not media.is_floating_point():
        raise DataError(f"{name}: media are {media.dtype}; divide by 255 and give floats in [0, 1]")
    pixels = media.detach()
    low, high = (float(value) for value in torch.aminmax(pixels))  # NaN spreads to both
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        row = int(torch.isfinite(pixels).flatten(1).all(1).logical_not().nonzero()[0])
        raise DataError(f"{name}: a pixel of row {row} is NaN or infinite; look at the generator or its precision")
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        advice = "x / 2 + 0.5" if low < -0.5 and high <= 1.5 else "divide by 255" if high > 2 else "clamp to [0, 1]"
        raise DataError(f"{name}: pixels span [{low:.3g}, {high:.3g}], expected [0, 1]; {advice}")


def require_gradient(rewards: Iterable[Reward]) -> None:
    """Raises ConfigError naming rewards that are not differentiable; call it before training on them."""
    others = [reward.name for reward in rewards if not reward.differentiable]
    if others:
        raise ConfigError(
            f"no gradient reaches the pixels through {', '.join(others)}; train on differentiable rewards and use "
            "these for ranking or evaluation"
        )


def precise(tensor: Tensor) -> Tensor:
    """`tensor` in at least float32: bfloat16 has steps of 1/256 below 1 and of 1/8 near 20."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def scores_beside(media: Tensor, values: Sequence[float]) -> Tensor:
    """Values [B] as a tensor on the device of `media`, in its dtype but at least float32."""
    return precise(media.new_empty(0)).new_tensor(values)


def quantised(media: Tensor) -> Tensor:
    """`media` rounded as in an 8-bit file, at least float32, without gradient."""
    return precise(media.detach()).mul(255).round().clamp(0, 255).div(255)


Passes = Literal["pil", "float", "aliased"]


@dataclass(frozen=True, slots=True)
class Preparation:
    """How images [N, 3, H, W] in [0, 1] become a model's input [N, 3, size, size].

    fit: `crop` scales the shorter side to `size` and crops the centre, as CLIP does; `pad` scales the longer side and
    pads with `fill`, as HPSv2 and LLaVA do; `stretch` ignores the aspect ratio.
    passes: how `resize` resamples: as PIL or, for HPSv2, as torchvision on floats (`float`, `aliased`).
    """

    size: int
    fit: Literal["crop", "pad", "stretch"] = "crop"
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    fill: tuple[float, ...] = (0.0, 0.0, 0.0)
    pad_first: bool = False  # pad to a square before scaling, as LLaVA does, rather than after
    centre: Literal["down", "even"] = "down"  # offset of the crop: floor (transformers) or round (torchvision)
    passes: Passes = "pil"

    def __call__(self, media: Tensor) -> Tensor:
        """Prepared images on the device of `media`, in its dtype but at least float32."""
        pixels = precise(media)
        pixels = _padded(pixels, self.fill) if self.fit == "pad" and self.pad_first else pixels
        pixels = self._cut(resize(pixels, *self._scaled(*pixels.shape[-2:]), self.resample, passes=self.passes))
        mean, std = (pixels.new_tensor(values).reshape(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        if self.fit == "stretch":
            return self.size, self.size
        side = min(height, width) if self.fit == "crop" else max(height, width)
        if self.fit == "crop":  # CLIP's processor truncates the longer side, HPSv2's rounds
            return int(self.size * height / side), int(self.size * width / side)
        return max(1, round(self.size * height / side)), max(1, round(self.size * width / side))

    def _cut(self, pixels: Tensor) -> Tensor:
        if self.fit == "pad":
            return _padded(pixels, self.fill)
        halves = ((length - self.size) / 2 for length in pixels.shape[-2:])
        top, left = (math.floor(half) if self.centre == "down" else round(half) for half in halves)
        return pixels[..., top : top + self.size, left : left + self.size]


def resize(
    pixels: Tensor,
    height: int,
    width: int,
    resample: str = "bicubic",
    *,
    passes: Passes = "pil",
    eight_bit: bool = False,
) -> Tensor:
    """Resized pixels [N, 3, height, width] of [N, 3, H, W], at least float32; unchanged if they have this size.

    passes: `pil` resamples the width, then the height, and clamps to [0, 1] after each, because PIL's intermediate
    image is 8-bit; one pass differs by up to 12 levels of 255 on rendered text. PIL's rounding (about 1 level) is left
    out, since it has no gradient. `float` is one pass that may exceed [0, 1], as torchvision resamples floats;
    `aliased` is the same without antialiasing, as before torchvision 0.17.
    eight_bit: round before and after each pass as PIL does; then there is no gradient.
    """
    from torch.nn import functional

    pixels = quantised(pixels) if eight_bit else precise(pixels)
    if pixels.shape[-2:] == (height, width):
        return pixels
    if passes != "pil":
        return functional.interpolate(pixels, (height, width), mode=resample, antialias=passes == "float")
    for size in ((pixels.shape[-2], width), (height, width)):
        if pixels.shape[-2:] != size:
            pixels = functional.interpolate(pixels, size, mode=resample, antialias=True).clamp(0, 1)
            pixels = quantised(pixels) if eight_bit else pixels
    return pixels


def _padded(pixels: Tensor, fill: Sequence[float]) -> Tensor:
    """The image centred in a square of colour `fill`."""
    height, width = pixels.shape[-2:]
    side = max(height, width)
    if height == width:
        return pixels
    square = pixels.new_tensor(fill).reshape(1, 3, 1, 1).repeat(len(pixels), 1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[..., top : top + height, left : left + width] = pixels
    return square

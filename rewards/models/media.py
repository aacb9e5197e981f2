"""What every reward does with media before its model sees them: check, fit to a size, normalise - differentiably.

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
RANGE_TOLERANCE = 1e-3  # decoders overshoot by rounding; more than this is another range


def check_media(media: Tensor, prompts: Sequence[Prompt], reward: Reward) -> Tensor:
    """`media` as it came, once it is what `reward` can judge.

    Raises DataError naming the reward and the fault: shape or channel axis (NHWC), no frames or a single one for a
    video reward, integer pixels, NaN or infinity with its row, a range other than [0, 1], as many prompts as media,
    an empty prompt where the prompt matters.
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
    """What `check_media` says of the media alone, for a critic called `name` that is no reward."""
    _check_shape(media, name, modality)
    _check_values(media, name)


def _check_shape(media: Tensor, name: str, modality: str) -> None:
    wanted = {"image": "[B, 3, H, W]", "video": "[B, F, 3, H, W]"}[modality]
    shape = list(media.shape)
    if media.dim() != (5 if modality == "video" else 4):
        advice = "; a clip is judged frame by frame as its own batch" if media.dim() == 5 else ""
        raise DataError(f"{name}: media are {shape}, expected {wanted}{advice}")
    if shape[-3] != 3:
        advice = "; channels come last (NHWC): permute them before height and width" if shape[-1] == 3 else ""
        raise DataError(f"{name}: media are {shape}, expected {wanted} with 3 channels{advice}")
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
    """Before a run that back-propagates through rewards: ConfigError naming those that cannot."""
    blind = [reward.name for reward in rewards if not reward.differentiable]
    if blind:
        raise ConfigError(
            f"no gradient reaches the pixels through {', '.join(blind)}; train on differentiable rewards and use "
            "these for ranking or evaluation"
        )


def precise(tensor: Tensor) -> Tensor:
    """At least float32: bfloat16 has steps of 1/256 below 1, half-precision logits near 20 differ by steps of 1/8."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def scores_beside(media: Tensor, values: Sequence[float]) -> Tensor:
    """Values [B] as a tensor on the device of `media`, in its dtype but at least float32."""
    return precise(media.new_empty(0)).new_tensor(values)


def quantised(media: Tensor) -> Tensor:
    """`media` as an 8-bit file keeps it, at least float32, no gradient: what a stored image is judged by."""
    return precise(media.detach()).mul(255).round().clamp(0, 255).div(255)


Passes = Literal["pil", "float", "aliased"]


@dataclass(frozen=True, slots=True)
class Preparation:
    """How images [N, 3, H, W] in [0, 1] become a model's input [N, 3, size, size].

    fit: `crop` scales the shorter side to `size` and cuts the centre out, as CLIP does; `pad` scales the longer side
    and fills up with `fill`, as HPSv2 and LLaVA do; `stretch` ignores the aspect ratio.
    passes: how `resize` resamples, as PIL does or, for HPSv2, as torchvision does or did with floats.
    """

    size: int
    fit: Literal["crop", "pad", "stretch"] = "crop"
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    fill: tuple[float, ...] = (0.0, 0.0, 0.0)
    pad_first: bool = False  # pad to a square before scaling, as LLaVA does, rather than after
    centre: Literal["down", "even"] = "down"  # of an odd excess, floor (transformers) or round (torchvision)
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
    """Resize of [N, 3, H, W], at least float32; pixels of the right size pass as they are.

    passes: `pil` resamples the width, then the height, and clamps to [0, 1] after each, for PIL's images are 8-bit
    in between too; one pass is off by up to 12 levels of 255 on rendered text. PIL's rounding, which has no gradient,
    is left out: about 1 level. `float` is one pass that may overshoot, as torchvision resamples floats, and `aliased`
    the same without antialiasing, as it did before version 0.17.
    eight_bit: round before and after each of PIL's passes as PIL does; then no gradient passes.
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
    """The image in the middle of a square of colour `fill`."""
    height, width = pixels.shape[-2:]
    side = max(height, width)
    if height == width:
        return pixels
    square = pixels.new_tensor(fill).reshape(1, 3, 1, 1).repeat(len(pixels), 1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    square[..., top : top + height, left : left + width] = pixels
    return square

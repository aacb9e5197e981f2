"""Measures of an image that need no network: saturation, high-frequency energy, sharpness, size as a JPEG file.

A higher value is not better. Give them a weight in a composite (a negative one lowers the quantity), or monitor them
beside a learnt reward: its exploitation often shows here first. Computed in fp32 or more, on the device of the media.
Left out: perceptual models.
"""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from alignkit.errors import ConfigError, DataError
from alignkit.records import Prompt, Scores
from rewards.models.media import check_media, precise, quantised, scores_beside

if TYPE_CHECKING:
    from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, the weights of PIL and JPEG
SMALLEST_POWER = 1e-8  # per pixel; 8-bit rounding alone makes 1.3e-6


def luminance(media: Tensor) -> Tensor:
    """Luma [..., H, W] in [0, 1] of pixels [..., 3, H, W], in fp32, or in fp64 for fp64 pixels."""
    pixels = precise(media)
    return (pixels * pixels.new_tensor(LUMA).reshape(3, 1, 1)).sum(-3)


class Statistic:
    """Base class of the measures in this file. `measure` gives values [B] of images [B, 3, H, W]."""

    name = "statistic"
    modality = "image"
    needs_prompt = False
    differentiable = True
    comparable_across_prompts = True
    native_range = (0.0, 1.0)
    licence = "Apache-2.0"
    source = "rewards.pixel_statistics"

    @abstractmethod
    def measure(self, media: Tensor) -> Tensor:
        """Values [B] of checked images [B, 3, H, W]."""

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        return Scores(self.measure(check_media(media, prompts, self)))


class Saturation(Statistic):
    """Mean over the pixels of max - min of the channels: HSV's saturation times its value.

    Plain HSV saturation is high for the noise of near-black pixels and has unbounded gradients there.
    """

    name = "saturation"

    def measure(self, media: Tensor) -> Tensor:
        pixels = precise(media)
        return (pixels.amax(1) - pixels.amin(1)).mean((1, 2))


class HighFrequency(Statistic):
    """Share of luminance's spectral power at radial frequencies above `cutoff` cycles per pixel (Nyquist: 0.5).

    The mean is removed and a Hann window applied, since otherwise the step between opposite edges of the image would
    count as detail. White noise has a share of 1 - pi cutoff^2 (up to 0.5), photographs a few hundredths or less; a
    flat image has 0. Raises ConfigError for a cut-off outside (0, 0.7).
    """

    name = "high_frequency"

    def __init__(self, cutoff: float = 0.25) -> None:
        if not 0 < cutoff < 0.7:
            raise ConfigError(f"high_frequency: cutoff is {cutoff}; cycles per pixel between 0 and 0.7 (the corners)")
        self._cutoff = cutoff

    def measure(self, media: Tensor) -> Tensor:
        import torch

        grey = luminance(media)
        height, width = grey.shape[-2:]
        kind = {"dtype": grey.dtype, "device": grey.device}
        window = torch.hann_window(height + 1, **kind)[1:, None] * torch.hann_window(width + 1, **kind)[1:]
        centred = grey - (grey * window).sum((1, 2), keepdim=True) / window.sum()
        power = torch.fft.fft2(centred * window).abs().square()
        rows, columns = torch.fft.fftfreq(height, **kind), torch.fft.fftfreq(width, **kind)
        is_high = torch.hypot(rows[:, None], columns) > self._cutoff
        floor = SMALLEST_POWER * height * width * window.square().sum()
        return (power * is_high).sum((1, 2)) / (power.sum((1, 2)) + floor)


class Sharpness(Statistic):
    """Variance of luminance's Laplacian (4 neighbours minus 4 times the pixel; Pech-Pacheco et al. 2000).

    Luminance is in [0, 1]: OpenCV's usual number on 0..255 is 255^2 times this one. It grows with noise as well as
    detail and depends on the image's size, so compare at one size. Raises DataError for sides below 3.
    """

    name = "sharpness"
    native_range = (0.0, 16.0)

    def measure(self, media: Tensor) -> Tensor:
        if min(media.shape[-2:]) < 3:
            raise DataError(f"sharpness: images of {list(media.shape[-2:])}; the Laplacian needs sides of at least 3")
        grey = luminance(media)
        inner = grey[:, 1:-1, 1:-1]
        laplacian = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * inner
        return laplacian.var((1, 2), correction=0)


class JpegSize(Statistic):
    """Bits per pixel of the image as a JPEG file of `quality` (4:2:0), including the header of about 5,000 bits.

    Compressibility as in DDPO (arXiv 2305.13301), which uses kilobytes at quality 95, negated to lower them. Not
    differentiable. Raises ConfigError for a quality outside 1..95.
    """

    name = "jpeg_size"
    differentiable = False
    native_range = (0.0, float("inf"))

    def __init__(self, quality: int = 75) -> None:
        if not 1 <= quality <= 95:
            raise ConfigError(f"jpeg_size: quality is {quality}; it lies between 1 and 95")
        self._quality = quality

    def measure(self, media: Tensor) -> Tensor:
        height, width = media.shape[-2:]
        bits = [8 * self._bytes(image) / (height * width) for image in quantised(media)]
        return scores_beside(media, bits)

    def _bytes(self, image: Tensor) -> int:
        from PIL import Image

        pixels = image.double().mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=self._quality, subsampling="4:2:0")
        return file.tell()

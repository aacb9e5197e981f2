"""Measures of a picture: against closed forms, plain loops and files, with gradients by central differences."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from alignkit.errors import ConfigError, DataError
from alignkit.records import Prompt
from rewards.photographs import photographs
from rewards.pixel_statistics import HighFrequency, JpegSize, Saturation, Sharpness

ALL = [Saturation, HighFrequency, Sharpness, JpegSize]
SMOOTH = ALL[:3]


def measure(reward, media):
    return reward(media, [Prompt.from_text("")] * len(media)).total


def noise(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def grey(values):
    """[H, W] as a grey picture [1, 3, H, W]."""
    return values.expand(1, 3, *values.shape)


def wave(period, size=64):
    """Vertical stripes of so many pixels."""
    return (0.5 + 0.4 * torch.cos(torch.arange(size, dtype=torch.float64) * 2 * math.pi / period)).expand(size, size)


@pytest.mark.parametrize("kind", ALL)
def test_photographs_lie_in_the_range_whatever_the_batch_and_dtype(kind):
    reward, media = kind(), torch.stack([picture[:, :96, :96] for picture in photographs().values()])
    together = measure(reward, media)
    low, high = reward.native_range
    assert ((low < together) & (together < high)).all()
    alone = torch.cat([measure(reward, media[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=0)
    torch.testing.assert_close(measure(reward, media.double()).float(), together, rtol=1e-4, atol=0)
    assert measure(reward, media.half()).isfinite().all()


@pytest.mark.parametrize("kind", SMOOTH)
def test_the_gradient_is_that_of_the_number(kind):
    media = (0.2 + 0.6 * noise(2, 3, 6, 7)).requires_grad_()
    reward = kind()
    assert reward.differentiable
    assert torch.autograd.gradcheck(lambda pixels: measure(reward, pixels), media, eps=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(measure(reward, media)[0], media)
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0


@pytest.mark.parametrize("kind", SMOOTH)
def test_a_flat_picture_has_none_and_a_finite_gradient(kind):
    media = torch.full((1, 3, 16, 16), 0.3).requires_grad_()
    value = measure(kind(), media)
    assert value.item() == pytest.approx(0, abs=1e-7)
    assert torch.autograd.grad(value.sum(), media)[0].isfinite().all()


def test_saturation_is_the_mean_spread_of_the_channels():
    media = torch.zeros(3, 3, 4, 4)
    media[0, 0] = 1  # pure red
    media[1] = torch.tensor([0.9, 0.6, 0.5])[:, None, None]
    media[2, 0, :2] = 0.02  # black with a red cast: vivid to HSV (1.0), not to the eye
    assert measure(Saturation(), media).tolist() == pytest.approx([1.0, 0.4, 0.01])


@pytest.mark.parametrize(("period", "share"), [(16, 0.0), (5, 0.0), (3, 1.0), (2, 1.0)])
def test_stripes_are_high_when_finer_than_four_pixels(period, share):
    assert measure(HighFrequency(), grey(wave(period))).item() == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("cutoff", [0.1, 0.25, 0.4])
def test_white_noise_has_the_share_of_the_area_above_the_cutoff(cutoff):
    share = measure(HighFrequency(cutoff), grey(noise(256, 256)))
    assert share.item() == pytest.approx(1 - math.pi * cutoff**2, abs=0.01)


def test_high_frequency_does_not_take_the_edges_for_detail():
    """A ramp meets itself as a step at the borders; without the window that would be a hundredth of its power."""
    ramp = torch.linspace(0, 1, 64, dtype=torch.float64).expand(64, 64)
    assert measure(HighFrequency(), grey(ramp)).item() < 1e-5
    spectrum = torch.fft.fft2(ramp - ramp.mean()).abs().square()
    assert spectrum[:, 17:48].sum() / spectrum.sum() > 0.01


def test_sharpness_is_the_variance_of_the_laplacian_and_falls_with_blur():
    media = noise(1, 3, 9, 8, seed=3)
    luma = np.einsum("c,chw->hw", [0.299, 0.587, 0.114], media[0].numpy())
    found = [
        luma[y - 1, x] + luma[y + 1, x] + luma[y, x - 1] + luma[y, x + 1] - 4 * luma[y, x]
        for y in range(1, 8)
        for x in range(1, 7)
    ]
    assert measure(Sharpness(), media).item() == pytest.approx(np.var(found), rel=1e-12)
    picture = photographs()["chelsea"][None]
    blurred = torch.nn.functional.avg_pool2d(picture, 3, 1)
    assert measure(Sharpness(), blurred) < 0.2 * measure(Sharpness(), picture)


def test_jpeg_size_is_that_of_the_file_and_of_the_8_bit_picture():
    media = photographs()["coffee"][None]
    file = io.BytesIO()
    image = Image.fromarray((media[0] * 255).round().byte().permute(1, 2, 0).numpy())
    image.save(file, "JPEG", quality=75, subsampling=2)
    assert measure(JpegSize(), media).item() == pytest.approx(8 * len(file.getvalue()) / (213 * 320))
    assert measure(JpegSize(), media + 0.4 / 255 * (media < 0.9)) == measure(JpegSize(), media)
    assert measure(JpegSize(95), media) > measure(JpegSize(), media) > measure(JpegSize(20), media)
    assert not JpegSize().differentiable


def test_half_precision_is_stored_and_scored_as_float32():
    media = noise(2, 3, 16, 16).bfloat16()
    sizes = measure(JpegSize(), media)
    assert sizes.dtype == torch.float32
    assert torch.equal(sizes, measure(JpegSize(), media.float()))


def test_impossible_options_and_sizes_are_named():
    for build, told in ((lambda: HighFrequency(0.8), "cutoff is 0.8"), (lambda: JpegSize(100), "quality is 100")):
        with pytest.raises(ConfigError, match=told):
            build()
    with pytest.raises(DataError, match=r"sides of at least 3"):
        measure(Sharpness(), torch.rand(1, 3, 2, 9))
    with pytest.raises(DataError, match="divide by 255"):
        measure(Saturation(), 255 * torch.rand(1, 3, 4, 4))

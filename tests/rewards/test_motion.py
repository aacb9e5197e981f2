"""Motion and flicker: textures that move by known amounts, lights that change by known laws."""

from __future__ import annotations

import math

import pytest
import torch

from alignkit.errors import ConfigError, DataError
from alignkit.records import Prompt
from rewards.motion import Flicker, Motion
from rewards.photographs import photographs


def measure(reward, media):
    return reward(media, [Prompt.from_text("")] * len(media)).total


def texture(dx, dy, *, size=64, frames=3, seed=0, contrast=0.5, finest=8):
    """A sum of plane waves, at least `finest` pixels long (nearly), that moves by (dx, dy) a frame: [1, F, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.randn(40, 2, generator=generator, dtype=torch.float64) * 2 * math.pi / finest / 1.5
    phases = torch.rand(40, generator=generator, dtype=torch.float64) * 2 * math.pi
    y, x = torch.meshgrid(*[torch.arange(size, dtype=torch.float64)] * 2, indexing="ij")
    at = [(x - dx * t)[..., None] * waves[:, 0] + (y - dy * t)[..., None] * waves[:, 1] for t in range(frames)]
    values = torch.stack([torch.cos(place + phases).sum(-1) for place in at]) / math.sqrt(20)
    return (0.5 + contrast * values / 6).clamp(0, 1)[None, :, None].expand(-1, -1, 3, -1, -1)


@pytest.mark.parametrize("contrast", [0.5, 0.1])
@pytest.mark.parametrize("length", [0.25, 0.5, 1, 2, 4])
def test_a_moving_texture_measures_its_step(length, contrast):
    """Within 0.05 pixels, and 2% beyond: in any direction, for bold and for faint textures alike."""
    for seed, angle in enumerate((0.0, 1.0, 2.5)):
        clip = texture(length * math.cos(angle), length * math.sin(angle), seed=seed, contrast=contrast)
        assert measure(Motion(), clip).item() == pytest.approx(length, abs=0.05 + 0.02 * length)


def test_a_photograph_panned_measures_its_step():
    """Within a quarter of a pixel, for whole steps of real edges."""
    for step in (1, 2, 5, 10):
        for picture in photographs().values():
            clip = torch.stack([picture[:, :, step * t : step * t + 200] for t in range(3)])[None]
            assert measure(Motion(), clip).item() == pytest.approx(step, abs=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_still_clip_has_neither(dtype):
    still = photographs()["coffee"].to(dtype).expand(1, 4, 3, -1, -1)
    assert measure(Motion(), still).item() == pytest.approx(0, abs=1e-6)
    assert measure(Flicker(), still).item() == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_followed_claims_no_motion():
    """A flat wall; a lamp on it that is switched on; a straight edge along itself."""
    wall = torch.full((1, 3, 3, 32, 32), 0.4, dtype=torch.float64).requires_grad_()
    value = measure(Motion(), wall)
    assert value.item() == 0
    assert torch.autograd.grad(value.sum(), wall)[0].isfinite().all()
    lamp = torch.stack([torch.full((3, 32, 32), level) for level in (0.2, 0.5, 0.8)])[None]
    assert measure(Motion(), lamp).item() < 1e-3
    edge = (torch.arange(32) < 16).float().expand(1, 3, 3, 32, 32)
    assert measure(Motion(), edge).item() < 1e-3


def test_the_moving_thing_counts_not_the_empty_ground():
    ground = torch.full((1, 3, 3, 64, 64), 0.5, dtype=torch.float64)
    ground[..., 20:44, 20:44] = texture(1, 0)[..., 20:44, 20:44]
    assert measure(Motion(), ground).item() == pytest.approx(1, abs=0.2)  # its rim does not move


def test_flicker_of_known_light():
    frames, picture = 12, photographs()["chelsea"].double()[:, :40, :40] * 0.5 + 0.2
    times = torch.arange(frames, dtype=torch.float64)[:, None, None, None]
    mean = (picture * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).mean()
    fade = picture * (1 + 0.02 * times)
    pulse = picture * (1 + 0.1 * torch.cos(2 * math.pi * times / 4))
    black_white = (times % 2).expand(frames, 3, 8, 8)
    assert measure(Flicker(), fade[None]).item() == pytest.approx(0, abs=1e-12)
    level = (2 - 2 * math.cos(math.pi / 2)) * 0.1 * mean  # 4 sin^2(w / 2) times the amplitude
    cosines = torch.cos(math.pi / 2 * torch.arange(1, frames - 1)).abs().mean()
    assert measure(Flicker(), pulse[None]).item() == pytest.approx((level * cosines).item(), rel=1e-5)
    assert measure(Flicker(), black_white[None]).item() == pytest.approx(2)


def test_a_pan_flickers_far_less_than_a_pulse_of_two_per_cent():
    for picture in photographs().values():
        pan = torch.stack([picture[..., 2 * t : 2 * t + 300] for t in range(8)])
        light = 1 + 0.02 * (torch.arange(8) % 2).reshape(-1, 1, 1, 1)
        assert measure(Flicker(), pan[None]) < 0.1 * measure(Flicker(), (pan * light)[None].clamp(0, 1))


@pytest.mark.parametrize("kind", [Motion, Flicker])
def test_rows_are_judged_alone_and_carry_their_gradient(kind):
    clips = torch.cat([texture(1, 0.3, size=32, seed=1), texture(-0.4, 2, size=32, seed=2)]).clone()
    clips[:, 1] += 0.05
    clips, reward = clips.clamp(0, 1).requires_grad_(), kind()
    together = measure(reward, clips)
    torch.testing.assert_close(torch.cat([measure(reward, clips[i : i + 1]) for i in range(2)]), together)
    (gradient,) = torch.autograd.grad(together[0], clips)
    assert gradient[1].abs().sum() == 0
    direction = torch.randn(clips.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction[1] = 0
    with torch.no_grad():
        ends = [measure(reward, clips + sign * 1e-7 * direction)[0] for sign in (1, -1)]
    assert ((ends[0] - ends[1]) / 2e-7).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


def test_what_is_too_little_is_named():
    with pytest.raises(DataError, match="needs at least 2"):
        measure(Motion(), torch.rand(1, 1, 3, 32, 32))
    with pytest.raises(DataError, match="needs at least 3"):
        measure(Flicker(), torch.rand(1, 2, 3, 32, 32))
    with pytest.raises(DataError, match="sides of at least 16"):
        measure(Motion(), torch.rand(1, 3, 3, 12, 32))
    with pytest.raises(ConfigError, match="window 4 must be odd"):
        Motion(window=4)

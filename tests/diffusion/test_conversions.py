"""Conversions round trip, and agree with the algebra of diffusers' own schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignkit.diffusion.conversions import TARGETS, add_noise, convert, split, target_of
from alignkit.diffusion.schedules import FlowSchedule, VPSchedule, expand

SHAPE = (5, 2, 3, 3)


def draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def vp(t: float) -> tuple[Tensor, Tensor]:
    angle = torch.tensor(t * torch.pi / 2, dtype=torch.float64)
    return angle.cos(), angle.sin()


def flow(t: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(1 - t, dtype=torch.float64), torch.tensor(t, dtype=torch.float64)


@pytest.mark.parametrize("path", [vp, flow])
@pytest.mark.parametrize("kind", TARGETS)
@settings(max_examples=20, deadline=None)
@given(t=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_perfect_prediction_gives_the_picture_and_the_noise(path, kind, t, seed):
    x0, eps, (alpha, sigma) = draw(seed), draw(seed + 1), path(t)
    x_t = add_noise(x0, eps, alpha, sigma)
    prediction = target_of(kind, x0, eps, alpha, sigma)
    for implied, true in zip(split(kind, prediction, x_t, alpha, sigma), (x0, eps), strict=True):
        torch.testing.assert_close(implied, true, rtol=0, atol=1e-9)
    for wanted in TARGETS:
        expected = target_of(wanted, x0, eps, alpha, sigma)
        torch.testing.assert_close(convert(kind, wanted, prediction, x_t, alpha, sigma), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", [vp, flow])
@pytest.mark.parametrize("source", TARGETS)
@pytest.mark.parametrize("wanted", TARGETS)
def test_any_prediction_survives_there_and_back(path, source, wanted):
    alpha, sigma = path(0.37)
    prediction, x_t = draw(1), draw(2)
    there = convert(source, wanted, prediction, x_t, alpha, sigma)
    torch.testing.assert_close(convert(wanted, source, there, x_t, alpha, sigma), prediction, rtol=0, atol=1e-12)


def test_x0_and_eps_are_one_line_through_x_t():
    alpha, sigma = vp(0.6)
    x0, x_t = draw(3), draw(4)
    _, eps = split("sample", x0, x_t, alpha, sigma)
    torch.testing.assert_close(add_noise(x0, eps, alpha, sigma), x_t)


@pytest.mark.parametrize("call", [target_of, split])
def test_unknown_prediction_type_is_named(call):
    with pytest.raises(ValueError, match="unknown prediction type 'eps'; known: epsilon"):
        call("eps", draw(1), draw(2), *vp(0.5))


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("options", [{}, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}])
def test_vp_algebra_is_that_of_diffusers(scheduler, options):
    theirs = scheduler(**options)
    ours = VPSchedule(theirs.alphas_cumprod)
    steps = torch.tensor([0, 1, 499, 998, 999])
    alpha, sigma = (expand(value, draw(0)) for value in ours.coefficients((steps + 1) / 1000))
    x0, eps = draw(1).float(), draw(2).float()
    torch.testing.assert_close(add_noise(x0, eps, alpha, sigma), theirs.add_noise(x0, eps, steps))
    torch.testing.assert_close(target_of("v_prediction", x0, eps, alpha, sigma), theirs.get_velocity(x0, eps, steps))


def test_flow_algebra_is_that_of_diffusers():
    theirs = FlowMatchEulerDiscreteScheduler()
    ours = FlowSchedule()
    t = torch.tensor([0.001, 0.25, 0.5, 0.75, 1.0])
    x0, eps = draw(1).float(), draw(2).float()
    alpha, sigma = (expand(value, x0) for value in ours.coefficients(t))
    index = torch.tensor([theirs.index_for_timestep(value) for value in (t * 1000).round()])
    torch.testing.assert_close(ours.model_time(t), theirs.timesteps[index])
    noisy = theirs.scale_noise(x0, theirs.timesteps[index], eps)
    torch.testing.assert_close(add_noise(x0, eps, alpha, sigma), noisy, rtol=1e-5, atol=1e-6)


def test_flow_velocity_is_the_derivative_of_the_path():
    x0, eps, t, h = draw(1), draw(2), 0.4, 1e-6
    ahead, behind = (add_noise(x0, eps, *flow(t + shift)) for shift in (h, -h))
    slope = (ahead - behind) / (2 * h)
    torch.testing.assert_close(target_of("flow", x0, eps, *flow(t)), slope, rtol=0, atol=1e-8)

"""Steps with new noise: their variances from Gaussian arithmetic done here, and diffusers' DDIM step."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from alignkit.diffusion.solvers import FreshNoise, Grid
from alignkit.errors import ConfigError
from alignkit.generators.grids import scheduler_grid


def flow_grid(count, end=0.0):
    """Equal steps of a flow from t = 1 to `end`, in float64."""
    times = torch.linspace(1, end, count + 1, dtype=torch.float64)
    now, then = times[:-1], times[1:]
    return Grid(now, then, 1 - now, now, 1 - then, then)


def vp_grid(count):
    grid = scheduler_grid(DDIMScheduler(clip_sample=False), "epsilon", {"num_inference_steps": count})
    return grid.to(torch.float64)


@pytest.mark.parametrize("grid", [vp_grid(10), flow_grid(10)], ids=["vp", "flow"])
def test_eta_of_one_is_the_posterior_of_the_forward_process(grid):
    """x_s given x_t and x0 by conditioning: x_t = (alpha_t / alpha_s) x_s + independent noise; alpha_t = 0 included."""
    for index in range(len(grid) - 1):
        alpha, sigma, alpha_next, sigma_next = grid.step(index)
        covariance = alpha / alpha_next * sigma_next**2
        kept, fresh = FreshNoise(eta=1).coefficients(grid, index)
        assert kept.item() == pytest.approx((covariance / sigma).item(), abs=1e-6)
        assert fresh.item() == pytest.approx((sigma_next**2 - covariance**2 / sigma**2).sqrt().item(), abs=1e-6)
        assert fresh > 0


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_eta_keeps_the_marginal_for_any_step(eta):
    """Of 200,000 samples about a known x0 after one long step."""
    source = torch.Generator().manual_seed(0)
    noise, eps = torch.randn(2, 200_000, generator=source, dtype=torch.float64)
    for grid, kind in ((vp_grid(3), "epsilon"), (flow_grid(3), "flow")):
        alpha, sigma, alpha_next, sigma_next = grid.step(1)
        prediction = eps if kind == "epsilon" else eps - 2.0
        x = FreshNoise(eta=eta).step(kind, prediction, alpha * 2.0 + sigma * eps, grid, 1, noise)
        assert x.mean().item() == pytest.approx(2 * alpha_next.item(), abs=0.01)
        assert x.std().item() == pytest.approx(sigma_next.item(), rel=0.01)
        assert torch.corrcoef(torch.stack([x, noise]))[0, 1] > 0.1 * eta


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_eta_is_diffusers(prediction):
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction)
    grid = scheduler_grid(scheduler, prediction, {"num_inference_steps": 5})
    scheduler.set_timesteps(5)
    x, p, z = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for index, time in enumerate(scheduler.timesteps[:-1]):
        expected = scheduler.step(p, time, x, eta=0.6, variance_noise=z).prev_sample
        torch.testing.assert_close(FreshNoise(eta=0.6).step(prediction, p, x, grid, index, z), expected)


def variance_at(steps, level, *, data=0.5, end=0.3):
    """The variance at time `end` of chains with the exact velocity of Gaussian data of that standard deviation.

    The step is linear in state and noise, so two calls give its factors, and the variance follows by recursion.
    """
    grid, variance = flow_grid(steps, end), 1.0
    for index in range(steps):
        t = float(grid.t[index])
        total = (1 - t) ** 2 * data**2 + t**2
        slope = (t - (1 - t) * data**2) / total  # E[eps - x0 | x] = slope x
        one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        noise = FreshNoise(flow_sde=level)
        by_state = noise.step("flow", slope * one, one, grid, index, zero)
        by_noise = noise.step("flow", zero, zero, grid, index, one)
        variance = float(by_state) ** 2 * variance + float(by_noise) ** 2
    return variance


def test_the_flow_sde_has_the_marginals_of_the_flow():
    """Gaussian data: variance (1 - t)^2 data^2 + t^2, with an error of first order in the step."""
    exact = 0.7**2 * 0.5**2 + 0.3**2
    errors = [abs(variance_at(steps, 0.7) - exact) for steps in (100, 200, 400)]
    assert errors[2] < 0.01 * exact
    assert [errors[i] / errors[i + 1] for i in (0, 1)] == pytest.approx([2, 2], rel=0.15)


def test_one_flow_sde_step_passes_the_marginal_by_what_the_docstring_says():
    grid, a = flow_grid(10), 0.7
    for index in range(1, 9):
        _, t, _, s = (float(value) for value in grid.step(index))
        kept, fresh = (float(value) for value in FreshNoise(flow_sde=a).coefficients(grid, index))
        excess = a**2 * (t - s) ** 2 / (1 - t) + a**4 * (t - s) ** 2 / (4 * (1 - t) ** 2)
        assert kept**2 + fresh**2 == pytest.approx(s**2 + excess)


def test_the_last_step_goes_to_the_clean_latent():
    grid, x, p = flow_grid(2), torch.ones(3, dtype=torch.float64), torch.full((3,), 0.4, dtype=torch.float64)
    for noise in (FreshNoise(eta=1), FreshNoise(flow_sde=0.7), FreshNoise()):
        assert torch.equal(noise.step("flow", p, x, grid, 1, 100 * x), x - 0.5 * p)


def test_values_out_of_range_are_named():
    for keys, message in (({"eta": -1}, "eta is -1"), ({"flow_sde": float("nan")}, "flow_sde is nan")):
        with pytest.raises(ConfigError, match=message):
            FreshNoise(**keys)

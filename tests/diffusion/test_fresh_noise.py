"""Steps with new noise: their variances from Gaussian arithmetic done here, and diffusers' DDIM step."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from alignkit.diffusion.solvers import FreshNoise, Grid
from alignkit.errors import ConfigError
from alignkit.generators.grids import scheduler_grid
from alignkit.generators.rollout import keyed_sources


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


def marginal(t, data):
    """The variance of (1 - t) x0 + t eps for x0 of standard deviation `data`."""
    return (1 - t) ** 2 * data**2 + t**2


def variance_error(steps, level, *, start, data=0.5, end=0.3):
    """How far chains from the exact marginal at `start` are from that at `end`, with Gaussian data's exact velocity.

    The step is linear in state and noise, so two calls give its factors, and the variance follows by recursion.
    """
    times = torch.linspace(start, end, steps + 1, dtype=torch.float64)
    now, then = times[:-1], times[1:]
    grid, variance = Grid(now, then, 1 - now, now, 1 - then, then), marginal(start, data)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for index in range(steps):
        t = float(now[index])
        slope = (t - (1 - t) * data**2) / marginal(t, data)  # E[eps - x0 | x] = slope x
        noise = FreshNoise(flow_sde=level)
        by_state = noise.step("flow", slope * one, one, grid, index, zero)
        by_noise = noise.step("flow", zero, zero, grid, index, one)
        variance = float(by_state) ** 2 * variance + float(by_noise) ** 2
    return abs(variance - marginal(end, data))


def test_the_flow_sde_has_the_marginals_of_the_flow():
    """To first order from t = 0.9; the singular start at t = 1 is forgotten as step^(a^2), 2^0.49 = 1.40."""
    for start, rate in ((0.9, 2.0), (1.0, 1.404)):
        errors = [variance_error(steps, 0.7, start=start) for steps in (200, 400, 800)]
        assert errors[2] < 0.01 * marginal(0.3, 0.5)
        assert [errors[i] / errors[i + 1] for i in (0, 1)] == pytest.approx([rate, rate], rel=0.04)
    assert variance_error(200, 0.0, start=1.0) > 1e-5  # what Euler's own steps leave, without noise


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


def test_noise_is_keyed_by_row_step_and_use():
    def drawn(seed, index, *key):
        (source,) = keyed_sources([seed], *key)(index)
        return torch.randn(4, generator=source)

    assert torch.equal(drawn(1, 2), drawn(1, 2))
    others = [drawn(2, 2), drawn(1, 3), drawn(1, 2, "sample", 0), drawn(1, 2, "sample", 1)]
    assert not any(torch.equal(drawn(1, 2), other) for other in others)
    assert not torch.equal(others[2], others[3])


def test_values_out_of_range_are_named():
    for keys, message in (({"eta": -1}, "eta is -1"), ({"flow_sde": float("nan")}, "flow_sde is nan")):
        with pytest.raises(ConfigError, match=message):
            FreshNoise(**keys)

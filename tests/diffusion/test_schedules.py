"""Schedules: index edges, coefficients at the ends, and the training densities."""

from __future__ import annotations

import pytest
import torch

from alignkit.diffusion.schedules import FlowSchedule, VPSchedule, expand

VP = VPSchedule(torch.linspace(0.99, 0.01, 10))


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_index_edges():
    """t = (k + 1)/T is step k; t = 0 counts as the first step, t = 1 is the last."""
    assert VP.index(torch.arange(1, 11) / 10).tolist() == list(range(10))
    assert VP.index(torch.tensor([0.0, 0.01, 0.1, 0.14, 0.16, 0.99, 1.0])).tolist() == [0, 0, 0, 0, 1, 9, 9]
    assert VP.model_time(torch.tensor([0.1, 1.0])).dtype == torch.long


@pytest.mark.parametrize("count", [10, 1000])
def test_every_step_survives_the_float_grid(count):
    schedule = VPSchedule(torch.linspace(0.99, 0.01, count))
    t = (torch.arange(count) + 1).float() / count
    assert torch.equal(schedule.index(t), torch.arange(count))


def test_vp_preserves_variance():
    alpha, sigma = VP.coefficients(torch.tensor([0.1, 0.5, 1.0]))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(3))
    assert alpha[0] ** 2 == pytest.approx(0.99)
    assert alpha[-1] ** 2 == pytest.approx(0.01)


def test_vp_density_is_uniform_over_the_steps():
    drawn = VP.index(VP.sample_t(20_000, source())).bincount(minlength=10) / 20_000
    assert (drawn - 0.1).abs().max() < 0.01  # five standard deviations


def test_flow_ends():
    alpha, sigma = FlowSchedule().coefficients(torch.tensor([0.0, 1.0]))
    assert (alpha.tolist(), sigma.tolist()) == ([1.0, 0.0], [0.0, 1.0])
    assert FlowSchedule().model_time(torch.tensor([0.25])).tolist() == [250.0]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_density_is_a_shifted_logit_normal(shift):
    """logit(t) = logit(u) + log(shift), and logit(u) is standard normal: mean log(shift), deviation 1."""
    t = FlowSchedule(shift).sample_t(40_000, source()).double()
    assert ((t > 0) & (t < 1)).all()
    logit = (t / (1 - t)).log()
    assert logit.mean().item() == pytest.approx(float(torch.tensor(shift).log()), abs=0.025)
    assert logit.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("schedule", [VP, FlowSchedule(2.0)])
def test_draws_come_from_the_generator_alone(schedule):
    torch.manual_seed(1)
    first = schedule.sample_t(5, source(4))
    torch.manual_seed(2)
    assert torch.equal(first, schedule.sample_t(5, source(4)))
    assert not torch.equal(first, schedule.sample_t(5, source(5)))


def test_expand():
    assert expand(torch.arange(3), torch.zeros(3, 4, 5, 6)).shape == (3, 1, 1, 1)

"""Diffusion-LAIR and Linear-DPO: check vectors, optima, gradients at the reference, and what they are beside DPO."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignkit.losses import diffusion_dpo, lair, linear_dpo, loser_scale, winner_sft

PHI = torch.tensor([[0.9, 0.6, 0.3, 0.2]], dtype=torch.float64)
ZERO = torch.zeros(1, 4, dtype=torch.float64)


def errors(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), of)[0]


# --- Diffusion-LAIR -------------------------------------------------------------------------------------------------


def test_lair_by_hand():
    """phi = (ln 3, 0), tau = 1: A = (1/4, -1/4); beta = 2, so u = -delta = (0.2, -0.1); lam = 1/2."""
    phi = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    policy = torch.tensor([[0.3, 0.6]], dtype=torch.float64)
    loss = lair(policy, torch.full((1, 2), 0.5, dtype=torch.float64), phi, beta=2, tau=1.0, lam=0.5).loss
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx((0.5 * (0.04 + 0.01) - 0.25 * (0.2 + 0.1)) / 2, rel=1e-12)


def test_beta_two_is_the_form_in_errors():
    """1/K sum_i A_i delta_i + lam/K sum_i delta_i^2, with delta = policy error - reference error."""
    policy, reference, phi = errors(3, 5), errors(3, 5, seed=1), errors(3, 5, seed=2)
    delta, advantage = policy - reference, torch.softmax(phi / 0.3, -1) - 1 / 5
    expected = (advantage * delta).sum(-1) / 5 + 0.7 / 5 * delta.square().sum(-1)
    torch.testing.assert_close(lair(policy, reference, phi, beta=2, tau=0.3, lam=0.7).loss, expected)


@pytest.mark.parametrize(("beta", "lam", "tau"), [(2.0, 0.5, 0.5), (40.0, 0.25, 0.1), (7.0, 3.0, 2.0)])
def test_descent_on_free_errors_ends_at_the_closed_form(beta, lam, tau):
    """delta_i = -A_i / (beta lam): errors of candidates better than the mean fall below the reference's, bounded."""
    reference, delta = errors(1, 4), torch.full((1, 4), 0.3, dtype=torch.float64).requires_grad_()
    rate = 4 / (beta**2 * lam)  # the loss is quadratic: this is 2 / curvature halved, so each step halves the distance
    for _ in range(60):
        step = gradient(lair(reference + delta, reference, PHI, beta=beta, lam=lam, tau=tau).loss, delta)
        delta = (delta - rate * step).detach().requires_grad_()
    advantage = torch.softmax(PHI / tau, -1) - 1 / 4
    torch.testing.assert_close(delta.detach(), -advantage / (beta * lam), rtol=1e-9, atol=1e-12)
    assert delta[0].argmin() == PHI[0].argmax()
    assert delta.abs().max() <= (1 - 1 / 4) / (beta * lam)


def test_lair_at_the_reference():
    """The loss is 0, and the gradient of each error beta/2 A_i / K: they add up to nothing."""
    policy = ZERO.clone().requires_grad_()
    output = lair(policy, ZERO, PHI, beta=6, tau=0.5)
    assert output.loss.item() == 0
    advantage = torch.softmax(PHI / 0.5, -1) - 1 / 4
    found = gradient(output.loss, policy)
    torch.testing.assert_close(found, 3 * advantage / 4)
    assert found.sum().item() == pytest.approx(0, abs=1e-12)
    assert found[0, 0] > 0 > found[0, 3]
    assert output.metrics["implicit_accuracy"].item() == 0.5


def test_two_candidates_are_the_quadratic_of_diffusion_dpo():
    """tau -> 0, lam = 1/4: 2 L = DPO - log 2 + (u_1 + u_2)^2 / 8 up to the fourth order of the margin."""
    beta, phi = 10.0, torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for scale in (1e-2, 1e-3):
        policy = scale * torch.tensor([[-1.0, 0.4]], dtype=torch.float64)
        u = -beta / 2 * policy
        pair = diffusion_dpo(policy, ZERO[:, :2], beta=beta).loss - math.log(2)
        ours = 2 * lair(policy, ZERO[:, :2], phi, beta=beta, tau=1e-3, lam=0.25).loss
        assert (ours - pair - u.sum() ** 2 / 8).abs().item() <= (u[0, 0] - u[0, 1]).item() ** 4 / 190


def test_a_row_of_ties_goes_back_to_the_reference():
    policy, phi = errors(1, 3).requires_grad_(), torch.full((1, 3), 0.4, dtype=torch.float64)
    reference = errors(1, 3, seed=1)
    loss = lair(policy, reference, phi, beta=4, lam=0.25).loss
    torch.testing.assert_close(loss, (policy - reference).square().mean(-1))  # lam (beta/2)^2 = 1
    torch.testing.assert_close(gradient(loss, policy), 2 / 3 * (policy - reference).detach())


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(5)), shift=st.floats(-3, 3), seed=st.integers(0, 99))
def test_order_and_a_shift_of_rewards_do_not_matter(order, shift, seed):
    policy, reference, phi = (errors(2, 5, seed=seed + k) for k in range(3))
    one = lair(policy, reference, phi, beta=7).loss
    other = lair(policy[:, order], reference[:, order], phi[:, order] + shift, beta=7).loss
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# --- Linear-DPO -----------------------------------------------------------------------------------------------------


def test_linear_dpo_check_vector():
    """beta = 1, the winner better by a margin of 2: omega = 1/2 - 0.4 = 0.1, loss = -0.2."""
    output = linear_dpo(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), beta=1)
    assert output.loss.item() == pytest.approx(-0.2)
    assert output.metrics["margin"].item() == pytest.approx(1.0)


def test_the_reference_enters_the_weight_alone():
    """Errors (0.3, 0.6) against (0.5, 0.5), beta 2: 1/2 + 0.4 (-0.2 - 0.1) = 0.38, times -0.3."""
    policy, reference = torch.tensor([[0.3, 0.6]]), torch.tensor([[0.5, 0.5]])
    assert linear_dpo(policy, reference, beta=2).loss.item() == pytest.approx(0.38 * -0.3, rel=1e-6)


@pytest.mark.parametrize(("margin", "omega", "saturated"), [(9.0, 0.05, 1.0), (-9.0, 0.95, 0.0), (0.0, 0.5, 0.0)])
def test_weights_are_clipped(margin, omega, saturated):
    """A pair that is won keeps eta, one that is lost at most 1 - eta; only the first has nothing more to teach."""
    policy = torch.tensor([[0.0, margin]], dtype=torch.float64).requires_grad_()
    output = linear_dpo(policy, ZERO[:, :2], beta=3, eta=0.05)
    torch.testing.assert_close(gradient(output.loss, policy), torch.tensor([[omega, -omega]], dtype=torch.float64))
    assert output.metrics["saturated"].item() == saturated


def test_at_the_reference_linear_dpo_goes_where_diffusion_dpo_goes():
    """There the loss is half the difference of errors, and its gradient that of DPO divided by beta/2."""
    policy, beta = errors(4, 2).requires_grad_(), 60.0
    reference = policy.detach()
    linear = linear_dpo(policy, reference, beta=beta).loss
    torch.testing.assert_close(linear, (policy[:, 0] - policy[:, 1]) / 2)
    pair = diffusion_dpo(policy, reference, beta=beta).loss
    torch.testing.assert_close(gradient(linear, policy), gradient(pair, policy) / (beta / 2))


def test_protection_scales_the_losers_gradient():
    policy, residual = errors(2, 2).requires_grad_(), errors(2, 2, 9, seed=2)
    scale = loser_scale(residual, 0.9)
    plain, protected = (linear_dpo(policy, errors(2, 2, seed=1), beta=5, protect=p).loss for p in (None, scale))
    assert torch.equal(plain, protected)
    one, other = gradient(plain, policy), gradient(protected, policy)
    torch.testing.assert_close(other[:, 0], one[:, 0])
    torch.testing.assert_close(other[:, 1], scale[:, 0, 1] * one[:, 1])


# --- all ------------------------------------------------------------------------------------------------------------


def test_winner_sft_is_the_error_of_the_best():
    policy = errors(3, 4)
    phi = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.8, 0.1, 0.1, 0.0], [0.5, 0.5, 0.1, 0.1]])
    loss = winner_sft(policy, errors(3, 4, seed=1), phi, beta=5).loss
    assert torch.equal(loss, torch.stack([policy[0, 1], policy[1, 0], policy[2, 0]]))


def call(loss, policy, reference):
    return loss(policy, reference, *(() if loss is linear_dpo else (PHI[:, :2],)), beta=100)


@pytest.mark.parametrize("loss", [lair, linear_dpo, winner_sft])
def test_losses_are_at_least_float32(loss):
    policy, reference = errors(1, 2), errors(1, 2, seed=1)
    exact = call(loss, policy.bfloat16().double(), reference.bfloat16().double()).loss
    narrow = call(loss, policy.bfloat16(), reference.bfloat16()).loss
    assert (narrow.dtype, exact.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(narrow.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [lair, linear_dpo])
def test_metrics_are_detached_scalars(loss):
    output = call(loss, errors(1, 2).requires_grad_(), errors(1, 2, seed=1))
    assert {"implicit_accuracy", "margin", "winner_error_delta", "loser_error_delta"} <= output.metrics.keys()
    assert all(value.shape == () and not value.requires_grad for value in output.metrics.values())


def test_lair_agrees_with_finite_differences():
    """`linear_dpo` does not: its weight is a constant to the gradient by definition."""
    policy, reference, phi = errors(2, 4).requires_grad_(), errors(2, 4, seed=1), PHI.expand(2, 4)
    assert torch.autograd.gradcheck(lambda p: lair(p, reference, phi, beta=3).loss, policy)

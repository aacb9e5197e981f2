"""Preference losses against values derived by hand, limits, symmetries and their first-order guarantees."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alignkit.losses import LOSSES, diffusion_dpo, loser_scale, plackett_luce, rank_dpo
from alignkit.losses.preference import mean_ranks, rank_weights
from alignkit.resolve import resolve

PHI = torch.tensor([[14.0, 9.0, 5.0, 2.0]], dtype=torch.float64) / 15
LOG2 = math.log(2)
ZERO = torch.zeros(1, 4, dtype=torch.float64)


def errors(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def label_ranks(phi_PK: Tensor) -> Tensor:
    return mean_ranks(phi_PK.unsqueeze(-2) > phi_PK.unsqueeze(-1)).to(phi_PK)


# --- values derived by hand -----------------------------------------------------------------------------------------


def test_check_vector_of_the_weights():
    """phi = (14, 9, 5, 2)/15, natural logarithm: six weights worked out with a pocket calculator."""
    weights = rank_weights(PHI, label_ranks(PHI))[0]
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    found = [round(float(weights[pair]), 4) for pair in pairs]
    assert found == [0.2098, 0.4687, 0.6676, 0.0483, 0.1210, 0.0163]
    assert sum(float(weights[pair]) for pair in pairs) == pytest.approx(1.5318, abs=5e-5)
    assert torch.equal(weights, weights.T)


def test_check_vector_of_the_loss():
    """At policy = reference every pair costs log 2, so L = log 2 x 1.5318."""
    loss = rank_dpo(ZERO, ZERO, PHI, beta=5000).loss
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(1.0618, abs=1e-4)


def test_diffusion_dpo_by_hand():
    """winner 0.2 better, loser 0.1 worse than the reference, beta 10: z = -5 (-0.2 - 0.1) = 1.5."""
    policy, reference = torch.tensor([[0.3, 0.6]]), torch.tensor([[0.5, 0.5]])
    output = diffusion_dpo(policy, reference, beta=10)
    assert output.loss.item() == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-6)
    assert output.metrics["margin"].item() == pytest.approx(1.5, rel=1e-6)
    assert output.metrics["winner_error_delta"].item() == pytest.approx(-0.2, rel=1e-6)
    assert output.metrics["loser_error_delta"].item() == pytest.approx(0.1, rel=1e-6)


def test_plackett_luce_by_hand():
    """beta = 2, so u = -delta = (2, 1, 0): the winner of three, then the better of two."""
    policy = torch.tensor([[-2.0, -1.0, 0.0]], dtype=torch.float64)
    loss = plackett_luce(policy, ZERO[:, :3], torch.tensor([[3.0, 2.0, 1.0]]), beta=2).loss.item()
    first = math.exp(2) / (math.exp(2) + math.exp(1) + 1)
    assert loss == pytest.approx(-math.log(first) - math.log(math.e / (math.e + 1)), rel=1e-12)


def test_plackett_luce_at_the_reference_counts_orders():
    """All K! orders are equally likely there: log 4!."""
    assert plackett_luce(ZERO, ZERO, PHI, beta=700).loss.item() == pytest.approx(math.log(24), rel=1e-12)


@pytest.mark.parametrize(("weighting", "expected"), [("none", 6.0), ("gain", None)])
def test_weightings_by_hand(weighting, expected):
    power = [2**p for p in PHI[0].tolist()]
    gains = sum(power[i] - power[j] for i in range(4) for j in range(i + 1, 4))
    loss = rank_dpo(ZERO, ZERO, PHI, beta=1, weighting=weighting).loss.item()
    assert loss == pytest.approx(LOG2 * (expected or gains), rel=1e-12)


def test_ranks_share_the_mean_of_ties():
    """0.5 twice takes places 2 and 3."""
    assert label_ranks(torch.tensor([[0.5, 0.9, 0.5, 0.1]])).tolist() == [[2.5, 1.0, 2.5, 4.0]]


# --- the switches ---------------------------------------------------------------------------------------------------


def test_model_ranks_equal_label_ranks_at_the_reference():
    """Equal model scores break by phi, else all discounts were equal and nothing would move at initialisation."""
    label, model = (rank_dpo(ZERO, ZERO, PHI, beta=9, rank_source=source).loss for source in ("label", "model"))
    assert torch.equal(label, model)


def test_model_ranks_follow_the_model():
    """The model holds the reversed order, so tau is (4, 3, 2, 1): weights with the discounts of that order."""
    policy = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    tau = torch.tensor([[4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    z = -0.5 * 3 * (policy.unsqueeze(-1) - policy.unsqueeze(-2))
    expected = (torch.nn.functional.softplus(-z) * rank_weights(PHI, tau)).triu(1).sum()
    assert rank_dpo(policy, ZERO, PHI, beta=3, rank_source="model").loss.item() == pytest.approx(expected.item())


def test_model_ranks_of_a_partial_tie():
    """The model prefers the third; the other three are equal to it and keep the order of phi behind it."""
    policy = torch.tensor([[0.0, 0.0, -1.0, 0.0]], dtype=torch.float64)
    tau = torch.tensor([[2.0, 3.0, 1.0, 4.0]], dtype=torch.float64)
    z = -0.5 * 3 * (policy.unsqueeze(-1) - policy.unsqueeze(-2))
    expected = (torch.nn.functional.softplus(-z) * rank_weights(PHI, tau)).triu(1).sum()
    assert rank_dpo(policy, ZERO, PHI, beta=3, rank_source="model").loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("switch", [{"rank_source": "labels"}, {"weighting": "ndcg"}])
def test_unknown_switch_is_named(switch):
    with pytest.raises(ValueError, match=f"{next(iter(switch))} is '{next(iter(switch.values()))}'; use"):
        rank_dpo(ZERO, ZERO, PHI, beta=1, **switch)


def test_two_candidates_are_one_pair():
    """K = 2: Plackett-Luce is Diffusion-DPO, and so is RankDPO without weights."""
    policy, reference = errors(5, 2), errors(5, 2, seed=1)
    pair = diffusion_dpo(policy, reference, beta=40)
    phi = torch.tensor([[0.8, 0.3]]).expand(5, 2)
    for other in (
        plackett_luce(policy, reference, phi, beta=40),
        rank_dpo(policy, reference, phi, beta=40, weighting="none"),
    ):
        torch.testing.assert_close(other.loss, pair.loss, rtol=1e-10, atol=1e-14)
        for name, value in pair.metrics.items():
            torch.testing.assert_close(other.metrics[name], value, rtol=1e-10, atol=1e-14)


def test_every_loss_in_the_table_can_be_imported():
    assert all(callable(resolve(name, LOSSES, kind="loss")) for name in LOSSES)


# --- symmetries -----------------------------------------------------------------------------------------------------


def test_swapping_winner_and_loser_flips_z():
    """sigma(z) + sigma(-z) = 1, so the two losses are -log p and -log(1 - p)."""
    policy, reference = errors(6, 2), errors(6, 2, seed=1)
    forward, backward = (
        diffusion_dpo(policy.flip(-1) if flip else policy, reference.flip(-1) if flip else reference, beta=8).loss
        for flip in (False, True)
    )
    torch.testing.assert_close((-forward).exp() + (-backward).exp(), torch.ones_like(forward))


@settings(max_examples=40, deadline=None)
@given(
    order=st.permutations(range(5)),
    phi=st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), min_size=5, max_size=5),
    source=st.sampled_from(["label", "model"]),
    seed=st.integers(0, 99),
)
def test_order_of_candidates_does_not_matter(order, phi, source, seed):
    policy, reference, phi_PK = errors(1, 5, seed=seed), errors(1, 5, seed=seed + 1), torch.tensor([phi])
    for loss in (lambda *t: rank_dpo(*t, beta=7, rank_source=source), lambda *t: plackett_luce(*t, beta=7)):
        one = loss(policy, reference, phi_PK).loss
        other = loss(policy[:, order], reference[:, order], phi_PK[:, order]).loss
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(shift=st.floats(-3, 3), seed=st.integers(0, 99))
def test_only_differences_between_candidates_count(shift, seed):
    policy, reference = errors(2, 4, seed=seed), errors(2, 4, seed=seed + 1)
    phi = PHI.expand(2, 4)
    for loss in (rank_dpo, plackett_luce):
        torch.testing.assert_close(
            loss(policy + shift, reference, phi, beta=5).loss, loss(policy, reference, phi, beta=5).loss
        )


# --- ties, types and gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [rank_dpo, plackett_luce])
def test_a_row_of_ties_costs_nothing_and_keeps_its_graph(loss):
    policy = errors(2, 4).requires_grad_()
    phi = torch.stack([torch.full((4,), 0.5, dtype=torch.float64), PHI[0]])
    output = loss(policy, errors(2, 4, seed=1), phi, beta=50).loss
    assert output[0].item() == 0
    assert output[1].item() > 0
    (gradient,) = torch.autograd.grad(output[0], policy)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("loss", [rank_dpo, plackett_luce])
def test_ties_neither_cost_nor_move_each_other(loss):
    """Of (0.9, 0.5, 0.5) the two equal ones only meet the winner: dropping one leaves the other's gradient alone."""
    policy = errors(1, 3).requires_grad_()
    phi = torch.tensor([[0.9, 0.5, 0.5]], dtype=torch.float64)
    options = {"weighting": "none"} if loss is rank_dpo else {}
    total = loss(policy, ZERO[:, :3], phi, beta=4, **options).loss
    (gradient,) = torch.autograd.grad(total.sum(), policy)
    if loss is rank_dpo:
        pairs = [diffusion_dpo(policy[:, [0, k]], ZERO[:, :2], beta=4).loss for k in (1, 2)]
        torch.testing.assert_close(total, sum(pairs))
    assert gradient[0, 0] > 0 > gradient[0, 1:].max()


def test_extreme_margins_stay_finite():
    policy = torch.tensor([[1e6, 0.0, -1e6, 0.0]], requires_grad=True)
    for loss in (rank_dpo, plackett_luce):
        value = loss(policy, torch.zeros(1, 4), PHI, beta=5000).loss.sum()
        (gradient,) = torch.autograd.grad(value, policy)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("loss", [rank_dpo, plackett_luce])
@pytest.mark.parametrize(
    ("given_type", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2],
)
def test_losses_are_at_least_float32(loss, given_type, wide):
    policy, reference = errors(1, 4).to(given_type), errors(1, 4, seed=1).to(given_type)
    output = loss(policy, reference, PHI, beta=100)
    assert output.loss.dtype == wide
    exact = loss(policy.double(), reference.double(), PHI, beta=100).loss
    torch.testing.assert_close(output.loss.double(), exact, rtol=1e-5, atol=1e-6)
    if loss is rank_dpo:
        pair = diffusion_dpo(policy[:, :2], reference[:, :2], beta=100)
        assert pair.loss.dtype == wide


def test_analytic_gradient():
    """d loss / d winner error = beta/2 sigma(-z), and minus that for the loser."""
    policy, reference, beta = errors(3, 2).requires_grad_(), errors(3, 2, seed=1), 6.0
    output = diffusion_dpo(policy, reference, beta=beta)
    (gradient,) = torch.autograd.grad(output.loss.sum(), policy)
    z = -beta / 2 * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    expected = beta / 2 * torch.sigmoid(-z)
    torch.testing.assert_close(gradient, torch.stack([expected, -expected], -1))


@pytest.mark.parametrize("options", [{}, {"weighting": "gain"}, {"weighting": "none"}])
def test_gradients_agree_with_finite_differences(options):
    policy = errors(2, 4).requires_grad_()
    phi = PHI.expand(2, 4)
    assert torch.autograd.gradcheck(lambda p: rank_dpo(p, errors(2, 4, seed=1), phi, beta=3, **options).loss, policy)
    assert torch.autograd.gradcheck(lambda p: plackett_luce(p, errors(2, 4, seed=1), phi, beta=3).loss, policy)


def test_weights_carry_no_gradient():
    """With model ranks the weights depend on the scores, but a rank is a constant: every pair only takes and gives."""
    policy = errors(1, 4).requires_grad_()
    loss = rank_dpo(policy, ZERO, PHI, beta=2, rank_source="model").loss.sum()
    (gradient,) = torch.autograd.grad(loss, policy)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-12)  # every pair gives and takes the same


# --- the health panel -----------------------------------------------------------------------------------------------


def test_exact_zeros_count_half():
    """At LoRA initialisation every z is exactly zero."""
    assert rank_dpo(ZERO, ZERO, PHI, beta=1).metrics["implicit_accuracy"].item() == 0.5
    assert diffusion_dpo(ZERO[:, :2], ZERO[:, :2], beta=1).metrics["implicit_accuracy"].item() == 0.5


def test_accuracy_counts_pairs():
    """The model's order differs from phi's by one swap of neighbours: five of six pairs are right."""
    policy = torch.tensor([[0.1, 0.3, 0.2, 0.4]])
    assert rank_dpo(policy, torch.zeros(1, 4), PHI, beta=1).metrics["implicit_accuracy"].item() == pytest.approx(5 / 6)


def test_saturated_pairs():
    """beta/2 = 10: margins of 1 and 9 between (0, 0.1, 1.0); saturated beyond 4."""
    policy = torch.tensor([[0.0, 0.1, 1.0]], dtype=torch.float64)
    output = rank_dpo(policy, ZERO[:, :3], PHI[:, :3], beta=20)
    assert output.metrics["saturated"].item() == pytest.approx(2 / 3)
    assert output.metrics["margin"].item() == pytest.approx((1 + 10 + 9) / 3)


def test_metrics_are_detached_scalars():
    output = rank_dpo(errors(2, 4).requires_grad_(), errors(2, 4), PHI.expand(2, 4), beta=1)
    assert all(value.shape == () and not value.requires_grad for value in output.metrics.values())


# --- winner protection ----------------------------------------------------------------------------------------------


def test_loser_scale_by_hand():
    """g_w = (1, 0), g_l = (4, 3): (1 - 0.6) 1 / 4 = 0.1; an opposed loser and a weak one keep all."""
    residual = torch.tensor([[[1.0, 0.0], [4.0, 3.0], [-1.0, 0.5], [0.2, 9.0]]])
    scale = loser_scale(residual, mu=0.6)[0]
    assert scale[0].tolist() == pytest.approx([0.4, 0.1, 1.0, 1.0])
    assert scale.shape == (4, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loser_scale_under_autocast_is_that_of_float32(dtype):
    """The squared norm of a frame's residual is larger than float16 holds."""
    residual = torch.randn(2, 2, 16 * 60 * 104, generator=torch.Generator().manual_seed(3))
    assert (residual.square().sum(-1) > torch.finfo(torch.float16).max).all()
    residual[:, 1] += residual[:, 0]
    with torch.autocast("cpu", dtype=dtype):
        scale = loser_scale(residual, 0.5)
    assert torch.equal(scale, loser_scale(residual, 0.5))
    assert 0.4 < scale[0, 0, 1] < 0.6


def test_protection_leaves_forward_values_alone():
    policy, reference, residual = errors(2, 4), errors(2, 4, seed=1), errors(2, 4, 9, seed=2)
    plain = rank_dpo(policy, reference, PHI.expand(2, 4), beta=30)
    protected = rank_dpo(policy, reference, PHI.expand(2, 4), beta=30, protect=loser_scale(residual, 0.9))
    assert torch.equal(plain.loss, protected.loss)
    pair = diffusion_dpo(policy[:, :2], reference[:, :2], beta=30, protect=loser_scale(residual[:, :2], 0.9))
    assert torch.equal(pair.loss, diffusion_dpo(policy[:, :2], reference[:, :2], beta=30).loss)


@pytest.mark.parametrize(("mu", "rises"), [(None, True), (0.0, False), (0.6, False)])
def test_a_step_on_a_protected_pair_does_not_raise_the_winners_error(mu, rises):
    """A linear model whose pair shares its input, so that output and weight gradients are proportional.

    Winner nearly fitted, loser far off in the same direction: unprotected, pushing the loser away drags the winner.
    """
    rng = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 5, generator=rng, dtype=torch.float64)
    x = torch.randn(5, generator=rng, dtype=torch.float64)
    direction = torch.randn(6, generator=rng, dtype=torch.float64)
    targets = torch.stack([weight @ x - 0.1 * direction, weight @ x - 2 * direction])

    def errors_of(w: Tensor) -> tuple[Tensor, Tensor]:
        residual = ((w @ x) - targets).unsqueeze(0)
        return residual, residual.square().mean(-1)

    weight.requires_grad_()
    residual, policy = errors_of(weight)
    protect = {} if mu is None else {"protect": loser_scale(residual, mu)}
    reference = policy.detach()
    (winner,) = torch.autograd.grad(policy[0, 0], weight, retain_graph=True)
    (gradient,) = torch.autograd.grad(diffusion_dpo(policy, reference, beta=5, **protect).loss.sum(), weight)
    slope = -(gradient * winner).sum().item()  # of the winner's error along the step
    assert (slope > 1e-9) == rises
    step = 1e-6
    moved = errors_of((weight - step * gradient).detach())[1][0, 0].item() - policy[0, 0].item()
    assert moved == pytest.approx(step * slope, rel=1e-3, abs=1e-15)
    if mu == 0.6:
        own = 2.5 * 0.5 * winner.square().sum().item()  # beta/2 sigma(0) |g_w|^2, of which mu is left
        assert slope == pytest.approx(-0.6 * own, rel=1e-9)


def test_protection_scales_the_losers_gradient_pair_by_pair():
    """i's gradient as a winner is whole; as a loser it is the sum of lambda times each pair's."""
    policy = errors(1, 3).requires_grad_()
    residual, phi, beta = errors(1, 3, 7, seed=4) - 0.5, PHI[:, :3], 3.0
    scale = loser_scale(residual, 0.8)
    output = rank_dpo(policy, ZERO[:, :3], phi, beta=beta, protect=scale, weighting="none")
    (gradient,) = torch.autograd.grad(output.loss.sum(), policy)
    expected = torch.zeros(3, dtype=torch.float64)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        push = beta / 2 * torch.sigmoid(beta / 2 * (policy[0, i] - policy[0, j])).detach()
        expected[i] += push
        expected[j] -= scale[0, i, j] * push
    torch.testing.assert_close(gradient[0], expected)

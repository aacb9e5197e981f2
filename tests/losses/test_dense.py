"""The losses of labelled latent frames: values derived another way, symmetries, and where gradients must be zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alignkit.losses import DENSE, LOSSES, RANKED, dense_dpo, dense_sft, diffusion_dpo, loser_scale
from alignkit.losses.dense import counted

LOG2 = math.log(2)
LABELS = torch.tensor([[1, 1, 0, -1, 0], [0, -1, -1, 0, 1]])
SEGMENTS = torch.tensor([[0, 0, 1, 2, 2], [0, 1, 1, 2, 3]])
REDUCTIONS = ("frame", "segment", "sum")


def errors(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(count: int = 2) -> tuple[Tensor, Tensor]:
    return errors(count, 2, 5), errors(count, 2, 5, seed=1)


# --- values ---------------------------------------------------------------------------------------------------------


def test_check_vector_by_hand():
    """One pair of three frames, beta 10, labels 1, -1, 0; each z by hand.

    frame 0: delta (-0.2, 0.1), z = -5 (-0.3) = 1.5; frame 1: delta (0.1, 0.3), z = 5 (-0.2) = -1; frame 2: a tie.
    """
    policy = torch.tensor([[[0.3, 0.5, 0.7], [0.6, 0.8, 0.1]]], dtype=torch.float64)
    reference = torch.tensor([[[0.5, 0.4, 0.2], [0.5, 0.5, 0.9]]], dtype=torch.float64)
    labels, segments = torch.tensor([[1, -1, 0]]), torch.tensor([[0, 1, 1]])
    parts = [math.log1p(math.exp(-1.5)), math.log1p(math.exp(1.0))]
    frame = dense_dpo(policy, reference, labels, beta=10)
    assert frame.loss.tolist() == [[pytest.approx(parts[0]), pytest.approx(parts[1]), 0.0]]
    assert frame.total_weight() == 2
    found = {name: value.item() for name, value in frame.metrics.items()}
    # the winner is the first clip in frame 0 and the second in frame 1
    expected = {"implicit_accuracy": 0.5, "margin": 0.25, "saturated": 0.0}
    assert found == pytest.approx(expected | {"winner_error_delta": 0.05, "loser_error_delta": 0.1})
    whole = dense_dpo(policy, reference, labels, beta=10, reduction="sum")
    assert whole.loss.tolist() == [pytest.approx(math.log1p(math.exp(-0.5)))]
    assert whole.total_weight() == 1
    segment = dense_dpo(policy, reference, labels, beta=10, reduction="segment", segments_BT=segments)
    assert segment.loss.tolist() == [[pytest.approx(parts[0]), pytest.approx(parts[1])]]


def appendix_e(policy: Tensor, reference: Tensor, labels: Tensor, beta: float) -> float:
    """The paper's pseudo-code, frame by frame in plain Python: the mean over all frames that are no tie."""
    terms = []
    for pair in range(len(labels)):
        for frame in range(labels.shape[1]):
            label = int(labels[pair, frame])
            if label:
                gaps = [float(policy[pair, clip, frame] - reference[pair, clip, frame]) for clip in range(2)]
                terms.append(-math.log(1 / (1 + math.exp(0.5 * beta * label * (gaps[0] - gaps[1])))))
    return sum(terms) / len(terms)


def test_frames_are_the_papers_pseudo_code():
    policy, reference = both()
    output = dense_dpo(policy, reference, LABELS, beta=7)
    assert (output.loss.sum() / output.weight).item() == pytest.approx(appendix_e(policy, reference, LABELS, 7))


def test_the_sum_is_equation_7():
    """Products of probabilities of a Bradley-Terry model whose score adds the labelled frames."""
    policy, reference = both()
    loss = dense_dpo(policy, reference, LABELS, beta=7, reduction="sum").loss
    for pair in range(2):
        signed = LABELS[pair] * ((policy - reference)[pair, 0] - (policy - reference)[pair, 1])
        assert loss[pair].item() == pytest.approx(-math.log(torch.sigmoid(-3.5 * signed.sum()).item()))


def test_segments_average_their_labelled_frames():
    policy, reference = both()
    output = dense_dpo(policy, reference, LABELS, beta=7, reduction="segment", segments_BT=SEGMENTS)
    gap = (policy - reference)[:, 0] - (policy - reference)[:, 1]
    means = [[gap[0, :2].mean(), None, -gap[0, 3], None], [None, -gap[1, 1:3].mean(), None, gap[1, 4]]]
    expected = [[0.0 if m is None else math.log1p(math.exp(3.5 * m)) for m in row] for row in means]
    torch.testing.assert_close(output.loss, torch.tensor(expected, dtype=torch.float64))
    assert output.total_weight() == 4


@pytest.mark.parametrize("winner", [0, 1])
def test_one_label_for_the_clip_is_diffusion_dpo(winner):
    """Of the clips' own errors, which are the means over their frames; the winner may be either clip."""
    policy, reference = both()
    labels = torch.full((2, 5), 1 - 2 * winner)
    dense = dense_dpo(policy, reference, labels, beta=9, reduction="segment", segments_BT=torch.zeros(2, 5, dtype=int))
    order = [winner, 1 - winner]
    pair = diffusion_dpo(policy.mean(-1)[:, order], reference.mean(-1)[:, order], beta=9)
    torch.testing.assert_close(dense.loss.squeeze(1), pair.loss)
    for name, value in pair.metrics.items():
        torch.testing.assert_close(dense.metrics[name], value)


def test_a_frame_alone_is_diffusion_dpo():
    policy, reference = both()
    loss = dense_dpo(policy, reference, torch.ones(2, 5), beta=9).loss
    by_frame = [value.transpose(1, 2).flatten(0, 1) for value in (policy, reference)]
    torch.testing.assert_close(loss.flatten(), diffusion_dpo(*by_frame, beta=9).loss)


def test_winners_error():
    policy, reference = both()
    output = dense_sft(policy, reference, LABELS)
    rows = [[policy[0, 0, 0], policy[0, 0, 1], 0, policy[0, 1, 3], 0], [0, *policy[1, 1, 1:3], 0, policy[1, 0, 4]]]
    torch.testing.assert_close(output.loss, torch.tensor(rows, dtype=torch.float64))
    assert output.total_weight() == 6
    assert output.metrics["winner_error"].item() == pytest.approx(output.loss.sum().item() / 6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_at_the_reference_each_term_costs_log_2(reduction):
    error, _ = both()
    output = dense_dpo(error, error, LABELS, beta=500, reduction=reduction, segments_BT=SEGMENTS)
    mask = counted(LABELS, reduction, SEGMENTS)
    torch.testing.assert_close(output.loss, LOG2 * mask.double())
    assert output.total_weight() == mask.sum()
    assert output.metrics["implicit_accuracy"] == 0.5


# --- symmetry, ties, gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_order_of_the_clips_says_nothing(reduction):
    policy, reference = both()
    options = {"beta": 7, "reduction": reduction, "segments_BT": SEGMENTS}
    one = dense_dpo(policy, reference, LABELS, **options)
    other = dense_dpo(policy.flip(1), reference.flip(1), -LABELS, **options)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.metrics, other.metrics)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_frame_without_label_gets_exactly_no_gradient(reduction):
    """Neither from its own terms nor from those of its segment or clip; every other frame gets some."""
    policy, reference = both()
    policy.requires_grad_()
    dense_dpo(policy, reference, LABELS, beta=50, reduction=reduction, segments_BT=SEGMENTS).loss.sum().backward()
    assert torch.equal(policy.grad.ne(0), LABELS.ne(0).unsqueeze(1).expand(2, 2, 5))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ties_alone_cost_nothing_and_keep_a_graph(reduction):
    policy, reference = both()
    policy.requires_grad_()
    none = torch.zeros_like(LABELS)
    output = dense_dpo(policy, reference, none, beta=50, reduction=reduction, segments_BT=SEGMENTS)
    assert output.total_weight() == 0
    assert output.loss.sum().item() == 0
    output.loss.sum().backward()
    assert not policy.grad.any()
    assert all(value == 0 for value in output.metrics.values())


def test_dtypes():
    """Half precision is computed in float32, float64 stays."""
    policy, reference = both()
    assert dense_dpo(policy, reference, LABELS, beta=1).loss.dtype == torch.float64
    half = dense_dpo(policy.bfloat16(), reference.bfloat16(), LABELS, beta=1)
    wide = dense_dpo(policy.bfloat16().float(), reference.bfloat16().float(), LABELS, beta=1)
    assert half.loss.dtype == torch.float32
    assert torch.equal(half.loss, wide.loss)


# --- winner protection ----------------------------------------------------------------------------------------------


def residuals() -> tuple[Tensor, Tensor]:
    """Residuals [B, T, 2, D] of two clips that are alike in their first frames; a step moves both by one parameter."""
    base = torch.randn(2, 5, 1, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    other = torch.randn(2, 5, 2, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    residual = (base + 0.3 * other).requires_grad_()
    return residual, residual.square().mean(-1).transpose(1, 2)


@pytest.mark.parametrize("mu", [0.0, 0.6])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_protection_keeps_the_winner_of_each_frame(reduction, mu):
    """A small step of the outputs along the loss's gradient, one for both clips, raises no winner's error in its frame.

    The frame's winner gets -coefficient (|g_w|^2 - lambda <g_w, g_l>), which is at most -mu coefficient |g_w|^2.
    """
    residual, policy = residuals()
    _, reference = both()
    options = {"beta": 5, "reduction": reduction, "segments_BT": SEGMENTS, "protect": loser_scale(residual, mu)}
    plain = dense_dpo(policy, reference, LABELS, **options | {"protect": None})
    output = dense_dpo(policy, reference, LABELS, **options)
    torch.testing.assert_close(output.loss, plain.loss)
    changes = {}
    for name, one in (("plain", plain), ("protected", output)):
        (gradient,) = torch.autograd.grad(one.loss.sum(), residual, retain_graph=True)
        step = -gradient.sum(2)  # both clips are outputs of one network: its change is common to them
        winner = torch.where(LABELS.unsqueeze(-1) > 0, residual[:, :, 0], residual[:, :, 1]).detach()
        changes[name] = (step * winner).sum(-1)[LABELS != 0]
    assert (changes["plain"] > 1e-6).any()
    assert (changes["protected"] <= 1e-12).all()
    if mu:
        assert (changes["protected"] < 0).all()


# --- the table, and what is refused ---------------------------------------------------------------------------------


def test_the_table_tells_losses_of_frames_from_those_of_candidates():
    assert LOSSES.keys() > DENSE
    assert RANKED.keys() == LOSSES.keys() - DENSE


@pytest.mark.parametrize(
    ("options", "message"),
    [({"reduction": "mean"}, "reduction is 'mean'; use frame"), ({"reduction": "segment"}, "needs segments_BT")],
)
def test_what_cannot_be_reduced_is_named(options, message):
    policy, reference = both()
    with pytest.raises(ValueError, match=message):
        dense_dpo(policy, reference, LABELS, beta=1, **options)

"""win_rates against counts made by hand, and the properties the definition promises."""

from __future__ import annotations

import datasets
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.errors import ConfigError, DataError
from data_pipelines.ablations import ranked_by
from data_pipelines.ranking import agreement, concordance, difference_scale, margin, win_rates

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(2, 5))
INTEGERS = SHAPES.flatmap(lambda shape: hnp.arrays(np.float64, shape, elements=st.integers(-20, 20).map(float)))
DISTINCT = SHAPES.flatmap(lambda s: st.integers(0, 2**31).map(lambda seed: shuffled(s, seed)))


def shuffled(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Scores without ties within a prompt."""
    rng = np.random.default_rng(seed)
    return rng.permuted(np.broadcast_to(np.arange(shape[2], dtype=np.float64), shape), axis=-1)


def tensor(values: object) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def test_paper_form_by_hand() -> None:
    # Reward 1 orders a > b > c: wins 2, 1, 0. Reward 2 orders b > a > c: wins 1, 2, 0. Of 2 * (3 - 1) = 4 duels each.
    scores = tensor([[[9.0, 5.0, 1.0]], [[0.2, 0.3, 0.1]]])
    assert win_rates(scores).tolist() == [[3 / 4, 3 / 4, 0.0]]


def test_ties_count_for_neither() -> None:
    # Reward 1 ties a and b, both beat c: wins 1, 1, 0. Reward 2 is constant: no wins. Sum 2 of the 2 * 3 duels.
    scores = tensor([[[1.0, 1.0, 0.0]], [[5.0, 5.0, 5.0]]])
    assert win_rates(scores).tolist() == [[1 / 4, 1 / 4, 0.0]]


def test_soft_form_by_hand() -> None:
    # One reward, K = 2, differences +-2, so T = 2; at temperature 1/2 a duel counts sigmoid(2 / (2 / 2)) = sigmoid(2).
    phi = win_rates(tensor([[[2.0, 0.0]]]), temperature=0.5)
    won = 1 / (1 + np.exp(-2.0))
    assert phi[0].tolist() == pytest.approx([won, 1 - won], abs=1e-15)


def test_difference_scale_by_hand() -> None:
    # Ordered differences: prompt 1 +-1, prompt 2 +-7; mean of squares (1 + 1 + 49 + 49) / 4 = 25.
    assert difference_scale(tensor([[[0.0, 1.0], [7.0, 0.0]]])).tolist() == pytest.approx([5.0])


def test_constant_reward_is_half_everywhere_in_the_soft_form() -> None:
    assert win_rates(torch.ones(2, 3, 4), temperature=0.1).tolist() == [[0.5] * 4] * 3


@given(DISTINCT)
@settings(deadline=None)
def test_sum_is_half_of_k_without_ties(scores: np.ndarray) -> None:
    phi = win_rates(tensor(scores))
    assert torch.allclose(phi.sum(dim=1), tensor(scores.shape[2] / 2).expand(len(phi)))


@given(INTEGERS)
@settings(deadline=None)
def test_monotone_change_of_a_reward_changes_nothing(scores: np.ndarray) -> None:
    assert torch.equal(win_rates(tensor(scores)), win_rates(tensor(np.arctan(scores) * 3 + 1)))


@given(INTEGERS, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_permuting_candidates_permutes_phi(scores: np.ndarray, random: object) -> None:
    order = list(range(scores.shape[2]))
    random.shuffle(order)
    for temperature in (None, 0.7):
        phi = win_rates(tensor(scores), temperature=temperature)
        permuted = win_rates(tensor(scores[:, :, order]), temperature=temperature)
        assert torch.allclose(permuted, phi[:, order], atol=1e-12)


@given(DISTINCT)
@settings(deadline=None)
def test_soft_form_nears_the_paper_form(scores: np.ndarray) -> None:
    assert torch.allclose(win_rates(tensor(scores), temperature=1e-3), win_rates(tensor(scores)), atol=1e-12)


@given(INTEGERS)
@settings(deadline=None)
def test_soft_form_ignores_affine_change_and_sums_to_half_of_k(scores: np.ndarray) -> None:
    phi = win_rates(tensor(scores), temperature=0.5)
    assert torch.allclose(phi, win_rates(tensor(scores * 37 - 5), temperature=0.5), atol=1e-9)
    assert torch.allclose(phi.sum(dim=1), tensor(scores.shape[2] / 2).expand(len(phi)))


def test_dtype_is_kept_or_raised() -> None:
    assert win_rates(torch.rand(1, 1, 2, dtype=torch.float64)).dtype == torch.float64
    assert win_rates(torch.rand(1, 1, 2)).dtype == torch.float32
    assert win_rates(torch.rand(1, 1, 2).bfloat16()).dtype == torch.float32


def test_one_candidate_and_bad_temperature_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"K >= 2.*draw more"):
        win_rates(torch.rand(2, 3, 1))
    with pytest.raises(ConfigError, match="temperature must be positive"):
        win_rates(torch.rand(2, 3, 2), temperature=0.0)


def test_concordance_by_hand() -> None:
    # a > b > c against a > c > b: 2 of 3 pairs alike. Against a constant: every pair counts one half.
    scores = tensor([[[3.0, 2.0, 1.0]], [[3.0, 1.0, 2.0]], [[0.0, 0.0, 0.0]]])
    matrix = concordance(scores)[:, :, 0]
    assert matrix.tolist() == pytest.approx(np.array([[1, 2 / 3, 0.5], [2 / 3, 1, 0.5], [0.5, 0.5, 0.5]]))
    assert agreement(scores).tolist() == pytest.approx([(2 / 3 + 0.5 + 0.5) / 3])
    assert agreement(scores[:1]).tolist() == [1.0]
    assert concordance(torch.stack([scores[0], -scores[0]]))[0, 1].tolist() == [0.0]


def test_margin() -> None:
    assert margin(tensor([[0.2, 0.9, 0.5], [0.3, 0.3, 0.3]])).tolist() == pytest.approx([0.7, 0.0])


def test_rows_ranked_by_one_of_their_rewards() -> None:
    scores = [{"a": [1.0, 2.0, 3.0], "b": [3.0, 2.0, 1.0]}, {"a": [5.0, 4.0, 4.0], "b": [0.0, 0.0, 0.0]}]
    rows = datasets.Dataset.from_list([{"scores": own, "phi": [0.5, 0.5, 0.5]} for own in scores])
    assert ranked_by(rows, ["a"], None)["phi"][:] == [[0.0, 0.5, 1.0], [1.0, 0.0, 0.0]]
    assert ranked_by(rows, ["b"], None)["phi"][:] == [[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]]
    both = torch.tensor([[own[name] for own in scores] for name in ("a", "b")], dtype=torch.float64)
    assert ranked_by(rows, ["a", "b"], 1.0)["phi"][:] == win_rates(both, temperature=1.0).tolist()
    with pytest.raises(DataError, match="ranked_by names 'c', but the rows were scored by a, b"):
        ranked_by(rows, ["c"], None)

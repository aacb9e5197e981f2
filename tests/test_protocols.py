"""What a reward may return: one real number for each medium, in any plain form, or an error that names the reward."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from alignkit.errors import DataError
from alignkit.protocols import as_scores
from alignkit.records import Scores

FORMS = [
    Scores(torch.tensor([1.0, 2.0])),
    Scores([1, 2]),  # type: ignore[arg-type]
    torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    torch.tensor([1, 2]),
    np.array([1.0, 2.0], np.float32),
    np.array([1, 2]),
    [1, 2.0],
    (np.float32(1), np.int64(2)),
    [torch.tensor(1.0), torch.tensor(2)],
]


@pytest.mark.parametrize("value", FORMS, ids=lambda value: type(value).__name__)
def test_a_number_for_each_medium_is_taken(value: Any) -> None:
    scores = as_scores(value, "mine", 2)
    assert scores.total.is_floating_point()
    assert scores.total.tolist() == [1.0, 2.0]


def test_gradients_parts_and_what_is_not_finite_pass() -> None:
    total = torch.tensor([1.0, float("nan")], requires_grad=True)
    scores = as_scores(Scores(total, {"head": torch.tensor([True, False])}), "mine", 2)
    assert scores.total is total
    assert scores.parts["head"].tolist() == [1.0, 0.0]
    assert as_scores([1.0, float("nan")], "mine", 2).total.isnan().tolist() == [False, True]


REFUSED = [
    (torch.zeros(3), r"scores \[3\]"),
    (torch.zeros(2, 1), r"scores \[2, 1\]"),
    (torch.tensor(1.0), r"scores \[\]"),
    (np.zeros((1, 2)), r"scores \[1, 2\]"),
    ([0.5], r"scores \[1\]"),
    ([[1], [2]], r"scores \[2, 1\]"),
    ([[1], [2, 3]], r"\[\[1\], \[2, 3\]\]"),
    ([1.0, None], "None"),
    (["1", "2"], "'1'"),
    ([Fraction(1), Fraction(2)], "Fraction"),
    (np.array([1j, 2]), "1j|1\\.\\+|0\\.\\+1"),
    (torch.tensor([1j, 2]), "Tensor"),
    (0.5, "float: '0.5'"),
    (None, "NoneType"),
    ({"total": [1, 2]}, "dict"),
    ("12", "str: "),
]


@pytest.mark.parametrize(("value", "says"), REFUSED, ids=lambda value: str(value)[:20])
def test_anything_else_is_refused_by_the_name_of_the_reward(value: Any, says: str) -> None:
    with pytest.raises(DataError, match=rf"^reward 'mine' returned .*{says}.*expected Scores.* list of \[2\] numbers"):
        as_scores(value, "mine", 2)
    with pytest.raises(DataError, match=r"^reward 'mine/head' returned "):
        as_scores(Scores(torch.zeros(2), {"head": value}), "mine", 2)

"""Labels of pairs: every convention gives phi of the first image, and what fits none is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from alignkit.errors import DataError
from data_pipelines.labels import first_is_better


@pytest.mark.parametrize(
    ("labels", "phi", "convention"),
    [
        ([1.0, 0.0, 0.5], [1.0, 0.0, 0.5], "1: the first"),
        (["1", "0", " 0.5 "], [1.0, 0.0, 0.5], "1: the first"),
        ([True, False], [1.0, 0.0], "1: the first"),
        (["true", "False"], [1.0, 0.0], "1: the first"),
        ([0.9, 0.1, 0.5], [0.9, 0.1, 0.5], "the probability"),
        ([1, -1, 0], [1.0, 0.0, 0.5], "-1: the second"),
        (["+1", "-1"], [1.0, 0.0], "-1: the second"),
        ([1, 2, 2], [1.0, 0.0, 0.0], "the number of the better image"),
        ([2, 2], [0.0, 0.0], "the number of the better image"),
        ([1, None, float("nan"), ""], [1.0, None, None, None], "1: the first"),
    ],
)
def test_conventions(labels: list[Any], phi: list[float | None], convention: str) -> None:
    found, name = first_is_better(labels, None, "'p'")
    assert found == phi
    assert convention in name


@pytest.mark.parametrize(
    ("labels", "others", "message"),
    [
        ([0, 1, 2], None, "'p': label_0 holds 0, 1, 2, which is no known convention; use 1 and 0"),
        ([90, 10], None, "label_0 holds 10, 90"),
        ([-1, 0.5], None, "label_0 holds -1, 0.5"),
        (["left"], None, "row 0, label_0: 'left' is no label"),
        ([1, [1]], None, "row 1, label_0: .* is no label"),
        ([float("inf")], None, "row 0, label_0: inf is no label"),
        ([1, 1], [0, 1], "row 1: label_0 is 1.0 and label_1 is 1.0, which disagree"),
        ([1, -1], [-1, -1], r"row 1: .*disagree \(their sum must be 0\)"),
        ([2, 1], [1, 1], r"row 1: .*disagree \(their sum must be 3\)"),
        ([0.9], [0.2], "row 0: .*disagree"),
        ([None], [1], "row 0: label_0 is None and label_1 is 1.0"),
    ],
)
def test_refusals(labels: list[Any], others: list[Any] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        first_is_better(labels, others, "'p'")


def test_a_second_column_that_agrees() -> None:
    """Rounded probabilities add up to one nearly."""
    assert first_is_better([0.9, 0.3333], [0.1, 0.667], "'p'")[0] == [0.9, 0.3333]
    assert first_is_better([1, 0, 0.5], [0, 1, 0.5], "'p'")[0] == [1.0, 0.0, 0.5]
    assert first_is_better([2, 1], [1, 2], "'p'")[0] == [0.0, 1.0]

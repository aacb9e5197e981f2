"""Labels of pairs in any of the usual conventions -> phi of the first image, decided over the whole column.

    0, 1 (and 0.5)       1: the first is better, 0.5: a tie        also true and false, and numbers as text
    within 0 and 1       the probability that the first is better (soft labels, kept as they are)
    -1, 1 (and 0)        1: the first is better, 0: a tie
    1, 2                 the number of the better image

Not here: dropping rows that tie or have no label (importers.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from alignkit.errors import DataError

TOLERANCE = 1e-3  # labels of a pair are often stored as float16 or rounded
KNOWN = "use 1 and 0 (the first is better, or the second), a probability, 1 and -1, or 1 and 2 (which is better)"
TRUTH = {"true": 1.0, "false": 0.0}

Phi = float | None


def first_is_better(labels: Sequence[Any], others: Sequence[Any] | None, where: str) -> tuple[list[Phi], str]:
    """phi in [0, 1] of the first image of every row (0.5 is a tie, None no label), and the convention by name.

    `labels` is the column label_0 and `others` label_1, where there is one: the two must agree.
    Raises DataError naming `where` and the row of a label that is no number, fits no convention, or is contradicted.
    """
    values = [_number(label, f"{where}, row {row}, label_0") for row, label in enumerate(labels)]
    seen = {value for value in values if value is not None}
    name, to_phi, total = _convention(seen, where)
    phi = [None if value is None else to_phi(value) for value in values]
    for row, other in enumerate(others or ()):
        _check_agreement(values[row], _number(other, f"{where}, row {row}, label_1"), total, f"{where}, row {row}")
    return phi, name


def _number(label: Any, where: str) -> Phi:
    """A label as a number; None for a missing one (None, NaN or empty text)."""
    if isinstance(label, str):
        text = label.strip().lower()
        if not text:
            return None
        try:
            label = TRUTH[text] if text in TRUTH else float(text)
        except ValueError as error:
            raise DataError(f"{where}: {label!r} is no label; {KNOWN}") from error
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return None
    if not isinstance(label, int | float) or not abs(label) < 2**31:
        raise DataError(f"{where}: {label!r} is no label; {KNOWN}")
    return float(label)


def _convention(seen: set[float], where: str) -> tuple[str, Callable[[float], float], float]:
    """Its name, the way to phi, and what label_0 and label_1 of a row add up to."""
    if seen <= {0.0, 0.5, 1.0}:
        return "1: the first is better, 0: the second", lambda value: value, 1.0
    if all(0 <= value <= 1 for value in seen):
        return "the probability that the first is better", lambda value: value, 1.0
    if seen <= {-1.0, 0.0, 1.0}:
        return "1: the first is better, -1: the second", lambda value: (value + 1) / 2, 0.0
    if seen <= {1.0, 2.0}:
        return "the number of the better image, 1 or 2", lambda value: 2 - value, 3.0
    shown = ", ".join(f"{value:g}" for value in sorted(seen)[:8])
    raise DataError(f"{where}: label_0 holds {shown}, which is no known convention; {KNOWN}")


def _check_agreement(first: Phi, second: Phi, total: float, where: str) -> None:
    if (first is None) != (second is None) or (
        first is not None and second is not None and not math.isclose(first + second, total, abs_tol=TOLERANCE)
    ):
        raise DataError(
            f"{where}: label_0 is {first} and label_1 is {second}, which disagree (their sum must be {total:g}); "
            "correct or remove the row, or remove the column label_1"
        )

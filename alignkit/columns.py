"""Columns of a `datasets.Dataset` as Arrow, in the rows' order, without a Python object for each row.

Not `rows[name][:]`: of rows that were selected or shuffled `datasets` gathers the values one slice a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

Made = TypeVar("Made")


def column(rows: Dataset, name: str) -> pa.ChunkedArray:
    """The values of column `name`, one for each of `rows`. A copy where rows were selected: not for media."""
    values, order = rows.data.column(name), rows._indices  # noqa: SLF001 - `datasets` has no other name for it
    return values if order is None else values.take(order.column(0))


def stored_places(rows: Dataset) -> np.ndarray:
    """Where each of `rows` stands in `rows.data`, int64 [N]."""
    order = rows._indices  # noqa: SLF001
    return np.arange(len(rows)) if order is None else order.column(0).to_numpy().astype(np.int64)


def once_each(values: Sequence[str], make: Callable[[str], Made]) -> Iterable[Made]:
    """`make` of each value, in their order, called once for equal ones."""
    made = {value: make(value) for value in dict.fromkeys(values)}
    return map(made.__getitem__, values)

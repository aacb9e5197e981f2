"""Weighted means: the loss over its terms, metrics over batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


def mean_over(loss: Tensor, weight: Tensor | float) -> Tensor:
    """Sum of an unreduced `loss` divided by `weight`, at least float32; weight 0 gives 0 with a graph."""
    loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
    total = torch.as_tensor(weight, dtype=loss.dtype, device=loss.device)
    return loss.sum() / torch.where(total > 0, total, torch.ones_like(total))


class WeightedMeans:
    """Means of named values over batches and ranks; each batch counts with its weight.

    A value [B] holds one number for each row, and NaN where a row has none: each number counts with its share of the
    weight, and without any number the name is left out. All ranks must add the same names. Without any weight the mean
    of a scalar is 0.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, Tensor | float] = {}  # of a name that has none yet: 0.0
        self._by_row: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Count detached values of one batch; those of a batch without weight may be anything, NaN included."""
        for name, value in values.items():
            number, share = value.detach().float(), torch.tensor(float(weight))
            if value.dim():
                self._by_row.add(name)
                share = weight * number.isfinite().float().mean()
            if value.dim() or not weight:
                number = number.nan_to_num(0.0, 0.0, 0.0)
            self._sums[name] = self._sums.get(name, 0.0) + number.mean() * weight
            self._weights[name] = self._weights.get(name, 0.0) + share

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all ranks; then all sums are reset."""
        sums = torch.stack([torch.as_tensor(term) for term in self._sums.values()])
        weights = torch.stack([torch.as_tensor(weight, device=sums.device) for weight in self._weights.values()])
        sums, weights = accelerator.reduce(torch.stack([sums, weights]), "sum")
        means = sums / torch.where(weights > 0, weights, torch.ones_like(weights))
        named = dict(zip(self._sums, zip(means.tolist(), weights.tolist(), strict=True), strict=True))
        self._sums.clear()
        self._weights.clear()
        return {name: mean for name, (mean, weight) in named.items() if weight > 0 or name not in self._by_row}

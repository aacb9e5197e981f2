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

    All ranks must add the same names. Without any weight a mean is 0.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Count detached scalars of one batch; those of a batch without weight may be anything, NaN included."""
        for name, value in values.items():
            term = value.detach().float() * weight if weight else torch.zeros_like(value, dtype=torch.float32)
            self._sums[name] = self._sums[name] + term if name in self._sums else term
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all ranks; then all sums are reset."""
        sums = torch.stack(list(self._sums.values()))
        weights = torch.tensor(list(self._weights.values()), device=sums.device)
        sums, weights = accelerator.reduce(torch.stack([sums, weights]), "sum")
        means = sums / torch.where(weights > 0, weights, torch.ones_like(weights))
        named = dict(zip(self._sums, means.tolist(), strict=True))
        self._sums.clear()
        self._weights.clear()
        return named

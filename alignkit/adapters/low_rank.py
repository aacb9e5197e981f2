"""Products of two factors, up [out, r, ...] and down [r, in, ...], of linear layers and convolutions (up is 1 x 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Lost:
    """Squared Frobenius norms of what a factorisation left out and of the whole."""

    rest: float = 0.0
    whole: float = 0.0

    def __add__(self, other: Lost) -> Lost:
        return Lost(self.rest + other.rest, self.whole + other.whole)

    @property
    def share(self) -> float:
        """The relative error in [0, 1], in the Frobenius norm over all layers that were added up."""
        return math.sqrt(self.rest / self.whole) if self.whole else 0.0


def product(down: Tensor, up: Tensor) -> Tensor:
    """The change [out, in, ...] that the factors stand for, float64."""
    return torch.einsum("or,r...->o...", up.double().flatten(1), down.double())


def truncated(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, Lost]:
    """The best factors (Eckart & Young 1936) of at most `rank` for the product of `down` and `up`, float64.

    Costs O((out + in) r^2): the SVD is that of an r x r matrix between two QR decompositions.
    """
    left, upper = torch.linalg.qr(up.double().flatten(1))
    right, lower = torch.linalg.qr(down.double().flatten(1).T)
    small, values, across = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return _factors(left @ small, values, across @ right.T, rank, (down.shape[1:], up.shape[2:]))


def factorised(change: Tensor, rank: int) -> tuple[Tensor, Tensor, Lost]:
    """The best factors of at most `rank` for a change [out, in, ...], float64; a dense SVD."""
    left, values, right = torch.linalg.svd(change.double().flatten(1), full_matrices=False)
    return _factors(left, values, right, rank, (change.shape[1:], [1] * (change.dim() - 2)))


def _factors(
    left: Tensor, values: Tensor, right: Tensor, rank: int, ends: tuple[Sequence[int], Sequence[int]]
) -> tuple[Tensor, Tensor, Lost]:
    """Factors of the largest `rank` singular values, whose roots go to both; `ends`: the last axes of down and up."""
    roots = values[:rank].sqrt()
    down = (roots[:, None] * right[:rank]).reshape(len(roots), *ends[0])
    up = (left[:, :rank] * roots).reshape(len(left), len(roots), *ends[1])
    return down, up, Lost(float(values[rank:].square().sum()), float(values.square().sum()))

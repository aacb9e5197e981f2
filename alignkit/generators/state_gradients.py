"""Norms of the state's gradient after each step of a chain, and a cap on them: a hook for `rollout`.

The gradient of a long chain has heavy tails: in one batch a single row can outweigh all others by orders of magnitude,
and clipping the norm of the whole gradient then leaves this row alone. The cap acts on each row and step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


class StateGradients:
    """Records, and caps, g_i = d loss / d x_i [B, C, ...] for the states x_1 ... x_N of one chain of N steps.

    Pass it as `on_step` of `rollout`. `norms` fills in the backward pass: by the step's index, the norms [B] of its
    rows before the cap, at least float32. With `cap` c each row of g_i, i < N, is scaled down to c times the norm of
    the same row of g_N, where it is larger; None: no cap. A row that has no gradient at x_N gets none earlier.
    """

    def __init__(self, count: int, cap: float | None = None) -> None:
        self.norms: dict[int, Tensor] = {}
        self._last, self._cap = count - 1, cap

    def __call__(self, index: int, x: Tensor, _: Tensor) -> None:
        """Registers the hook on the state after step `index`, if that has a gradient."""
        if x.requires_grad:
            x.register_hook(functools.partial(self._on_gradient, index))

    def _on_gradient(self, index: int, gradient: Tensor) -> Tensor | None:
        norm_B = torch.linalg.vector_norm(
            gradient.flatten(1).to(torch.promote_types(gradient.dtype, torch.float32)), dim=1
        )
        self.norms[index] = norm_B
        if self._cap is None or index == self._last:
            return None
        tiny = torch.finfo(norm_B.dtype).tiny
        factor_B = (self._cap * self.norms[self._last] / norm_B.clamp(min=tiny)).clamp(max=1)
        return gradient * factor_B.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1))

    def growth(self) -> dict[int, float]:
        """By the step's index, the largest norm of a row over the largest one at x_N.

        NaN or infinite where a gradient is; 0 where no row has a gradient at x_N.
        """
        steps = sorted(self.norms)
        if self._last not in self.norms:
            return {}
        largest_S = torch.stack([self.norms[step].amax() for step in steps])
        end = self.norms[self._last].amax()
        ratio_S = torch.where((end == 0) & largest_S.isfinite(), torch.zeros_like(largest_S), largest_S / end)
        return dict(zip(steps, ratio_S.tolist(), strict=True))


class LargestGradients:
    """Several chains of one batch, which differ in the steps that carry gradients, as one: the larger norm counts."""

    def __init__(self, chains: Sequence[StateGradients]) -> None:
        self._chains = list(chains)

    @property
    def norms(self) -> dict[int, Tensor]:
        """By the step's index, the largest norms [B]."""
        largest: dict[int, Tensor] = {}
        for index, norm_B in (pair for chain in self._chains for pair in chain.norms.items()):
            largest[index] = torch.maximum(largest[index], norm_B) if index in largest else norm_B
        return largest

    def growth(self) -> dict[int, float]:
        """By the step's index, the largest `StateGradients.growth`; NaN where one is."""
        largest: dict[int, float] = {}
        for index, ratio in (pair for chain in self._chains for pair in chain.growth().items()):
            known = largest.get(index, ratio)
            largest[index] = known if known != known or ratio <= known else ratio  # noqa: PLR0124 - NaN
        return largest

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

    A penalty on the predictions of steps adds gradients that do not come from x_N. To the norm of g_N, cap and growth
    then add those of the penalty's gradients at the predictions of the later steps (`note_penalty`).
    """

    def __init__(self, count: int, cap: float | None = None) -> None:
        self.norms: dict[int, Tensor] = {}
        self._penalties: dict[int, Tensor] = {}
        self._last, self._cap = count - 1, cap

    def __call__(self, index: int, x: Tensor, _: Tensor) -> None:
        """Registers the hook on the state after step `index`, if that has a gradient."""
        if x.requires_grad:
            x.register_hook(functools.partial(self._on_gradient, index))

    def note_penalty(self, index: int, gradient: Tensor) -> None:
        """Called in the backward pass with a penalty's own gradient at the prediction [B, C, ...] of step `index`."""
        self._penalties[index] = _row_norms(gradient)

    def _scale(self, index: int) -> Tensor:
        """The norms [B] that those after step `index` are compared with."""
        scale_B = self.norms[self._last]
        for step, norm_B in self._penalties.items():
            if step > index:
                scale_B = scale_B + norm_B
        return scale_B

    def _on_gradient(self, index: int, gradient: Tensor) -> Tensor | None:
        norm_B = _row_norms(gradient)
        self.norms[index] = norm_B
        if self._cap is None or index == self._last:
            return None
        tiny = torch.finfo(norm_B.dtype).tiny
        factor_B = (self._cap * self._scale(index) / norm_B.clamp(min=tiny)).clamp(max=1)
        return gradient * factor_B.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1))

    def growth(self) -> dict[int, float]:
        """By the step's index, the largest norm of a row over the largest one at x_N (with penalties, see the class).

        NaN or infinite where a gradient is; 0 where no row has a gradient at x_N.
        """
        steps = sorted(self.norms)
        if self._last not in self.norms:
            return {}
        largest_S = torch.stack([self.norms[step].amax() for step in steps])
        scale_S = torch.stack([self._scale(step).amax() for step in steps])
        ratio_S = torch.where((scale_S == 0) & largest_S.isfinite(), torch.zeros_like(largest_S), largest_S / scale_S)
        return dict(zip(steps, ratio_S.tolist(), strict=True))


def _row_norms(gradient: Tensor) -> Tensor:
    """The norm of each row [B], at least float32."""
    wide = gradient.flatten(1).to(torch.promote_types(gradient.dtype, torch.float32))
    return torch.linalg.vector_norm(wide, dim=1)


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

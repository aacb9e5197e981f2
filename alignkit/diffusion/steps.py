"""Which steps of a denoising chain carry gradients, and how much of them crosses a step.

With x_(i+1) = S_i(x_i, p_i), p_i = f(u_i) the prediction and u_i the network's input, the gradient g_i of the state is

    g_i = (dS_i/dx)^T g_(i+1) + c_i (df/du)^T (dS_i/dp)^T g_(i+1)

c_i is `coupling` for an active step and 0 for any other. coupling = 1 is the exact gradient; coupling = 0 stops the
gradient at the network's input (DRTune, Wu et al. 2024, arXiv 2405.00760). Steps that are not active add nothing to
the gradient of weights and conditioning: the first term alone passes them, with their prediction as a constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignkit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """The steps that carry gradients.

    active: their indices on the grid, None for all. coupling: factor in [0, 1] of the gradient at the network's input.
    unconditional: whether the unconditional call of classifier-free guidance carries gradients too.
    Raises ConfigError for a coupling out of range.
    """

    active: frozenset[int] | None = None
    coupling: float = 1.0
    unconditional: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.coupling <= 1:
            raise ConfigError(f"coupling is {self.coupling}; it must be in [0, 1]")

    @classmethod
    def of(cls, steps: Steps | Iterable[int] | None, count: int) -> Steps:
        """`steps` as a record for a grid of `count` steps. Raises ConfigError for an index that is not on the grid."""
        if not isinstance(steps, Steps):
            steps = cls(None if steps is None else frozenset(steps))
        outside = sorted((steps.active or frozenset()) - set(range(count)))
        if outside:
            raise ConfigError(f"steps {outside} are not on the grid, which has steps 0 to {count - 1}")
        return steps

    def carries(self, index: int) -> bool:
        """Whether step `index` carries gradients."""
        return self.active is None or index in self.active

    def network_input(self, x: Tensor) -> Tensor:
        """x itself in value, with `coupling` times its gradient."""
        if self.coupling == 1:
            return x
        if self.coupling == 0:
            return x.detach()
        return x.detach() + self.coupling * (x - x.detach())

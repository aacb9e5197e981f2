"""One deterministic solver for chains: DDIM, which is Euler's method on the probability-flow ODE.

    x_s = alpha_s x0_hat + sigma_s eps_hat          (Song et al. 2021, eq. 12 with eta = 0)

For rectified flow this is Euler's step x + (s - t) u. For the k-diffusion form x / sqrt(1 + sigma^2) it is Euler's step
in sigma. A `Grid` says where the steps lie; `alignkit.generators.grids` reads it from a scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignkit.diffusion.conversions import split
from alignkit.errors import ConfigError

TOLERANCE = 1e-6  # of a sigma: grids are float32


@dataclass(frozen=True)
class Grid:
    """N steps, each field [N]: canonical times t of the network's calls and t_next after them, alpha, sigma at both."""

    t: Tensor
    t_next: Tensor
    alpha: Tensor
    sigma: Tensor
    alpha_next: Tensor
    sigma_next: Tensor
    start: float = 1.0  # factor of unit noise that gives the state before step 0

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, steps: slice) -> Grid:
        """The grid of those steps alone. `start` is 1 unless the first step stays."""
        first = range(len(self))[steps][:1]
        start = self.start if first == range(1) else 1.0
        return self._map(lambda values: values[steps], start)

    def from_sigma(self, eta: float) -> Grid:
        """The tail of the grid that begins at the first step with sigma <= `eta`.

        The state to start from is alpha[0] x0 + sigma[0] eps of the returned grid; its sigma[0] equals `eta` only if
        `eta` is on the grid. Raises ConfigError if all steps lie above `eta`.
        """
        below = (self.sigma <= eta + TOLERANCE).nonzero().flatten()
        if not len(below):
            raise ConfigError(
                f"no step starts at sigma {eta} or below; the last of {len(self)} steps starts at "
                f"{float(self.sigma[-1]):.3g}. Use more steps or a larger sigma"
            )
        return self[int(below[0]) :]

    def starting_at(self, sigma: float) -> Grid:
        """The tail of the grid that begins at `sigma` itself, where times are continuous (rectified flow).

        The step that passes `sigma` is begun there. Where `sigma` lies above the grid it is the whole grid. Times of
        variance-preserving models are discrete: for them it is `from_sigma(sigma)`, whose sigma[0] may be smaller.
        """
        if not torch.equal(self.t, self.sigma):
            return self.from_sigma(sigma)
        above = int((self.sigma >= sigma - TOLERANCE).sum())  # steps that begin at `sigma` or above
        if above == 0:
            return self
        tail = self[above - 1 :]
        if abs(float(tail.sigma[0]) - sigma) <= TOLERANCE:
            return tail
        now = tail.t.new_tensor([sigma])
        t, alpha, sigmas = (
            torch.cat([v, old[1:]]) for v, old in ((now, tail.t), (1 - now, tail.alpha), (now, tail.sigma))
        )
        return replace(tail, t=t, alpha=alpha, sigma=sigmas, start=1.0)

    def ending_at(self, index: int) -> Grid:
        """The steps 0 to `index`, the last of which goes straight to where the whole grid ends.

        For all kinds of predictions that step gives the clean latents that the network predicts at step `index`.
        """
        short, last = self[: index + 1], self[-1:]
        return replace(
            short,
            t_next=torch.cat([short.t_next[:-1], last.t_next]),
            alpha_next=torch.cat([short.alpha_next[:-1], last.alpha_next]),
            sigma_next=torch.cat([short.sigma_next[:-1], last.sigma_next]),
        )

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Grid:
        """The same grid in another dtype, and on `device` if that is not None."""
        return self._map(lambda values: values.to(device=device, dtype=dtype), self.start)

    def times(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(t, t_next) of one step for every row of `like` [B, ...], each [B]."""
        now, then = (values[index].to(like).expand(len(like)) for values in (self.t, self.t_next))
        return now, then

    def step(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(alpha, sigma, alpha_next, sigma_next) of one step, scalars."""
        return self.alpha[index], self.sigma[index], self.alpha_next[index], self.sigma_next[index]

    def _map(self, change: Callable[[Tensor], Tensor], start: float) -> Grid:
        t, t_next, alpha, sigma = change(self.t), change(self.t_next), change(self.alpha), change(self.sigma)
        return Grid(t, t_next, alpha, sigma, change(self.alpha_next), change(self.sigma_next), start)


def ddim_step(kind: str, prediction: Tensor, x_t: Tensor, grid: Grid, index: int) -> Tensor:
    """x after step `index` from a native prediction of this `kind` (one of conversions.TARGETS)."""
    alpha, sigma, alpha_next, sigma_next = grid.step(index)
    x0, eps = split(kind, prediction, x_t, alpha, sigma)
    return alpha_next * x0 + sigma_next * eps

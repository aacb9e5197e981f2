"""The solver of chains: DDIM, which is Euler's method on the probability-flow ODE, and its forms with fresh noise.

    x_s = alpha_s x0_hat + sigma_s eps_hat          (Song et al. 2021, arXiv 2010.02502, eq. 12 with eta = 0)

For rectified flow this is Euler's step x + (s - t) u. For the k-diffusion form x / sqrt(1 + sigma^2) it is Euler's step
in sigma. A `Grid` says where the steps lie; `alignkit.generators.grids` reads it from a scheduler. `FreshNoise` is the
same step with a part of eps_hat replaced by new noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignkit.diffusion.conversions import split
from alignkit.errors import ConfigError, require_at_least

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


@dataclass(frozen=True)
class FreshNoise:
    """Steps x_s = alpha_s x0_hat + b eps_hat + c z with new unit noise z, from time t to s, d = sigma_t - sigma_s > 0.

    eta: DDIM's (Song et al. 2021, eq. 16), c = eta sigma_(t|s) sigma_s / sigma_t with sigma_(t|s)^2 = sigma_t^2 -
        (alpha_t / alpha_s)^2 sigma_s^2, and b^2 = sigma_s^2 - c^2. The equation's 1 - alpha_t^2 / alpha_s^2 is
        sigma_(t|s)^2 where alpha^2 + sigma^2 = 1; this form holds for any alpha and sigma, flows included. b^2 + c^2 =
        sigma_s^2: if eps_hat is unit noise and x0_hat is exact, x_s has the marginal of time s for any step size.
        1 is the ancestral step of DDPM.
    flow_sde: a of Flow-GRPO (arXiv 2505.05470): the Euler-Maruyama step of dx = [v + w^2 / (2 t) (x + (1 - t) v)] dt +
        w dW with w = a sqrt(t / (1 - t)), for networks that predict the flow v = eps - x0. In the solver's terms x +
        (1 - t) v = eps_hat, so b = s - w^2 d / (2 t) and c = w sqrt(d). The SDE has the marginals of the flow because
        its extra drift is w^2 / 2 times minus the score, -eps / t. One step keeps them to first order: b^2 + c^2 = s^2
        + a^2 d^2 / (1 - t) + a^4 d^2 / (4 (1 - t)^2). Where t = 1, 1 - s stands for 1 - t, as in the authors' code:
        that step's excess of variance does not vanish with d. What is left of it at a later time falls as d^(a^2).

    A step to sigma_s = 0 goes to x0_hat without noise in both forms; Flow-GRPO's own last step adds noise. The
    coefficients are constants, so z need not be kept for the backward pass. Raises ConfigError for a value below 0, an
    eta above 1, or both above 0.
    """

    eta: float = 0.0
    flow_sde: float = 0.0

    def __post_init__(self) -> None:
        require_at_least(0, {"eta": self.eta, "flow_sde": self.flow_sde})
        if self.eta > 1:
            raise ConfigError(f"eta is {self.eta}; it must lie in [0, 1]: 0 adds no noise, 1 is the ancestral step")
        if self.eta and self.flow_sde:
            raise ConfigError("eta and flow_sde are two forms of a step with fresh noise; set one of them")

    def __bool__(self) -> bool:
        return bool(self.eta or self.flow_sde)

    def coefficients(self, grid: Grid, index: int) -> tuple[Tensor, Tensor]:
        """(b, c) of step `index`, scalars."""
        alpha, sigma, alpha_next, sigma_next = grid.step(index)
        if not self or sigma_next == 0:
            return sigma_next, torch.zeros_like(sigma_next)
        if self.eta:
            between = (sigma**2 - (alpha / alpha_next * sigma_next) ** 2).clamp(min=0).sqrt()
            fresh = self.eta * between * sigma_next / sigma
            return (sigma_next**2 - fresh**2).clamp(min=0).sqrt(), fresh
        left = 1 - (sigma_next if sigma >= 1 - TOLERANCE else sigma)
        length = sigma - sigma_next
        return sigma_next - self.flow_sde**2 * length / (2 * left), self.flow_sde * (sigma / left * length).sqrt()

    def step(self, kind: str, prediction: Tensor, x_t: Tensor, grid: Grid, index: int, noise: Tensor) -> Tensor:
        """x after step `index` from a native prediction of this `kind` and unit `noise` of the shape of x."""
        alpha, sigma, alpha_next, _ = grid.step(index)
        x0, eps = split(kind, prediction, x_t, alpha, sigma)
        kept, fresh = self.coefficients(grid, index)
        return alpha_next * x0 + kept * eps + fresh * noise


NO_NOISE = FreshNoise()

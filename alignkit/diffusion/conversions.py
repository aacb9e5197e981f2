"""What denoisers predict, and conversions between it: eps, v, x0 and the flow velocity u.

Every target is one line p = a x0 + b eps, and x_t = alpha x0 + sigma eps. Two equations, two unknowns: `split` solves
them for (x0, eps) with the determinant b alpha - a sigma. With alpha = 1 - t and sigma = t (rectified flow),
u = eps - x0; v = alpha eps - sigma x0 is of Salimans & Ho 2022. All arguments broadcast; alpha and sigma come
expanded. The determinant of "epsilon" is alpha (ill-conditioned near t = 1), that of "sample" is -sigma (near t = 0).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Coefficient = Tensor | float

# (a, b) of p = a x0 + b eps, as functions of (alpha, sigma).
_COEFFICIENTS: dict[str, Callable[[Tensor, Tensor], tuple[Coefficient, Coefficient]]] = {
    "epsilon": lambda _alpha, _sigma: (0.0, 1.0),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
    "flow": lambda _alpha, _sigma: (-1.0, 1.0),
    "sample": lambda _alpha, _sigma: (1.0, 0.0),
}
TARGETS = tuple(_COEFFICIENTS)


def coefficients(kind: str, alpha: Tensor, sigma: Tensor) -> tuple[Coefficient, Coefficient]:
    """(a, b) of p = a x0 + b eps for a target of this `kind` (one of TARGETS). Raises ValueError for another kind."""
    if kind not in _COEFFICIENTS:
        raise ValueError(f"unknown prediction type '{kind}'; known: {', '.join(TARGETS)}")
    return _COEFFICIENTS[kind](alpha, sigma)


def add_noise(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma eps."""
    return alpha * x0 + sigma * eps


def target_of(kind: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The native target a x0 + b eps of a model of this `kind`."""
    a, b = coefficients(kind, alpha, sigma)
    return a * x0 + b * eps


def split(kind: str, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The clean latent x0 and the noise eps that a native prediction implies."""
    a, b = coefficients(kind, alpha, sigma)
    determinant = b * alpha - a * sigma
    return (b * x_t - sigma * prediction) / determinant, (alpha * prediction - a * x_t) / determinant


def convert(source: str, wanted: str, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """A prediction of kind `source` restated as kind `wanted`."""
    if source == wanted:
        return prediction
    return target_of(wanted, *split(source, prediction, x_t, alpha, sigma), alpha, sigma)

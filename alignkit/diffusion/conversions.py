"""Named conversions between what denoisers predict: eps, v, x0 and the flow velocity u.

With x_t = alpha x0 + sigma eps:   v = alpha eps - sigma x0 (Salimans & Ho 2022),   u = eps - x0 (rectified flow,
alpha = 1 - t, sigma = t). All arguments broadcast; alpha and sigma come expanded. Divisions by alpha are
ill-conditioned near t = 1 and by sigma near t = 0: the caller chooses t.
"""

from __future__ import annotations

from torch import Tensor

TARGETS = ("epsilon", "v_prediction", "flow", "sample")


def add_noise(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma eps."""
    return alpha * x0 + sigma * eps


def target_of(kind: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The native target of a model of this `kind` (one of TARGETS)."""
    if kind == "epsilon":
        return eps
    if kind == "v_prediction":
        return alpha * eps - sigma * x0
    if kind == "flow":
        return eps - x0
    if kind == "sample":
        return x0
    raise ValueError(f"unknown prediction type '{kind}'; known: {', '.join(TARGETS)}")


def x0_from(kind: str, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean latent that a native prediction implies."""
    if kind == "epsilon":
        return (x_t - sigma * prediction) / alpha
    if kind == "v_prediction":
        return (alpha * x_t - sigma * prediction) / (alpha**2 + sigma**2)
    if kind == "flow":
        return (x_t - sigma * prediction) / (alpha + sigma)
    if kind == "sample":
        return prediction
    raise ValueError(f"unknown prediction type '{kind}'; known: {', '.join(TARGETS)}")


def eps_from(kind: str, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that a native prediction implies; only kind "sample" divides by sigma."""
    if kind == "epsilon":
        return prediction
    if kind == "v_prediction":
        return (sigma * x_t + alpha * prediction) / (alpha**2 + sigma**2)
    if kind == "flow":
        return (x_t + alpha * prediction) / (alpha + sigma)
    return eps_from_x0(x0_from(kind, prediction, x_t, alpha, sigma), x_t, alpha, sigma)


def eps_from_x0(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that, with x0, makes x_t."""
    return (x_t - alpha * x0) / sigma


def convert(source: str, wanted: str, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """A prediction of kind `source` restated as kind `wanted`, through x0 and eps."""
    if source == wanted:
        return prediction
    given = (source, prediction, x_t, alpha, sigma)
    return target_of(wanted, x0_from(*given), eps_from(*given), alpha, sigma)

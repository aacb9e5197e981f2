"""Preference losses of diffusion and flow models, as functions of tensors.

Shape letters: B pairs, P prompts, K candidates. `*_err` are per-item mean squared errors in the model's native target;
they are taken to at least float32 (float64 stays). One convention throughout, so beta means the same everywhere:

    delta = policy_err - reference_err,      z = -beta/2 (delta_winner - delta_loser),      loss = -log sigmoid(z)

At policy = reference each pair costs log 2 (`lair` and `linear_dpo` have no logarithm; see there). Losses are unreduced
(the trainer takes the mean); a row of ties costs exactly 0 and keeps its graph, except with `lair`. Nothing here knows
a model, a config or a dataset. `protect` (see `loser_scale`) is the only optional tensor.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from alignkit.records import LossOutput

SATURATED = 4.0  # |z| above which a pair's gradient has fallen under 2% of its largest


def wide(err: Tensor) -> Tensor:
    """`err` in float32 at least."""
    return err.to(torch.promote_types(err.dtype, torch.float32))


def _delta(policy_err: Tensor, reference_err: Tensor) -> Tensor:
    """Implicit cost s = policy_err - reference_err (RankDPO, arXiv 2410.18013, eq. 5), at least float32."""
    return wide(policy_err) - wide(reference_err)


def margin_health(z: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """What to watch of the pairs in `counted`: accuracy (exact zeros count half), margin, saturation; 0 without any."""
    with torch.no_grad():
        counted = counted.to(z.dtype)
        pairs = counted.sum().clamp(min=1)
        hits = (z > 0).to(z.dtype) + 0.5 * (z == 0).to(z.dtype)
        return {
            "implicit_accuracy": (hits * counted).sum() / pairs,
            "margin": (z * counted).sum() / pairs,
            "saturated": ((z.abs() > SATURATED) * counted).sum() / pairs,
        }


def _health(z: Tensor, counted: Tensor, delta_PK: Tensor, phi_PK: Tensor) -> dict[str, Tensor]:
    """`margin_health`, and how far the errors of winner and loser went from the reference's."""
    with torch.no_grad():
        best, worst = phi_PK.argmax(-1, keepdim=True), phi_PK.argmin(-1, keepdim=True)
        return {
            **margin_health(z, counted),
            "winner_error_delta": delta_PK.gather(-1, best).mean(),
            "loser_error_delta": delta_PK.gather(-1, worst).mean(),
        }


def _gaps(err_PK: Tensor, protect_PKK: Tensor | None) -> Tensor:
    """err_i - err_j [P, K, K], winner i on the second axis; protected losers pass on only a share of their gradient."""
    loser_PKK = err_PK.unsqueeze(-2).expand(*err_PK.shape, err_PK.shape[-1])
    if protect_PKK is not None:
        fixed = loser_PKK.detach()
        loser_PKK = fixed + protect_PKK.detach() * (loser_PKK - fixed)
    return err_PK.unsqueeze(-1) - loser_PKK


def _pair_logits(delta_PK: Tensor, beta: float, protect_PKK: Tensor | None) -> Tensor:
    """z [P, K, K] with the winner on the second axis."""
    return -0.5 * beta * _gaps(delta_PK, protect_PKK)


def _pair_health(z_B: Tensor, delta_B2: Tensor) -> dict[str, Tensor]:
    """`_health` of pairs, winner first."""
    order_B2 = torch.tensor([1.0, 0.0], device=z_B.device).expand_as(delta_B2)
    return _health(z_B, torch.ones_like(z_B), delta_B2, order_B2)


def diffusion_dpo(
    policy_err_B2: Tensor, reference_err_B2: Tensor, *, beta: float, protect: Tensor | None = None
) -> LossOutput:
    """Diffusion-DPO (Wallace et al., arXiv 2311.12908, eq. 14), winner first; loss [B].

    T omega(lambda_t) is taken constant and folded into beta, as in the authors' code.
    """
    delta_B2 = _delta(policy_err_B2, reference_err_B2)
    z_B = _pair_logits(delta_B2, beta, protect)[:, 0, 1]
    return LossOutput(softplus(-z_B), _pair_health(z_B, delta_B2))


def linear_dpo(
    policy_err_B2: Tensor, reference_err_B2: Tensor, *, beta: float, eta: float = 0.01, protect: Tensor | None = None
) -> LossOutput:
    """Linear-DPO (arXiv 2605.21123, eq. 15; the factor 0.2 is that of the authors' code), winner first; loss [B].

        omega = clip(1/2 + 0.2 beta (delta_winner - delta_loser), eta, 1 - eta) = clip(1/2 - 0.4 z, eta, 1 - eta)
        loss  = omega (policy_err_winner - policy_err_loser),       omega carries no gradient

    The gradient is that of `diffusion_dpo` with omega for sigmoid(-z) and without the factor beta/2, so at policy =
    reference (omega = 1/2) both have one direction, and learning rates are those of supervised fine-tuning. The value
    there is half the difference of the errors, of either sign: only its gradient and `margin` say how training goes.
    `eta` in [0, 1/2) is what a pair keeps that is won; metrics: `saturated`, the share of such pairs, and the mean
    `omega`. The published reference is a moving average of the policy; which one it is, the caller decides.
    """
    delta_B2 = _delta(policy_err_B2, reference_err_B2)
    z_B = _pair_logits(delta_B2, beta, None)[:, 0, 1]
    omega_B = (0.5 - 0.4 * z_B).clamp(eta, 1 - eta).detach()
    gap_B = _gaps(wide(policy_err_B2), protect)[:, 0, 1]
    weights = {"saturated": (omega_B <= eta).to(omega_B.dtype).mean(), "omega": omega_B.mean()}
    return LossOutput(omega_B * gap_B, _pair_health(z_B, delta_B2) | weights)


def mean_ranks(better_PKK: Tensor) -> Tensor:
    """Ranks tau [P, K] (1 = best; ties share the mean) from better[p, i, j] = "j stands before i"."""
    wins, losses = better_PKK.float(), better_PKK.transpose(-1, -2).float()
    tied = 1 - wins - losses
    return 1 + wins.sum(-1) + 0.5 * (tied.sum(-1) - 1)  # an item ties with itself


def rank_weights(phi_PK: Tensor, tau_PK: Tensor) -> Tensor:
    """Delta_ij = |2^phi_i - 2^phi_j| |1/log(1+tau_i) - 1/log(1+tau_j)| (RankDPO eq. 6), natural log; [P, K, K]."""
    discount_PK = 1 / torch.log1p(tau_PK)
    return _gain(phi_PK) * (discount_PK.unsqueeze(-1) - discount_PK.unsqueeze(-2)).abs()


def _gain(phi_PK: Tensor) -> Tensor:
    power_PK = torch.exp2(phi_PK)
    return (power_PK.unsqueeze(-1) - power_PK.unsqueeze(-2)).abs()


def rank_dpo(
    policy_err_PK: Tensor,
    reference_err_PK: Tensor,
    phi_PK: Tensor,
    *,
    beta: float,
    rank_source: Literal["label", "model"] = "label",
    weighting: Literal["rank_gain", "gain", "none"] = "rank_gain",
    protect: Tensor | None = None,
) -> LossOutput:
    """RankDPO (arXiv 2410.18013, eq. 7): all pairs with phi_i > phi_j, weighted by gain and rank discount; loss [P].

    `rank_source`: tau from the labels (the paper's algorithm 2) or from the model's own order (LambdaRank, the paper's
    figure 2; equal scores break by phi, else nothing would move at LoRA initialisation). `weighting`: "gain" drops the
    rank discount, "none" is all-pairs DPO. Left out: a normalisation by the sum of weights (the paper has none).
    """
    delta_PK = _delta(policy_err_PK, reference_err_PK)
    phi_PK = phi_PK.to(delta_PK)
    ahead_PKK = phi_PK.unsqueeze(-1) > phi_PK.unsqueeze(-2)  # i beats j
    if weighting == "rank_gain":
        weight_PKK = rank_weights(phi_PK, _tau(delta_PK.detach(), phi_PK, rank_source))
    elif weighting == "gain":
        weight_PKK = _gain(phi_PK)
    elif weighting == "none":
        weight_PKK = torch.ones_like(ahead_PKK, dtype=delta_PK.dtype)
    else:
        raise ValueError(f"weighting is '{weighting}'; use rank_gain, gain or none")
    z_PKK = _pair_logits(delta_PK, beta, protect)
    loss_P = (softplus(-z_PKK) * weight_PKK * ahead_PKK).sum((-1, -2))
    return LossOutput(loss_P, _health(z_PKK, ahead_PKK, delta_PK, phi_PK))


def _tau(delta_PK: Tensor, phi_PK: Tensor, rank_source: str) -> Tensor:
    by_label = phi_PK.unsqueeze(-2) > phi_PK.unsqueeze(-1)  # j before i
    if rank_source == "label":
        return mean_ranks(by_label).to(delta_PK)
    if rank_source == "model":
        lower = delta_PK.unsqueeze(-2) < delta_PK.unsqueeze(-1)
        equal = delta_PK.unsqueeze(-2) == delta_PK.unsqueeze(-1)
        return mean_ranks(lower | (equal & by_label)).to(delta_PK)
    raise ValueError(f"rank_source is '{rank_source}'; use label or model")


def plackett_luce(policy_err_PK: Tensor, reference_err_PK: Tensor, phi_PK: Tensor, *, beta: float) -> LossOutput:
    """Plackett-Luce over the whole list (Diffusion-LPO, arXiv 2510.01540); loss [P].

    -sum_i [ u_i - log sum_{k not before i} exp(u_k) ] with u = -beta/2 delta, so K = 2 is `diffusion_dpo`. Items of
    equal phi do not compete: each is chosen from itself and what stands strictly below it. `protect` does not apply: a
    list likelihood has no single loser.
    """
    delta_PK = _delta(policy_err_PK, reference_err_PK)
    phi_PK = phi_PK.to(delta_PK)
    below_PKK = phi_PK.unsqueeze(-1) > phi_PK.unsqueeze(-2)
    itself = torch.eye(phi_PK.shape[-1], dtype=torch.bool, device=phi_PK.device)
    u_PK = -0.5 * beta * delta_PK
    rivals_PKK = u_PK.unsqueeze(-2).masked_fill(~(below_PKK | itself), -torch.inf)
    loss_P = (torch.logsumexp(rivals_PKK, -1) - u_PK).sum(-1)
    return LossOutput(loss_P, _health(_pair_logits(delta_PK, beta, None), below_PKK, delta_PK, phi_PK))


def lair(
    policy_err_PK: Tensor,
    reference_err_PK: Tensor,
    phi_PK: Tensor,
    *,
    beta: float,
    tau: float = 0.5,
    lam: float = 0.25,
) -> LossOutput:
    """Diffusion-LAIR (arXiv 2605.26491): advantage-weighted regression of implicit rewards, whole list; loss [P].

        u_i = -beta/2 delta_i,   A_i = softmax(phi / tau)_i - 1/K,   loss = 1/K sum_i (lam u_i^2 - A_i u_i)

    It is least at u_i = A_i / (2 lam), that is delta_i = -A_i / (beta lam): a candidate with A > 0 gets a lower error
    than the reference's, and no error moves without bound. beta = 2 is the form in errors, 1/K sum_i (A_i delta_i + lam
    delta_i^2). At policy = reference the loss is 0. A row of ties has A = 0 and keeps the penalty, which pulls it back
    to the reference. For K = 2 and tau -> 0, twice the loss with lam = 1/4 is `diffusion_dpo` - log 2 to second order
    in u_1 - u_2, plus (u_1 + u_2)^2 / 8.

    tau > 0, lam > 0; the paper's values are not known (docs/methods.md). There are no saturated pairs: no such metric.
    `protect` does not apply, as in `plackett_luce`.
    """
    delta_PK = _delta(policy_err_PK, reference_err_PK)
    phi_PK = phi_PK.to(delta_PK)
    u_PK = -0.5 * beta * delta_PK
    advantage_PK = torch.softmax(phi_PK / tau, -1) - 1 / phi_PK.shape[-1]
    ahead_PKK = phi_PK.unsqueeze(-1) > phi_PK.unsqueeze(-2)
    health = _health(_pair_logits(delta_PK, beta, None), ahead_PKK, delta_PK, phi_PK)
    del health["saturated"]
    return LossOutput((lam * u_PK.square() - advantage_PK * u_PK).mean(-1), health)


def winner_sft(
    policy_err_PK: Tensor,
    reference_err_PK: Tensor,  # noqa: ARG001 - losses of the table are called alike
    phi_PK: Tensor,
    *,
    beta: float,  # noqa: ARG001
    protect: Tensor | None = None,  # noqa: ARG001
) -> LossOutput:
    """The denoising error of each row's best candidate, to be added to another loss (`sft` of TRL's DPO); loss [P]."""
    best_P1 = phi_PK.argmax(-1, keepdim=True)
    return LossOutput(wide(policy_err_PK).gather(-1, best_P1).squeeze(-1))


def loser_scale(residual_PKD: Tensor, mu: float) -> Tensor:
    """How much of its gradient each loser keeps, lambda [P, K (winner), K (loser)] in [0, 1]; winner protection.

    Diffusion-SDPO (arXiv 2511.03317) scales the loser's gradient so that a step cannot raise the winner's error to
    first order. Extended to lists: each ordered pair (i beats j) has its own

        lambda_ij = min(1, (1 - mu) |g_i|^2 / <g_i, g_j>)  where <g_i, g_j> > 0, else 1,      g = d err / d output,

    and the pair's logit passes lambda_ij times j's gradient; i's gradient and all forward values stay as they are.
    `residual_PKD` is prediction minus target, flattened (g up to the common factor 2/D); mu in [0, 1), larger protects
    more (the authors use 0.9 for SD1.5, 0.6 for SDXL). Sums are float32 at least, under autocast too: those of a video
    frame overflow in float16.
    """
    with torch.no_grad(), torch.autocast(residual_PKD.device.type, enabled=False):
        precise_PKD = residual_PKD.to(torch.promote_types(residual_PKD.dtype, torch.float32))
        gram_PKK = precise_PKD @ precise_PKD.transpose(-1, -2)
        own_PK1 = torch.diagonal(gram_PKK, dim1=-2, dim2=-1).unsqueeze(-1)
        share = (1 - mu) * own_PK1 / gram_PKK.clamp(min=torch.finfo(gram_PKK.dtype).tiny)
        return torch.where(gram_PKK > 0, share.clamp(max=1.0), torch.ones_like(share))

"""Raw scores -> rankings: win rates, agreement between rewards, margins. Pure functions of tensors.

Shape letters: R rewards, P prompts, K candidates a prompt. Not here: files, filters that drop rows (ranked.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignkit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def win_rates(scores_RPK: Tensor, *, temperature: float | None = None, scale_R: Tensor | None = None) -> Tensor:
    """phi [P, K] in [0, 1]: the share of (reward, opponent) duels each candidate wins.

    Without `temperature` as RankDPO (arXiv 2410.18013, Alg. 1) counts, with strict duels:
        phi_i = 1 / (R (K - 1)) * sum_l sum_{j != i} [R_l(i) > R_l(j)]
    A tie gives neither side a count, so phi sums to K/2 over a row only where no reward ties.

    With `temperature` > 0 a duel counts by how clearly it is won:
        phi_i = 1 / (R (K - 1)) * sum_l sum_{j != i} sigmoid((R_l(i) - R_l(j)) / (temperature * T_l))
    where T_l, the scale of reward l, is the root mean square of its within-prompt differences over all P prompts and
    ordered pairs (their standard deviation, for their mean is zero). A tie gives both sides one half; temperature -> 0
    gives the strict form where nothing ties; an affine change of one reward changes nothing. `scale_R` gives T when it
    was measured on more prompts than these (see `difference_scale`).

    64-bit scores are computed in float64, all others in float32.
    Raises ConfigError for another number of axes, K < 2 or a temperature that is not positive.
    """
    if scores_RPK.dim() != 3 or scores_RPK.shape[2] < 2:
        raise ConfigError(f"scores must be [R, P, K] with K >= 2, got {list(scores_RPK.shape)}; draw more candidates")
    rewards, _, candidates = scores_RPK.shape
    difference_RPKK = _differences(scores_RPK)
    if temperature is None:
        won_RPKK = (difference_RPKK > 0).to(difference_RPKK)
        return won_RPKK.sum(dim=(0, 3)) / (rewards * (candidates - 1))
    if not temperature > 0:
        raise ConfigError(f"temperature must be positive, got {temperature}; leave it out for strict win counting")
    scale_R = difference_scale(scores_RPK) if scale_R is None else scale_R
    # A constant reward has scale 0 and only differences of 0: any positive scale makes all its duels ties.
    scale_R111 = scale_R.where(scale_R > 0, scale_R.new_ones(())).reshape(-1, 1, 1, 1)
    won_RPKK = (difference_RPKK / (temperature * scale_R111)).sigmoid()
    # The diagonal (a candidate against itself) holds exactly one half for every reward.
    return (won_RPKK.sum(dim=(0, 3)) - 0.5 * rewards) / (rewards * (candidates - 1))


def difference_scale(scores_RPK: Tensor) -> Tensor:
    """T [R]: root mean square of each reward's within-prompt differences over ordered pairs i != j; 0 if constant."""
    candidates = scores_RPK.shape[2]
    mean_square_R = _differences(scores_RPK).square().mean(dim=(1, 2, 3))
    return (mean_square_R * candidates / (candidates - 1)).sqrt()


def concordance(scores_RPK: Tensor) -> Tensor:
    """How alike two rewards order a prompt's candidates, [R, R, P] in [0, 1].

    The share of candidate pairs ordered the same way; a pair that either reward ties counts one half. It is
    (1 + tau_a) / 2 with Kendall's tau_a, so 0.5 is chance.
    """
    signs_RPKK = _differences(scores_RPK).sign()
    candidates = scores_RPK.shape[2]
    tau_RRP = (signs_RPKK[:, None] * signs_RPKK[None]).sum(dim=(3, 4)) / (candidates * (candidates - 1))
    return (1 + tau_RRP) / 2


def agreement(scores_RPK: Tensor) -> Tensor:
    """Mean concordance [P] in [0, 1] over all pairs of different rewards; 1 where there is one reward only."""
    rewards = scores_RPK.shape[0]
    if rewards == 1:
        return _differences(scores_RPK).new_ones(scores_RPK.shape[1])
    matrix_RRP = concordance(scores_RPK)
    own_P = matrix_RRP.diagonal().sum(dim=-1)
    return (matrix_RRP.sum(dim=(0, 1)) - own_P) / (rewards * (rewards - 1))


def margin(phi_PK: Tensor) -> Tensor:
    """Best minus worst phi of each prompt, [P]; 0 where all tie."""
    return phi_PK.amax(dim=1) - phi_PK.amin(dim=1)


def _differences(scores_RPK: Tensor) -> Tensor:
    """[R, P, K, K]: score of candidate i minus score of candidate j, at least float32."""
    scores = scores_RPK.double() if scores_RPK.element_size() == 8 else scores_RPK.float()
    return scores.unsqueeze(3) - scores.unsqueeze(2)

"""Losses of pairs of clips with a label for each latent frame (DenseDPO, Wu et al. 2025, arXiv 2506.03517).

Shape letters: B pairs, T latent frames, S segments. Errors are [B, 2, T], the mean over C, H and W of each latent
frame, in the order of the clips; labels are 1 (the first clip is better), -1 (the second) and 0 (tie, or no label). All
else is as in `alignkit.losses.preference`: the scale of beta, the dtypes, log 2 at policy = reference.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from alignkit.losses.preference import margin_health, wide
from alignkit.records import LossOutput

Reduction = Literal["frame", "segment", "sum"]


def dense_dpo(
    policy_err_B2T: Tensor,
    reference_err_B2T: Tensor,
    labels_BT: Tensor,
    *,
    beta: float,
    reduction: Reduction = "frame",
    segments_BT: Tensor | None = None,
    protect: Tensor | None = None,
) -> LossOutput:
    """DenseDPO: a preference of its own in each latent frame; loss [B, T], [B, S] or [B], 0 where nothing is labelled.

        delta = policy_err - reference_err,      z_bt = -beta/2 label_bt (delta_b0t - delta_b1t)

    `reduction` says what stands inside one sigmoid, because the paper gives two forms:

    "frame": -log sigmoid(z_bt) for each labelled frame [B, T]. This is the pseudo-code of the paper's appendix E, which
        divides by the number of all labelled frames of the batch; appendix A.3 describes the same, so it is taken to be
        what was run.
    "sum": -log sigmoid(sum_t z_bt) for each pair with a label [B]. This is the paper's eq. 7. Its z grows with the
        number of labelled frames, so the same beta saturates sooner.
    "segment": -log sigmoid of the mean z of a segment's labelled frames [B, S]; between the two. `segments_BT` is the
        number of each frame's segment, below 0 for none; S is the largest number of the batch and one. With one segment
        and one label for the whole clip it is `diffusion_dpo` of the errors of the clips (Flow-DPO, StructuralDPO).

    The weight is the number of terms that count (`counted`). A frame with label 0 gets no gradient at all. Exchanging
    the clips and the signs of the labels changes nothing. `protect` [B, T, 2, 2] is `loser_scale` of each frame, with
    the winner on the third axis: the loser of a frame passes on this share of its gradient, values stay.
    Raises ValueError for another reduction, or "segment" without `segments_BT`.
    """
    labels_BT = labels_BT.to(torch.promote_types(policy_err_B2T.dtype, torch.float32))
    policy_err_B2T = _protected(wide(policy_err_B2T), labels_BT, protect)
    delta_B2T = policy_err_B2T - wide(reference_err_B2T)
    z_BT = -0.5 * beta * labels_BT * (delta_B2T[:, 0] - delta_B2T[:, 1])
    counts = counted(labels_BT, reduction, segments_BT)
    if reduction == "frame":
        z = z_BT
    elif reduction == "sum":
        z = z_BT.sum(-1)
    else:
        member_BTS = _members(labels_BT, segments_BT).to(z_BT)
        z = (z_BT.unsqueeze(-1) * member_BTS).sum(1) / member_BTS.sum(1).clamp(min=1)
    metrics = margin_health(z, counts)
    labelled_BT, fixed_B2T = labels_BT.ne(0), delta_B2T.detach()
    for name, sign in (("winner", 1), ("loser", -1)):  # how far their errors went from the reference's
        sum_ = (_winner(fixed_B2T, sign * labels_BT) * labelled_BT).sum()
        metrics[f"{name}_error_delta"] = sum_ / labelled_BT.sum().clamp(min=1)
    return LossOutput(softplus(-z) * counts, metrics, counts.sum())


def dense_sft(
    policy_err_B2T: Tensor,
    reference_err_B2T: Tensor,  # noqa: ARG001 - losses of the table are called alike
    labels_BT: Tensor,
    *,
    beta: float = 0.0,  # noqa: ARG001
) -> LossOutput:
    """The denoising error of the better clip in each labelled frame; loss [B, T], 0 elsewhere.

    With one label for the whole clip: supervised fine-tuning on winners. The weight is the number of labelled frames.
    """
    counts_BT = counted(labels_BT)
    error_BT = _winner(wide(policy_err_B2T), labels_BT) * counts_BT
    mean = error_BT.detach().sum() / counts_BT.sum().clamp(min=1)
    return LossOutput(error_BT, {"winner_error": mean}, counts_BT.sum())


def counted(labels_BT: Tensor, reduction: Reduction = "frame", segments_BT: Tensor | None = None) -> Tensor:
    """Which terms of a loss with this reduction have a label, bool [B, T], [B, S] or [B]. Raises as `dense_dpo`."""
    if reduction == "frame":
        return labels_BT.ne(0)
    if reduction == "sum":
        return labels_BT.ne(0).any(-1)
    if reduction == "segment":
        return _members(labels_BT, segments_BT).any(1)
    raise ValueError(f"reduction is '{reduction}'; use frame, segment or sum")


def _members(labels_BT: Tensor, segments_BT: Tensor | None) -> Tensor:
    """Whether a frame is a labelled frame of a segment, bool [B, T, S]."""
    if segments_BT is None:
        raise ValueError("reduction 'segment' needs segments_BT, the number of each frame's segment")
    numbers_S = torch.arange(max(1, int(segments_BT.max()) + 1), device=segments_BT.device)
    return segments_BT.unsqueeze(-1).eq(numbers_S) & labels_BT.ne(0).unsqueeze(-1)


def _winner(values_B2T: Tensor, labels_BT: Tensor) -> Tensor:
    return torch.where(labels_BT > 0, values_B2T[:, 0], values_B2T[:, 1])


def _protected(err_B2T: Tensor, labels_BT: Tensor, protect_BT22: Tensor | None) -> Tensor:
    """`err_B2T` whose losers pass on only their share of the gradient."""
    if protect_BT22 is None:
        return err_B2T
    whole_BT = torch.ones_like(labels_BT)
    first_BT = torch.where(labels_BT < 0, protect_BT22[..., 1, 0].to(whole_BT), whole_BT)
    second_BT = torch.where(labels_BT > 0, protect_BT22[..., 0, 1].to(whole_BT), whole_BT)
    fixed_B2T = err_B2T.detach()
    return fixed_B2T + torch.stack([first_BT, second_BT], 1).detach() * (err_B2T - fixed_B2T)

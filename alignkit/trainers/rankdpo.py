"""RankDPO and its relatives on ranked rows: `loss` chooses the loss, the reference is the model without adapters."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignkit.errors import ConfigError, DataError
from alignkit.losses import LOSSES, loser_scale
from alignkit.records import LossOutput
from alignkit.resolve import require_known, resolve
from alignkit.trainers.base import AlignTrainer
from alignkit.trainers.config import AlignConfig
from alignkit.trainers.latents import DrawPlan, LatentDataset, conditioning
from alignkit.trainers.reference import precompute

logger = logging.getLogger(__name__)
WINDOW = 10  # logs in each half of the window that the drift warning compares
_CHOICES = {"rank_source": ("label", "model"), "weighting": ("rank_gain", "gain", "none")}


@dataclass
class RankDPOConfig(AlignConfig):
    """Defaults: beta as in Diffusion-DPO's SDXL runs (mean-squared errors, factor 1/2); RankDPO's paper tells none."""

    loss: str = field(
        default="rank_dpo", metadata={"help": "rank_dpo, diffusion_dpo (best against worst), plackett_luce, or yours."}
    )
    beta: float = field(default=5000.0, metadata={"help": "Pull to the reference; flow models: 100-2000."})
    rank_source: str = field(default="label", metadata={"help": "rank_dpo: tau from label or model order."})
    weighting: str = field(default="rank_gain", metadata={"help": "rank_dpo: rank_gain, gain or none (all-pairs DPO)."})
    share_noise: bool = field(default=True, metadata={"help": "One noise for all candidates of a prompt."})
    share_timestep: bool = field(default=True, metadata={"help": "One timestep for all candidates of a prompt."})
    precompute_reference: bool = field(default=False, metadata={"help": "Reference errors once, for all runs."})
    low_memory: bool = field(default=False, metadata={"help": "Memory of one candidate, one forward more."})
    protect_winner: float | None = field(
        default=None, metadata={"help": "mu of the loser's gradient scale (SDPO): 0.9 for SD1.5, 0.6 for SDXL; off."}
    )
    sft_weight: float = field(default=0.0, metadata={"help": "Weight of the winner's denoising error beside the loss."})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_known(self.loss, LOSSES, kind="loss")  # imports nothing: a dry run comes here too
        for name, allowed in _CHOICES.items():
            value = {"rank_source": self.rank_source, "weighting": self.weighting}[name]
            if value not in allowed:
                raise ConfigError(f"{name} is '{value}'; use {' or '.join(allowed)}")
        if self.beta <= 0:
            raise ConfigError(f"beta is {self.beta}; it must be positive")
        if self.protect_winner is not None and self.loss == "plackett_luce":
            raise ConfigError("protect_winner needs pairs; plackett_luce has none. Use rank_dpo or diffusion_dpo")
        if self.protect_winner is not None and self.low_memory:
            raise ConfigError("protect_winner needs all candidates' outputs at once; switch off low_memory")


class RankDPOTrainer(AlignTrainer):
    """Ranked preference training; see `alignkit.losses.preference` for the equations."""

    args: RankDPOConfig
    needs_reference = True

    def __init__(self, generator: Any, args: RankDPOConfig, train_dataset: Any, *rest: Any, **options: Any) -> None:
        super().__init__(generator, args, train_dataset, *rest, **options)
        self._objective = _objective(args)
        self._drift: deque[tuple[float, float]] = deque(maxlen=2 * WINDOW)
        if args.precompute_reference:
            with args.main_process_first(desc="reference errors"):
                self.train_dataset.reference = precompute(self, self.train_dataset, args.cache_folder)

    def draw_plan(self, args: AlignConfig) -> DrawPlan:
        return replace(super().draw_plan(args), share_noise=args.share_noise, share_timestep=args.share_timestep)

    def _encode(self, rows: Any, args: RankDPOConfig) -> LatentDataset | None:
        if rows is not None and not isinstance(rows, LatentDataset):
            _require_ranked(rows)
        dataset = super()._encode(rows, args)
        if dataset is None:
            return None
        if not (dataset.phi.amax(-1) > dataset.phi.amin(-1)).any():
            raise DataError("every row is a tie (equal phi), so there is nothing to prefer; score with other rewards")
        if args.loss == "diffusion_dpo" and dataset.picked is None:
            dataset.keep_best_and_worst()
        return dataset

    def method_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        reference_PK = batch.get("reference_err")
        if reference_PK is None:
            reference_PK = self.reference_errors(model, batch)
        protect: dict[str, Tensor] = {}
        if self.args.protect_winner is not None:
            residual_PKD = self.errors(model, batch, residuals=True)
            policy_PK = residual_PKD.square().mean(-1)
            protect["protect"] = loser_scale(residual_PKD, self.args.protect_winner)
        elif self.args.low_memory:
            policy_PK = self.errors_one_by_one(model, batch)
        else:
            policy_PK = self.errors(model, batch)
        output = self._objective(policy_PK, reference_PK, batch["phi"], **protect)
        loss_P = output.loss
        if self.args.sft_weight:
            best_P1 = batch["phi"].argmax(-1, keepdim=True)
            loss_P = loss_P + self.args.sft_weight * policy_PK.gather(-1, best_P1).squeeze(-1)
        return loss_P, output.metrics

    @torch.no_grad()
    def reference_errors(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Errors [P, K] of the frozen base model on the same draws."""
        with self.generator.reference():
            return self.errors_one_by_one(model, batch) if self.args.low_memory else self.errors(model, batch)

    def errors_one_by_one(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """`errors` with the activations of one candidate alone in memory: each is checkpointed whole.

        Exact: the backward repeats a candidate's forward and sums the same gradients.
        """
        cond = conditioning(batch, self.null)

        def error(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
            return self._residual(model, x0, noise, t, cond).flatten(1).square().mean(-1)

        columns = zip(*(batch[name].unbind(1) for name in ("latents", "noise", "t")), strict=True)
        return torch.stack([checkpoint(error, *column, use_reentrant=False) for column in columns], -1)

    def warn_of(self, health: Mapping[str, float]) -> None:
        """Warn when the winner's error rises while the margin grows: the loss is won by ruining both."""
        if not health.keys() >= {"health/winner_error_delta", "health/margin"}:
            return  # a loss of the user's own
        self._drift.append((health["health/winner_error_delta"], health["health/margin"]))
        if len(self._drift) < 2 * WINDOW:
            return
        entries = list(self._drift)
        (w0, m0), (w1, m1) = (_means(half) for half in (entries[:WINDOW], entries[WINDOW:]))
        if w1 > max(w0, 0.0) and m1 > m0:
            self._drift.clear()
            logger.warning(
                "step %d: the winner's error against the reference rises (%.2e -> %.2e) while the margin grows "
                "(%.3f -> %.3f). Pictures get worse on both sides; lower learning_rate, raise beta, or set "
                "protect_winner or sft_weight.",
                *(self.state.global_step, w0, w1, m0, m1),
            )


def _means(entries: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(winner for winner, _ in entries) / WINDOW, sum(margin for _, margin in entries) / WINDOW


def _require_ranked(rows: Any) -> None:
    """What can be seen before anything is encoded."""
    if "phi" not in rows.column_names:
        raise DataError(f"ranked rows need the column phi; these have {rows.column_names}. Run `alignkit rank` first")
    if len(rows) and len(rows[0]["phi"]) < 2:
        raise DataError("ranked rows need K >= 2 candidates, these have 1; generate more seeds or more generators")


def _objective(args: RankDPOConfig) -> Any:
    """The configured loss as f(policy_PK, reference_PK, phi_PK) -> LossOutput."""
    loss = resolve(args.loss, LOSSES, kind="loss")
    if args.loss == "diffusion_dpo":
        # The dataset keeps best and worst, in this order: their phi is not needed.
        def pairs(policy_B2: Tensor, reference_B2: Tensor, _: Tensor, **protect: Tensor) -> LossOutput:
            return loss(policy_B2, reference_B2, beta=args.beta, **protect)

        return pairs
    if args.loss == "rank_dpo":
        return partial(loss, beta=args.beta, rank_source=args.rank_source, weighting=args.weighting)
    return partial(loss, beta=args.beta)

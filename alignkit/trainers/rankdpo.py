"""RankDPO and other preference losses on ranked rows: `loss` chooses the loss, the reference has no adapters.

Differences to the paper (RankDPO, arXiv 2410.18013):
- Losses of prompts are averaged (`mean` over P); the paper states no reduction.
- The candidates of a prompt share one noise and one timestep (`share_noise`, `share_timestep`); both can be switched
  off. Shared noise lowers the variance of error differences.
- The reference is the same network with its adapters off, not a second model (a frozen copy in full fine-tuning).
- Errors are means, not sums, over pixels, so `beta` is on the scale of Diffusion-DPO's code (see its help).
- `error_space="velocity"` weighs the errors of an eps network as those of a v network; the paper's are native.
- `t_min` leaves low-noise times out; the paper trains on all.
- `protect_winner` scales the losers' gradients (Diffusion-SDPO, arXiv 2511.03317), `sft_weight` adds the winner's
  denoising error; the paper has neither, and both are off by default.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import ConfigError, DataError
from alignkit.escape import get_logger
from alignkit.losses import LOSSES, loser_scale
from alignkit.records import LossOutput
from alignkit.resolve import require_known, resolve
from alignkit.trainers.beta import BETA, FLOW_BETA, beta_note, default_beta, stored_prediction
from alignkit.trainers.config import OfflineConfig
from alignkit.trainers.draws import DrawPlan
from alignkit.trainers.latents import LatentDataset
from alignkit.trainers.offline import OfflineTrainer
from alignkit.trainers.ranges import DECAY, NOT_NEGATIVE, POSITIVE, require_in_range

logger = get_logger(__name__)
WINDOW = 10  # logs in each half of the window that the drift warning compares
_RANGES = {"beta": POSITIVE, "protect_winner": DECAY, "sft_weight": NOT_NEGATIVE}
_CHOICES = {"rank_source": ("label", "model"), "weighting": ("rank_gain", "gain", "none")}


@dataclass
class RankDPOConfig(OfflineConfig):
    """RankDPO's paper gives no beta; the defaults are for mean squared errors and a factor of 1/2 (see `beta`)."""

    loss: str = field(
        default="rank_dpo", metadata={"help": "rank_dpo, diffusion_dpo (best against worst), plackett_luce, or yours."}
    )
    beta: float | None = field(
        default=None,
        metadata={"help": f"Pull to the reference; default: {FLOW_BETA:g} for flow models, {BETA:g} for others."},
    )
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
        require_in_range(vars(self), _RANGES)
        if self.protect_winner is not None and self.loss == "plackett_luce":
            raise ConfigError("protect_winner needs pairs; plackett_luce has none. Use rank_dpo or diffusion_dpo")
        if self.protect_winner is not None and self.low_memory:
            raise ConfigError("protect_winner needs all candidates' outputs at once; switch off low_memory")

    @classmethod
    def model_defaults(cls, model: str) -> dict[str, str]:
        return {"beta": beta_note(stored_prediction(model))}


class RankDPOTrainer(OfflineTrainer):
    """Ranked preference training, loss [P]; see `alignkit.losses.preference` for the equations."""

    args: RankDPOConfig
    needs_reference = True
    compares_candidates = True

    def __init__(self, model: Any, args: RankDPOConfig, train_dataset: Any, *rest: Any, **options: Any) -> None:
        super().__init__(model, args, train_dataset, *rest, **options)
        if args.beta is None:
            args.beta = default_beta(self.generator.prediction)
            if self.is_world_process_zero():
                print(beta_note(self.generator.prediction), file=sys.stderr)
        self._objective = _objective(args)
        self._drift: deque[tuple[float, float]] = deque(maxlen=2 * WINDOW)
        if args.precompute_reference:
            self.precompute_reference(one_by_one=args.low_memory)

    def draw_plan(self, args: Any) -> DrawPlan:
        return replace(super().draw_plan(args), share_noise=args.share_noise, share_timestep=args.share_timestep)

    def prepare_data(self, rows: Any, args: Any) -> LatentDataset | None:
        if rows is not None and not isinstance(rows, LatentDataset):
            _require_ranked(rows)
        dataset = super().prepare_data(rows, args)
        if dataset is None:
            return None
        phi_NK = dataset.targets["phi"]
        if not (phi_NK.amax(-1) > phi_NK.amin(-1)).any():
            raise DataError("every row is a tie (equal phi), so there is nothing to prefer; score with other rewards")
        if args.loss == "diffusion_dpo" and dataset.picked is None:
            keep_best_and_worst(dataset)
        return dataset

    def method_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> LossOutput:
        args = self.args
        reference_PK = batch.get("reference_err")
        if reference_PK is None:
            reference_PK = self.reference_errors(model, batch, one_by_one=args.low_memory)
        protect: dict[str, Tensor] = {}
        if args.protect_winner is None:
            policy_PK = self.errors(model, batch, one_by_one=args.low_memory)
        else:
            residual_PKD = self.residuals(model, batch).flatten(2)
            policy_PK = residual_PKD.square().mean(-1)
            protect["protect"] = loser_scale(residual_PKD, args.protect_winner)
        output = self._objective(policy_PK, reference_PK, batch["phi"], **protect)
        if args.sft_weight:
            best_P1 = batch["phi"].argmax(-1, keepdim=True)
            winner_P = policy_PK.gather(-1, best_P1).squeeze(-1)
            output = replace(output, loss=output.loss + args.sft_weight * winner_P)
        return output

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
                "(%.3f -> %.3f). Winners and losers get worse; lower learning_rate, raise beta, or set "
                "protect_winner or sft_weight.",
                *(self.state.global_step, w0, w1, m0, m1),
            )


def _means(entries: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(winner for winner, _ in entries) / WINDOW, sum(margin for _, margin in entries) / WINDOW


def keep_best_and_worst(dataset: LatentDataset) -> None:
    """Keep each row's best and worst candidate only, best first; rows of ties go."""
    phi_NK = torch.as_tensor(dataset.targets["phi"])
    dataset.select((phi_NK.amax(-1) > phi_NK.amin(-1)).nonzero().flatten().tolist())
    phi_NK = torch.as_tensor(dataset.targets["phi"])
    dataset.pick(torch.stack([phi_NK.argmax(-1), phi_NK.argmin(-1)], -1), targets=["phi"])


def _require_ranked(rows: Any) -> None:
    """Refuse, before anything is encoded, rows that cannot be ranked."""
    if "phi" not in rows.column_names:
        raise DataError(f"ranked rows need the column phi; these have {rows.column_names}. Run `alignkit rank` first")
    if len(rows) and len(rows.select_columns(["phi"])[0]["phi"]) < 2:
        raise DataError("ranked rows need K >= 2 candidates, these have 1; generate more seeds or more generators")


def _objective(args: RankDPOConfig) -> Any:
    """The configured loss as f(policy_PK, reference_PK, phi_PK) -> LossOutput."""
    loss = resolve(args.loss, LOSSES, kind="loss")
    if args.loss == "diffusion_dpo":
        # Rows hold the best and the worst candidate, in this order, so phi is not needed.
        def pairs(policy_B2: Tensor, reference_B2: Tensor, _: Tensor, **protect: Tensor) -> LossOutput:
            return loss(policy_B2, reference_B2, beta=args.beta, **protect)

        return pairs
    if args.loss == "rank_dpo":
        return partial(loss, beta=args.beta, rank_source=args.rank_source, weighting=args.weighting)
    return partial(loss, beta=args.beta)

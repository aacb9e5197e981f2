"""RankDPO and other preference losses on ranked rows: `loss` chooses one, or several that are added with weights.

Differences to the paper (RankDPO, arXiv 2410.18013):
- Losses of prompts are averaged (`mean` over P); the paper states no reduction.
- The candidates of a prompt share one noise and one timestep (`share_noise`, `share_timestep`); both can be switched
  off. Shared noise lowers the variance of error differences.
- The reference is the same network with its adapters off, not a second model (a frozen copy in full fine-tuning).
  `reference_ema` makes it a moving average of the policy (Linear-DPO, arXiv 2605.21123).
- Errors are means, not sums, over pixels, so `beta` is on the scale of Diffusion-DPO's code (see its help).
- `error_space="velocity"` weighs the errors of an eps network as those of a v network; the paper's are native.
- `t_min` leaves low-noise times out; the paper trains on all.
- `protect_winner` scales the losers' gradients (Diffusion-SDPO, arXiv 2511.03317), `sft_weight` adds the winner's
  denoising error; the paper has neither, and both are off by default.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from typing_extensions import override

from alignkit.errors import CheckpointMismatchError, ConfigError, DataError
from alignkit.losses import LISTS, PAIRS, RANKED, loser_scale
from alignkit.records import LossOutput
from alignkit.resolve import require_known, resolve
from alignkit.trainers import averaging
from alignkit.trainers.beta import BETA, FLOW_BETA, beta_note, default_beta, stored_prediction
from alignkit.trainers.config import OfflineConfig
from alignkit.trainers.draws import DrawPlan
from alignkit.trainers.drift import Drift
from alignkit.trainers.latents import LatentDataset
from alignkit.trainers.offline import OfflineTrainer
from alignkit.trainers.ranges import DECAY, NOT_NEGATIVE, POSITIVE, Range, require_in_range, weights_by_name

WINNER_SFT = "winner_sft"  # the loss that `sft_weight` adds
OWN_BETA = {
    "linear_dpo": "its authors use 100 (SD1.5) and 500 (SDXL)",
    "lair": "no error can change by more than 1 / (beta lair_lambda), so start with 1",
}
_RANGES = {"beta": POSITIVE, "protect_winner": DECAY, "sft_weight": NOT_NEGATIVE, "reference_ema": DECAY}
_RANGES |= {"lair_tau": POSITIVE, "lair_lambda": POSITIVE, "linear_eta": Range(0, 0.5, includes_high=False)}
_CHOICES = {"rank_source": ("label", "model"), "weighting": ("rank_gain", "gain", "none")}


@dataclass
class RankDPOConfig(OfflineConfig):
    """RankDPO's paper gives no beta; the defaults are for mean squared errors and a factor of 1/2 (see `beta`)."""

    loss: str | list[str] = field(
        default="rank_dpo",
        metadata={
            "help": "rank_dpo, plackett_luce, lair; diffusion_dpo, linear_dpo (best against worst); winner_sft; or "
            "yours. Several are added."
        },
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each loss, in the order of `loss`; default: 1 each."}
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Strength of the pull to the reference; larger changes the model less; default: "
            f"{FLOW_BETA:g} for flow models, {BETA:g} for others."
        },
    )
    rank_source: str = field(default="label", metadata={"help": "rank_dpo: tau from label or model order."})
    weighting: str = field(default="rank_gain", metadata={"help": "rank_dpo: rank_gain, gain or none (all-pairs DPO)."})
    lair_tau: float = field(default=0.5, metadata={"help": "lair: temperature of the softmax over phi."})
    lair_lambda: float = field(default=0.25, metadata={"help": "lair: weight of the squared implicit rewards."})
    linear_eta: float = field(default=0.01, metadata={"help": "linear_dpo: the smallest weight that a pair can get."})
    share_noise: bool = field(default=True, metadata={"help": "One noise for all candidates of a prompt."})
    share_timestep: bool = field(default=True, metadata={"help": "One timestep for all candidates of a prompt."})
    precompute_reference: bool = field(default=False, metadata={"help": "Reference errors once, for all runs."})
    reference_ema: float | None = field(
        default=None,
        metadata={"help": "Reference: average of the policy with this decay (Linear-DPO: 0.995); default: the base."},
    )
    low_memory: bool = field(
        default=False,
        metadata={"help": "Keep the activations of one candidate at a time; costs one more forward pass."},
    )
    protect_winner: float | None = field(
        default=None,
        metadata={
            "help": "Diffusion-SDPO: limit the loser's gradient by this mu; 0.9 for SD1.5, 0.6 for SDXL; null: off."
        },
    )
    sft_weight: float = field(default=0.0, metadata={"help": "Weight of the winner's denoising error beside the loss."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in _CHOICES.items():
            value = {"rank_source": self.rank_source, "weighting": self.weighting}[name]
            if value not in allowed:
                raise ConfigError(f"{name} is '{value}'; use {' or '.join(allowed)}")
        require_in_range(vars(self), _RANGES)
        self._check_losses()
        if self.reference_ema is not None and (self.precompute_reference or self.lora_dropout):
            raise ConfigError(
                "reference_ema changes with every step and needs equal passes: no precompute_reference, no lora_dropout"
            )
        if self.protect_winner is not None and self.low_memory:
            raise ConfigError("protect_winner needs all candidates' outputs at once; switch off low_memory")

    @property
    def losses(self) -> dict[str, float]:
        """The weight of each loss by its name, that of `sft_weight` last."""
        own = weights_by_name(self.loss, self.loss_weights)
        return own | ({WINNER_SFT: self.sft_weight} if self.sft_weight else {})

    def _check_losses(self) -> None:
        names = [self.loss] if isinstance(self.loss, str) else self.loss
        for name in names:
            require_known(name, RANKED, kind="loss")  # imports nothing: a dry run comes here too
        if WINNER_SFT in weights_by_name(self.loss, self.loss_weights) and self.sft_weight:
            raise ConfigError(
                f"loss is {names}, sft_weight {self.sft_weight}; use {WINNER_SFT} or sft_weight, not both"
            )
        pairs = [name for name in names if name in PAIRS]
        others = [name for name in names if name not in PAIRS and name != WINNER_SFT]
        if pairs and others:
            raise ConfigError(
                f"{pairs[0]} trains on the best and worst candidate of each row, {others[0]} on all: they cannot be "
                "added. Use losses of one kind"
            )
        for name in OWN_BETA.keys() & set(names):
            if self.beta is None:
                raise ConfigError(f"{name} needs beta, on a scale of its own: {OWN_BETA[name]}")
        if self.protect_winner is not None and not LISTS.isdisjoint(names):
            found = " and ".join(sorted(LISTS & set(names)))
            raise ConfigError(f"protect_winner needs pairs; {found} has none. Use rank_dpo or diffusion_dpo")

    @classmethod
    def model_defaults(cls, model: str) -> dict[str, str]:
        return {"beta": beta_note(stored_prediction(model))}


class RankDPOTrainer(OfflineTrainer):
    """Ranked preference training, loss [P]; see `alignkit.losses.preference` for the equations."""

    args: RankDPOConfig
    needs_reference = True
    candidates = None

    def __init__(self, model: Any, args: RankDPOConfig, train_dataset: Any, *rest: Any, **options: Any) -> None:
        self.needs_reference = args.reference_ema is None  # else no frozen copy in full fine-tuning
        super().__init__(model, args, train_dataset, *rest, **options)
        self._average = self._averaged_reference(args)
        if args.beta is None:
            args.beta = default_beta(self.generator.prediction)
            if self.is_world_process_zero():
                print(beta_note(self.generator.prediction), file=sys.stderr)
        self._objective = _objective(args)
        self._drift = Drift("set protect_winner or sft_weight")
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
        if not PAIRS.isdisjoint(args.losses) and dataset.picked is None:
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
        return self._objective(policy_PK, reference_PK, batch["phi"], **protect)

    # --- the averaged reference ---

    def _averaged_reference(self, args: RankDPOConfig) -> averaging.AveragedWeights | None:
        if args.reference_ema is None:
            return None
        if self.is_fsdp_enabled or (self._peft_config is not None and self._peft_config.lora_dropout):
            raise ConfigError("reference_ema goes with one device or DDP and a LoRA without dropout; leave one out")
        average = averaging.AveragedWeights(self._trainable, args.reference_ema)
        self.add_callback(average)
        return average

    @override
    def reference(self) -> AbstractContextManager[None]:
        return super().reference() if self._average is None else self._average.as_weights()

    @override
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or str(self.args.output_dir))
        if self._average is not None and self.args.should_save and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            self._average.save(folder)

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        has_average = (folder / averaging.FILE).is_file()
        if has_average != (self._average is not None):
            before = "an average of the policy" if has_average else "the base model"
            advice = "set reference_ema as it was" if has_average else "leave reference_ema out"
            raise CheckpointMismatchError(f"'{folder}' was trained with {before} as its reference; {advice}")
        if self._average is not None:
            self._average.load(folder)

    # --- watching ---

    def warn_of(self, health: Mapping[str, float]) -> None:
        self._drift.watch(health, self.state.global_step)


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


def _objective(args: RankDPOConfig) -> Callable[..., LossOutput]:
    """The weighted sum of the configured losses as f(policy_PK, reference_PK, phi_PK); of several, each is logged."""
    options: dict[str, dict[str, Any]] = {
        "rank_dpo": {"rank_source": args.rank_source, "weighting": args.weighting},
        "lair": {"tau": args.lair_tau, "lam": args.lair_lambda},
        "linear_dpo": {"eta": args.linear_eta},
    }
    losses, weights = {}, args.losses
    for name in weights:
        losses[name] = partial(resolve(name, RANKED, kind="loss"), beta=args.beta, **options.get(name, {}))

    def objective(policy_PK: Tensor, reference_PK: Tensor, phi_PK: Tensor, **protect: Tensor) -> LossOutput:
        outputs = {}
        for name, loss in losses.items():
            inputs = (policy_PK, reference_PK) if name in PAIRS else (policy_PK, reference_PK, phi_PK)
            outputs[name] = loss(*inputs, **protect)
        return _weighted_sum(outputs, weights)

    return objective


def _weighted_sum(outputs: Mapping[str, LossOutput], weights: Mapping[str, float]) -> LossOutput:
    """The losses times their weights, added, and their metrics: `loss_NAME` unweighted, shared ones of the first."""
    metrics: dict[str, Tensor] = {}
    for name, output in outputs.items():
        metrics = {**output.metrics, **metrics}
        if len(outputs) > 1:
            metrics[f"loss_{name}"] = output.loss.detach().mean()
    total = sum(weights[name] * output.loss for name, output in outputs.items())
    return replace(next(iter(outputs.values())), loss=total, metrics=metrics)

"""`GuardedTrainer`: what a trainer on rewards does beside its loss - guard, self-check, watch on the scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from typing_extensions import override

from alignkit.protocols import Reward
from alignkit.trainers.base import AlignTrainer
from alignkit.trainers.guard import FALLEN, Guard, WatchConfig, find_guard, watched
from alignkit.trainers.reward_watch import ConstantWatch
from alignkit.trainers.validation import Validation


class GuardedTrainer(AlignTrainer):
    """An AlignTrainer with the guard of its config. `rewards` are those of the loss.

    Raises ConfigError and UnknownNameError for a guard that cannot be used (`alignkit.trainers.guard`).
    """

    args: WatchConfig

    def __init__(
        self,
        model: Any,
        args: WatchConfig,
        *data: Any,
        rewards: Mapping[str, Reward],
        validation: Validation | None = None,
        **options: Any,
    ) -> None:
        self._guard: Guard | None = find_guard(args, validation, rewards)
        self._constant = ConstantWatch(args.constant_spread, args.constant_steps)
        self._is_checked = not args.self_check
        if validation is not None:
            validation = watched(args, validation, rewards, self._guard)
        super().__init__(model, args, *data, validation=validation, **options)
        if self._guard is not None:
            self.add_callback(self._guard)

    def check_gradients(self, batch: Mapping[str, Any]) -> None:
        """Called once, with the first batch and before its loss: raises where a gradient would be wrong."""

    def last_scores(self) -> Mapping[str, Tensor]:
        """By reward, the scores [B] of the last batch."""
        return {}

    @override
    def training_step(self, model: nn.Module, inputs: Any, *rest: Any, **options: Any) -> Tensor:
        """As in Trainer, with `check_gradients` before the first one and the watch on the scores after each."""
        if not self._is_checked:
            self._is_checked = True
            model.train()
            self.check_gradients(inputs)
        loss = super().training_step(model, inputs, *rest, **options)
        self._constant.note(self.state.global_step, self.last_scores())
        return loss

    @override
    def review(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Whether the guard counts the evaluation as fallen."""
        if self._guard is None:
            return {}
        return self._guard.read(self.state.log_history, self.state.global_step, metrics)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As in Trainer; a fallen evaluation is never the best one."""
        return not metrics.get(FALLEN) and super()._determine_best_metric(metrics, trial)

    def _evaluate(self, *inputs: Any, **options: Any) -> dict[str, float]:
        """As in Trainer; the model before the first step becomes a checkpoint and the best one so far."""
        metrics: dict[str, float] = super()._evaluate(*inputs, **options)
        if self._guard is not None and self.state.global_step == 0:
            self._determine_best_metric(metrics, None)
            self._save_checkpoint(self.model, None)
            # Trainer records it only after a step, because it treats step 0 as no step.
            self.state.best_model_checkpoint = str(Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-0")
        return metrics

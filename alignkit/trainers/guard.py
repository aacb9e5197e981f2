"""The guard of a training that maximises rewards: a held-out reward, diversity and motion, read at evaluations.

A reward that is maximised directly may rise while the images get worse. The guard reads another reward on images of
held-out prompts (`alignkit.trainers.validation`). When it falls for several evaluations in a row, Trainer stops, and
loads the checkpoint whose guard was best. The training before its first step is one of those checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from typing_extensions import override

from alignkit.errors import ConfigError, UnknownNameError, nearest
from alignkit.escape import get_logger
from alignkit.protocols import Reward
from alignkit.trainers.config import AlignConfig
from alignkit.trainers.ranges import COUNT, NOT_NEGATIVE, Range, require_in_range
from alignkit.trainers.shared_weights import shared_weights
from alignkit.trainers.validation import Validation

logger = get_logger(__name__)
AUTO = "auto"
FALLEN = "eval_guard_fallen"  # how many evaluations in a row the guard has counted as fallen
_RANGES = {
    "guard_patience": COUNT,
    "guard_margin": NOT_NEGATIVE,
    "guard_floor": Range(0, 1),
    "guard_prompts": NOT_NEGATIVE,
    "constant_spread": NOT_NEGATIVE,
    "constant_steps": COUNT,
}


@dataclass
class WatchConfig(AlignConfig):
    """What is checked while rewards are maximised: the guard, a constant reward, the recomputation of activations."""

    guard: str | None = field(
        default=AUTO,
        metadata={
            "help": "A reward of `validation` that is not trained on: training stops when it falls. auto: the first "
            "one that shares no weights with the trained ones; null: no guard."
        },
    )
    guard_patience: int = field(
        default=2, metadata={"help": "Evaluations in a row with a fallen guard until the stop."}
    )
    guard_margin: float = field(
        default=1.0,
        metadata={
            "help": "Fallen: below its best value by more than this many standard errors of its mean over prompts."
        },
    )
    guard_floor: float = field(
        default=0.5, metadata={"help": "Fallen as well: diversity or motion below this share of that before training."}
    )
    guard_prompts: int = field(
        default=8, metadata={"help": "Validation prompts that get a second image, for the diversity; 0 for none."}
    )
    constant_spread: float = field(
        default=1e-3,
        metadata={"help": "Warn of a reward whose scores have a standard deviation below this; 0 for never."},
    )
    constant_steps: int = field(default=20, metadata={"help": "Number of training steps whose rows are compared."})
    self_check: bool = field(
        default=True,
        metadata={"help": "At the first step compare checkpointed gradients with plain ones, on a small image."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in_range(vars(self), _RANGES)
        if self.guard in (None, AUTO):
            return
        if self.eval_strategy == IntervalStrategy.NO:
            raise ConfigError("guard is read at evaluations: set eval_strategy and eval_steps, or guard: null")
        if self.guard in self.trained_rewards:
            raise ConfigError(f"guard is '{self.guard}', which is trained on; name another reward of `validation`")


class Guard(TrainerCallback):
    """Reads the reward `name` at evaluations, and stops the training after `patience` fallen ones in a row.

    An evaluation is fallen if the reward is more than `margin` standard errors below its best value so far, or if
    diversity or motion is below `floor` times its first value. All is read from the log, so that a resumed training
    goes on counting.
    """

    def __init__(self, name: str, *, patience: int, margin: float, floor: float) -> None:
        self.name, self._patience, self._margin, self._floor = name, patience, margin, floor
        self._reasons: list[str] = []

    def read(self, log: Sequence[Mapping[str, Any]], step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """What the evaluation `metrics` at `step` adds to the log, after the evaluations before `step` in `log`."""
        key = f"eval_guard/{self.name}"
        if key not in metrics:
            return {}
        before = [row for row in log if FALLEN in row and row["step"] < step]
        value, error = metrics[key], metrics["eval_guard_error"]
        best = max((row for row in before if not row[FALLEN]), key=lambda row: row[key], default=None)
        self._reasons = []
        if best is not None and value < best[key] - self._margin * error:
            self._reasons.append(
                f"'{self.name}' is {value:.4g}, at step {best['step']} it was {best[key]:.4g} (error {error:.2g})"
            )
        for name in ("diversity", "motion"):
            now, first = (row.get(f"eval_{name}", 0.0) for row in (metrics, before[0] if before else metrics))
            if now < self._floor * first:
                self._reasons.append(f"{name} is {now:.3g}, at step {before[0]['step']} it was {first:.3g}")
        return {FALLEN: float(before[-1][FALLEN] + 1 if before else 1) if self._reasons else 0.0}

    @override
    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        """Save at every evaluation; stop after `patience` fallen ones."""
        if FALLEN not in metrics:
            return
        control.should_save = True
        fallen = int(metrics[FALLEN])
        if fallen < self._patience:
            return
        control.should_training_stop = True
        if state.is_world_process_zero:
            reasons = "; ".join(self._reasons)
            text = "guard: training stops at step %d of %d, after %d fallen evaluations: %s"
            logger.warning(text, state.global_step, state.max_steps, fallen, reasons)

    @override
    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say which checkpoint the result is."""
        best = state.best_model_checkpoint
        if best is None or not state.is_world_process_zero:
            return
        logger.info("guard: '%s' was best (%.4g) in '%s', which is the result", self.name, state.best_metric, best)
        if state.best_global_step == 0:
            logger.warning(
                "guard: '%s' was best (%.4g) before the first step, so the result is the model as it was. Train with a "
                "lower learning_rate, other rewards or kl_weight, or name another guard",
                self.name,
                state.best_metric,
            )


def find_guard(args: WatchConfig, validation: Validation | None, trained: Mapping[str, Reward]) -> Guard | None:
    """The guard that `args` asks for; None, with a warning unless that was asked for, where there is none.

    `trained` are the rewards of the loss. Sets the keys of `args` by which Trainer keeps and loads the best checkpoint.
    Raises UnknownNameError for a name that `validation` does not have, ConfigError for a reward that shares weights
    with a trained one, and for other settings of the best checkpoint.
    """
    if args.guard is None:
        return None
    name = _automatic(args, validation, trained) if args.guard == AUTO else _named(args.guard, validation, trained)
    if name is None:
        return None
    metric = f"eval_guard/{name}"
    if args.metric_for_best_model not in (None, "loss", metric):
        raise ConfigError(
            f"metric_for_best_model is '{args.metric_for_best_model}', but the guard '{name}' chooses the best "
            "checkpoint: leave it out, or set guard: null"
        )
    args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = True, metric, True
    args.eval_on_start = True
    if args.save_strategy in (SaveStrategy.NO, SaveStrategy.BEST):
        args.save_strategy, args.save_steps = SaveStrategy(str(args.eval_strategy.value)), args.eval_steps
    return Guard(name, patience=args.guard_patience, margin=args.guard_margin, floor=args.guard_floor)


def _named(name: str, validation: Validation | None, trained: Mapping[str, Reward]) -> str:
    held_out = validation.rewards if validation else {}
    if name not in held_out:
        raise UnknownNameError(f"guard names '{name}', which is none of `validation.rewards`.{nearest(name, held_out)}")
    relative = _relative(held_out[name], trained)
    if relative is not None:
        raise ConfigError(
            f"guard '{name}' shares weights with the trained reward '{relative}', so it makes the same errors; "
            "name a reward of another model, or set guard: null"
        )
    return name


def _relative(reward: Reward, trained: Mapping[str, Reward]) -> str | None:
    """The name of the first trained reward that is `reward` or shares weights with it."""
    return next((name for name, one in trained.items() if one is reward or shared_weights(reward, one)), None)


def _automatic(args: WatchConfig, validation: Validation | None, trained: Mapping[str, Reward]) -> str | None:
    held_out = validation.rewards if validation and args.eval_strategy != IntervalStrategy.NO else {}
    others = (name for name in held_out if name not in trained and _relative(held_out[name], trained) is None)
    found = next(others, None)
    if found is None and args.process_index == 0:
        logger.warning(
            "no guard: a reward that is maximised may rise while the images get worse. Set eval_strategy, and under "
            "`validation.rewards` a reward that shares no weights with the trained ones; or set guard: null"
        )
    return found


def watched(
    args: WatchConfig, validation: Validation, trained: Mapping[str, Reward], guard: Guard | None
) -> Validation:
    """`validation` with the trained rewards on 8-bit media and with what the guard reads."""
    if guard is None:
        return replace(validation, trained=trained)
    return replace(validation, trained=trained, guard=guard.name, repeated=args.guard_prompts)

"""Which numbers a trainer's config takes, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Range:
    """Finite numbers from `low` to `high`; `includes_low` and `includes_high` say whether the ends belong to it."""

    low: float
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.includes_low else value > self.low
        below = value <= self.high if self.includes_high else value < self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        """`at least 1 and finite`, `positive and finite`, `at least 0 and below 1`."""
        low = f"{'at least' if self.includes_low else 'above'} {self.low:g}"
        high = f"{'at most' if self.includes_high else 'below'} {self.high:g}"
        return f"{'positive' if low == 'above 0' else low} and {high if math.isfinite(self.high) else 'finite'}"


COUNT = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, includes_low=False)
DECAY = Range(0, 1, includes_high=False)

LENGTHS = {"max_steps": COUNT, "num_train_epochs": POSITIVE}
# Keys of transformers.TrainingArguments and of AlignConfig.
TRAINER_RANGES = {
    "learning_rate": NOT_NEGATIVE,
    "adam_beta1": DECAY,
    "adam_beta2": DECAY,
    "adam_epsilon": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "dataloader_num_workers": NOT_NEGATIVE,
    "logging_steps": POSITIVE,
    "save_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "eval_delay": NOT_NEGATIVE,
    "save_total_limit": COUNT,
    "ddp_timeout": POSITIVE,
}


def require_in_range(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """ConfigError naming the first of `ranges` whose number in `values` is outside it, or NaN; None passes."""
    for name, allowed in ranges.items():
        value = values[name]
        if value is not None and value not in allowed:
            raise ConfigError(f"{name} is {value}; it must be {allowed}")


def weights_by_name(loss: str | Sequence[str], weights: Sequence[float] | None) -> dict[str, float]:
    """The weight of each loss by its name, of the keys `loss` (a name or several) and `loss_weights` (None: 1 each).

    Raises ConfigError for no name, one twice, another number of weights than names, or a weight that is not positive.
    """
    names = [loss] if isinstance(loss, str) else list(loss)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"loss is {names}; name at least one, each once")
    if weights is not None and len(weights) != len(names):
        raise ConfigError(f"loss_weights are {weights} for the losses {names}; give one for each")
    by_name = dict(zip(names, [1.0] * len(names) if weights is None else weights, strict=True))
    keys = {f"loss_weights, for {name}": weight for name, weight in by_name.items()}
    require_in_range(keys, dict.fromkeys(keys, POSITIVE))
    return by_name

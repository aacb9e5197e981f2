"""What other sections of a config must know of the trainer's keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from alignkit.errors import ConfigError, UnknownNameError, nearest

if TYPE_CHECKING:
    from alignkit.commands.specs import ValidationConfig


def trained_frames(args: object) -> int | None:
    """`num_frames` of a trainer's config; None where its method has none, or its keys are not known (a dry run)."""
    return None if isinstance(args, Mapping) else vars(args).get("num_frames")


def trained_rewards(args: object) -> Sequence[str]:
    """The names of the rewards that a trainer's config trains on; none where its keys are not known (a dry run)."""
    return () if args is None or isinstance(args, Mapping) else args.trained_rewards  # type: ignore[attr-defined]


def require_guard(args: object, validation: ValidationConfig | None) -> None:
    """UnknownNameError for a trainer's `guard` that is none of `validation.rewards`.

    ConfigError for a `metric_for_best_model` beside a guard, which chooses the best checkpoint itself.
    """
    given = {} if args is None or isinstance(args, Mapping) else vars(args)
    guard, known = given.get("guard"), validation.rewards if validation else ()
    if guard not in (None, "auto") and guard not in known:
        raise UnknownNameError(f"guard names '{guard}', which is none of `validation.rewards`.{nearest(guard, known)}")
    metric = given.get("metric_for_best_model") or "loss"
    if guard is not None and set(known) - set(trained_rewards(args)) and not metric.startswith(("loss", "eval_guard/")):
        raise ConfigError(
            f"metric_for_best_model is '{metric}', but the guard chooses the best checkpoint: leave it out, or set "
            "guard: null"
        )

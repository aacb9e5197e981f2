"""Which steps of a chain are conditioned by tuned text encoders or belong to a mixture; the base has the others.

TextCraftor (arXiv 2403.18978) uses the tuned embedding in the last 15 of 25 steps, where it changes the look of an
image and leaves its layout alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from alignkit.diffusion.estimators import Estimator
from alignkit.errors import ConfigError

_FORM = re.compile(r"all|(first|last) [1-9]\d*%?|window \d+%?(-\d+%?)?")


def fixed_steps(steps: str, count: int) -> range | None:
    """The steps that a form of `estimators.Estimator` names in a chain of `count`; None for one that draws them.

    Raises ConfigError for steps that such a chain does not have.
    """
    if not _FORM.fullmatch(steps):
        return None
    active = Estimator(steps).draw(count).steps.active
    return range(count) if active is None else range(min(active), max(active) + 1)


@dataclass(frozen=True)
class TunedSteps:
    """The steps [start, stop) of a chain, all by default, and whether their null condition is tuned too.

    Bounds in [0, 1] are shares of the chain: N steps have those from round(start N) to round(stop N) - 1. Other bounds
    are numbers of steps, first 0. null: whether the null condition of guidance is the tuned encoders' in these steps;
    else the base encoders'.

    Raises ConfigError unless 0 <= start < stop, and for numbers of steps that are not whole.
    """

    start: float = 0.0
    stop: float = 1.0
    null: bool = True

    def __post_init__(self) -> None:
        is_whole = self.is_share or (float(self.start).is_integer() and float(self.stop).is_integer())
        if not 0 <= self.start < self.stop or not is_whole:
            raise ConfigError(
                f"window is [{self.start:g}, {self.stop:g}); give start and stop with 0 <= start < stop: shares of the "
                "chain, at most 1, or whole numbers of steps"
            )

    def __str__(self) -> str:
        steps = "all steps" if self.bounds is None else f"the steps [{self.start:g}, {self.stop:g})"
        return steps if self.null else f"{steps} without the null condition"

    @classmethod
    def between(cls, bounds: Sequence[float] | None, *, null: bool = True) -> TunedSteps:
        """Those of two bounds; None for all steps. Raises ConfigError for another number of bounds."""
        if bounds is None:
            return cls(null=null)
        if len(bounds) != 2:
            raise ConfigError(f"window is {list(bounds)}; give two numbers, start and stop")
        return cls(float(bounds[0]), float(bounds[1]), null)

    @classmethod
    def of(cls, steps: str, count: int, *, null: bool = True) -> TunedSteps:
        """Those of `all`, `first K`, `last K` or `window A-B` in a chain of `count` steps, as shares of any chain.

        K is a count or a percentage. Raises ConfigError for another form, and for a window without a step or outside of
        the chain.
        """
        found = fixed_steps(steps, count)
        if found is None:
            raise ConfigError(
                f"tuned steps are '{steps}'; give all, last K, first K or window A-B with at least one step, K a count "
                "or a percentage: last 60%"
            )
        return cls(found.start / count, found.stop / count, null)

    @property
    def is_share(self) -> bool:
        """Whether the bounds are shares of the chain."""
        return self.stop <= 1

    @property
    def bounds(self) -> list[float] | None:
        """What `between` takes: None for all steps."""
        return None if (self.start, self.stop) == (0, 1) else [self.start, self.stop]

    def on(self, count: int) -> range:
        """Their indices in a chain of `count` steps. Raises ConfigError where it has none of them."""
        scale = count if self.is_share else 1
        found = range(round(self.start * scale), min(count, round(self.stop * scale)))
        if not found:
            raise ConfigError(
                f"the window [{self.start:.3g}, {self.stop:.3g}) holds none of the {count} steps; widen it or sample "
                "with more steps"
            )
        return found


ALL_STEPS = TunedSteps()

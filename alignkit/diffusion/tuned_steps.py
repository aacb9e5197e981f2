"""Which steps of a chain are conditioned by tuned text encoders; the base encoders condition the others.

TextCraftor (arXiv 2403.18978) uses the tuned embedding in the last 15 of 25 steps, where it changes the look of an
image and leaves its layout alone.
"""

from __future__ import annotations

import re
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
    """The steps as shares of a chain of any length, and whether their null condition is tuned too.

    A chain of N steps has the steps from round(start N) to round(stop N) - 1. null: whether the null condition of
    guidance is the tuned encoders' in these steps; else the base encoders'.

    Raises ConfigError unless 0 <= start < stop <= 1.
    """

    start: float = 0.0
    stop: float = 1.0
    null: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= 1:
            raise ConfigError(f"tuned steps from {self.start} to {self.stop}; give shares, 0 <= start < stop <= 1")

    @classmethod
    def of(cls, steps: str, count: int, *, null: bool = True) -> TunedSteps:
        """Those of `all`, `first K`, `last K` or `window A-B` in a chain of `count` steps, K a count or a percentage.

        Raises ConfigError for another form, and for a window without a step or outside of the chain.
        """
        found = fixed_steps(steps, count)
        if found is None:
            raise ConfigError(
                f"tuned steps are '{steps}'; give all, last K, first K or window A-B with at least one step, K a count "
                "or a percentage: last 60%"
            )
        return cls(found.start / count, found.stop / count, null)

    def on(self, count: int) -> range:
        """Their indices on a grid of `count` steps. Raises ConfigError where it has none of them."""
        found = range(round(self.start * count), round(self.stop * count))
        if not found:
            raise ConfigError(
                f"the tuned steps, from {self.start:.3g} to {self.stop:.3g} of a chain, are none of {count} steps; "
                "sample with more steps"
            )
        return found

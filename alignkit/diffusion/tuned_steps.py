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


def is_fixed(steps: str) -> bool:
    """Whether these are the same steps in every chain of a length: `random K` and K from a span are drawn."""
    return bool(_FORM.fullmatch(steps))


@dataclass(frozen=True)
class TunedSteps:
    """The steps, for chains of any length, and whether their null condition is tuned too.

    steps: `all`, `first K`, `last K` with K a count or a percentage of the chain, or `window A-B`, as in
        `estimators.Estimator`.
    null: whether the null condition of guidance is the tuned encoders' in these steps; else the base encoders'.

    Raises ConfigError for another form, for a window of zero steps among them.
    """

    steps: str = "all"
    null: bool = True

    def __post_init__(self) -> None:
        if not is_fixed(self.steps):
            raise ConfigError(
                f"tuned steps are '{self.steps}'; give all, last K, first K or window A-B with at least one step, "
                "K a count or a percentage: last 60%"
            )

    def on(self, count: int) -> frozenset[int]:
        """Their indices on a grid of `count` steps. Raises ConfigError for steps that it does not have."""
        active = Estimator(self.steps).draw(count).steps.active
        return frozenset(range(count)) if active is None else active

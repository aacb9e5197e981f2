"""How the changes of several members become one change: linear (rewarded soups, WiSE-FT), TIES, DARE; greedy soups.

All work on true changes of a weight (tuned - base, or the product of a LoRA's factors), one weight at a time.
PEFT's functions are used where they are right. `peft.utils.merge_utils.prune` is: it keeps the largest elements, or
random ones with the rescaling of DARE. Measured wrong for weights that sum to one, and therefore not used:

- `ties` divides by the number of members that agree instead of by the sum of their weights: two equal members at 0.5
  and 0.5 give half the member, and weights (1, 0) give half the first. Signs are elected without the weights, so a
  member of weight 0 votes. Here, as in mergekit, signs are elected by weighted changes and the mean is weighted.
- `add_weighted_adapter` applies every method to the factors A and B, not to their product.

mergekit itself reads language models and its own configs, so it is no dependency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from peft.utils.merge_utils import prune
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.seeds import derive_seed

Method = Literal["linear", "wise_ft", "ties", "dare"]
CLOSE = 1e-6  # by how much a sum of weights may miss 1: that of 0.1 + 0.2 + 0.7 does


@dataclass(frozen=True, slots=True)
class Merge:
    """How changes are combined.

    method: linear is sum_i w_i change_i; wise_ft the same of one member, w its strength (Wortsman et al. 2022); ties
        prunes each change to its largest elements, elects a sign for each element and takes the weighted mean of those
        that have it (Yadav et al. 2023); dare drops elements at random, divides the others by `density` and sums (Yu
        et al. 2024).
    density: the share of elements that ties and dare keep, in (0, 1].
    seed: fixes which elements dare keeps.
    """

    method: Method = "linear"
    density: float = 1.0
    seed: int = 0

    @property
    def is_linear(self) -> bool:
        """Whether the result is the weighted sum of the changes."""
        return self.method in ("linear", "wise_ft")

    def check(self, weights: Sequence[float], *, any_sum: bool) -> None:
        """ConfigError for weights or a density that the method cannot take; see `require_weights`."""
        require_weights(weights, any_sum=any_sum or self.method == "wise_ft")
        if not 0 < self.density <= 1:
            raise ConfigError(f"density is {self.density}; it must lie in (0, 1]")
        if self.is_linear and self.density != 1:
            raise ConfigError(f"density is {self.density}, which {self.method} does not use; leave it out")
        if self.method == "wise_ft" and len(weights) != 1:
            raise ConfigError(f"wise_ft takes one member and its strength, not {len(weights)}; use linear for several")
        if self.method == "ties" and min(weights) < 0:
            raise ConfigError(f"ties takes the weighted mean of changes, so no weight may be negative: {min(weights)}")


def require_weights(weights: Sequence[float], *, any_sum: bool) -> None:
    """ConfigError for no weights, one that is not finite, and, without `any_sum`, a sum that is not 1."""
    if not weights:
        raise ConfigError("a mixture needs at least one member with a weight")
    wrong = [weight for weight in weights if not math.isfinite(weight)]
    if wrong:
        raise ConfigError(f"a weight is {wrong[0]}; give finite numbers")
    total = math.fsum(weights)
    if not any_sum and abs(total - 1) > CLOSE:
        raise ConfigError(
            f"the weights {list(weights)} sum to {total:g}, not to 1, so the mixture would be stronger or weaker than "
            "its members; correct them, give the rest to `base`, or allow it with any_sum: true"
        )


def combine(changes: Sequence[Callable[[], Tensor]], weights: Sequence[float], merge: Merge, name: str) -> Tensor:
    """The merged change, float64, of the weight `name`; each of `changes` computes one member's when it is called.

    Members of weight 0 are not computed. The sum of the weights is a scale in all methods.
    """
    used = [(number, change) for number, change in enumerate(changes) if weights[number] != 0]

    def pruned(number: int, change: Callable[[], Tensor]) -> Tensor:
        return _pruned(change().double(), merge, f"{name} {number}")

    if merge.method != "ties":
        return _sum((pruned(number, change), weights[number]) for number, change in used)
    sign = torch.where(_sum((pruned(*one), weights[one[0]]) for one in used) >= 0, 1.0, -1.0)
    total, share = torch.zeros_like(sign, dtype=torch.float64), torch.zeros_like(sign, dtype=torch.float64)
    for number, change in used:
        part = pruned(number, change)
        agrees = part.sign() == sign
        total.add_(part * agrees, alpha=weights[number])
        share.add_(agrees, alpha=weights[number])
    return math.fsum(weights) * total / share.masked_fill_(share == 0, 1.0)


def _sum(terms: Iterable[tuple[Tensor, float]]) -> Tensor:
    total: Tensor | None = None
    for term, weight in terms:
        total = weight * term if total is None else total.add_(term, alpha=weight)
    return torch.zeros((), dtype=torch.float64) if total is None else total


def _pruned(change: Tensor, merge: Merge, key: str) -> Tensor:
    """PEFT's function draws from torch's global generator, so it is seeded by member and name, and put back."""
    if merge.density >= 1:
        return change
    if merge.method == "ties":
        return prune(change, merge.density, "magnitude")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("dare", merge.seed, key))
        return prune(change, merge.density, "random", rescale=True)


def greedy_weights(count: int, score: Callable[[Sequence[float]], float]) -> list[float]:
    """The weights of a greedy soup of `count` members (Wortsman et al. 2022, "Model soups", recipe 1).

    Members are taken in the order of their own scores; each joins the uniform mean of those taken before and stays only
    if the score rises strictly. `score(weights)`, higher is better, is called 2 count - 1 times with weights [count]
    that sum to 1; it must be held out from what the result is judged by. Raises ConfigError for a score that is not
    finite.
    """

    def uniform(members: Sequence[int]) -> list[float]:
        return [1 / len(members) if number in members else 0.0 for number in range(count)]

    def judged(members: Sequence[int]) -> float:
        value = score(uniform(members))
        if not math.isfinite(value):
            raise ConfigError(f"greedy soup: the score of members {list(members)} is {value}")
        return value

    if count < 1:
        raise ConfigError("greedy soup: there are no members")
    alone = [judged([number]) for number in range(count)]
    order = sorted(range(count), key=lambda number: -alone[number])
    taken, best = order[:1], alone[order[0]]
    for number in order[1:]:
        reached = judged([*taken, number])
        if reached > best:
            taken, best = [*taken, number], reached
    return uniform(taken)

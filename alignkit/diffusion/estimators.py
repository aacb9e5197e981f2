"""Estimators of the gradient of a reward through a denoising chain, as settings of one engine (`generators.rollout`).

An estimator says which steps of a chain of N steps carry gradients, how much of the gradient crosses a step's network,
where the chain may end early, and how many further noise samples of the last step are scored. `ESTIMATORS` holds the
published ones. What is drawn (K of AlignProp, random steps, the early end) is drawn once for each batch from a key.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from alignkit.diffusion.steps import Steps
from alignkit.errors import ConfigError, nearest
from alignkit.seeds import derive_seed

_SPAN = re.compile(r"(\d+)(%?)(?:-(\d+)(%?))?")
_FORMS = "all, last K, first K, random K, even K or window A-B"


@dataclass(frozen=True)
class ChainPlan:
    """What one batch does: the chain ends after step `end`, and its steps carry gradients as `steps` says.

    noise_samples: how often the result is noised again to the last step's noise level and denoised with gradients.
    """

    steps: Steps
    end: int
    noise_samples: int = 0


@dataclass(frozen=True)
class Estimator:
    """Settings of one estimator.

    steps: `all`; `last K`, `first K`, `random K` (without replacement), `even K` (equally spaced from a drawn start);
        `window A-B`, the indices A to B. K is a count, a percentage of the chain, or a span of either (`1-100%`) from
        which it is drawn uniformly. Bounds of a window in percent are shares of the chain: `window 0%-40%`.
    coupling: of the gradient at a step's input, in [0, 1]; see `alignkit.diffusion.steps`.
    unconditional: whether the unconditional call of classifier-free guidance carries gradients too.
    early_end: a window from which the index of the chain's last step is drawn; that step goes straight to the clean
        latents. Empty: the chain is run to its end.
    noise_samples: further noise samples of the last step.
    late_bias: b of `random K`: step i is drawn with weight (i + 1)^b.
    source: where it was published.

    Raises ConfigError for a form or a number that is none of these.
    """

    steps: str
    coupling: float = 1.0
    unconditional: bool = True
    early_end: str = ""
    noise_samples: int = 0
    late_bias: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        kind, _, amount = self.steps.partition(" ")
        if kind not in _KINDS or bool(_SPAN.fullmatch(amount)) == (kind == "all"):
            raise ConfigError(f"steps with gradients are '{self.steps}'; give {_FORMS}")
        if self.early_end and not _SPAN.fullmatch(self.early_end):
            raise ConfigError(f"early_end is '{self.early_end}'; give an index or a window such as 30-39 or 75%-100%")
        if self.noise_samples < 0:
            raise ConfigError(f"noise_samples is {self.noise_samples}; it must be at least 0")
        Steps(frozenset(), self.coupling)  # checks the coupling

    def draw(self, count: int, *key: int | str) -> ChainPlan:
        """The plan of a batch for a grid of `count` steps; equal keys give equal plans, in every process.

        Raises ConfigError for steps that such a grid does not have.
        """
        rng = random.Random(derive_seed("estimator", *key))
        ends = _indices(self.early_end or f"{count - 1}", count, "early_end")
        end = rng.choice(ends)
        self._require_steps(ends[0] + 1)
        kind, _, amount = self.steps.partition(" ")
        active = _KINDS[kind](amount, end + 1, rng, self.late_bias)
        return ChainPlan(Steps(active, self.coupling, self.unconditional), end, self.noise_samples)

    def _require_steps(self, shortest: int) -> None:
        """ConfigError where the shortest chain that may be drawn lacks steps that carry gradients."""
        kind, _, amount = self.steps.partition(" ")
        if kind == "window":
            _indices(amount, shortest, f"steps with gradients, '{self.steps}'")
        elif kind != "all":
            _counts(amount, shortest, self.steps)


def _indices(text: str, count: int, what: str) -> range:
    """The step indices of a span: numbers as they are, percentages as shares of a chain of `count` steps."""
    low, low_share, high, high_share = _parts(text)
    first = math.floor(low * count / 100) if low_share else low
    last = math.ceil(high * count / 100) - 1 if high_share else high
    if low_share and low == high:
        last = first = min(first, count - 1)
    if not 0 <= first <= last < count:
        raise ConfigError(f"{what} is '{text}': steps {first} to {last}; the chain has steps 0 to {count - 1}")
    return range(first, last + 1)


def _counts(text: str, count: int, what: str) -> range:
    """The numbers of steps that a span stands for in a chain of `count` steps."""
    low, low_share, high, high_share = _parts(text)
    least = max(1, round(low * count / 100)) if low_share else low
    most = max(1, round(high * count / 100)) if high_share else high
    if not 1 <= least <= most <= count or high == 0:
        raise ConfigError(f"steps with gradients are '{what}'; the chain has {count} steps, so K is from 1 to {count}")
    return range(least, most + 1)


def _parts(text: str) -> tuple[int, bool, int, bool]:
    """(low, whether in percent, high, whether in percent) of a span; a single number is both ends."""
    match = _SPAN.fullmatch(text)
    if match is None:
        raise ConfigError(f"'{text}' is no span; give a number, a percentage, or two of them such as 2-5 or 75%-100%")
    low, low_unit, high, high_unit = match.groups()
    return int(low), bool(low_unit), int(high or low), bool(high_unit if high else low_unit)


# --- the forms: (amount, steps of the chain, random numbers, late bias) -> active indices ---------------------------

_Form = Callable[[str, int, random.Random, float], "frozenset[int] | None"]


def _last(amount: str, count: int, rng: random.Random, _: float) -> frozenset[int]:
    return frozenset(range(count - rng.choice(_counts(amount, count, f"last {amount}")), count))


def _first(amount: str, count: int, rng: random.Random, _: float) -> frozenset[int]:
    return frozenset(range(rng.choice(_counts(amount, count, f"first {amount}"))))


def _random(amount: str, count: int, rng: random.Random, late_bias: float) -> frozenset[int]:
    """K steps without replacement, step i with weight w = (i + 1)^b: the K largest u^(1/w) (Efraimidis & Spirakis)."""
    size = rng.choice(_counts(amount, count, f"random {amount}"))
    keys = [rng.random() ** (1 / (index + 1) ** late_bias) for index in range(count)]
    return frozenset(sorted(range(count), key=keys.__getitem__)[count - size :])


def _even(amount: str, count: int, rng: random.Random, _: float) -> frozenset[int]:
    size = rng.choice(_counts(amount, count, f"even {amount}"))
    stride = count // size
    start = rng.randrange(count - (size - 1) * stride)
    return frozenset(range(start, start + size * stride, stride))


def _window(amount: str, count: int, _: random.Random, __: float) -> frozenset[int]:
    return frozenset(_indices(amount, count, f"steps with gradients, 'window {amount}'"))


_KINDS: dict[str, _Form] = {
    "all": lambda *_: None,
    "last": _last,
    "first": _first,
    "random": _random,
    "even": _even,
    "window": _window,
}

# --- the table ------------------------------------------------------------------------------------------------------

ESTIMATORS = {
    "exact": Estimator("all", source="the whole chain, nothing left out"),
    "refl": Estimator(
        "last 1",
        early_end="75%-100%",  # steps 30 to 39 of 40
        source="ReFL: ImageReward, Xu et al. 2023, arXiv 2304.05977",
    ),
    "draft": Estimator("last 1", source="DRaFT-K with K = 1: Clark et al. 2023, arXiv 2309.17400"),
    "draft-3": Estimator("last 3", source="DRaFT-K with K = 3: Clark et al. 2023, arXiv 2309.17400"),
    "draft-lv": Estimator(
        "last 1",
        noise_samples=2,  # beside the chain's own last step
        source="DRaFT-LV: Clark et al. 2023, arXiv 2309.17400, section 4",
    ),
    "alignprop": Estimator(
        "last 1-100%",  # K is uniform, drawn before the chain
        source="AlignProp, randomised truncation: Prabhudesai et al. 2023, arXiv 2310.03739",
    ),
    "drtune": Estimator(
        "even 3",
        coupling=0.0,
        early_end="60%-100%",
        source="DRTune: Wu et al. 2024, arXiv 2405.00760; the numbers are those of FlowBP's reimplementation",
    ),
    "first-step": Estimator(
        "first 1",  # the paper scores the one-step prediction of a few-step model: that is early_end "0"
        source="first step: VLM-as-Teacher, 2026, arXiv 2606.02564",
    ),
    "flowbp-sparse": Estimator(
        "random 3",
        coupling=0.0,
        late_bias=2.0,
        source="FlowBP-Sparse: 2026, arXiv 2606.11075, settings for FLUX.1; without its scalar gradient rescale",
    ),
}


def find_estimator(name: str) -> Estimator:
    """The estimator `name` of the table. Raises ConfigError with the nearest name for any other."""
    if name not in ESTIMATORS:
        raise ConfigError(f"estimator is '{name}', which is unknown.{nearest(name, ESTIMATORS)}")
    return ESTIMATORS[name]

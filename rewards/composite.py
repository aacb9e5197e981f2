"""Several rewards as one: each is normalised, then they are summed, vote, or are averaged less their deviation.

Not here: choosing weights. Members check media themselves; the composite checks only that they have one modality.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alignkit.errors import ConfigError, DataError, MissingFileError, nearest
from alignkit.protocols import Dependent, Reward, as_scores
from alignkit.records import Prompt, Scores
from alignkit.resolve import construct, resolve
from alignkit.storage import write_text
from rewards import REWARDS
from rewards.models.media import check_media

if TYPE_CHECKING:
    from torch import Tensor

MODES = ("sum", "vote", "mean_std")


@dataclass(frozen=True, slots=True)
class Member:
    """A reward in a composite.

    weight: its share of the total; with 0 the score is only reported.
    hinge: min(r, hinge) replaces r, in the reward's own units: a higher score adds nothing (ReFL's max(0, 2 - r) of
        arXiv 2304.05977, with the opposite sign).
    """

    reward: Reward
    weight: float = 1.0
    hinge: float | None = None


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of a stream of scores, mergeable in any order (Chan et al. 1979)."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Moments:
        """Moments of `values`, in float64."""
        mean = math.fsum(values) / max(len(values), 1)
        return cls(len(values), mean, math.fsum((value - mean) ** 2 for value in values))

    def merge(self, other: Moments) -> Moments:
        """Moments of both streams together."""
        count = self.count + other.count
        if count == 0:
            return self
        step = other.mean - self.mean
        mean = self.mean + step * other.count / count
        return Moments(count, mean, self.m2 + other.m2 + step**2 * self.count * other.count / count)

    @property
    def std(self) -> float:
        """Population standard deviation; 1 while all values are equal, so that dividing by it changes nothing."""
        return math.sqrt(self.m2 / self.count) if self.m2 > 0 else 1.0

    def __call__(self, scores: Tensor) -> Tensor:
        """(r - mean) / std."""
        return (scores - self.mean) / self.std


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Quantile of a score among stored ones, in (0, 1): the empirical distribution function, linear between values.

    Equal values have their mean rank. Beyond the smallest and the largest value it is constant, without gradient.
    """

    values: tuple[float, ...]
    levels: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """The distribution of `values`, finite and not all equal."""
        if not all(map(math.isfinite, values)):
            raise ConfigError("reference: a value is NaN or infinite; leave it out")
        counts = {value: len(list(group)) for value, group in groupby(sorted(map(float, values)))}
        if len(counts) < 2:
            raise ConfigError(f"reference: {len(counts)} different values; a distribution needs at least 2")
        below, levels = 0, []
        for count in counts.values():
            levels.append((below + count / 2) / len(values))
            below += count
        return cls(tuple(counts), tuple(levels))

    def __call__(self, scores: Tensor) -> Tensor:
        """The quantile of each score, computed in float64 so that close values stay different."""
        import torch

        values, levels = (scores.new_tensor(side, dtype=torch.float64) for side in (self.values, self.levels))
        inside = scores.double().clamp(self.values[0], self.values[-1])
        right = torch.searchsorted(values, inside.detach()).clamp(1, len(values) - 1)
        share = (inside - values[right - 1]) / (values[right] - values[right - 1])
        return (levels[right - 1] + share * (levels[right] - levels[right - 1])).to(scores.dtype)


class Composite:
    """One score [B] from the members' scores [B]; `parts` has each member's raw score, and its parts as 'member/part'.

    The total is on the device of the media and in the widest dtype of the members. It is NaN where a member of weight
    other than 0 is NaN or infinite. Rows depend on each other in a vote, and on earlier calls while running statistics
    are updated; then `dependence` gives the reason, and stages that split media into batches refuse the composite.

    members: name -> a reward, a Member, or {reward: a name of the table or 'package.module:attribute', options, weight,
        hinge}. CLIP rewards with equal vision weights share one vision tower from then on.
    mode: `sum` of weight x score; `vote`, the weighted share of members that prefer this medium, averaged over the
        other media of the same prompt in the batch (a tie counts half; media without a score are not compared), so
        each prompt needs two media; `mean_std`, weighted mean - kappa x standard deviation over the members, which is
        lower where they disagree.
    normalise: `running` standardises each member by all its scores of earlier calls, then adds the finite scores of
        this call (not after `eval()`); `reference` normalises by fixed numbers. Statistics are of raw scores; the
        hinged score is standardised.
    reference: member -> {mean, std}, or {values: scores of a reference distribution} for quantiles.
    state: a file that `save` wrote, for `running`.
    update: False is `eval()` from the start.

    Raises ConfigError for contradicting options or members, DataError for a vote on a prompt with a single medium.
    """

    def __init__(
        self,
        members: Mapping[str, Reward | Member | Mapping[str, Any]],
        *,
        mode: Literal["sum", "vote", "mean_std"] = "sum",
        kappa: float = 1.0,
        normalise: Literal["running", "reference"] | None = None,
        reference: Mapping[str, Mapping[str, Any]] | None = None,
        state: str | None = None,
        update: bool = True,
        name: str = "composite",
    ) -> None:
        self.name, self._mode, self._kappa = name, mode, kappa
        self._members = {key: _member(key, given) for key, given in members.items()}
        self._counted = {key: member for key, member in self._members.items() if member.weight}
        self._running = {key: Moments() for key in self._members} if normalise == "running" else {}
        self._fixed = {key: _fixed(key, given) for key, given in (reference or {}).items()}
        self._is_updating = update
        self._require(normalise, reference, state)
        if "rewards.models.clip" in sys.modules:  # no member has a CLIP tower to share without it
            from rewards.models.clip import share_vision

            share_vision(member.reward for member in self._members.values())
        if state is not None:
            self.load(state)
        self._declare()

    def _require(self, normalise: str | None, reference: Mapping[str, Any] | None, state: str | None) -> None:
        if self._mode not in MODES:
            raise ConfigError(f"{self.name}: mode '{self._mode}' is unknown.{nearest(self._mode, MODES)}")
        if normalise not in (None, "running", "reference"):
            raise ConfigError(f"{self.name}: normalise '{normalise}' is unknown; running, reference or none")
        if not self._counted:
            raise ConfigError(f"{self.name}: no member has a weight; nothing would be scored")
        if self._mode != "sum" and any(member.weight < 0 for member in self._members.values()):
            raise ConfigError(f"{self.name}: a negative weight has no meaning in mode '{self._mode}'")
        if (reference is not None) != (normalise == "reference"):
            raise ConfigError(f"{self.name}: `reference` and normalise: reference belong together")
        if reference is not None and set(reference) != set(self._members):
            raise ConfigError(f"{self.name}: reference names {sorted(reference)}, members are {sorted(self._members)}")
        if state is not None and normalise != "running":
            raise ConfigError(f"{self.name}: `state` is for normalise: running")
        modalities = {key: member.reward.modality for key, member in self._members.items()}
        if len(set(modalities.values())) > 1:
            raise ConfigError(f"{self.name}: members judge different media: {modalities}")

    def _declare(self) -> None:
        every, counted = ([m.reward for m in group.values()] for group in (self._members, self._counted))
        self.modality = every[0].modality
        self.needs_prompt = any(reward.needs_prompt for reward in every)
        self.differentiable = self._mode != "vote" and all(reward.differentiable for reward in counted)
        self.comparable_across_prompts = self._mode != "vote" and all(r.comparable_across_prompts for r in counted)
        self.licence = "; ".join(dict.fromkeys(reward.licence for reward in every))
        self.source = "; ".join(dict.fromkeys(reward.source for reward in every))
        self.native_range = self._range()

    def _range(self) -> tuple[float, float]:
        """Range that members, hinges and fixed normalisation allow; unbounded with running statistics."""
        if self._mode == "vote":
            return 0.0, 1.0
        ends = [self._ends(key, member) for key, member in self._counted.items()]
        weights = [member.weight for member in self._counted.values()]
        if self._mode == "sum":
            sides = [sorted(weight * end for end in pair) for weight, pair in zip(weights, ends, strict=True)]
            return math.fsum(side[0] for side in sides), math.fsum(side[1] for side in sides)
        low, high = (math.fsum(w * pair[i] for w, pair in zip(weights, ends, strict=True)) for i in (0, 1))
        widest = (max(pair[1] for pair in ends) - min(pair[0] for pair in ends)) / 2  # the largest possible deviation
        off = self._kappa * widest if self._kappa else 0.0
        return low / sum(weights) - max(off, 0), high / sum(weights) - min(off, 0)

    def _ends(self, key: str, member: Member) -> tuple[float, float]:
        import torch

        if self._running:
            return -math.inf, math.inf
        ends = torch.tensor(member.reward.native_range, dtype=torch.float64)
        low, high = self._normalised(key, _hinged(ends, member.hinge)).tolist()
        return low, high

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        import torch

        check_media(media, prompts, self)
        own = {}
        for key, member in self._members.items():
            own[key] = as_scores(member.reward(media, prompts), key, len(prompts))
        raw = _alike([own[key].total for key in self._counted], media)
        is_whole = torch.isfinite(raw).all(0)
        counted = zip(self._counted.items(), raw, strict=True)
        scores = torch.stack([self._normalised(key, _hinged(row, member.hinge)) for (key, member), row in counted])
        weights = scores.new_tensor([member.weight for member in self._counted.values()])[:, None]
        if self._mode == "sum":
            total = (weights * scores).sum(0)
        else:
            shares = weights / weights.sum()
            total = _votes(scores, shares, prompts, is_whole) if self._mode == "vote" else self._agreed(scores, shares)
        if self._running and self._is_updating:
            self.absorb({key: _moments(scored.total) for key, scored in own.items()})
        parts = {key: scored.total for key, scored in own.items()}
        parts |= {f"{key}/{part}": value for key, scored in own.items() for part, value in scored.parts.items()}
        return Scores(total.masked_fill(~is_whole, math.nan), parts)

    def _normalised(self, key: str, scores: Tensor) -> Tensor:
        normalise = self._running.get(key) or self._fixed.get(key)
        return normalise(scores) if normalise else scores

    def _agreed(self, scores: Tensor, shares: Tensor) -> Tensor:
        """Mean - kappa x population standard deviation [B]; the latter's gradient at 0 is set to 0, a subgradient."""
        mean = (shares * scores).sum(0)
        variance = (shares * (scores - mean).square()).sum(0)
        is_zero = variance == 0
        deviation = variance.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0)
        return mean - self._kappa * deviation

    def dependence(self) -> str:
        """Why a row's score depends on other media, and what to do; empty where it does not."""
        if self._mode == "vote":
            return (
                "its vote compares the media of one batch, which may hold any part of a prompt's candidates; name its "
                "members as rewards instead, and the rank stage computes win rates of their stored scores (win_rates)"
            )
        if self._running and self._is_updating:
            return (
                "its running statistics change with every call, so scores depend on batches and their order; freeze "
                "them: `update: false` and `state: FILE`, which its `save` wrote"
            )
        members = (member.reward for member in self._members.values())
        return next((why for reward in members if isinstance(reward, Dependent) and (why := reward.dependence())), "")

    def train(self) -> Composite:
        """Each later call adds its scores to the running statistics."""
        self._is_updating = True
        return self

    def eval(self) -> Composite:
        """Later calls do not change the running statistics."""
        self._is_updating = False
        return self

    def state(self) -> dict[str, Moments]:
        """The running statistics of every member."""
        return dict(self._running)

    def absorb(self, state: Mapping[str, Moments]) -> None:
        """Add the statistics of another stream (a process, a shard); the order does not matter."""
        self._running = {key: moments.merge(state[key]) for key, moments in self._running.items()}

    def save(self, path: str | Path) -> None:
        """Write the running statistics as JSON, atomically. Raises StorageError."""
        text = json.dumps({key: asdict(moments) for key, moments in self._running.items()}, indent=1)
        write_text(Path(path), text)

    def load(self, path: str | Path) -> None:
        """Replace the statistics by those of a file of `save`. Raises MissingFileError; DataError for another file."""
        if not Path(path).is_file():
            raise MissingFileError(f"{self.name}: no statistics '{path}'; `save` writes them")
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            running = {key: Moments(**moments) for key, moments in stored.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{self.name}: '{path}' holds no running statistics: {error}") from error
        if set(running) != set(self._members):
            raise DataError(f"{self.name}: '{path}' is of {sorted(running)}, members are {sorted(self._members)}")
        self._running = running


def _member(name: str, given: Reward | Member | Mapping[str, Any]) -> Member:
    """A Member from any of its forms. Raises ConfigError naming it for an unknown key or option."""
    if isinstance(given, Member):
        return given
    if not isinstance(given, Mapping):
        return Member(given)
    keys = ("reward", "options", "weight", "hinge")
    for key in given:
        if key not in keys:
            raise ConfigError(f"member '{name}': unknown key '{key}'.{nearest(key, keys)}")
    if "reward" not in given:
        raise ConfigError(f"member '{name}': `reward` is missing")
    builder, what = resolve(given["reward"], REWARDS, kind="reward"), f"member '{name}': reward '{given['reward']}'"
    reward = construct(builder, given.get("options", {}), what=what)
    return Member(reward, given.get("weight", 1.0), given.get("hinge"))


def _fixed(name: str, given: Mapping[str, Any]) -> Moments | Quantiles:
    """Normalisation by the numbers of option `reference`."""
    if set(given) == {"values"}:
        return Quantiles.of(given["values"])
    if set(given) != {"mean", "std"} or not given["std"] > 0:
        raise ConfigError(f"reference of '{name}': give mean and std > 0, or values; not {dict(given)}")
    return Moments(1, given["mean"], given["std"] ** 2)


def _moments(scores: Tensor) -> Moments:
    """Moments of the finite scores: one NaN or infinity would make the running mean useless."""
    return Moments.of([value for value in scores.detach().double().tolist() if math.isfinite(value)])


def _alike(rows: Sequence[Tensor], media: Tensor) -> Tensor:
    """Scores [members, B] on the device of `media`, in the widest dtype of `rows` (served ones: float64, CPU)."""
    import torch

    dtype = functools.reduce(torch.promote_types, (row.dtype for row in rows))
    return torch.stack([row.to(media.device, dtype) for row in rows])


def _hinged(scores: Tensor, target: float | None) -> Tensor:
    return scores if target is None else scores.clamp(max=target)


def _votes(scores: Tensor, shares: Tensor, prompts: Sequence[Prompt], is_whole: Tensor) -> Tensor:
    """Win rates [B] of `scores` [members, B] against the media of the same prompt, weighted over members by `shares`.

    A row is compared with the rows where `is_whole` [B] is true only; NaN if there is none.
    """
    import torch

    groups = torch.tensor([[one.id == other.id for other in prompts] for one in prompts], device=scores.device)
    groups.fill_diagonal_(fill_value=False)
    if not groups.any(1).all():
        alone = prompts[int(groups.any(1).logical_not().nonzero()[0])].text
        raise DataError(f"vote: only one medium of the prompt '{alone}' in the batch; a vote compares at least 2")
    scores = scores.detach()
    wins = ((scores[:, :, None] - scores[:, None]).sign() + 1) / 2
    opponents = groups & is_whole
    return (shares * wins.where(opponents, 0).sum(2)).sum(0) / opponents.sum(1)

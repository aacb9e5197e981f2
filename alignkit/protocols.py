"""Structural types: what an image source, a reward and a judge must be able to do.

No class has to inherit from them, and importing this module loads no torch.
Shape letters: B batch, C/H/W latent or pixel channels and size, F frames, T latent frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from alignkit.errors import ConfigError, DataError
from alignkit.records import Prompt, Sampling, Scores, Verdict

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class ImageSource(Protocol):
    """What Syn-Pic and evaluation need of a generator: it generates images or videos."""

    name: str

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> Tensor:
        """Float pixels [B, 3, H, W], or [B, F, 3, H, W] of videos, in [0, 1].

        Row i depends on prompts[i], seeds[i] and sampling alone. Raises FlaggedError where a safety checker replaced
        some of them: the generate stage leaves those out.
        """
        ...


@runtime_checkable
class Selective(Protocol):
    """An image source that knows which settings it takes."""

    def require_sampling(self, sampling: Sampling) -> None:
        """ConfigError for a setting that it does not know or would change."""
        ...


def require_sampling(source: object, sampling: Sampling) -> None:
    """ConfigError where a `Selective` source does not take `sampling`; called before anything is generated."""
    if isinstance(source, Selective):
        source.require_sampling(sampling)


@runtime_checkable
class Reward(Protocol):
    """An image judge. `comparable_across_prompts` says whether scores of different prompts share a scale.

    One whose rows depend on each other, or on earlier calls, says so as `Dependent`.
    """

    name: str
    modality: str  # "image" or "video"
    needs_prompt: bool
    differentiable: bool
    comparable_across_prompts: bool
    native_range: tuple[float, float]
    licence: str
    source: str

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Scores of media [B, 3, H, W] (or [B, F, 3, H, W]) in [0, 1] with their own prompts, row by row.

        Callers read it with `as_scores`, so a bare tensor, array or list of B numbers will do.
        """
        ...


@runtime_checkable
class ExampleMaker(Protocol):
    """A reward that cannot read plain photographs and captions, and makes an example for itself out of them."""

    def example(self, photograph: Tensor, prompt: Prompt) -> tuple[Tensor, Prompt]:
        """An image [3, H, W] in [0, 1] and its prompt; `prompt.metadata` has the photograph's `name`."""
        ...


@runtime_checkable
class SegmentScoring(Protocol):
    """A reward of clips that needs the whole clip to score a part of it."""

    def score_segments(
        self, media: Tensor, prompts: Sequence[Prompt], segments: Sequence[Sequence[tuple[int, int]]]
    ) -> Sequence[Sequence[float]]:
        """A score for each of the clip's own segments [start, end), of media [B, F, 3, H, W] in [0, 1]; B lists."""
        ...


@runtime_checkable
class Preparing(Protocol):
    """A reward that needs more of a prompt than its text: it can check that, and compute what is computed once."""

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Called with all prompts before the first training step. Raises DataError naming a prompt that lacks it."""
        ...


@runtime_checkable
class Asking(Protocol):
    """A reward whose score is the mean over the questions in a prompt's metadata, weighted by their weights."""

    asks_questions: bool


@runtime_checkable
class Dependent(Protocol):
    """A reward whose score of a medium may depend on other media: of the same call, or of calls before."""

    def dependence(self) -> str:
        """Why it does and what to do instead, the end of a sentence; empty where each row stands for itself."""
        ...


def require_independent(rewards: Mapping[str, object]) -> None:
    """ConfigError naming the first reward of `rewards` whose scores would depend on how media are cut into calls."""
    for name, reward in rewards.items():
        reason = reward.dependence() if isinstance(reward, Dependent) else ""
        if reason:
            raise ConfigError(f"reward '{name}': {reason}")


def require_modality(rewards: Mapping[str, object], modality: str) -> None:
    """ConfigError naming the first reward of `rewards` that does not score media of `modality`, "image" or "video"."""
    for name, reward in rewards.items():
        if isinstance(reward, Reward) and reward.modality != modality:
            raise ConfigError(
                f"reward '{name}' scores {reward.modality}s, but here are {modality}s; leave it out, or name a "
                f"reward of modality {modality}"
            )


def as_scores(value: Any, name: str, count: int) -> Scores:
    """What reward `name` returned for `count` media, as scores [count] of a floating dtype; gradients stay.

    Besides `Scores`, a tensor, a NumPy array, or a list or tuple of numbers is taken where it holds exactly one real
    number for each medium. NaN and infinity pass: each caller counts them. Raises DataError naming the reward.
    """
    if not isinstance(value, Scores):
        return Scores(_score_tensor(value, name, count))
    parts = {part: _score_tensor(item, f"{name}/{part}", count) for part, item in value.parts.items()}
    return Scores(_score_tensor(value.total, name, count), parts)


def _score_tensor(value: Any, name: str, count: int) -> Tensor:
    import numpy as np
    import torch

    expected = f"expected Scores, a tensor, an array or a list of [{count}] numbers, one for each image or video"
    if isinstance(value, list | tuple):
        items = [item.item() if isinstance(item, torch.Tensor) and item.dim() == 0 else item for item in value]
        try:
            value = np.asarray(items)
        except (TypeError, ValueError) as error:  # lists of several lengths
            raise DataError(f"reward '{name}' returned {str(value)[:80]!r}, {expected}") from error
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.tensor(value.astype(np.float64))
    if not isinstance(value, torch.Tensor) or value.is_complex():
        raise DataError(f"reward '{name}' returned a {type(value).__name__}: {str(value)[:80]!r}, {expected}")
    if tuple(value.shape) != (count,):
        raise DataError(f"reward '{name}' returned scores {list(value.shape)}, {expected}")
    return value if value.is_floating_point() else value.double()


@runtime_checkable
class Reporting(Protocol):
    """Something that costs while it works: a served reward or judge."""

    def report(self) -> object:
        """What asking has cost so far; its text is one line."""
        ...


@runtime_checkable
class Obtainable(Protocol):
    """A learnt reward's class that says, as the end of a sentence, how to get its weights."""

    get: str


@runtime_checkable
class Judge(Protocol):
    """A served VLM that compares two media; +1 first is better, -1 second, 0 abstains."""

    def compare(self, first: Tensor, second: Tensor, prompts: Sequence[Prompt]) -> list[int]:
        """One verdict a pair."""
        ...


@runtime_checkable
class ExplainingJudge(Protocol):
    """A judge that also says why it abstains, and tells an answer that it cannot read from a tie."""

    def verdicts(self, first: Tensor, second: Tensor, prompts: Sequence[Prompt]) -> list[Verdict]:
        """One verdict a pair."""
        ...

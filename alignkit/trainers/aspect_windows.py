"""Step windows per aspect: questions of different aspects send their gradients through different steps of a chain.

What an image shows is decided in early steps, its texture in late ones. A window is one set of steps with the aspects
that use it; the default window takes all other questions, and rewards that ask none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignkit.aspects import Question, questions_of
from alignkit.errors import ConfigError, nearest
from alignkit.protocols import Asking, Reward, as_scores
from alignkit.records import Prompt, Scores


@dataclass(frozen=True)
class Window:
    """Steps with gradients, as `gradient_steps` writes them, and whose questions they are.

    aspects: those of this window; with `is_default`, those of all other windows, which this one has not.
    """

    steps: str
    aspects: frozenset[str]
    is_default: bool = False

    def has(self, aspect: str) -> bool:
        """Whether questions of this aspect ("" where a question names none) belong here."""
        return (aspect in self.aspects) != self.is_default

    def part(self, prompt: Prompt) -> tuple[Prompt, float]:
        """The prompt with this window's questions alone, and their share in [0, 1] of the prompt's weight.

        A prompt that brings no questions belongs to the default window.
        """
        questions = questions_of(prompt)
        if not questions:
            return prompt, float(self.is_default)
        own = [question for question in questions if self.has(question.aspect)]
        weight = sum(question.weight for question in own)
        share = weight / sum(question.weight for question in questions)
        return replace(prompt, metadata={**prompt.metadata, "questions": own}), share


def windows_of(aspect_steps: Mapping[str, str], default: str) -> list[Window]:
    """The default window, then one for each distinct value of `aspect_steps`; aspects with `default` stay in it."""
    named = {aspect: steps for aspect, steps in aspect_steps.items() if steps != default}
    grouped: dict[str, set[str]] = {}
    for aspect, steps in named.items():
        grouped.setdefault(steps, set()).add(aspect)
    others = [Window(steps, frozenset(aspects)) for steps, aspects in grouped.items()]
    return [Window(default, frozenset(named), is_default=True), *others]


def used(
    windows: Sequence[Window], prompts: Iterable[Prompt], rewards: Mapping[str, Reward], *, penalised: bool
) -> list[Window]:
    """The windows that any of the prompts or rewards uses; the default one also where the velocity is `penalised`.

    The same in every process, so that all of them call the network equally often. Raises ConfigError for rewards that
    ask no questions, and for an aspect that no question has.
    """
    asking = [name for name, reward in rewards.items() if asks(reward)]
    if not asking:
        raise ConfigError(f"aspect_steps: none of the rewards {', '.join(rewards)} asks the questions of prompts")
    asked = [question for prompt in prompts for question in questions_of(prompt) or [Question()]]
    present = {question.aspect for question in asked}
    for aspect in sorted(windows[0].aspects - present):
        raise ConfigError(f"aspect_steps.{aspect}: no question has this aspect.{nearest(aspect, present - {''})}")
    needs_default = penalised or len(asking) < len(rewards) or any(map(windows[0].has, present))
    return list(windows if needs_default else windows[1:])


def asks(reward: Reward) -> bool:
    """Whether the reward's score is that of a prompt's questions."""
    return isinstance(reward, Asking) and reward.asks_questions


class ByWindow:
    """A reward of media once for each window, [B, W, ...] of equal values: its scores, each question's gradient at its
    own window's media.

    Parts that are neither a question nor an aspect, such as `eight_bit`, add up over the windows as the total does. A
    reward that asks no questions reads the first window's media. Every call of the reward is checkpointed.
    """

    def __init__(self, reward: Reward, windows: Sequence[Window]) -> None:
        self._reward = reward
        self._windows = list(windows) if asks(reward) else []
        self.name, self.modality, self.needs_prompt = reward.name, reward.modality, reward.needs_prompt
        self.differentiable, self.native_range = reward.differentiable, reward.native_range
        self.comparable_across_prompts = reward.comparable_across_prompts
        self.licence, self.source = reward.licence, reward.source

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        if not self._windows:
            return self._scored(media[:, 0], prompts)
        total, parts = media.new_zeros(len(media)), dict[str, Tensor]()
        for place, window in enumerate(self._windows):
            own, shares = zip(*map(window.part, prompts), strict=True)
            rows = [row for row, share in enumerate(shares) if share > 0]
            pixels = media[:, place]
            if not rows:
                total = total + 0 * pixels.flatten(1).sum(1)  # every process differentiates every window
                continue
            scores = self._scored(pixels[rows], [own[row] for row in rows])
            share_R = torch.tensor([shares[row] for row in rows], dtype=scores.total.dtype, device=scores.total.device)
            index = torch.tensor(rows, device=total.device)
            total = total.to(scores.total).index_add(0, index, share_R * scores.total)
            asked = {name for prompt in own for q in questions_of(prompt) for name in (q.name, f"aspect/{q.aspect}")}
            for name, value in scores.parts.items():
                known = parts.get(name, torch.full_like(total.detach(), float("nan")))
                before = known[index]
                added = (value if name in asked else share_R * value).detach().to(known)  # others add up
                after = torch.where(before.isnan(), added, before + added.nan_to_num())
                parts[name] = known.index_copy(0, index, after)
        return Scores(total, parts)

    def _scored(self, pixels: Tensor, prompts: Sequence[Prompt]) -> Scores:
        def score(media: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
            scores = as_scores(self._reward(media, prompts), self._reward.name, len(prompts))
            return scores.total, scores.parts

        total, parts = checkpoint(score, pixels, use_reentrant=False) if pixels.requires_grad else score(pixels)
        return Scores(total, parts)

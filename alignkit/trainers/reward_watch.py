"""What is watched in the scores of trained rewards: parts worth a log, and a reward that scores everything alike."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from alignkit.aspects import questions_of
from alignkit.escape import get_logger
from alignkit.records import Prompt

logger = get_logger(__name__)
MOST_PARTS = 12  # single questions are logged only if there are at most this many


def logged_parts(parts: Iterable[str], prompts: Iterable[Prompt]) -> tuple[str, ...]:
    """The parts of a reward to log, the same for every batch, from its `parts` for the first of all `prompts`.

    If it reads the questions of prompts, those are the aspects of all questions, and their names if these are few; else
    `parts`, if they are few.
    """
    parts = tuple(parts)
    asked = [question for prompt in prompts for question in questions_of(prompt)]
    aspects = tuple(dict.fromkeys(f"aspect/{question.aspect}" for question in asked if question.aspect))
    names = tuple(dict.fromkeys(question.name for question in asked if question.name))
    if set(parts) & {*aspects, *names}:
        names = tuple(dict.fromkeys([*aspects, *names, *parts]))
        return names if len(names) <= MOST_PARTS + len(aspects) else aspects
    return parts if len(parts) <= MOST_PARTS else ()


class ConstantWatch:
    """Warns, once for each reward, where all scores of the last `steps` training steps have a spread below `spread`."""

    def __init__(self, spread: float, steps: int) -> None:
        self._spread, self._steps = spread, steps
        self._scores: dict[str, dict[int, list[float]]] = defaultdict(dict)
        self._warned: set[str] = set()

    def note(self, step: int, scores: Mapping[str, Tensor]) -> None:
        """Scores [B] by reward of a micro-batch of the training step `step`."""
        for name, score_B in scores.items():
            if name not in self._warned:
                kept = self._scores[name]
                kept.setdefault(step, []).extend(score_B.tolist())
                if len(kept) > self._steps:  # the oldest step; the newest may not be whole yet
                    self._judge(name, [score for one in list(kept)[:-1] for score in kept[one]])
                    del kept[min(kept)]

    def _judge(self, name: str, scores: Sequence[float]) -> None:
        spread = statistics.pstdev(scores)
        if spread < self._spread:
            self._warned.add(name)
            logger.warning(
                "reward '%s' gives almost the same score to everything: over the last %d steps the standard deviation "
                "of %d scores around %.4g is %.2g (constant_spread is %g). Its gradient says little about the images; "
                "look at its questions and its preprocessing, or train on another reward",
                name,
                self._steps,
                len(scores),
                statistics.fmean(scores),
                spread,
                self._spread,
            )

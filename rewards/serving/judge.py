"""Judges of which of two images or videos is better: a served model, asked in both orders, or a reward's difference.

Models are biased towards a position (arXiv 2306.05685), so a verdict counts only where both orders agree; everything
else is an abstention, with the reason counted. The question about a pair is data (`PairQuestion`).
Left out: several judges' votes, chains of thought, ties as a verdict of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from alignkit.errors import ConfigError
from alignkit.protocols import Reward, as_scores, require_independent
from alignkit.records import FAILED, Prompt, Verdict
from alignkit.resolve import construct, resolve
from rewards import REWARDS
from rewards.models.media import check_media
from rewards.serving.messages import text_part, user
from rewards.serving.reply_cache import Reply
from rewards.serving.served_base import ServedBase

if TYPE_CHECKING:
    from torch import Tensor

_KEPT_ANSWER = 500  # characters of an answer in a verdict
TOP = 20  # the most alternatives per token that servers give (vLLM's --max-logprobs)


@dataclass(frozen=True, slots=True)
class PairQuestion:
    """The question about a pair, and what the answers mean.

    template: the question after the media; `{prompt}` is the caption. labels: text before each of the two; videos sent
    as frames need it, because nothing else marks where the first ends.
    answers: lower-case answer -> +1 (the first), -1 (the second) or 0 (a tie), compared with the whole answer without
    case and final full stop. within: an answer may be part of a longer text, which then must be complete and contain
    answers of one meaning only.
    """

    template: str
    answers: Mapping[str, int]
    labels: tuple[str, str] = ("", "")
    within: bool = False
    max_tokens: int = 4

    def __post_init__(self) -> None:
        if not {1, -1} <= set(self.answers.values()) <= {1, 0, -1}:
            raise ConfigError(
                f"a question's answers mean {dict(self.answers)}; each must be 1 (the first is better), -1 (the "
                "second) or 0 (a tie), and 1 and -1 must both be there"
            )

    def parts(self, one: list[dict[str, Any]], other: list[dict[str, Any]], prompt: str) -> list[dict[str, Any]]:
        """Message parts of the question, with the two media `one` and `other` given as parts."""
        before = [[text_part(label)] if label else [] for label in self.labels]
        return [*before[0], *one, *before[1], *other, text_part(self.template.replace("{prompt}", prompt))]

    def read(self, text: str) -> int | None:
        """The meaning of an answer, +1, -1 or 0; None if it has none or several."""
        folded = " ".join(text.casefold().split())
        if not self.within:
            return self.answers.get(folded.removesuffix("."))
        meanings = {meaning for answer, meaning in self.answers.items() if answer in folded}
        return meanings.pop() if len(meanings) == 1 else None

    def verdict(self, forward: str, backward: str) -> Verdict:
        """What both orders' answers mean together; `backward` is the answer with the two media exchanged.

        Answers that disagree are a tie, a malformed one is no answer.
        """
        details = {"answers": [answer[:_KEPT_ANSWER] for answer in (forward, backward)]}
        meaning, swapped = self.read(forward), self.read(backward)
        if meaning is None or swapped is None:
            return Verdict(None, "malformed", details)
        if meaning != -swapped:
            return Verdict(0, "disagreed", details)
        return Verdict(meaning, "" if meaning else "tie", details)

    def meaning(self, sign: int) -> list[str]:
        """The answers that mean `sign`."""
        return [answer for answer, meaning in self.answers.items() if meaning == sign]


_UNIFIED_IMAGES = """\
You are given a text caption and two generated images based on that caption. Your task is to evaluate and compare \
these images based on two key criteria:
1. Alignment with the Caption: Assess how well each image aligns with the provided caption. Consider the accuracy of \
depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of each image, including clarity, detail preservation, color \
accuracy, and overall aesthetic appeal.
Compare both images using the above criteria and select the one that better aligns with the caption while exhibiting \
superior visual quality.
Provide a clear conclusion such as "Image 1 is better.", "Image 2 is better." and "Both images are equally good."
Your task is provided as follows:
Text Caption: [{prompt}]"""

_PLAIN = 'Which picture shows "{prompt}" better? Answer first or second.'

# `unified_reward` is what CodeGoat24/UnifiedReward's models were trained on (arXiv 2503.05236, inference_qwen there).
QUESTIONS = {
    "plain": PairQuestion(_PLAIN, {"first": 1, "second": -1}),
    "unified_reward": PairQuestion(
        _UNIFIED_IMAGES,
        {"image 1 is better": 1, "image 2 is better": -1, "both images are equally good": 0},
        within=True,
        max_tokens=512,
    ),
}


def read_question(path: Path) -> PairQuestion:
    """A question from a YAML file with the keys of PairQuestion.

    Raises ConfigError naming the file for what is no YAML mapping, for unknown or missing keys, and for wrong answers.
    """
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"question '{path}' cannot be read ({error}); give a YAML file, UTF-8") from error
    if not isinstance(options, dict) or not isinstance(options.get("answers", {}), dict):
        raise ConfigError(f"question '{path}': it must hold the keys `template` and `answers`, a mapping to 1, 0 or -1")
    if "labels" in options:
        options["labels"] = tuple(options["labels"])
    return construct(PairQuestion, options, what=f"question '{path}'")  # type: ignore[no-any-return]


def _question(question: str | PairQuestion) -> PairQuestion:
    """A question by its name in `QUESTIONS`, from a file, or as it is."""
    if isinstance(question, PairQuestion):
        return question
    if question in QUESTIONS:
        return QUESTIONS[question]
    if not Path(question).is_file():
        known = ", ".join(QUESTIONS)
        raise ConfigError(f"served_judge: no question '{question}'; known: {known}, or the path of a YAML file")
    return read_question(Path(question))


class ServedJudge(ServedBase):
    """A served vision-language model as `alignkit.protocols.Judge`; each pair is sent in both orders.

    question: a name of `QUESTIONS`, the path of a YAML file (`read_question`), or a PairQuestion. options: those of
    `ServedBase`. Abstentions are reported as failed, cut off, malformed, disagreed, tie or unsure.
    least_margin: log-odds in favour of the verdict that both orders must reach at the first token of the answer; None
    uses no probabilities, as is needed for servers without them and for answers of several words.
    """

    name = "served_judge"
    needs_prompt = True

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        question: str | PairQuestion = "plain",
        least_margin: float | None = None,
        **options: Any,
    ) -> None:
        self.question = _question(question)
        long = [answer for answer in self.question.meaning(1) + self.question.meaning(-1) if len(answer.split()) > 1]
        if least_margin is not None and (self.question.within or long):
            expected = f"answers of several words, {long}" if long else "a text"
            raise ConfigError(
                f"served_judge: least_margin reads the answer's first token; this question expects {expected}"
            )
        self.least_margin = least_margin
        super().__init__(base_url, model, **options)

    def compare(self, first: Tensor, second: Tensor, prompts: Sequence[Prompt]) -> list[int]:
        """One verdict a pair: +1 if the first is better, -1 if the second is better, 0 for an abstention.

        first, second: [B, 3, H, W] or [B, F, 3, H, W] in [0, 1]; sizes may differ between the two.
        Raises DataError for other media, ServerError if the server cannot be used (`ChatClient.ask`).
        """
        return [verdict.label or 0 for verdict in self.verdicts(first, second, prompts)]

    def verdicts(self, first: Tensor, second: Tensor, prompts: Sequence[Prompt]) -> list[Verdict]:
        """As `compare`, with the reason of an abstention and both orders' answers; no answer: None."""
        media = [check_media(side, prompts, self) for side in (first, second)]  # type: ignore[arg-type]
        ones, others = ([self._media_parts(row) for row in side] for side in media)
        forward = [self._request(*row) for row in zip(ones, others, prompts, strict=True)]
        backward = [self._request(*row) for row in zip(others, ones, prompts, strict=True)]
        # A short answer must match as a whole, so a reply may be cut off after it; the rest of a longer text matters.
        is_short = not self.question.within
        replies = self.client.ask(forward + backward, label=self.name, allow_cut_off=is_short)
        verdicts = [self._verdict(*pair) for pair in zip(replies, replies[len(forward) :], strict=False)]
        self._abstentions.update(verdict.reason for verdict in verdicts if verdict.reason)
        return verdicts

    def _request(self, one: list[dict[str, Any]], other: list[dict[str, Any]], prompt: Prompt) -> dict[str, Any]:
        messages = user(self.question.parts(one, other, prompt.text))
        request = {"messages": messages, "temperature": 0, "max_tokens": self.question.max_tokens}
        return request if self.least_margin is None else request | {"logprobs": True, "top_logprobs": TOP}

    def _verdict(self, forward: Reply | None, backward: Reply | None) -> Verdict:
        if forward is None or backward is None:
            return Verdict(None, FAILED)
        if self.question.within and (forward.is_cut_off or backward.is_cut_off):
            return Verdict(None, "cut off")
        verdict = self.question.verdict(forward.text, backward.text)
        if verdict.label and not self._is_sure(verdict.label, forward, backward):
            return replace(verdict, label=0, reason="unsure")
        return verdict

    def _is_sure(self, verdict: int, forward: Reply, backward: Reply) -> bool:
        if self.least_margin is None:
            return True
        sides = self.question.meaning(1), self.question.meaning(-1)
        margins = verdict * forward.margin(*sides), -verdict * backward.margin(*sides)
        return all(margin >= self.least_margin for margin in margins)  # False for NaN


class RewardJudge:
    """Any reward as `alignkit.protocols.Judge`: the sign of the difference of two scores of one prompt.

    It abstains if the scores differ by no more than `least_difference`, or one is not finite. Each medium is scored
    alone, so there is no bias towards a position.

    reward: a reward; or its name in `REWARDS`, or 'package.module:attribute', built with `options`. Raises ConfigError
    for options that do not fit, and for a reward by name whose scores depend on other media (`Dependent`).
    """

    def __init__(
        self, reward: Reward | str, *, options: Mapping[str, Any] | None = None, least_difference: float = 0.0
    ) -> None:
        if isinstance(reward, str):
            builder, name = resolve(reward, REWARDS, kind="reward"), reward
            reward = construct(builder, options or {}, what=f"reward '{name}'")
            require_independent({name: reward})
        elif options is not None:
            raise ConfigError("reward_judge: `options` are those of a reward by name; this reward is already built")
        self.reward: Reward = reward
        self.least_difference = least_difference

    def compare(self, first: Tensor, second: Tensor, prompts: Sequence[Prompt]) -> list[int]:
        """As `ServedJudge.compare`; raises what the reward raises."""
        return [verdict.label or 0 for verdict in self.verdicts(first, second, prompts)]

    def verdicts(self, first: Tensor, second: Tensor, prompts: Sequence[Prompt]) -> list[Verdict]:
        """As `compare`, with both scores; no answer, None, where one is not finite."""
        import torch

        with torch.no_grad():
            name, count = type(self.reward).__name__, len(prompts)
            scores = [as_scores(self.reward(media, prompts), name, count).total.tolist() for media in (first, second)]
        return [self.verdict(*pair) for pair in zip(*scores, strict=True)]

    def verdict(self, first: float, second: float) -> Verdict:
        """What two scores mean."""
        scores = [first, second]
        if not all(map(math.isfinite, scores)):
            return Verdict(None, "not finite")
        if abs(first - second) <= self.least_difference:
            return Verdict(0, "tie", {"scores": scores})
        return Verdict(1 if first > second else -1, "", {"scores": scores})

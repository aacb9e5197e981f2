"""Yes/no questions to a vision-language model as a reward: the weighted mean of log sigma(log-odds of yes).

The form of Diffusion-DRF's and PhyCo's critics (arXiv 2601.04153): a satisfied question has almost no gradient; many
precise questions are better than a vague one. The negation of a question cancels a model's bias to yes. Known limit:
errors that the model does not notice do not change the score. Not here: writing the questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignkit.aspects import Question
from alignkit.errors import ConfigError, DataError
from alignkit.records import Prompt, Scores
from rewards.models.media import check_media
from rewards.models.patches import sample_frames
from rewards.models.vlm import VlmCritic, known_modality, listed

if TYPE_CHECKING:
    from torch import Tensor

QUESTION = 'Does this match the description "{prompt}"? Answer with yes or no.'


class YesNo:
    """Sum of w log sigma(m) over a prompt's questions divided by the sum of w; at most 0, and 0 is perfect.

    m is the log-odds of yes to `text`, or minus those to `negated`; of a question that has both it is the mean of the
    two, in which a bias to yes that is equal for both cancels. `questions`: for all prompts; `metadata["questions"]` of
    a prompt (texts, or mappings with text, weight, negated, name, aspect) replaces them. Parts: log sigma(m) by the
    question's name or number, and `aspect/NAME`, the weighted mean over the questions of an aspect; NaN in the rows of
    prompts that do not have the question or the aspect. `frames`: of each clip so many are read, evenly from the first
    to the last (default: all); `rate` is then that of the frames that are read. `eight_bit` adds the part `eight_bit`:
    the total for media as 8-bit files, without gradient. `options` go to `VlmCritic` (device, dtype, readout, rate).
    """

    name = "yes_no"
    needs_prompt = True
    differentiable = True
    comparable_across_prompts = True
    native_range = (-float("inf"), 0.0)
    licence = "that of the model"
    source = "https://arxiv.org/abs/2601.04153"
    get = "a Qwen2-VL, 2.5-VL or 3-VL, such as `hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir FOLDER`"

    def __init__(
        self,
        model: str,
        *,
        modality: str = "image",
        questions: Sequence[str | Mapping[str, Any]] = (QUESTION,),
        frames: int | None = None,
        eight_bit: bool = False,
        **options: Any,
    ) -> None:
        self.modality = known_modality(modality, self.name)
        if frames is not None and (modality == "image" or frames < 1):
            raise ConfigError(f"yes_no: frames is {frames}, with modality {modality}; give 1 or more, for video")
        self._frames = frames
        self._questions, self._eight_bit = _named(listed(questions, "yes_no: questions")), eight_bit
        self._critic = VlmCritic(model, owner=self.name, **options)

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        media = check_media(media, prompts, self)
        if self._frames is not None:
            media = sample_frames(media, min(self._frames, media.shape[1]))
        own = [self._of(prompt) for prompt in prompts]
        total, parts = self._scores(media, prompts, own)
        if self._eight_bit:
            parts["eight_bit"] = self._scores(media, prompts, own, eight_bit=True)[0].detach()
        return Scores(total, parts)

    def _of(self, prompt: Prompt) -> list[Question]:
        given = prompt.metadata.get("questions")
        if given is None:
            return self._questions
        if isinstance(given, str) or not given:
            raise DataError(f"prompt '{prompt.text}': its questions are {given!r}; give a list of texts or mappings")
        return _named(given)

    def _scores(
        self, media: Tensor, prompts: Sequence[Prompt], own: Sequence[list[Question]], *, eight_bit: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(total [B], parts [B] each)."""
        from torch.nn import functional

        pairs = [(i, text) for i, prompt in enumerate(prompts) for q in own[i] for text in q.asked(prompt.text)]
        margins = iter(self._critic.margins_of(media, pairs, eight_bit=eight_bit))
        rows = []
        for questions in own:
            row = {}
            for q in questions:
                good = [next(margins)] if q.text else []  # log-odds of the good answer
                good += [-next(margins)] if q.negated else []
                row[q.name] = functional.logsigmoid(sum(good[1:], good[0]) / len(good))
            for aspect in dict.fromkeys(q.aspect for q in questions if q.aspect):
                row[f"aspect/{aspect}"] = _mean([q for q in questions if q.aspect == aspect], row)
            rows.append(row)
        total = [_mean(questions, row) for questions, row in zip(own, rows, strict=True)]
        absent = total[0].new_tensor(float("nan"))
        names = dict.fromkeys(name for row in rows for name in row)
        return _column(total), {name: _column([row.get(name, absent) for row in rows]) for name in names}


def _mean(questions: Sequence[Question], row: Mapping[str, Tensor]) -> Tensor:
    """The weighted mean of log sigma(m) over `questions`."""
    weighted = [q.weight * row[q.name] for q in questions]
    return sum(weighted[1:], weighted[0]) / sum(q.weight for q in questions)


def _column(values: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.stack(list(values))


def _named(given: Sequence[str | Mapping[str, Any]]) -> list[Question]:
    """Questions with distinct names: their own, or question_1, question_2, ..."""
    from dataclasses import replace

    questions = [Question.of(one) for one in given]
    questions = [replace(q, name=q.name or f"question_{number}") for number, q in enumerate(questions, 1)]
    if len({q.name for q in questions}) != len(questions):
        raise ConfigError(f"two questions have the same name: {', '.join(q.name for q in questions)}")
    return questions

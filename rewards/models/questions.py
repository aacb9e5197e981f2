"""Rewards that ask a vision-language model a prompt's questions: what they have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alignkit.aspects import ASPECTS, Question, QuestionWriter, Rules, named, questions_of
from alignkit.errors import ConfigError, DataError, require_at_least
from alignkit.records import Prompt, Scores
from alignkit.resolve import construct, resolve
from rewards.models.media import check_media
from rewards.models.patches import sample_frames
from rewards.models.vlm import VlmCritic, known_modality, listed

if TYPE_CHECKING:
    from torch import Tensor


class QuestionReward:
    """Scores media by a frozen model's answers; a subclass says what an answer is worth (`_scores`).

    Questions in a prompt's metadata come first. For other prompts `writer` writes them ('package.module:attribute' of
    an `alignkit.aspects.QuestionWriter`); without a writer `questions` are asked. Of each clip `frames` frames are
    read, evenly from the first to the last; None: all. `options` go to `VlmCritic`. Raises ConfigError for `frames` of
    images or below 1.
    """

    name: str
    needs_prompt = True
    differentiable = True
    comparable_across_prompts = True
    asks_questions = True
    native_range = (-float("inf"), 0.0)
    licence = "that of the model"
    source = "https://arxiv.org/abs/2601.04153"
    get = "a Qwen2-VL, 2.5-VL or 3-VL, such as `hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir FOLDER`"

    def __init__(
        self,
        model: str,
        questions: Sequence[str | Mapping[str, Any]],
        *,
        modality: str,
        frames: int | None,
        eight_bit: bool,
        writer: str | None = None,
        **options: Any,
    ) -> None:
        self.modality = known_modality(modality, self.name)
        require_at_least(1, {f"{self.name}: frames": frames})
        if frames is not None and modality == "image":
            raise ConfigError(f"{self.name}: frames is {frames}, with modality image; it is for video")
        self._frames, self._eight_bit = frames, eight_bit
        self._questions = named(listed(questions, f"{self.name}: questions"))
        self._writer: QuestionWriter | None = None
        if writer is not None:
            self._writer = construct(resolve(writer, {}, kind="writer"), {}, what=f"writer '{writer}'")
        self._written: dict[str, list[Question]] = {}
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
        """The questions in `prompt.metadata`, else the writer's, else those for all prompts.

        Raises DataError for what is no list, and for a prompt of which the writer makes no questions.
        """
        given = prompt.metadata.get("questions")
        if given is None:
            return self._questions if self._writer is None else self._by_writer(prompt, self._writer)
        questions = questions_of(prompt)
        if not questions:
            raise DataError(f"prompt '{prompt.text}': its questions are {given!r}; give a list of texts or mappings")
        return questions

    def _by_writer(self, prompt: Prompt, writer: QuestionWriter) -> list[Question]:
        if prompt.text not in self._written:
            (draft,) = writer.write([prompt], Rules(ASPECTS, 99), [()])
            if draft.problems or not draft.questions:
                raise DataError(f"prompt '{prompt.text}': {'; '.join(draft.problems) or 'the writer has no questions'}")
            self._written[prompt.text] = named(draft.questions)
        return self._written[prompt.text]

    def _scores(
        self, media: Tensor, prompts: Sequence[Prompt], own: Sequence[list[Question]], *, eight_bit: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(total [B], parts [B] each) of media with the questions `own[b]`; see `parts_of`."""
        raise NotImplementedError


def parts_of(own: Sequence[Sequence[Question]], rows: Sequence[dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """(total [B], parts [B] each) of B prompts with questions `own[b]` and scores `rows[b]` by the question's name.

    The total is the weighted mean over a prompt's questions. Parts: each question, and `aspect/NAME`, the weighted mean
    over the questions of an aspect; NaN in the rows of prompts that do not have the question or the aspect.
    """
    import torch

    total, filled = [], []
    for questions, row in zip(own, rows, strict=True):
        total.append(_mean(questions, row))
        aspects = dict.fromkeys(q.aspect for q in questions if q.aspect)
        means = {f"aspect/{aspect}": _mean([q for q in questions if q.aspect == aspect], row) for aspect in aspects}
        filled.append({**row, **means})
    absent = total[0].new_tensor(float("nan"))
    names = dict.fromkeys(name for row in filled for name in row)
    columns = {name: torch.stack([row.get(name, absent) for row in filled]) for name in names}
    return torch.stack(total), columns


def _mean(questions: Sequence[Question], row: Mapping[str, Tensor]) -> Tensor:
    weighted = [q.weight * row[q.name] for q in questions]
    return sum(weighted[1:], weighted[0]) / sum(q.weight for q in questions)

"""A prompt's questions, and the scores of their answers as a total and parts by question and aspect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from alignkit.aspects import Question, named
from alignkit.errors import DataError
from alignkit.records import Prompt

if TYPE_CHECKING:
    from torch import Tensor


class QuestionReward:
    """What rewards that ask a frozen vision-language model the questions of each prompt have in common."""

    needs_prompt = True
    differentiable = True
    comparable_across_prompts = True
    asks_questions = True
    native_range = (-float("inf"), 0.0)
    licence = "that of the model"
    source = "https://arxiv.org/abs/2601.04153"
    get = "a Qwen2-VL, 2.5-VL or 3-VL, such as `hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir FOLDER`"


def of_prompt(prompt: Prompt, default: list[Question]) -> list[Question]:
    """The questions in `prompt.metadata`, or `default` where it has none. Raises DataError for what is no list."""
    given = prompt.metadata.get("questions")
    if given is None:
        return default
    if isinstance(given, str) or not given:
        raise DataError(f"prompt '{prompt.text}': its questions are {given!r}; give a list of texts or mappings")
    return named(given)


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

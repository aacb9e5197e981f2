"""Dense answers as a reward: the mean log-likelihood of an answer's tokens under a frozen vision-language model.

Diffusion-DRF's free-form explanations (Wang et al. 2026, arXiv 2601.04153): each token of an answer such as "Yes, two
rings lie on a table" has a gradient of its own at the pixels, where yes/no gives one number. With an answer of one
token it is VQAScore's log-probability. Full text and code of the paper were not available; the form is that of its
abstract and of VLM-as-Teacher (arXiv 2606.02564): teacher forcing, without sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from alignkit.aspects import Question
from alignkit.errors import DataError, require_at_least
from alignkit.records import Prompt
from rewards.models.own_answers import OwnAnswers
from rewards.models.questions import QuestionReward, parts_of

if TYPE_CHECKING:
    from torch import Tensor

QUESTION = "Describe what is shown in one or two sentences."


class Explanation(QuestionReward):
    """Sum of w (1/L) sum_l log P(y_l | medium, question, y_<l) over a prompt's questions divided by the sum of w.

    At most 0. y is the question's `answer`; of a question without one it is what the model itself says on the reference
    medium in the prompt's column `reference`, decoded greedily, once (`OwnAnswers`). All questions of a prompt share
    one vision pass, and the gradient reaches the pixels. A question is asked by its `text`, or by `negated` where it
    has no `text`. Answers are scored without the end of the turn.

    `questions`: for all prompts; `metadata["questions"]` of a prompt replaces them, with the same keys as in `yes_no`
    and `answer`. `reference`: the column of reference media; default: image or video, by `modality`. `limit`: the most
    tokens of an own answer. `reference_frames`: the first frames of a reference clip, which is brought to the critic's
    `rate`; default: all. `frames`: the number of frames that are read of each scored clip, as in `yes_no`. `cache`: the
    folder of own answers; without it they are computed in each run. Parts: each question and `aspect/NAME`, as in
    `yes_no`; with `eight_bit` the total for media as 8-bit files, without gradient. `options` go to `VlmCritic`
    (device, dtype, rate, checkpointing, ...).

    Raises DataError naming a prompt and a question with neither `answer` nor reference.
    """

    name = "explanation"

    def __init__(
        self,
        model: str,
        *,
        modality: str = "image",
        questions: Sequence[str | Mapping[str, Any]] = (QUESTION,),
        reference: str | None = None,
        limit: int = 64,
        reference_frames: int | None = None,
        frames: int | None = None,
        cache: str | None = None,
        eight_bit: bool = False,
        **options: Any,
    ) -> None:
        counts = {"limit": limit, "reference_frames": reference_frames}
        require_at_least(1, {f"explanation: {name}": count for name, count in counts.items()})
        super().__init__(model, questions, modality=modality, frames=frames, eight_bit=eight_bit, **options)
        self._own = OwnAnswers(
            self._critic,
            column=reference or modality,
            modality=modality,
            limit=limit,
            frames=reference_frames,
            folder=Path(cache) if cache else None,
        )

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Write and cache the answers of all prompts (`alignkit.protocols.Preparing`)."""
        for prompt in prompts:
            self._of(prompt)

    def example(self, photograph: Tensor, prompt: Prompt) -> tuple[Tensor, Prompt]:
        """The photograph with its caption as the wished answer (`alignkit.protocols.ExampleMaker`)."""
        return photograph, replace(prompt, metadata={"questions": [{"text": QUESTION, "answer": "{prompt}"}]})

    @override
    def _of(self, prompt: Prompt) -> list[Question]:
        """The prompt's questions with `{prompt}` filled in, each with its answer."""
        given = super()._of(prompt)
        texts = [question.asked(prompt.text)[0] for question in given]
        open_ = [place for place, question in enumerate(given) if not question.answer]
        if open_ and not prompt.metadata.get(self._own.column):
            raise DataError(
                f"explanation: prompt '{prompt.text}', question '{texts[open_[0]]}' has no answer, and the row has no "
                f"reference in the column {self._own.column}; give the question `answer`, or the row a reference"
            )
        answers = [question.answer.replace("{prompt}", prompt.text) for question in given]
        written = self._own.of(prompt, [texts[place] for place in open_]) if open_ else []
        for place, answer in zip(open_, written, strict=True):
            answers[place] = answer
        rows = zip(given, texts, answers, strict=True)
        return [replace(question, text=text, answer=answer) for question, text, answer in rows]

    @override
    def _scores(
        self, media: Tensor, prompts: Sequence[Prompt], own: Sequence[list[Question]], *, eight_bit: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        triples = [(index, q.text, q.answer) for index, questions in enumerate(own) for q in questions]
        values = iter(self._critic.answers_of(media, triples, eight_bit=eight_bit))
        rows = [{question.name: next(values) for question in questions} for questions in own]
        return parts_of(own, rows)

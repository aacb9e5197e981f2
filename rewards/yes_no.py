"""Yes/no questions to a vision-language model as a reward: the weighted mean of log sigma(log-odds of yes).

The form of Diffusion-DRF's and PhyCo's critics (arXiv 2601.04153): a satisfied question has almost no gradient; many
precise questions are better than a vague one. The negation of a question cancels a model's bias to yes. Known limit:
errors that the model does not notice do not change the score. Not here: writing the questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from alignkit.aspects import Question
from alignkit.records import Prompt
from rewards.models.questions import QuestionReward, parts_of

if TYPE_CHECKING:
    from torch import Tensor

QUESTION = 'Does this match the description "{prompt}"? Answer with yes or no.'


class YesNo(QuestionReward):
    """Sum of w log sigma(m) over a prompt's questions divided by the sum of w; at most 0, and 0 is perfect.

    m is the log-odds of yes to `text`, or minus those to `negated`; of a question that has both it is the mean of the
    two, in which a bias to yes that is equal for both cancels. `questions`: for all prompts; `metadata["questions"]` of
    a prompt (texts, or mappings with text, weight, negated, name, aspect) replaces them. `writer`: writes the questions
    of prompts without any ('package.module:attribute' of a `QuestionWriter` without options). Parts: log sigma(m) by
    the question's name or number, and `aspect/NAME`, the weighted mean over the questions of an aspect; NaN in the rows
    of prompts that do not have the question or the aspect. `frames`: the number of frames that are read of each clip,
    evenly from the first to the last (default: all); `rate` is then that of these frames. `eight_bit` adds the part
    `eight_bit`: the total for media as 8-bit files, without gradient. `options` go to `VlmCritic` (device, dtype,
    readout, rate).
    """

    name = "yes_no"

    def __init__(
        self,
        model: str,
        *,
        modality: str = "image",
        questions: Sequence[str | Mapping[str, Any]] = (QUESTION,),
        writer: str | None = None,
        frames: int | None = None,
        eight_bit: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            model, questions, modality=modality, writer=writer, frames=frames, eight_bit=eight_bit, **options
        )

    @override
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
            rows.append(row)
        return parts_of(own, rows)

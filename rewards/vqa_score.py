"""VQAScore (arXiv 2404.01291) of a decoder vision-language model: the probability of "Yes" to a question on the prompt.

Not here: CLIP-FlanT5, the encoder-decoder that the paper trained for it (`rewards.clip_flant5`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alignkit.records import Prompt, Scores
from rewards.models.media import check_media
from rewards.models.vlm import Readout, VlmCritic, known_modality, listed

if TYPE_CHECKING:
    from torch import Tensor

QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'


class VqaScore:
    """P("Yes" | medium, question) in [0, 1], over all words of the model.

    `model`: folder or hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model. `modality`: "image" or "video". `answer`: one
    or several single-token spellings of yes whose probabilities are added. `eight_bit` adds the part `eight_bit`: the
    score of the media as 8-bit files, without gradient. `options` go to `VlmCritic` (device, dtype, rate, ...).
    """

    name = "vqa_score"
    needs_prompt = True
    differentiable = True
    comparable_across_prompts = True
    native_range = (0.0, 1.0)
    licence = "that of the model"
    source = "https://arxiv.org/abs/2404.01291"
    get = "a Qwen2-VL, 2.5-VL or 3-VL, such as `hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir FOLDER`"

    def __init__(
        self,
        model: str,
        *,
        modality: str = "image",
        question: str = QUESTION,
        answer: Sequence[str] = ("Yes",),
        eight_bit: bool = False,
        **options: Any,
    ) -> None:
        self.modality = known_modality(modality, self.name)
        self._question, self._eight_bit = question, eight_bit
        self._critic = VlmCritic(
            model, readout=Readout(listed(answer, f"{self.name}: answer"), ()), owner=self.name, **options
        )

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        media = check_media(media, prompts, self)
        questions = [[self._question.replace("{prompt}", prompt.text)] for prompt in prompts]
        total = self._critic.ask(media, questions)[:, 0].exp()
        if not self._eight_bit:
            return Scores(total)
        return Scores(total, {"eight_bit": self._critic.ask(media, questions, eight_bit=True)[:, 0].exp().detach()})

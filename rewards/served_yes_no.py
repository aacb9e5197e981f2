"""P(yes) of a served vision-language model as a reward, read from the first token of its answer.

VQAScore's question (arXiv 2404.01291), normalised over both answers: P(yes) / (P(yes) + P(no)), so that the probability
of other words does not count. Not differentiable: images are sent as PNG files. Left out: answers of several tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alignkit.records import Prompt, Scores
from rewards.models.media import check_media
from rewards.models.vlm import listed
from rewards.serving.judge import TOP
from rewards.serving.messages import text_part, user
from rewards.serving.served_base import ServedBase

if TYPE_CHECKING:
    from torch import Tensor


class ServedYesNo(ServedBase):
    """P(yes) against P(no) of the answer's first token, in [0, 1]; the part `margin` is its log-odds.

    question: sent with each medium; `{prompt}` is the caption. yes, no: words of that meaning, in lower case; case and
    white space before a word are ignored. options: those of `ServedBase`. A row is NaN, and counted, if the answer
    begins with neither (`malformed`) or the request failed every attempt (`failed`). Only the first token is
    read, so a reply that ends at the limit of one token is complete.
    """

    name = "served_yes_no"
    needs_prompt = True
    differentiable = False
    comparable_across_prompts = True
    native_range = (0.0, 1.0)
    licence = "that of the served model"
    source = "https://arxiv.org/abs/2404.01291"
    get = "`vllm serve FOLDER --served-model-name NAME` gives base_url and model"

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        question: str = 'Does this figure show "{prompt}"? Please answer Yes or No.',
        yes: Sequence[str] = ("yes",),
        no: Sequence[str] = ("no",),
        **options: Any,
    ) -> None:
        self.question = question
        self.yes, self.no = listed(yes, "served_yes_no: yes"), listed(no, "served_yes_no: no")
        super().__init__(base_url, model, **options)

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """`total` [B] and `margin` [B], float64. Raises ServerError if the server cannot be used."""
        import torch

        check_media(media, prompts, self)
        requests = [self._request(*row) for row in zip(media, prompts, strict=True)]
        replies = self.client.ask(requests, label=self.name, allow_cut_off=True)
        margins = [reply.margin(self.yes, self.no) if reply else math.nan for reply in replies]
        self._abstentions["failed"] += replies.count(None)
        self._abstentions["malformed"] += sum(map(math.isnan, margins)) - replies.count(None)
        margin = torch.tensor(margins, dtype=torch.float64)
        return Scores(margin.sigmoid(), {"margin": margin})

    def _request(self, media: Tensor, prompt: Prompt) -> dict[str, Any]:
        question = text_part(self.question.replace("{prompt}", prompt.text))
        messages = user([*self._media_parts(media), question])
        return {"messages": messages, "temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": TOP}

"""UnifiedReward (arXiv 2503.05236) on a server: a vision-language model writes scores, which are parsed strictly.

The questions are those of its training (github.com/CodeGoat24/UnifiedReward, `inference_qwen`): version 1 ends with
"Final Score:", version 2 has three axes, whose mean is the total here, as in published training with it.
Not differentiable. Left out: pairwise ranking (`rewards.serving.judge`, question `unified_reward`), word-wise scores of
version 1.5, editing, the -Think variants.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError
from alignkit.records import Prompt, Scores
from rewards.models.media import check_media
from rewards.serving.messages import text_part, user
from rewards.serving.served_base import ServedBase

if TYPE_CHECKING:
    from torch import Tensor

_V1_IMAGE = """\
You are given a text caption and a generated image based on that caption. Your task is to evaluate this image based on \
two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the accuracy of \
depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color \
accuracy, and overall aesthetic appeal.
Extract key elements from the provided text caption, evaluate their presence in the generated image using the format: \
'element (type): value' (where value=0 means not generated, and value=1 means generated), and assign a score from 1 to \
5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]"""

_V1_VIDEO = """\
Suppose you are an expert in judging and evaluating the quality of AI-generated videos, please watch the frames of a \
given video and see the text prompt for generating the video.
Then give scores from 5 different dimensions:
(1) visual quality: the quality of the video in terms of clearness, resolution, brightness, and color
(2) temporal consistency, the consistency of objects or humans in video
(3) dynamic degree, the degree of dynamic changes
(4) text-to-video alignment, the alignment between the text prompt and the video content
(5) factual consistency, the consistency of the video content with the common-sense and factual knowledge

For each dimension, output a number from [1,2,3,4],\x20
in which '1' means 'Bad', '2' means 'Average', '3' means 'Good',\x20
'4' means 'Real' or 'Perfect' (the video is like a real video)
Finally, based on above 5 dimensions, assign a score from 1 to 10 after 'Final Score:'
Here is an output example:
visual quality: 4
temporal consistency: 4
dynamic degree: 3
text-to-video alignment: 1
factual consistency: 2
Final Score: 6

**Note: In the example above, scores are placeholders meant only to demonstrate the format. Your actual evaluation \
should be based on the quality of the given video.**
Your task is provided as follows: Text Prompt: [{prompt}]"""

_V2 = """\
You are presented with a generated {medium} and its associated text caption. Your task is to analyze the {medium} \
across multiple dimensions in relation to the caption. Specifically:
Provide overall assessments for the {medium} along the following axes (each rated from 1 to 5):
- Alignment Score: How well the {medium} matches the caption in terms of content.
- {axis}
- Style Score: How {look} appealing the {medium} looks, regardless of caption accuracy.

Output your evaluation using the format below:

Alignment Score (1-5): X
{second} Score (1-5): Y
Style Score (1-5): Z

Your task is provided as follows:
Text Caption: [{prompt}]"""


@dataclass(frozen=True, slots=True)
class Form:
    """A question and the answer's lines: `lines` maps a part to (label, least, greatest).

    The part `total`, if there is one, is the total; else the total is the mean of all parts.
    """

    template: str
    lines: dict[str, tuple[str, float, float]]

    def read(self, text: str) -> dict[str, float] | None:
        """The score of every line; None if one is missing, is out of range or has two different numbers."""
        scores = {part: _score(text, *line) for part, line in self.lines.items()}
        return None if any(math.isnan(value) for value in scores.values()) else scores


def _score(text: str, label: str, least: float, greatest: float) -> float:
    # A decimal point must be followed by digits, and no fraction ("4/5") or range ("1-5") may follow the number.
    pattern = rf"(?im)^[\s*#-]*{re.escape(label)}[\s*]*:[\s*]*(\d+(?:\.\d+)?)(?![\d/-])[\s*.]*$"
    values = {float(number) for number in re.findall(pattern, text)}
    value = values.pop() if len(values) == 1 else math.nan
    return value if least <= value <= greatest else math.nan


def _v2(medium: str, second: str, axis: str, look: str) -> Form:
    template = _V2.replace("{medium}", medium).replace("{second}", second).replace("{axis}", axis)
    names = ("Alignment", second, "Style")
    return Form(template.replace("{look}", look), {n.casefold(): (f"{n} Score (1-5)", 1.0, 5.0) for n in names})


_GLITCHES = (
    "Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.)."
)
_PHYSICS = "Physics Score: How well the gravity, movements, collisions, and interactions make physical sense."
_DIMENSIONS = (
    "visual quality",
    "temporal consistency",
    "dynamic degree",
    "text-to-video alignment",
    "factual consistency",
)
FORMS = {
    (1, "image"): Form(_V1_IMAGE, {"total": ("Final Score", 1.0, 5.0)}),
    (1, "video"): Form(
        _V1_VIDEO,
        {name: (name, 1.0, 4.0) for name in _DIMENSIONS} | {"total": ("Final Score", 1.0, 10.0)},
    ),
    (2, "image"): _v2("image", "Coherence", _GLITCHES, "aesthetically"),
    (2, "video"): _v2("video", "Physics", _PHYSICS, "visually"),
}


class UnifiedReward(ServedBase):
    """A served UnifiedReward model's written score; its other numbers are parts.

    version: 1 ("Final Score", 1 to 5, of videos 1 to 10) or 2 (mean of Alignment, Coherence or Physics, Style).
    options: those of `ServedBase`; the published code sends eight frames.
    attempts: a reply that cannot be parsed, or is cut off at `max_tokens`, is requested again, then with `temperature`
    and another seed each. A row without a score after all attempts is NaN, which the score stage quarantines, and is
    counted by its last reply: failed, malformed or cut off (its last number may lack digits).
    """

    name = "unified_reward"
    needs_prompt = True
    differentiable = False
    comparable_across_prompts = True
    licence = "MIT"
    source = "https://arxiv.org/abs/2503.05236"
    get = "`vllm serve FOLDER` of one of CodeGoat24/UnifiedReward-* gives base_url and model"

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        version: int = 2,
        modality: str = "image",
        attempts: int = 3,
        temperature: float = 0.7,
        max_tokens: int = 512,
        **options: Any,
    ) -> None:
        if (version, modality) not in FORMS or attempts < 1:
            raise ConfigError(f"unified_reward: version 1 or 2 of 'image' or 'video', got {version} of '{modality}'")
        self.form = FORMS[version, modality]
        self.native_range = self.form.lines["total" if version == 1 else "alignment"][1:]
        self.attempts, self.temperature, self.max_tokens = attempts, temperature, max_tokens
        super().__init__(base_url, model, modality=modality, **options)

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """`total` [B] and every line of the answer [B], float64. Raises ServerError if the server cannot be used."""
        import torch

        check_media(media, prompts, self)
        messages = [self._messages(*row) for row in zip(media, prompts, strict=True)]
        parsed: dict[int, dict[str, float]] = {}
        complete: dict[int, str] = {}
        pending = list(range(len(messages)))
        for attempt in range(self.attempts):
            replies = self.client.ask([self._request(messages[row], attempt) for row in pending], label=self.name)
            self._abstentions["failed"] += replies.count(None)
            received = {row: reply for row, reply in zip(pending, replies, strict=True) if reply}
            complete = {row: reply.text for row, reply in received.items() if not reply.is_cut_off}
            parsed |= {row: scores for row, text in complete.items() if (scores := self.form.read(text))}
            pending = [row for row in received if row not in parsed]
        self._abstentions.update("malformed" if row in complete else "cut off" for row in pending)
        no_scores = dict.fromkeys(self.form.lines, math.nan)
        rows = [parsed.get(row, no_scores) for row in range(len(messages))]
        parts = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in self.form.lines}
        total = parts.pop("total", None)
        return Scores(torch.stack(list(parts.values())).mean(0) if total is None else total, parts)

    def _messages(self, media: Tensor, prompt: Prompt) -> list[dict[str, Any]]:
        question = text_part(self.form.template.replace("{prompt}", prompt.text))
        return user([*self._media_parts(media), question])

    def _request(self, messages: list[dict[str, Any]], attempt: int) -> dict[str, Any]:
        sampling = {"temperature": self.temperature, "seed": attempt} if attempt else {"temperature": 0}
        return {"messages": messages, "max_tokens": self.max_tokens, **sampling}

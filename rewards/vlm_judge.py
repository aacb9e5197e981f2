"""A vision-language model in this process as a judge of two images or clips, which it sees side by side.

Both orders are asked, and an answer counts only where they agree, as with a served judge. The models are those of
`rewards.models.vlm`, whose turns hold one medium: the two are joined into one, left and right, with a gap of
mid-grey between them. Not here: several media in one turn, as servers show them (`rewards.serving.judge`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError
from alignkit.records import Prompt, Verdict
from rewards.models.media import check_media
from rewards.models.vlm import VlmCritic, known_modality
from rewards.serving.judge import PairQuestion, read_question

if TYPE_CHECKING:
    from torch import Tensor

_GAP = 0.5  # grey between the two


class VlmJudge:
    """A Qwen2-VL, 2.5-VL or 3-VL model as `alignkit.protocols.Judge`; its answers are decoded greedily.

    model: folder or hub id. question: the path of a YAML file (`rewards.serving.judge.read_question`) or a
    PairQuestion, which calls the media left and right; its `labels` are not used. modality: "image" or "video".
    critic: options of `VlmCritic` (device, dtype, rate, min_pixels, max_pixels).
    """

    name = "vlm_judge"
    needs_prompt = True

    def __init__(
        self,
        model: str,
        *,
        question: str | PairQuestion,
        modality: str = "image",
        critic: Mapping[str, Any] | None = None,
    ) -> None:
        self.question = read_question(Path(question)) if isinstance(question, str) else question
        self.modality = known_modality(modality, self.name)
        self.critic = VlmCritic(model, owner=self.name, **(critic or {}))
        self._abstentions: Counter[str] = Counter()

    def compare(self, first: Tensor, second: Tensor, prompts: Sequence[Prompt]) -> list[int]:
        """As `rewards.serving.judge.ServedJudge.compare`; the two media of a pair must have one size."""
        return [verdict.label or 0 for verdict in self.verdicts(first, second, prompts)]

    def verdicts(self, first: Tensor, second: Tensor, prompts: Sequence[Prompt]) -> list[Verdict]:
        """As `compare`, with the reason of an abstention and both orders' answers; no answer: None."""
        for side in (first, second):
            check_media(side, prompts, self)  # type: ignore[arg-type]
        questions = [self.question.template.replace("{prompt}", prompt.text) for prompt in prompts]
        asked, limit = list(enumerate(questions)), self.question.max_tokens
        orders = side_by_side(first, second), side_by_side(second, first)
        texts = [self.critic.write(joined, asked, limit=limit) for joined in orders]
        verdicts = [self.question.verdict(*both) for both in zip(*texts, strict=True)]
        self._abstentions.update(verdict.reason for verdict in verdicts if verdict.reason)
        return verdicts

    def report(self) -> str:
        """Abstentions by reason, in one line."""
        return ", ".join(f"abstained ({reason}) {count}" for reason, count in sorted(self._abstentions.items()))


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Media [..., 3, H, W] of one shape as one medium [..., 3, H, 2 W + gap]; the gap is an eighth of W, at least 1."""
    import torch

    if left.shape != right.shape:
        raise ConfigError(
            f"vlm_judge: media {list(left.shape)} beside {list(right.shape)}; both must have one size, give clips of "
            "one generator or use a served judge"
        )
    gap = left.new_full((*left.shape[:-1], max(1, left.shape[-1] // 8)), _GAP)
    return torch.cat([left, gap, right], dim=-1)

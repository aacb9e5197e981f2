"""CLIP score: scaled cosine of image and prompt embeddings of any CLIP (Hessel et al., arXiv 2104.08718)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from alignkit.errors import ConfigError
from rewards.models.clip import Clip, ClipReward

PREFIX, WEIGHT = "A photo depicts ", 2.5


class ClipScore(ClipReward):
    """100 x cosine in [-100, 100], or with form="paper" the paper's 2.5 x max(cosine, 0) of "A photo depicts PROMPT".

    The paper's form has no gradient where the cosine is negative. `model`, `processor`, `activation`: as in `Clip`.
    Not here: RefCLIPScore, which needs captions written by people.
    """

    name = "clip_score"
    comparable_across_prompts = True
    licence = "that of the CLIP weights"
    source = "https://arxiv.org/abs/2104.08718"
    get = "`hf download openai/clip-vit-large-patch14 --local-dir FOLDER`, or any CLIPModel"

    def __init__(
        self,
        model: str,
        *,
        form: Literal["cosine", "paper"] = "cosine",
        processor: str = "",
        activation: str = "gelu",
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        if form not in ("cosine", "paper"):
            raise ConfigError(f"clip_score: form is '{form}'; choose 'cosine' or 'paper'")
        self._is_paper = form == "paper"
        self.native_range = (0.0, WEIGHT) if self._is_paper else (-100.0, 100.0)
        self.clip = Clip(model, name=self.name, processor=processor, activation=activation, device=device, dtype=dtype)

    def _score(self, media: Tensor, prompts: list[str]) -> Tensor:
        if self._is_paper:
            return WEIGHT * super()._score(media, [PREFIX + prompt for prompt in prompts]).clamp(min=0)
        return 100 * super()._score(media, prompts)

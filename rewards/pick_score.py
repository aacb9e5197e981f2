"""PickScore: a CLIP ViT-H/14 tuned on choices of users (Kirstain et al., arXiv 2305.01569)."""

from __future__ import annotations

from torch import Tensor

from rewards.models.clip import LAION_H, Clip, ClipReward


class PickScore(ClipReward):
    """exp(logit_scale) x cosine, about 20 for published weights; its softmax over images predicts the choice.

    model: `hf download yuvalkirstain/PickScore_v1 --local-dir FOLDER`, or the id; it has no tokenizer of its own, so
    `processor` names the one it was trained with. Some users divide the score by 26; here it is as published.
    """

    name = "pick_score"
    licence = "MIT (code); the weights name none"
    source = "https://arxiv.org/abs/2305.01569"
    get = "`hf download yuvalkirstain/PickScore_v1 --local-dir FOLDER`"

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        *,
        processor: str = LAION_H,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        self.clip = Clip(model, name=self.name, processor=processor, device=device, dtype=dtype)
        self.native_range = (-self.clip.scale, self.clip.scale)

    def _score(self, media: Tensor, prompts: list[str]) -> Tensor:
        return self.clip.scale * super()._score(media, prompts)

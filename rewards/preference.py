"""A preference head of ImageReward's kind (arXiv 2304.05977): picture and prompt are read together into one score.

Trained with Bradley-Terry on pairs, P(a beats b) = sigmoid(score_a - score_b), so scores compare within a prompt only.
The class is a transformers model: `from_pretrained` and safetensors work as everywhere. Not here: how raters were
simulated or heads trained (`alignkit.sandbox`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, PretrainedConfig, PreTrainedModel

from alignkit.errors import MissingFileError
from alignkit.records import Prompt, Scores, texts


class PreferenceConfig(PretrainedConfig):
    """Sizes of a PreferenceModel; `vision` is a CLIPVisionConfig as a dict, `answers` what it scores, verdict first."""

    model_type = "alignkit_preference"

    def __init__(
        self,
        vision: dict[str, Any] | None = None,
        vocab_size: int = 256,
        tokens: int = 16,
        layers: int = 3,
        answers: Sequence[str] = ("verdict",),
        **rest: Any,
    ) -> None:
        self.vision, self.vocab_size, self.tokens, self.layers = vision or {}, vocab_size, tokens, layers
        self.answers = list(answers)
        super().__init__(**rest)


class PreferenceModel(PreTrainedModel):
    """Scores [B, answers] of pixels [B, 3, H, W] in [0, 1] and prompt tokens [B, L]: patches and words meet.

    Each word gets a mark as well: the logit that the picture shows what it says (as raters mark words in RichHF-18K,
    arXiv 2312.10240).
    """

    config_class = PreferenceConfig

    def __init__(self, config: PreferenceConfig) -> None:
        super().__init__(config)
        vision = CLIPVisionConfig(**config.vision)
        width = vision.hidden_size
        self.vision = CLIPVisionModel(vision)
        self.words = nn.Embedding(config.vocab_size, width)
        self.places = nn.Embedding(config.tokens, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.fusion = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.scores = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, len(config.answers)))
        self.marks = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        self.post_init()

    def forward(self, pixels: Tensor, input_ids: Tensor) -> Tensor:
        return self.read(pixels, input_ids)[0]

    def read(self, pixels: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(scores [B, answers], marks [B, L])."""
        patches = self.vision(pixel_values=pixels * 2 - 1).last_hidden_state
        words = self.words(input_ids) + self.places.weight[: input_ids.shape[1]]
        fused = self.fusion(torch.cat([patches, words], dim=1))
        read = fused[:, patches.shape[1] :]
        return self.scores(torch.cat([fused[:, 0], read.mean(1)], dim=1)), self.marks(read).squeeze(-1)


class PreferenceReward:
    """A trained PreferenceModel folder as a reward, differentiable to the pixels."""

    modality = "image"
    needs_prompt = True
    differentiable = True
    comparable_across_prompts = False
    native_range = (-float("inf"), float("inf"))
    licence = "Apache-2.0"
    source = "alignkit.sandbox.raters"

    def __init__(self, model: str, *, device: str = "cpu") -> None:
        if not Path(model).is_dir():
            raise MissingFileError(f"preference: no model folder '{model}'")
        self.name = Path(model).name
        self._model = PreferenceModel.from_pretrained(model, dtype=torch.float32)
        self._model = self._model.to(device).eval().requires_grad_(False)
        self._tokenizer = AutoTokenizer.from_pretrained(model)

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        length = self._model.config.tokens
        tokens = self._tokenizer(
            texts(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self._model.device)
        scores = self._model(media.to(self._model.device), tokens.input_ids)
        return Scores(scores[:, 0], dict(zip(self._model.config.answers[1:], scores[:, 1:].unbind(1), strict=True)))

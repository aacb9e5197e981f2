"""A preference head as in ImageReward (arXiv 2304.05977): one score from image and prompt together.

Trained with Bradley-Terry on pairs, P(a beats b) = sigmoid(score_a - score_b), so scores compare within a prompt only.
The class is a transformers model with `from_pretrained` and safetensors. Not here: simulated raters and the training
of heads (`alignkit.sandbox`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel

from alignkit.errors import MissingFileError
from alignkit.records import Prompt, Scores, texts
from rewards.models.media import check_media, resize
from rewards.models.weights import load_whole


class PreferenceConfig(PretrainedConfig):
    """Sizes of a PreferenceModel; images have `size` pixels a side, `answers` names its scores, the verdict first."""

    model_type = "alignkit_preference"

    def __init__(
        self,
        vocab_size: int = 256,
        tokens: int = 16,
        size: int = 64,
        channels: Sequence[int] = (48, 96, 128),
        layers: int = 4,
        answers: Sequence[str] = ("verdict",),
        **rest: Any,
    ) -> None:
        self.vocab_size, self.tokens, self.size, self.layers = vocab_size, tokens, size, layers
        self.channels, self.answers = list(channels), list(answers)
        super().__init__(**rest)


def _halve(channels: int, wider: int) -> nn.Module:
    """A convolution that halves the image, and one at that size."""
    groups = wider // 16
    return nn.Sequential(
        nn.Conv2d(channels, wider, 3, stride=2, padding=1),
        nn.GroupNorm(groups, wider),
        nn.SiLU(),
        nn.Conv2d(wider, wider, 3, padding=1),
        nn.GroupNorm(groups, wider),
        nn.SiLU(),
    )


class PreferenceModel(PreTrainedModel):
    """Scores [B, answers] of pixels [B, 3, H, W] in [0, 1] and prompt tokens [B, L].

    Convolutions encode the image (a transformer on patches needs far longer to distinguish shapes: arXiv 2106.14881);
    a transformer then processes image positions and prompt words together. Each word also has a mark: the logit that
    the image shows it, as raters mark words in RichHF-18K (arXiv 2312.10240).
    """

    config_class = PreferenceConfig

    def __init__(self, config: PreferenceConfig) -> None:
        super().__init__(config)
        width = config.channels[-1]
        self.look = nn.Sequential(*(_halve(a, b) for a, b in pairwise([3, *config.channels])))
        self.where = nn.Embedding((config.size // 2 ** len(config.channels)) ** 2, width)
        self.words = nn.Embedding(config.vocab_size, width)
        self.order = nn.Embedding(config.tokens, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.fusion = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self.scores = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, len(config.answers)))
        self.marks = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        self.post_init()

    def forward(self, pixels: Tensor, input_ids: Tensor) -> Tensor:
        return self.read(self.see(pixels), input_ids)[0]

    def see(self, pixels: Tensor) -> Tensor:
        """Features of every position of the image, [B, positions, width]."""
        return self.look(pixels * 2 - 1).flatten(2).transpose(1, 2)

    def read(self, seen: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(scores [B, answers], marks [B, L]) of what `see` returned."""
        words = self.words(input_ids) + self.order.weight[: input_ids.shape[1]]
        fused = self.fusion(torch.cat([seen + self.where.weight, words], dim=1))
        image, text = fused.split([seen.shape[1], words.shape[1]], dim=1)
        return self.scores(torch.cat([image.mean(1), text.mean(1)], dim=1)), self.marks(text).squeeze(-1)


AutoConfig.register(PreferenceConfig.model_type, PreferenceConfig, exist_ok=True)  # AutoTokenizer needs it


class PreferenceReward:
    """A trained PreferenceModel folder as a reward, differentiable to the pixels; images are resized to its size."""

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
        try:
            network = load_whole(PreferenceModel, model, "preference", dtype=torch.float32)
            self._tokenizer = AutoTokenizer.from_pretrained(model)
        except OSError as error:
            raise MissingFileError(f"preference: '{model}' is not the whole folder of a model: {error}") from error
        self._model = network.to(device).eval().requires_grad_(False)

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        media, length = check_media(media, prompts, self), self._model.config.tokens
        tokens = self._tokenizer(
            texts(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self._model.device)
        pixels = resize(media.to(self._model.device), *(self._model.config.size,) * 2, "bilinear")
        scores = self._model(pixels.to(self._model.dtype), tokens.input_ids)
        return Scores(scores[:, 0], dict(zip(self._model.config.answers[1:], scores[:, 1:].unbind(1), strict=True)))

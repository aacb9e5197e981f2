"""CLIP score: scaled cosine of picture and prompt embeddings (Hessel et al., arXiv 2104.08718), any CLIPModel folder.

Pictures are resized and normalised with torch alone, so gradients reach the pixels and torchvision is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.errors import MissingFileError
from alignkit.records import Prompt, Scores, texts

if TYPE_CHECKING:
    from torch import Tensor

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipScore:
    """100 x cosine. `model`: folder or hub id of a CLIPModel with its tokenizer."""

    name = "clip_score"
    modality = "image"
    needs_prompt = True
    differentiable = True
    comparable_across_prompts = True
    native_range = (-100.0, 100.0)
    licence = "that of the CLIP weights"
    source = "https://arxiv.org/abs/2104.08718"

    def __init__(self, model: str, *, device: str = "cpu") -> None:
        import json

        import torch
        from transformers import AutoTokenizer, CLIPModel

        try:
            clip = CLIPModel.from_pretrained(model, dtype=torch.float32)
        except OSError as error:
            raise MissingFileError(f"clip_score: '{model}' is no CLIP folder here and no hub id: {error}") from error
        self._clip = clip.to(device).eval().requires_grad_(False)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        normalisation = Path(model) / "preprocessor_config.json"
        stored = json.loads(normalisation.read_text(encoding="utf-8")) if normalisation.is_file() else {}
        self._mean = torch.tensor(stored.get("image_mean", _CLIP_MEAN), device=device).reshape(3, 1, 1)
        self._std = torch.tensor(stored.get("image_std", _CLIP_STD), device=device).reshape(3, 1, 1)

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        import torch
        from torch.nn import functional

        config = self._clip.config
        side = config.vision_config.image_size
        pixels = media.to(self._mean.device)
        if pixels.shape[-1] != side or pixels.shape[-2] != side:
            pixels = functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        tokens = self._tokenizer(
            texts(prompts),
            padding="max_length",
            truncation=True,
            max_length=config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(pixels.device)
        seen = self._clip.get_image_features(pixel_values=(pixels - self._mean) / self._std).pooler_output
        with torch.no_grad():
            said = self._clip.get_text_features(**tokens).pooler_output
        return Scores(100 * functional.cosine_similarity(seen, said, dim=-1))

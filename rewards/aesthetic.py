"""LAION aesthetic predictor v2: five linear layers on CLIP ViT-L/14 (the model behind LAION-Aesthetics v2)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from rewards.models.clip import Clip, ClipReward
from rewards.models.weights import load_strictly, read_state

WIDTHS = (1024, 128, 64, 16, 1)
GET = "https://github.com/christophschuhmann/improved-aesthetic-predictor has sac+logos+ava1-l14-linearMSE.pth (3.7 MB)"


class Aesthetic(ClipReward):
    """Predicted mean opinion score of about 1 to 10, from the image alone; the prompt is ignored.

    model: OpenAI's CLIP ViT-L/14; head: `sac+logos+ava1-l14-linearMSE.pth`. There is no activation between the layers,
    so the score is affine in the normalised embedding, without bounds. It prefers paintings and strong colour.
    """

    name = "aesthetic"
    needs_prompt = False
    comparable_across_prompts = True
    native_range = (-float("inf"), float("inf"))
    licence = "Apache-2.0 (head), MIT (CLIP)"
    source = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
    get = GET

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        *,
        head: str,
        processor: str = "",
        activation: str = "quick_gelu",
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        tensors = read_state(head, owner=self.name, advice=GET)
        self.clip = Clip(model, name=self.name, processor=processor, activation=activation, device=device, dtype=dtype)
        widths = (self.clip.model.config.projection_dim, *WIDTHS)
        self._head = _head(widths)
        load_strictly(self._head, tensors, f"{self.name}: '{head}'")
        exact = torch.promote_types(self.clip.model.dtype, torch.float32)
        self._head.to(device, exact).eval().requires_grad_(False)

    def _score(self, media: Tensor, prompts: list[str]) -> Tensor:  # noqa: ARG002 - the prompt is ignored
        embedded = self.clip.embed_media(media)
        with torch.autocast(embedded.device.type, enabled=False):  # bfloat16 near 5 has steps of 1/32
            return self._head["layers"](embedded).squeeze(-1)


def _head(widths: tuple[int, ...]) -> nn.ModuleDict:
    """Linear layers with the published numbers; Identity replaces the dropout between the first four."""
    layers: list[nn.Module] = []
    for place, (width, narrower) in enumerate(pairwise(widths)):
        layers += [nn.Linear(width, narrower), *([nn.Identity()] if place < 3 else [])]
    return nn.ModuleDict({"layers": nn.Sequential(*layers)})

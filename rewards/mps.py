"""Multi-dimensional Preference Score: CLIP ViT-H/14 and cross attention under a condition (arXiv 2405.14705).

Image tokens attend to those words of the prompt that are similar to the condition, in four layers as in PaLM (arXiv
2204.02311: one head of keys and values, attention and feed-forward in parallel). The published code divides
similarities by the largest of the whole batch before masking; here by the largest of the row, which is equal for one
image and keeps rows independent.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewards.models.clip import LAION_H, Clip, ClipReward
from rewards.models.media import precise
from rewards.models.weights import CONVERT, load_strictly, read_state

CONDITIONS = {
    "aesthetics": "light, color, clarity, tone, style, ambiance, artistry",
    "detail": "shape, face, hair, hands, limbs, structure, instance, texture",
    "alignment": "quantity, attributes, position, number, location",
    "overall": (
        "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
        "texture, quantity, attributes, position, number, location, word, things."
    ),
}
GET = (
    "`hf download RE-N-Y/mpsv1 model.safetensors --local-dir FOLDER`; the authors' MPS_overall_checkpoint.pth "
    f"(https://github.com/Kwai-Kolors/MPS) is a pickled module: {CONVERT}"
)
THRESHOLD = 0.3


class Mps(ClipReward):
    """exp(logit_scale) x cosine of the prompt and of the image after cross attention; within one prompt only.

    model: a file with the published names `model.*` (a transformers CLIP) and `cross_model.*`, perhaps under `mps.`.
    condition: one of `CONDITIONS` or words of your own; the released weights were trained for "overall".
    threshold: a word is used if its similarity to the condition exceeds this share of the prompt's largest one: 0.3
    in the authors' evaluations, 0.01 in their module's own forward and in the port RE-N-Y/mpsv1.
    """

    name = "mps"
    licence = "MIT"
    source = "https://arxiv.org/abs/2405.14705"
    get = GET

    def __init__(
        self,
        model: str,
        *,
        condition: str = "overall",
        threshold: float = THRESHOLD,
        processor: str = LAION_H,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        tensors = {key.removeprefix("mps."): value for key, value in read_state(model, owner="mps", advice=GET).items()}
        own = {
            key.removeprefix("model."): value for key, value in tensors.items() if not key.startswith("cross_model.")
        }
        self.clip = Clip(model, name="mps", tensors=own, processor=processor, device=device, dtype=dtype)
        crossing = {key: value for key, value in tensors.items() if _is_crossing(key)}
        self._cross = nn.ModuleDict({"cross_model": Cross(*_sizes(crossing))})
        load_strictly(self._cross, crossing, f"mps: '{model}'")
        self._cross.to(device, self.clip.model.dtype).eval().requires_grad_(False)
        self._condition, self._threshold = CONDITIONS.get(condition, condition), threshold
        self.native_range = (-self.clip.scale, self.clip.scale)

    def _score(self, media: Tensor, prompts: list[str]) -> Tensor:
        pooled, text = self.clip.read(prompts, tokens=True)
        image = self.clip.model.visual_projection(self.clip.see(media).tokens)
        fused = self._cross["cross_model"](image, text, self._relevant(text))[:, 0]
        return self.clip.scale * functional.cosine_similarity(precise(fused), precise(pooled), dim=-1)

    def _relevant(self, text: Tensor) -> Tensor:
        """Mask [B, L] of tokens `text` [B, L, D] that are similar to the condition, padding included as published."""
        condition = self.clip.read([self._condition], tokens=True)[1][0]
        similar = (text @ condition.t()).amax(-1)
        return similar / similar.amax(-1, keepdim=True) > self._threshold


class Cross(nn.Module):
    """Layers of cross attention (from image to prompt) and self attention; names are those of the checkpoint."""

    def __init__(self, layers: int, width: int, inner: int, head: int, wide: int) -> None:
        super().__init__()
        pairs = ([Asking(width, inner, head, wide), Thinking(width, inner, head, wide)] for _ in range(layers))
        self.layers = nn.ModuleList(nn.ModuleList(nn.ModuleDict({"fn": part}) for part in pair) for pair in pairs)

    def forward(self, image: Tensor, text: Tensor, relevant: Tensor) -> Tensor:
        """Image tokens [B, N, D] after attention to prompt tokens [B, L, D] where `relevant` [B, L] is true."""
        for asking, thinking in self.layers:
            image = image + asking["fn"](image, text, relevant)
            image = image + thinking["fn"](image)
        return image


class Asking(nn.Module):
    """Cross attention with one head of keys and values, in parallel with a gated feed-forward of the same input."""

    def __init__(self, width: int, inner: int, head: int, wide: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * head, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.ff = nn.Sequential(nn.Linear(width, 2 * wide, bias=False), Gate(), nn.Linear(wide, width, bias=False))

    def forward(self, image: Tensor, text: Tensor, relevant: Tensor) -> Tensor:
        """Change of image tokens [B, N, D]; the prompt is not normalised."""
        image = self.norm(image)
        key, value = self.to_kv(text).chunk(2, dim=-1)
        return self.to_out(_attend(self.to_q(image), key, value, relevant[:, None, None])) + self.ff(image)


class Thinking(nn.Module):
    """Self attention with rotary positions and one head of keys and values, in parallel with a gated feed-forward."""

    def __init__(self, width: int, inner: int, head: int, wide: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.splits = (inner, head, head, 2 * wide)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.splits), bias=False)
        self.attn_out = nn.Linear(inner, width, bias=False)
        self.ff_out = nn.Sequential(Gate(), nn.Linear(wide, width, bias=False))

    def forward(self, image: Tensor) -> Tensor:
        """Change of image tokens [B, N, D]; the class token has position 0."""
        query, key, value, wide = self.fused_attn_ff_proj(self.norm(image)).split(self.splits, dim=-1)
        exact, head = torch.promote_types(image.dtype, torch.float32), key.shape[-1]
        planes = torch.arange(0, head, 2, device=image.device, dtype=exact) / head
        angles = torch.arange(image.shape[1], device=image.device, dtype=exact)[:, None] * 10000.0**-planes
        heads = query.unflatten(-1, (-1, head))
        query = _turn(heads, angles[:, None]).flatten(2)
        return self.attn_out(_attend(query, _turn(key, angles), value)) + self.ff_out(wide)


class Gate(nn.Module):
    """SwiGLU (arXiv 2002.05202): the first half times SiLU of the second."""

    def forward(self, wide: Tensor) -> Tensor:
        """[..., 2 W] -> [..., W]."""
        value, gate = wide.chunk(2, dim=-1)
        return functional.silu(gate) * value


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of query [B, N, heads * head] to one head of keys and values [B, L, head]."""
    heads = query.unflatten(-1, (-1, key.shape[-1])).transpose(1, 2)
    key, value = (states[:, None].expand(-1, heads.shape[1], -1, -1) for states in (key, value))
    return functional.scaled_dot_product_attention(heads, key, value, mask).transpose(1, 2).flatten(2)


def _turn(states: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of the last axis, whose halves are the two coordinates of each plane."""
    first, second = states.chunk(2, dim=-1)
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _is_crossing(key: str) -> bool:
    """Whether a published name belongs to the cross model; frequencies are constants, which are not loaded."""
    return key.startswith("cross_model.") and not key.endswith("rotary_emb.inv_freq")


def _sizes(tensors: Mapping[str, Tensor]) -> tuple[int, int, int, int, int]:
    """(layers, width, inner width, head, feed-forward width); the published sizes where the file lacks the tensors."""
    layers = len({key.split(".")[2] for key in tensors}) or 4
    names = [f"cross_model.layers.0.0.fn.{part}.weight" for part in ("to_q", "to_kv", "ff.2")]
    if not all(name in tensors for name in names):
        return layers, 1024, 1024, 64, 4096
    (inner, width), (pair, _), (_, wide) = (tensors[name].shape for name in names)
    return layers, width, inner, pair // 2, wide

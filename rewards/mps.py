"""Multi-dimensional Preference Score: CLIP ViT-H/14 and cross attention under a condition (arXiv 2405.14705).

Words of the prompt that have nothing to do with the condition are hidden from the image, which then asks the rest
through four layers of PaLM's kind (arXiv 2204.02311: one head of keys and values, attention and feed-forward side by
side). The published code masks by similarity over the largest of the whole batch; here it is the row's own, which is
the same for one image and keeps rows independent.
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
    """exp(logit_scale) x cosine of the prompt and of the image that has read the prompt; within one prompt only.

    model: a file with the published names `model.*` (a transformers CLIP) and `cross_model.*`, perhaps under `mps.`.
    condition: one of `CONDITIONS` or words of your own; the released weights were trained for "overall".
    threshold: a word is read where its similarity to the condition exceeds this share of the prompt's largest one: 0.3
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
        pooled, said = self.clip.read(prompts, tokens=True)
        seen = self.clip.model.visual_projection(self.clip.see(media).tokens)
        asked = self._cross["cross_model"](seen, said, self._relevant(said))[:, 0]
        return self.clip.scale * functional.cosine_similarity(precise(asked), precise(pooled), dim=-1)

    def _relevant(self, said: Tensor) -> Tensor:
        """Which tokens [B, L] of prompts `said` [B, L, D], padding among them as published, concern the condition."""
        condition = self.clip.read([self._condition], tokens=True)[1][0]
        similar = (said @ condition.t()).amax(-1)
        return similar / similar.amax(-1, keepdim=True) > self._threshold


class Cross(nn.Module):
    """Layers of cross attention (image asks prompt) and self attention; the names are the checkpoint's."""

    def __init__(self, layers: int, width: int, inner: int, head: int, wide: int) -> None:
        super().__init__()
        pairs = ([Asking(width, inner, head, wide), Thinking(width, inner, head, wide)] for _ in range(layers))
        self.layers = nn.ModuleList(nn.ModuleList(nn.ModuleDict({"fn": part}) for part in pair) for pair in pairs)

    def forward(self, seen: Tensor, said: Tensor, relevant: Tensor) -> Tensor:
        """Picture tokens [B, N, D] after reading prompt tokens [B, L, D] where `relevant` [B, L] is true."""
        for asking, thinking in self.layers:
            seen = seen + asking["fn"](seen, said, relevant)
            seen = seen + thinking["fn"](seen)
        return seen


class Asking(nn.Module):
    """Cross attention with one head of keys and values, beside a gated feed-forward of the same input."""

    def __init__(self, width: int, inner: int, head: int, wide: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * head, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.ff = nn.Sequential(nn.Linear(width, 2 * wide, bias=False), Gate(), nn.Linear(wide, width, bias=False))

    def forward(self, seen: Tensor, said: Tensor, relevant: Tensor) -> Tensor:
        """What is added to image tokens [B, N, D]; the prompt is not normalised."""
        seen = self.norm(seen)
        key, value = self.to_kv(said).chunk(2, dim=-1)
        return self.to_out(_attend(self.to_q(seen), key, value, relevant[:, None, None])) + self.ff(seen)


class Thinking(nn.Module):
    """Self attention with rotary places and one head of keys and values, beside a gated feed-forward."""

    def __init__(self, width: int, inner: int, head: int, wide: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.splits = (inner, head, head, 2 * wide)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.splits), bias=False)
        self.attn_out = nn.Linear(inner, width, bias=False)
        self.ff_out = nn.Sequential(Gate(), nn.Linear(wide, width, bias=False))

    def forward(self, seen: Tensor) -> Tensor:
        """What is added to image tokens [B, N, D]; the class token has place 0."""
        query, key, value, wide = self.fused_attn_ff_proj(self.norm(seen)).split(self.splits, dim=-1)
        exact, head = torch.promote_types(seen.dtype, torch.float32), key.shape[-1]
        planes = torch.arange(0, head, 2, device=seen.device, dtype=exact) / head
        angles = torch.arange(seen.shape[1], device=seen.device, dtype=exact)[:, None] * 10000.0**-planes
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
    """Rotary embedding (arXiv 2104.09864) of the last axis, whose halves are the two parts of each plane."""
    first, second = states.chunk(2, dim=-1)
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _is_crossing(key: str) -> bool:
    """Whether a published name belongs to the cross model; frequencies are constants, which are not loaded."""
    return key.startswith("cross_model.") and not key.endswith("rotary_emb.inv_freq")


def _sizes(tensors: Mapping[str, Tensor]) -> tuple[int, int, int, int, int]:
    """(layers, width, inner width, head, feed-forward width); the published sizes where the file does not tell."""
    layers = len({key.split(".")[2] for key in tensors}) or 4
    names = [f"cross_model.layers.0.0.fn.{part}.weight" for part in ("to_q", "to_kv", "ff.2")]
    if not all(name in tensors for name in names):
        return layers, 1024, 1024, 64, 4096
    (inner, width), (pair, _), (_, wide) = (tensors[name].shape for name in names)
    return layers, width, inner, pair // 2, wide

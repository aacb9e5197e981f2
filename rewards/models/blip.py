"""BLIP (arXiv 2201.12086) as far as a reward needs it: a ViT, and a BERT with cross attention to the image states.

Module names are those of the published checkpoints, so weights load unchanged; sizes are taken from the weights. Heads
are 64 wide in every published size. Not here: dropout, BLIP's decoder, contrastive projections, momentum encoders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from rewards.models.weights import shape_of

HEAD = 64


class _Block(nn.Module):
    """One pre-norm layer of the ViT (eps 1e-6); queries, keys and values come from one matrix."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, states: Tensor) -> Tensor:
        query, key, value = self.attn["qkv"](self.norm1(states)).chunk(3, dim=-1)
        states = states + self.attn["proj"](_attend(query, key, value))
        return states + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(states))))


class VisionTransformer(nn.Module):
    """States [B, 1 + patches, width] of prepared pixels [B, 3, size, size], the class token first."""

    def __init__(self, width: int, inner: int, layers: int, patch: int, tokens: int) -> None:
        super().__init__()
        self.size = patch * round((tokens - 1) ** 0.5)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.blocks = nn.ModuleList(_Block(width, inner) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        states = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            states = block(states)
        return self.norm(states)


class _Attention(nn.Module):
    """BERT's attention of `states` [B, L, width] to `context` [B, S, context width]; post-norm (eps 1e-12)."""

    def __init__(self, width: int, context_width: int) -> None:
        super().__init__()
        sides = {"query": width, "key": context_width, "value": context_width}
        self.self = nn.ModuleDict({name: nn.Linear(side, width) for name, side in sides.items()})
        self.output = _added(width, width)

    def forward(self, states: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.self["query"](states), self.self["key"](context), self.self["value"](context)
        return _add(self.output, _attend(query, key, value, mask), states)


class _Layer(nn.Module):
    """One layer of the text encoder: self attention, cross attention to the image, feed-forward."""

    def __init__(self, width: int, inner: int, image_width: int) -> None:
        super().__init__()
        self.attention = _Attention(width, width)
        self.crossattention = _Attention(width, image_width)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = _added(inner, width)

    def forward(self, states: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        states = self.crossattention(self.attention(states, states, mask), image)
        return _add(self.output, functional.gelu(self.intermediate["dense"](states)), states)


class TextEncoder(nn.Module):
    """States [B, L, width] of tokens [B, L] with `mask` [B, L] (1 for words), given `image` [B, S, image_width]."""

    def __init__(self, words: int, positions: int, width: int, inner: int, layers: int, image_width: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(words, width),
                "position_embeddings": nn.Embedding(positions, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(_Layer(width, inner, image_width) for _ in range(layers))})

    def forward(self, tokens: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        places = self.embeddings["position_embeddings"].weight[: tokens.shape[1]]
        states = self.embeddings["LayerNorm"](self.embeddings["word_embeddings"](tokens) + places)
        for layer in self.encoder["layer"]:
            states = layer(states, mask[:, None, None].bool(), image)
        return states


class Blip(nn.Module):
    """Both encoders: states [B, L, width] of each prompt's words, given its own image."""

    def __init__(self, visual_encoder: VisionTransformer, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.visual_encoder, self.text_encoder = visual_encoder, text_encoder

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.text_encoder(tokens, mask, self.visual_encoder(pixels))


def blip_like(state: Mapping[str, Tensor], prefix: str, where: str) -> Blip:
    """An empty Blip of the size of a checkpoint whose keys begin with `prefix`.

    Raises DataError where a tensor that determines a size is missing.
    """

    def shape(key: str) -> torch.Size:
        return shape_of(state, prefix + key, where)

    width, _, patch, _ = shape("visual_encoder.patch_embed.proj.weight")
    words, text_width = shape("text_encoder.embeddings.word_embeddings.weight")
    layer = "text_encoder.encoder.layer"
    vision = VisionTransformer(
        width,
        shape("visual_encoder.blocks.0.mlp.fc1.weight")[0],
        _count(state, f"{prefix}visual_encoder.blocks."),
        patch,
        shape("visual_encoder.pos_embed")[1],
    )
    text = TextEncoder(
        words,
        shape("text_encoder.embeddings.position_embeddings.weight")[0],
        text_width,
        shape(f"{layer}.0.intermediate.dense.weight")[0],
        _count(state, f"{prefix}{layer}."),
        width,
    )
    return Blip(vision, text)


def _count(keys: Iterable[str], prefix: str) -> int:
    """Number of numbered layers under `prefix`."""
    return len({key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)})


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention with heads of 64, scaled by 1 / 8; positions where `mask` [B, 1, 1, S] is false are ignored."""
    heads = (tensor.unflatten(-1, (-1, HEAD)).transpose(1, 2) for tensor in (query, key, value))
    return functional.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)


def _added(width: int, out: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(width, out), "LayerNorm": nn.LayerNorm(out, eps=1e-12)})


def _add(output: nn.ModuleDict, change: Tensor, states: Tensor) -> Tensor:
    return output["LayerNorm"](output["dense"](change) + states)

"""Tiny CLIPs in the layouts that published files have, and open_clip's network written from its description."""

from __future__ import annotations

import re

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from rewards.models.media import CLIP_MEAN, CLIP_STD

SIDE, WINDOW, WIDTH = 32, 77, 24
LETTERS = "abcdefghijklmnopqrstuvwxyz,."


def tokenizer():
    """A token a letter; the end of text is the last token, as in CLIP's own vocabulary."""
    names = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: index for index, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=WINDOW)


def clip(seed=20, **changes):
    """A random CLIPModel whose features differ from picture to picture and prompt to prompt.

    The seed is one whose cosines are positive and with which MPS hides some words of some prompts.
    """
    shared = {"num_hidden_layers": 2, "hidden_act": "gelu"}
    text = shared | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 1, "vocab_size": 58}
    text |= {"max_position_embeddings": WINDOW, "bos_token_id": 56, "eos_token_id": 57, "pad_token_id": 57}
    vision = shared | {"hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 2}
    vision |= {"image_size": SIDE, "patch_size": 8}
    config = CLIPConfig(text_config=text | changes, vision_config=vision | changes, projection_dim=WIDTH)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim():
                    weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def pictures():
    """Smooth PIL pictures of 8 bits: upright, lying, square at another size, and one that is only cut."""
    return [smooth(*size, seed) for seed, size in enumerate([(90, 61), (48, 75), (80, 80), (SIDE, SIDE + 9)])]


def smooth(height, width, seed):
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width] / 40
    waves = [a * np.sin(b * rows + c * columns + d) for a, b, c, d in rng.uniform(0.5, 4, (12, 4))]
    values = np.stack([sum(waves[k::3]) for k in range(3)], -1)
    low, high = values.min((0, 1)), values.max((0, 1))
    return Image.fromarray(((values - low) / (high - low) * 255).round().astype(np.uint8))


def media(picture):
    """[1, 3, H, W] in [0, 1] of a PIL picture."""
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255


class Block(nn.Module):
    """A residual attention block under open_clip's names."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenClip(nn.Module):
    """open_clip's CLIP: fused projections of queries, keys and values; the text is read at its highest token."""

    def __init__(self, width=128, heads=2, text_width=64, side=SIDE, patch=8, layers=2):
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(width))
        self.visual.positional_embedding = nn.Parameter(torch.randn((side // patch) ** 2 + 1, width))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.visual.transformer = nn.ModuleDict(
            {"resblocks": nn.ModuleList(Block(width, heads) for _ in range(layers))}
        )
        self.visual.proj = nn.Parameter(torch.randn(width, WIDTH) / width**0.5)
        self.token_embedding = nn.Embedding(58, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(WINDOW, text_width))
        text = nn.ModuleList(Block(text_width, text_width // 64) for _ in range(layers))
        self.transformer, self.ln_final = nn.ModuleDict({"resblocks": text}), nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, WIDTH) / text_width**0.5)
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def encode_image(self, pixels):
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        patches = self.visual.conv1((pixels - mean) / std).flatten(2).mT
        x = torch.cat([self.visual.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        x = self.visual.ln_pre(x + self.visual.positional_embedding)
        for block in self.visual.transformer["resblocks"]:
            x = block(x)
        return functional.normalize(self.visual.ln_post(x[:, 0]) @ self.visual.proj, dim=-1)

    def encode_text(self, texts):
        ids = torch.tensor([self.tokens(text) for text in texts])
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((WINDOW, WINDOW), -torch.inf).triu(1)
        for block in self.transformer["resblocks"]:
            x = block(x, mask)
        pooled = self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)]
        return functional.normalize(pooled @ self.text_projection, dim=-1)

    def tokens(self, text):
        """Letters between start (56) and end (57), cut to the window with the end kept, padded with 0."""
        words = [[*word[:-1], f"{word[-1]}</w>"] for word in re.findall("[a-z]+|[.,]+", text)]
        names = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
        ids = [56, *(names.index(piece) for word in words for piece in word), 57]
        ids = ids if len(ids) <= WINDOW else [*ids[: WINDOW - 1], 57]
        return ids + [0] * (WINDOW - len(ids))

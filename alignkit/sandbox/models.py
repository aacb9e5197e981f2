"""The sandbox's models before training: real diffusers / transformers classes at small size, and their tokenizers.

One function a model. Training is in `recipes.py`. Initial weights are functions of torch's seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from alignkit.sandbox.captions import NUMBERS, _plural
from alignkit.sandbox.scenes import BACKGROUNDS, PALETTE, SHAPES, SIZE

TOKENS = 16  # the longest caption has 13 words; begin and end markers make 15
TEXT_WIDTH = 96
SMALL_WIDTH = 32  # of the flow generator's second text encoder
_PLAIN = ("a", "photo", "picture", "drawing", "of", "on", "background", "and", "left", "right", "above", "below")
WORDS = tuple(dict.fromkeys([*_PLAIN, *NUMBERS, *PALETTE, *SHAPES, *map(_plural, SHAPES), *BACKGROUNDS]))


def byte_pairs(words: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """Merges with which every word, given as its letters, becomes one token."""
    merges: list[tuple[str, str]] = []
    while split := [pieces for word in words if len(pieces := _merged(word, merges)) > 1]:
        merges.extend(pair for pair in dict.fromkeys((p[0], p[1]) for p in split) if pair not in merges)
    return merges


def _merged(word: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one word, earlier merges first."""
    pieces = list(word)
    rank = {pair: index for index, pair in enumerate(merges)}
    while pairs := [pair for pair in pairwise(pieces) if pair in rank]:
        best = min(pairs, key=rank.__getitem__)
        at = next(i for i, pair in enumerate(pairwise(pieces)) if pair == best)
        pieces[at : at + 2] = ["".join(best)]
    return pieces


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer in which every word of the grammar is one token."""
    merges = byte_pairs([[*word[:-1], word[-1] + "</w>"] for word in WORDS])
    letters = sorted({letter for word in WORDS for letter in word})
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys([*names, *map("".join, merges)]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def t5_tokenizer(tokens: int = TOKENS, words: Sequence[str] = WORDS) -> T5Tokenizer:
    """A T5 unigram tokenizer with one piece for each of `words`, for prompts of at most `tokens` tokens."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=tokens)


def vae() -> AutoencoderKL:
    """64 x 64 x 3 pixels <-> 16 x 16 x 4 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIZE,
    )


def _text_config(width: int = TEXT_WIDTH, layers: int = 2) -> CLIPTextConfig:
    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def clip() -> CLIPModel:
    """A text tower and a vision tower with embeddings of 96 dimensions; an image is 8 x 8 patches of 8 pixels."""
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    return CLIPModel(
        CLIPConfig(text_config=_text_config().to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT_WIDTH)
    )


def text_encoder() -> CLIPTextModel:
    """The U-Net's CLIP text tower, frozen at its random weights, in which all words are equally far apart.

    The tower of `clip` is unsuitable: colours suffice to lower its contrastive loss, so the states of "circle" and
    "square" differ by 4% (of two colours by 97%), and a generator conditioned on it does not learn shapes. Embeddings
    of unit scale keep all words distinct.
    """
    tower = CLIPTextModel(_text_config())
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "token_embedding" in name or "position_embedding" in name:
                parameter.normal_(std=1.0 if "token" in name else 0.5)
    return tower.eval()


def text_tower(width: int, layers: int) -> CLIPTextModelWithProjection:
    """A CLIP text tower that is trained together with the transformer (`flow.py`)."""
    return CLIPTextModelWithProjection(_text_config(width, layers)).eval()


def t5() -> T5EncoderModel:
    """SD3's third text encoder at the smallest size that loads; its tokenizer keeps one token: a constant state."""
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=TEXT_WIDTH + SMALL_WIDTH,
        d_kv=32,
        d_ff=128,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
    )
    return T5EncoderModel(config).eval()


def unet() -> UNet2DConditionModel:
    """The eps-prediction U-Net: convolutions at 16 x 16, convolutions and cross-attention at 8 x 8."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 160),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def transformer() -> SD3Transformer2DModel:
    """The flow-matching transformer: 64 image tokens beside 16 of the CLIP towers and one of T5, six joint blocks."""
    return SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=TEXT_WIDTH + SMALL_WIDTH,
        caption_projection_dim=160,
        pooled_projection_dim=TEXT_WIDTH + SMALL_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def parameters(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())

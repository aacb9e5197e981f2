"""What tiny random pipelines are put together from, and what a family tells of itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import tokenizers
import transformers
from torch import Tensor

from alignkit.sandbox import models

SIDE = 16  # pixels
WIDTH = 32  # of text states
TOKENS = models.TOKENS
VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


@dataclass(frozen=True)
class Family:
    """build: the pipeline. arguments: what its call needs beside the ordinary. texts: its own conditioning of prompts,
    by the names that the adapter gives. codec: its own latents of pixels, and the pixels that come of them. side:
    pixels a side. frames: of a clip. guidance: a scale at which it calls the network once a step. without: parts of a
    folder that are never loaded. options: keywords of the adapter. loading: keywords of `load_lora_weights`. alone: it
    draws one prompt at a time. late: its network is called from the middle of a chain on.
    """

    build: Callable[[], Any]
    texts: Callable[[Any, Sequence[str]], Mapping[str, Tensor]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    codec: Callable[[Any, Tensor], tuple[Tensor, Tensor]] | None = None  # the ordinary one, without shift
    side: int = SIDE
    frames: int | None = None
    guidance: float = 1.0
    without: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    loading: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False
    late: bool = False


def vae(levels: int = 2, **changes: Any) -> Any:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        **{"scaling_factor": 0.7, **changes},
    )


def clip() -> Any:
    tokenizer = models.clip_tokenizer()
    shared = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = shared | {"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = shared | {"image_size": SIDE, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    return transformers.CLIPModel(config).eval()


def clip_text(*, pooled: bool, places: int = TOKENS) -> Any:
    config = clip().config.text_config
    config.max_position_embeddings = places
    config.projection_dim = WIDTH
    return (transformers.CLIPTextModelWithProjection if pooled else transformers.CLIPTextModel)(config).eval()


def t5(width: int = WIDTH) -> Any:
    size = len(models.t5_tokenizer())
    config = transformers.T5Config(
        vocab_size=size, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return transformers.T5EncoderModel(config).eval()


def gemma_tokenizer(limit: int = 40) -> Any:
    """Letter by letter."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {name: index for index, name in enumerate(names)}
    return transformers.GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=limit)


def gemma() -> Any:
    config = transformers.Gemma2Config(
        vocab_size=len(gemma_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return transformers.Gemma2Model(config).eval()


def unet_2d(**changes: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        block_out_channels=(16,),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        **{"cross_attention_dim": WIDTH, **changes},
    )


def sd3_transformer() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )


def qwen_tokenizer(template: str = "") -> Any:
    """Byte by byte, but for the words of a template, which would leave no place for a prompt."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=letters, special_tokens=["<|endoftext|>"], show_progress=False
    )
    model.train_from_iterator([template] * 2, trainer)
    learnt = json.loads(model.to_str())["model"]
    return transformers.Qwen2Tokenizer(vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]])


def kl_codec(shift: float = 0.0) -> Callable[[Any, Tensor], tuple[Tensor, Tensor]]:
    """(posterior mode - shift) * scale, as diffusers' own training scripts have it."""

    def code(pipeline: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        raw = pipeline.vae.encode(pixels * 2 - 1).latent_dist.mode()
        return (raw - shift) * 0.7, pipeline.vae.decode(raw).sample

    return code

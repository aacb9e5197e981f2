"""A small SDXL with random weights as a pipeline folder, and pairs in Pick-a-Pic's columns, for `against_diffusers`.

A fifth of SDXL's width and half of its attention layers. For a comparison of speed it counts that VAE encoder and text
encoders have the shares of the arithmetic that they have in SDXL itself at 256 pixels: to encode an image takes 0.64
times a U-Net forward for one image, to encode a prompt 0.26 times (at 1024 pixels 0.72 and 0.02). `shares` counts them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS = 77
TOWERS = {"text_encoder": (256, 6), "text_encoder_2": (384, 9)}  # width and layers
TINY_TOWERS = {"text_encoder": (64, 2), "text_encoder_2": (64, 2)}
WORDS = (
    "a",
    "red",
    "green",
    "old",
    "wooden",
    "small",
    "boat",
    "house",
    "cat",
    "bowl",
    "beside",
    "under",
    "the",
    "moon",
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _tokenizer() -> CLIPTokenizer:
    names = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def _tower(kind: Any, width: int, layers: int, words: CLIPTokenizer) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=width,
        max_position_embeddings=TOKENS,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return kind(config)


def _unet(states: int, pooled: int, *, tiny: bool) -> UNet2DConditionModel:
    """SDXL's U-Net, narrow: `states` is the width of its text states, `pooled` that of the pooled text."""
    return UNet2DConditionModel(
        block_out_channels=(32, 32, 64) if tiny else (64, 128, 256),
        attention_head_dim=(1, 1, 2) if tiny else (2, 4, 8),
        transformer_layers_per_block=(1, 1, 1) if tiny else (1, 2, 5),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1 if tiny else 2,
        cross_attention_dim=states,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=pooled + 6 * 32,
    )


def _vae(*, tiny: bool) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8) if tiny else (24, 48, 72, 72),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1 if tiny else 2,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=0.13025,
    )


def build(*, tiny: bool = False) -> diffusers.StableDiffusionXLPipeline:
    """The pipeline, float32, with the same random weights in every call."""
    words, sizes = _tokenizer(), TINY_TOWERS if tiny else TOWERS
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        towers = [
            _tower(kind, *sizes[name], words)
            for name, kind in zip(sizes, (CLIPTextModel, CLIPTextModelWithProjection), strict=True)
        ]
        unet = _unet(sum(width for width, _ in sizes.values()), sizes["text_encoder_2"][0], tiny=tiny)
        vae = _vae(tiny=tiny)
    return diffusers.StableDiffusionXLPipeline(vae, *towers, words, words, unet, scheduler, add_watermarker=False)


def shares(pipeline: diffusers.StableDiffusionXLPipeline, side: int) -> dict[str, float]:
    """GFLOP of one U-Net forward for one image of `side`; those of encoding one image and one prompt over it.

    Counted on copies on the meta device, so nothing is computed.
    """
    names, latent = ("text_encoder", "text_encoder_2"), side // 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    with torch.device("meta"), torch.no_grad():
        unet, vae = (type(part).from_config(part.config) for part in (pipeline.unet, pipeline.vae))
        towers = [type(pipeline.components[name])(pipeline.components[name].config) for name in names]
        width, pooled = unet.config.cross_attention_dim, towers[1].config.projection_dim
        added = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
        x_t, states = torch.zeros(1, 4, latent, latent), torch.zeros(1, TOKENS, width)
        forward = _flop(lambda: unet(x_t, torch.zeros(1), states, added_cond_kwargs=added))
        image = _flop(lambda: vae.encode(torch.zeros(1, 3, side, side)))
        prompt = _flop(lambda: [tower(torch.zeros(1, TOKENS, dtype=torch.long)) for tower in towers])
    return {
        "unet_gflop": round(forward / 1e9, 2),
        "image_over_unet": round(image / forward, 2),
        "prompt_over_unet": round(prompt / forward, 2),
    }


def _flop(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def write_pairs(folder: Path, count: int, side: int) -> Path:
    """`count` rows of jpg_0, jpg_1 (JPEG bytes, `side` square), label_0 and caption, as one parquet file."""
    source = np.random.default_rng(0)

    def image() -> bytes:
        coarse = Image.fromarray(source.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    rows = [
        {
            "jpg_0": image(),
            "jpg_1": image(),
            "label_0": float(source.integers(2)),
            "caption": " ".join(source.choice(WORDS, 8)),
        }
        for _ in range(count)
    ]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder

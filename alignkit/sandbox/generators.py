"""The sandbox's text-to-image generators: how their pipelines are put together and how they were trained.

Both are ordinary diffusers folders trained from scratch with `SFTTrainer` (full fine-tuning of a random network).
`flow` learns from captions that are wrong as often as those of web pictures are (`scenes.WEB_NOISE`), `unet` from clean
ones. How good they are: docs/sandbox.md.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from transformers import set_seed

from alignkit.generators import load_generator
from alignkit.records import Sampling
from alignkit.sandbox import models
from alignkit.sandbox.scenes import SIZE, WEB_NOISE
from alignkit.sandbox.worlds import Captioned
from alignkit.trainers.sft import SFTConfig, SFTTrainer

SAMPLING = Sampling(steps=16, guidance_scale=3.0, height=SIZE, width=SIZE)


@dataclass(frozen=True, slots=True)
class GeneratorRecipe:
    """One training: `scenes` distinct pictures, seen `steps * batch / scenes` times."""

    pipeline: str  # "unet" or "flow"
    scenes: int
    steps: int
    batch: int
    learning_rate: float
    seed: int
    noise: Mapping[str, float]


RECIPES = {
    "unet": GeneratorRecipe("unet", 24_000, 1_850, 64, 1e-3, 201, {}),
    "flow": GeneratorRecipe("flow", 24_000, 2_400, 64, 1e-3, 202, WEB_NOISE),
}


def build_unet(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """SD's anatomy: eps U-Net, CLIP text tower, DDIM."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )
    return StableDiffusionPipeline(
        vae,
        models.text_encoder(pooled=False),
        models.clip_tokenizer(),
        models.unet(),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )


def build_flow(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """SD3's anatomy: rectified-flow transformer, two CLIP text towers, a T5."""
    vae.register_to_config(shift_factor=0.0)  # SD3's pipeline wants one
    return StableDiffusion3Pipeline(
        transformer=models.transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=models.text_encoder(pooled=True),
        tokenizer=models.clip_tokenizer(),
        text_encoder_2=models.text_encoder(pooled=True),
        tokenizer_2=models.clip_tokenizer(),
        text_encoder_3=models.t5(),
        tokenizer_3=models.t5_tokenizer(),
    )


def _scenes(recipe: GeneratorRecipe) -> Iterator[dict[str, Any]]:
    world = Captioned(recipe.scenes, recipe.seed, recipe.noise)
    for index in range(len(world)):
        scene = world[index]
        buffer = io.BytesIO()
        array = (scene["pixels"].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(array).save(buffer, "PNG", compress_level=1)
        yield {"prompt": scene["prompt"], "images": [{"bytes": buffer.getvalue(), "path": None}]}


def dataset(recipe: GeneratorRecipe, work: Path) -> datasets.Dataset:
    """The recipe's captioned pictures as (prompt, images[1])."""
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "images": datasets.List(datasets.Image(decode=False))}
    )
    return datasets.Dataset.from_generator(
        _scenes, features=features, gen_kwargs={"recipe": recipe}, cache_dir=str(work / "scenes")
    )


def train_generator(name: str, models_dir: Path, work: Path, recipe: GeneratorRecipe | None = None) -> Path:
    """Train generator `name` from `models_dir/vae` into `models_dir/name`; continues where it was stopped."""
    recipe = recipe or RECIPES[name]
    start = work / "start"
    set_seed(recipe.seed)
    if not (start / "model_index.json").is_file():
        vae = AutoencoderKL.from_pretrained(models_dir / "vae")
        build = {"unet": build_unet, "flow": build_flow}[recipe.pipeline]
        build(vae).save_pretrained(start)
    generator = load_generator(start, name=name)
    arguments = SFTConfig(
        output_dir=str(work),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.01,
        adam_beta2=0.99,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        full_finetune=True,
        candidates="all",
        caption_dropout=0.1,
        logging_steps=50,
        save_steps=200,
        save_total_limit=1,
        seed=recipe.seed,
        noise_seed=recipe.seed,
    )
    with torch.autocast(generator.device.type, torch.bfloat16):  # latents to bf16 accuracy: three times faster
        trainer = SFTTrainer(generator, arguments, dataset(recipe, work))
    trainer.train(resume_from_checkpoint=True)
    generator.pipeline.to(torch.float16).save_pretrained(models_dir / name)
    return models_dir / name

"""The sandbox's text-to-image generators: how their pipelines are put together and how they were trained.

Both are ordinary diffusers folders. A clean generator is trained on correct captions first: `unet_clean` in four stages
with `SFTTrainer` (full fine-tuning of a random network), `flow_clean` together with its text encoders
(`alignkit.sandbox.flow`). It is then trained through a LoRA on captions of which a share is wrong
(`scenes.POLICY_NOISE`, `scenes.FLOW_NOISE`): the result, `unet` or `flow`, is the policy, which can generate what it
often gets wrong. The same LoRA with the opposite sign is `clean_adapter`: the policy with it is the stronger generator.
Quality: see docs/sandbox.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from transformers import set_seed

from alignkit.adapters import exports, lora
from alignkit.generators import load_generator
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.media import encode_image, quantise
from alignkit.sandbox import models
from alignkit.sandbox.scenes import FLOW_NOISE, HARD, POLICY_NOISE
from alignkit.sandbox.worlds import Captioned
from alignkit.storage import write_text
from alignkit.trainers.sft import SFTConfig, SFTTrainer

FP8 = torch.float8_e4m3fn  # halves a file


@dataclass(frozen=True, slots=True)
class GeneratorRecipe:
    """One training on `scenes` distinct images; `steps * batch / scenes` epochs."""

    start: str  # what is trained: "new unet" or the name of a finished generator
    scenes: int
    steps: int
    batch: int
    learning_rate: float
    seed: int
    noise: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] | None = None  # how often each category is drawn; default: equally
    storage: torch.dtype = torch.float16  # of the network's weights on disk
    error_space: str = "velocity"
    adapter: bool = False  # train a LoRA, merge it, and export its negative as `clean_adapter`


RECIPES = {
    "unet_first": GeneratorRecipe("new unet", 24_000, 1_850, 64, 1e-3, 201, error_space="native"),
    "unet_second": GeneratorRecipe("unet_first", 24_000, 750, 64, 1e-3, 203, weights=HARD),
    "unet_third": GeneratorRecipe("unet_second", 12_000, 400, 64, 7e-4, 206),
    "unet_clean": GeneratorRecipe("unet_third", 16_000, 800, 64, 7e-4, 207, weights=HARD),
    "unet": GeneratorRecipe("unet_clean", 6_000, 220, 64, 1.5e-3, 208, POLICY_NOISE, adapter=True),
    "flow": GeneratorRecipe("flow_clean", 9_000, 500, 64, 1.5e-3, 211, FLOW_NOISE, None, FP8, "native", adapter=True),
}


def build_unet(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """Components as in Stable Diffusion: eps U-Net, CLIP text encoder, DDIM."""
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
        models.text_encoder(),
        models.clip_tokenizer(),
        models.unet(),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )


def build_flow(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Components as in SD3: a rectified-flow transformer, two CLIP text towers (a large and a small one), and a T5.

    The pipeline class requires a T5. Here its tokenizer keeps one token, so that the CLIP towers carry the prompt.
    """
    vae.register_to_config(shift_factor=0.0)  # SD3's pipeline needs one
    return StableDiffusion3Pipeline(
        transformer=models.transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=models.text_tower(models.TEXT_WIDTH, layers=3),
        tokenizer=models.clip_tokenizer(),
        text_encoder_2=models.text_tower(models.SMALL_WIDTH, layers=1),
        tokenizer_2=models.clip_tokenizer(),
        text_encoder_3=models.t5(),
        tokenizer_3=models.t5_tokenizer(tokens=1),
    )


def _scenes(world: Captioned) -> Iterator[dict[str, Any]]:
    for index in range(len(world)):
        scene = world[index]
        data = encode_image(quantise(scene["pixels"]))
        yield {"prompt": scene["prompt"], "images": [{"bytes": data, "path": None}]}


def dataset(recipe: GeneratorRecipe, work: Path) -> datasets.Dataset:
    """The recipe's captioned images as (prompt, images[1])."""
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "images": datasets.List(datasets.Image(decode=False))}
    )
    world = Captioned(recipe.scenes, recipe.seed, recipe.noise, recipe.weights)
    return datasets.Dataset.from_generator(
        _scenes, features=features, gen_kwargs={"world": world}, cache_dir=str(work / "scenes")
    )


def _untrained(start: str, models_dir: Path) -> Any:
    """The pipeline that a recipe trains, in float32."""
    if start == "new unet":
        return build_unet(AutoencoderKL.from_pretrained(models_dir / "vae"))
    return DiffusionPipeline.from_pretrained(models_dir / start, dtype=torch.float32)


def train_generator(name: str, models_dir: Path, out: Path, work: Path, recipe: GeneratorRecipe | None = None) -> Path:
    """Train generator `name` into `out`, from its recipe's start in `models_dir`; continues where it was stopped."""
    recipe = recipe or RECIPES[name]
    start = work / "start"
    set_seed(recipe.seed)
    if not (start / "model_index.json").is_file():
        _untrained(recipe.start, models_dir).save_pretrained(start)
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
        use_cpu=not torch.cuda.is_available(),
        full_finetune=not recipe.adapter,
        candidates="all",
        error_space=recipe.error_space,
        caption_dropout=0.1,
        logging_steps=50,
        save_steps=200,
        save_total_limit=1,
        seed=recipe.seed,
        noise_seed=recipe.seed,
    )
    # Latents to bf16 accuracy, where the hardware is faster with it.
    with torch.autocast(generator.device.type, torch.bfloat16, enabled=bool(arguments.bf16)):
        trainer = SFTTrainer(generator, arguments, dataset(recipe, work))
    trainer.train(resume_from_checkpoint=True)
    if recipe.adapter:
        merge_policy(generator, out)
    store(generator, out, recipe.storage)
    return out


def merge_policy(generator: PipelineGenerator, out: Path) -> None:
    """Export the LoRA of a policy with the opposite sign as `clean_adapter`, and merge it."""
    lora.negate(generator.net)
    exports.export_diffusers({generator.component: generator.net}, out / "clean_adapter")
    lora.negate(generator.net)
    generator.merge_adapter()


def store(generator: PipelineGenerator, out: Path, storage: torch.dtype) -> None:
    """Save the pipeline in float16, its network in `storage`, without paths of this machine."""
    generator.pipeline.to(torch.float16)
    generator.net.to(storage)
    generator.pipeline.save_pretrained(out)
    for file in out.rglob("*.json"):
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored.pop("_name_or_path", None) is not None:
            write_text(file, json.dumps(stored, indent=2) + "\n")

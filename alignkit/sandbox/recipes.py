"""Training of the sandbox's other models: the VAE, the CLIP proxy and the preference heads.

Each recipe is seeded, resumable and runs under plain `transformers.Trainer`; `alignkit sandbox train NAME` repeats one.
The generators are trained by `alignkit.trainers.sft` (see `generators.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import CLIPModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from alignkit.precision import fast_bf16
from alignkit.sandbox import models
from alignkit.sandbox.raters import ASPECTS, TASTES, Comparisons, Readings
from alignkit.sandbox.scenes import PALETTE, SHAPES
from alignkit.sandbox.worlds import Captioned
from alignkit.trainers.resuming import ResumingTrainer


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of one training; `steps * batch` scenes are used, each once."""

    steps: int
    batch: int
    learning_rate: float
    seed: int
    warmup: int = 50

    @property
    def scenes(self) -> int:
        return self.steps * self.batch


# The second stage restarts the learning rate: after one stage, cyan and blue were hardly distinct.
VAE = (
    Recipe(steps=750, batch=24, learning_rate=1.5e-3, seed=101),
    Recipe(steps=450, batch=24, learning_rate=1.5e-3, seed=105),
)
CLIP = Recipe(steps=1000, batch=192, learning_rate=7e-4, seed=102)
# The first stage learns shapes, numbers and colours; which colour belongs to which object, and places, need the others.
READER = (
    Recipe(steps=900, batch=96, learning_rate=1e-3, seed=107),
    Recipe(steps=500, batch=96, learning_rate=1e-3, seed=108),
    Recipe(steps=800, batch=96, learning_rate=1e-3, seed=109),
)
HEADS = {
    "careful": Recipe(steps=150, batch=48, learning_rate=3e-4, seed=103),
    "showy": Recipe(steps=150, batch=48, learning_rate=3e-4, seed=104),
}


def fit(module: nn.Module, dataset: Dataset[Any], recipe: Recipe, work: Path, collate: Any = None) -> None:
    """Train `module` (its forward returns {"loss": ...}) under `transformers.Trainer`; continues from a checkpoint."""
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        weight_decay=0.01,
        max_grad_norm=1.0,
        adam_beta2=0.99,
        bf16=fast_bf16(),
        use_cpu=not torch.cuda.is_available(),
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=25,
        save_steps=200,
        save_total_limit=2,  # the one before stays until the new one is whole
        report_to="none",
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        dataloader_num_workers=0,
    )
    trainer = ResumingTrainer(module, arguments, train_dataset=dataset, data_collator=collate)
    trainer.train(resume_from_checkpoint=True)


class Objective(nn.Module):
    """A module whose forward is a loss; `Trainer` reads this attribute of PreTrainedModel when it resumes."""

    _keys_to_ignore_on_save = None


class _VaeObjective(Objective):
    """Reconstruction (L1 + MSE) and, with a small weight, the KL divergence of the posterior from the unit normal."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, prompt: Any = None) -> dict[str, Tensor]:  # noqa: ARG002 - rows carry it
        target = pixels * 2 - 1
        posterior = self.vae.encode(target).latent_dist
        image = self.vae.decode(posterior.sample()).sample.float()
        error = (image - target).abs().mean() + 2 * (image - target).square().mean()
        return {"loss": error + 5e-7 * posterior.kl().mean()}


def train_vae(out: Path, work: Path, stages: Sequence[Recipe] = VAE) -> AutoencoderKL:
    """Train the autoencoder and set its scaling factor to one over the standard deviation of its latents."""
    set_seed(stages[0].seed)
    vae = models.vae()
    with torch.no_grad():
        # A posterior that starts almost without noise: otherwise the noise hides colours for half of the run.
        vae.quant_conv.bias[vae.config.latent_channels :] -= 6
    for number, recipe in enumerate(stages, start=1):
        scenes = Captioned(recipe.scenes, recipe.seed)
        fit(_VaeObjective(vae), scenes, recipe, work / f"stage-{number}")
    pixels = torch.stack([scenes[i]["pixels"] for i in range(256)])
    with torch.no_grad():
        latents = vae.eval().encode(pixels * 2 - 1).latent_dist.mode()
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
    vae.half().save_pretrained(out)
    return vae


class _ClipObjective(Objective):
    """The symmetric contrastive loss of CLIP."""

    def __init__(self, clip: CLIPModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.clip, self.tokenizer = clip, tokenizer

    def forward(self, pixels: Tensor, prompt: list[str]) -> dict[str, Tensor]:
        tokens = self.tokenizer(prompt, padding="max_length", max_length=models.TOKENS, return_tensors="pt")
        loss = self.clip(pixel_values=pixels * 2 - 1, return_loss=True, **tokens.to(pixels.device)).loss
        return {"loss": loss}


def collate_captioned(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Images stacked, captions as a list."""
    return {"pixels": torch.stack([row["pixels"] for row in rows]), "prompt": [row["prompt"] for row in rows]}


def train_clip(out: Path, work: Path, recipe: Recipe = CLIP) -> CLIPModel:
    """Train the CLIP proxy on clean captioned scenes and save it with its tokenizer."""
    set_seed(recipe.seed)
    clip, tokenizer = models.clip(), models.clip_tokenizer()
    fit(_ClipObjective(clip, tokenizer), Captioned(recipe.scenes, recipe.seed), recipe, work, collate_captioned)
    clip.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return clip


class _ReaderObjective(Objective):
    """Cross-entropy of the object centred in each patch, the mark of each word and the answer to each question."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head
        classes = 1 + len(SHAPES) * len(PALETTE)
        self.names = nn.Linear(head.config.channels[-1], classes)
        # Most patches hold no centre: unweighted, they would be most of the loss.
        self.register_buffer("weight", torch.cat([torch.tensor([0.05]), torch.ones(classes - 1)]))

    def forward(
        self, pixels: Tensor, input_ids: Tensor, labels: Tensor, marks: Tensor, answers: Tensor
    ) -> dict[str, Tensor]:
        features = self.head.see(pixels)
        named = functional.cross_entropy(self.names(features).float().flatten(0, 1), labels.flatten(), self.weight)
        scores, logits = self.head.read(features, input_ids)
        marked = marks >= 0
        words = functional.binary_cross_entropy_with_logits(logits.float()[marked], marks[marked])
        answered = functional.binary_cross_entropy_with_logits(scores.float(), answers)
        return {"loss": named + words + answered}


def collate_readings(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows of `Readings` as a batch, prompts as tokens."""
    stacked = {name: torch.stack([row[name] for row in rows]) for name in ("pixels", "labels", "marks", "answers")}
    return {"input_ids": _tokens([row["prompt"] for row in rows]), **stacked}


_tokenizer = functools.cache(models.clip_tokenizer)  # used for every batch


def _tokens(prompts: Sequence[str]) -> Tensor:
    return _tokenizer()(list(prompts), padding="max_length", max_length=models.TOKENS, return_tensors="pt").input_ids


def train_reader(
    head_class: Any, config_class: Any, out: Path, work: Path, stages: Sequence[Recipe] = READER
) -> nn.Module:
    """Train image and text features before any preference training, as BLIP's pre-training does for ImageReward.

    The head's classes are arguments because this package does not import `rewards`.
    """
    set_seed(stages[0].seed)
    sizes = {"vocab_size": len(models.clip_tokenizer()), "tokens": models.TOKENS, "answers": ("verdict", *ASPECTS)}
    head = head_class(config_class(**sizes))
    objective = _ReaderObjective(head)
    for number, recipe in enumerate(stages, start=1):
        readings = Readings(recipe.scenes, recipe.seed, models.TOKENS)
        fit(objective, readings, recipe, work / f"stage-{number}", collate_readings)
    head.half().save_pretrained(out)
    return head


class _PairObjective(Objective):
    """Bradley-Terry for each answer: -log sigmoid(answer * (first score - second score)); ties have no loss."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, pixels: Tensor, input_ids: Tensor, answers: Tensor) -> dict[str, Tensor]:
        first, second = self.head(pixels, input_ids.repeat(2, 1)).float().chunk(2)
        loss = functional.softplus(-answers * (first - second)) * (answers != 0)
        return {"loss": loss.sum(0).div((answers != 0).sum(0).clamp(min=1)).mean()}


def collate_pairs(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Both images of all pairs in one batch (firsts, then seconds), prompts as tokens."""
    return {
        "pixels": torch.stack([row[side] for side in ("first", "second") for row in rows]),
        "input_ids": _tokens([row["prompt"] for row in rows]),
        "answers": torch.tensor([row["answers"] for row in rows]),
    }


def train_head(
    name: str, head_class: Any, reader: Path, out: Path, work: Path, recipe: Recipe | None = None
) -> nn.Module:
    """Train preference head `name` on its rater's answers, starting from the reader."""
    recipe, tokenizer = recipe or HEADS[name], models.clip_tokenizer()
    set_seed(recipe.seed)
    head = head_class.from_pretrained(reader, dtype=torch.float32)
    pairs = Comparisons(recipe.scenes, recipe.seed, TASTES[name])
    fit(_PairObjective(head), pairs, recipe, work, collate_pairs)
    head.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return head

"""Reference errors computed once and shared by every run over the same data, draws and base weights.

Possible because draws are keyed by (noise seed, prompt id, epoch): a sweep over losses, betas or policy seeds pays for
the reference passes once. Saved as one safetensors file in the cache folder, keyed by all it depends on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from alignkit.adapters.fingerprint import fingerprint
from alignkit.trainers.buckets import BucketBatches
from alignkit.trainers.latents import PROMPT, LatentDataset, collate

if TYPE_CHECKING:
    from alignkit.trainers.rankdpo import RankDPOTrainer


def epochs_needed(trainer: RankDPOTrainer) -> int:
    """Epochs that `max_steps` (or `num_train_epochs`) will touch."""
    args = trainer.args
    if args.max_steps <= 0:
        return math.ceil(args.num_train_epochs)
    batches = BucketBatches(trainer.train_dataset.sizes, args.train_batch_size, drop_last=args.dataloader_drop_last)
    whole = (math.floor if args.dataloader_drop_last else math.ceil)(len(batches) / args.world_size)
    return math.ceil(args.max_steps / max(1, math.ceil(whole / args.gradient_accumulation_steps)))


def precompute(trainer: RankDPOTrainer, dataset: LatentDataset, cache: Path) -> Tensor:
    """Reference errors [epochs, rows, K] of `dataset`, from the cache when an equal run has left them there."""
    epochs = epochs_needed(trainer)
    file = cache / f"reference-{_key(trainer, dataset, epochs)}.safetensors"
    if not file.is_file():
        table = torch.stack([_one_epoch(trainer, dataset, epoch, epochs) for epoch in range(epochs)])
        cache.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")  # runs that share a cache may get here together
        save_file({"errors": table}, temporary)
        temporary.replace(file)
    return load_file(file)["errors"]


def _key(trainer: RankDPOTrainer, dataset: LatentDataset, epochs: int) -> str:
    plan = dataset.plan
    parts = [
        fingerprint(trainer.generator.net),
        dataset.rows._fingerprint,  # noqa: SLF001 - the name `datasets` itself keys its cache with
        hashlib.sha256(json.dumps(None if dataset.picked is None else dataset.picked.tolist()).encode()).hexdigest(),
        [plan.noise_seed, plan.caption_dropout, plan.share_noise, plan.share_timestep, plan.t_min],
        [str(trainer.generator.noise_schedule), trainer.generator.guidance],
        [epochs, trainer.args.bf16, trainer.args.fp16, trainer.args.error_space],
        {key: str(value) for key, value in sorted(trainer.generator.pipeline.scheduler.config.items())},
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@torch.no_grad()
def _one_epoch(trainer: RankDPOTrainer, dataset: LatentDataset, epoch: int, epochs: int) -> Tensor:
    model = trainer.generator.model.to(trainer.args.device).eval()
    dataset.epoch = epoch
    # A generator of its own: iterating would else draw from the global one and change the training that follows.
    own = torch.Generator()
    batches = BucketBatches(dataset.sizes, trainer.args.train_batch_size)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, generator=own)
    label = f"reference errors, epoch {epoch + 1} of {epochs}"
    rows: list[Tensor] = []
    numbers: list[Tensor] = []
    for batch in tqdm(loader, desc=label, disable=trainer.args.disable_tqdm):
        moved = {key: value.to(trainer.args.device) for key, value in batch.items() if key != PROMPT}
        with trainer.accelerator.autocast():
            rows.append(trainer.reference_errors(model, moved).float().cpu())
        numbers.append(batch["row"])
    dataset.epoch = 0
    return torch.cat(rows)[torch.cat(numbers).argsort()]

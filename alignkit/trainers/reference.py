"""Reference errors computed once and shared by every run over the same data, draws and base weights.

Possible because draws are keyed by (noise seed, prompt id, epoch): a sweep over losses, betas or policy seeds pays for
the reference passes once. Saved as one safetensors file in the cache folder, keyed by all it depends on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from alignkit.adapters.fingerprint import fingerprint
from alignkit.storage import write_atomic
from alignkit.trainers.buckets import BucketBatches
from alignkit.trainers.data import collate
from alignkit.trainers.latents import LatentDataset
from alignkit.trainers.sharding import Ranks

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from alignkit.generators.pipeline import PipelineGenerator


def epochs_needed(args: TrainingArguments, latent_shapes: Sequence[Hashable]) -> int:
    """Epochs that `max_steps` (or `num_train_epochs`) will touch, of rows with these shapes."""
    if args.max_steps <= 0:
        return math.ceil(args.num_train_epochs)
    batches = BucketBatches(latent_shapes, args.train_batch_size, drop_last=args.dataloader_drop_last)
    whole = (math.floor if args.dataloader_drop_last else math.ceil)(len(batches) / args.world_size)
    return math.ceil(args.max_steps / max(1, math.ceil(whole / args.gradient_accumulation_steps)))


def reference_key(generator: PipelineGenerator, dataset: LatentDataset, settings: Sequence[Any]) -> str:
    """Identifies the reference errors: by base weights, cached values, draws, schedule and `settings`."""
    plan, picked = dataset.plan, None if dataset.picked is None else dataset.picked.tolist()
    parts = [
        fingerprint(generator.net),
        dataset.key,
        hashlib.sha256(json.dumps([dataset.draw_ids, picked]).encode()).hexdigest(),
        [plan.noise_seed, plan.caption_dropout, plan.share_noise, plan.share_timestep, plan.t_min],
        [str(generator.noise_schedule), generator.guidance],
        list(settings),
        {key: str(value) for key, value in sorted(generator.pipeline.scheduler.config.items())},
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def precompute(
    errors: Callable[[Mapping[str, Any]], Tensor],
    dataset: LatentDataset,
    file: Path,
    *,
    epochs: int,
    batches: Sequence[list[int]],
    ranks: Ranks,
) -> Tensor:
    """Reference errors [epochs, rows, K] of `dataset`, from `file` when an equal run has left them there.

    `errors(batch)` gives [P, K]. All processes call this together: each computes every world-th batch, all get the
    whole table, and rank 0 writes it.
    """
    stored = load_file(file)["errors"] if ranks.rank == 0 and file.is_file() else None
    table = ranks.broadcast(stored)
    if table is None:
        table = torch.stack([_one_epoch(errors, dataset, epoch, batches, ranks) for epoch in range(epochs)])
        if ranks.rank == 0:
            write_atomic(file, save({"errors": table}))  # runs that share a cache may get here together
    return table


def _one_epoch(
    errors: Callable[[Mapping[str, Any]], Tensor],
    dataset: LatentDataset,
    epoch: int,
    batches: Sequence[list[int]],
    ranks: Ranks,
) -> Tensor:
    own = batches[ranks.rank :: ranks.world]
    dataset.epoch = epoch
    # A generator of its own: iterating would else draw from the global one and change the training that follows.
    loader = DataLoader(dataset, batch_sampler=own, collate_fn=collate, generator=torch.Generator())
    bar = tqdm(loader, desc=f"reference errors, epoch {epoch + 1}", disable=ranks.rank > 0 or None)
    rows = [(batch["row"], errors(batch).float().cpu()) for batch in bar]
    dataset.epoch = 0
    gathered = ranks.gather(rows)
    numbers = torch.cat([numbers.cpu() for numbers, _ in gathered])
    return torch.cat([values for _, values in gathered])[numbers.argsort()]

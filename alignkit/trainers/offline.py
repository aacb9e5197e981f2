"""`OfflineTrainer`: methods that train on given images or videos, from cached latents with keyed draws.

It adds to `AlignTrainer` the cache, batches of one size, the errors of policy and reference on the same draws, and
`error_space`. While it trains, text encoders and VAE are not on the accelerator.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from typing_extensions import override

from alignkit.columns import column
from alignkit.errors import ConfigError
from alignkit.escape import get_logger
from alignkit.media import transparency_note
from alignkit.trainers.base import AlignTrainer
from alignkit.trainers.buckets import BucketBatches, report
from alignkit.trainers.config import AlignConfig, OfflineConfig
from alignkit.trainers.data import EpochData
from alignkit.trainers.draws import DrawPlan
from alignkit.trainers.latents import (
    CHANGED,
    PROMPT,
    TRANSPARENT,
    LatentDataset,
    conditioning,
    encode_rows,
    phi_targets,
)
from alignkit.trainers.native_error import DRAWN, mean_square, residual, residuals
from alignkit.trainers.reference import epochs_needed, precompute, reference_key
from alignkit.trainers.sharding import Ranks

logger = get_logger(__name__)


class OfflineTrainer(AlignTrainer):
    """Trains on rows (prompt; images, videos or latents; targets). A method adds its loss and, if need be, its targets.

    `train_dataset` is a `datasets.Dataset` with the columns prompt, images[K] (for a video model videos[K], or
    latents[K, ...] of either) and what `targets` reads. Sizes may differ; a batch holds rows of one size.
    """

    args: OfflineConfig
    parking = "cpu"

    # --- model and data ---

    def prepare_model(self, args: AlignConfig) -> None:
        """As in AlignTrainer; the null condition is encoded once."""
        super().prepare_model(args)
        if self.generator.conditioner.is_switched:
            raise ConfigError(
                "the generator's tuned text encoders act in some steps of a chain alone, and this method trains on "
                "single times: leave out `encoder`, or train with rewards"
            )
        with torch.no_grad(), self._base_texts():
            self.null = self.generator.encode_prompts([""]).null

    def draw_plan(self, args: OfflineConfig) -> DrawPlan:
        """How this method draws time, noise and caption dropout."""
        sample_t = self.generator.noise_schedule.sample_t
        return DrawPlan(sample_t, args.noise_seed, args.caption_dropout, t_min=args.t_min)

    def targets(self, rows: Any, count: int) -> Mapping[str, Sequence[Tensor] | Tensor]:
        """What the loss compares with, by batch key: one tensor a row of `rows`, which hold `count` candidates each."""
        return phi_targets(rows, count)

    @override
    def prepare_data(self, rows: Any, args: Any) -> LatentDataset | None:
        """Encode `rows`, each process a part, or read them from the cache."""
        if rows is None or isinstance(rows, LatentDataset):
            return rows
        ranks = self.ranks
        if args.save_on_each_node:  # the nodes share no folder, so each encodes all rows for itself
            ranks = Ranks(args.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        plan, options = self.draw_plan(args), {"sizes": args.sizes, "targets": self.targets, "ranks": ranks}
        with self._base_texts():
            encoded = encode_rows(self.generator, rows, plan, args.cache_folder, **options)
        if self.generator.model.trained_encoders:
            encoded.prompts = column(rows, PROMPT).to_pylist()
        if args.process_index == 0:
            self.generator.warn_of_cuts(column(rows, PROMPT).unique().to_pylist())
            counts = Counter(encoded.latent_shapes)
            media = sum(shape[0] * count for shape, count in counts.items())
            report(counts, media, encoded.total(CHANGED), args.train_batch_size)
            if transparent := encoded.total(TRANSPARENT):
                logger.warning(transparency_note(transparent, media))
        return encoded

    def _base_texts(self) -> AbstractContextManager[None]:
        """Within it prompts are encoded by the base text encoders; trained ones encode them again in each step."""
        return self.generator.reference() if self.generator.model.trained_encoders else nullcontext()

    @override
    def batches(self, dataset: EpochData, batch_size: int) -> list[list[int]]:
        if not isinstance(dataset, LatentDataset):
            return super().batches(dataset, batch_size)
        return list(BucketBatches(dataset.latent_shapes, batch_size))

    @override
    def _get_dataloader(self, dataset: Any, **options: Any) -> Any:
        if len(set(dataset.latent_shapes)) == 1:
            return super()._get_dataloader(dataset, **options)
        args = self.args
        is_shuffled = options.get("is_training") and args.train_sampling_strategy != "sequential"
        loader = DataLoader(
            dataset,
            batch_sampler=BucketBatches(
                dataset.latent_shapes,
                options["batch_size"],
                epoch=lambda: dataset.epoch,
                seed=(args.seed if args.data_seed is None else args.data_seed) if is_shuffled else None,
                drop_last=args.dataloader_drop_last,
            ),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    # --- errors ---

    def errors(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        *,
        per: Literal["item", "frame"] = "item",
        one_by_one: bool = False,
    ) -> Tensor:
        """Mean squared errors of the native target: [P, K], or [P, K, T] with one mean for each latent frame.

        All candidates go through the model in one call. With `one_by_one` each has a call of its own and is
        checkpointed whole, so that only one candidate's activations are in memory. The gradients are the same; the
        backward pass repeats each candidate's forward pass.
        """
        if not one_by_one:
            return mean_square(self.residuals(model, batch), per)
        cond, space = conditioning(batch, self.null), self.args.error_space

        def error(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
            return mean_square(
                residual(self.generator, model, x0, noise, t, cond, error_space=space).unsqueeze(1), per
            ).squeeze(1)

        columns = zip(*(batch[name].unbind(1) for name in DRAWN), strict=True)
        return torch.stack([checkpoint(error, *column, use_reentrant=False) for column in columns], 1)

    def residuals(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Prediction minus native target, [P, K, C, H, W] or [P, K, C, T, H, W]; see `native_error`."""
        return residuals(self.generator, model, batch, self.null, self.args.error_space)

    @torch.no_grad()
    def reference_errors(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        *,
        per: Literal["item", "frame"] = "item",
        one_by_one: bool = False,
    ) -> Tensor:
        """`errors` of the reference on the same draws."""
        with self.reference():
            return self.errors(model, batch, per=per, one_by_one=one_by_one)

    def reference(self) -> AbstractContextManager[None]:
        """Within it the model is the reference; here the frozen base model."""
        return self.generator.reference()

    def precompute_reference(self, *, one_by_one: bool = False) -> None:
        """Give the training data its reference errors of all epochs, computed once, each process a part."""
        args, dataset = self.args, self.train_dataset
        model = self.generator.model.to(args.device).eval()
        epochs = epochs_needed(args, dataset.latent_shapes)
        key = reference_key(self.generator, dataset, [epochs, args.bf16, args.fp16, args.error_space])

        def errors(batch: Mapping[str, Any]) -> Tensor:
            with self.accelerator.autocast():
                return self.reference_errors(model, self._prepare_inputs(batch), one_by_one=one_by_one)

        with self.components_on(self.parking):
            dataset.reference = precompute(
                errors,
                dataset,
                args.cache_folder / f"reference-{key}.safetensors",
                epochs=epochs,
                batches=self.batches(dataset, args.train_batch_size),
                ranks=self.ranks,
            )

    @override
    def data_summary(self) -> dict[str, Any]:
        return {**super().data_summary(), "candidates a prompt": self.train_dataset.latent_shapes[0][0]}

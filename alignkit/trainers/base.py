"""`AlignTrainer`: the one subclass of `transformers.Trainer`. A method adds its loss, nothing else.

What it adds to Trainer: cached latents with keyed draws, checkpoints that know whether they are whole, a health panel,
a stop before the optimizer sees a non-finite loss, validation pictures with held-out reward means, and adapter export.
Deliberately not here: how a model card is worded (`evaluation.card`) and what the cache holds (`latents`).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object, save_fsdp_optimizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME
from typing_extensions import override

from alignkit.diffusion.schedules import expand
from alignkit.errors import CheckpointMismatchError, ConfigError, NumericsError
from alignkit.evaluation.card import CardInputs, write_card
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.provenance import without_defaults
from alignkit.trainers.buckets import BucketBatches, report
from alignkit.trainers.checkpoint import find_checkpoint, mark_complete, mark_incomplete, require_whole
from alignkit.trainers.config import AlignConfig
from alignkit.trainers.latents import PROMPT, DrawPlan, LatentDataset, collate, conditioning, encode_rows
from alignkit.trainers.sharding import fill, gather, settle_layout, whole
from alignkit.trainers.validation import Validation

MAX_WEIGHT = 20.0


def _is_metric(name: str) -> bool:
    """Of a logged evaluation, what a reader of the model card wants to see."""
    return name == "eval_loss" or name.startswith("eval_reward/")


class _Epochs(TrainerCallback):
    """Tells the data which epoch's draws to make; accelerate forgets to, with several processes or after a resume."""

    def __init__(self, dataset: LatentDataset) -> None:
        self.dataset = dataset

    @override
    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.dataset.epoch = int(state.epoch or 0)


class AlignTrainer(Trainer):
    """Trains `generator.model` on rows (prompt, images, phi).

    Args:
        generator: what is aligned; a LoRA is put on it unless it carries one or `args.full_finetune`.
        args: an AlignConfig.
        train_dataset: a `datasets.Dataset` with columns prompt, images[K] (for a video model videos[K]) and, for
            preference losses, phi[K]. Sizes may differ; a batch holds rows of one size.
        eval_dataset: the same, held out; its preference loss is logged at evaluation steps.
        validation: prompts, seeds, sampling and rewards drawn and judged at evaluation steps.
    """

    args: AlignConfig
    needs_reference = False

    def __init__(
        self,
        generator: PipelineGenerator,
        args: AlignConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        validation: Validation | None = None,
        **trainer_options: Any,
    ) -> None:
        self.generator, self.validation = generator, validation
        generator.pipeline.to(args.device)
        args._n_gpu = min(args.n_gpu, 1)  # noqa: SLF001 - no DataParallel: several GPUs are torchrun's or accelerate's
        self._health: dict[str, list[Tensor]] = defaultdict(list)
        self._prepare_model(args)
        with torch.no_grad(), self._base_texts():
            self.null = generator.encode_prompts([""]).null
        train, held_out = (self._encode(rows, args) for rows in (train_dataset, eval_dataset))
        # Trainer refuses eval_strategy without a dataset, also when pictures alone are judged.
        super().__init__(
            generator.model,
            args,
            collate,
            train,
            held_out if held_out is not None else (train if validation else None),
            **trainer_options,
        )
        settle_layout(self.accelerator, asked=bool(args.fsdp))
        self._held_out = held_out
        self.add_callback(_Epochs(train))

    # --- model and data ---

    def _prepare_model(self, args: AlignConfig) -> None:
        if self.generator.is_quantized and (args.full_finetune or args.save_merged):
            raise ConfigError("a quantised model is trained with a LoRA: no full_finetune, no save_merged")
        if args.full_finetune:
            if self.generator.adapted:
                raise ConfigError("full_finetune on a model with an adapter: merge the adapter first, or train a LoRA")
            self.generator.net.float().requires_grad_(True)  # half-precision weights lose small AdamW steps
            if self.needs_reference:
                self.generator.model.freeze_copy()
        elif self.generator.component not in self.generator.adapted:
            torch.manual_seed(args.seed)
            self.generator.add_lora(args.lora_rank, args.lora_alpha, args.lora_targets, args.lora_dropout)
        if args.train_text_encoder and not self.generator.model.trained_encoders:
            torch.manual_seed(args.seed)
            targets = args.text_encoder_targets
            self.generator.add_text_lora(args.lora_rank, args.lora_alpha, targets, args.lora_dropout)
        if args.fsdp and self.generator.model.trained_encoders:
            raise ConfigError("the adapter trains text encoders, which fsdp does not shard here; train without fsdp")
        for parameter in self.generator.model.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()

    def draw_plan(self, args: AlignConfig) -> DrawPlan:
        """How this method draws time, noise and caption dropout."""
        sample_t = self.generator.noise_schedule.sample_t
        return DrawPlan(sample_t, args.noise_seed, args.caption_dropout, t_min=args.t_min)

    def _encode(self, rows: Any, args: AlignConfig) -> LatentDataset | None:
        if rows is None or isinstance(rows, LatentDataset):
            return rows
        with args.main_process_first(desc="latents"), self._base_texts():
            encoded = encode_rows(self.generator, rows, self.draw_plan(args), args.cache_folder, sizes=args.sizes)
        if self.generator.model.trained_encoders:
            encoded.rows = encoded.rows.add_column(PROMPT, list(rows[PROMPT]))
        if args.process_index == 0:
            self.generator.warn_of_cuts(rows["prompt"][:])
            changed = sum(encoded.rows["changed"][:])
            report(Counter(encoded.sizes), encoded.phi.numel(), changed, args.train_batch_size)
        return encoded

    def _base_texts(self) -> AbstractContextManager[None]:
        """Within it prompts are encoded as the reference sees them: that is cached, what learns is encoded anew."""
        return self.generator.reference() if self.generator.model.trained_encoders else nullcontext()

    @override
    def _get_dataloader(self, dataset: Any, **options: Any) -> Any:
        if len(set(dataset.sizes)) == 1:
            return super()._get_dataloader(dataset, **options)
        args = self.args
        is_shuffled = options.get("is_training") and args.train_sampling_strategy != "sequential"
        loader = DataLoader(
            dataset,
            batch_sampler=BucketBatches(
                dataset.sizes,
                options["batch_size"],
                epoch=lambda: dataset.epoch,
                seed=(args.seed if args.data_seed is None else args.data_seed) if is_shuffled else None,
                drop_last=args.dataloader_drop_last,
            ),
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    # --- the step ---

    def method_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The method's unreduced loss and its health metrics, for one batch."""
        raise NotImplementedError

    @override
    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean of `method_loss`; raises NumericsError on NaN or infinity, before any gradient or optimizer step."""
        loss, health = self.method_loss(model, inputs)
        loss = loss.mean()
        self._require_finite("loss", loss.detach())
        for name, value in health.items():
            self._health[name].append(value.detach())
        return (loss, None) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.args.fp16:  # whose loss scaler meets infinite gradients by design, and skips the step
            self._require_finite("gradient norm", norm)
        return norm

    def _require_finite(self, name: str, value: Any) -> None:
        if not math.isfinite(value):
            raise NumericsError(
                f"{name} is {float(value)} at step {self.state.global_step}; weights and the last checkpoint are as "
                "they were before this step. Lower learning_rate or beta, or train in float32."
            )

    def errors(self, model: nn.Module, batch: Mapping[str, Tensor], *, residuals: bool = False) -> Tensor:
        """Per-candidate mean squared errors [P, K], or the residuals [P, K, D] they are made of.

        One batched call for all candidates. The network may run in bf16; target and error are float32 at least.

        With `error_space="velocity"` an eps network's squared error is divided by alpha(t)^2, which makes it that of
        v = alpha eps - sigma x0 (Salimans & Ho, arXiv 2202.00512, section 4): the plain eps error hardly weighs high
        noise, where layouts are decided. The weight is held at MAX_WEIGHT; next to pure noise it would pass 200.
        """
        latents_PK = batch["latents"]
        count = latents_PK.shape[1]
        cond = conditioning(batch, self.null).repeat(count)
        x0, noise, t = (batch[name].flatten(0, 1) for name in ("latents", "noise", "t"))
        residual = self._residual(model, x0, noise, t, cond)
        flat = residual.unflatten(0, latents_PK.shape[:2]).flatten(2)
        return flat if residuals else flat.square().mean(-1)

    def _residual(self, model: nn.Module, x0: Tensor, noise: Tensor, t: Tensor, cond: Any) -> Tensor:
        x_t = self.generator.add_noise(x0, noise, t)
        target = self.generator.target(x0, noise, t)
        prediction = model(x_t, t, cond.with_controls(self.generator.training_controls(t)))
        residual = prediction.to(torch.promote_types(prediction.dtype, torch.float32)) - target
        if self.args.error_space == "velocity" and self.generator.prediction == "epsilon":
            alpha, _ = self.generator.noise_schedule.coefficients(t)
            residual = residual * expand(alpha.reciprocal().clamp(max=MAX_WEIGHT**0.5), residual)
        return residual

    # --- logging and evaluation ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the health panel's means since the last one."""
        if "loss" in logs and self._health:
            means = torch.stack([torch.stack(values).float().mean() for values in self._health.values()])
            means = self.accelerator.reduce(means, "mean").tolist()
            health = {f"health/{name}": mean for name, mean in zip(self._health, means, strict=True)}
            self._health.clear()
            self.warn_of(health)
            logs = {**logs, **health}
        super().log(logs, start_time)

    def warn_of(self, health: Mapping[str, float]) -> None:
        """A method's warnings about its health panel."""

    @override
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out loss on fixed draws and held-out reward means on fixed prompts and seeds, both logged."""
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self._held_out_loss(eval_dataset).items()}
        if self.validation is not None:
            # All processes draw the same (none would have anything else to do), one keeps the pictures; the means are
            # made one process's, for each decides which checkpoint is the best.
            name = f"step-{self.state.global_step:06d}.png"
            grid = Path(self.args.output_dir) / "validation" / name if self.is_world_process_zero() else None
            with whole(self.generator):
                shared = [self.validation.run(self.generator, grid)]
            broadcast_object_list(shared)
            metrics |= {f"{metric_key_prefix}_reward/{name}": value for name, value in shared[0].items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _held_out_loss(self, eval_dataset: Any) -> dict[str, float]:
        dataset = self._held_out if eval_dataset is None else eval_dataset
        if dataset is None:
            return {}
        names: list[str] = []
        rows: list[Tensor] = []
        numbers: list[Tensor] = []
        self.model.eval()
        for inputs in self.get_eval_dataloader(dataset):
            with self.accelerator.autocast():
                loss_P, health = self.method_loss(self.model, self._prepare_inputs(inputs))
            names = ["loss", *health]
            columns = [loss_P, *(value.expand_as(loss_P) for value in health.values())]
            rows.append(torch.stack([c.float() for c in columns], -1))
            numbers.append(inputs["row"])
        self.model.train()
        # By row: with several processes accelerate gives some rows twice, so that all have as many batches.
        judged = dict(gather_object(list(zip(torch.cat(numbers).tolist(), torch.cat(rows).tolist(), strict=True))))
        table = torch.tensor([judged[row] for row in sorted(judged)])
        return dict(zip(names, table.mean(0).tolist(), strict=True))

    # --- checkpoints and export ---

    @override
    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Trainer's train; `True` or "latest" means the newest whole checkpoint, a named damaged one is refused."""
        if resume_from_checkpoint in (True, "latest"):
            found = find_checkpoint(Path(self.args.output_dir))
            resume_from_checkpoint = str(found) if found else None
        elif resume_from_checkpoint:
            require_whole(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **options)

    def _trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.generator.model.named_parameters() if p.requires_grad}

    @override
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trained weights into a checkpoint's folder, an export into any other."""
        folder = Path(output_dir or self.args.output_dir)
        if not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            self.export(folder)
            return
        weights = gather(self._trainable())
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({k: v.cpu().contiguous() for k, v in weights.items()}, folder / SAFE_WEIGHTS_NAME)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            mark_incomplete(folder)
        # Trainer would delete the old checkpoints before this one is marked whole: a kill in between would lose all.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Not Trainer's own: it adds a pickled copy of the whole model, frozen weights and all, to every checkpoint.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:  # noqa: ARG002 - the result is pushed instead
        # Not Trainer's own: it uploads the checkpoint's files, pickled arguments among them, not what users load.
        if self.args.hub_strategy != HubStrategy.END:
            self.push_to_hub(f"Training in progress, step {self.state.global_step}")

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        stored = load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)
        present = self._trainable()
        shapes = [{(name, tuple(tensor.shape)) for name, tensor in side.items()} for side in (stored, present)]
        if shapes[0] != shapes[1]:
            odd = sorted(shapes[0] ^ shapes[1])[:3]
            raise CheckpointMismatchError(
                f"'{resume_from_checkpoint}' was written with other trainable weights (first differences: {odd}); "
                "resume with the same LoRA rank, targets and full_finetune"
            )
        for name, parameter in present.items():
            fill(parameter, stored[name])

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def export(self, folder: Path) -> Path:
        """The result in the vanilla layout: LoRA (diffusers, and PEFT in `peft/`), or the whole pipeline folder."""
        with whole(self.generator):
            if self.args.should_save:
                (self.generator.save_merged if self.args.full_finetune else self.generator.save_adapter)(folder)
                write_card(self.card(), folder)
        return folder

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: `export`, which every push begins with, has written the card."""

    def card(self) -> CardInputs:
        """What the model card tells of this training."""
        method = type(self).__name__.removesuffix("Trainer")
        judged = {int(log["step"]): log for log in self.state.log_history if any(map(_is_metric, log))}
        grids = sorted((Path(self.args.output_dir) / "validation").glob("step-*.png"))
        return CardInputs(
            f"{self.generator.name} aligned with {method}",
            method,
            str(self.generator.pipeline.name_or_path),
            config=without_defaults(self.args),
            data={"prompts": len(self.train_dataset), "candidates a prompt": self.train_dataset.phi.shape[1]},
            is_adapter=not self.args.full_finetune,
            validation={s: {n: v for n, v in log.items() if _is_metric(n)} for s, log in judged.items()},
            grid=grids[-1] if grids else None,
            component=self.generator.component,
            loading=self.generator.lora_loading,
            modality=self.generator.modality,
        )

"""`AlignTrainer`: the integration with `transformers.Trainer`, for any method. A method adds its loss and its data.

One training step, in order:
 1. Trainer takes the micro-batches of the step; `_get_num_items_in_batch` sums `loss_weight` over them and all ranks.
 2. For each micro-batch `Trainer.training_step` calls `compute_loss`, under autocast.
 3. `compute_loss` calls `method_loss(model, batch)`: an unreduced loss, its weight, metrics.
 4. `method_loss` calls `model`, which is `trained_module()` as wrapped by DDP or FSDP, never the inner module.
 5. The loss is summed and divided by the step's weight; DDP takes the mean over ranks, hence times their number.
 6. A loss that is NaN or infinite raises NumericsError before the backward pass.
 7. Backward; on the last micro-batch gradients are reduced over ranks, clipped, and their norm is checked too.
 8. The optimizer and the learning-rate schedule step.
 9. `log` adds the metrics' means since the last log as `health/...`.
10. When due: `evaluate` (held-out loss, validation images), `_save_checkpoint`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import SAFE_WEIGHTS_NAME
from typing_extensions import override

from alignkit.adapters.module_tree import ModuleTree
from alignkit.errors import CheckpointMismatchError, ConfigError, DataError, NumericsError
from alignkit.evaluation.card import CardInputs, write_card
from alignkit.provenance import without_defaults
from alignkit.records import LossOutput
from alignkit.trainers.config import AlignConfig
from alignkit.trainers.data import EpochData, PromptData, collate
from alignkit.trainers.means import WeightedMeans, mean_over
from alignkit.trainers.preparation import as_generator, lora_settings, prepare
from alignkit.trainers.resuming import ResumingTrainer
from alignkit.trainers.sharding import Ranks, fill, gather, settle_layout, whole
from alignkit.trainers.validation import Validation

if TYPE_CHECKING:
    from peft import LoraConfig


def _is_metric(name: str) -> bool:
    """Of a logged evaluation, what a reader of the model card wants to see."""
    return name == "eval_loss" or name.startswith("eval_reward/")


class _Epochs(TrainerCallback):
    """Sets the epoch of the data's draws; accelerate does not with several processes or after a resume."""

    def __init__(self, dataset: EpochData) -> None:
        self.dataset = dataset

    @override
    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.dataset.epoch = int(state.epoch or 0)


class AlignTrainer(ResumingTrainer):
    """Trains a generator with a method's loss.

    Args:
        model: a diffusers folder, a hub id, a loaded diffusers pipeline or a generator. A LoRA is put on it unless it
            carries one or `args.full_finetune`.
        args: an AlignConfig.
        train_dataset: what `prepare_data` takes; here prompts (Prompt, str, or rows with a column prompt).
        eval_dataset: the same, held out; its loss is logged at evaluation steps.
        validation: prompts, seeds, sampling and rewards for images generated and scored at evaluation steps.
        peft_config: a LoRA's rank, alpha, targets, dropout and initialisation, used instead of `args.lora_*`.
    """

    args: AlignConfig
    needs_reference = False
    candidates: int | None = 1  # images or videos of a prompt in a step; None: all K. The doctor counts memory by it
    trains_encoders = False  # text encoders in place of the denoiser; for the doctor
    parking: str | None = None  # device of text encoders and VAE while `train` runs; None: they stay

    def __init__(
        self,
        model: Any,
        args: AlignConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        validation: Validation | None = None,
        peft_config: LoraConfig | None = None,
        **trainer_options: Any,
    ) -> None:
        self.generator, self.validation = as_generator(model, args.device), validation
        self.generator.pipeline.to(args.device)
        args._n_gpu = min(args.n_gpu, 1)  # noqa: SLF001 - no DataParallel: several GPUs are torchrun's or accelerate's
        self.ranks = Ranks(args.process_index, args.world_size)
        self._health = WeightedMeans()
        self._peft_config = peft_config
        self.prepare_model(args)
        if validation is not None:  # after `prepare_model`, which may choose the steps of tuned text encoders
            self.generator.require_sampling(validation.sampling)
        train, held_out = (self._rows(rows, args) for rows in (train_dataset, eval_dataset))
        # Trainer refuses eval_strategy without a dataset, also when there is only validation.
        super().__init__(
            self.trained_module(),
            args,
            collate,
            train,
            held_out if held_out is not None else (train if validation else None),
            **trainer_options,
        )
        self.model_accepts_loss_kwargs = True  # Trainer then divides by no number of micro-batches: compute_loss does
        settle_layout(self.accelerator, asked=bool(args.fsdp))
        self._held_out, self._tree = held_out, ModuleTree(self.trained_module())
        if train is not None:
            self.add_callback(_Epochs(train))

    def _rows(self, rows: Any, args: AlignConfig) -> EpochData | None:
        """`prepare_data`; DataError for no rows, before it or after it."""
        dataset = rows
        if rows is not None and len(rows) > 0:
            dataset = self.prepare_data(rows, args)
        if dataset is not None and len(dataset) == 0:
            raise DataError(f"of {len(rows)} rows none is left to train on or to evaluate; look at what filters them")
        return dataset

    # --- what a method may change ---

    def trained_module(self) -> nn.Module:
        """The module that Trainer wraps, optimises and passes to `method_loss`."""
        return self.generator.model

    def prepare_model(self, args: AlignConfig) -> None:
        """Make weights of `trained_module()` trainable; those are kept in float32."""
        self.make_trainable(args)
        for parameter in self.trained_module().parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()

    def make_trainable(self, args: AlignConfig) -> None:
        """Put a LoRA on the denoiser, or let all its weights require gradients."""
        prepare(self.generator, args, self._peft_config, needs_reference=self.needs_reference)

    def prepare_data(self, rows: Any, args: AlignConfig) -> EpochData | None:
        """The dataset of `rows`; its items are what `method_loss` gets, collated. Here `PromptData`."""
        return rows if rows is None or isinstance(rows, EpochData) else PromptData(rows, args.noise_seed)

    def batches(self, dataset: EpochData, batch_size: int) -> list[list[int]]:
        """Row numbers of the held-out batches, in order."""
        numbers = list(range(len(dataset)))
        return [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]

    def method_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> LossOutput:
        """The unreduced loss, its weight and the metrics of one batch; metrics have the same names in every batch."""
        raise NotImplementedError

    def loss_weight(self, batch: Mapping[str, Any]) -> Tensor | float:
        """The weight that `method_loss` will return for `batch`, known without the model; here the number of items.

        The step's weight is needed before its first backward pass, hence this second place.
        """
        return len(next(iter(batch.values())))

    def warn_of(self, health: Mapping[str, float]) -> None:
        """A method's warnings about its logged metrics."""

    def review(self, metrics: Mapping[str, float]) -> Mapping[str, float]:  # noqa: ARG002 - for some methods
        """What a method adds to the metrics of an evaluation before they are logged."""
        return {}

    # --- the step ---

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """The step's weight: over its micro-batches and all ranks."""
        weights = [float(self.loss_weight(batch)) for batch in batch_samples]
        return self.accelerator.reduce(torch.tensor(sum(weights), device=device), "sum")

    @override
    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This batch's share of the step's loss, sum of losses / sum of weights over the whole step.

        Without `num_items_in_batch` the batch counts as the whole step. Raises NumericsError on NaN or infinity, before
        any gradient, and ConfigError where `loss_weight` differs from the loss's own weight.
        """
        output = self.method_loss(model, inputs)
        weight = self._checked_weight(output, inputs)
        if num_items_in_batch is None:
            loss = mean_over(output.loss, weight)
        else:
            loss = mean_over(output.loss, num_items_in_batch) * self.accelerator.num_processes
        self._require_finite("loss", loss.detach())
        self._health.add(output.metrics, weight)
        return (loss, None) if return_outputs else loss

    def _checked_weight(self, output: LossOutput, batch: Mapping[str, Any]) -> float:
        weight, expected = output.total_weight(), float(self.loss_weight(batch))
        if not math.isclose(weight, expected, rel_tol=1e-6):
            name = type(self).__name__
            raise ConfigError(
                f"{name}.method_loss returns weight {weight:g} for a loss of shape {tuple(output.loss.shape)}, but "
                f"{name}.loss_weight(batch) is {expected:g}. Override loss_weight so that it counts the same terms"
            )
        return weight

    @override
    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """As in Trainer, without a walk over all modules: DDP and FSDP hold the parameters of the module itself."""
        if self._has_mixed_mesh_grads(model):
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self._tree.parameters(), self.args.max_grad_norm)

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

    # --- logging and evaluation ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the metrics' means since the last one."""
        if "loss" in logs and self._health:
            means = self._health.reduce(self.accelerator)
            health = {f"health/{name}": mean for name, mean in means.items()}
            self.warn_of(health)
            logs = {**logs, **health}
        super().log(logs, start_time)

    @override
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out loss on fixed draws and held-out reward means on fixed prompts and seeds, both logged."""
        dataset = self._held_out if eval_dataset is None else self._rows(eval_dataset, self.args)
        metrics: dict[str, float] = {}
        if dataset is not None:
            metrics |= {f"{metric_key_prefix}_{name}": mean for name, mean in self._held_out_means(dataset).items()}
        if self.validation is not None:
            grid = Path(self.args.output_dir) / "validation" / f"step-{self.state.global_step:06d}.png"
            with whole(self.generator), self.components_on(self.args.device):
                means = self.validation.run(self.generator, grid, self.ranks)
            metrics |= {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        metrics |= self.review(metrics)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _held_out_means(self, dataset: EpochData) -> dict[str, float]:
        """Loss and metrics over all rows, each counted once.

        Every rank takes every world-th batch. FSDP needs the same number of forward passes on all ranks, so a rank
        whose batches end earlier repeats the last one with weight 0.
        """
        batches = self.batches(dataset, self.args.eval_batch_size)
        own = batches[self.ranks.rank :: self.ranks.world]
        counted = len(own)
        own += batches[-1:] * (math.ceil(len(batches) / self.ranks.world) - counted)
        means = WeightedMeans()
        self.model.eval()
        workers = self.args.dataloader_num_workers
        loader = DataLoader(dataset, batch_sampler=own, collate_fn=self.data_collator, num_workers=workers)
        for number, inputs in enumerate(loader):
            with self.accelerator.autocast():
                output = self.method_loss(self.model, self._prepare_inputs(inputs))
            weight = output.total_weight()
            mean = mean_over(output.loss, weight)
            means.add({"loss": mean, **output.metrics}, weight if number < counted else 0.0)
        self.model.train()
        return means.reduce(self.accelerator)

    @contextmanager
    def components_on(self, device: torch.device | str) -> Iterator[None]:
        """Within it the generator's `idle_parts` that are not trained are on `device`; then back where they were."""
        trained = set(self.trained_module().modules())
        first = {part: next(part.parameters(), None) for part in self.generator.idle_parts if part not in trained}
        places = {part: parameter.device for part, parameter in first.items() if parameter is not None}
        for part in places:
            part.to(device)
        try:
            yield
        finally:
            for part, place in places.items():
                part.to(place)

    # --- checkpoints and export ---

    @override
    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """ResumingTrainer's train, with the parts that it does not call on the device `parking`."""
        self.generator.model.reset_lists()
        self._tree.reset()
        with self.components_on(self.parking or self.args.device):
            return super().train(resume_from_checkpoint, **options)

    def _trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.trained_module().named_parameters() if p.requires_grad}

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
        """What the model card reports of this training."""
        method = type(self).__name__.removesuffix("Trainer")
        judged = {int(log["step"]): log for log in self.state.log_history if any(map(_is_metric, log))}
        grids = sorted((Path(self.args.output_dir) / "validation").glob("step-*.png"))
        config = without_defaults(self.args)
        if self._peft_config is not None:
            config["peft_config"] = lora_settings(self._peft_config)
        return CardInputs(
            f"{self.generator.name} aligned with {method}",
            method,
            str(self.generator.pipeline.name_or_path),
            config=config,
            data=self.data_summary(),
            kind=self.args.result_name,
            validation={s: {n: v for n, v in log.items() if _is_metric(n)} for s, log in judged.items()},
            grid=grids[-1] if grids else None,
            component=self.generator.component,
            loading=self.generator.lora_loading,
            modality=self.generator.modality,
            encoder=self.generator.conditioner.folder,
        )

    def data_summary(self) -> dict[str, Any]:
        """What the model card reports of the training data."""
        return {"prompts": len(self.train_dataset)}

"""Training configs: `transformers.TrainingArguments` with what alignment adds; its keys work as users know them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from alignkit.errors import ConfigError
from alignkit.precision import fast_bf16
from alignkit.trainers.buckets import Sizes
from alignkit.trainers.ranges import LENGTHS, POSITIVE, TRAINER_RANGES, require_in_range

STEPS = 400  # where neither max_steps nor num_train_epochs is set
EPOCHS = 3.0  # of transformers, where max_steps is -1 and num_train_epochs is not set


@dataclass
class AlignConfig(TrainingArguments):
    """Keys that every method shares. Some defaults differ from those of TrainingArguments; their help says why."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="constant_with_warmup", metadata={"help": "Learning-rate schedule."})
    max_steps: None | int = field(  # noqa: RUF036
        default=None,
        metadata={"help": f"Optimizer steps; default: {STEPS}, as RankDPO's paper, or what num_train_epochs gives."},
    )
    num_train_epochs: None | float = field(  # noqa: RUF036
        default=None, metadata={"help": "Times that each row is trained on, instead of max_steps."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log the health panel every this many steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay false, so that a NaN is reported."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay false: alignkit builds its own batches."}
    )
    # HfArgumentParser looks at the second arm of a union, so None comes first here, as in TrainingArguments.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "tensorboard, trackio, wandb, ..."}
    )
    activation_checkpointing_kwargs: dict | str | None = field(
        default_factory=lambda: {"use_reentrant": False}, metadata={"help": "Options of torch's checkpoint."}
    )

    ddp_timeout: int = field(
        default=86_400, metadata={"help": "Seconds that processes wait for each other, e.g. while data are encoded."}
    )
    hub_strategy: HubStrategy | str = field(
        default="every_save", metadata={"help": "When push_to_hub uploads the result: end or every_save."}
    )
    bf16: None | bool = field(  # noqa: RUF036
        default=None, metadata={"help": "Compute in bf16 (autocast); default: where the hardware is faster with it."}
    )

    fsdp: None | bool = field(  # noqa: RUF036
        default=None, metadata={"help": "Shard weights over the GPUs (FSDP2); `fsdp_config` as in transformers."}
    )

    lora_rank: int = field(
        default=16,
        metadata={"help": "Rank of the LoRA; without use with full_finetune or an adapter to continue from."},
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "LoRA alpha; default: the rank (scale 1)."})
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "Suffixes of the layers that get a LoRA; default: the family's attention."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout inside the LoRA."})
    train_text_encoder: bool = field(
        default=False,
        metadata={"help": "A LoRA on the text encoders too, those that the pipeline's own LoRA loader knows."},
    )
    text_encoder_targets: list[str] | None = field(
        default=None, metadata={"help": "Suffixes of their layers that get it; default: CLIP's attention."}
    )
    save_merged: bool = field(
        default=False, metadata={"help": "Beside the adapter, write `merged`: the whole model with it folded in."}
    )
    full_finetune: bool = field(default=False, metadata={"help": "Train all weights of the network, no LoRA."})
    noise_seed: int = field(default=0, metadata={"help": "Seeds timestep, noise and caption draws of every item."})

    @classmethod
    def model_defaults(cls, model: str) -> dict[str, str]:  # noqa: ARG003 - for some methods
        """By key, a sentence about a default that depends on `model` (a folder or hub id), which is not loaded."""
        return {}

    @property
    def trained_rewards(self) -> tuple[str, ...]:
        """Names of the rewards that the loss uses; the trainer gets them, loaded, as its keyword `rewards`."""
        return ()

    @property
    def length(self) -> str:
        """How long the training is: `400 steps` or `3 epochs`."""
        return f"{self.max_steps} steps" if (self.max_steps or 0) > 0 else f"{self.num_train_epochs:g} epochs"

    @property
    def result_name(self) -> str:
        """The folder of the result in `output_dir`, and the key under which a generator's config names it."""
        return "model" if self.full_finetune else "adapter"

    @property
    def trained_part(self) -> str:
        """What is trained, for a dry run."""
        what = "all weights" if self.full_finetune else f"a LoRA of rank {self.lora_rank}"
        return what + (" on network and text encoders" if self.train_text_encoder else "")

    def __post_init__(self) -> None:
        require_in_range(vars(self), TRAINER_RANGES)
        self._settle_length()
        if not torch.accelerator.is_available():
            self.use_cpu = True  # else Trainer refuses bf16
        if self.bf16 is None:
            self.bf16 = not self.fp16 and fast_bf16(use_cpu=bool(self.use_cpu))
        super().__post_init__()
        if self.hub_strategy not in (HubStrategy.END, HubStrategy.EVERY_SAVE):
            raise ConfigError(f"hub_strategy is '{self.hub_strategy}': checkpoints hold pickles; use end or every_save")
        if self.remove_unused_columns or self.logging_nan_inf_filter:
            raise ConfigError("remove_unused_columns and logging_nan_inf_filter must be false: see their help")
        for name, seed in {"seed": self.seed, "data_seed": self.data_seed}.items():
            if seed is not None and not 0 <= seed < 2**32:
                raise ConfigError(f"{name} is {seed}; NumPy takes seeds from 0 to 2**32 - 1")
        self._check_adapter_keys()

    def _settle_length(self) -> None:
        """Of `max_steps` and `num_train_epochs` the one that was set counts; the other gets its value for "unused".

        Those are -1 steps, as in transformers, and 0 epochs: a saved config holds both and is read back as it was.
        """
        steps = None if self.max_steps == -1 else self.max_steps
        epochs = None if steps is not None and self.num_train_epochs == 0 else self.num_train_epochs
        if steps is not None and epochs is not None:
            raise ConfigError(f"max_steps ({steps}) and num_train_epochs ({epochs}) are both set; keep one")
        if steps is None and epochs is None:
            steps, epochs = (STEPS, None) if self.max_steps is None else (None, EPOCHS)
        require_in_range({"max_steps": steps, "num_train_epochs": epochs}, LENGTHS)
        self.max_steps = -1 if steps is None else steps
        self.num_train_epochs = 0.0 if epochs is None else epochs

    def _check_adapter_keys(self) -> None:
        if self.full_finetune and self.lora_targets:
            raise ConfigError("lora_targets and full_finetune exclude each other; keep one")
        if self.full_finetune and self.save_merged:
            raise ConfigError("save_merged is for a LoRA: after full_finetune nothing is left to merge; leave it out")
        if self.train_text_encoder and (self.full_finetune or self.fsdp):
            raise ConfigError("train_text_encoder goes with a LoRA on one device or DDP: no full_finetune, no fsdp")
        if self.text_encoder_targets and not self.train_text_encoder:
            raise ConfigError("text_encoder_targets needs train_text_encoder: true")
        if not self.full_finetune and self.lora_rank < 1:
            raise ConfigError(f"lora_rank is {self.lora_rank}; give at least 1, or full_finetune: true")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ConfigError(f"lora_alpha is {self.lora_alpha}; it must be positive, as the LoRA is scaled by it")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout is {self.lora_dropout}; it must lie in [0, 1)")


@dataclass
class OfflineConfig(AlignConfig):
    """Keys of the methods that train on given images or videos, whose latents are cached."""

    caption_dropout: float = field(
        default=0.1, metadata={"help": "Share of prompts replaced by the null prompt, one draw a prompt."}
    )
    error_space: str = field(
        default="native",
        metadata={"help": "native, or velocity: weigh an eps network's errors as those of a v network (high noise)."},
    )
    t_min: float = field(
        default=0.0,
        metadata={"help": "Train on times in [t_min, 1] only (1 is noise): layout is decided high, texture low."},
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where latents, conditioning and reference errors are stored between runs."}
    )

    resolution: int | None = field(
        default=None,
        metadata={
            "help": "Side of the square whose area images and videos are resized to, each near its own aspect; "
            "default: each keeps its size, cropped to what the network takes."
        },
    )
    bucket_step: int | None = field(
        default=None, metadata={"help": "Pixels between neighbouring sizes; default: 64, less for small resolutions."}
    )
    num_frames: int | None = field(
        default=None, metadata={"help": "First frames of each video to train on; default: all that the codec takes."}
    )
    fps: float | None = field(
        default=None, metadata={"help": "Frame rate that videos are converted to; default: the video's own."}
    )

    @property
    def sizes(self) -> Sizes:
        """What images and videos are resized to."""
        return Sizes(self.resolution, self.bucket_step, self.num_frames, self.fps)

    @property
    def cache_folder(self) -> Path:
        """`cache_dir`, else `output_dir/_cache`: names with an underscore stay out of `push_to_hub`."""
        return Path(self.cache_dir or Path(self.output_dir) / "_cache")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.error_space not in ("native", "velocity"):
            raise ConfigError(f"error_space is '{self.error_space}'; use native or velocity")
        require_in_range(vars(self.sizes), dict.fromkeys(vars(self.sizes), POSITIVE))
        if not 0 <= self.t_min < 1:
            raise ConfigError(f"t_min is {self.t_min}; it must lie in [0, 1)")
        if not 0 <= self.caption_dropout <= 1:
            raise ConfigError(f"caption_dropout is {self.caption_dropout}; it must lie in [0, 1]")

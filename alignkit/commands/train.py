"""`alignkit train rankdpo` and `alignkit train sft`: a generator, ranked rows and a trainer become an adapter.

The trainer's keys stand beside those of the job (`--learning_rate`), as users of TRL know them. Deliberately not here:
any training loop (`alignkit.trainers` on `transformers.Trainer`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alignkit.commands.specs import (
    GeneratorSpec,
    PromptsConfig,
    RewardBuilders,
    RewardSpec,
    absences,
    load_policy,
    require_names,
)
from alignkit.commands.verb import Tree, Verb, execute, finished, mark_finished
from alignkit.config import Located, init_fields
from alignkit.errors import ConfigError, nearest
from alignkit.protocols import require_independent
from alignkit.provenance import fingerprint, write_resolved
from alignkit.records import Prompt, Sampling
from alignkit.resolve import resolve
from alignkit.storage import claim
from data_pipelines.importers import load_ranked

if TYPE_CHECKING:
    from alignkit.trainers.validation import Validation

METHODS = {
    "rankdpo": ("alignkit.trainers.rankdpo:RankDPOConfig", "alignkit.trainers.rankdpo:RankDPOTrainer"),
    "sft": ("alignkit.trainers.sft:SFTConfig", "alignkit.trainers.sft:SFTTrainer"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Pictures drawn and judged during training, every `eval_steps`; the best checkpoint may be kept by their scores.

    rewards: which rewards judge; metrics are eval_reward/NAME, and eval_reward/mean for several.
    prompts: how many held-out prompts.
    seed: fixes the pictures' seeds.
    """

    rewards: Sequence[str]
    prompts: int = 32
    seed: int = 0
    batch_size: int = 16
    sampling: Sampling = field(default_factory=Sampling)

    def build(self, prompts: Sequence[Prompt], rewards: Mapping[str, RewardSpec]) -> Validation:
        """Load the rewards, for the first held-out `prompts`. Raises ConfigError when there are none."""
        from alignkit.trainers.validation import Validation

        if not prompts:
            raise ConfigError("validation has no held-out prompts; raise prompts.held_out or give more prompts")
        builders = RewardBuilders({name: rewards[name] for name in self.rewards})
        judges = {name: builder() for name, builder in builders.items()}
        require_independent(judges)
        return Validation(prompts[: self.prompts], self.sampling, judges, self.seed, self.batch_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """Train a generator; the keys of the trainer stand beside these.

    model: a diffusers folder or a hub id.
    adapter: a LoRA folder to continue from, of its own rank and targets; the reference stays the model without it.
    dtype: the precision of the frozen weights.
    quantize: the network's frozen weights in int8 (torchao) or nf4 (bitsandbytes), for a LoRA on them.
    options: keywords of the family's adapter (Wan 2.2: expert).
    data: ranked dataset, or Pick-a-Pic or TRL pairs, or folders w/ and l/, or (sft) captioned pictures or clips.
    held_out: share of rows kept for the held-out loss, where the data has no split; 0 for none.
    validation: pictures drawn and judged during training.
    prompts: where validation prompts come from (their held-out share is used).
    rewards: the rewards by a name of your choice.
    train: the trainer's keys.
    """

    model: str
    adapter: Path | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["int8", "nf4"] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    data: Path
    held_out: float = 0.1
    validation: ValidationConfig | None = None
    prompts: PromptsConfig | None = None
    rewards: Mapping[str, RewardSpec] = field(default_factory=dict)
    train: Any

    def __post_init__(self) -> None:
        if self.validation is not None:
            require_names(self.validation.rewards, self.rewards, kind="reward", key="validation.rewards")
        if (self.validation is None) != (self.prompts is None):
            raise ConfigError("validation and prompts go together: give both or neither")

    @property
    def policy(self) -> GeneratorSpec:
        """The generator that is trained."""
        loading = {"dtype": self.dtype, "quantize": self.quantize, "options": self.options}
        return GeneratorSpec(model=self.model, adapter=self.adapter, **loading)


def config_class(method: str) -> Any:
    """The trainer config of a method; imports torch."""
    table = {name: config for name, (config, _) in METHODS.items()}
    return resolve(method, table, kind="method")


def with_trainer(job: type, method: str) -> Any:
    """`job` with its `train` section typed as the method's config."""
    return make_dataclass(job.__name__, [("train", config_class(method))], bases=(job,), frozen=True, kw_only=True)


def _schema(method: str, tree: Tree, problems: list[str]) -> Any:
    """Move the trainer's keys into their section."""
    trainer = init_fields(config_class(method))
    own = {name for name in init_fields(TrainJob) if name != "train"}
    nested = tree.pop("train", None)  # as a saved config.yaml has it
    if nested is not None and isinstance(nested.value, dict):
        tree |= {name: value for name, value in nested.value.items() if name not in tree}
    section: Tree = {name: tree.pop(name) for name in list(tree) if name in trainer}
    known = {*own, *trainer}
    unknown = [name for name in tree if name not in own]
    problems += [f"{tree.pop(name).where}: unknown key '{name}'.{nearest(name, known)}" for name in unknown]
    if "output_dir" not in section:
        problems.append("key 'output_dir' is missing: the folder of checkpoints, logs and the result")
    tree["train"] = Located(section, "config")
    return with_trainer(TrainJob, method)


def fit(
    method: str,
    policy: tuple[str, GeneratorSpec],
    args: Any,
    data: Path,
    *,
    held_out: float,
    validation: Callable[[], Validation] | None,
    select: Callable[[Any], Any] = lambda rows: rows,
) -> Path:
    """Train, or continue from the newest whole checkpoint, export, push if asked; returns the folder of the result.

    The result is `output_dir/adapter`, or `output_dir/model` after full fine-tuning. A finished training is recognised
    and loads nothing. `select` may choose or change the training rows (a `datasets.Dataset`).
    """
    from alignkit.trainers.sharding import whole

    folder = Path(args.output_dir)
    inputs = {"policy": policy[1].identity, "data": fingerprint(data)}
    result = folder / ("model" if args.full_finetune else "adapter")
    if finished(folder):
        claim(folder, {"inputs": inputs})
        return result
    train = select(load_ranked(data, "train", held_out=held_out))
    is_judged = held_out > 0 and args.eval_strategy != "no"
    heldout = load_ranked(data, "heldout", held_out=held_out) if is_judged else None
    trainer_class = resolve(method, {name: trainer for name, (_, trainer) in METHODS.items()}, kind="method")
    built = validation() if validation else None
    trainer = trainer_class(load_policy(*policy), args, train, heldout, validation=built)
    claim(folder, {"inputs": inputs})
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or True)
    trainer.save_state()
    trainer.export(result)
    if args.save_merged and not args.full_finetune:
        with whole(trainer.generator):  # all processes take part, one writes
            if args.should_save:
                trainer.generator.save_merged(folder / "merged")
    if args.push_to_hub:
        trainer.push_to_hub()
    mark_finished(folder)
    return result


def _plan(method: str, job: Any) -> list[str]:
    args = job.train
    what = "all weights" if args.full_finetune else f"a LoRA of rank {args.lora_rank}"
    what += " on network and text encoders" if args.train_text_encoder else ""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    amount = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    missing = [] if job.data.exists() else [f"NOT THERE YET: {job.data} (data)"]
    return [
        *absences({"model": job.policy}),
        *missing,
        f"train {what} of {job.model} with {method} on {job.data}: {amount} of {batch} prompts a device",
        f"keep checkpoints, logs and the result in {args.output_dir}",
    ]


def _work(method: str, job: Any) -> None:
    folder = Path(job.train.output_dir)
    write_resolved(folder, job)
    validation = None
    if job.validation is not None:
        held_out = job.prompts.split()[1]
        validation = functools.partial(job.validation.build, held_out, job.rewards)
    policy = (Path(job.model).name, job.policy)
    result = fit(method, policy, job.train, job.data, held_out=job.held_out, validation=validation)
    print(f"result: {result}")
    tuned = "model" if job.train.full_finetune else "adapter"
    print(f"next: alignkit evaluate --base.model {job.model} --tuned.{tuned} {result} ...")


def _main(method: str, summary: str, argv: Sequence[str]) -> None:
    schema, plan, work = (functools.partial(step, method) for step in (_schema, _plan, _work))
    execute(Verb(f"train {method}", summary, schema, plan, work, flat="train"), argv)


def rankdpo(argv: Sequence[str]) -> None:
    """The verb."""
    _main("rankdpo", "Align a generator with ranked candidates; run again, it continues from a checkpoint.", argv)


def sft(argv: Sequence[str]) -> None:
    """The verb."""
    _main("sft", "Train a generator with the plain denoising objective, on winners or on all pictures.", argv)

"""`alignkit train METHOD`: a generator, training data and a trainer become an adapter.

The trainer's keys stand beside those of the job (`--learning_rate`), as users of TRL know them. Deliberately not here:
any training loop (`alignkit.trainers` on `transformers.Trainer`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alignkit.commands.data import data_kind
from alignkit.commands.methods import (
    config_class,
    find_method,
    known_method,
    more_help,
    unchecked_methods,
    with_trainer,
)
from alignkit.commands.policy_job import PolicyJob
from alignkit.commands.specs import (
    GeneratorSpec,
    PromptsConfig,
    RewardSpec,
    ValidationConfig,
    absences,
    require_names,
)
from alignkit.commands.stages import RESUMABLE, default_notes, fit
from alignkit.commands.trainer_keys import require_guard, trained_frames, trained_rewards
from alignkit.commands.training_data import LOADERS, TrainingData
from alignkit.commands.verb import Tree, Verb, execute, is_dry_run, wants_outline
from alignkit.config import Located, init_fields, nearest_key
from alignkit.errors import ConfigError
from alignkit.key_names import advice, with_own_names
from alignkit.provenance import write_resolved
from alignkit.shipped import model_path


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Train a generator; the keys of the trainer stand beside these.

    model: a diffusers folder, a hub id, or sandbox:NAME.
    adapter: a LoRA folder to continue from, of its own rank and targets; the reference stays the model without it.
    encoder: a folder of tuned text encoders; they condition the chains and are trained only by a method on encoders.
    dtype: the precision of the frozen weights.
    quantize: the network's frozen weights in int8 (torchao) or nf4 (bitsandbytes), for a LoRA on them.
    family: 'package.module:attribute' of your own family, for a pipeline class that alignkit does not know.
    options: keywords of the family (Wan 2.2: expert).
    validation: media generated and scored during training.
    rewards: the rewards by a name of your choice.
    train: the trainer's keys.
    """

    model: str
    adapter: Path | None = None
    encoder: Path | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["int8", "nf4"] | None = None
    family: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    validation: ValidationConfig | None = None
    rewards: Mapping[str, RewardSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.validation is not None:
            require_names(self.validation.rewards, self.rewards, kind="reward", key="validation.rewards")
            self.policy.require_frames(self.validation.sampling.num_frames, "validation.sampling.num_frames")
        # The section `train` is in the classes that `with_trainer` makes.
        args = vars(self).get("train", {})
        self.policy.require_frames(trained_frames(args), "num_frames")
        require_names(trained_rewards(args), self.rewards, kind="reward", key="reward_weights")
        require_guard(args, self.validation)

    @property
    def policy(self) -> GeneratorSpec:
        """The generator that is trained."""
        return GeneratorSpec(
            model=self.model,
            adapter=self.adapter,
            encoder=self.encoder,
            dtype=self.dtype,
            quantize=self.quantize,
            family=self.family,
            options=self.options,
        )


@dataclass(frozen=True, kw_only=True)
class DataTrainJob(TrainJob):
    """Train a generator on a dataset; the keys of the trainer stand beside these.

    data: ranked dataset, or Pick-a-Pic or TRL pairs, or folders w/ and l/, or captioned images or clips; for a method
        on other data, a dataset of that kind.
    data_root: the folder of the files that rows name by their path; default: the dataset's own.
    held_out: share of rows kept for the held-out loss, where the data has no split; 0 for none.
    prompts: where validation prompts come from (their held-out share is used).
    """

    data: Path
    data_root: Path | None = None
    held_out: float = 0.1
    prompts: PromptsConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.validation is None) != (self.prompts is None):
            raise ConfigError("validation and prompts go together: give both or neither")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out is {self.held_out}; it must lie in [0, 1)")

    @property
    def source(self) -> str:
        """Where the training data comes from, in words."""
        return str(self.data)

    def missing(self) -> list[str]:
        """Lines for a dry run about data that is not there yet."""
        return [] if self.data.exists() else [f"NOT THERE YET: {self.data} (data)"]

    def training_data(self, method: str) -> TrainingData:
        """The rows, loaded later."""
        kind = find_method(method).data
        return TrainingData(kind=kind, path=self.data, root=self.data_root, held_out=self.held_out)


@dataclass(frozen=True, kw_only=True)
class PromptsTrainJob(TrainJob):
    """Train a generator on prompts alone; the keys of the trainer stand beside these.

    prompts: where prompts come from; the held-out share is for validation and the held-out loss.
    """

    prompts: PromptsConfig

    @property
    def source(self) -> str:
        """Where the training data comes from, in words."""
        return f"the training share of {self.prompts}"

    def missing(self) -> list[str]:
        """Lines for a dry run about data that is not there yet."""
        return []

    def training_data(self, method: str) -> TrainingData:
        """The rows, loaded later."""
        train, held_out = self.prompts.split()
        return TrainingData(kind=find_method(method).data, prompts=(train, held_out))


def _schema(method: str, tree: Tree, problems: list[str], *, dry_run: bool, for_help: bool) -> Any:
    """The config class of a method's verb; moves the trainer's keys into their section."""
    is_unchecked = dry_run and known_method(method) is None
    kind = None if is_unchecked else data_kind(method)
    takes_data = "data" in tree if kind is None or kind.made is PolicyJob else True
    if kind is not None and find_method(method).data not in LOADERS:
        takes_data = False
    job = DataTrainJob if takes_data else PromptsTrainJob
    if for_help:
        return with_trainer(method, job, for_help=True)
    own = init_fields(job)
    nested = tree.pop("train", Located({}, "config"))  # as a saved config.yaml has it
    saved = nested.value if isinstance(nested.value, dict) else {}
    trainer = {*tree, *saved} - set(own) if is_unchecked else set(init_fields(config_class(method)))
    trainer -= {"out", "output_dir"}  # one thing, which verbs call `out`
    known = {*own, *trainer, "out"}
    saved = with_own_names(saved, known, problems, "train.")
    keys = saved | with_own_names(tree, known, problems)
    unknown = [name for name in keys if name not in known]
    for name in unknown:
        hint = advice(name, known) or nearest_key(name, known)
        problems.append(f"{keys.pop(name).where}: unknown key '{name}'.{hint}")
    section: Tree = {name: given for name, given in keys.items() if name in trainer}
    if "out" in keys:
        section["output_dir"] = keys["out"]
    else:
        problems.append("key 'out' is missing: the folder of checkpoints, logs and the result")
    tree.clear()
    tree |= {name: given for name, given in keys.items() if name in own} | {"train": Located(section, "config")}
    return with_trainer(method, job, dry_run=dry_run)


def _plan(method: str, job: Any) -> list[str]:
    args = job.train
    if isinstance(args, Mapping):
        return [
            *absences({"model": job.policy}, rewards=job.rewards, prompts=job.prompts),
            *job.missing(),
            *unchecked_methods([method]),
            f"train {job.model} with {method} on {job.source}",
            f"keep checkpoints, logs and the result in {args['output_dir']}",
        ]
    length = f"{args.length} of {args.per_device_train_batch_size * args.gradient_accumulation_steps} prompts a device"
    return [
        *absences({"model": job.policy}, rewards=job.rewards, prompts=job.prompts),
        *job.missing(),
        f"train {args.trained_part} of {job.model} with {method} on {job.source}: {length}",
        *default_notes(args, job.model),
        f"keep checkpoints, logs and the result in {args.output_dir}",
    ]


def _work(method: str, job: Any) -> None:
    folder = Path(job.train.output_dir)
    write_resolved(folder, job, free=RESUMABLE)
    data, validation = job.training_data(method), None
    if job.validation is not None:
        held_out = data.with_questions(job.prompts.split()[1])
        validation = functools.partial(job.validation.build, held_out, job.rewards)
    policy = (Path(model_path(job.model)).name, job.policy)
    rewards = {name: job.rewards[name] for name in trained_rewards(job.train)}
    result = fit(method, policy, job.train, data, validation=validation, rewards=rewards)
    print(f"result: {result}")
    print(f"next: alignkit evaluate --base.model {job.model} --tuned.{job.train.result_name} {result} ...")


def main(argv: Sequence[str]) -> None:
    """The verb; the first word is the method: a name of `METHODS`, or `package.module:attribute` of a user's own."""
    method, *words = argv
    dry_run = is_dry_run(words)
    plan, work = (functools.partial(step, method) for step in (_plan, _work))
    schema = functools.partial(_schema, method, dry_run=dry_run, for_help=wants_outline(words))
    record = known_method(method) if dry_run else find_method(method)
    summary = record.summary if record else "A method of your own."
    name = f"train {method}"
    verb: Verb[Any] = Verb(
        name,
        summary,
        schema,
        plan,
        work,
        folder=lambda job: Path(job.train.output_dir),
        flat="train",
        distributed=True,
        more=more_help(name),
    )
    execute(verb, words)

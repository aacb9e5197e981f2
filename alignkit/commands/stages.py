"""Services that verbs share: train one policy, compare it with its base, and judge the stored pairs.

Each is resumable in its folder. Deliberately not here: training data (`data`) and what a config holds (`specs`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.adapters.mixture import is_mixture
from alignkit.claims import claim, claimed
from alignkit.commands.methods import trainer_class
from alignkit.commands.specs import (
    GeneratorSpec,
    JudgeSpec,
    RewardBuilders,
    RewardSpec,
    build_generator,
    build_judge,
    identities,
    load_policy,
)
from alignkit.commands.training_data import TrainingData
from alignkit.commands.verb import finished, mark_finished, mark_unfinished
from alignkit.errors import ResumeError, StorageError
from alignkit.evaluation.judged import Judged, judge_pairs, read_judged
from alignkit.evaluation.paired import EvaluateConfig, evaluate
from alignkit.evaluation.results import Evaluation, read_evaluation
from alignkit.generators.base_of import BaseOf
from alignkit.locks import locked
from alignkit.protocols import Reporting
from alignkit.records import Prompt, Sampling

if TYPE_CHECKING:
    from alignkit.protocols import ImageSource, Reward
    from alignkit.trainers.validation import Validation


_FURTHER = (
    "To train a finished result further, start from it in another folder: `alignkit train METHOD --adapter "
    "OUT/adapter --output_dir OTHER ...` (after full fine-tuning: --model OUT/model)."
)
_LENGTH = ("max_steps", "num_train_epochs")
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
TRAIN_FURTHER = {f"train.{name}": _FURTHER for name in _LENGTH}  # where an evaluation of the result is there already
RESUMABLE = {f"train.{name}" for name in (*_LENGTH, *_BATCH)}  # `fit` compares them with what was trained


def fit(
    method: str,
    policy: tuple[str, GeneratorSpec],
    args: Any,
    data: TrainingData,
    *,
    validation: Callable[[Mapping[str, Reward]], Validation] | None,
    select: Callable[[Any], Any] = lambda rows: rows,
    sampling: Sampling | None = None,
    rewards: Mapping[str, RewardSpec] | None = None,
) -> Path:
    """Train, or continue from the newest whole checkpoint, export, push if asked; returns the folder of the result.

    The result is `output_dir/adapter`, `output_dir/model` after full fine-tuning, or `output_dir/encoder`. A finished
    training is recognised and loads nothing; with more steps than it had, it goes on from its last checkpoint. `select`
    may choose or change the training rows (a `datasets.Dataset`, or prompts). `rewards` are those that the loss uses;
    `validation` gets them, loaded. Raises ConfigError before the training where the policy cannot be sampled with
    `sampling`, which is for later; StorageError where the folder was deleted during the training.
    """
    from alignkit.trainers.checkpoint import writing
    from alignkit.trainers.sharding import whole

    folder = Path(args.output_dir)
    inputs = {"policy": policy[1].identity, "data": data.identity}
    inputs |= {f"reward {name}": spec.identity for name, spec in (rewards or {}).items()}
    result = folder / args.result_name
    claim(folder, {"inputs": inputs})
    made_with = {name: vars(args)[name] for name in _LENGTH}
    made_with["rows"] = math.prod(vars(args)[name] for name in _BATCH)
    if finished(folder) == made_with and result.is_dir():
        return result
    _require_checkpoint(folder, made_with)
    train = select(data.train())
    heldout = data.heldout() if args.eval_strategy != "no" else None
    loaded = {name: builder() for name, builder in RewardBuilders(rewards or {}).items()}
    built = validation(loaded) if validation else None
    generator = load_policy(*policy)
    options: dict[str, Any] = {"rewards": loaded} if loaded else {}
    trainer = trainer_class(method)(generator, args, train, heldout, validation=built, **options)
    if sampling is not None:  # after the trainer is made, which may choose the steps of tuned text encoders
        generator.require_sampling(sampling)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or True)
    if not claimed(folder):  # the export would make the folder again, without what belongs to it
        raise StorageError(f"'{folder}' was deleted or moved during the training; run the same command again")
    mark_unfinished(folder)
    with writing(folder):
        trainer.save_state()
        trainer.export(result)
        if args.save_merged:
            with whole(trainer.generator):  # all processes take part, one writes
                if args.should_save:
                    trainer.generator.save_merged(folder / "merged")
    if args.push_to_hub:
        trainer.push_to_hub()
    mark_finished(folder, made_with)
    return result


def _require_checkpoint(folder: Path, made_with: Mapping[str, Any]) -> None:
    """ResumeError for a finished training that would have to start again from step 0."""
    before = finished(folder)
    if before is not None and not any(folder.glob("checkpoint-*")):
        raise ResumeError(
            f"'{folder}' was trained with {before}, now it is {dict(made_with)}, and no checkpoint is left to go on "
            f"from. Use the old values, or another folder. {_FURTHER}"
        )


def default_notes(args: Any, model: str) -> list[str]:
    """Lines of a dry run about keys of a trainer that are not set and whose default depends on the model."""
    return [note for key, note in args.model_defaults(model).items() if vars(args)[key] is None]


def compare(
    sides: Mapping[str, GeneratorSpec],
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
    out: Path,
    *,
    rewards: Mapping[str, RewardSpec],
    gold: str | None,
    base_cache: Path | None = None,
) -> Evaluation:
    """Evaluate `sides` ("base" and "tuned"); a finished evaluation is read back and loads nothing.

    `base_cache` keeps the base side for other evaluations of the same base.
    """
    models, scorers = identities(sides), identities(rewards)
    inputs = models | {f"reward {name}": scorers[name] for name in scorers}
    with locked(out):
        claim(out, {"inputs": inputs})
        if (out / "evaluation.json").is_file():
            return read_evaluation(out)
        base, tuned = _sources(sides["base"], sides["tuned"])
        loaded = {name: builder() for name, builder in RewardBuilders(rewards).items()}
        return evaluate(
            base, tuned, prompts, config, out, rewards=loaded, gold=gold, inputs=inputs, base_cache=base_cache
        )


def _sources(base: GeneratorSpec, tuned: GeneratorSpec) -> tuple[ImageSource, ImageSource]:
    # `base` has no encoder then: the policy's reference is without its adapter and without its tuned text encoders. The
    # weights of a mixture may be those of whole components, which no reference is without.
    is_mixed = tuned.adapter is not None and is_mixture(tuned.adapter)
    if not is_mixed and dataclasses.replace(tuned, adapter=None, encoder=None) == base and not base.is_own:
        policy = load_policy("tuned", tuned)
        return BaseOf("base", policy), policy
    return build_generator("base", base), build_generator("tuned", tuned)


def judge_evaluation(out: Path, judges: Mapping[str, JudgeSpec], config: EvaluateConfig) -> dict[str, Judged]:
    """Verdicts of `judges` on the stored pairs of the evaluation in `out`; finished ones are read back.

    Prints what served judges cost.
    """
    results = {}
    with locked(out):
        for name, spec in judges.items():
            stored = read_judged(out, name, spec.identity)
            if stored is None:
                judge = build_judge(spec.judge, spec.options)
                stored = judge_pairs(out, name, judge, identity=spec.identity, config=config)
                if isinstance(judge, Reporting):
                    print(f"{name}: {judge.report()}")
            results[name] = stored
    return results

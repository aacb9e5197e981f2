"""`alignkit run`: the main job from one YAML file, prompts to report, in one folder that can be continued.

    OUT/config.yaml  versions.json      what it was made with; another config is refused
    OUT/candidates   scores   ranked    Syn-Pic, where the method trains on ranked data that is made here
    OUT/aspects  aspects_heldout        questions, where the method trains on those and they are written here
    OUT/pairs        OUT/labels         pairs of clips and their labels, where the method trains on those
    OUT/train        OUT/train/adapter  training and its result
    OUT/evaluation   OUT/report.html    base against tuned

Which sections say where the training data comes from depends on the method (`data.DATA`): generate, score and rank;
writer and aspects; clips, pairs and label; or `data`, an existing dataset; or none, for a method that trains on prompts
alone. Each stage recognises what is finished and does the rest. Deliberately not here: any stage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.claims import holds_results
from alignkit.commands.data import data_sections
from alignkit.commands.methods import DEFAULT_METHOD, more_help, unchecked_methods, with_trainer
from alignkit.commands.policy_job import PolicyJob
from alignkit.commands.report import ReportJob, gather
from alignkit.commands.specs import (
    JudgeSpec,
    ValidationConfig,
    absences,
    tuned_spec,
)
from alignkit.commands.stages import RESUMABLE, TRAIN_FURTHER, compare, default_notes, fit, judge_evaluation
from alignkit.commands.trainer_keys import require_guard, trained_frames, trained_rewards
from alignkit.commands.verb import Tree, Verb, execute, is_dry_run, wants_outline
from alignkit.config import Located, coerce
from alignkit.errors import ConfigError, require_at_least
from alignkit.evaluation.card import CardInputs, write_card
from alignkit.evaluation.judged import judged_lines
from alignkit.evaluation.paired import EvaluateConfig
from alignkit.evaluation.report import write_report
from alignkit.evaluation.terminal import before_after
from alignkit.locks import locked
from alignkit.paths import require_plain_names
from alignkit.provenance import claim_config, plain, write_config


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """The report's title, what the run shows in a sentence, and how many images or videos each gallery group shows."""

    title: str = "alignkit report"
    note: str = ""
    gallery: int = 6

    def __post_init__(self) -> None:
        require_at_least(0, {"gallery": self.gallery})


@dataclass(frozen=True, kw_only=True)
class RunJob(PolicyJob):
    """The whole job.

    method: the training method: a name that `alignkit --help` lists after `train`, or 'package.module:attribute' of
        your own `Method` record.
    validation: media generated and scored during training, on the first held-out prompts.
    train: the trainer's keys, less output_dir.
    evaluate: how base and tuned are compared, on the other held-out prompts.
    evaluate_prompts: evaluate on at most this many held-out prompts; default: all.
    judges: judges that compare tuned with base pair by pair, by a name of your choice.
    """

    method: str = DEFAULT_METHOD
    validation: ValidationConfig | None = None
    train: Any
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    evaluate_prompts: int | None = None
    judges: Mapping[str, JudgeSpec] = field(default_factory=dict)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, {"evaluate_prompts": self.evaluate_prompts})
        self.check_judges("validation.rewards", self.validation.rewards if self.validation else [])
        self.check_judges("train.reward_weights", trained_rewards(self.train))
        require_guard(self.train, self.validation)
        require_plain_names(self.judges, "judges")
        self.aligned.require_frames(self.evaluate.sampling.num_frames, "evaluate.sampling.num_frames")
        self.aligned.require_frames(trained_frames(self.train), "train.num_frames")
        if self.validation is not None:
            self.aligned.require_frames(self.validation.sampling.num_frames, "validation.sampling.num_frames")
        if isinstance(self.train, Mapping):
            return  # a dry run of a method of the user's own, whose keys are not known
        if self.train.eval_strategy != "no" and self.validation is None and self.held_out_advice:
            raise ConfigError(
                "train.eval_strategy asks for evaluations during training, but nothing is held out for them: give "
                f"`validation`{self.held_out_advice}"
            )


def _schema(tree: Tree, problems: list[str], *, dry_run: bool, for_help: bool) -> Any:
    method = coerce(tree.get("method", Located(DEFAULT_METHOD, "default")), str, "method", problems)
    sections = data_sections(str(method), tree, problems, dry_run=dry_run)
    if "output_dir" in tree and "out" not in tree:
        tree["out"] = tree.pop("output_dir")
    train = tree.setdefault("train", Located({}, "default"))
    if isinstance(train.value, dict):
        for name in {"out", "output_dir"} & set(train.value):
            where = train.value.pop(name).where
            problems.append(f"{where}: a run trains in OUT/train; remove train.{name}")
        out = tree["out"].value if "out" in tree else ""
        train.value["output_dir"] = Located(f"{out}/train", "default")
    return with_trainer(str(method), RunJob, sections, dry_run=dry_run, for_help=for_help)


def _plan(job: Any) -> list[str]:
    judges = [f"judge: base against tuned pair by pair, by {', '.join(job.judges)}"] if job.judges else []
    unchecked = unchecked_methods([job.method])
    steps = "" if unchecked else f", {job.train.length}"
    notes = [] if unchecked else default_notes(job.train, job.aligned.model)
    return [
        *absences(job.generators, rewards=job.rewards, prompts=job.prompts),
        *job.data_plan(),
        *unchecked,
        f"train: {job.method} on {job.policy} ({job.aligned.model}){steps}",
        *notes,
        f"evaluate: base against tuned on held-out prompts, scored by {', '.join(job.rewards)}",
        *judges,
        f"report: {job.out / 'report.html'}",
    ]


def _work(job: Any) -> None:
    shares = job.share_prompts(job.validation.prompts if job.validation else 0)
    claim_config(job.out, job, _free(job.out), advice=TRAIN_FURTHER)
    config = plain(job)
    del config["train"]["output_dir"]  # so that it may be given again with another `out`
    write_config(job.out, config)
    data = _stage(1, "training data", functools.partial(job.make_data, shares))
    shares = job.prepared(shares)
    evaluated = shares.evaluation[: job.evaluate_prompts]
    validation = functools.partial(job.validation.build, shares.validation, job.rewards) if job.validation else None
    rewards = {name: job.rewards[name] for name in trained_rewards(job.train)}
    options = {"validation": validation, "sampling": job.evaluate.sampling, "rewards": rewards}
    training = functools.partial(fit, job.method, (job.policy, job.aligned), job.train, data, **options)
    with locked(job.out / "train"):
        result = _stage(2, "train", training)
    sides, out = {"base": job.aligned, "tuned": tuned_spec(job.aligned, result)}, job.out / "evaluation"
    scoring = functools.partial(compare, sides, evaluated, job.evaluate, out, rewards=job.rewards, gold=job.gold)
    evaluation = _stage(3, "evaluate", scoring)
    judged = judge_evaluation(out, job.judges, job.evaluate)
    report = _stage(4, "report", functools.partial(_report, job, result))
    if job.report.note:
        print(f"\n{job.report.note}")
    print("", before_after(evaluation), *judged_lines(judged), sep="\n")
    print(f"\nreport:  {report}\nresult:  {result}\n\nNext, look at the report; then try")
    rate = f"{job.train.learning_rate / 3:.1g}"
    print(f"  alignkit run --config {job.out / 'config.yaml'} --out {job.out}-2 --train.learning_rate {rate}")


_STAGES = (
    *("candidates", "scores", "ranked"),
    *("aspects", "aspects_heldout"),
    *("pairs", "labels"),
    *("train", "evaluation"),
)


def _free(out: Path) -> set[str]:
    """Sections that may still change: nothing has been made with them. Each stage compares what it was made with."""
    free = {"report", "judges", "aspects.quarantine_limit"}
    has = {stage: holds_results(out / stage) for stage in _STAGES}
    sections = {
        "candidates": {"generate"},
        "scores": {"score"},
        "ranked": {"rank"},
        "aspects": {"writer", "aspects"},
        "aspects_heldout": {"writer", "aspects"},
        "pairs": {"clips", "pairs"},
        "labels": {"label"},
        "train": {"method", "data", "train", "validation", "held_out_pairs"},
        "evaluation": {"evaluate", "evaluate_prompts", "gold"},
    }
    free.update(*(names for stage, names in sections.items() if not has[stage]))
    if not has["evaluation"]:
        free |= RESUMABLE
    if not any(has.values()):
        free |= {"prompts", "generators", "policy"}
    if not (has["scores"] or has["train"] or has["evaluation"]):
        free.add("rewards")
    return free


def _stage(number: int, title: str, work: Callable[[], Any]) -> Any:
    print(f"[{number}/4] {title}", flush=True)
    return work()


def _report(job: Any, result: Path) -> Path:
    report = ReportJob(run=job.out, title=job.report.title, note=job.report.note, gallery=job.report.gallery)
    inputs = gather(report)
    write_report(inputs, report.target)
    title = f"{job.policy} aligned with {job.method}"
    card = CardInputs(
        title,
        job.method,
        job.aligned.model,
        inputs.evaluation,
        plain(job),
        inputs.data,
        kind=job.train.result_name,
        encoder=job.aligned.encoder,
    )
    write_card(card, result)
    return report.target


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = (
        "The whole job from one file: training data (made with Syn-Pic, or an existing dataset: --data.path FOLDER), "
        "training, evaluation, report."
    )
    schema = functools.partial(_schema, dry_run=is_dry_run(argv), for_help=wants_outline(argv))
    execute(Verb("run", summary, schema, _plan, _work, lambda job: job.out, more=more_help("run")), argv)

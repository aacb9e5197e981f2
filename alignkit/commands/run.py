"""`alignkit run`: the main job from one YAML file, prompts to report, in one folder that can be continued.

    OUT/config.yaml  versions.json      what it was made with; another config is refused
    OUT/candidates   scores   ranked    Syn-Pic
    OUT/train        OUT/train/adapter  training and its result
    OUT/evaluation   OUT/report.html    base against tuned

Each stage recognises what is finished and does the rest. Deliberately not here: any stage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.commands.evaluate import compare
from alignkit.commands.report import ReportJob, gather
from alignkit.commands.specs import (
    GeneratorSpec,
    PromptsConfig,
    RewardBuilders,
    RewardSpec,
    absences,
    generator_builders,
    identities,
    require_names,
    tuned_spec,
)
from alignkit.commands.train import METHODS, ValidationConfig, fit, with_trainer
from alignkit.commands.verb import Tree, Verb, counts_line, execute
from alignkit.config import Located, coerce
from alignkit.errors import ConfigError, UnknownNameError, nearest
from alignkit.evaluation.card import CardInputs, write_card
from alignkit.evaluation.paired import EvaluateConfig
from alignkit.evaluation.report import write_report
from alignkit.evaluation.terminal import before_after
from alignkit.provenance import plain, write_resolved
from alignkit.records import Prompt
from alignkit.storage import claimed
from data_pipelines.synpic import GenerateConfig, RankConfig, ScoreConfig, generate_and_score, rank_candidates


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """The report's title, and how many pictures a group its gallery shows."""

    title: str = "alignkit report"
    gallery: int = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class SynPicJob:
    """Ranked candidates for the training of one generator, and whom its result is judged by.

    out: the folder of the run; run again, it continues.
    prompts: where prompts come from; the held-out share is kept for validation and evaluation.
    generators: the generators by a name of your choice.
    rewards: all rewards by a name of your choice; the evaluation uses every one of them.
    policy: which generator is aligned.
    gold: the reward that judges the result and must not be used before.
    generate: which generators draw how many candidates, and how.
    score: which rewards rank the candidates.
    rank: how scores become rankings.
    """

    out: Path
    prompts: PromptsConfig
    generators: Mapping[str, GeneratorSpec]
    rewards: Mapping[str, RewardSpec]
    policy: str
    gold: str | None = None
    generate: GenerateConfig
    score: ScoreConfig
    rank: RankConfig = field(default_factory=RankConfig)

    def __post_init__(self) -> None:
        sources = [source.name for source in self.generate.sources]
        require_names(sources, self.generators, kind="generator", key="generate.sources")
        require_names([self.policy], self.generators, kind="generator", key="policy")
        self.check_judges("score.rewards", self.score.rewards)

    def check_judges(self, key: str, names: Sequence[str]) -> None:
        """Names in `key` must be rewards, and none of them gold."""
        require_names([*names, *([self.gold] if self.gold else [])], self.rewards, kind="reward", key=key)
        if self.gold in names:
            raise ConfigError(f"gold is '{self.gold}', which is also in {key}; the last judge must be unseen")

    @property
    def aligned(self) -> GeneratorSpec:
        """The generator that is aligned."""
        return self.generators[self.policy]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunJob(SynPicJob):
    """The whole job.

    method: rankdpo or sft.
    validation: pictures drawn and judged during training, on the first held-out prompts.
    train: the trainer's keys, less output_dir.
    evaluate: how base and tuned are compared, on the other held-out prompts.
    evaluate_prompts: use at most so many of them.
    """

    method: str = "rankdpo"
    validation: ValidationConfig | None = None
    train: Any
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    evaluate_prompts: int | None = None
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        super(RunJob, self).__post_init__()  # a class with slots is made twice; bare super() finds the first
        self.check_judges("validation.rewards", self.validation.rewards if self.validation else [])
        asks = self.train.eval_strategy != "no"
        if asks and self.validation is None and self.rank.held_out <= self.prompts.held_out:
            raise ConfigError(
                "train.eval_strategy asks for evaluations during training, but nothing is held out for them: give "
                f"`validation`, or rank.held_out above prompts.held_out ({self.prompts.held_out})"
            )


def _schema(tree: Tree, problems: list[str]) -> Any:
    method = coerce(tree.get("method", Located("rankdpo", "default")), str, "method", problems)
    if method not in METHODS:
        raise UnknownNameError(f"{tree['method'].where}: unknown method '{method}'.{nearest(str(method), METHODS)}")
    train = tree.setdefault("train", Located({}, "default"))
    if isinstance(train.value, dict):
        if "output_dir" in train.value:
            where = train.value.pop("output_dir").where
            problems.append(f"{where}: a run trains in OUT/train; remove train.output_dir")
        out = tree["out"].value if "out" in tree else ""
        train.value["output_dir"] = Located(f"{out}/train", "default")
    return with_trainer(RunJob, method)


def _plan(job: Any) -> list[str]:
    sources = ", ".join(f"{source.name} x {source.seeds}" for source in job.generate.sources)
    return [
        *absences(job.generators),
        f"generate: {job.generate.candidates} candidates ({sources}) for the training share of {job.prompts}",
        f"score: with {', '.join(job.score.rewards)}, while the next candidates are drawn",
        f"rank: win rates into {job.out / 'ranked'}",
        f"train: {job.method} on {job.policy} ({job.aligned.model}), {job.train.max_steps} steps",
        f"evaluate: base against tuned on held-out prompts, judged by {', '.join(job.rewards)}",
        f"report: {job.out / 'report.html'}",
    ]


def _work(job: Any) -> None:
    train, held_out = job.prompts.split()
    shown = job.validation.prompts if job.validation else 0
    evaluated = held_out[shown:][: job.evaluate_prompts]
    if not train or not evaluated:
        sides = f"{len(train)} for training, {shown} for validation, {len(evaluated)} for evaluation"
        raise ConfigError(f"{job.prompts} give {sides}; give more prompts or change prompts.held_out")
    write_resolved(job.out, _resolved(job), free=_free(job.out))
    counts = _stage(1, "generate, score and rank", functools.partial(make_data, job, train, job.out))
    print(f"      {counts}")
    result = _stage(2, "train", functools.partial(_train, job, held_out[:shown]))
    sides = {"base": job.aligned, "tuned": tuned_spec(job.aligned, result)}
    judge = functools.partial(compare, rewards=job.rewards, gold=job.gold)
    evaluation = _stage(3, "evaluate", functools.partial(judge, sides, evaluated, job.evaluate, job.out / "evaluation"))
    report = _stage(4, "report", functools.partial(_report, job, result))
    print(f"\n{before_after(evaluation)}\n\nreport:  {report}\nresult:  {result}\n\nNext, look at the report; then try")
    rate = f"{job.train.learning_rate / 3:.1g}"
    print(f"  alignkit run --config {job.out / 'config.yaml'} --out {job.out}-2 --train.learning_rate {rate}")


def _free(out: Path) -> set[str]:
    """Sections that may still change: nothing has been made with them."""
    free = {"report"}
    if not claimed(out / "train"):
        free |= {"method", "train", "validation"}
    if not claimed(out / "evaluation"):
        free |= {"evaluate", "evaluate_prompts"}
    return free


def _resolved(job: Any) -> Any:
    """The config as it may be given again, with another `out`."""
    resolved = plain(job)
    del resolved["train"]["output_dir"]
    return resolved


def _stage(number: int, title: str, work: Callable[[], Any]) -> Any:
    print(f"[{number}/4] {title}", flush=True)
    return work()


def make_data(job: SynPicJob, prompts: Sequence[Prompt], out: Path) -> str:
    """Candidates, scores and ranked rows in folders of `out`; says how many rows there are."""
    folders = (out / "candidates", out / "scores")
    build_rewards = RewardBuilders({name: job.rewards[name] for name in job.score.rewards})
    generate_and_score(
        prompts,
        job.generate,
        job.score,
        folders,
        build_sources=generator_builders(job.generators),
        build_rewards=build_rewards,
        source_identities=identities(job.generators),
        reward_identities=identities(job.rewards),
    )
    for line in build_rewards.reports():
        print(line)
    return counts_line(rank_candidates(*folders, job.rank, out / "ranked").counts)


def _train(job: Any, held_out: Sequence[Prompt]) -> Path:
    ranked = job.out / "ranked"
    validation = functools.partial(job.validation.build, held_out, job.rewards) if job.validation else None
    # Ranked rows of the training prompts have a held-out side only where rank.held_out reaches beyond prompts.held_out.
    share = job.rank.held_out if any(ranked.glob("data/heldout-*")) else 0.0
    policy = (job.policy, job.aligned)
    return fit(job.method, policy, job.train, ranked, held_out=share, validation=validation)


def _report(job: Any, result: Path) -> Path:
    report = ReportJob(run=job.out, title=job.report.title, gallery=job.report.gallery)
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
        is_adapter=not job.train.full_finetune,
    )
    write_card(card, result)
    return report.target


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "The whole job from one file: candidates, scores, rankings, training, evaluation, report."
    execute(Verb("run", summary, _schema, _plan, _work), argv)

"""`alignkit evaluate`: base and tuned on the same held-out prompts and seeds, scored by every reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alignkit.commands.specs import GeneratorSpec, JudgeSpec, PromptsConfig, RewardSpec, absences, require_names
from alignkit.commands.stages import compare, judge_evaluation
from alignkit.commands.verb import Tree, Verb, execute
from alignkit.errors import ConfigError
from alignkit.evaluation.judged import judged_lines
from alignkit.evaluation.paired import EvaluateConfig
from alignkit.evaluation.terminal import before_after
from alignkit.paths import require_plain_names
from alignkit.provenance import write_resolved


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateJob:
    """Compare two generators.

    base: the generator before.
    tuned: the generator after; `model` may be left out when it is the base with an adapter.
    prompts: where the prompts come from; their held-out share is used (all of them with held_out: 0).
    rewards: all rewards, by a name of your choice.
    gold: the reward among them that training never saw.
    judges: judges that compare tuned with base pair by pair, by a name of your choice; more may be given later.
    evaluate: how media are generated and intervals computed.
    out: the folder of media, scores and statistics; run again, it continues.
    """

    base: GeneratorSpec
    tuned: GeneratorSpec = field(metadata={"required": "(default: the base's)"})
    prompts: PromptsConfig
    rewards: Mapping[str, RewardSpec]
    gold: str | None = None
    judges: Mapping[str, JudgeSpec] = field(default_factory=dict)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    out: Path

    def __post_init__(self) -> None:
        if self.gold is not None:
            require_names([self.gold], self.rewards, kind="reward", key="gold")
        require_plain_names(self.judges, "judges")
        if self.tuned == self.base:
            raise ConfigError("base and tuned are the same; give tuned.adapter or another tuned.model")
        for side in (self.base, self.tuned):
            side.require_frames(self.evaluate.sampling.num_frames, "evaluate.sampling.num_frames")


def _schema(tree: Tree, _: list[str]) -> type[EvaluateJob]:
    """`tuned` is the base where it does not say otherwise."""
    sides = [tree[name].value if name in tree else None for name in ("base", "tuned")]
    if isinstance(sides[0], dict) and isinstance(sides[1], dict) and "model" not in sides[1]:
        sides[1] |= {name: value for name, value in sides[0].items() if name not in sides[1]}
    return EvaluateJob


def _plan(job: EvaluateJob) -> list[str]:
    amount = f"{job.evaluate.seeds_per_prompt} seeds, {job.evaluate.sampling.steps} steps"
    judges = [f"judge tuned against base pair by pair with {', '.join(job.judges)}"] if job.judges else []
    return [
        *absences({"base": job.base, "tuned": job.tuned}, rewards=job.rewards, prompts=job.prompts),
        f"generate both sides for the held-out share of {job.prompts}, {amount}, into {job.out}",
        f"score them with {', '.join(job.rewards)} (gold: {job.gold or 'none'})",
        *judges,
    ]


def _work(job: EvaluateJob) -> None:
    train, held_out = job.prompts.split()
    prompts = held_out if job.prompts.held_out else train
    write_resolved(job.out, job, free={"judges"})
    sides = {"base": job.base, "tuned": job.tuned}
    evaluation = compare(sides, prompts, job.evaluate, job.out, rewards=job.rewards, gold=job.gold)
    judged = judge_evaluation(job.out, job.judges, job.evaluate)
    print(before_after(evaluation), *judged_lines(judged), sep="\n")
    print(f"next: alignkit report --evaluation {job.out} --out {job.out.with_name('report.html')}")


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Compare base and tuned on the same prompts and seeds, with every reward, and with judges pair by pair."
    execute(Verb("evaluate", summary, _schema, _plan, _work, lambda job: job.out), argv)

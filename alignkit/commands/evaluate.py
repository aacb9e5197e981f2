"""`alignkit evaluate`: base and tuned on the same held-out prompts and seeds, judged by every reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.commands.specs import (
    GeneratorSpec,
    PromptsConfig,
    RewardBuilders,
    RewardSpec,
    absences,
    build_generator,
    identities,
    load_policy,
    require_names,
)
from alignkit.commands.verb import Tree, Verb, execute
from alignkit.errors import ConfigError
from alignkit.evaluation.paired import EvaluateConfig, evaluate
from alignkit.evaluation.results import Evaluation, read_evaluation
from alignkit.evaluation.terminal import before_after
from alignkit.provenance import write_resolved
from alignkit.records import Prompt, Sampling
from alignkit.storage import claim

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.generators.pipeline import PipelineGenerator
    from alignkit.protocols import ImageSource


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateJob:
    """Compare two generators.

    base: the generator before.
    tuned: the generator after; `model` may be left out when it is the base with an adapter.
    prompts: where the prompts come from; their held-out share is used (all of them with held_out: 0).
    rewards: all judges, by a name of your choice.
    gold: the judge among them that training never saw.
    evaluate: how pictures are drawn and intervals computed.
    out: the folder of pictures, scores and statistics; run again, it continues.
    """

    base: GeneratorSpec
    tuned: GeneratorSpec
    prompts: PromptsConfig
    rewards: Mapping[str, RewardSpec]
    gold: str | None = None
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    out: Path

    def __post_init__(self) -> None:
        if self.gold is not None:
            require_names([self.gold], self.rewards, kind="reward", key="gold")
        if self.tuned == self.base:
            raise ConfigError("base and tuned are the same; give tuned.adapter or another tuned.model")


@dataclass(frozen=True, slots=True)
class BaseOf:
    """A policy with its adapter switched off, as a source of its own: both sides with one model in memory."""

    name: str
    policy: PipelineGenerator

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> Tensor:
        """Pixels [B, 3, H, W] of the base model."""
        with self.policy.reference():
            return self.policy.generate(prompts, seeds, sampling)


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
    models, judges = identities(sides), identities(rewards)
    inputs = models | {f"reward {name}": judges[name] for name in judges}
    claim(out, {"inputs": inputs})
    if (out / "evaluation.json").is_file():
        return read_evaluation(out)
    base, tuned = _sources(sides["base"], sides["tuned"])
    loaded = {name: builder() for name, builder in RewardBuilders(rewards).items()}
    return evaluate(base, tuned, prompts, config, out, rewards=loaded, gold=gold, inputs=inputs, base_cache=base_cache)


def _sources(base: GeneratorSpec, tuned: GeneratorSpec) -> tuple[ImageSource, ImageSource]:
    if dataclasses.replace(tuned, adapter=None) == base and not base.is_own:
        policy = load_policy("tuned", tuned)
        return BaseOf("base", policy), policy
    return build_generator("base", base), build_generator("tuned", tuned)


def _schema(tree: Tree, _: list[str]) -> type[EvaluateJob]:
    """`tuned` is the base where it does not say otherwise."""
    sides = [tree[name].value if name in tree else None for name in ("base", "tuned")]
    if isinstance(sides[0], dict) and isinstance(sides[1], dict) and "model" not in sides[1]:
        sides[1] |= {name: value for name, value in sides[0].items() if name not in sides[1]}
    return EvaluateJob


def _plan(job: EvaluateJob) -> list[str]:
    pictures = f"{job.evaluate.seeds_per_prompt} seeds, {job.evaluate.sampling.steps} steps"
    drawing = f"draw both sides for the held-out share of {job.prompts}, {pictures}, into {job.out}"
    judging = f"judge them with {', '.join(job.rewards)} (gold: {job.gold or 'none'})"
    return [*absences({"base": job.base, "tuned": job.tuned}), drawing, judging]


def _work(job: EvaluateJob) -> None:
    train, held_out = job.prompts.split()
    prompts = held_out if job.prompts.held_out else train
    write_resolved(job.out, job)
    sides = {"base": job.base, "tuned": job.tuned}
    print(before_after(compare(sides, prompts, job.evaluate, job.out, rewards=job.rewards, gold=job.gold)))
    print(f"next: alignkit report --evaluation {job.out} --out {job.out.with_name('report.html')}")


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Compare base and tuned on the same prompts and seeds, with every reward and a held-out judge."
    execute(Verb("evaluate", summary, _schema, _plan, _work), argv)

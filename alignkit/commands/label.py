"""`alignkit label`: labels for every segment of pairs of clips, from judges, rewards and people."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.commands.dense_pairs import build_maker
from alignkit.commands.specs import GeneratorSpec, absences, identity_of, with_paths
from alignkit.commands.verb import Verb, counts_line, execute
from alignkit.config import init_fields
from alignkit.errors import ConfigError
from alignkit.pairs import Labeller
from alignkit.protocols import Reporting
from alignkit.provenance import vars_of, write_config
from alignkit.resolve import construct, require_known, resolve
from alignkit.shipped import shipped_file
from alignkit.storage import StageResult
from alignkit.trainers import METHODS
from data_pipelines.dense import LabelConfig, label_pairs
from data_pipelines.dense.votes import VOTES
from rewards.labellers import LABELLERS

QUESTIONS = {"served": "configs/judges/segments.yaml", "vlm": "configs/judges/side_by_side.yaml"}  # by judge


@dataclass(frozen=True, kw_only=True, slots=True)
class LabellerSpec:
    """What labels the segments of a pair.

    labeller: judge (a vision-language model compares), reward (its scores are compared), or 'package.module:attribute'
        of your own.
    options: keywords for its constructor (judge: judge, rate and the judge's options; reward: reward, its options,
        rate and least_difference, the tie band).
    """

    labeller: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_known(self.labeller, LABELLERS, kind="labeller")

    @property
    def found_options(self) -> dict[str, Any]:
        """The options; a judge that reads a question gets the shipped one where none is named."""
        options = dict(self.options)
        judge = options.get("judge", "served")
        inner = options.get("options") or {}
        if self.labeller == "judge" and judge in QUESTIONS and isinstance(inner, Mapping):
            question = str(inner.get("question", QUESTIONS[judge]))
            options["options"] = {**inner, "question": str(shipped_file(Path(question)))}
        return options

    @property
    def identity(self) -> str:
        """Changes with the options and with the files that they name, a question's among them."""
        return identity_of(self.labeller, self.found_options)

    @property
    def absent(self) -> list[str]:
        """The file of the question, where it is named and not there."""
        inner = self.found_options.get("options") or {}
        question = Path(str(inner.get("question", ""))) if isinstance(inner, Mapping) else Path()
        return [str(question)] if question.suffix and not question.is_file() else []

    def build(self) -> Labeller:
        """Raises UnknownNameError for an unknown name, ConfigError for options that do not fit or another class."""
        builder = resolve(self.labeller, LABELLERS, kind="labeller")
        built = construct(builder, with_paths(self.found_options), what=f"labeller '{self.labeller}'")
        if not isinstance(built, Labeller):
            raise ConfigError(
                f"labeller '{self.labeller}' is a {type(built).__name__} without `label`; see alignkit.pairs.Labeller"
            )
        return built


@dataclass(frozen=True, kw_only=True)
class LabelStage(LabelConfig):
    """What labels pairs, and how votes become labels.

    labellers: what votes on the segments, by a name of your choice, which is also that of its file of votes.
    votes: folders with votes of others, such as those of `alignkit annotate`; alone they make the labels.
    """

    labellers: Mapping[str, LabellerSpec] = field(default_factory=dict)
    votes: Sequence[Path] = ()

    @property
    def missing(self) -> list[str]:
        """Lines of a dry run about files that are not there yet."""
        lines = [f"NOT THERE YET: {path} (votes {n})" for n, path in enumerate(self.votes) if not path.exists()]
        for name, spec in self.labellers.items():
            lines += [f"NOT THERE YET: {path} (labeller '{name}')" for path in spec.absent]
        return lines

    @property
    def voters(self) -> list[str]:
        """What votes, in words."""
        return [*self.labellers, *(f"the votes in {path / VOTES}" for path in self.votes)]

    def make(self, pairs: Path, generator: GeneratorSpec | None, out: Path) -> StageResult:
        """The pairs of the folder `pairs` with labels in the folder `out`; `generator` decodes those without videos.

        Prints what labellers report.
        """
        values = vars_of(self)
        config = LabelConfig(**{name: values[name] for name in init_fields(LabelConfig)})
        builders = {name: functools.cache(spec.build) for name, spec in self.labellers.items()}
        result = label_pairs(
            pairs,
            config,
            out,
            build_labellers=builders,
            identities={name: spec.identity for name, spec in self.labellers.items()},
            votes_dirs=self.votes,
            build_decoder=functools.partial(build_maker, generator) if generator else None,
        )
        for name, build in builders.items():
            labeller = build() if build.cache_info().currsize else None
            if isinstance(labeller, Reporting) and (report := str(labeller.report())):
                print(f"{name}: {report}")
        return result


@dataclass(frozen=True, kw_only=True)
class LabelJob(LabelStage):
    """Label pairs of clips.

    pairs: the folder that `alignkit dense-pairs` wrote; it is only read.
    generator: the model that made the pairs; decodes those that have no videos.
    out: the folder of the labelled pairs and of all votes; run again, it continues.
    """

    pairs: Path
    generator: GeneratorSpec | None = None
    out: Path

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.labellers and not self.votes:
            raise ConfigError("nothing labels the pairs: give `labellers`, or `votes`, a folder with votes of people")
        if self.out.resolve() == self.pairs.resolve():
            raise ConfigError(f"out is '{self.out}', the folder of the pairs, which is only read; give another folder")


def _plan(job: LabelJob) -> list[str]:
    missing = [] if job.pairs.exists() else [f"NOT THERE YET: {job.pairs} (pairs)"]
    return [
        *absences({"generator": job.generator} if job.generator else {}),
        *missing,
        *job.missing,
        f"label the segments of the pairs in {job.pairs} with {', '.join(job.voters)} into {job.out}",
    ]


def _work(job: LabelJob) -> None:
    result = job.make(job.pairs, job.generator, job.out)
    write_config(job.out, job)
    print(f"{result.rows} labelled pairs in {result.folder}: {counts_line(result.counts)}")
    method = next(name for name, method in METHODS.items() if method.data == "dense")
    print(f"statistics: {job.out / 'manifest.json'}")
    print(f"next: alignkit train {method} --data {job.out} --model MODEL --out OUT")


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Label the segments of pairs of clips by judges, rewards or people's votes; run again, it continues."
    execute(Verb("label", summary, lambda *_: LabelJob, _plan, _work, lambda job: job.out), argv)

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
class LabelJob(LabelConfig):
    """Label pairs of clips.

    pairs: the folder that `alignkit dense-pairs` wrote; it is only read.
    labellers: what votes on the segments, by a name of your choice, which is also that of its file of votes.
    votes: folders with votes of others, such as those of `alignkit annotate`; alone they make the labels.
    generator: the model that made the pairs; decodes those that have no videos.
    out: the folder of the labelled pairs and of all votes; run again, it continues.
    """

    pairs: Path
    labellers: Mapping[str, LabellerSpec] = field(default_factory=dict)
    votes: Sequence[Path] = ()
    generator: GeneratorSpec | None = None
    out: Path

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.labellers and not self.votes:
            raise ConfigError("nothing labels the pairs: give `labellers`, or `votes`, a folder with votes of people")
        if self.out.resolve() == self.pairs.resolve():
            raise ConfigError(f"out is '{self.out}', the folder of the pairs, which is only read; give another folder")

    @property
    def label(self) -> LabelConfig:
        """The keys of the labels alone."""
        values = vars_of(self)
        return LabelConfig(**{name: values[name] for name in init_fields(LabelConfig)})


def _plan(job: LabelJob) -> list[str]:
    paths = {"pairs": job.pairs, **{f"votes {number}": path for number, path in enumerate(job.votes)}}
    missing = [f"NOT THERE YET: {path} ({key})" for key, path in paths.items() if not path.exists()]
    missing += [
        f"NOT THERE YET: {path} (labeller '{name}')" for name, spec in job.labellers.items() for path in spec.absent
    ]
    absent = absences({"generator": job.generator} if job.generator else {})
    voters = [*job.labellers, *(f"the votes in {path / VOTES}" for path in job.votes)]
    return [
        *absent,
        *missing,
        f"label the segments of the pairs in {job.pairs} with {', '.join(voters)} into {job.out}",
    ]


def _work(job: LabelJob) -> None:
    builders = {name: functools.cache(spec.build) for name, spec in job.labellers.items()}
    result = label_pairs(
        job.pairs,
        job.label,
        job.out,
        build_labellers=builders,
        identities={name: spec.identity for name, spec in job.labellers.items()},
        votes_dirs=job.votes,
        build_decoder=functools.partial(build_maker, job.generator) if job.generator else None,
    )
    write_config(job.out, job)
    print(f"{result.rows} labelled pairs in {result.folder}: {counts_line(result.counts)}")
    for name, build in builders.items():
        labeller = build() if build.cache_info().currsize else None
        if isinstance(labeller, Reporting) and (report := str(labeller.report())):
            print(f"{name}: {report}")
    method = next(name for name, method in METHODS.items() if method.data == "dense")
    print(f"statistics: {job.out / 'manifest.json'}")
    print(f"next: alignkit train {method} --data {job.out} --model MODEL --out OUT")


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Label the segments of pairs of clips by judges, rewards or people's votes; run again, it continues."
    execute(Verb("label", summary, lambda *_: LabelJob, _plan, _work, lambda job: job.out), argv)

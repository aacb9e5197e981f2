"""Training data by kind: the sections of a run's config that say where it comes from, and how its rows are loaded.

`DATA` is the table of kinds; a method names its kind (`alignkit.trainers.Method.data`). A kind that a run can make has
sections for that (`SynPicJob`); any kind but the prompts themselves can be an existing dataset (`DatasetJob`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from alignkit.commands.methods import find_method, known_method
from alignkit.commands.specs import (
    GeneratorSpec,
    PromptsConfig,
    RewardBuilders,
    RewardSpec,
    generator_builders,
    identities,
    require_names,
    require_sources,
)
from alignkit.commands.verb import Tree, counts_line
from alignkit.commands.writers import WriterSpec
from alignkit.config import init_fields
from alignkit.errors import ConfigError, DataError
from alignkit.provenance import fingerprint, fingerprint_files
from alignkit.records import Prompt
from data_pipelines.aspects import AspectsConfig, write_aspects
from data_pipelines.importers import load_ranked
from data_pipelines.opening import files_beside
from data_pipelines.rows import load_rows, without_prompts
from data_pipelines.segments import load_dense
from data_pipelines.synpic import GenerateConfig, RankConfig, ScoreConfig, generate_and_score, rank_candidates

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """Training rows, loaded when they are needed: a dataset of one kind at `path`, or the prompts themselves.

    kind: a key of `DATA`.
    path: the dataset; None for prompts alone.
    root: the folder of the files that its rows name; None for the dataset's own.
    held_out: share of its rows for the held-out loss, where it has no split for that; 0 for none.
    excluded: ids of prompts whose rows are not trained on, because an evaluation uses them.
    prompts: training prompts and held-out prompts, where `path` is None.
    """

    kind: str
    path: Path | None = None
    root: Path | None = None
    held_out: float = 0.0
    excluded: frozenset[str] = frozenset()
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]] = ((), ())

    @property
    def identity(self) -> str:
        """Changes with the files of the dataset, with those that its rows name elsewhere, or with the training prompts.

        What counts is content, so that data which was moved is the same. Raises what `train` raises.
        """
        if self.path is not None:
            named = files_beside(self.path, self.root)
            own = fingerprint(self.path)
            return f"{own} {fingerprint_files(named)}" if named else own
        return hashlib.sha256("\n".join(prompt.text for prompt in self.prompts[0]).encode()).hexdigest()[:16]

    def train(self) -> Dataset | Sequence[Prompt]:
        """The training rows. Raises MissingFileError, or DataError for columns or rows that the kind does not have."""
        if self.path is None and not self.prompts[0]:
            raise DataError("no prompts to train on; give more prompts or lower prompts.held_out")
        if self.path is None:
            return self.prompts[0]
        rows = self._load(self.path, "train")
        remaining = without_prompts(rows, self.excluded)
        if len(remaining) < len(rows):
            print(f"{len(rows) - len(remaining)} training rows left out: validation or evaluation uses their prompts")
        return remaining

    def heldout(self) -> Dataset | Sequence[Prompt] | None:
        """The held-out rows; None where nothing is held out."""
        if self.path is not None:
            return self._load(self.path, "heldout") if self.held_out > 0 else None
        return self.prompts[1] or None

    def _load(self, path: Path, split: str) -> Dataset:
        load = DATA[self.kind].load
        if load is None:
            raise ConfigError(f"data of the kind '{self.kind}' are the prompts themselves; they have no path")
        return load(path, split, held_out=self.held_out, root=self.root)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptShares:
    """The prompts of a run by use: training, validation, and evaluation at the end."""

    train: Sequence[Prompt]
    validation: Sequence[Prompt]
    evaluation: Sequence[Prompt]


# --- the sections of a run ------------------------------------------------------------------------------------------
# No slots: a class of a run's config inherits from one of these and from `RunJob`, and slots would not combine.


@dataclass(frozen=True, kw_only=True)
class PolicyJob:
    """A generator that is aligned on prompts alone, and the rewards that score the result; base of the other jobs.

    out: the folder of the run; run again, it continues.
    prompts: where prompts come from; the held-out share is kept for validation and evaluation.
    generators: the generators by a name of your choice.
    rewards: all rewards by a name of your choice; the evaluation uses every one of them.
    policy: which generator is aligned.
    gold: the reward that judges the result and must not be used before.
    """

    out: Path
    prompts: PromptsConfig
    generators: Mapping[str, GeneratorSpec]
    rewards: Mapping[str, RewardSpec]
    policy: str
    gold: str | None = None
    trains_on_prompts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_names([self.policy], self.generators, kind="generator", key="policy")
        self.check_judges("gold", [])

    def check_judges(self, key: str, names: Sequence[str]) -> None:
        """Names in `key` must be rewards, and none of them gold."""
        require_names([*names, *([self.gold] if self.gold else [])], self.rewards, kind="reward", key=key)
        if self.gold in names:
            raise ConfigError(
                f"gold is '{self.gold}', which is also in {key}; gold must not be used before the evaluation"
            )

    @property
    def aligned(self) -> GeneratorSpec:
        """The generator that is aligned."""
        return self.generators[self.policy]

    @property
    def held_out_advice(self) -> str:
        """Empty where training has held-out rows without `validation`; else how to get them, the end of a sentence."""
        return ", whose prompts the held-out loss uses too"

    def share_prompts(self, shown: int) -> PromptShares:
        """The prompts by use, the first `shown` held-out ones for validation. Raises ConfigError for an empty share."""
        train, held_out = self.split_prompts()
        shares = PromptShares(train=train, validation=held_out[:shown], evaluation=held_out[shown:])
        if not shares.evaluation or (not train and self.trains_on_prompts):
            amounts = f"{len(train)} for training, {shown} for validation, {len(shares.evaluation)} for evaluation"
            raise ConfigError(f"{self.prompts} give {amounts}; give more prompts or change prompts.held_out")
        return shares

    def split_prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """Training prompts, and prompts for validation and evaluation."""
        return self.prompts.split()

    def data_plan(self) -> list[str]:
        """Lines of a dry run about the training data."""
        return [f"data: the training share of {self.prompts}"]

    def make_data(self, shares: PromptShares) -> TrainingData:
        """The training data, made where it has to be."""
        return TrainingData(kind="prompts", prompts=(shares.train, shares.validation))

    def prepared(self, shares: PromptShares) -> PromptShares:
        """The prompts with what rewards read beside the text (questions), after `make_data`."""
        return shares


@dataclass(frozen=True, kw_only=True)
class SynPicJob(PolicyJob):
    """Ranked candidates, made with Syn-Pic in the folders candidates, scores and ranked of the run.

    generate: which generators generate how many candidates, and how.
    score: which rewards rank the candidates.
    rank: how scores become rankings.
    """

    generate: GenerateConfig
    score: ScoreConfig
    rank: RankConfig = field(default_factory=RankConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sources(self.generate, self.generators)
        self.check_judges("score.rewards", self.score.rewards)

    @property
    def held_out_advice(self) -> str:
        if self.rank.held_out > self.prompts.held_out:
            return ""
        return f", or rank.held_out above prompts.held_out ({self.prompts.held_out})"

    def data_plan(self) -> list[str]:
        sources = ", ".join(f"{source.name} x {source.seeds_per_prompt}" for source in self.generate.sources)
        candidates = f"{self.generate.candidates} candidates ({sources})"
        return [
            f"generate: {candidates} for the training share of {self.prompts}",
            f"score: with {', '.join(self.score.rewards)}, while the next candidates are generated",
            f"rank: win rates into {self.out / 'ranked'}",
        ]

    def make_data(self, shares: PromptShares) -> TrainingData:
        print(f"      {self.make_ranked(shares.train, self.out)}")
        ranked = self.out / "ranked"
        # Rows of the training prompts have a held-out side only where rank.held_out is above prompts.held_out.
        share = self.rank.held_out if any(ranked.glob("data/heldout-*")) else 0.0
        return TrainingData(kind="ranked", path=ranked, held_out=share)

    def make_ranked(self, prompts: Sequence[Prompt], out: Path) -> str:
        """Candidates, scores and ranked rows in folders of `out`; returns how many rows there are, as text."""
        folders = (out / "candidates", out / "scores")
        build_rewards = RewardBuilders({name: self.rewards[name] for name in self.score.rewards})
        generate_and_score(
            prompts,
            self.generate,
            self.score,
            folders,
            build_sources=generator_builders(self.generators),
            build_rewards=build_rewards,
            source_identities=identities(self.generators),
            reward_identities=identities(self.rewards),
        )
        for line in build_rewards.reports():
            print(line)
        return counts_line(rank_candidates(*folders, self.rank, out / "ranked").counts)


@dataclass(frozen=True, kw_only=True)
class QuestionsJob(PolicyJob):
    """Questions about the prompts, written into the folders aspects and aspects_heldout of the run.

    writer: what writes the questions.
    aspects: which questions are written, and how.
    """

    writer: WriterSpec = field(default_factory=WriterSpec)
    aspects: AspectsConfig = field(default_factory=AspectsConfig)

    def data_plan(self) -> list[str]:
        kinds, name = ", ".join(self.aspects.aspects), self.writer.writer
        return [*self.writer.absent, f"aspects: questions ({kinds}) about {self.prompts}, written by '{name}'"]

    def make_data(self, shares: PromptShares) -> TrainingData:
        return TrainingData(kind="aspects", path=self._write(shares.train, "aspects"))

    def prepared(self, shares: PromptShares) -> PromptShares:
        """The held-out prompts with questions of their own; without, a critic would ask what it asks of every prompt.

        A prompt whose questions failed the checks has none.
        """
        path = self._write([*shares.validation, *shares.evaluation], "aspects_heldout")
        rows = load_rows(path, "train", held_out=0.0, columns=(("prompt",), ("questions",)))
        questions = dict(zip(rows["prompt_id"], rows["questions"], strict=True))

        def asked(share: Sequence[Prompt]) -> list[Prompt]:
            found = [{"questions": questions[prompt.id]} if prompt.id in questions else {} for prompt in share]
            pairs = zip(share, found, strict=True)
            return [replace(prompt, metadata={**prompt.metadata, **own}) for prompt, own in pairs]

        return replace(shares, validation=asked(shares.validation), evaluation=asked(shares.evaluation))

    def _write(self, prompts: Sequence[Prompt], name: str) -> Path:
        path, identity = self.out / name, self.writer.identity
        result = write_aspects(prompts, self.aspects, path, build_writer=self.writer.builder(), identity=identity)
        print(f"      {counts_line(result.counts)}")
        return path


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """An existing dataset.

    path: a folder that `datasets` reads, or a parquet or JSON lines file.
    held_out: share of rows kept for the held-out loss, where the data has no split for it; 0 for none.
    root: the folder of the files that rows name by their path; default: the dataset's own.
    """

    path: Path
    held_out: float = 0.0
    root: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"data: held_out is {self.held_out}; it must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class DatasetJob(PolicyJob):
    """An existing dataset; `prompts` are for validation and evaluation (all of them with held_out: 0).

    data: where the dataset is.
    """

    data: DatasetConfig
    method: str
    trains_on_prompts: ClassVar[bool] = False

    @property
    def held_out_advice(self) -> str:
        return "" if self.data.held_out > 0 else ", or data.held_out above 0"

    def split_prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        return super().split_prompts() if self.prompts.held_out else ([], self.prompts.read())

    def data_plan(self) -> list[str]:
        missing = [] if self.data.path.exists() else [f"NOT THERE YET: {self.data.path} (data)"]
        method = known_method(self.method)
        meaning = DATA[method.data].meaning if method else f"what '{self.method}' trains on,"
        return [*missing, f"data: {meaning} in {self.data.path}"]

    def make_data(self, shares: PromptShares) -> TrainingData:
        excluded = frozenset(prompt.id for prompt in (*shares.validation, *shares.evaluation))
        kind = find_method(self.method).data
        return TrainingData(
            kind=kind, path=self.data.path, root=self.data.root, held_out=self.data.held_out, excluded=excluded
        )


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DataKind:
    """One kind of training data.

    meaning: what the rows are, for messages and help.
    load: (path, split, held_out=..., root=...) -> rows of "train" or "heldout", with the columns of the kind checked;
        None where the data are the prompts themselves.
    made: the sections of a run that makes such data; None where a run takes an existing dataset only.
    """

    meaning: str
    load: Callable[..., Dataset] | None = None
    made: type[PolicyJob] | None = None


_CAPTIONS = functools.partial(load_rows, columns=(("prompt",),), optional=("image", "video"))
_ASPECTS = functools.partial(load_rows, columns=(("prompt",), ("questions",)))

DATA = {
    "ranked": DataKind("ranked candidates (or pairs, or captioned media)", load_ranked, SynPicJob),
    "dense": DataKind("pairs of clips with labels of their segments", load_dense),
    "aspects": DataKind("prompts with questions about them", _ASPECTS, QuestionsJob),
    "prompts": DataKind("prompts", made=PolicyJob),
    "captions": DataKind("prompts (an existing dataset: with images or videos)", _CAPTIONS, PolicyJob),
}


def data_kind(method: str) -> DataKind:
    """The kind of data that a method trains on. Raises ConfigError for a kind that is not in `DATA`."""
    kind = find_method(method).data
    if kind not in DATA:
        raise ConfigError(f"method '{method}' asks for data of the kind '{kind}'; known kinds: {', '.join(DATA)}")
    return DATA[kind]


def data_sections(method: str, tree: Tree, problems: list[str], *, dry_run: bool = False) -> type[PolicyJob]:
    """The sections that a run of `method` has: those of an existing dataset where its config has a key `data`.

    Keys of other sections are taken out of `tree` and reported in `problems`. In a dry run the sections of a user's own
    method are those that the config has, for its module is not imported.
    """
    if dry_run and known_method(method) is None:
        if "data" in tree:
            return DatasetJob
        questions = QuestionsJob if {"writer", "aspects"} & set(tree) else PolicyJob
        return SynPicJob if {"generate", "score", "rank"} & set(tree) else questions
    kind = data_kind(method)
    sections: type[PolicyJob] = kind.made or DatasetJob
    if "data" in tree and kind.load is not None:
        sections = DatasetJob
    classes = [DatasetJob, *(other.made for other in DATA.values() if other.made)]
    others = {key for section in classes for key in init_fields(section)} - {"method", *init_fields(sections)}
    source = "an existing dataset (key `data`)" if sections is DatasetJob else kind.meaning
    reason = f"method '{method}' trains on {source} here"
    problems += [f"{tree.pop(key).where}: {reason}; remove '{key}'" for key in sorted(others & set(tree))]
    return sections

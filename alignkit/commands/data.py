"""Training data by kind: the sections of a run's config that say where it comes from.

`DATA` is the table of kinds; a method names its kind (`alignkit.trainers.Method.data`). A kind that a run can make has
sections for that (`SynPicJob`); any kind but the prompts themselves can be an existing dataset (`DatasetJob`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from alignkit.commands.dense_job import DenseJob
from alignkit.commands.methods import find_method, known_method
from alignkit.commands.policy_job import PolicyJob
from alignkit.commands.specs import RewardBuilders, generator_builders, identities, require_sources
from alignkit.commands.training_data import LOADERS, PromptShares, TrainingData
from alignkit.commands.verb import Tree, counts_line
from alignkit.commands.writers import WriterSpec
from alignkit.config import init_fields
from alignkit.errors import ConfigError
from alignkit.records import Prompt
from data_pipelines.aspects import AspectsConfig, write_aspects
from data_pipelines.synpic import GenerateConfig, RankConfig, ScoreConfig, generate_and_score, rank_candidates


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
        return _asked(shares, TrainingData(kind="aspects", path=path))

    def _write(self, prompts: Sequence[Prompt], name: str) -> Path:
        path, identity = self.out / name, self.writer.identity
        result = write_aspects(prompts, self.aspects, path, build_writer=self.writer.builder(), identity=identity)
        print(f"      {counts_line(result.counts)}")
        return path


def _asked(shares: PromptShares, data: TrainingData) -> PromptShares:
    """The held-out prompts with the questions of `data`."""
    validation, evaluation = map(data.with_questions, (shares.validation, shares.evaluation))
    return replace(shares, validation=validation, evaluation=evaluation)


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

    @property
    def held_out_advice(self) -> str:
        return "" if self.data.held_out > 0 else ", or data.held_out above 0"

    @property
    def trains_on_prompts(self) -> bool:
        return False

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

    def prepared(self, shares: PromptShares) -> PromptShares:
        """The held-out prompts with the questions that the dataset has about them."""
        return _asked(shares, self.make_data(shares))


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DataKind:
    """One kind of training data; `training_data.LOADERS` reads the files of those that have files.

    meaning: what the rows are, for messages and help.
    made: the sections of a run that makes such data.
    """

    meaning: str
    made: type[PolicyJob]


DATA = {
    "ranked": DataKind("ranked candidates (or pairs, or captioned media)", SynPicJob),
    "dense": DataKind("pairs of clips with labels of their segments", DenseJob),
    "aspects": DataKind("prompts with questions about them", QuestionsJob),
    "prompts": DataKind("prompts", PolicyJob),
    "captions": DataKind("prompts (an existing dataset: with images or videos)", PolicyJob),
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
        own = {kind.made: {*init_fields(kind.made)} - {*init_fields(PolicyJob)} for kind in DATA.values()}
        return next((made for made, keys in own.items() if keys & set(tree)), PolicyJob)
    kind = data_kind(method)
    has_files = find_method(method).data in LOADERS
    sections: type[PolicyJob] = DatasetJob if "data" in tree and has_files else kind.made
    classes = [DatasetJob, *(other.made for other in DATA.values())]
    others = {key for section in classes for key in init_fields(section)} - {"method", *init_fields(sections)}
    source = "an existing dataset (key `data`)" if sections is DatasetJob else kind.meaning
    reason = f"method '{method}' trains on {source} here"
    problems += [f"{tree.pop(key).where}: {reason}; remove '{key}'" for key in sorted(others & set(tree))]
    return sections

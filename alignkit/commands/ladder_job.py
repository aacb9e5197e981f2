"""The config of a ladder: its arms, what each trains on, and where their results are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from alignkit.commands.data import DATA, data_kind
from alignkit.commands.dense_job import DenseJob
from alignkit.commands.dense_pairs import ClipsConfig, PairStage
from alignkit.commands.label import LabelStage
from alignkit.commands.methods import DEFAULT_METHOD, find_method
from alignkit.commands.policy_job import PolicyJob
from alignkit.commands.specs import ValidationConfig
from alignkit.commands.training_data import PromptShares
from alignkit.commands.writers import WriterSpec
from alignkit.config import init_fields, load
from alignkit.errors import ConfigError, require_at_least
from alignkit.evaluation.paired import EvaluateConfig
from alignkit.paths import require_plain_names
from alignkit.provenance import plain
from alignkit.records import Prompt
from data_pipelines.aspects import AspectsConfig
from data_pipelines.synpic import GenerateConfig, RankConfig, ScoreConfig

SET_BY_LADDER = {"out", "output_dir", "cache_dir", "seed", "noise_seed"}  # trainer keys
OPTION_OF = {  # options of an arm that only some kinds of data have
    "labels": ("ranked", "dense"),
    "own_samples": ("ranked",),
    "ranked_by": ("ranked",),
    "writer": ("aspects",),
    "pairs": ("dense",),
    "label": ("dense",),
}


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """One way of learning.

    method: a training method: a name that `alignkit --help` lists after `train`, or one of your own. Its data must be
        of a kind that is made here.
    labels: ranked, or random (the control): each prompt's phi shuffled among its candidates, or the labels of pairs of
        clips shuffled among the pairs.
    share: share of the training rows that the arm gets, the same ones for every seed.
    own_samples: learn from the policy's own candidates only.
    ranked_by: those of `score.rewards` that rank this arm's candidates (default: all).
    writer: what writes the questions of this arm (default: the ladder's writer).
    pairs: keys of `pairs` on top of the ladder's, for pairs of clips of this arm's own.
    label: keys of `label` in place of the ladder's, for labels of this arm's own.
    train: trainer keys on top of the ladder's; each must be a key of this arm's method.
    """

    method: str = DEFAULT_METHOD
    labels: Literal["ranked", "random"] = "ranked"
    own_samples: bool = False
    ranked_by: Sequence[str] = ()
    share: float = 1.0
    writer: WriterSpec | None = None
    pairs: Mapping[str, Any] = field(default_factory=dict)
    label: LabelStage | None = None
    train: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"share is {self.share}; it must lie in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class LadderJob(PolicyJob):
    """Train and evaluate every arm with every seed.

    data: where candidates, rankings, questions, pairs of clips and caches are, those of single arms by their names;
        ladders that name the same folder share them (default: out).
    generate: which generators generate how many candidates, and how; for arms that train on ranked candidates.
    score: which rewards rank the candidates.
    rank: how scores become rankings.
    writer: what writes the questions of held-out prompts, and of arms without their own.
    aspects: which questions are written, and how.
    clips: where real videos come from, for arms that train on pairs of clips.
    pairs: which pairs are made of them, by the policy, and how they are sampled.
    label: what labels their segments.
    arms: the ways of learning, by name.
    training_seeds: each arm is trained with each of them (LoRA start, order, noise, shuffled labels).
    train: trainer keys that all arms share. An arm leaves out those that its method does not have and another arm's
        method has; a key that no arm's method has is an error.
    validation: media scored during training.
    evaluate: how base and tuned are compared.
    guidance_scales: guidance scales of further comparisons, which differ from `evaluate` in nothing else.
    evaluate_from: leave out this many held-out prompts, from the first: those by which a sweep chose.
    evaluate_prompts: evaluate on at most this many of the others; default: all.
    workers: arms trained at the same time.
    contrasts: pairs of arms by their names: the table shows the gain of the first over the second.
    table: where the table goes.
    title: its heading.
    """

    data: Path | None = None
    generate: GenerateConfig | None = None
    score: ScoreConfig | None = None
    rank: RankConfig = field(default_factory=RankConfig)
    writer: WriterSpec = field(default_factory=WriterSpec)
    aspects: AspectsConfig = field(default_factory=AspectsConfig)
    clips: ClipsConfig | None = None
    pairs: PairStage | None = None
    label: LabelStage | None = None
    arms: Mapping[str, ArmConfig]
    training_seeds: Sequence[int] = (0, 1, 2)
    train: Mapping[str, Any] = field(default_factory=dict)
    validation: ValidationConfig | None = None
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    guidance_scales: Sequence[float] = ()
    evaluate_from: int = 0
    evaluate_prompts: int | None = None
    workers: int = 2
    contrasts: Sequence[Sequence[str]] = ()
    table: Path
    title: str = "The ladder"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_plain_names(self.arms, "arms")
        self.check_judges("validation.rewards", self.validation.rewards if self.validation else [])
        for name, arm in self.arms.items():
            taken = sorted(SET_BY_LADDER & {*self.train, *arm.train})
            if taken:
                raise ConfigError(f"arms.{name}: {taken} are set by the ladder; remove them from train")
        for pair in self.contrasts:
            if len(pair) != 2 or not {*pair} <= self.arms.keys():
                raise ConfigError(f"contrasts: {list(pair)}; give pairs of arms: {', '.join(self.arms)}")
        self.aligned.require_frames(self.evaluate.sampling.num_frames, "evaluate.sampling.num_frames")
        if self.validation is not None:
            self.aligned.require_frames(self.validation.sampling.num_frames, "validation.sampling.num_frames")
        require_at_least(0, {"evaluate_from": self.evaluate_from})
        require_at_least(1, {"evaluate_prompts": self.evaluate_prompts, "workers": self.workers})
        if not self.training_seeds or not all(0 <= seed < 2**32 for seed in self.training_seeds):
            raise ConfigError(
                f"training_seeds is {list(self.training_seeds)}; give at least one, each from 0 to 2**32 - 1"
            )
        if len(self.comparisons) != 1 + len(self.guidance_scales):
            raise ConfigError(f"guidance_scales is {list(self.guidance_scales)}; it repeats a guidance scale")

    @property
    def trains_on_prompts(self) -> bool:
        return any(self.data_job(name).trains_on_prompts for name in self.arms)

    def data_job(self, name: str, *, is_own: bool = True) -> PolicyJob:
        """What makes an arm's training data: a job with the ladder's sections for that kind of data.

        `is_own`: with the arm's own writer, pairs and labels, where it has any. Raises ConfigError where a section that
        it needs is missing, or an option of the arm is for another kind.
        """
        arm, kind = self.arms[name], find_method(self.arms[name].method).data
        arm = arm if is_own else ArmConfig(method=arm.method)
        made = data_kind(arm.method).made
        for key, kinds in OPTION_OF.items():
            if vars(arm)[key] != vars(ArmConfig())[key] and kind not in kinds:
                meant = " or ".join(DATA[one].meaning for one in kinds)
                raise ConfigError(f"arms.{name}: {key} is for arms that train on {meant}; '{arm.method}' does not")
        scored = self.score.rewards if self.score else []
        if not {*arm.ranked_by} <= {*scored}:
            raise ConfigError(f"arms.{name}: ranked_by is {list(arm.ranked_by)}; score.rewards has {list(scored)}")
        sections = {key: vars(self)[key] for key in init_fields(made) if key in vars(self)} | {"out": self.shared}
        sections |= {} if arm.label is None else {"label": arm.label}
        missing = [key for key, section in sections.items() if section is None and key != "gold"]
        if missing:
            raise ConfigError(f"arms.{name}: method '{arm.method}' needs the sections {' and '.join(missing)}")
        sections |= {"pairs_folder": self.shared / "pairs"} if made is DenseJob else {}
        if arm.writer is not None:
            sections["writer"] = arm.writer
        if arm.pairs:
            sections |= {"pairs": self._pairs_of(name), "pairs_folder": None}
        if arm.writer or arm.pairs or arm.label:
            alike = (arm.writer, arm.pairs, arm.label)
            first = next(key for key, other in self.arms.items() if alike == (other.writer, other.pairs, other.label))
            sections["out"] = self.shared / "arms" / first
        return made(**sections)

    def _pairs_of(self, name: str) -> PairStage:
        try:
            return load(PairStage, base={**plain(self.pairs), **self.arms[name].pairs})
        except ConfigError as error:
            raise ConfigError(f"arms.{name}: pairs: {error}") from error

    @property
    def shared(self) -> Path:
        """The folder of what all arms share."""
        return self.data or self.out

    @property
    def comparisons(self) -> Mapping[float, EvaluateConfig]:
        """How base and tuned are compared, by guidance scale; that of `evaluate` is the first."""
        first = self.evaluate.sampling
        scales = [first.guidance_scale, *self.guidance_scales]
        return {s: replace(self.evaluate, sampling=replace(first, guidance_scale=s)) for s in scales}

    @property
    def shares(self) -> PromptShares:
        """The prompts by use."""
        return self.share_prompts(self.validation.prompts if self.validation else 0)

    def judged(self, shares: PromptShares) -> Sequence[Prompt]:
        """The held-out prompts that base and tuned are compared on."""
        return shares.evaluation[max(0, self.evaluate_from - len(shares.validation)) :][: self.evaluate_prompts]

    def folder(self, arm: str, seed: int) -> Path:
        """The folder of an arm's training with one seed."""
        return self.out / "arms" / arm / f"seed-{seed}"

    def evaluation(self, arm: str, seed: int, scale: float) -> Path:
        """The folder of the comparison at one guidance scale."""
        is_first = scale == self.evaluate.sampling.guidance_scale
        return self.folder(arm, seed) / ("evaluation" if is_first else f"evaluation-guidance-{scale:g}")

    def cost(self, arm: str, seed: int) -> Path:
        """The record of what a training cost."""
        return self.folder(arm, seed) / "cost.json"

    def data_cost(self, arm: str) -> Path:
        """The record of what it cost to make an arm's training data."""
        return self.data_job(arm).out / f"cost-{find_method(self.arms[arm].method).data}.json"

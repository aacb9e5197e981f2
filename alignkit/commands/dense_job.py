"""Labelled pairs of clips as the data of a run: pairs of real videos by the policy, then labels of their segments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alignkit.commands.dense_pairs import ClipsConfig, PairStage
from alignkit.commands.label import LabelStage
from alignkit.commands.policy_job import PolicyJob
from alignkit.commands.training_data import PromptShares, TrainingData
from alignkit.commands.verb import counts_line
from alignkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DenseJob(PolicyJob):
    """Pairs of clips with labels of their segments, in the folders pairs and labels of the run.

    Training prompts are the captions of the videos; `prompts` are for validation and evaluation (all of them with
    held_out: 0). Pairs whose caption is one of those are not trained on.

    clips: where the real videos come from.
    pairs: which pairs are made of them, by the policy, and how they are sampled.
    label: what labels their segments.
    held_out_pairs: share of the labelled pairs for the held-out loss, by a hash of the caption; 0 for none.
    pairs_folder: where the pairs are; default: pairs, in the folder of the run. Runs that name the same folder, with
        the same clips, policy and `pairs`, share them.
    """

    clips: ClipsConfig
    pairs: PairStage
    label: LabelStage
    held_out_pairs: float = 0.0
    pairs_folder: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.aligned.require_frames(self.pairs.sampling.num_frames, "pairs.sampling.num_frames")
        if not self.label.labellers and not self.label.votes:
            raise ConfigError("label: nothing labels the pairs; give label.labellers, or label.votes")
        if not 0 <= self.held_out_pairs < 1:
            raise ConfigError(f"held_out_pairs is {self.held_out_pairs}; it must lie in [0, 1)")

    @property
    def held_out_advice(self) -> str:
        return "" if self.held_out_pairs > 0 else ", or held_out_pairs above 0"

    @property
    def trains_on_prompts(self) -> bool:
        return False

    def data_plan(self) -> list[str]:
        return [
            *self.clips.missing,
            f"pairs: {self.pairs.words} of the videos in {self.clips} into {self._pairs}",
            *self.label.missing,
            f"label: the segments, with {', '.join(self.label.voters)}, into {self._labels}",
        ]

    def make_data(self, shares: PromptShares) -> TrainingData:
        pairs = self.pairs.make(self.clips, self.aligned, self._pairs)
        print(f"      {counts_line(pairs.counts)}")
        labels = self.label.make(self._pairs, self.aligned, self._labels)
        print(f"      {labels.rows} labelled pairs: {counts_line(labels.counts)}")
        excluded = frozenset(prompt.id for prompt in (*shares.validation, *shares.evaluation))
        return TrainingData(kind="dense", path=self._labels, held_out=self.held_out_pairs, excluded=excluded)

    @property
    def _pairs(self) -> Path:
        return self.pairs_folder or self.out / "pairs"

    @property
    def _labels(self) -> Path:
        return self.out / "labels"

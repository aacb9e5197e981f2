"""Votes -> labels of pairs, what got none and why, and the statistics of a manifest."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data_pipelines.dense.aggregate import Aggregate
from data_pipelines.dense.index import Index
from data_pipelines.dense.votes import Place, Vote, agreement
from data_pipelines.segments import statistics

REASON = "reason"  # in the details of a vote: why it is a tie, or no answer
WITHDRAWN = "withdrawn"  # the reason of a vote that has none


@dataclass(frozen=True)
class Labelled:
    """The labels of the pairs that have one, by id, and the votes that they are from.

    votes: of each labeller; those of `truth` are apart. A segment without a label in a pair that has one is a tie.
    """

    index: Index
    votes: Mapping[str, Sequence[Vote]]
    truth: Mapping[str, Sequence[int]] | None
    places: Mapping[Place, int]
    labels: Mapping[str, Sequence[int]]

    @classmethod
    def of(cls, votes: Sequence[Vote], index: Index, truth: str | None, aggregate: Aggregate) -> Labelled:
        """`truth` is the name of a labeller or a column; a labeller of that name counts before a column."""
        by_name: dict[str, list[Vote]] = defaultdict(list)
        for vote in votes:
            by_name[vote.labeller].append(vote)
        known: Mapping[str, Sequence[int]] | None = None
        if truth in by_name:
            known = _by_pair(index, _labels(by_name.pop(truth)))
        elif truth is not None:
            known = {pair.id: pair.truth for pair in index.pairs.values()}
        places = aggregate([vote for own in by_name.values() for vote in own if vote.label is not None])
        return cls(index, dict(by_name), known, places, _by_pair(index, places))

    @cached_property
    def sources(self) -> Mapping[str, str]:
        """The labellers of each pair that has a label, joined by "+"."""
        names: dict[str, set[str]] = defaultdict(set)
        for vote in (vote for own in self.votes.values() for vote in own if vote.label is not None):
            names[vote.pair].add(vote.labeller)
        return {pair: "+".join(sorted(own)) for pair, own in names.items()}

    def unanswered(self) -> int:
        """Segments without a label in pairs that have one."""
        return sum(len(own) for own in self.labels.values()) - len(self.places)

    def quarantined(self) -> list[dict[str, Any]]:
        """The pairs without any label, with the first reason of each labeller."""
        reasons: dict[str, dict[str, str]] = defaultdict(dict)
        for name, own in sorted(self.votes.items()):
            for vote in own:
                reasons[vote.pair].setdefault(name, f"{name}: {vote.details.get(REASON, WITHDRAWN)}")
        faults = []
        for pair in self.index.pairs.values():
            if pair.id not in self.labels:
                reason = "; ".join(reasons[pair.id].values()) or "no labeller has labelled it"
                faults.append({"pair": pair.id, "source_id": pair.source_id, "reason": reason})
        return faults


def _labels(votes: Sequence[Vote]) -> dict[Place, int]:
    return {vote.place: vote.label for vote in votes if vote.label is not None}


def _by_pair(index: Index, places: Mapping[Place, int]) -> dict[str, list[int]]:
    """Labels [S] of each pair that has at least one; 0 where a segment has none."""
    known = {pair for pair, _ in places}
    labels = {}
    for pair in index.pairs.values():
        if pair.id in known:
            labels[pair.id] = [places.get((pair.id, segment), 0) for segment in range(len(pair.segments))]
    return labels


def statistics_of(labelled: Labelled) -> dict[str, Any]:
    """Statistics of the labels (`data_pipelines.segments.statistics`), `alpha`, and those of each labeller.

    `alpha` is Krippendorff's over all labellers less the truth, None with fewer than two. Of a labeller `unanswered`
    counts, by reason, the segments on which it gave no answer.
    """
    result = _compared(labelled, labelled.labels)
    result["alpha"] = agreement(vote for own in labelled.votes.values() for vote in own)
    result["labellers"] = {}
    for name, own in labelled.votes.items():
        found = _compared(labelled, _by_pair(labelled.index, _labels(own)))
        reasons = Counter(str(vote.details.get(REASON, WITHDRAWN)) for vote in own if vote.label is None)
        result["labellers"][name] = {**found, "unanswered": dict(reasons)}
    return result


def _compared(labelled: Labelled, labels: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Statistics of labels by pair, against the truth where there is one."""
    listed = [labels.get(pair, []) for pair in labelled.index.pairs]
    if labelled.truth is None:
        return dict(statistics(listed))
    return dict(statistics(listed, [labelled.truth.get(pair, []) for pair in labelled.index.pairs]))

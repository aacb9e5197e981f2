"""Who voted what: each annotator's choices, which clip each sees on the left, undo, and the agreement between them.

An annotator chooses "left", "right" or "tie"; which copy is left is drawn for each annotator and pair, so that a
preference for a side favours neither copy. Every choice is appended to the votes before it counts. Methods may be
called from several threads.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.errors import DataError
from alignkit.seeds import derive_seed
from data_pipelines.annotation.pairs import Pairs
from data_pipelines.dense.index import IndexedPair
from data_pipelines.dense.votes import Place, Vote, agreement, append_votes, read_votes, require_labeller

SIDES = ("left", "right")
TIE = "tie"
MOST_ANNOTATORS = 64  # of one server, which keeps each one's choices
LEFT = "left"  # in a vote's details: the copy that was shown on the left; votes of judges have none


@dataclass
class _Annotator:
    """Labels that hold, and what they were before each change, the last one at the end."""

    labels: dict[Place, int]
    changes: list[tuple[Place, int | None]] = field(default_factory=list)


class Annotators:
    """The annotators of `pairs`, whose votes are in `folder`. `only`: the one name that is accepted."""

    def __init__(self, pairs: Pairs, folder: Path, *, seed: int = 0, only: str | None = None) -> None:
        if only is not None:
            require_labeller(only)
        self.pairs, self.folder, self.seed, self.only = pairs, folder, seed, only
        self._known: dict[str, _Annotator] = {}
        self._lock = threading.Lock()

    def require(self, name: str) -> None:
        """DataError for a name that is not safe as the name of a file, or another one than `only`."""
        require_labeller(name)
        if self.only not in (None, name):
            raise DataError(f"this page is for the annotator '{self.only}'; leave out --annotator to accept others")

    def copy(self, name: str, row: IndexedPair, side: str) -> int:
        """Which clip of the pair, 0 or 1, the annotator sees on `side`; raises what `require` raises."""
        self.require(name)
        return SIDES.index(side) ^ (derive_seed(self.seed, name, row.id, LEFT) & 1)

    def choices(self, name: str) -> list[list[str | None]]:
        """For each pair, for each segment: "left", "right", "tie", or None without a vote.

        Raises what `require` raises.
        """
        found = []
        with self._lock:
            labels = self._annotator(name).labels
            for row in self.pairs.rows:
                own = [labels.get((row.id, segment)) for segment in range(len(row.segments))]
                found.append([self._choice(name, row, label) for label in own])
        return found

    def vote(self, name: str, row: IndexedPair, segment: Any, choice: str) -> None:
        """Append the vote. Raises DataError for values that are none, StorageError where it cannot be written."""
        if choice not in (*SIDES, TIE):
            raise DataError(f"the choice {choice!r:.40}; choices are left, right and tie")
        if type(segment) is not int or not 0 <= segment < len(row.segments):
            raise DataError(f"segment {segment!r:.40}; the pair has the segments 0 to {len(row.segments) - 1}")
        label = 0 if choice == TIE else 1 - 2 * self.copy(name, row, choice)
        with self._lock:
            annotator, place = self._annotator(name), (row.id, segment)
            before = annotator.labels.get(place)
            self._write(name, place, label)
            annotator.changes.append((place, before))

    def undo(self, name: str) -> tuple[IndexedPair, int, str | None] | None:
        """Take back the last vote; returns its pair, its segment and the choice that holds again. None without one.

        After a restart the votes that hold are taken back one by one, without what they had replaced.
        """
        with self._lock:
            annotator = self._annotator(name)
            if not annotator.changes:
                return None
            place, before = annotator.changes[-1]
            self._write(name, place, before)
            annotator.changes.pop()
            row = self.pairs.rows[self.pairs.numbers[place[0]]]
            return row, place[1], self._choice(name, row, before)

    def progress(self) -> dict[str, int]:
        """The number of labelled segments of each annotator, in the order of names."""
        votes = self._people()
        names = {vote.labeller for vote in votes} if self.only is None else {self.only}
        counts = Counter(vote.labeller for vote in votes)
        return {name: counts[name] for name in sorted(names)}

    def agreement(self) -> Mapping[str, Any]:
        """Krippendorff's `alpha` (None without shared segments that differ), `annotators`, and `shared` segments."""
        votes = self._people()
        places = Counter(vote.place for vote in votes)
        shared = sum(count > 1 for count in places.values())
        return {"alpha": agreement(votes), "annotators": len({vote.labeller for vote in votes}), "shared": shared}

    def _people(self) -> list[Vote]:
        """Votes of annotators, also those of other servers, on pairs that are here."""
        return [vote for vote in read_votes(self.folder) if LEFT in vote.details and vote.pair in self.pairs.numbers]

    def _annotator(self, name: str) -> _Annotator:
        self.require(name)
        if name not in self._known:
            if len(self._known) >= MOST_ANNOTATORS:
                raise DataError(f"{MOST_ANNOTATORS} annotators have begun; start `alignkit annotate` again")
            known = read_votes(self.folder, name, withdrawn=True)
            if any(LEFT not in vote.details for vote in known):
                raise DataError(
                    f"'{name}' has votes that were not given on this page, such as a judge's; take another name"
                )
            votes = [vote for vote in known if vote.pair in self.pairs.numbers]
            labels = {vote.place: vote.label for vote in votes if vote.label is not None}
            self._known[name] = _Annotator(labels, [(place, None) for place in labels])
        return self._known[name]

    def _write(self, name: str, place: Place, label: int | None) -> None:
        row = self.pairs.rows[self.pairs.numbers[place[0]]]
        append_votes(self.folder, name, [Vote(*place, label, name, {LEFT: self.copy(name, row, LEFT)})])
        labels = self._known[name].labels
        labels.pop(place, None)
        if label is not None:
            labels[place] = label

    def _choice(self, name: str, row: IndexedPair, label: int | None) -> str | None:
        if label is None or label == 0:
            return None if label is None else TIE
        return SIDES[(label < 0) ^ self.copy(name, row, LEFT)]

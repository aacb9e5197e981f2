"""Votes of several labellers on a segment -> one label.

    majority       the most frequent label; where several are equally frequent, a tie
    dawid_skene    the most probable label, each labeller weighted by the errors that it is estimated to make (Dawid and
                   Skene 1979), by crowd-kit

Not here: reading votes, and their agreement (`votes`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from alignkit.errors import ConfigError
from data_pipelines.dense.votes import Place, Vote

ROUNDS = 100  # of expectation maximisation, at most

Aggregate = Callable[[Sequence[Vote]], Mapping[Place, int]]


def majority(votes: Sequence[Vote]) -> dict[Place, int]:
    """The most frequent label of each segment that has a vote."""
    labels: dict[Place, list[int]] = defaultdict(list)
    for vote in votes:
        if vote.label is not None:
            labels[vote.place].append(vote.label)
    return {place: _most_frequent(own) for place, own in labels.items()}


def _most_frequent(labels: Sequence[int]) -> int:
    (label, most), *others = Counter(labels).most_common()
    return 0 if any(count == most for _, count in others) else label


def dawid_skene(votes: Sequence[Vote]) -> dict[Place, int]:
    """The label of highest posterior probability of each segment that has a vote.

    A labeller with few votes cannot be estimated well: use it from some dozens of segments each on. Raises ConfigError
    where crowd-kit is not installed.
    """
    try:
        import pandas as pd
        from crowdkit.aggregation import DawidSkene
    except ImportError as error:
        raise ConfigError(
            f"aggregate is dawid_skene, which needs crowd-kit ({error}); install it (`pip install alignkit[crowd]`), "
            "or use aggregate: majority"
        ) from error
    kept = [vote for vote in votes if vote.label is not None]
    if not kept:
        return {}
    columns = {
        "task": [f"{vote.pair} {vote.segment}" for vote in kept],
        "worker": [vote.labeller for vote in kept],
        "label": [vote.label for vote in kept],
    }
    found = DawidSkene(n_iter=ROUNDS).fit_predict(pd.DataFrame(columns))
    return {vote.place: int(found[task]) for vote, task in zip(kept, columns["task"], strict=True)}


AGGREGATES: dict[str, Aggregate] = {"majority": majority, "dawid_skene": dawid_skene}

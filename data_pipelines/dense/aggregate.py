"""Votes of several labellers on a segment -> one label.

    majority       the most frequent label; where several are equally frequent, a tie
    dawid_skene    the most probable label, each labeller weighted by the errors that it is estimated to make (Dawid and
                   Skene 1979), by crowd-kit

Not here: reading votes, and their agreement (`votes`).
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from alignkit.errors import ConfigError
from data_pipelines.dense.votes import Place, Vote

ROUNDS = 100  # of expectation maximisation, at most

Aggregate = Callable[[Sequence[Vote]], Mapping[Place, int]]


def majority(votes: Sequence[Vote]) -> dict[Place, int]:
    """The most frequent label of each segment that has a vote."""
    counts: dict[Place, Counter[int]] = defaultdict(Counter)
    for vote in votes:
        if vote.label is not None:
            counts[vote.place][vote.label] += 1
    found = {}
    for place, own in counts.items():
        (label, most), *others = own.most_common()
        found[place] = 0 if others and others[0][1] == most else label
    return found


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
    rows = [{"task": f"{vote.pair} {vote.segment}", "worker": vote.labeller, "label": vote.label} for vote in kept]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # what crowd-kit uses of pandas works until pandas 4
        found = DawidSkene(n_iter=ROUNDS).fit_predict(pd.DataFrame(rows))
    return {vote.place: int(found[row["task"]]) for vote, row in zip(kept, rows, strict=True)}


AGGREGATES: dict[str, Aggregate] = {"majority": majority, "dawid_skene": dawid_skene}

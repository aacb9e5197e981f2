"""The same rows seen otherwise, for ablations: other rankings, shuffled labels, one generator alone, or fewer rows.

Pure functions of a `datasets.Dataset`; nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alignkit.errors import DataError
from alignkit.seeds import derive_seed
from data_pipelines import ranking

if TYPE_CHECKING:
    import datasets


def ranked_by(rows: datasets.Dataset, rewards: Sequence[str], temperature: float | None) -> datasets.Dataset:
    """phi by the scores of `rewards` alone, as `ranking.win_rates` counts; rows whose candidates all tie stay.

    Raises DataError naming a reward that did not score the rows.
    """
    import torch

    scores, columns = rows["scores"][:], []
    for name in rewards:
        if name not in scores[0]:
            raise DataError(f"ranked_by names '{name}', but the rows were scored by {', '.join(scores[0])}")
        columns.append(torch.tensor([row[name] for row in scores], dtype=torch.float64))
    phi_PK = ranking.win_rates(torch.stack(columns), temperature=temperature)
    return rows.remove_columns("phi").add_column("phi", phi_PK.tolist())


def shuffled_labels(rows: datasets.Dataset, seed: int) -> datasets.Dataset:
    """phi permuted among each prompt's candidates: the control that shows what the labels are worth.

    The permutation comes from (seed, prompt id). What remains is learning from other generators' images as such.
    """
    phi = []
    for prompt_id, values in zip(rows["prompt_id"], rows["phi"], strict=True):
        rng = np.random.default_rng(derive_seed("shuffled", seed, prompt_id))
        phi.append(list(rng.permutation(values)))
    return rows.remove_columns("phi").add_column("phi", phi)


def shuffled_segments(rows: datasets.Dataset, seed: int) -> datasets.Dataset:
    """The labels of pairs of clips permuted among the pairs that have as many segments: the control of the dense loss.

    A pair gets all labels of another pair, so ties and runs of equal labels stay as they are. The permutation comes
    from `seed`.
    """
    labels = rows["labels"][:]
    lengths = np.array([len(own) for own in labels])
    rng = np.random.default_rng(derive_seed("shuffled-segments", seed))
    shuffled = [*labels]
    for length in np.unique(lengths):
        places = np.flatnonzero(lengths == length)
        for place, source in zip(places, rng.permutation(places), strict=True):
            shuffled[place] = labels[source]
    return rows.remove_columns("labels").add_column("labels", shuffled)


def first_share(rows: Any, share: float) -> Any:
    """The first rows (or prompts), as many as the share in (0, 1] of all, at least one."""
    count = max(1, round(share * len(rows)))
    return rows[:count] if isinstance(rows, list | tuple) else rows.select(range(count))


def own_candidates(rows: datasets.Dataset, generator: str) -> datasets.Dataset:
    """Only the candidates of `generator`, with the phi they had in the full list.

    Raises DataError when it has fewer than two candidates in a row, for one cannot be ranked.
    """
    import datasets

    fewest = min(names.count(generator) for names in rows["generators"])
    if fewest < 2:
        raise DataError(f"'{generator}' has {fewest} candidates in some rows; ranking needs 2: raise its seeds")
    columns = [name for name in ("images", "videos", "generators", "seeds", "phi") if name in rows.column_names]

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        own = [index for index, name in enumerate(row["generators"]) if name == generator]
        return {name: [row[name][index] for index in own] for name in columns}

    if "images" in columns:
        rows = rows.cast_column("images", datasets.List(datasets.Image(decode=False)))
    return rows.map(keep, desc=f"candidates of {generator}")

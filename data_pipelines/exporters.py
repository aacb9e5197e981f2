"""Ranked rows -> pairs in the columns other programs read: Pick-a-Pic or TRL. The way back is importers.py.

Not here: lists; other programs know pairs only, so the ranks between best and worst are lost or spread over pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, DataError, nearest
from alignkit.storage import atomic_file
from data_pipelines.importers import load_ranked
from data_pipelines.synpic.media_columns import find_column, media_feature

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

BATCH = 64  # rows held at a time


def export(
    data: str | Path,
    path: str | Path,
    *,
    layout: str = "trl",
    split: str = "train",
    pairs: str = "best_vs_worst",
    held_out: float = 0.0,
) -> int:
    """Load `data` as `importers.load_ranked` does and write its `split` ("train" or "heldout") with `export_pairs`.

    Data without a split of its own goes out whole as "train", unless `held_out` says otherwise. Returns the pairs.
    """
    return export_pairs(load_ranked(data, split, held_out=held_out), path, layout=layout, pairs=pairs)


def export_pairs(ranked: Dataset, path: str | Path, *, layout: str = "pickapic", pairs: str = "best_vs_worst") -> int:
    """Write one parquet file of pairs and return their number; rows whose phi all tie give none.

    `layout` is "pickapic" (jpg_0, jpg_1, label_0, caption; the two keep their order) or "trl" (prompt, chosen,
    rejected; the only one for videos). `pairs` is "best_vs_worst" (one a row) or "all" (every pair with different phi).
    Labels are 1 or 0, for the programs that read them know no others: how sure a soft label was is lost.

    Raises ConfigError for another layout or choice of pairs, DataError when `path` exists, the rows are not ranked, or
    no pair is left.
    """
    import pyarrow.parquet as pq
    from datasets import Image, List

    path = Path(path)
    for value, known, key in ((layout, _LAYOUTS, "layout"), (pairs, _PAIRS, "pairs")):
        if value not in known:
            raise ConfigError(f"{key}: unknown '{value}'.{nearest(value, known)}")
    if path.exists():
        raise DataError(f"'{path}' exists and is not overwritten; name another file")
    if not {"prompt", "phi"}.issubset(ranked.column_names):
        raise DataError(f"only ranked rows can be exported; the columns are {', '.join(ranked.column_names)}")
    column = find_column(ranked.column_names, "the ranked rows")
    if column == "videos" and layout == "pickapic":
        raise ConfigError("layout: Pick-a-Pic holds images only; export videos with layout 'trl'")
    encoded = ranked if column == "videos" else ranked.cast_column(column, List(Image(decode=False)))
    count, schema = 0, _schema(layout, column)
    with atomic_file(path) as handle, pq.ParquetWriter(handle, schema, compression="none") as writer:
        for batch in encoded.iter(BATCH):
            rows = list(_batch_pairs(batch, layout, pairs, column))
            count += len(rows)
            writer.write_table(_table(rows, schema))
        if not count:
            raise DataError("all rows tie, so there is no pair to export")
    return count


def _batch_pairs(batch: Mapping[str, Sequence[Any]], layout: str, pairs: str, column: str) -> Iterator[dict[str, Any]]:
    for prompt, media, phi in zip(batch["prompt"], batch[column], batch["phi"], strict=True):
        for i, j in _PAIRS[pairs](phi):
            yield _LAYOUTS[layout](prompt, (media[i], media[j]), first_is_better=phi[i] > phi[j])


def _best_vs_worst(phi: Sequence[float]) -> list[tuple[int, int]]:
    best, worst = phi.index(max(phi)), phi.index(min(phi))
    return [(min(best, worst), max(best, worst))] if best != worst else []


def _all_pairs(phi: Sequence[float]) -> list[tuple[int, int]]:
    return [(i, j) for i, j in itertools.combinations(range(len(phi)), 2) if phi[i] != phi[j]]


def _pickapic(prompt: str, images: tuple[Any, Any], *, first_is_better: bool) -> dict[str, Any]:
    first, second = (_bytes(image) for image in images)
    return {"jpg_0": first, "jpg_1": second, "label_0": float(first_is_better), "caption": prompt}


def _trl(prompt: str, images: tuple[Any, Any], *, first_is_better: bool) -> dict[str, Any]:
    chosen, rejected = images if first_is_better else images[::-1]
    cells = {"chosen": _bytes(chosen), "rejected": _bytes(rejected)}
    return {"prompt": prompt, **{name: {"bytes": data, "path": None} for name, data in cells.items()}}


def _bytes(image: Mapping[str, Any]) -> bytes:
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def _schema(layout: str, column: str) -> pa.Schema:
    from datasets import Features, Value

    if layout == "trl":
        sides = {side: media_feature(column) for side in ("chosen", "rejected")}
        return Features({"prompt": Value("string"), **sides}).arrow_schema
    binary = Value("binary")
    return Features(
        {"jpg_0": binary, "jpg_1": binary, "label_0": Value("float64"), "caption": Value("string")}
    ).arrow_schema


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema=schema)


_LAYOUTS: dict[str, Callable[..., dict[str, Any]]] = {"pickapic": _pickapic, "trl": _trl}
_PAIRS: dict[str, Callable[[Sequence[float]], list[tuple[int, int]]]] = {
    "best_vs_worst": _best_vs_worst,
    "all": _all_pairs,
}

"""`alignkit export`: ranked rows as pairs, in the columns that other programs read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignkit.commands.verb import Verb, execute
from alignkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportJob:
    """Write pairs.

    data: ranked dataset, or other data that `alignkit train rankdpo --data` reads.
    out: the parquet file; an existing one stays.
    format: trl (prompt, chosen, rejected), or pickapic (caption, jpg_0, jpg_1, label_0; images only).
    split: which part of the data.
    pairs: best_vs_worst (one a row), or all (every two candidates of different phi).
    held_out: share of rows that are the held-out part, where the data has no split of its own.
    """

    data: Path
    out: Path
    format: Literal["trl", "pickapic"] = "trl"
    split: Literal["train", "heldout"] = "train"
    pairs: Literal["best_vs_worst", "all"] = "best_vs_worst"
    held_out: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out is {self.held_out}; it must lie in [0, 1)")


def _plan(job: ExportJob) -> list[str]:
    missing = [] if job.data.exists() else [f"NOT THERE YET: {job.data} (data)"]
    return [*missing, f"write the {job.split} part of {job.data} as {job.format} pairs ({job.pairs}) to {job.out}"]


def _work(job: ExportJob) -> None:
    from data_pipelines.exporters import export

    count = export(job.data, job.out, layout=job.format, split=job.split, pairs=job.pairs, held_out=job.held_out)
    print(f"{count} pairs in {job.out}")


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Write ranked data as pairs, in the columns of TRL or of Pick-a-Pic."
    execute(Verb("export", summary, lambda *_: ExportJob, _plan, _work), argv)

"""`alignkit rank`: scores become win rates, filters and a ranked dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alignkit.commands.methods import DEFAULT_METHOD
from alignkit.commands.verb import Verb, counts_line, execute
from alignkit.provenance import write_config
from data_pipelines.synpic import RankConfig, rank_candidates


@dataclass(frozen=True, kw_only=True, slots=True)
class RankJob:
    """Rank candidates.

    candidates: the folder that `alignkit generate` wrote.
    scores: the folder that `alignkit score` wrote.
    rank: how scores become rankings, and which rows stay.
    out: the folder of the ranked dataset; `datasets.load_dataset` opens it.
    """

    candidates: Path
    scores: Path
    rank: RankConfig = field(default_factory=RankConfig)
    out: Path


def _plan(job: RankJob) -> list[str]:
    folders = {"candidates": job.candidates, "scores": job.scores}
    missing = [f"NOT THERE YET: {folder} ({name})" for name, folder in folders.items() if not folder.exists()]
    return [*missing, f"rank the candidates in {job.candidates} by the scores in {job.scores} into {job.out}"]


def _work(job: RankJob) -> None:
    result = rank_candidates(job.candidates, job.scores, job.rank, job.out)
    write_config(job.out, job)
    print(f"{result.rows} ranked rows in {result.folder}: {counts_line(result.counts)}")
    print(f"next: alignkit train {DEFAULT_METHOD} --data {job.out} --model MODEL --out OUT")


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Turn raw scores into a ranked dataset (Syn-Pic win rates, filters, split); never scores again."
    execute(Verb("rank", summary, lambda *_: RankJob, _plan, _work, lambda job: job.out), argv)

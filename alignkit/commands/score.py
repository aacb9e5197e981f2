"""`alignkit score`: every reward's raw score of every candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkit.commands.specs import RewardBuilders, RewardSpec, absences, identities, require_names
from alignkit.commands.verb import Verb, counts_line, execute
from alignkit.provenance import write_config
from data_pipelines.synpic import ScoreConfig, score_candidates


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreJob:
    """Score candidates.

    candidates: the folder that `alignkit generate` wrote.
    rewards: the rewards by a name of your choice.
    score: which of them score, and how.
    out: the folder of the scores; run again, it continues.
    """

    candidates: Path
    rewards: Mapping[str, RewardSpec]
    score: ScoreConfig
    out: Path

    def __post_init__(self) -> None:
        require_names(self.score.rewards, self.rewards, kind="reward", key="score.rewards")


def _plan(job: ScoreJob) -> list[str]:
    missing = [] if job.candidates.exists() else [f"NOT THERE YET: {job.candidates} (candidates)"]
    missing += absences({}, rewards={name: job.rewards[name] for name in job.score.rewards})
    return [*missing, f"score the candidates in {job.candidates} with {', '.join(job.score.rewards)} into {job.out}"]


def _work(job: ScoreJob) -> None:
    build_rewards, known = RewardBuilders(job.rewards), identities(job.rewards)
    result = score_candidates(job.candidates, job.score, job.out, build_rewards=build_rewards, identities=known)
    write_config(job.out, job)
    print(f"{result.rows} rows scored in {result.folder}: {counts_line(result.counts)}")
    for line in build_rewards.reports():
        print(line)
    print(f"next: alignkit rank --candidates {job.candidates} --scores {job.out} --out {job.out.with_name('ranked')}")


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Score candidates with several rewards; raw scores are kept, so ranking again never scores again."
    execute(Verb("score", summary, lambda *_: ScoreJob, _plan, _work, lambda job: job.out), argv)

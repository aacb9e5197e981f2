"""The table of a ladder: every arm's gold gain with its interval over seeds and prompts, beside the proxies.

Reads evaluation folders; trains nothing. `results` and `statistics` do the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from alignkit.errors import DataError
from alignkit.escape import to_markdown
from alignkit.evaluation.results import Evaluation, Pairs, read_evaluation, read_pairs
from alignkit.evaluation.statistics import Bootstrap, Combined, Floats, combine_runs
from alignkit.storage import read_json, write_json


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm: its runs combined, for every reward and, for gold, every category.

    `runs` are the numbers of the finished runs, `gains` [runs, prompts, seeds] by reward, `minutes` the mean CPU time
    of a training, where it was recorded.
    """

    name: str
    evaluation: Evaluation  # of the first run: names, sampling and the base's means
    rewards: Mapping[str, Combined]
    categories: Mapping[str, Combined]
    runs: tuple[int, ...] = ()
    gains: Mapping[str, Floats] = field(default_factory=dict)
    minutes: float | None = None

    @property
    def gold(self) -> Combined:
        """The combined gain of the held-out reward. Raises DataError when the evaluation had none."""
        if self.evaluation.gold is None:
            raise DataError(f"arm '{self.name}' has no gold reward: set `gold` to one of `rewards`")
        return self.rewards[self.evaluation.gold.reward]


@dataclass(frozen=True, slots=True)
class Contrast:
    """How much more the arm `first` gained than the arm `second`, by reward, on the same training seeds and images."""

    first: str
    second: str
    rewards: Mapping[str, Combined]


def read_arm(name: str, folders: Sequence[Path], costs: Sequence[Path] = ()) -> ArmResult | None:
    """Combine the finished runs of an arm; None when none has finished. `costs` are files that `write_cost` wrote."""
    done = {run: folder for run, folder in enumerate(folders) if (folder / "evaluation.json").is_file()}
    if not done:
        return None
    pairs = [read_pairs(folder) for folder in done.values()]
    evaluation = read_evaluation(next(iter(done.values())))
    bootstrap = Bootstrap(confidence=evaluation.confidence)
    gains = {result.reward: _gains(pairs, result.reward) for result in evaluation.results}
    rewards = {reward: combine_runs(own, bootstrap) for reward, own in gains.items()}
    gold, categories = evaluation.gold, {}
    if gold is not None and gold.categories:
        groups = np.array([p.metadata["category"] for p in pairs[0].prompts[:: pairs[0].seeds_per_prompt]])
        every = gains[gold.reward]
        categories = {str(group): combine_runs(every[:, groups == group], bootstrap) for group in np.unique(groups)}
    return ArmResult(name, evaluation, rewards, categories, tuple(done), gains, mean_minutes(costs))


def _gains(runs: Sequence[Pairs], reward: str) -> Floats:
    """Gains [runs, prompts, seeds]."""
    return np.stack([run.gain(reward).reshape(-1, run.seeds_per_prompt) for run in runs])


def contrast(first: ArmResult, second: ArmResult) -> Contrast:
    """Compare two arms on the runs that both have. Raises DataError where they have none in common."""
    _, mine, others = np.intersect1d(first.runs, second.runs, return_indices=True)
    if not len(mine):
        raise DataError(f"arms '{first.name}' and '{second.name}' have no finished training seed in common")
    bootstrap = Bootstrap(confidence=first.evaluation.confidence)
    differences = {name: gain[mine] - second.gains[name][others] for name, gain in first.gains.items()}
    combined = {name: combine_runs(difference, bootstrap) for name, difference in differences.items()}
    return Contrast(first.name, second.name, combined)


def write_cost(path: Path, seconds: float) -> None:
    """Record the CPU seconds of a training, or of making its data."""
    write_json(path, {"cpu_seconds": seconds})


def mean_minutes(costs: Sequence[Path]) -> float | None:
    """The mean CPU minutes in those files of `write_cost` that exist; None where none does."""
    seconds = [read_json(path)["cpu_seconds"] for path in costs if path.is_file()]
    return sum(seconds) / len(seconds) / 60 if seconds else None


def points(combined: Combined, scale: float = 100.0, digits: int = 1) -> str:
    """`+6.1 [+4.0, +8.2]`, in points (hundredths) for a judge of 0 or 1."""
    gain = combined.gain
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (gain.mean, gain.low, gain.high))
    return f"{mean} [{low}, {high}]"


def table(
    evaluations: Mapping[str, Sequence[ArmResult]],
    *,
    title: str,
    settings: Sequence[str],
    contrasts: Sequence[Sequence[str]] = (),
) -> str:
    """A Markdown page: settings (lines of Markdown), and for each evaluation gold and proxies by arm, gold by category.

    `evaluations` has the arms under the evaluation's heading; the heading of the only one is not printed. `contrasts`
    are pairs of names of arms.
    """
    if not any(evaluations.values()):
        raise DataError("no arm of the ladder has finished; its logs are in OUT/arms/*/seed-*/log.txt")
    lines = [f"# {to_markdown(title)}", "", *(f"- {line}" for line in settings)]
    for heading, arms in evaluations.items():
        if arms:
            lines += ["", *([f"## {heading}", ""] if len(evaluations) > 1 else []), *_tables(arms, contrasts)]
    return "\n".join([*lines, ""])


def _tables(arms: Sequence[ArmResult], contrasts: Sequence[Sequence[str]]) -> list[str]:
    first = arms[0].evaluation
    base = {result.reward: result.overall.base.mean for result in first.results}
    gold, lines = first.gold, list[str]()
    proxies = [name for name in base if gold is None or name != gold.reward]
    if gold is not None:
        lines += [f"Base: gold {100 * base[gold.reward]:.1f} points; gains are paired, in points of gold accuracy,"]
        lines += [
            f"with {first.confidence:.0%} intervals over prompts and runs; other rewards in their own units.",
            "",
        ]
    has_costs = all(arm.minutes is not None for arm in arms)
    head = ["arm", "gold gain", "single runs", *map(to_markdown, proxies), *(["CPU min"] if has_costs else [])]
    minutes = [[f"{arm.minutes:.1f}"] if has_costs else [] for arm in arms]
    judge = gold.reward if gold else None
    gains = [_row(arm.name, arm.rewards, judge, proxies) for arm in arms]
    lines += _rows(head, [[*row, *cost] for row, cost in zip(gains, minutes, strict=True)])
    lines += _contrasts(arms, contrasts, judge, proxies)
    groups = sorted(arms[0].categories)
    if gold is not None and groups:
        means = [f"{100 * gold.categories[group].base.mean:.0f}" for group in groups]
        rows = [["base (level)", *means], *([to_markdown(arm.name), *_category_row(arm, groups)] for arm in arms)]
        lines += ["", "Gold by category, mean gain in points:", "", *_rows(["arm", *map(to_markdown, groups)], rows)]
    return lines


def _contrasts(
    arms: Sequence[ArmResult], contrasts: Sequence[Sequence[str]], judge: str | None, proxies: Sequence[str]
) -> list[str]:
    named = {arm.name: arm for arm in arms}
    found = [contrast(named[a], named[b]) for a, b in contrasts if {a, b} <= named.keys()]
    if not found:
        return []
    head = ["first arm against second", "gold", "single runs", *map(to_markdown, proxies)]
    rows = [_row(f"{one.first} - {one.second}", one.rewards, judge, proxies) for one in found]
    return ["", "Differences between arms, paired by training seed, prompt and seed:", "", *_rows(head, rows)]


def _row(name: str, rewards: Mapping[str, Combined], judge: str | None, proxies: Sequence[str]) -> list[str]:
    gold = ["-", "-"]
    if judge is not None:
        gold = [points(rewards[judge]), ", ".join(f"{100 * run:+.1f}" for run in rewards[judge].runs)]
    return [to_markdown(name), *gold, *(points(rewards[proxy], 1.0, 3) for proxy in proxies)]


def _category_row(arm: ArmResult, groups: Sequence[str]) -> list[str]:
    return [f"{100 * arm.categories[group].gain.mean:+.1f}" for group in groups]


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]

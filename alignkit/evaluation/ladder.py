"""The table of a ladder: every arm's gold gain with its interval over seeds and prompts, beside the proxies.

Reads evaluation folders; trains nothing. `results` and `statistics` do the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignkit.errors import DataError
from alignkit.escape import to_markdown
from alignkit.evaluation.results import Evaluation, Pairs, read_evaluation, read_pairs
from alignkit.evaluation.statistics import Bootstrap, Combined, combine_runs


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm: its runs combined, for every reward and, for gold, every category."""

    name: str
    evaluation: Evaluation  # of the first run: names, sampling and the base's means
    rewards: Mapping[str, Combined]
    categories: Mapping[str, Combined]

    @property
    def gold(self) -> Combined:
        """The combined gain of the held-out judge. Raises DataError when the evaluation had none."""
        if self.evaluation.gold is None:
            raise DataError(f"arm '{self.name}' was evaluated without a gold judge")
        return self.rewards[self.evaluation.gold.reward]


def read_arm(name: str, folders: Sequence[Path]) -> ArmResult | None:
    """Combine the finished runs of an arm; None when none has finished."""
    done = [folder for folder in folders if (folder / "evaluation.json").is_file()]
    if not done:
        return None
    evaluation, runs = read_evaluation(done[0]), [read_pairs(folder) for folder in done]
    bootstrap = Bootstrap(confidence=evaluation.confidence)
    rewards = {r.reward: combine_runs(_gains(runs, r.reward), bootstrap) for r in evaluation.results}
    gold, categories = evaluation.gold, {}
    if gold is not None and gold.categories:
        groups = np.array([p.metadata["category"] for p in runs[0].prompts[:: runs[0].seeds_per_prompt]])
        gains = _gains(runs, gold.reward)
        categories = {str(group): combine_runs(gains[:, groups == group], bootstrap) for group in np.unique(groups)}
    return ArmResult(name, evaluation, rewards, categories)


def _gains(runs: Sequence[Pairs], reward: str) -> Any:
    """Gains [runs, prompts, seeds]."""
    return np.stack([run.gain(reward).reshape(-1, run.seeds_per_prompt) for run in runs])


def points(combined: Combined, scale: float = 100.0) -> str:
    """`+6.1 [+4.0, +8.2]`, in points (hundredths) for a judge of 0 or 1."""
    gain = combined.gain
    return f"{scale * gain.mean:+.1f} [{scale * gain.low:+.1f}, {scale * gain.high:+.1f}]"


def table(evaluations: Mapping[str, Sequence[ArmResult]], *, title: str, settings: Sequence[str]) -> str:
    """A Markdown page: settings (lines of Markdown), and for each evaluation gold and proxies by arm, gold by category.

    `evaluations` has the arms under the evaluation's heading; the heading of the only one is not printed.
    """
    if not any(evaluations.values()):
        raise DataError("no arm of the ladder has finished; its logs are in OUT/arms/*/seed-*/log.txt")
    lines = [f"# {to_markdown(title)}", "", *(f"- {line}" for line in settings)]
    for heading, arms in evaluations.items():
        if arms:
            lines += ["", *([f"## {heading}", ""] if len(evaluations) > 1 else []), *_tables(arms)]
    return "\n".join([*lines, ""])


def _tables(arms: Sequence[ArmResult]) -> list[str]:
    first = arms[0].evaluation
    base = {result.reward: result.overall.base.mean for result in first.results}
    gold, lines = first.gold, list[str]()
    proxies = [name for name in base if gold is None or name != gold.reward]
    if gold is not None:
        lines += [f"Base: gold {100 * base[gold.reward]:.1f} points; gains are paired, in points of gold accuracy,"]
        lines += [f"with {first.confidence:.0%} intervals over prompts and runs; proxies are in their own units.", ""]
    lines += _rows(
        ["arm", "gold gain", "single runs", *map(to_markdown, proxies)], [_arm_row(arm, proxies) for arm in arms]
    )
    groups = sorted(arms[0].categories)
    if gold is not None and groups:
        means = [f"{100 * gold.categories[group].base.mean:.0f}" for group in groups]
        rows = [["base (level)", *means], *([to_markdown(arm.name), *_category_row(arm, groups)] for arm in arms)]
        lines += ["", "Gold by category, mean gain in points:", "", *_rows(["arm", *map(to_markdown, groups)], rows)]
    return lines


def _arm_row(arm: ArmResult, proxies: Sequence[str]) -> list[str]:
    runs = ", ".join(f"{100 * run:+.1f}" for run in arm.gold.runs) if arm.evaluation.gold else "-"
    gold = points(arm.gold) if arm.evaluation.gold else "-"
    return [to_markdown(arm.name), gold, runs, *(f"{arm.rewards[name].gain.mean:+.3f}" for name in proxies)]


def _category_row(arm: ArmResult, groups: Sequence[str]) -> list[str]:
    return [f"{100 * arm.categories[group].gain.mean:+.1f}" for group in groups]


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]

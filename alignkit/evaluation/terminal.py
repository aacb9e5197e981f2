"""The small before/after table that closes a run in the terminal: plain ASCII, 80 columns."""

from __future__ import annotations

from alignkit.escape import to_line
from alignkit.evaluation.results import Evaluation, RewardResult
from alignkit.evaluation.statistics import Interval

_HEAD = ("reward", "base", "tuned", "gain", "interval", "wins")
_NAME = 24  # columns of the reward's name; longer ones are cut


def before_after(evaluation: Evaluation) -> str:
    """Gold first (marked *), then every proxy; settings above, the meaning of the columns below."""
    rows = [_HEAD, *(_row(result) for result in evaluation.results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [
        "  ".join(_pad(cell, width, k) for k, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]
    sampling = evaluation.sampling
    settings = (
        f"{evaluation.prompts} prompts x {evaluation.seeds_per_prompt} seeds, {sampling.steps} steps, "
        f"guidance {sampling.guidance_scale:g}, {sampling.width}x{sampling.height}"
    )
    legend = f"interval: {evaluation.confidence:.0%}, bootstrap over prompts; wins: ties count half"
    star = ["* held-out judge, never trained on"] if evaluation.gold else []
    return "\n".join([settings, "", lines[0], "-" * len(lines[0]), *lines[1:], "", *star, legend])


def _row(result: RewardResult) -> tuple[str, ...]:
    overall, reward = result.overall, to_line(result.reward)
    name = (reward if len(reward) <= _NAME - 2 else reward[: _NAME - 5] + "...") + " *" * result.is_gold
    gain = overall.gain
    return (
        name,
        _number(overall.base.mean),
        _number(overall.tuned.mean),
        _signed(gain.mean),
        _bounds(gain),
        f"{overall.win_rate.mean:.2f}",
    )


def _bounds(interval: Interval) -> str:
    return f"[{_signed(interval.low)}, {_signed(interval.high)}]"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + _number(value)


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)

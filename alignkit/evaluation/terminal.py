"""The small before/after table that closes a run in the terminal: plain ASCII, 80 columns."""

from __future__ import annotations

from alignkit.escape import to_line
from alignkit.evaluation.results import Evaluation, RewardResult

_HEAD = ("reward", "base", "tuned", "gain", "interval", "wins")
_NAME = 24  # columns of the reward's name; longer ones are cut


def before_after(evaluation: Evaluation) -> str:
    """Gold first (marked *), then every proxy; settings above, the meaning of the columns below."""
    rows = [_HEAD, *(_row(result) for result in evaluation.results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    sampling = evaluation.sampling
    settings = (
        f"{evaluation.prompts} prompts x {evaluation.seeds_per_prompt} seeds, {sampling.steps} steps, "
        f"guidance {sampling.guidance_scale:g}, {sampling.width}x{sampling.height}"
    )
    legend = f"interval: {evaluation.confidence:.0%}, bootstrap over prompts; wins: ties count half"
    star = ["* held-out reward, never trained on"] if evaluation.gold else []
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
        f"[{_signed(gain.low)}, {_signed(gain.high)}]",
        f"{overall.win_rate.mean:.2f}",
    )


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + _number(value)

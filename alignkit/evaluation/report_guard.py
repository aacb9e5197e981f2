"""The report's panel of trained rewards against the guard, the held-out reward that stops a training."""

from __future__ import annotations

from alignkit.evaluation import page
from alignkit.evaluation.health import Log, points
from alignkit.evaluation.svg import Point, Series, compact, line_chart

_GUARD, _EIGHT_BIT, _FALLEN = "eval_guard/", "eval_eight_bit/", "eval_guard_fallen"
_TONES = ("tuned", "bad", "base")  # of trained rewards; further ones are not drawn


def guard_panel(log: Log) -> str:
    """Both as changes since the first evaluation, each over its own largest change, and the best step; else nothing."""
    keys = dict.fromkeys(key for row in log for key in row)
    guards = [key for key in keys if key.startswith(_GUARD) and points(log, key)]
    if not guards:
        return ""
    guard, name = points(log, guards[0]), guards[0].removeprefix(_GUARD)
    trained = [key.removeprefix(_EIGHT_BIT) for key in keys if key.startswith(_EIGHT_BIT)]
    series, entries = [Series(name, _share(guard), "good")], {"good": f"guard {name}: {_ends(guard)}"}
    for tone, proxy in zip(_TONES, trained, strict=False):
        found = points(log, f"eval_reward/{proxy}")
        if found:
            series.append(Series(proxy, _share(found), tone))
            entries[tone] = f"trained {proxy}: {_ends(found)}"
    fallen = {step for step, count in points(log, _FALLEN) if count}
    best = max((point for point in guard if point[0] not in fallen), key=lambda point: point[1])[0]
    text = f"Share of each one's largest change since its first value. The guard was best at step {best:g} (dashed)."
    chart = line_chart(series, alt=f"Trained rewards and guard {name} over steps", zero=True, mark=best)
    return page.panel("Trained rewards and guard", text, page.legend(entries) + chart)


def _share(series: list[Point]) -> list[Point]:
    changes = [value - series[0][1] for _, value in series]
    largest = max(map(abs, changes)) or 1.0
    return [(step, change / largest) for (step, _), change in zip(series, changes, strict=True)]


def _ends(series: list[Point]) -> str:
    return f"{compact(series[0][1])} to {compact(series[-1][1])}"

"""The report's sections on training: curves, held-out rewards, and the health panel with its warnings."""

from __future__ import annotations

from alignkit.evaluation import page
from alignkit.evaluation.health import HELD_OUT, Log, held_out_rewards, points, training_warnings
from alignkit.evaluation.report_guard import guard_panel
from alignkit.evaluation.svg import Series, line_chart

_CURVES = {
    "loss": ("Loss", "Training objective; lower is better.", False),
    "health/implicit_accuracy": ("Implicit accuracy", "Share of pairs ordered right; exact zeros count half.", False),
    "health/margin": ("Margin", "How far winners are ahead of losers, against the reference.", True),
}
_ERRORS = {
    "health/winner_error_delta": ("winner", "tuned"),
    "health/loser_error_delta": ("loser", "bad"),
}
_HEALTH = {
    "health/saturated": ("Saturated pairs", "Share of pairs that teach nothing more.", False),
    "grad_norm": ("Gradient norm", "Before clipping.", False),
}


def training_section(log: Log) -> str:
    """The guard if there is one, loss, implicit accuracy, margin and one panel a held-out reward."""
    if not log:
        return page.section("training", "Training", "", page.missing("No training log in this run."))
    curves = _CURVES | {
        HELD_OUT + name: (f"Held-out {name}", "Mean on held-out prompts.", False) for name in held_out_rewards(log)
    }
    panels = guard_panel(log) + _bare_panels(log, curves)
    lead = "Faint lines are logged values, strong ones their moving average. The horizontal axis is the optimiser step."
    return page.section("training", "Training", lead, f'<div class="charts">{panels}</div>')


def health_section(log: Log) -> str:
    """Winner and loser error against the reference, saturation, gradient norm, and what they warn of."""
    if not log:
        return page.section("health", "Health", "", page.missing("No training log in this run."))
    body = "".join(map(page.warning, training_warnings(log))) or _checked(log)
    panels = _errors_panel(log) + _bare_panels(log, _HEALTH)
    lead = (
        "Preference losses can improve the margin by making everything worse; these curves show whether that happened."
    )
    return page.section("health", "Health", lead, f'{body}<div class="charts">{panels}</div>')


def _checked(log: Log) -> str:
    """Only what was measured can have passed."""
    names = {
        "health/winner_error_delta": "winner error",
        "health/saturated": "saturation",
        "grad_norm": "gradient norm",
    }
    measured = [name for key, name in names.items() if points(log, key)]
    if not measured:
        return page.missing("This log holds none of the health measurements.")
    return page.fine(f"No warnings. Checked: {', '.join(measured)}.")


def _errors_panel(log: Log) -> str:
    series = [Series(name, found, tone) for key, (name, tone) in _ERRORS.items() if (found := points(log, key))]
    title, note = "Error against the reference", "Below zero: better than the base model."
    if not series:
        return page.panel(title, note, page.missing("Not in this log."))
    key = page.legend({one.tone: one.name for one in series})
    return page.panel(title, note, key + line_chart(series, alt="Winner and loser error minus reference", zero=True))


def _bare_panels(log: Log, curves: dict[str, tuple[str, str, bool]]) -> str:
    return "".join(_panel(log, key, title, note, zero=zero) for key, (title, note, zero) in curves.items())


def _panel(log: Log, key: str, title: str, note: str, *, zero: bool) -> str:
    found = points(log, key)
    chart = (
        line_chart([Series(title, found)], alt=f"{title} over steps", zero=zero)
        if found
        else page.missing("Not in this log.")
    )
    return page.panel(title, note, chart)

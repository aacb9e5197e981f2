"""The report's section on the training data: known statistics drawn, everything else listed as it came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.escape import to_html
from alignkit.evaluation import page
from alignkit.evaluation.statistics import Interval
from alignkit.evaluation.svg import Row, bar_chart, compact, histogram


def data_section(data: Mapping[str, Any]) -> str:
    """The generator-bias probe, the histogram of phi and the agreement of rewards where present, then the rest."""
    if not data:
        return page.section("data", "Training data", "", page.missing("No data statistics in this run."))
    drawn = {key: form(data[key]) for key, form in _FORMS.items() if key in data}
    rest = {key: value for key, value in data.items() if not drawn.get(key)}
    panels = "".join(drawn.values())
    charts = f'<div class="charts wide">{panels}</div>' if panels else ""
    listed = page.details("All other statistics", page.tree(rest), is_open=not panels) if rest else ""
    return page.section("data", "Training data", "", charts + listed)


def _bias(value: Any) -> str:
    note = (
        "How well the generator's name alone predicts the rank: 0.5 is no shortcut, 1 a fingerprint to learn instead."
    )
    return _numbers("Generator bias", note, value)


def _agreement(value: Any) -> str:
    note = "How often two rewards order a pair of candidates alike; 0.5 is chance."
    if isinstance(value, Mapping) and value and all(isinstance(row, Mapping) for row in value.values()):
        return page.panel(
            "Agreement between rewards", note, _matrix(value, "A reward that ties agrees with itself by less than 1.")
        )
    return _numbers("Agreement between rewards", note, value)


def _phi(value: Any) -> str:
    title, note = (
        "Distribution of \N{GREEK SMALL LETTER PHI}",
        "Win rate of a candidate within its prompt; lumps at a value are ties.",
    )
    edges, counts = _bins(value)
    if not counts:
        return _numbers(title, note, value)
    return page.panel(title, note, histogram(edges, counts, alt="Histogram of phi"))


def _bins(value: Any) -> tuple[list[float], list[float]]:
    """(edges, counts) of {"edges", "counts"} or of plain counts over [0, 1]; empty where it is neither."""
    counts = value.get("counts", ()) if isinstance(value, Mapping) else value
    is_list = isinstance(counts, Sequence) and not isinstance(counts, str)
    if not (is_list and counts and all(_is_number(item) for item in counts)):
        return [], []
    even = [k / len(counts) for k in range(len(counts) + 1)]
    edges = value.get("edges", even) if isinstance(value, Mapping) else even
    return ([float(e) for e in edges], list(counts)) if len(edges) == len(counts) + 1 else ([], [])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(title: str, note: str, value: Any) -> str:
    """Scalars listed, groups of numbers as bars, groups of groups as a table; nothing for what is no dict or number."""
    if _is_number(value):
        return page.panel(title, note, f'<p class="big quiet">{compact(float(value))}</p>')
    if not isinstance(value, Mapping):
        return ""
    groups = {key: item for key, item in value.items() if isinstance(item, Mapping) and item}
    scalars = {_words(key): item for key, item in value.items() if key not in groups}
    listed = page.tree(scalars) if scalars else ""
    return page.panel(title, note, listed + "".join(_group(_words(name), item) for name, item in groups.items()))


def _group(name: str, values: Mapping[str, Any]) -> str:
    if all(_is_number(item) for item in values.values()):
        rows = [Row(str(key), [("tuned", name, Interval(*[float(item)] * 3))]) for key, item in values.items()]
        return f'<p class="note">{to_html(name)}</p>' + bar_chart(rows, alt=name)
    if all(isinstance(item, Mapping) for item in values.values()):
        return _matrix(values, name)
    return page.tree({name: values})


def _matrix(value: Mapping[str, Mapping[str, Any]], caption: str) -> str:
    names = list(dict.fromkeys(name for row in value.values() for name in row))
    rows = [[to_html(str(first)), *(_cell(row.get(name)) for name in names)] for first, row in value.items()]
    return page.table(["", *map(_words, names)], rows, caption)


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return compact(value) if isinstance(value, float) else to_html(page.plain(value))


def _words(name: str) -> str:
    return str(name).replace("_", " ")


_FORMS = {"generator_bias": _bias, "phi_histogram": _phi, "agreement": _agreement}

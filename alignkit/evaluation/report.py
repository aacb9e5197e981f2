"""The report of a run: one self-contained HTML file, from whatever parts of the run exist.

`write_report` needs no torch, no network and no script; a part that a run did not record is said to be missing.
Sections on training and data are in `report_training` and `report_data`. Deliberately not here: deciding what is
good; the page shows intervals, warnings and the worst images beside the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.escape import to_html
from alignkit.evaluation import page
from alignkit.evaluation.gallery import Shown, choose, lead_reward, load
from alignkit.evaluation.generated import write_generated
from alignkit.evaluation.health import hacking_warning
from alignkit.evaluation.judged import judged_section, read_all
from alignkit.evaluation.report_data import data_section
from alignkit.evaluation.report_training import health_section, training_section
from alignkit.evaluation.results import Evaluation, RewardResult, read_evaluation, read_pairs
from alignkit.evaluation.statistics import Interval
from alignkit.evaluation.svg import Row, bar_chart, compact, gain_chart, tone, win_strip
from alignkit.records import Sampling

_FILM = 8  # pairs under the headline
_GROUPS = {
    "gains": ("Biggest gains", "Where the tuned model improved most, one seed a prompt."),
    "losses": ("Biggest losses", "Where it got worse most. Read these as closely as the gains."),
    "random": ("Chosen at random", "Chosen by a fixed seed from all other pairs."),
}


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """What a run left behind; every part but the title may be missing.

    `evaluation` is a folder written by `evaluate`; `log` the `log_history` of trainer_state.json; `data` the
    statistics of the training data; `config` and `versions` as resolved; `command` reprints the report; `note` is
    a sentence that says what the run shows.
    """

    title: str
    evaluation: Path | None = None
    log: Sequence[Mapping[str, Any]] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    gallery: int = 6
    note: str = ""


def write_report(run: ReportInputs, path: Path) -> None:
    """Write the page to `path`; a file there that was edited by hand is set aside, not overwritten."""
    write_generated(path, render(run))


def render(run: ReportInputs) -> str:
    """The page as text; equal inputs give equal pages."""
    evaluation = read_evaluation(run.evaluation) if run.evaluation else None
    parts = [
        _header(run, evaluation),
        _result_section(evaluation),
        judged_section(read_all(run.evaluation) if run.evaluation else {}),
        _category_section(evaluation),
        _gallery_section(run, evaluation),
        training_section(run.log),
        health_section(run.log),
        data_section(run.data),
        _setup_section(run),
    ]
    return page.document(run.title, "".join(parts))


def sampling_text(sampling: Sampling) -> str:
    """`16 steps, guidance 3, 64×64` and whatever else was set."""
    size = f"{sampling.width}\N{MULTIPLICATION SIGN}{sampling.height}"
    if sampling.num_frames > 1:
        size += f", {sampling.num_frames} frames at {sampling.fps:g} fps"
    text = f"{sampling.steps} steps, guidance {sampling.guidance_scale:g}, {size}"
    if sampling.negative_prompt:
        text += (
            f", negative prompt \N{LEFT DOUBLE QUOTATION MARK}{sampling.negative_prompt}\N{RIGHT DOUBLE QUOTATION MARK}"
        )
    return text + "".join(f", {key} {page.plain(value)}" for key, value in sorted(sampling.extra.items()))


def bounds(interval: Interval, *, signed: bool = False) -> str:
    """`+0.031 to +0.094`."""
    return f"{compact(interval.low, signed=signed)} to {compact(interval.high, signed=signed)}"


def verdict(evaluation: Evaluation) -> str:
    """One sentence: the lead reward before and after with its interval, or that the interval contains zero."""
    lead = evaluation.result(lead_reward(evaluation))
    gain = lead.overall.gain
    if not gain.excludes(0):
        return f"No significant gain on {lead.reward}: the interval {bounds(gain, signed=True)} contains zero."
    moved = "rose" if gain.mean > 0 else "fell"
    ends = f"from {compact(lead.overall.base.mean)} to {compact(lead.overall.tuned.mean)}"
    return f"{lead.reward} {moved} {ends}; the {evaluation.confidence:.0%} interval is {bounds(gain, signed=True)}."


def _header(run: ReportInputs, evaluation: Evaluation | None) -> str:
    links = "".join(
        f'<a href="#{anchor}">{name}</a>'
        for anchor, name in {
            "result": "Result",
            "categories": "Categories",
            "pictures": "Gallery",
            "training": "Training",
            "health": "Health",
            "data": "Data",
            "setup": "Setup",
        }.items()
    )
    models = ""
    if evaluation:
        models = f'<p class="models"><b>{to_html(evaluation.base)}</b> against <b>{to_html(evaluation.tuned)}</b></p>'
    note = f'<p class="lead">{to_html(run.note)}</p>' if run.note else ""
    head = f'<p class="eyebrow">alignkit report</p><h1>{to_html(run.title)}</h1>{note}{models}'
    navigation = f'<nav aria-label="Sections">{links}</nav>'
    return (
        f"<header>{head}{navigation}</header>\n{_hero(evaluation) if evaluation else ''}{_filmstrip(run, evaluation)}"
    )


def _hero(evaluation: Evaluation) -> str:
    lead = evaluation.result(lead_reward(evaluation))
    overall = lead.overall
    kind = "held-out reward" if lead.is_gold else "proxy; no held-out reward in this run"
    facts = {
        "Win rate, ties half": f"{compact(overall.win_rate.mean)} ({bounds(overall.win_rate)})",
        "Pairs": f"{overall.prompts} prompts \N{MULTIPLICATION SIGN} {evaluation.seeds_per_prompt} seeds",
        "Sampler": sampling_text(evaluation.sampling),
        "Intervals": f"{evaluation.confidence:.0%}, bootstrap over prompts",
    }
    items = "".join(f"<div><dt>{to_html(name)}</dt><dd>{to_html(value)}</dd></div>" for name, value in facts.items())
    number = f'<p class="big {tone(overall.gain)}">{compact(overall.gain.mean, signed=True)}</p>'
    eyebrow = f'<p class="eyebrow">Paired gain on {to_html(lead.reward)} \N{MIDDLE DOT} {kind}</p>'
    note = f'<p class="big-note">{to_html(verdict(evaluation))}</p>'
    body = f'<div>{eyebrow}{number}{note}</div><dl class="facts">{items}</dl>'
    return f'<section class="hero" aria-label="Headline">{body}</section>\n'


def _filmstrip(run: ReportInputs, evaluation: Evaluation | None) -> str:
    """A first look: pairs chosen at random, base above tuned."""
    if evaluation is None or run.evaluation is None:
        return ""
    pairs, lead = read_pairs(run.evaluation), lead_reward(evaluation)
    rows = choose(pairs, lead, _FILM, seed=1)["random"]
    frames = "".join(f"<div>{_two(shown)}</div>" for shown in load(pairs, rows, evaluation))
    note = "Prompts drawn at random, one seed each: base above, tuned below."
    caption = f'<figcaption class="note">{note}</figcaption>'
    return f'<figure class="film"><div class="frames">{frames}</div>{caption}</figure>\n'


def _two(shown: Shown) -> str:
    return "".join(page.picture(data, _alt(side, shown)) for side, data in shown.previews().items())


def _alt(side: str, shown: Shown) -> str:
    return f"{side} {'image' if shown.fps is None else 'video'} for: {shown.prompt.text}"


def _result_section(evaluation: Evaluation | None) -> str:
    title = "Before and after"
    if evaluation is None:
        return page.section("result", title, "", page.missing("No evaluation in this run."))
    head = ["Reward", "Base", "Tuned", "Paired gain", f"{evaluation.confidence:.0%} interval", "Win rate", "Pairs"]
    rows = [_result_row(result, evaluation) for result in evaluation.results]
    caption = (
        f"Same prompts and same seeds on both sides. Sampler for every number: {sampling_text(evaluation.sampling)}. "
        "Intervals are bootstrapped over prompts; ties count half in the win rate."
    )
    warning = hacking_warning(evaluation)
    body = page.warning(warning) if warning else ""
    lead = "Gold is the held-out reward: training never uses it. The proxies below it may be used by training."
    return page.section(
        "result", title, lead if evaluation.gold else "", body + page.table(head, rows, caption, mark_first=True)
    )


def _result_row(result: RewardResult, evaluation: Evaluation) -> list[str]:
    overall = result.overall
    tag = '<span class="tag">held out</span>' if result.is_gold else ""
    gain = f'<span class="{tone(overall.gain)}-text">{compact(overall.gain.mean, signed=True)}</span>'
    dropped = f'<span class="sub">{overall.dropped} dropped</span>' if overall.dropped else ""
    pairs = f"{overall.prompts} \N{MULTIPLICATION SIGN} {evaluation.seeds_per_prompt}{dropped}"
    return [
        to_html(result.reward) + tag,
        compact(overall.base.mean),
        compact(overall.tuned.mean),
        gain,
        f'<span class="sub">{bounds(overall.gain, signed=True)}</span>',
        f'{win_strip(overall.win_rate)}<span class="fixed">{compact(overall.win_rate.mean)}</span>',
        pairs,
    ]


def _category_section(evaluation: Evaluation | None) -> str:
    title = "Category by category"
    shown = [result for result in evaluation.results if result.categories] if evaluation else []
    if not shown:
        return page.section("categories", title, "", page.missing("No prompt categories in this run."))
    first, *others = shown
    body = _category_charts(first) + "".join(
        page.details(f"{result.reward} by category", _category_charts(result)) for result in others
    )
    return page.section(
        "categories", title, "Whiskers are bootstrap intervals; green or red marks only what excludes zero.", body
    )


def _category_charts(result: RewardResult) -> str:
    sides = [
        Row(_words(name), [("base", "base", value.base), ("tuned", "tuned", value.tuned)])
        for name, value in result.categories.items()
    ]
    gains = [(f"{_words(name)} (n={value.prompts})", value.gain) for name, value in result.categories.items()]
    means = bar_chart(sides, alt=f"Mean {result.reward} by category, base and tuned", from_zero=_starts_at_zero(result))
    key = page.legend({"base": "base", "tuned": "tuned"})
    left = page.panel(f"{result.reward}, mean score", f"Sampler: {sampling_text(result.sampling)}", key + means)
    chart = gain_chart(gains, alt=f"Paired gain on {result.reward} by category")
    right = page.panel(f"{result.reward}, paired gain", "Tuned minus base on the same seeds; n prompts each.", chart)
    return f'<div class="charts wide">{left}{right}</div>'


def _starts_at_zero(result: RewardResult) -> bool:
    """Bars tell the truth from zero only; scores that all sit far from it are drawn as dots on a cropped axis."""
    means = [abs(side.mean) for value in result.categories.values() for side in (value.base, value.tuned)]
    return min(means) < 0.6 * max(means) or result.is_gold


def _gallery_section(run: ReportInputs, evaluation: Evaluation | None) -> str:
    if evaluation is None or run.evaluation is None:
        missing = page.missing("No evaluated images or videos in this run.")
        return page.section("pictures", "Images, before and after", "", missing)
    pairs, lead = read_pairs(run.evaluation), lead_reward(evaluation)
    title = f"{pairs.modality.capitalize()}s, before and after"
    groups = []
    for group, rows in choose(pairs, lead, run.gallery).items():
        name, note = _GROUPS[group]
        cards = "".join(_card(shown) for shown in load(pairs, rows, evaluation))
        content = f'<div class="gallery">{cards}</div>' if rows else page.missing("None in this evaluation.")
        groups.append(f'<h3>{name}</h3><p class="lead">{note}</p>{content}')
    intro = f"One prompt and one seed a pair, ordered by the change in {lead}, then by the mean change of the others."
    return page.section("pictures", title, intro, "".join(groups))


def _card(shown: Shown) -> str:
    sides = "".join(
        f"<div><span>{side}</span>{page.picture(data, _alt(side, shown))}</div>"
        for side, data in shown.previews().items()
    )
    chips = "".join(
        f'<li class="{_direction(before, after)}">{to_html(name)} {page.change(before, after)}</li>'
        for name, (before, after) in shown.scores.items()
    )
    category = to_html(_words(shown.prompt.metadata["category"]))
    meta = f'<p class="meta">{category} \N{MIDDLE DOT} seed {shown.seed}</p>'
    words = f'<p class="prompt">{to_html(shown.prompt.text)}</p>{meta}'
    told = f'<figcaption>{words}<ul class="chips">{chips}</ul></figcaption>'
    return f'<figure class="pair"><div class="two">{sides}</div>{told}</figure>'


def _words(name: str) -> str:
    return name.replace("_", " ")


def _direction(before: float, after: float) -> str:
    return "good" if after > before else "bad" if after < before else "same"


def _setup_section(run: ReportInputs) -> str:
    config = (
        page.details("Full configuration", page.tree(run.config))
        if run.config
        else page.missing("No configuration in this run.")
    )
    versions = (
        page.details("Versions", page.tree(run.versions)) if run.versions else page.missing("No versions recorded.")
    )
    command = f"<h3>Print this report again</h3><pre><code>{to_html(run.command)}</code></pre>" if run.command else ""
    return page.section("setup", "Setup", "", config + versions + command)

"""What the page of a studio shows, as HTML: both images with their scores, the frontier, messages.

Every text is escaped here. Gradio reads braces and dollars in a page as a template, so they are escaped as well.
"""

from __future__ import annotations

import base64
import math

from alignkit.adapters.mixture import BASE
from alignkit.commands.studio.session import Session, Shot, Side
from alignkit.diffusion.tuned_steps import ALL_STEPS
from alignkit.escape import to_html
from alignkit.evaluation import page
from alignkit.evaluation.frontier_place import plots
from alignkit.evaluation.style import CHARTS, PALETTE
from alignkit.evaluation.svg import compact
from alignkit.generators.live import Recipe
from alignkit.media import clip_preview, encode_image

STYLE = f"""{PALETTE}
.studio {{ {CHARTS} }}
.studio {{ color:var(--ink); font:15px/1.5 var(--sans); }}
.studio .pictures {{ display:grid; grid-template-columns:1fr 1fr; gap:14px; }}
.studio .pictures figure {{ background:var(--card); border:1px solid var(--line); border-radius:10px;
  overflow:hidden; }}
.studio .pictures img {{ width:100%; height:auto; display:block; }}
.studio .pictures img.tiny {{ image-rendering:pixelated; }}
.studio .pictures figcaption {{ padding:9px 13px; overflow-wrap:anywhere; }}
.studio .pictures b {{ font-weight:600; }} .studio .soft {{ color:var(--soft); }}
.studio .prompt {{ margin:0 0 10px; overflow-wrap:anywhere; }}
.studio table.scores {{ width:100%; border-collapse:collapse; font-variant-numeric:tabular-nums; }}
.studio table.scores th, .studio table.scores td {{ text-align:right; padding:6px 10px; font-weight:400;
  border:0; border-bottom:1px solid var(--line); }}
.studio table.scores thead th {{ color:var(--soft); font-size:.84rem; }}
.studio table.scores th:first-child {{ text-align:left; padding-left:2px; }}
.studio table.scores .good {{ color:var(--good); }} .studio table.scores .bad {{ color:var(--bad); }}
.studio .note {{ color:var(--soft); font-size:.86rem; margin:6px 0 0; overflow-wrap:anywhere; }}
.studio .problem {{ border-left:3px solid var(--warn); background:var(--warn-wash); padding:9px 13px; margin:0;
  border-radius:0 8px 8px 0; overflow-wrap:anywhere; }}
.studio .done {{ border-left:3px solid var(--good); background:var(--good-wash); padding:9px 13px; margin:0;
  border-radius:0 8px 8px 0; overflow-wrap:anywhere; }}
.studio code {{ font:.84rem/1.5 var(--mono); background:none; border:0; padding:0; color:inherit;
  white-space:pre-wrap; overflow-wrap:anywhere; user-select:all; display:block; margin-top:4px; }}
"""


def _framed(body: str) -> str:
    """The last step of every part: Gradio's template marks are escaped."""
    return f'<div class="studio">{body}</div>'.replace("{", "&#123;").replace("$", "&#36;")


def problem(error: Exception) -> str:
    """A message about what was asked for and cannot be done."""
    lines = "<br>".join(to_html(str(line)) for line in error.args)
    return _framed(f'<p class="problem" role="alert">{lines}</p>')


def note(text: str) -> str:
    """A line about what the page waits for."""
    return _framed(f'<p class="note" role="status">{to_html(text)}</p>')


def exported(folder: str, command: str) -> str:
    """That a mixture was written, and how to make it again."""
    return _framed(
        f'<p class="done" role="status">Written to <b>{to_html(folder)}</b>. The same mixture again:'
        f"<code>{to_html(command)}</code></p>"
    )


def mixture(recipe: Recipe) -> str:
    """`0.7 careful + 0.3 base`, with the space and the window, as plain text."""
    used = {name: weight for name, weight in recipe.weights.items() if weight != 0} or {BASE: 1.0}
    parts = " + ".join(f"{weight:g} {name}" for name, weight in used.items()).replace("+ -", "\N{MINUS SIGN} ")
    if recipe.space == "weights" or recipe.window == ALL_STEPS:
        return f"{parts}, mixed as {recipe.space}"
    bounds = recipe.window
    return f"{parts}, mixed as {recipe.space}, from {bounds.start:.0%} to {bounds.stop:.0%} of the steps"


def stage(shot: Shot, fps: float) -> str:
    """Both images, with the prompt and seed that they share."""
    prompt = f'<p class="prompt">{to_html(shot.prompt)} <span class="soft">seed {shot.seed}</span></p>'
    sides = {"base": ("Base", shot.base), "mix": (f"Mixture: {mixture(shot.recipe)}", shot.mix)}
    figures = []
    for name, (caption, side) in sides.items():
        figures.append(
            f'<figure id="{name}">{_image(side, caption, fps)}<figcaption>{to_html(caption)}</figcaption></figure>'
        )
    return _framed(f'{prompt}<div class="pictures">{"".join(figures)}</div>')


def _image(side: Side, alt: str, fps: float) -> str:
    is_clip = side.image.ndim == 4
    data = clip_preview(side.image, fps) if is_clip else encode_image(side.image)
    css = ' class="tiny"' if max(side.image.shape[-3:-1]) <= page.TINY_SIDE else ""
    source = f"data:image/{'webp' if is_clip else 'png'};base64,{base64.b64encode(data).decode()}"
    return f'<img{css} alt="{to_html(alt)}" src="{source}">'


def scores(shot: Shot) -> str:
    """A table of both sides' scores and the change."""
    if not shot.mix.scores:
        return note("No rewards are named in the config.")
    rows = []
    for name, base in shot.base.scores.items():
        mix = shot.mix.scores[name]
        change = mix - base
        tone = "" if not math.isfinite(change) or change == 0 else ' class="good"' if change > 0 else ' class="bad"'
        cells = f"<td>{compact(base)}</td><td>{compact(mix)}</td><td{tone}>{compact(change, signed=True)}</td>"
        rows.append(f'<tr data-reward="{to_html(name)}"><th scope="row">{to_html(name)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{text}</th>' for text in ("Reward", "Base", "Mixture", "Change"))
    reasons = {f"{name}: {text}": None for side in (shot.base, shot.mix) for name, text in side.notes.items()}
    notes = "".join(f'<p class="note">{to_html(text)}</p>' for text in reasons)
    return _framed(f'<table class="scores"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>{notes}')


def frontier(session: Session, recipe: Recipe) -> str:
    """The plots of the frontier with this mixture on them; empty without one."""
    if session.frontier is None:
        return ""
    absent = [name for name in recipe.used if name not in session.frontier.members]
    text = "Cross: this mixture, interpolated between evaluated ones. Ring: the evaluated one of nearest weights."
    if absent:
        text = f"{', '.join(absent)}: no member of this frontier, so the mixture has no place on it."
    elif recipe.space not in session.frontier.spaces:
        text = f"This frontier has no mixtures of {recipe.space}."
    elif recipe.window != ALL_STEPS:
        text += " The window may differ from that of the frontier."
    place = "" if absent else recipe.space
    return _framed(
        f'<div class="charts">{plots(session.frontier, place, recipe.weights)}</div><p class="note">{to_html(text)}</p>'
    )


def heading(session: Session) -> str:
    """The title of the page."""
    return _framed(
        '<p class="note" style="margin:0">alignkit studio</p>'
        f'<h1 style="font:600 1.7rem/1.2 var(--serif);margin:0">{to_html(session.live.base.model)}</h1>'
    )

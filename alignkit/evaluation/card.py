"""The model card beside an adapter: README.md with front matter, settings, scores and example images.

Deliberately not here: uploading (transformers' `push_to_hub` takes the folder) and paths that the user did not give.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from alignkit.escape import to_code, to_fence, to_markdown, to_terminal
from alignkit.evaluation.gallery import Shown, choose, lead_reward, load
from alignkit.evaluation.generated import write_generated
from alignkit.evaluation.report import bounds, sampling_text, verdict
from alignkit.evaluation.results import Evaluation, read_evaluation, read_pairs
from alignkit.evaluation.svg import compact
from alignkit.shipped import SANDBOX
from alignkit.storage import write_atomic

_USE_ADAPTER = """## Use

```python
{code}
pipe.load_lora_weights("path/to/this/folder"{loading})
```

A pipeline without `load_lora_weights` takes the adapter through PEFT:
`PeftModel.from_pretrained(pipe.{component}, "path/to/this/folder/peft")`."""
_USE_ON_ENCODERS = """## Use

The adapter was trained on tuned text encoders, which act in some steps, and belongs with them:

```python
from alignkit import load_generator

generator = load_generator({name}, encoder={encoder}, adapter="path/to/this/folder")
```"""
_USE_MODEL = """## Use

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")
```"""
_USE_ENCODERS = """## Use

Each folder `text_encoder*` replaces the pipeline's component of its name:

```python
from pathlib import Path

{code}
for folder in Path("path/to/this/folder").glob("text_encoder*"):
    pipe.register_modules(**{{folder.name: type(pipe.components[folder.name]).from_pretrained(folder)}})
```

`alignkit.json` names the share of a chain's steps in which they are meant to act. alignkit keeps to it, and its
documentation has a callback for a plain pipeline."""
_LOAD = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({name})"""
_LOAD_SANDBOX = """from alignkit import load_generator

pipe = load_generator({name}).pipeline"""
_GRID = "validation.png"
_KINDS = {"adapter": "A LoRA adapter for", "model": "All weights of", "encoder": "Text encoders for"}


@dataclass(frozen=True, slots=True)
class CardInputs:
    """What a card reports. `base_model`: a hub id, path or `sandbox:NAME`, as the user named it. Others may be missing.

    `kind`: adapter, model or encoder. `validation` holds the metrics of held-out evaluations during training, by step,
    and `grid` their last images. `component` is the trained part of the pipeline, `loading` what `load_lora_weights`
    takes beside the folder, `modality` "image" or "video", where there is no evaluation that shows which. `encoder` is
    the folder of the tuned text encoders that the training began with.
    """

    title: str
    method: str
    base_model: str
    evaluation: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    examples: int = 3
    kind: str = "adapter"
    validation: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    grid: Path | None = None
    component: str = "transformer"
    loading: Mapping[str, Any] = field(default_factory=dict)
    modality: str = "image"
    encoder: Path | None = None


def write_card(card: CardInputs, folder: Path) -> Path:
    """Write `folder/README.md` and `folder/examples`; returns the card's path. Hand edits are set aside."""
    evaluation = read_evaluation(card.evaluation) if card.evaluation else None
    if card.evaluation:
        card = replace(card, modality=read_pairs(card.evaluation).modality)
    shown = _examples(card, evaluation)
    for name, data in _files(shown):
        write_atomic(folder / "examples" / name, data)
    if card.grid is not None:
        write_atomic(folder / "examples" / _GRID, card.grid.read_bytes())
    path = folder / "README.md"
    if path.exists() and "[More Information Needed]" in path.read_text(encoding="utf-8"):
        path.unlink()  # the empty form that peft writes; nothing of a user's is in it
    write_generated(path, render_card(card, evaluation, shown))
    return path


def render_card(card: CardInputs, evaluation: Evaluation | None, shown: Mapping[str, list[Shown]]) -> str:
    """The card as Markdown with YAML front matter."""
    base = card.base_model
    what = f"{_KINDS[card.kind]} {to_code(base)}"
    loading = "".join(f", {name}={value!r}" for name, value in card.loading.items())
    adapter = _USE_ADAPTER if card.encoder is None else _USE_ON_ENCODERS
    use = {"adapter": adapter, "encoder": _USE_ENCODERS}.get(card.kind, _USE_MODEL)
    name, encoder = (json.dumps(to_terminal(str(one))) for one in (base, card.encoder))
    code = (_LOAD_SANDBOX if base.startswith(SANDBOX) else _LOAD).format(name=name)
    parts = [
        _front_matter(card),
        f"# {to_markdown(card.title)}\n\n{what}, trained with {to_markdown(card.method)} by alignkit.",
        use.format(code=code, loading=loading, component=card.component, name=name, encoder=encoder),
        _scores(evaluation, card.encoder),
        _pictures(shown),
        _validation(card),
        _block("Data", card.data, "No data statistics were recorded."),
        _block("Configuration", card.config, "No configuration was recorded."),
    ]
    return "\n\n".join(part for part in parts if part)


def _front_matter(card: CardInputs) -> str:
    task = f"text-to-{card.modality}"
    fields: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": task}
    fields["tags"] = ["alignkit", card.method.lower(), *(["lora"] if card.kind == "adapter" else []), task]
    fields["base_model"] = card.base_model
    if card.licence:
        fields["license"] = card.licence
    return f"---\n{yaml.safe_dump(fields, sort_keys=False).strip()}\n---"


def _scores(evaluation: Evaluation | None, encoder: Path | None) -> str:
    if evaluation is None:
        return "## Scores\n\nNo paired evaluation of this result is recorded here."
    head = "| reward | base | tuned | paired gain | interval | win rate |\n|---|--:|--:|--:|:-:|--:|"
    rows = [
        f"| {to_markdown(r.reward)}{' (held out)' if r.is_gold else ''} | {compact(r.overall.base.mean)} | "
        f"{compact(r.overall.tuned.mean)} | {compact(r.overall.gain.mean, signed=True)} | "
        f"{bounds(r.overall.gain, signed=True)} | {compact(r.overall.win_rate.mean)} |"
        for r in evaluation.results
    ]
    note = (
        f"{evaluation.prompts} held-out prompts \N{MULTIPLICATION SIGN} {evaluation.seeds_per_prompt} seeds, the same "
        f"for both sides. Sampler for every number: {to_markdown(sampling_text(evaluation.sampling))}. "
        f"{evaluation.confidence:.0%} bootstrap intervals over prompts."
    )
    if encoder is not None:
        note += f" The base is the model with the text encoders in {to_code(str(encoder))}."
    return "\n".join(["## Scores", "", to_markdown(verdict(evaluation)), "", head, *rows, "", note])


def _examples(card: CardInputs, evaluation: Evaluation | None) -> dict[str, list[Shown]]:
    if evaluation is None or card.evaluation is None:
        return {}
    pairs, lead = read_pairs(card.evaluation), lead_reward(evaluation)
    return {group: load(pairs, rows, evaluation) for group, rows in choose(pairs, lead, card.examples).items()}


def _files(shown: Mapping[str, list[Shown]]) -> Iterable[tuple[str, bytes]]:
    for group, pairs in shown.items():
        for number, pair in enumerate(pairs):
            for side, data in pair.previews().items():
                yield f"{group}-{number}-{side}.{_suffix(pair)}", data


def _suffix(pair: Shown) -> str:
    return "png" if pair.fps is None else "webp"


def _pictures(shown: Mapping[str, list[Shown]]) -> str:
    rows = [
        f"| {group} | {to_markdown(pair.prompt.text)} | "
        f"![base](examples/{group}-{number}-base.{_suffix(pair)}) | "
        f"![tuned](examples/{group}-{number}-tuned.{_suffix(pair)}) |"
        for group, pairs in shown.items()
        for number, pair in enumerate(pairs)
    ]
    if not rows:
        return ""
    note = "The biggest gains, the biggest losses and pairs chosen at random; one prompt and one seed a row."
    head = "| chosen as | prompt | base | tuned |\n|---|---|---|---|"
    return "\n".join(["## Examples", "", note, "", head, *rows])


def _validation(card: CardInputs) -> str:
    if not card.validation:
        return ""
    names = sorted({name for metrics in card.validation.values() for name in metrics})
    rows = [
        " | ".join(["", str(step), *(compact(metrics[n]) if n in metrics else "" for n in names), ""]).strip()
        for step, metrics in sorted(card.validation.items())
    ]
    head = ["| step | " + " | ".join(map(to_markdown, names)) + " |", "|--:|" + "--:|" * len(names)]
    note = "Means on held-out prompts and seeds, the same at every step."
    picture = [f"![images of the last step](examples/{_GRID})"] if card.grid else []
    return "\n\n".join(["## During training", note, "\n".join([*head, *rows]), *picture])


def _block(title: str, value: Mapping[str, Any], otherwise: str) -> str:
    if not value:
        return f"## {title}\n\n{otherwise}"
    text = yaml.safe_dump(_simple(value), sort_keys=False, allow_unicode=True).strip()
    return f"## {title}\n\n{to_fence(text, 'yaml')}"


def _simple(value: Any) -> Any:
    """Plain YAML types; what is none of them becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): _simple(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_simple(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)

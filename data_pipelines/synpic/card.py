"""The dataset card (README.md) of a ranked dataset; its head tells `datasets` which files make which split.

Not here: the numbers (statistics.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.escape import to_code, to_markdown
from alignkit.media import clip_preview, decode_clip
from alignkit.storage import read_table, write_atomic

_CARD = """\
---
license: other
task_categories:
- text-to-{modality}
tags:
- preference
- ranked
- syn-pic
configs:
- config_name: default
  data_files:
{data_files}
---

# Ranked {modality}s

{rows} prompts with {candidates} candidate {modality}s each, ranked by {reward_names}.

```python
{loading}
```
{previews}
## How it was made

Several generators made candidates for each prompt; every reward scored every {modality}; `phi` is the share of
(reward, opponent) duels a candidate wins within its prompt, as in RankDPO (arXiv 2410.18013). {form}
Prompts were split by a hash of their text. The ranking's settings:

```json
{config}
```

## Columns

| column | what |
|---|---|
| `prompt_id`, `prompt` | hash of the text, and the text |
| `{column}` [K] | {medium} |
| `generators` [K], `seeds` [K] | which model made each, and its seed |
| `sampling` | sampler settings by generator, JSON |
| `scores` {{reward: [K]}} | raw scores, higher is better |
| `phi` [K] | win rate in [0, 1] |

## Statistics

| rows | number |
|---|---|
{counts}

| generator | {modality}s | mean phi | pairs won |
|---|---|---|---|
{generators}

{bias}

Share of candidate pairs that two rewards order alike (0.5 is chance; a tie counts one half):

{agreement}

More in `statistics.json`; file checksums in `manifest.json`.

## Licence

The {modality}s fall under the licences of the generators that made them, the scores under those of the rewards, the
prompts under that of their source. Look at all three before you share this dataset.
"""


_LOADING = """\
from datasets import load_dataset

ranked = load_dataset("path/to/this/folder", split="train")"""
_LOADING_VIDEOS = """\
from alignkit.media import decode_clip
from datasets import load_dataset

ranked = load_dataset("path/to/this/folder", split="train")
frames = decode_clip(ranked[0]["videos"][0], "row 0")  # uint8 [F, H, W, 3]"""
_PREVIEWS = "examples"


def write_previews(folder: Path, data: Path) -> list[tuple[str, float, str]]:
    """Previews of the candidates in the first row of `data`, best first: (prompt, phi, file in the folder)."""
    row = read_table(data, columns=["prompt", "videos", "generators", "sampling", "phi"]).slice(0, 1).to_pylist()[0]
    sampling = json.loads(row["sampling"])
    order = sorted(range(len(row["phi"])), key=lambda k: (-row["phi"][k], k))
    previews = []
    for place, k in enumerate(order):
        frames = decode_clip(row["videos"][k]["bytes"], f"'{data}', row 0, candidate {k}")
        name = f"{_PREVIEWS}/{place}.webp"
        write_atomic(folder / name, clip_preview(frames, sampling[row["generators"][k]]["fps"]))
        previews.append((row["prompt"], row["phi"][k], name))
    return previews


def card_text(
    config: Mapping[str, Any],
    statistics: Mapping[str, Any],
    splits: Sequence[str],
    *,
    previews: Sequence[tuple[str, float, str]] = (),
) -> str:
    """Markdown with a YAML head; `splits` are those that have files, `previews` (of videos) see `write_previews`."""
    bias = statistics["generator_bias"]
    strict = config["temperature"] is None
    is_video = bool(previews)
    return _CARD.format(
        modality="video" if is_video else "image",
        column="videos" if is_video else "images",
        medium="candidates, FFV1 in Matroska, lossless" if is_video else "candidates, PNG",
        loading=_LOADING_VIDEOS if is_video else _LOADING,
        previews=_previews_table(previews) if is_video else "",
        data_files="\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in splits),
        rows=statistics["rows"],
        candidates=statistics["candidates"],
        reward_names=", ".join(map(to_code, statistics["rewards"])),
        form="Ties give neither side a count." if strict else "Duels are counted softly, by how clearly they are won.",
        config=json.dumps(config, indent=2, sort_keys=True),
        counts="\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in statistics["counts"].items()),
        generators="\n".join(_generator_row(name, entry) for name, entry in bias["generators"].items()),
        bias=bias_sentence(bias),
        agreement=_agreement_table(statistics["agreement"]),
    )


def _previews_table(previews: Sequence[tuple[str, float, str]]) -> str:
    """The candidates of one prompt as moving images, best first."""
    head = "| " + " | ".join(f"phi {phi:.2f}" for _, phi, _ in previews) + " |\n" + "|---" * len(previews) + "|"
    cells = "| " + " | ".join(f"![candidate]({name})" for *_, name in previews) + " |"
    return f"\n{to_markdown(previews[0][0])}, best candidate first:\n\n{head}\n{cells}\n"


def bias_sentence(bias: Mapping[str, Any]) -> str:
    """The generator-bias probe in a sentence."""
    if bias["pair_accuracy"] is None:
        return "All decided pairs are of one generator, so its name cannot predict a rank."
    return (
        f"Generator bias: the generators' names alone predict {bias['pair_accuracy']:.1%} of {bias['pairs']} decided "
        "pairs (50% is chance; a model could learn that much from a generator's fingerprint)."
    )


def _generator_row(name: str, entry: Mapping[str, Any]) -> str:
    share = "none decided" if entry["win_share"] is None else f"{entry['win_share']:.1%}"
    return f"| {to_markdown(name)} | {entry['pictures']} | {entry['mean_phi']:.3f} | {share} |"


def _agreement_table(matrix: Mapping[str, Mapping[str, float]]) -> str:
    head = f"| | {' | '.join(map(to_markdown, matrix))} |\n|---|{'---|' * len(matrix)}\n"
    rows = [
        f"| {to_markdown(name)} | {' | '.join(f'{value:.2f}' for value in row.values())} |"
        for name, row in matrix.items()
    ]
    return head + "\n".join(rows)

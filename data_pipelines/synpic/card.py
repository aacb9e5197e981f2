"""The dataset card (README.md) of a ranked dataset; its head tells `datasets` which files make which split.

Not here: the numbers (statistics.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_CARD = """\
---
license: other
task_categories:
- text-to-image
tags:
- preference
- ranked
- syn-pic
configs:
- config_name: default
  data_files:
{data_files}
---

# Ranked pictures

{rows} prompts with {candidates} candidate pictures each, ranked by {reward_names}.

```python
from datasets import load_dataset

ranked = load_dataset("path/to/this/folder", split="train")
```

## How it was made

Several generators drew candidates for each prompt; every reward scored every picture; `phi` is the share of
(reward, opponent) duels a candidate wins within its prompt, as in RankDPO (arXiv 2410.18013). {form}
Prompts were split by a hash of their text. The ranking's settings:

```json
{config}
```

## Columns

| column | what |
|---|---|
| `prompt_id`, `prompt` | hash of the text, and the text |
| `images` [K] | candidates, PNG |
| `generators` [K], `seeds` [K] | which model drew each, and its seed |
| `sampling` | sampler settings by generator, JSON |
| `scores` {{reward: [K]}} | raw scores, higher is better |
| `phi` [K] | win rate in [0, 1] |

## Statistics

| rows | number |
|---|---|
{counts}

| generator | pictures | mean phi | pairs won |
|---|---|---|---|
{generators}

{bias}

Share of candidate pairs that two rewards order alike (0.5 is chance; a tie counts one half):

{agreement}

More in `statistics.json`; file checksums in `manifest.json`.

## Licence

The pictures fall under the licences of the generators that drew them, the scores under those of the rewards, the
prompts under that of their source. Look at all three before you share this dataset.
"""


def card_text(config: Mapping[str, Any], statistics: Mapping[str, Any], splits: Sequence[str]) -> str:
    """Markdown with a YAML head; `splits` are those that have files."""
    bias = statistics["generator_bias"]
    strict = config["temperature"] is None
    return _CARD.format(
        data_files="\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in splits),
        rows=statistics["rows"],
        candidates=statistics["candidates"],
        reward_names=", ".join(f"`{name}`" for name in statistics["rewards"]),
        form="Ties give neither side a count." if strict else "Duels are counted softly, by how clearly they are won.",
        config=json.dumps(config, indent=2, sort_keys=True),
        counts="\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in statistics["counts"].items()),
        generators="\n".join(_generator_row(name, entry) for name, entry in bias["generators"].items()),
        bias=bias_sentence(bias),
        agreement=_agreement_table(statistics["agreement"]),
    )


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
    return f"| {name} | {entry['pictures']} | {entry['mean_phi']:.3f} | {share} |"


def _agreement_table(matrix: Mapping[str, Mapping[str, float]]) -> str:
    head = f"| | {' | '.join(matrix)} |\n|---|{'---|' * len(matrix)}\n"
    rows = [f"| {name} | {' | '.join(f'{value:.2f}' for value in row.values())} |" for name, row in matrix.items()]
    return head + "\n".join(rows)

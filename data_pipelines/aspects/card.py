"""The dataset card (README.md) of an aspects dataset; its head tells `datasets` which files to load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.escape import to_code, to_markdown

_CARD = """\
---
license: other
tags:
- aspects
- questions
configs:
- config_name: default
  data_files:
  - split: train
    path: data/part-*.parquet
---

# Questions about prompts

{rows} prompts, each with yes/no questions for a vision-language model that looks at an image or video of it.

```python
from datasets import load_dataset

aspects = load_dataset("path/to/this/folder", split="train")
```

## Columns

| column | what |
|---|---|
| `prompt_id`, `prompt`, `metadata` | hash of the text, the text, other columns of the prompts' file (JSON) |
| `questions` [{{name, aspect, text, negated, weight, answer}}] | `text`: yes is good; `negated`: no; one may be empty |
| `facts` [{{kind, text}}] | what the writer found in the prompt; every one is covered by a question |
| `image`, `video` | media of the prompts' file, where it has any |

{examples}
## How it was made

Every draft was checked: yes or no answers each question, it is phrased positively and asked once, and the questions
cover all facts. Drafts that failed were written again; prompts whose last draft failed are in `quarantine.jsonl`.
The settings (what wrote the questions is in `run.json`):

```json
{config}
```

## Statistics

| count | number |
|---|---|
{counts}

File checksums are in `manifest.json`.

## Licence

The prompts fall under the licence of their source; questions that a language model wrote fall under that of the model.
"""


def card_text(
    config: Mapping[str, Any], counts: Mapping[str, int], rows: int, examples: Sequence[Mapping[str, Any]]
) -> str:
    """Markdown with a YAML head; `examples` are rows of the dataset."""
    return _CARD.format(
        rows=rows,
        examples="\n".join(map(_example, examples)),
        config=json.dumps(config, indent=2, sort_keys=True),
        counts="\n".join(f"| {name.replace('_', ' ')} | {count} |" for name, count in sorted(counts.items())),
    )


def _example(row: Mapping[str, Any]) -> str:
    """A prompt and its questions as a list."""
    lines = [f"{to_markdown(row['prompt'])}:\n"]
    for question in row["questions"]:
        texts = [to_code(question["text"])] if question["text"] else []
        texts += [f"against {to_code(question['negated'])}"] if question["negated"] else []
        lines.append(f"- {question['aspect']}, weight {question['weight']:g}: {' '.join(texts)}")
    return "\n".join(lines) + "\n"

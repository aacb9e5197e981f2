"""The dataset cards (README.md) of pairs of clips and of labelled ones; `datasets` reads their heads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_CARD = """\
---
license: other
tags:
- preference
- video
configs:
- config_name: default
  data_files:
  - split: train
    path: data/part-*.parquet
---

# Pairs of clips

{pairs} pairs for DenseDPO ([2506.03517](https://arxiv.org/abs/2506.03517)); {quarantined} videos or captions were left
out, see `quarantine.jsonl`.

```python
from datasets import load_dataset
from safetensors.torch import load

pairs = load_dataset("path/to/this/folder", split="train")
latents = load(pairs[0]["latents"][0]["bytes"])["latents"]  # [C, T, h, w], normalised
```

## Columns

| column | what |
|---|---|
| `prompt_id`, `prompt` | hash of the caption, the caption |
| `source_id`, `source_sha256` | the real video's name, and the hash of its file (empty for vanilla pairs) |
| `latents` [2] | each copy as the bytes of a safetensors file; no pixels were made in between |
| `videos` [2] | both clips in FFV1, if they were asked for |
| `kind` | guided, structural or vanilla |
| `eta`, `sigma_start`, `eta_meaning` | start as drawn, sigma at which the chain started; null where the copies differ |
| `etas` [2], `sigma_starts` [2], `seeds` [2] | of each copy: eta 0 the real video, 1 a full generation; noise seed |
| `fps`, `num_frames` | of each clip |
| `segments` [S] | first frame and the one after the last |
| `labels` [S], `label_source` | +1 the first copy is better, -1 the second, 0 a tie; empty until labelled |
| `sampling` (JSON), `generator`, `codec` | steps, guidance scale, size; the model's name; fingerprint of its VAE |

## How it was made

`run.json` names the weights, `versions.json` the libraries, `manifest.json` the checksums. With them, a row and its
video, `data_pipelines.dense.rebuild_pair` makes the same latents. The settings:

```json
{config}
```

## Licence

The videos and captions fall under the licence of their source, the latents under that of the model too.
"""


_LABELS_CARD = (
    _CARD[: _CARD.index("# Pairs of clips")]
    + """\
# Pairs of clips with labels of their segments

{kept} of {pairs} pairs for DenseDPO ([2506.03517](https://arxiv.org/abs/2506.03517)). {filtered} have too many ties,
{quarantined} got no label (`quarantine.jsonl`). {unanswered} segments without an answer count as ties.

Train on them: `alignkit train METHOD --data path/to/this/folder`, with a method that takes dense data.

The columns are those of the pairs (their dataset card). `labels` [S]: 1 the first clip is better in this segment, -1
the second, 0 a tie. `label_source`: who voted, joined by "+". `votes/LABELLER.jsonl` has every vote as it was given; a
pair is named by `data_pipelines.dense.votes.pair_id(row)`.

## Statistics

`tie_rate` is over segments, `mixed` the share of pairs with both signs, `alpha` Krippendorff's; before the filter.

```json
{facts}
```

## Licence

The videos and captions fall under the licence of their source, the latents under that of the model too.
"""
)


def labels_card_text(facts: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """Markdown with a YAML head; `counts` has kept, pairs, filtered, quarantined and unanswered."""
    return _LABELS_CARD.format(facts=json.dumps(facts, indent=2, sort_keys=True), **counts)


def card_text(config: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """Markdown with a YAML head; `counts` has pairs and quarantined."""
    return _CARD.format(config=json.dumps(config, indent=2, sort_keys=True), **counts)

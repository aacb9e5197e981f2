"""What every training dataset shares: an epoch that its random draws depend on, and batches of tensors and texts."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from alignkit.errors import DataError
from alignkit.records import Prompt
from alignkit.seeds import derive_seed


class EpochData(Dataset[dict[str, Any]]):
    """Rows with random draws of their own in each `epoch`, which the trainer sets."""

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # seen by loader workers that outlive an epoch

    @property
    def epoch(self) -> int:
        """The epoch of the items' draws; 0 unless set, so held-out rows always have the same draws."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch.fill_(value)

    def __len__(self) -> int:
        raise NotImplementedError


class PromptData(EpochData):
    """Prompts alone. An item is {"prompts": Prompt, "seed": int64 []}; the seed depends on (noise seed, id, epoch)."""

    def __init__(self, rows: Iterable[Prompt | str | Mapping[str, Any]], noise_seed: int) -> None:
        super().__init__()
        self.prompts = [_prompt(row) for row in rows]
        if not self.prompts:
            raise DataError(
                "training data has no prompt: check the file given as `prompts.file` or `data`, and `held_out`"
            )
        self.noise_seed = noise_seed
        self._draw_ids = draw_ids(prompt.id for prompt in self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed = derive_seed("draw", self.noise_seed, self._draw_ids[index], self.epoch)
        return {"prompts": self.prompts[index], "seed": torch.tensor(seed)}


def _prompt(row: Prompt | str | Mapping[str, Any]) -> Prompt:
    """A row as a Prompt; the other columns of a mapping become its metadata.

    A column `metadata` with a JSON object, as the aspects stage writes it, stands for its members.
    """
    if isinstance(row, Prompt):
        return row
    if isinstance(row, str):
        return Prompt.from_text(row)
    if "prompt" not in row:
        raise DataError(f"training data lacks the column prompt; its columns are {list(row)}")
    metadata = {name: value for name, value in row.items() if name != "prompt"}
    if isinstance(packed := metadata.get("metadata"), str):
        with contextlib.suppress(ValueError):
            inner = json.loads(packed)
            if isinstance(inner, dict):
                metadata = inner | {name: value for name, value in metadata.items() if name != "metadata"}
    return replace(Prompt.from_text(row["prompt"]), metadata=metadata)


def draw_ids(prompt_ids: Iterable[str]) -> list[str]:
    """The keys of the rows' draws: the prompt id, and from its second row on the row's number among them too."""
    seen: Counter[str] = Counter()
    names = []
    for prompt_id in prompt_ids:
        names.append(f"{prompt_id}-{seen[prompt_id]}" if seen[prompt_id] else prompt_id)
        seen[prompt_id] += 1
    return names


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack the items' tensors (all of one shape in a batch, see `buckets.BucketBatches`); the rest stays a list."""
    batch: dict[str, Any] = {}
    for name, value in items[0].items():
        column = [item[name] for item in items]
        batch[name] = torch.stack(column) if isinstance(value, Tensor) else column
    return batch

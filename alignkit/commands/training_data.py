"""The training rows of one method, loaded when they are needed, and the prompts of a run by use.

`LOADERS` maps a kind of data to what reads its files and checks its columns; a kind without one is the prompts
themselves. What makes such files is in `data`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, DataError
from alignkit.escape import get_logger
from alignkit.provenance import fingerprint, fingerprint_files
from alignkit.records import Prompt
from data_pipelines.cells import contained
from data_pipelines.dense.votes import VOTES
from data_pipelines.importers import load_ranked
from data_pipelines.opening import bounds_of, files_beside, open_dataset
from data_pipelines.prompts import to_prompt
from data_pipelines.rows import MEDIA, load_rows, without_prompts
from data_pipelines.segments import load_dense

if TYPE_CHECKING:
    from datasets import Dataset

logger = get_logger(__name__)

# (path, split, held_out=..., root=...) -> rows of "train" or "heldout", with the columns of the kind checked.
LOADERS: dict[str, Callable[..., Dataset]] = {
    "ranked": load_ranked,
    "dense": load_dense,
    "aspects": functools.partial(load_rows, columns=(("prompt",), ("questions",))),
    "captions": functools.partial(load_rows, columns=(("prompt",),), optional=("image", "video")),
}
# Folders of a dataset that no training reads: failed requests are asked again, and their votes added to the old ones.
LEFT_OUT = {"dense": (VOTES,)}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """Training rows, loaded when they are needed: a dataset of one kind at `path`, or the prompts themselves.

    kind: a key of `data.DATA`.
    path: the dataset; None for prompts alone.
    root: the folder of the files that its rows name; None for the dataset's own.
    held_out: share of its rows for the held-out loss, where it has no split for that; 0 for none.
    excluded: ids of prompts whose rows are not trained on, because an evaluation uses them.
    prompts: training prompts and held-out prompts, where `path` is None.
    """

    kind: str
    path: Path | None = None
    root: Path | None = None
    held_out: float = 0.0
    excluded: frozenset[str] = frozenset()
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]] = ((), ())

    @property
    def identity(self) -> str:
        """Changes with the files of the dataset, with those that its rows name elsewhere, or with the training prompts.

        What counts is content, so that data which was moved is the same. Raises what `train` raises.
        """
        if self.path is not None:
            named = files_beside(self.path, self.root)
            own = fingerprint(self.path, LEFT_OUT.get(self.kind, ()))
            return f"{own} {fingerprint_files(named)}" if named else own
        return hashlib.sha256("\n".join(prompt.text for prompt in self.prompts[0]).encode()).hexdigest()[:16]

    def train(self) -> Dataset | Sequence[Prompt]:
        """The training rows. Raises MissingFileError, or DataError for columns or rows that the kind does not have."""
        if self.path is None and not self.prompts[0]:
            raise DataError("no prompts to train on; give more prompts or lower prompts.held_out")
        if self.path is None:
            return self.prompts[0]
        rows = self._load(self.path, "train")
        remaining = without_prompts(rows, self.excluded)
        if len(remaining) < len(rows):
            print(f"{len(rows) - len(remaining)} training rows left out: validation or evaluation uses their prompts")
        return remaining

    def heldout(self) -> Dataset | Sequence[Prompt] | None:
        """The held-out rows; None where nothing is held out."""
        if self.path is not None:
            return self._load(self.path, "heldout") if self.held_out > 0 else None
        return self.prompts[1] or None

    def with_questions(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Prompts of a validation or evaluation with the dataset's questions about them, found by their text.

        They also get the other columns of the row, media among them, that they do not have themselves. Warns of prompts
        without questions, which a critic asks what it asks of every prompt. Other data has no questions. Raises
        DataError for a row that names a file outside the dataset.
        """
        if self.path is None or self.kind != "aspects":
            return list(prompts)
        from alignkit.trainers.data import PromptData

        wanted, known = {prompt.id for prompt in prompts}, dict[str, dict[str, Any]]()
        for name, rows in open_dataset(self.path, root=self.root, say=logger.debug, values=("questions",)).items():
            if not {"prompt", "questions"} <= set(rows.column_names):
                continue
            where = f"'{self.path}', split {name}"
            own = [to_prompt(text, where).id in wanted for text in rows["prompt"][:]]
            found = rows.select([row for row, is_wanted in enumerate(own) if is_wanted])
            for column in sorted(MEDIA.intersection(rows.column_names)):
                found = contained(found, column, bounds_of(self.path, self.root), where)
            for prompt in PromptData(found, 0).prompts if len(found) else ():
                if prompt.metadata["questions"]:
                    known[prompt.id] = {key: value for key, value in prompt.metadata.items() if value is not None}
        held_out = [replace(prompt, metadata=known.get(prompt.id, {}) | prompt.metadata) for prompt in prompts]
        lacking = [prompt.text for prompt in held_out if not prompt.metadata.get("questions")]
        if lacking:
            logger.warning(
                "%d of %d prompts of validation or evaluation have no questions in '%s', the first one '%s': a critic "
                "asks them what its options `questions` or `writer` say. Add rows about them, or give it a `writer`",
                len(lacking),
                len(held_out),
                self.path,
                lacking[0],
            )
        return held_out

    def _load(self, path: Path, split: str) -> Dataset:
        if self.kind not in LOADERS:
            raise ConfigError(f"data of the kind '{self.kind}' are the prompts themselves; they have no path")
        return LOADERS[self.kind](path, split, held_out=self.held_out, root=self.root)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptShares:
    """The prompts of a run by use: training, validation, and evaluation at the end."""

    train: Sequence[Prompt]
    validation: Sequence[Prompt]
    evaluation: Sequence[Prompt]

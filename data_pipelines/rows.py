"""The rows of one side of a dataset, with their columns checked.

Deliberately not here: opening files (`opening`), and what the columns of ranked data may be (`importers`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.columns import column, once_each
from alignkit.errors import DataError
from alignkit.escape import get_logger
from alignkit.records import Prompt
from data_pipelines.cells import contained
from data_pipelines.opening import bounds_of, open_dataset, own_split
from data_pipelines.prompts import split_of, to_prompt

if TYPE_CHECKING:
    from datasets import Dataset

logger = get_logger(__name__)
MEDIA = {"image", "images", "video", "videos"}


def load_rows(
    path: Path,
    split: str,
    *,
    held_out: float,
    columns: Sequence[Sequence[str]],
    root: Path | None = None,
    optional: Sequence[str] = (),
    check: Callable[[Dataset, str], object] = lambda rows, where: None,  # noqa: ARG005
) -> Dataset:
    """The "train" or "heldout" rows at `path`, with a column `prompt_id`.

    `columns` are the required ones, each with its alternatives: (("prompt",), ("videos", "latents")); values of
    `optional` ones are read where the data has them. `check(rows, where)` gets the rows before some are selected, so
    the numbers of rows in its messages are those of the data. The held-out side, and `root`, the folder of files that
    rows name, are those of `importers.load_ranked`. Images and videos stay
    encoded, {"bytes", "path"}. Raises DataError naming missing columns, the row of an empty prompt or of a file outside
    the folder, or where the side holds no row.
    """
    # Both sides are loaded in one job; what is true of the data is reported once.
    say = logger.warning if split == "train" else logger.debug
    values = {name for names in columns for name in names} | set(optional)
    splits = open_dataset(path, root=root, say=say, values=values)
    own = own_split(splits, split, path, say)
    rows = splits[own or next(iter(splits))]
    missing = [" or ".join(names) for names in columns if not set(names) & set(rows.column_names)]
    if missing:
        raise DataError(f"'{path}' lacks the columns {', '.join(missing)}; it has {', '.join(rows.column_names)}")
    check(rows, f"'{path}'")
    rows = with_prompt_ids(rows, path)
    for name in sorted(MEDIA.intersection(rows.column_names)):
        rows = contained(rows, name, bounds_of(path, root), f"'{path}'")
    if own is None:
        rows = rows.select(rows_of_split(rows, split, held_out))
    if own == "" or not len(rows):
        raise DataError(f"'{path}' has no row in the split '{split}' (held_out {held_out}); give more data")
    return rows


def with_prompt_ids(rows: Dataset, path: Path) -> Dataset:
    """`rows` with the column `prompt_id`: a hash of the prompt's text, where the data has none of its own."""
    prompts: list[Any] = rows["prompt"][:]
    ids = []
    for row, text in enumerate(prompts):
        prompt = to_prompt(text, f"'{path}', row {row}")
        if not prompt.text:
            raise DataError(f"'{path}', row {row}: the prompt is empty; write one or remove the row")
        ids.append(prompt.id)
    return rows if "prompt_id" in rows.column_names else rows.add_column("prompt_id", ids)


def rows_of_split(rows: Dataset, split: str, held_out: float) -> list[int]:
    """The numbers of the rows whose `prompt_id` falls on the side `split`."""
    splits = once_each(column(rows, "prompt_id").to_pylist(), lambda prompt_id: split_of(prompt_id, held_out))
    return [row for row, own in enumerate(splits) if own == split]


def without_prompts(rows: Dataset, ids: frozenset[str]) -> Dataset:
    """`rows` less those whose prompt has one of `ids`. Raises DataError where none stays."""
    texts = column(rows, "prompt").to_pylist()
    stays = once_each(texts, lambda text: Prompt.from_text(text).id not in ids)
    stay = [row for row, is_kept in enumerate(stays) if is_kept]
    if not stay:
        raise DataError("every training row has a prompt that validation or evaluation uses; give other prompts")
    return rows if len(stay) == len(rows) else rows.select(stay)

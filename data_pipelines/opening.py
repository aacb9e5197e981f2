"""The user's path -> the splits of a dataset: parquet, `save_to_disk`, JSON lines, CSV, or a folder of media.

Names are literal: `[`, `*` and `~` in a path are no patterns. What a file in the folder names (a card's `data_files`,
the shards of `state.json`, an image in a JSON line) must be inside the folder. Not here: what the columns mean.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from alignkit.errors import DataError, MissingFileError
from alignkit.escape import get_logger
from alignkit.media import VIDEO_ENDINGS
from alignkit.paths import Bounds
from data_pipelines.cells import contained, named_files, read_files, text_cell
from data_pipelines.folders import Say, unused_files
from data_pipelines.prompts import to_prompt
from data_pipelines.tables import read_rows

if TYPE_CHECKING:
    from datasets import Dataset

logger = get_logger(__name__)

TABLES = (".jsonl", ".csv")  # read here, with file and line of every error
MEDIA = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", *VIDEO_ENDINGS)
IMAGE_COLUMNS = ("image", "chosen", "rejected", "jpg_0", "jpg_1")
LABEL_COLUMNS = ("label_0", "label_1", "has_label")
TEXT_COLUMNS = ("prompt", "caption", "text")
KNOWN = {*IMAGE_COLUMNS, *LABEL_COLUMNS, *TEXT_COLUMNS, "video", "videos", "phi"}
HELD_OUT = ("heldout", "validation", "test")  # names of a split that is not trained on, the preferred first
PATTERN = re.compile(r"[*?\[\]{}]")


def open_dataset(
    path: Path, *, root: Path | None = None, say: Say = logger.warning, values: Collection[str] = ()
) -> Mapping[str, Dataset]:
    """The splits of a folder, or the one split "train" of a parquet, JSON lines or CSV file.

    `root` is where files may be that a row of a JSON lines or CSV file names; default: the file's folder. Of columns
    that no ranked layout has, JSON lines and CSV files give the values only where they are among `values`. What is not
    used is reported through `say`.

    Raises MissingFileError where nothing is at `path`, DataError for what cannot be read or is not safe to.
    """
    if not path.exists():
        raise MissingFileError(f"'{path}' does not exist; download the dataset first and give its folder")
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _saved_to_disk(path)
    tables = _tables(path)
    if tables:
        return {split: _from_table(file, root, values) for split, file in tables.items()}
    return _loaded(path, say)


def own_split(splits: Mapping[str, Dataset], split: str, path: Path, say: Say) -> str | None:
    """The data's own name of `split`, "" where it has none; None for data that is not split."""
    held_out = next((name for name in HELD_OUT if name in splits), None)
    if held_out == "heldout":
        return split if split in splits else ""
    if len(splits) == 1:
        return None
    if "train" not in splits or held_out is None:
        known = f"'train' and one of {', '.join(HELD_OUT)}"
        raise DataError(f"'{path}' has the splits {', '.join(splits)}; name them {known}, or give one split alone")
    unused = [name for name in splits if name not in ("train", held_out)]
    note = f"; not used: {', '.join(unused)}" if unused else ""
    say("%s: its split '%s' is the held-out one, and the share `held_out` does not apply%s", path, held_out, note)
    return "train" if split == "train" else held_out


def bounds_of(path: Path, root: Path | None = None) -> Bounds:
    """Where files may be that rows of the dataset at `path` name: its folder (or `root`), and what was unpacked."""
    folder = path if path.is_dir() else path.parent
    return Bounds(folder, (root or folder, cache_of(path)))


def files_beside(path: Path, root: Path | None = None) -> dict[str, Path]:
    """The files that rows of the dataset at `path` name and that are not in it, by their paths below `root`.

    Empty for a folder without a `root`, whose rows name files in it. Raises what `open_dataset` raises.
    """
    if root is None and path.is_dir():
        return {}
    bounds = bounds_of(path, root)
    home = bounds.roots[0].resolve()
    found: set[Path] = set()
    for rows in open_dataset(path, root=root, say=logger.debug).values():
        for name in {*IMAGE_COLUMNS, "images", "video", "videos"} & set(rows.column_names):
            media = contained(rows.select_columns([name]), name, bounds, f"'{path}'")
            found |= {Path(file) for file in read_files(media, name)}
    return {str(file.relative_to(home)): file for file in sorted(found) if file.is_relative_to(home)}


def cache_of(path: Path) -> Path:
    """A cache of its own for these very files.

    `load_dataset` keys a folder that has a dataset card by its last name alone: a second run's `ranked` folder would
    silently be read as the first one's.
    """
    from datasets import config

    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return Path(config.HF_DATASETS_CACHE) / "alignkit" / key


def is_plain_folder(path: Path) -> bool:
    """Whether `path` is a folder without any table, card of metadata or archive, so that captions are text files."""
    endings = {".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tar", ".zip"}
    return path.is_dir() and not any(file.suffix.lower() in endings for file in _visible(path, depth=2))


def _visible(folder: Path, depth: int) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        if file.is_dir() and depth > 1 and not file.name.startswith("."):
            yield from _visible(file, depth - 1)
        elif file.is_file():
            yield file


# --- what `datasets` reads ------------------------------------------------------------------------------------------


def _loaded(path: Path, say: Say) -> Mapping[str, Dataset]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    cache = cache_of(path)
    source = _without_patterns(path, cache)
    if path.is_file() and path.suffix.lower() != ".parquet":
        raise DataError(f"'{path}' cannot be opened: give a .parquet, .jsonl or .csv file, or a folder")
    if path.is_dir():
        _check_cards(path)
    try:
        if path.is_file():
            splits = load_dataset("parquet", data_files=str(source), cache_dir=str(cache))
        else:
            splits = load_dataset(str(source), cache_dir=str(cache))
    except (FileNotFoundError, DatasetGenerationError, ValueError) as error:
        cause = error.__cause__ or error
        raise DataError(f"'{path}' cannot be opened: {cause}; give a parquet file, or a folder of them") from error
    if path.is_dir() and any(path.rglob("metadata.*")):
        unused_files(path, (name for rows in splits.values() for name in named_files(rows)), MEDIA, say)
    return dict(splits)


def _without_patterns(path: Path, cache: Path) -> Path:
    """`path`, or links to its files in `cache` where its name would be read as a pattern."""
    path = path.absolute()
    if not PATTERN.search(str(path)):
        return path
    source = cache / f"source{path.suffix if path.is_file() else ''}"
    for file in [path] if path.is_file() else path.rglob("*"):
        link = source / file.relative_to(path)
        link.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file() and not link.is_symlink():
            link.symlink_to(file)
    return source


def _check_cards(folder: Path) -> None:
    """DataError when a dataset card names data files elsewhere, which `load_dataset` would fetch.

    Its header is cut out exactly as `datasets` does it: another reading of it would miss what is then obeyed.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    for card in (folder / "README.md", folder / ".huggingface.yaml"):
        if not card.is_file():
            continue
        try:
            text = card.read_bytes().decode()
            block = REGEX_YAML_BLOCK.search(text)
            in_card = block[2] if block else ""
            header = in_card if card.name == "README.md" else text
            if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(header, Loader=yaml.SafeLoader)):
                raise DataError(f"'{card}': aliases (*name) are not read in a dataset card; write the values out")
            fields = yaml.safe_load(header)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            what = " ".join(str(error).split())
            raise DataError(f"'{card}' has a broken header: {what}; correct or remove it") from error
        for name in _leaves(fields.get("configs") if isinstance(fields, dict) else None):
            Bounds(folder).path(name, f"'{card}', configs")


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value


def _saved_to_disk(path: Path) -> Mapping[str, Dataset]:
    """What `save_to_disk` wrote: one dataset, or a dictionary of splits."""
    from datasets import DatasetDict, load_from_disk

    try:
        record = path / "dataset_dict.json"
        names = json.loads(record.read_bytes())["splits"] if record.is_file() else []
        folders = [Bounds(path).path(name, f"'{record}'") for name in names] or [path]
        for folder in folders:
            state = folder / "state.json"
            for shard in json.loads(state.read_bytes())["_data_files"]:
                Bounds(folder).file(shard["filename"], f"'{state}'")
        loaded = load_from_disk(str(path.absolute()))
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"'{path}' is no whole `save_to_disk` folder: {error}; save the dataset again") from error
    return dict(loaded) if isinstance(loaded, DatasetDict) else {"train": loaded}


# --- JSON lines and CSV ---------------------------------------------------------------------------------------------


_NO_DATA = ("metadata", "quarantine")


def _tables(path: Path) -> dict[str, Path]:
    """The .jsonl and .csv files at `path` by split: one that is alone is "train", several are named after splits.

    What a stage left out, `quarantine.jsonl`, is no data.
    """
    if path.is_file():
        return {"train": path} if path.suffix.lower() in TABLES else {}
    files = list(_visible(path, depth=1))
    tables = [file for file in files if file.suffix.lower() in TABLES and file.stem not in _NO_DATA]
    if any(file.suffix.lower() == ".parquet" for file in files) or not tables:
        return {}
    if len(tables) == 1:
        return {"train": tables[0]}
    names = {file.stem.lower(): file for file in tables}
    if len(names) < len(tables) or "train" not in names:
        listed = ", ".join(file.name for file in tables)
        raise DataError(f"'{path}' holds {listed}; name one of them, or call them train.jsonl and test.jsonl")
    return names


def _from_table(path: Path, root: Path | None, values: Collection[str]) -> Dataset:
    """Rows with the columns that a layout may have, and those in `values`; files stay files until a row is read."""
    from datasets import Dataset, Features, Image, List, Value, Video

    bounds = bounds_of(path, root)
    rows = [_cells(row, bounds, f"'{path}', {where}", values) for where, row in read_rows(path)]
    if not rows:
        raise DataError(f"'{path}' holds no row; write at least one")
    kinds: dict[str, Any] = {name: Value("string") for row in rows for name in row}
    media = {**dict.fromkeys(IMAGE_COLUMNS, Image(decode=False)), "video": Video(decode=False)}
    media |= {"videos": List(Video(decode=False)), "phi": List(Value("float64"))}
    kinds |= {name: media[name] for name in kinds if name in media}
    columns: dict[str, list[Any]] = {}
    for name in kinds:
        columns[name] = [row.get(name) for row in rows]
    kinds |= {name: _feature(columns[name], f"'{path}', {name}") for name in set(values) & set(kinds) - KNOWN}
    return Dataset.from_dict(columns, features=Features(kinds))


def _feature(values: list[Any], where: str) -> Any:
    """The `datasets` feature of JSON values, which must be of one type."""
    import pyarrow as pa
    from datasets import Features

    try:
        kind = pa.array(values).type
    except (pa.ArrowException, OverflowError) as error:
        raise DataError(f"{where}: the values are not of one type: {error}; write all of them alike") from error
    return Features.from_arrow_schema(pa.schema([("values", kind)]))["values"]


def _cells(row: Mapping[str, Any], bounds: Bounds, where: str, values: Collection[str]) -> dict[str, Any]:
    """A row with texts, labels as text and media as {bytes, path}; of other columns the names, or those in `values`."""
    cells: dict[str, Any] = dict.fromkeys(row)
    for name, value in row.items():
        place = f"{where}, {name}"
        if name in (*IMAGE_COLUMNS, "video"):
            cells[name] = text_cell(value, bounds, place)
        elif name == "videos" and isinstance(value, list):
            cells[name] = [text_cell(item, bounds, place) for item in value]
        elif name == "phi" and isinstance(value, list):
            cells[name] = [_number(item, place) for item in value]
        elif name in TEXT_COLUMNS:
            cells[name] = to_prompt(value, where, column=name).text
        elif name in LABEL_COLUMNS and value is not None:
            cells[name] = str(value)
        elif name in ("videos", "phi"):
            raise DataError(f"{place}: expected a list, not {type(value).__name__}")
        elif name in values:
            cells[name] = value
    return cells


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: expected a number, not {value!r}")
    return float(value)

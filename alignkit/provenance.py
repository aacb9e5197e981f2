"""What a result was made with: the resolved config as YAML, and fingerprints of models and data.

Deliberately not here: reading configs (`config`), and the record that resume compares (`claims.claim`).
"""

from __future__ import annotations

import enum
import hashlib
import operator
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from alignkit.claims import CONTENT, claim, claimed
from alignkit.config import init_fields, is_trainer_config, own_keys
from alignkit.errors import DataError
from alignkit.shipped import model_path
from alignkit.storage import write_text


def plain(config: Any) -> Any:
    """A config as YAML-ready values that `load` reads back to an equal config; secrets (`*_token`) are left out."""
    if is_dataclass(config) and not isinstance(config, type):
        names = [name for name in init_fields(config) if not name.endswith("_token")]
        return {name: plain(vars_of(config)[name]) for name in names}
    if isinstance(config, Mapping):
        return {str(name): plain(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    if isinstance(config, enum.Enum):
        return config.value
    return str(config) if isinstance(config, Path) else config


def without_defaults(config: Any, *, keep_own: bool = False) -> Any:
    """`plain(config)`, less those keys of trainer configs (there are over a hundred) that stand at their defaults.

    `keep_own`: with the keys that alignkit adds to those of transformers. Defaults are those of a config made from its
    required keys alone, as its `__post_init__` leaves them.
    """
    values, shown = vars_of(config), plain(config)
    if not is_trainer_config(type(config)):
        sections = {name: value for name, value in values.items() if is_dataclass(value) and name in shown}
        return shown | {name: without_defaults(value, keep_own=keep_own) for name, value in sections.items()}
    fields = init_fields(config).values()
    required = {field.name for field in fields if field.default is MISSING and field.default_factory is MISSING}
    # With a device of its own: to find one, TrainingArguments resets accelerate's state, which a training is using.
    schema = type(type(config).__name__, (type(config),), {"_setup_devices": "cpu"})
    defaults = vars_of(schema(**{name: values[name] for name in required}))
    kept = own_keys(type(config)) if keep_own else []
    return {name: value for name, value in shown.items() if name in kept or values[name] != defaults[name]}


def vars_of(config: Any) -> dict[str, Any]:
    """Field values of a dataclass instance, slotted or not."""
    return {name: operator.attrgetter(name)(config) for name in init_fields(config)}


def dump(config: Any) -> str:
    """A config, or what `plain` makes of one, as YAML text."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=120)


def write_config(folder: Path, config: Any) -> None:
    """Save `config.yaml` in `folder`, for people and for `--config`; what resume compares is `run.json`."""
    target, text = folder / "config.yaml", dump(config)
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        write_text(target, text)


def write_resolved(
    folder: Path, config: Any, free: Collection[str] = (), *, advice: Mapping[str, str] | None = None
) -> None:
    """Claim `folder` for `config` (see `claim_config`) and save it as `config.yaml`."""
    claim_config(folder, config, free, advice=advice)
    write_config(folder, config)


def claim_config(
    folder: Path, config: Any, free: Collection[str] = (), *, advice: Mapping[str, str] | None = None
) -> None:
    """Claim `folder` for what is `comparable` of `config`; sections in `free` may differ.

    A key that the record of an earlier version lacks is no difference while it stands at its default.
    `advice` says by the key of a setting ("train.max_steps") how else to get what a changed value asks for. Raises
    ResumeError with the differences when results in the folder were made with another config.
    """
    ways = {f"config.{name}": way for name, way in (advice or {}).items()}
    new = new_keys(claimed(folder).get("config", {}), config, "config")
    claim(folder, {"config": comparable(config)}, free={*new, *(f"config.{name}" for name in free)}, advice=ways)


def new_keys(known: Any, value: Any, key: str) -> Iterator[str]:
    """Dotted keys of configs in `value` that stand at their default and that `known`, an earlier record, lacks."""
    if isinstance(value, list | tuple) and isinstance(known, list):
        for index, pair in enumerate(zip(known, value, strict=False)):
            yield from new_keys(*pair, f"{key}[{index}]")
    if not isinstance(known, Mapping):
        return
    is_config = is_dataclass(value) and not isinstance(value, type)
    parts = vars_of(value) if is_config else value if isinstance(value, Mapping) else {}
    for name, part in parts.items():
        if name in known:
            yield from new_keys(known[name], part, f"{key}.{name}")
        elif is_config:
            field = init_fields(value)[name]
            makes = field.default_factory is not MISSING
            default = field.default_factory() if makes else field.default  # type: ignore[misc]
            if part == default:
                yield f"{key}.{name}"


# Keys of a config that say where results go, and keys of a trainer that change no result.
_PLACES = {"out", "output_dir", "logging_dir", "cache_dir", "work", "table", "resume_from_checkpoint"}
_REPORTING = {
    *("logging_steps", "logging_strategy", "logging_first_step", "log_level", "log_level_replica", "log_on_each_node"),
    *("report_to", "run_name", "project", "trackio_space_id", "disable_tqdm", "save_total_limit", "push_to_hub"),
    *("hub_model_id", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision", "local_rank"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
}
_NAMES_OF_FILES = {"model", "options"}  # texts in these that name a file here are paths
_FOLDER = "a folder"


def comparable(config: Any) -> Any:
    """`plain(config)` as far as results depend on it, so that neither a moved run nor a relative path is a difference.

    Left out are the places of results, secrets, and keys of a trainer that only report. A file is compared by its
    content. A folder is only called one: models and data are compared by content as inputs of each stage.
    """
    return _comparable(config, is_path=False)


def _comparable(value: Any, *, is_path: bool) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        shown = {n: v for n, v in vars_of(value).items() if not n.endswith("_token") and n not in _PLACES | _REPORTING}
        return {name: _comparable(item, is_path=name in _NAMES_OF_FILES) for name, item in shown.items()}
    if isinstance(value, Mapping):
        return {str(name): _comparable(item, is_path=is_path) for name, item in value.items() if name != "cache"}
    if isinstance(value, list | tuple):
        return [_comparable(item, is_path=is_path) for item in value]
    if isinstance(value, Path):
        return content(value) if value.is_file() else _FOLDER  # also one that is not there yet
    if is_path and isinstance(value, str):
        return _FOLDER if os.path.isdir(value) else content(value)  # noqa: PTH112 - Path fails for long texts
    return plain(value)


def content(value: Any) -> Any:
    """Nested values in which each text that names files here, or sandbox weights, is "content" and a fingerprint.

    So a moved file, or another way to write its path, is no difference. A text that names none stays, as a hub id does.
    """
    if isinstance(value, Mapping):
        return {name: content(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [content(item) for item in value]
    path = model_path(str(value)) if isinstance(value, str | Path) else ""
    if path and os.path.exists(path):  # noqa: PTH110 - Path fails for long texts
        return f"{CONTENT} {fingerprint(Path(path))}"
    return str(value) if isinstance(value, Path) else value


_WHOLE, _SAMPLES, _SAMPLE, _COLUMN = 1 << 20, 16, 1 << 16, 1 << 26  # bytes, stretches, bytes, bytes
_TEXT_TABLES = (".jsonl", ".csv")


def fingerprint(path: Path, without: Collection[str] = ()) -> str:
    """16 hex digits that change when a file, or any file below a folder, is another one: names, sizes and bytes.

    Of files over 1 MiB sixteen evenly spaced stretches of 64 KiB are read, so large models cost milliseconds; trained
    weights differ everywhere, but an edit of a few bytes between the stretches goes unseen. Not so in tables: JSON
    lines and CSV files are read whole, and so is every column of a parquet file, such as labels, of at most 64 MiB.
    Cards (README.md and what is in `examples`) do not count: they are written again when more is known. Neither do the
    folders `without`.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    names = {file: file.relative_to(path) for file in files}
    left_out = {"examples", *without}
    cards = {file for file in files if file.name == "README.md" or left_out & set(names[file].parts)}
    return fingerprint_files({str(name): file for file, name in names.items() if file not in cards})


def fingerprint_files(files: Mapping[str, Path]) -> str:
    """`fingerprint` of files by the names that stand for them. Raises DataError for one that cannot be read."""
    digest = hashlib.sha256()
    for name, file in files.items():
        try:
            for piece in _pieces(file, name):
                digest.update(piece)
        except OSError as error:
            raise DataError(f"'{file}' cannot be read: {error}; correct its permissions") from error
    return digest.hexdigest()[:16]


def _pieces(file: Path, name: str) -> Iterator[bytes]:
    """What stands for a file in a fingerprint: its name, its size, and its bytes or stretches of them."""
    size = file.stat().st_size
    yield f"{name}\0{size}\0".encode()
    with file.open("rb") as stream:
        for start, length in _stretches(file, size):
            stream.seek(start)
            while length > 0 and (piece := stream.read(min(length, _WHOLE))):
                yield piece
                length -= len(piece)  # noqa: PLW2901


def _stretches(file: Path, size: int) -> list[tuple[int, int]]:
    """Start and length of the parts of a file that are read for its fingerprint."""
    if size <= _WHOLE or file.suffix.lower() in _TEXT_TABLES:
        return [(0, size)]
    samples = [(index * (size - _SAMPLE) // (_SAMPLES - 1), _SAMPLE) for index in range(_SAMPLES)]
    return samples + (_small_columns(file) if file.suffix.lower() == ".parquet" else [])


def _small_columns(file: Path) -> list[tuple[int, int]]:
    """Where the columns of a parquet file lie that have at most `_COLUMN` bytes; none in a damaged file."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        rows = parquet.read_metadata(file)
    except pa.ArrowException:
        return []  # what loads it says so
    chunks, sizes = [], Counter[str]()
    for number in range(rows.num_row_groups):
        group = rows.row_group(number)
        for column in (group.column(index) for index in range(group.num_columns)):
            start = column.dictionary_page_offset or column.data_page_offset
            chunks.append((column.path_in_schema, start, column.total_compressed_size))
            sizes[column.path_in_schema] += column.total_compressed_size
    return [(start, length) for name, start, length in chunks if sizes[name] <= _COLUMN]

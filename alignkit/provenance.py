"""What a result was made with: the resolved config as YAML, and fingerprints of models and data.

Deliberately not here: reading configs (`config`), and the record that resume compares (`storage.claim`).
"""

from __future__ import annotations

import enum
import hashlib
import operator
from collections.abc import Collection, Mapping
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from alignkit.config import init_fields, is_trainer_config, own_keys
from alignkit.storage import claim, write_text


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


def write_resolved(folder: Path, config: Any, free: Collection[str] = ()) -> None:
    """Claim `folder` for `config` (see `storage.claim`) and save it as `config.yaml`.

    Raises ResumeError with the differences when the folder was made with another config; sections of the config in
    `free` may differ.
    """
    claim(folder, {"config": plain(config)}, free={f"config.{name}" for name in free})
    write_config(folder, config)


_WHOLE, _SAMPLES, _SAMPLE = 1 << 20, 16, 1 << 16


def fingerprint(path: Path) -> str:
    """16 hex digits that change when a file, or any file below a folder, is another one: names, sizes and bytes.

    Of files over 1 MiB sixteen evenly spaced stretches of 64 KiB are read, so large models cost milliseconds; trained
    weights differ everywhere, but an edit of a few bytes between the stretches goes unseen.
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if file.name == "README.md" or "examples" in file.relative_to(path).parts:
            continue  # a card, which is written again when more is known
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE:
                digest.update(stream.read())
            for index in range(_SAMPLES if size > _WHOLE else 0):
                stream.seek(index * (size - _SAMPLE) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]

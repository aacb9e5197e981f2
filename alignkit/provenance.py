"""What a result was made with: the resolved config and the versions, saved beside it and compared on resume.

Deliberately not here: reading configs (`config`), and what a stage considers the same data (each stage's own manifest).
"""

from __future__ import annotations

import enum
import hashlib
import json
import operator
import os
import platform
from collections.abc import Collection, Mapping
from dataclasses import MISSING, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from alignkit.config import init_fields, is_trainer_config
from alignkit.errors import ResumeError, StorageError

_VERSIONS = ("alignkit", "torch", "transformers", "diffusers", "peft", "trl", "accelerate", "datasets", "numpy")


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


def without_defaults(config: Any) -> Any:
    """`plain(config)`, less those keys of trainer configs (there are over a hundred) that stand at their defaults.

    Defaults are those of a config made from its required keys alone, as its `__post_init__` leaves them.
    """
    values, shown = vars_of(config), plain(config)
    if not is_trainer_config(type(config)):
        sections = {name: value for name, value in values.items() if is_dataclass(value) and name in shown}
        return shown | {name: without_defaults(value) for name, value in sections.items()}
    fields = init_fields(config).values()
    required = {field.name for field in fields if field.default is MISSING and field.default_factory is MISSING}
    # With a device of its own: to find one, TrainingArguments resets accelerate's state, which a training is using.
    schema = type(type(config).__name__, (type(config),), {"_setup_devices": "cpu"})
    defaults = vars_of(schema(**{name: values[name] for name in required}))
    return {name: value for name, value in shown.items() if values[name] != defaults[name]}


def vars_of(config: Any) -> dict[str, Any]:
    """Field values of a dataclass instance, slotted or not."""
    return {name: operator.attrgetter(name)(config) for name in init_fields(config)}


def dump(config: Any) -> str:
    """A config, or what `plain` makes of one, as YAML text."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=120)


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the libraries a result depends on; imports none of them."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def claim(folder: Path, config: Any, free: Collection[str] = ()) -> None:
    """Save `config.yaml` in `folder`: a result keeps the config that it was made with.

    Raises ResumeError showing the difference when another config is there already; sections in `free` may differ.
    """
    target, text = folder / "config.yaml", dump(config)
    if target.exists():
        old, new = yaml.safe_load(target.read_text(encoding="utf-8")), yaml.safe_load(text)
        kept = [{name: value for name, value in side.items() if name not in free} for side in (old, new)]
        changed = differences(*kept)
        if changed:
            lines = "\n  ".join(changed)
            advice = "Use the old values to continue it, or another folder."
            raise ResumeError(f"'{folder}' was made with another config:\n  {lines}\n{advice}")
        if old == new:
            return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(target, text)


def write_resolved(folder: Path, config: Any, free: Collection[str] = ()) -> None:
    """`claim` the folder, and save `versions.json` beside the config. (A data stage writes its own `versions.json`.)"""
    claim(folder, config, free)
    if not (folder / "versions.json").exists():
        write_text(folder / "versions.json", json.dumps(versions(), indent=2, sort_keys=True) + "\n")


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
            continue  # a card, which is written anew when more is known
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE:
                digest.update(stream.read())
            for index in range(_SAMPLES if size > _WHOLE else 0):
                stream.seek(index * (size - _SAMPLE) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]


def claim_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    """Save `inputs.json` in `folder`, once: which models and data, by fingerprint, its results come from.

    Raises ResumeError naming those that are others now.
    """
    target = folder / "inputs.json"
    if target.exists():
        changed = differences(json.loads(target.read_text(encoding="utf-8")), dict(inputs))
        if changed:
            lines = "\n  ".join(changed)
            raise ResumeError(f"'{folder}' was made from other models or data:\n  {lines}\nUse another folder.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(target, json.dumps(dict(inputs), indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` so that `path` is either the old file or the whole new one; raises StorageError on a full disk."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # of its own: several processes may write the same
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        advice = "free some space or choose another folder"
        raise StorageError(f"cannot write '{path}': {error.strerror}; {advice}") from error


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """Lines `key: old -> new` for every leaf that differs."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{key}: {old!r} -> {new!r}"]
    names = list(dict.fromkeys([*old, *new]))
    return [
        line
        for name in names
        for line in differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    ]

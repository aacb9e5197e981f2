"""The help page of a verb: keys of its config with type, default and meaning.

Meanings come from the docstrings of the config's dataclasses and from `metadata["help"]` of their fields.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, is_dataclass
from typing import Any

from alignkit.config import describe, init_fields, is_trainer_config, own_keys
from alignkit.provenance import plain

_REQUIRED = "(required)"
_OUT = [
    f"  --out  path  {_REQUIRED}",
    "        the folder of checkpoints, logs and the result; run again, it continues",
]


def help_text(name: str, summary: str, schema: Any, *, flat: str = "") -> str:
    """Usage of the verb `name` with every key of `schema`; those of the section `flat` stand at the top."""
    lines = [f"usage: alignkit {name} [--config FILE.yaml] [--key value ...] [--dry-run]", "", summary, ""]
    return "\n".join([*lines, *(_OUT if flat else []), *_key_lines(schema, "", flat)])


def _key_lines(schema: Any, prefix: str, flat: str = "", required: str = _REQUIRED) -> Iterator[str]:
    """Plain keys first, then section by section; in a trainer's config alignkit's keys before those of transformers.

    `required` stands for the default of a key that has none; a section may say its own (`metadata["required"]`).
    """
    hints, notes, fields = typing.get_type_hints(schema), _notes(schema), init_fields(schema)
    sections = {name: _section(hints[name]) for name in fields}
    own = own_keys(schema) if is_trainer_config(schema) else []
    fields = {name: fields[name] for name in [*own, *fields] if name in fields and name != "output_dir"}  # it is `out`
    for name, field in fields.items():
        if sections[name] is None or sections[name][1]:
            yield f"  --{prefix}{name}  {describe(hints[name])}  {_default(field) or required}"
            note = str(field.metadata.get("help", notes.get(name, "")))
            yield from textwrap.wrap(" ".join(note.split()), 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
    nested = {name: found for name, found in sections.items() if found}
    for name, (section, suffix) in sorted(nested.items(), key=lambda item: item[0] != flat):
        first = (inspect.getdoc(section) or "").split("\n", maxsplit=1)[0]
        yield f"\n{prefix}{name}{suffix}: {notes.get(name) or first}"
        inside = "(required with this section)" if _default(fields[name]) else required
        inside = str(fields[name].metadata.get("required", inside))
        yield from _key_lines(section, "" if name == flat else f"{prefix}{name}{suffix}.", required=inside)


def _section(annotation: Any) -> tuple[Any, str] | None:
    """The dataclass that `annotation` is, may be, or holds many of, and what stands for one of many in a key."""
    if is_dataclass(annotation):
        return annotation, ""
    origin = typing.get_origin(annotation)
    many = {Sequence: "[]", list: "[]", tuple: "[]", Mapping: ".NAME", dict: ".NAME"}
    inner = [found for arm in typing.get_args(annotation) if (found := _section(arm)) is not None]
    return (inner[0][0], many.get(origin, "")) if inner else None


def _notes(schema: Any) -> dict[str, str]:
    """Meanings of keys by the docstrings of a dataclass and its bases: lines `name: meaning`, else a sentence."""
    notes: dict[str, str] = {}
    for base in reversed([base for base in schema.__mro__ if is_dataclass(base)]):
        doc = inspect.cleandoc(vars(base)["__doc__"] or "")
        sentences = re.split(r"(?<=\.)\s+", " ".join(doc.split()))
        mentioned = {name: next((s for s in sentences if f"`{name}`" in s), "") for name in init_fields(base)}
        lines = re.findall(r"^(\w+): (.+(?:\n[ ]+\S.*)*)", doc, flags=re.MULTILINE)
        notes |= {name: note for name, note in [*mentioned.items(), *lines] if note}
    return notes


def _default(field: Field[Any]) -> str:
    """The default in brackets; empty where there is none."""
    if field.default is MISSING and field.default_factory is MISSING:
        return ""
    value = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
    return f"[{plain(value)}]" if value != "" else "['']"

"""The keys of a trainer's config from its source text: importing it would load torch, which a help page need not.

Read are the dataclass and its bases up to `transformers.TrainingArguments`, whose keys are left out. Deliberately not
here: the help page (`help_text`), and checks of values, for which the class itself is imported.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import operator
from collections.abc import Callable
from dataclasses import Field, dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

Entry = tuple[str, Any, "Field[Any]"]

_OUTSIDE = ("transformers", "trl")
_TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str, "dict": dict, "Path": Path, "Any": Any}


@dataclass(frozen=True)
class _Source:
    """A default that is an expression in the source, shown as it is written."""

    text: str

    def __str__(self) -> str:
        return self.text


def outline(target: str) -> type:
    """A dataclass with the keys, defaults and help of `module:Class` and its bases, without importing any of them.

    Raises ImportError where the module's source is not there, LookupError where it does not define the class.
    """
    module, _, name = target.partition(":")
    entries = _entries(module, name)
    doc = ast.get_docstring(_class(module, name)) or ""
    return make_dataclass(name, list(entries.values()), kw_only=True, namespace={"__doc__": doc})


@functools.cache
def _module(name: str) -> ast.Module:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin:
        raise ImportError(f"no source of module '{name}'", name=name)
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def _class(module: str, name: str) -> ast.ClassDef:
    for node in _module(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"module '{module}' defines no class '{name}'")


def _entries(module: str, name: str) -> dict[str, Entry]:
    """The fields of a class, then those of its bases that it does not define again."""
    node = _class(module, name)
    entries: dict[str, Entry] = {}
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
            entries[line.target.id] = (line.target.id, _annotation(line.annotation), _field(line.value))
    imports = [line for line in _module(module).body if isinstance(line, ast.ImportFrom)]
    owners = {alias.name: line.module or "" for line in imports for alias in line.names}
    for base in [base.id for base in node.bases if isinstance(base, ast.Name)]:
        owner = owners.get(base, module)
        if owner.partition(".")[0] not in _OUTSIDE:
            entries |= {key: entry for key, entry in _entries(owner, base).items() if key not in entries}
    return entries


def _annotation(node: ast.expr) -> Any:
    """The type that an annotation means; str for a name that is not a plain one (an enum of transformers)."""
    if isinstance(node, ast.BinOp):
        return operator.or_(_annotation(node.left), _annotation(node.right))
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "list":
        return list[_annotation(node.slice)]  # type: ignore[misc]
    if isinstance(node, ast.Constant) and node.value is None:
        return type(None)
    return _TYPES.get(ast.unparse(node), str)


def _field(value: ast.expr) -> Field[Any]:
    """`field(default=..., metadata={"help": ...})`, or a plain default, with the same default and help."""
    if not isinstance(value, ast.Call):
        return _with_default(value, {})
    words = {word.arg: word.value for word in value.keywords}
    metadata = ast.literal_eval(words["metadata"]) if "metadata" in words else {}
    if "default" in words:
        return _with_default(words["default"], metadata)
    factory = words.get("default_factory", value)
    return _with_default(factory.body if isinstance(factory, ast.Lambda) else factory, metadata)


def _with_default(node: ast.expr, metadata: dict[str, Any]) -> Field[Any]:
    try:
        default = ast.literal_eval(node)
    except ValueError:
        default = _Source(ast.unparse(node))
    make: Callable[[], Any] = lambda: default  # noqa: E731 - a mutable default, such as a mapping
    made: Field[Any] = field(default_factory=make, metadata=metadata)
    return made

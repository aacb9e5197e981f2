"""The keys of a trainer's config from its source text: importing it would load torch, which a help page need not.

Read are the dataclass and its bases up to `transformers.TrainingArguments`, whose keys are left out. Deliberately not
here: the help page (`help_text`), and checks of values, for which the class itself is imported.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import operator
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
            read = _field(line.value, _constants(module))
            entries[line.target.id] = (line.target.id, _annotation(line.annotation), read)
    imports = [line for line in _module(module).body if isinstance(line, ast.ImportFrom)]
    owners = {alias.name: line.module or "" for line in imports for alias in line.names}
    named = [(owners.get(base.id, module), base.id) for base in node.bases if isinstance(base, ast.Name)]
    bases = [_entries(owner, base) for owner, base in named if owner.partition(".")[0] not in _OUTSIDE]
    for number, inherited in enumerate(bases):
        later = {*entries}.union(*bases[number + 1 :])  # what bases share comes last, as in a method resolution order
        entries |= {key: entry for key, entry in inherited.items() if key not in later}
    return entries


def _annotation(node: ast.expr) -> Any:
    """The type that an annotation means; str for a name that is not a plain one (an enum of transformers)."""
    if isinstance(node, ast.BinOp):
        return operator.or_(_annotation(node.left), _annotation(node.right))
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "list":
        return list[_annotation(node.slice)]  # type: ignore[misc]
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) and ast.unparse(node.value) == "dict":
        return dict[_annotation(node.slice.elts[0]), _annotation(node.slice.elts[1])]  # type: ignore[misc]
    if isinstance(node, ast.Constant) and node.value is None:
        return type(None)
    return _TYPES.get(ast.unparse(node), str)


@functools.cache
def _constants(module: str) -> dict[str, Any]:
    """Names of literals in the module, its package's imported ones too, which defaults and help texts may use."""
    known: dict[str, Any] = {}
    for node in _module(module).body:
        names = [alias.name for alias in node.names if alias.name.isupper()] if isinstance(node, ast.ImportFrom) else []
        if names and isinstance(node, ast.ImportFrom) and (node.module or "").startswith(module.partition(".")[0]):
            imported = _constants(node.module or "")
            known |= {name: imported[name] for name in names if name in imported}
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = _literal(node.value, known)
            known |= {} if isinstance(value, _Source) else {node.targets[0].id: value}
    return known


def _literal(node: ast.expr, constants: dict[str, Any]) -> Any:
    """The value of a literal, of a constant, or of an f-string of them; any other expression as it is written."""
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    if isinstance(node, ast.FormattedValue):
        spec = _literal(node.format_spec, constants) if node.format_spec else ""
        value = _literal(node.value, constants)
        return str(value) if isinstance(value, _Source) else format(value, str(spec))
    if isinstance(node, ast.JoinedStr):
        return "".join(str(_literal(part, constants)) for part in node.values)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _Source(ast.unparse(node))


def _field(value: ast.expr, constants: dict[str, Any]) -> Field[Any]:
    """`field(default=..., metadata={"help": ...})`, or a plain default, with the same default and help."""
    words = {word.arg: word.value for word in value.keywords} if isinstance(value, ast.Call) else {"default": value}
    given = words.get("metadata")
    entries = zip(given.keys, given.values, strict=True) if isinstance(given, ast.Dict) else ()
    metadata = {_literal(key, constants): _literal(text, constants) for key, text in entries if key is not None}
    factory = words.get("default", words.get("default_factory", value))
    default = _literal(factory.body if isinstance(factory, ast.Lambda) else factory, constants)
    made: Field[Any] = field(default_factory=lambda: default, metadata=metadata)
    return made

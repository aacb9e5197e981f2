"""YAML -> a tree of values that know their file and line, within bounds and without Python objects.

Only what a config needs is read: text, numbers, booleans, null, lists and mappings with names as keys. Dates and
base-60 numbers (`2026-01-31`, `16:9`) stay text. Aliases work, but what they stand for counts each time.
Deliberately not here: which keys there are (`config`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignkit.errors import ConfigError, MissingFileError

MAX_BYTES = 256 << 10
MAX_VALUES = 20_000
MAX_DEPTH = 50
MAX_DIGITS = 40
TAG = "tag:yaml.org,2002:"
DECIMAL = re.compile(r"[-+]?(0|[1-9][\d_]*)|0[xb].*")


@dataclass(frozen=True, slots=True)
class Located:
    """A value and where it came from. Mappings and lists hold Located values; `text` marks a flag not yet parsed.

    `word` is what was written for a boolean, where that was yes, no, on or off.
    """

    value: Any
    where: str
    text: bool = False
    word: str | None = None


def read_yaml(path: Path, problems: list[str]) -> dict[str, Located]:
    """The mapping in a YAML file with file and line of every value; duplicate keys are appended to `problems`.

    Raises MissingFileError, or ConfigError with file and line for what is too large or cannot be read.
    """
    tree = parse_yaml(_text(path), str(path), problems)
    if tree.value is None:
        return {}
    if not isinstance(tree.value, dict):
        shown = "a list" if isinstance(tree.value, list) else repr(tree.value)
        raise ConfigError(f"{path}: must hold 'key: value' lines, not {shown}")
    return tree.value


def parse_yaml(text: str, source: str, problems: list[str], *, lines: bool = True) -> Located:
    """The value of YAML text; `source` and (unless `lines` is false) the line go into places and messages."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_message(error, text, source, lines=lines)) from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested over {MAX_DEPTH} deep, the limit; write it flatter") from error
    return Located(None, source) if node is None else _Reader(source, lines, problems).locate(node)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise MissingFileError(f"config file '{path}' does not exist or is no file; give one with --config") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: over {MAX_BYTES >> 10} KiB, the limit for a config; is it the right file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error


def _syntax_message(error: yaml.YAMLError, text: str, source: str, *, lines: bool) -> str:
    line, what = 1, " ".join(str(error).split())
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        line = error.problem_mark.line + 1
        what = " ".join(f"{error.problem or ''} {error.context or ''}".split())
    elif isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        what = f"the character {text[error.position]!r} is not allowed"
    advice = "; indent with spaces, not tabs" if "\\t" in what else ""
    return f"{source}{f':{line}' if lines else ''}: not valid YAML: {what}{advice}"


@dataclass(slots=True)
class _Reader:
    """Nodes of PyYAML -> Located values, counted."""

    source: str
    lines: bool
    problems: list[str]
    values: int = 0

    def where(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}" if self.lines else self.source

    def locate(self, node: yaml.Node, depth: int = 0) -> Located:
        where = self.where(node)
        self.values += 1
        if depth > MAX_DEPTH:
            raise ConfigError(f"{where}: nested over {MAX_DEPTH} deep, the limit; does an anchor (&) contain itself?")
        if self.values > MAX_VALUES:
            raise ConfigError(f"{where}: over {MAX_VALUES} values, the limit; an alias (*) counts with all its content")
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, where)
        _require_tag(node, ("seq", "map"), where)
        if isinstance(node, yaml.SequenceNode):
            return Located([self.locate(item, depth + 1) for item in node.value], where)
        return Located(self.mapping(node, depth), where)

    def mapping(self, node: yaml.Node, depth: int) -> dict[str, Located]:
        mapping: dict[str, Located] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{self.where(key)}: a key must be a name, not a list or a mapping; quote braces")
            if key.value in mapping:
                first = f"(first at {mapping[key.value].where})"
                self.problems.append(f"{self.where(key)}: '{key.value}' is given twice {first}; keep one")
            mapping[key.value] = self.locate(value, depth + 1)
        return mapping


def _require_tag(node: yaml.Node, known: tuple[str, ...], where: str) -> str:
    kind = node.tag.removeprefix(TAG)
    if kind not in known:
        raise ConfigError(f"{where}: the tag '{node.tag.replace(TAG, '!!')}' is not read; write a plain value")
    return str(kind)


def _scalar(node: yaml.ScalarNode, where: str) -> Located:
    kind = _require_tag(node, ("str", "int", "float", "bool", "null", "timestamp", "value", "merge"), where)
    text: str = node.value
    if kind in ("int", "float") and ":" not in text:
        return Located(_number(kind, text, where), where)
    if kind == "bool":
        value = yaml.SafeLoader.bool_values[text.lower()]
        return Located(value, where, word=None if text.lower() in ("true", "false") else text)
    if kind == "null":
        return Located(None, where)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{where}: {text!r} holds half of a character; write the whole one")
    return Located(text, where)


def _number(kind: str, text: str, where: str) -> int | float:
    if len(text) > MAX_DIGITS:
        raise ConfigError(f"{where}: a number of {len(text)} characters; the limit is {MAX_DIGITS}")
    if kind == "int":
        if not DECIMAL.fullmatch(text):
            raise ConfigError(f"{where}: {text} starts with 0, which is base 8 in YAML; write it without, or quote it")
        return int(text.replace("_", ""), 0)
    words = {".inf": math.inf, "-.inf": math.inf, "+.inf": math.inf, ".nan": math.nan}
    value = words[text.lower()] if text.lower() in words else float(text.replace("_", ""))
    if not math.isfinite(value):
        raise ConfigError(f"{where}: {text} is no finite number; give one, or null")
    return value

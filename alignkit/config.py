"""Strict configuration: dataclasses from a YAML file and flags, with every problem reported at once.

Unknown, abbreviated, duplicate and wrongly typed keys are errors naming the file, the line and the nearest valid key.
Sections are nested dataclasses in YAML and dotted flags on the command line (`--sampling.steps 20`); flags win. A list
is several words (`--lora_targets to_q to_k`) or YAML (`'[to_q, to_k]'`). Names of other libraries are in `key_names`.
Deliberately not here: what the keys mean (each dataclass lives beside its owner) and any import of torch.
"""

from __future__ import annotations

import collections.abc
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from alignkit.errors import ConfigError, nearest
from alignkit.key_names import advice, with_own_names
from alignkit.yaml_tree import Located, parse_yaml, read_yaml

Config = TypeVar("Config")

_BAD: Any = object()
_MOST_NAMES = 20  # that a message lists
_LISTED = " `--help` lists the keys."
_LISTS = (list, tuple, collections.abc.Sequence)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def load(
    schema: type[Config], argv: Sequence[str] = (), *, file: Path | None = None, base: Mapping[str, Any] | None = None
) -> Config:
    """Build `schema` from `base` (plain defaults), then `file`, then flags in `argv`, later ones winning.

    Raises ConfigError listing every problem found in all of them.
    """
    problems: list[str] = []
    tree = read_tree(argv, file, problems, base=base)
    return build(schema, tree, problems)


def read_tree(
    argv: Sequence[str], file: Path | None, problems: list[str], *, base: Mapping[str, Any] | None = None
) -> dict[str, Located]:
    """The merged, still untyped tree of `base`, `file` and flags; what is wrong is appended to `problems`."""
    tree: dict[str, Located] = {k: _located(v, "default") for k, v in (base or {}).items()}
    if file is not None:
        tree.update(read_yaml(file, problems))
    for key, flag in _read_flags(argv, problems).items():
        _place(tree, key.split("."), flag, problems)
    return tree


def build(schema: type[Config], tree: Mapping[str, Located], problems: list[str]) -> Config:
    """`schema` from a tree; raises ConfigError with `problems` and all that the types add to them."""
    config = _coerce_dataclass(Located(dict(tree), "config"), schema, "", problems)
    if len(problems) > 1:
        raise ConfigError(f"{len(problems)} problems:", *(f"  {problem}" for problem in problems))
    if problems:
        raise ConfigError(problems[0])
    return typing.cast("Config", config)


# --- reading --------------------------------------------------------------------------------------------------------


def _located(value: Any, where: str) -> Located:
    if isinstance(value, Mapping):
        return Located({str(k): _located(v, where) for k, v in value.items()}, where)
    if isinstance(value, list | tuple):
        return Located([_located(item, where) for item in value], where)
    return Located(value, where)


def _read_flags(argv: Sequence[str], problems: list[str]) -> dict[str, Located]:
    """Flags by key: True for one without a value, the text of one value, a list of several."""
    flags: dict[str, Located] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            problems.append(f"unexpected word '{word}': flags are '--key value', a list is '--key a b c'")
            continue
        name, equals, value = word[2:].partition("=")
        key = name.replace("-", "_")
        values = [value] if equals else []
        while words and not equals and not words[0].startswith("--"):
            values.append(words.pop(0))
        if key in flags:
            problems.append(f"flag --{name} is given twice; keep one")
        where = f"flag --{name}"
        texts = [Located(value, where, text=True) for value in values]
        flags[key] = texts[0] if len(texts) == 1 else Located(texts or True, where)
    return flags


def _place(tree: dict[str, Located], path: list[str], flag: Located, problems: list[str]) -> None:
    """Set a flag at its dotted path, making the sections on the way."""
    for key in path[:-1]:
        section = tree.get(key, Located({}, flag.where))
        section = parse_yaml(section.value, section.where, problems, lines=False) if section.text else section
        if section.value is not None and not isinstance(section.value, dict):
            problems.append(f"{flag.where}: '{key}' is {_show(section)} at {section.where}, not a section")
            return
        # A copy: an anchor in the file may share one mapping between several sections.
        tree[key] = Located(dict(section.value or {}), section.where)
        tree = tree[key].value
    tree[path[-1]] = flag


# --- types ----------------------------------------------------------------------------------------------------------


def coerce(given: Located, annotation: Any, key: str, problems: list[str]) -> Any:
    """`given` as a value of `annotation`; what does not fit is appended to `problems` under the name `key`."""
    origin = typing.get_origin(annotation) or annotation
    if origin in (Union, types.UnionType):
        return _coerce_union(given, annotation, key, problems)
    if given.text and origin not in (str, Path, Literal) and not _is_enum(origin):
        word, given = given, parse_yaml(given.value, given.where, problems, lines=False)
        if origin in _LISTS and isinstance(given.value, str | int | float):
            given = Located([word], word.where)  # a list of one
    if is_dataclass(origin):
        return _coerce_dataclass(given, typing.cast("type", origin), key, problems)
    if origin in _LISTS:
        return _coerce_list(given, annotation, key, problems)
    if origin in (dict, Mapping, collections.abc.Mapping):
        return _coerce_mapping(given, annotation, key, problems)
    value = _coerce_scalar(given, annotation)
    if value is _BAD:
        _complain(given, annotation, key, problems)
    return value


def _complain(given: Located, annotation: Any, key: str, problems: list[str]) -> Any:
    hint = " (quote it)" if given.word or (annotation is str and isinstance(given.value, int | float | bool)) else ""
    choices = [str(choice) for choice in _choices(annotation)]
    if annotation is int and type(given.value) is int:
        hint = " (it must fit in 64 bits)"
    if choices and isinstance(given.value, str):
        hint = f".{nearest(given.value, choices)}"
    problems.append(f"{given.where}: {key} must be {describe(annotation)}, not {_show(given)}{hint}")
    return _BAD


def _coerce_scalar(given: Located, annotation: Any) -> Any:
    value = given.value
    if annotation in (Any, object):
        return plain_tree(given)
    if _choices(annotation):
        matches = [c for c in _choices(annotation) if c == value or (given.text and str(c) == value)]
        matches = [c for c in matches if isinstance(c, bool) == isinstance(value, bool) or given.text]
        return (annotation(matches[0]) if _is_enum(annotation) else matches[0]) if matches else _BAD
    if annotation is Path and isinstance(value, str) and value and "\0" not in value:
        return _path(value)
    if annotation is float:
        return _float(value)
    annotation = type(None) if annotation is None else annotation
    # Exact types: bool is an int to Python, never to a reader.
    fits = type(value) is annotation and (annotation is not int or -(2**63) <= value < 2**63)
    return value if fits else _BAD


def _path(value: str) -> Path:
    """With `~` at the start as the home folder; a name that only looks like one (`~x`, no such user) stays."""
    try:
        return Path(value).expanduser()
    except RuntimeError:
        return Path(value)


def _float(value: Any) -> Any:
    """A finite number. YAML 1.1 reads `1e-4` as text, so text that is wholly a number counts as one."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number and not (isinstance(value, str) and _NUMBER.fullmatch(value)):
        return _BAD
    try:
        number = float(value)
    except OverflowError:
        return _BAD
    return number if math.isfinite(number) else _BAD


def _coerce_union(given: Located, annotation: Any, key: str, problems: list[str]) -> Any:
    """The first arm that fits; text is tried last, so `--x null` is None and `--x 3` an int where both may be."""
    rank = {type(None): -1, float: 1, str: 2, Path: 2}
    arms = sorted(typing.get_args(annotation), key=lambda arm: rank.get(arm, 0))
    if str in arms and given.text and not given.value.startswith("["):  # `--report_to tensorboard` is no list
        arms = [arm for arm in arms if (typing.get_origin(arm) or arm) not in _LISTS]
    if any(_is_enum(arm) for arm in arms):  # transformers writes `IntervalStrategy | str` and means the former
        arms = [arm for arm in arms if arm is not str]
    if isinstance(given.value, dict):  # no list takes it, so what is wrong in it can be said
        arms = [arm for arm in arms if (typing.get_origin(arm) or arm) not in _LISTS]
    real = [arm for arm in arms if arm is not type(None)]
    for arm in arms:
        own: list[str] = []
        try:
            value = coerce(given, arm, key, own)
        except ConfigError:  # text that is no YAML may still be plain text
            continue
        if not own:
            return value
    if len(real) == 1:
        return coerce(given, real[0], key, problems)
    return _complain(given, annotation, key, problems)


def _coerce_list(given: Located, annotation: Any, key: str, problems: list[str]) -> Any:
    if not isinstance(given.value, list):
        return _complain(given, annotation, key, problems)
    item = (*typing.get_args(annotation), Any)[0]
    values = [coerce(value, item, f"{key}[{i}]", problems) for i, value in enumerate(given.value)]
    return tuple(values) if (typing.get_origin(annotation) or annotation) is not list else values


def _coerce_mapping(given: Located, annotation: Any, key: str, problems: list[str]) -> Any:
    if not isinstance(given.value, dict):
        return _complain(given, annotation, key, problems)
    item = (*typing.get_args(annotation), Any, Any)[1]
    return {name: coerce(value, item, f"{key}.{name}", problems) for name, value in given.value.items()}


def _coerce_dataclass(given: Located, schema: type, key: str, problems: list[str]) -> Any:
    if not isinstance(given.value, dict):
        return _complain(given, schema, key, problems)
    known, hints = init_fields(schema), typing.get_type_hints(schema)
    before, values = len(problems), {}
    prefix = f"{key}." if key else ""
    tree = with_own_names(given.value, known, problems, prefix)
    for name, value in tree.items():
        if name in known:
            values[name] = coerce(value, hints[name], prefix + name, problems)
        else:
            problems.append(f"{value.where}: unknown key '{prefix}{name}'.{suggest(name, schema)}")
    absent = [name for name, field in known.items() if name not in tree and _required(field)]
    problems += [
        f"{given.where}: key '{prefix}{name}' is missing: give it as a flag or in the file of --config; see --help"
        for name in absent
    ]
    if len(problems) > before:
        return _BAD
    return _construct(schema, values, f"{given.where}: {key}" if key else given.where, problems)


def _construct(schema: type, values: dict[str, Any], where: str, problems: list[str]) -> Any:
    try:
        if is_trainer_config(schema):
            from trl.scripts.utils import TrlParser

            return TrlParser(typing.cast("Any", schema)).parse_dict(values)[0]
        return schema(**values)
    except (ValueError, ImportError) as error:
        problems.append(f"{where}: {error}")
        return _BAD


# --- looking at schemas and values ----------------------------------------------------------------------------------


def init_fields(schema: Any) -> dict[str, Field[Any]]:
    """The fields of a dataclass that its constructor takes."""
    return {f.name: f for f in fields(schema) if f.init}


def suggest(name: str, schema: type) -> str:
    """` Did you mean 'x'?` among the keys of `schema`, then among the last words of those in its sections.

    For a key that was renamed, or that belongs to TRL and has no counterpart, what to write instead.
    """
    known, hints = init_fields(schema), typing.get_type_hints(schema)
    hint = advice(name, known) or nearest_key(name, known)
    if not hint.startswith((" Known", _LISTED)):
        return hint
    sections = [(key, hints[key]) for key in known if is_dataclass(hints[key])]
    inner = {leaf: f"{key}.{leaf}" for key, section in sections for leaf in init_fields(section)}
    close = difflib.get_close_matches(name, inner, n=1, cutoff=0.7)
    return f" Did you mean '{inner[close[0]]}'?" if close else hint


def nearest_key(name: str, known: Collection[str]) -> str:
    """What `nearest` says of a key; with more keys than a message should list, where they are listed."""
    hint = nearest(name, known)
    return _LISTED if hint.startswith(" Known") and len(known) > _MOST_NAMES else hint


def is_trainer_config(schema: type) -> bool:
    """Whether a config extends `transformers.TrainingArguments`; told without importing it."""
    return any(base.__module__ == "transformers.training_args" for base in schema.__mro__)


def own_keys(schema: type) -> list[str]:
    """The keys that classes other than `transformers.TrainingArguments` declare, those of derived classes first."""
    bases = [base for base in schema.__mro__ if not base.__module__.startswith("transformers.")]
    return list(dict.fromkeys(name for base in bases for name in vars(base).get("__annotations__", {})))


def describe(annotation: Any) -> str:
    """A short name of a type for help and messages: `int`, `list of str`, `'a' | 'b'`, `int or null`."""
    origin, arms = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        named = any(_is_enum(arm) for arm in arms)
        names = [describe(arm) for arm in arms if arm is not type(None) and not (named and arm is str)]
        return " or ".join(names + ["null"] * (type(None) in arms))
    if _choices(annotation):
        return " | ".join(str(c) for c in _choices(annotation))
    if origin in (list, tuple, collections.abc.Sequence):
        return f"list of {describe(arms[0])}"
    if origin in (dict, collections.abc.Mapping):
        return f"mapping of name to {describe(arms[1])}"
    if is_dataclass(annotation):
        return f"section {typing.cast('type', annotation).__name__}"
    short: dict[Any, str] = {Path: "path", Any: "any", dict: "mapping"}
    return str(short.get(annotation) or annotation.__name__)


def plain_tree(given: Located) -> Any:
    """The value without its places. A flag inside is parsed; the words of a list of flags stay words."""
    given = parse_yaml(given.value, given.where, [], lines=False) if given.text else given
    if isinstance(given.value, dict):
        return {name: plain_tree(value) for name, value in given.value.items()}
    if isinstance(given.value, list):
        return [item.value if item.text else plain_tree(item) for item in given.value]
    return given.value


def _choices(annotation: Any) -> Iterable[Any]:
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    return [member.value for member in annotation] if _is_enum(annotation) else ()


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _show(given: Located) -> str:
    if isinstance(given.value, dict | list):
        return "a section" if isinstance(given.value, dict) else "a list"
    shown = "nothing" if given.value is None else repr(given.value)
    return f"{shown}, which YAML makes of '{given.word}'" if given.word else shown

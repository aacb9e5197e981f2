"""What every verb does alike: read `--config` and flags, answer `--help` and `--dry-run`, or work.

Where a key goes, by the example of `alignkit train METHOD --learning_rate 1e-4`: `read_tree` merges the config file and
the flags into one tree of untyped values, each with its place in the file. `Verb.schema` returns the config class, and
may move keys in the tree: `train` finds `learning_rate` among the fields of the method's trainer config and moves it
into the section `train`; a run has it there already (`--train.learning_rate`). `build` then makes the typed config,
with the trainer's config in it. `Verb.work` passes that to the trainer, which is a `transformers.Trainer`.

Deliberately not here: what a verb does (its own module) and how names become models (`specs`).
"""

from __future__ import annotations

import inspect
import os
import re
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from alignkit.config import Located, build, describe, init_fields, read_tree
from alignkit.errors import ConfigError
from alignkit.provenance import dump, plain, without_defaults
from alignkit.shipped import shipped_file
from alignkit.storage import write_text

Job = TypeVar("Job")
Tree = dict[str, Located]


@dataclass(frozen=True, slots=True)
class Verb(Generic[Job]):
    """A verb of the program: its config, what it would do in words, and the doing of it.

    `schema` gets the untyped tree, which it may also put in order, for verbs whose keys depend on a method. Only a
    `distributed` verb works in several processes of torchrun or `accelerate launch`.
    """

    name: str
    summary: str
    schema: Callable[[Tree, list[str]], type[Job]]
    plan: Callable[[Job], list[str]]
    work: Callable[[Job], None]
    flat: str = ""  # a section whose keys stand at the top
    distributed: bool = False


def execute(verb: Verb[Job], argv: Sequence[str]) -> None:
    """Run `verb` with `argv`: `--help`, `--dry-run`, or the work itself. Raises ConfigError for bad keys and flags."""
    problems: list[str] = []
    words, switches, file = _split(argv, problems)
    tree = read_tree(words, file, problems)
    schema = verb.schema(tree, problems)
    if "--help" in switches:
        print(help_text(verb, schema))
        return
    job = build(schema, tree, problems)
    if "--dry-run" in switches:
        print(f"# alignkit {verb.name}, resolved config (keys of a trainer at their default are left out)")
        print(dump(without_defaults(job)).rstrip())
        print("\n".join(["# what would be done", *(f"# - {line}" for line in verb.plan(job))]))
        return
    if not verb.distributed:
        require_one_process(verb.name)
    verb.work(job)


def is_dry_run(argv: Sequence[str]) -> bool:
    """Whether the flags ask for a dry run, which imports no code that a config names."""
    return not {"--dry-run", "--dry_run"}.isdisjoint(argv)


def require_one_process(verb: str) -> None:
    """ConfigError under torchrun or `accelerate launch` (WORLD_SIZE above 1): all processes would write one folder."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes not in ("", "0", "1"):
        raise ConfigError(
            f"`alignkit {verb}` runs in one process, and WORLD_SIZE is {processes}: each process that torchrun or "
            f"accelerate started would write the same files. Run `alignkit {verb}` without them; only a training runs "
            "in several processes: torchrun ... -m alignkit train METHOD --data FOLDER"
        )


def _split(argv: Sequence[str], problems: list[str]) -> tuple[list[str], set[str], Path | None]:
    """Flags of the config apart from `--help`, `--dry-run` and `--config FILE`."""
    words, rest, files = list(argv), [], []
    switches = {"-h": "--help", "--help": "--help", "--dry-run": "--dry-run", "--dry_run": "--dry-run"}
    chosen = {switches[word] for word in words if word in switches}
    words = [word for word in words if word not in switches]
    while words:
        name, equals, value = words.pop(0).partition("=")
        if name != "--config":
            rest.append(f"{name}{equals}{value}")
        elif not equals and not words:
            problems.append("flag --config needs a file: --config configs/demo.yaml")
        else:
            files.append(value if equals else words.pop(0))
    if len(files) > 1:
        raise ConfigError(f"flag --config is given {len(files)} times ({', '.join(files)}); keep one")
    return rest, chosen, shipped_file(Path(files[0])) if files else None


# --- help -----------------------------------------------------------------------------------------------------------


def help_text(verb: Verb[Any], schema: Any) -> str:
    """Usage of a verb with every key: type, default and meaning."""
    lines = [f"usage: alignkit {verb.name} [--config FILE.yaml] [--key value ...] [--dry-run]", "", verb.summary, ""]
    return "\n".join([*lines, *_key_lines(schema, "", verb.flat)])


def _key_lines(schema: Any, prefix: str, flat: str = "") -> Iterator[str]:
    """Plain keys first, then section by section."""
    hints, notes = typing.get_type_hints(schema), _notes(schema)
    sections = {name: _section(hints[name]) for name in init_fields(schema)}
    for name, field in init_fields(schema).items():
        if sections[name] is None or sections[name][1]:
            yield f"  --{prefix}{name}  {describe(hints[name])}  {_default(field)}"
            yield from _note_lines(str(field.metadata.get("help", notes.get(name, ""))))
    for name, (section, suffix) in ((name, found) for name, found in sections.items() if found):
        yield f"\n{prefix}{name}{suffix}: {notes.get(name) or _first_line(section)}"
        yield from _key_lines(section, "" if name == flat else f"{prefix}{name}{suffix}.")


def _section(annotation: Any) -> tuple[Any, str] | None:
    """The dataclass that `annotation` is, may be, or holds many of, and what stands for one of many in a key."""
    if is_dataclass(annotation):
        return annotation, ""
    origin = typing.get_origin(annotation)
    many = {Sequence: "[]", list: "[]", tuple: "[]", Mapping: ".NAME", dict: ".NAME"}
    inner = [found for arm in typing.get_args(annotation) if (found := _section(arm)) is not None]
    return (inner[0][0], many.get(origin, "")) if inner else None


def _note_lines(note: str) -> list[str]:
    return textwrap.wrap(" ".join(note.split()), width=110, initial_indent=" " * 8, subsequent_indent=" " * 8)


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


def _first_line(schema: Any) -> str:
    return (inspect.getdoc(schema) or "").split("\n", maxsplit=1)[0]


def _default(field: Field[Any]) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return "(required)"
    value = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc]
    return f"[{plain(value)}]"


# --- small things that verbs share ----------------------------------------------------------------------------------

_FINISHED = "finished.json"


def finished(folder: Path) -> bool:
    """Whether `mark_finished` was reached in `folder`."""
    return (folder / _FINISHED).is_file()


def mark_finished(folder: Path) -> None:
    """Note that all of a stage's results are in `folder`, so that running it again does nothing."""
    write_text(folder / _FINISHED, "{}\n")


def counts_line(counts: Mapping[str, int]) -> str:
    """`train 90, heldout 10`; zeros are left out."""
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "nothing to count"

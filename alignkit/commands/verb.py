"""What every verb does alike: read `--config` and flags, answer `--help` and `--dry-run`, or work.

Where a key goes, by the example of `alignkit train METHOD --learning_rate 1e-4`: `read_tree` merges the config file and
the flags into one tree of untyped values, each with its place in the file. `Verb.schema` returns the config class, and
may move keys in the tree: `train` finds `learning_rate` among the fields of the method's trainer config and moves it
into the section `train`; a run has it there already (`--train.learning_rate`). `build` then makes the typed config,
with the trainer's config in it. `Verb.work` passes that to the trainer, which is a `transformers.Trainer`.

Deliberately not here: what a verb does (its own module) and how names become models (`specs`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from alignkit.commands.help_text import help_text
from alignkit.config import Located, build, read_tree
from alignkit.errors import ConfigError
from alignkit.locks import locked
from alignkit.provenance import dump, without_defaults
from alignkit.shipped import shipped_file
from alignkit.storage import read_json, write_json

Job = TypeVar("Job")
Tree = dict[str, Located]


@dataclass(frozen=True, slots=True)
class Verb(Generic[Job]):
    """A verb of the program: its config, what it would do in words, and the doing of it.

    `schema` gets the untyped tree, which it may also put in order, for verbs whose keys depend on a method. Only a
    `distributed` verb works in several processes of torchrun or `accelerate launch`. `more` is the end of its help.
    """

    name: str
    summary: str
    schema: Callable[[Tree, list[str]], type[Job]]
    plan: Callable[[Job], list[str]]
    work: Callable[[Job], None]
    folder: Callable[[Job], Path] | None = None  # held against a second process while the verb works
    flat: str = ""  # a section whose keys stand at the top
    distributed: bool = False
    more: str = ""


def execute(verb: Verb[Job], argv: Sequence[str]) -> None:
    """Run `verb` with `argv`: `--help`, `--dry-run`, or the work itself. Raises ConfigError for bad keys and flags."""
    problems: list[str] = []
    words, switches, file = _split(argv, problems)
    tree = read_tree(words, file, problems)
    schema = verb.schema(tree, problems)
    if switches & {"--help", "--help-all"}:
        print(help_text(verb.name, verb.summary, schema, flat=verb.flat))
        print(verb.more if wants_outline(argv) else "", end="")
        return
    job = build(schema, tree, problems)
    if "--dry-run" in switches:
        print(
            "\n".join([*_config_lines(verb, job), "# what would be done", *(f"# - {line}" for line in verb.plan(job))])
        )
        return
    if not verb.distributed:
        require_one_process(verb.name)
    with locked(verb.folder(job)) if verb.folder else contextlib.nullcontext():
        verb.work(job)


def _config_lines(verb: Verb[Job], job: Job) -> list[str]:
    """The config of a dry run: `--config` reads it again as it is printed."""
    shown = without_defaults(job, keep_own=True)
    train = shown.get("train")
    if not isinstance(train, dict):
        return [f"# alignkit {verb.name}, resolved config", dump(shown).rstrip()]
    if not verb.flat:
        train.pop("output_dir", None)  # a run sets it
    note = "keys of transformers.TrainingArguments at their default are left out"
    return [f"# alignkit {verb.name}, resolved config ({note})", dump(shown).rstrip()]


def wants_outline(argv: Sequence[str]) -> bool:
    """Whether the flags ask for help with the keys of the verb and its method, without those of transformers."""
    return not {"--help", "-h"}.isdisjoint(argv) and "--help-all" not in argv


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
    switches = {"-h": "--help", "--dry_run": "--dry-run", **{w: w for w in ("--help", "--help-all", "--dry-run")}}
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


# --- small things that verbs share ----------------------------------------------------------------------------------

_FINISHED = "finished.json"


def finished(folder: Path) -> dict[str, Any] | None:
    """What `mark_finished` noted in `folder`; None where it was not reached."""
    path = folder / _FINISHED
    note: dict[str, Any] | None = read_json(path) if path.is_file() else None
    return note


def mark_unfinished(folder: Path) -> None:
    """To be called before results of a finished stage are replaced."""
    (folder / _FINISHED).unlink(missing_ok=True)


def mark_finished(folder: Path, note: Mapping[str, Any]) -> None:
    """Note that all of a stage's results are in `folder`, so that running it again does nothing."""
    write_json(folder / _FINISHED, note)


def counts_line(counts: Mapping[str, int]) -> str:
    """`train 90, heldout 10`; zeros are left out."""
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count) or "nothing to count"

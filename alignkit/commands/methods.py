"""A method's name becomes its record, its config class and its trainer class.

The names are those of `alignkit.trainers.METHODS`, or `package.module:attribute` of a user's own `Method` record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import make_dataclass
from typing import Any

from alignkit.commands.outline import outline
from alignkit.errors import ConfigError
from alignkit.resolve import require_known, resolve
from alignkit.trainers import METHODS, Method

DEFAULT_METHOD = next(iter(METHODS))
USED_MOST = (
    "per_device_train_batch_size, gradient_accumulation_steps, num_train_epochs, warmup_steps, save_steps, "
    "eval_strategy, eval_steps, seed"
)


def find_method(name: str) -> Method:
    """The record of method `name`; imports a user's own module, and of alignkit's own methods nothing.

    Raises UnknownNameError for an unknown name, ConfigError when a user's attribute is no `Method` record.
    """
    if name in METHODS:
        return METHODS[name]
    record = resolve(name, dict.fromkeys(METHODS, ""), kind="method")
    if not isinstance(record, Method):
        raise ConfigError(
            f"method '{name}' is a {type(record).__name__}; it must be an alignkit.trainers.Method record"
        )
    return record


def known_method(name: str) -> Method | None:
    """The record of method `name` without an import, for dry runs: None for one of the user's own.

    Raises UnknownNameError for a name that is neither.
    """
    require_known(name, METHODS, kind="method")
    return METHODS.get(name)


def unchecked_methods(names: Iterable[str]) -> list[str]:
    """Lines of a dry run about methods of the user's own; UnknownNameError for a name of no method."""
    own = [name for name in dict.fromkeys(names) if known_method(name) is None]
    return [f"method '{name}' is your own: its keys are not checked in a dry run" for name in own]


def more_help(verb: str) -> str:
    """The last lines of the help of `verb`, about the keys that it left out."""
    return f"\nWith the keys of transformers.TrainingArguments ({USED_MOST}, ...):\n  alignkit {verb} --help-all\n"


def config_class(name: str) -> Any:
    """The trainer config of a method; imports torch."""
    return resolve(find_method(name).config, {}, kind=f"config of method '{name}'")


def trainer_class(name: str) -> Any:
    """The trainer of a method; imports torch."""
    return resolve(find_method(name).trainer, {}, kind=f"trainer of method '{name}'")


def config_keys(name: str) -> type:
    """The keys that a method's config adds to `transformers.TrainingArguments`, for help; imports no torch."""
    return outline(find_method(name).config)


def with_trainer(name: str, *jobs: type, dry_run: bool = False, for_help: bool = False) -> Any:
    """A config class: the keys of `jobs`, and a section `train` typed as the config of method `name`.

    In a dry run the section of a user's own method is a mapping of unchecked keys, for its module is not imported.
    For help it has the method's own keys only.
    """
    is_unchecked = dry_run and known_method(name) is None
    section: Any = config_keys(name) if for_help else Mapping[str, Any] if is_unchecked else config_class(name)
    return make_dataclass(jobs[0].__name__, [("train", section)], bases=jobs, frozen=True, kw_only=True)

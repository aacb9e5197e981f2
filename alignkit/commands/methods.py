"""A method's name becomes its record, its config class and its trainer class.

The names are those of `alignkit.trainers.METHODS`, or `package.module:attribute` of a user's own `Method` record.
"""

from __future__ import annotations

from dataclasses import make_dataclass
from typing import Any

from alignkit.errors import ConfigError
from alignkit.resolve import resolve
from alignkit.trainers import METHODS, Method

DEFAULT_METHOD = next(iter(METHODS))


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


def config_class(name: str) -> Any:
    """The trainer config of a method; imports torch."""
    return resolve(find_method(name).config, {}, kind=f"config of method '{name}'")


def trainer_class(name: str) -> Any:
    """The trainer of a method; imports torch."""
    return resolve(find_method(name).trainer, {}, kind=f"trainer of method '{name}'")


def with_trainer(name: str, *jobs: type) -> Any:
    """A config class: the keys of `jobs`, and a section `train` typed as the config of method `name`."""
    return make_dataclass(jobs[0].__name__, [("train", config_class(name))], bases=jobs, frozen=True, kw_only=True)

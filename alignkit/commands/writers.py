"""Writers of questions by name: `writer` and its options in a config become a `QuestionWriter`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.aspects import QuestionWriter
from alignkit.commands.specs import identity_of
from alignkit.errors import ConfigError
from alignkit.resolve import construct, require_known, resolve
from alignkit.shipped import shipped_file

WRITERS = {
    "sandbox": "alignkit.sandbox.aspects:GrammarWriter",
    "served": "rewards.serving.question_writer:ServedWriter",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WriterSpec:
    """What writes the questions.

    writer: sandbox (the sandbox's caption grammar, no model), served (a served language model), or
        'package.module:attribute' of your own.
    options: keywords for its constructor (served: base_url, model, template, answers, cache; sandbox: whole, twins,
        number_of_all, extra_weight).
    """

    writer: str = "sandbox"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_known(self.writer, WRITERS, kind="writer")

    @property
    def found_options(self) -> dict[str, Any]:
        """The options, with the shipped template where none of its name is here."""
        options = dict(self.options)
        if "template" in options:
            options["template"] = str(shipped_file(Path(str(options["template"]))))
        return options

    @property
    def identity(self) -> str:
        """Changes with the options and with the template's text; not with the place of the cache."""
        return identity_of(self.writer, self.found_options)

    @property
    def absent(self) -> list[str]:
        """Lines of a dry run about a template that is not there."""
        template = self.found_options.get("template")
        return [f"NOT THERE YET: {template} (template)"] if template and not Path(template).is_file() else []

    def builder(self) -> Callable[[], QuestionWriter]:
        """Calling it makes the writer."""
        return functools.partial(_build, self.writer, self.found_options)


def _build(writer: str, options: Mapping[str, Any]) -> QuestionWriter:
    """Raises UnknownNameError for an unknown name, ConfigError for options that do not fit or another kind of class."""
    built = construct(resolve(writer, WRITERS, kind="writer"), options, what=f"writer '{writer}'")
    if not isinstance(built, QuestionWriter):
        raise ConfigError(
            f"writer '{writer}' is a {type(built).__name__} without `write`; see alignkit.aspects.QuestionWriter"
        )
    return built

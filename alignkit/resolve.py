"""Tables, not registries: a name, or a user's own `module:attribute`, becomes the object it stands for."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from alignkit.errors import ConfigError, UnknownNameError, nearest
from alignkit.protocols import Obtainable

_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")
# The values that an option with one of these annotations, or a union of them, takes; others are the builder's concern.
_SIMPLE: Mapping[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str, os.PathLike),
    "None": (type(None),),
}


def require_known(name: str, table: Mapping[str, str], *, kind: str) -> None:
    """UnknownNameError, with the nearest entry, for a name neither in `table` nor of the form `module:attribute`."""
    module_name, _, attribute = name.partition(":")
    is_own = attribute.isidentifier() and all(part.isidentifier() for part in module_name.split("."))
    if name not in table and not is_own:
        hint = nearest(name, table)
        raise UnknownNameError(f"unknown {kind} '{name}'.{hint} Your own: 'package.module:attribute'.")


def resolve(name: str, table: Mapping[str, str], *, kind: str) -> Any:
    """Import what `name` stands for: an entry of `table`, or `package.module:attribute` of the user's own.

    Importing runs the user's module: configs and dry runs use `require_known`, which imports nothing.

    Raises UnknownNameError naming the nearest entry when `name` is neither, or when the attribute does not exist.
    """
    require_known(name, table, kind=kind)
    module_name, _, attribute = table.get(name, name).partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise UnknownNameError(f"{kind} '{name}': no module named '{error.name}' on the import path") from error
        raise
    if attribute not in vars(module):
        raise UnknownNameError(f"{kind} '{name}': module '{module_name}' has no '{attribute}'.")
    return vars(module)[attribute]


def construct(builder: Callable[..., Any], options: Mapping[str, Any], *, what: str) -> Any:
    """`builder(**options)`, once the options are known to fit; what the builder itself raises stays as it is.

    Raises ConfigError naming `what`: for an option that it does not take, with the nearest and all that it does; for
    one whose annotation is bool, int, float, str, or one of them or None, and whose value is not; for one that is
    missing, with the builder's own word on how to get weights (`alignkit.protocols.Obtainable`).
    """
    parameters = inspect.signature(builder).parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes = f" Its options: {', '.join(named) or 'none'}."
    if not any(p.kind == p.VAR_KEYWORD for p in parameters):
        for name in options:
            if name not in named:
                hint = nearest(name, named).partition(" Known:")[0]
                raise ConfigError(f"{what} has no option '{name}'.{hint}{takes}")
    for name, value in options.items():
        annotation = named[name].annotation if name in named else "Any"
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        kinds = text.split(" | ")
        types = tuple(kind for each in kinds for kind in _SIMPLE.get(each, (object,)))
        if not isinstance(value, types) or (isinstance(value, bool) and "bool" not in kinds and object not in types):
            raise ConfigError(f"{what}: its option '{name}' is {value!r}; it must be {text}")
    missing = [name for name, p in named.items() if p.default is p.empty and name not in options]
    if missing:
        advice = (
            f" To get it: {builder.get}." if isinstance(builder, Obtainable) and isinstance(builder.get, str) else ""
        )
        raise ConfigError(f"{what} needs the option '{missing[0]}'.{advice}{takes}")
    try:
        return builder(**options)
    except TypeError as error:  # from what the builder passes its **options to
        unknown = _UNEXPECTED.search(str(error))
        if unknown is None or unknown[1] in named or unknown[1] not in options:
            raise
        raise ConfigError(f"{what} has no option '{unknown[1]}'.{takes}") from error

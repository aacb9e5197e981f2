"""Tables, not registries: a name, or a user's own `module:attribute`, becomes the object it stands for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from alignkit.errors import UnknownNameError, nearest


def resolve(name: str, table: Mapping[str, str], *, kind: str) -> Any:
    """Import what `name` stands for: an entry of `table`, or `package.module:attribute` of the user's own.

    Raises UnknownNameError naming the nearest entry when `name` is neither, or when the attribute does not exist.
    """
    target = table.get(name, name)
    module_name, separator, attribute = target.partition(":")
    if not separator:
        hint = nearest(name, table)
        raise UnknownNameError(f"unknown {kind} '{name}'.{hint} Your own: 'package.module:attribute'.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise UnknownNameError(f"{kind} '{name}': no module named '{error.name}' on the import path") from error
        raise
    if attribute not in vars(module):
        raise UnknownNameError(f"{kind} '{name}': module '{module_name}' has no '{attribute}'.")
    return vars(module)[attribute]

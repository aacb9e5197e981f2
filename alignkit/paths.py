"""Names read from a file become paths, and stay inside the folder that they belong to.

A record, a manifest, a table or a card may come from someone else. What it names is read (or written) only below a
folder that the user gave. Not here: archives, whose extraction has rules of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from alignkit.errors import ConfigError, DataError

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


def require_plain_names(names: Iterable[str], key: str) -> None:
    """ConfigError for a name in the section `key` of a config that cannot be the name of a folder."""
    for name in names:
        if not _PLAIN.fullmatch(name):
            allowed = "letters, digits, '_', '-' and '.', at most 64"
            raise ConfigError(f"{key}: the name {name!r} becomes a folder; use {allowed}")


@dataclass(frozen=True, slots=True)
class Bounds:
    """`folder`, to which relative names belong, and the folders in which a named file may be (default: `folder`)."""

    folder: Path
    roots: tuple[Path, ...] = ()

    def path(self, name: str, where: str) -> Path:
        """The resolved path of `name`; it need not exist.

        Raises DataError naming `where` for a URL, a name with `..`, and a path that leaves all the roots, be it
        absolute or through a symbolic link.
        """
        if "://" in name or "::" in name:
            raise DataError(f"{where}: '{name}' is a URL; download the file and name it by its path")
        if not name or "\0" in name or ".." in PurePosixPath(name.replace("\\", "/")).parts:
            raise DataError(f"{where}: {name!r} is no path below '{self.folder}'; write it without '..'")
        try:
            path = (self.folder / name).resolve()
            roots = [root.resolve() for root in self.roots or (self.folder,)]
        except (OSError, RuntimeError) as error:  # RuntimeError: symbolic links in a circle
            raise DataError(f"{where}: '{name}' cannot be looked up: {error}") from error
        if not any(path.is_relative_to(root) for root in roots):
            allowed = " or ".join(f"'{root}'" for root in roots)
            raise DataError(f"{where}: '{name}' is outside {allowed}; move the file there, or name a wider root")
        return path

    def file(self, name: str, where: str) -> Path:
        """`path(name)`, which must be a file; DataError naming `where` otherwise."""
        path = self.path(name, where)
        try:
            exists = path.is_file()
        except OSError:  # a name that is too long
            exists = False
        if not exists:
            raise DataError(f"{where}: the file '{path}' does not exist; put it back or remove the row")
        return path

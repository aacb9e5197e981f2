"""Files that come with the package: the sandbox's weights as `sandbox:NAME`, and recipes, prompts and model configs.

The wheel holds the repository's `configs` as `alignkit/configs`. Deliberately not here: reading any of them.
"""

from __future__ import annotations

from pathlib import Path

from alignkit.errors import UnknownNameError, nearest
from alignkit.paths import Bounds

PACKAGE = Path(__file__).parent
WEIGHTS = PACKAGE / "sandbox" / "weights"
SANDBOX = "sandbox:"


def configs() -> Path:
    """The folder of the shipped configs: in the installed package, or in the repository that it is installed from."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def shipped_file(path: Path) -> Path:
    """`path`; where nothing is there and it starts with `configs/`, the shipped file or folder of that name."""
    if path.exists() or path.parts[:1] != ("configs",) or ".." in path.parts:
        return path
    shipped = configs().joinpath(*path.parts[1:])
    return shipped if shipped.exists() else path


def model_path(name: str) -> str:
    """`name`, or the folder that `sandbox:NAME` stands for.

    Raises UnknownNameError naming the nearest model of the sandbox, DataError for a name that leads outside of it.
    """
    if not name.startswith(SANDBOX):
        return name
    inner = name.removeprefix(SANDBOX)
    folder = Bounds(WEIGHTS).path(inner, "model")
    if not folder.is_dir():
        known = sorted(path.name for path in WEIGHTS.iterdir())
        raise UnknownNameError(f"the sandbox has no model '{inner}'.{nearest(inner, known)}")
    return str(folder)

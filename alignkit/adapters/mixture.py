"""`alignkit.json` beside the weights: what a mixture is made of, in which space it mixes and in which steps it acts.

    kind              "mixture"
    space             weights: the files beside it are the result; embedding, prediction: its members are mixed at
                      sampling time
    base, base_fingerprint   the model, and the fingerprints of its weights by component
    members           name, SHA-256 of each of its files; for the latter two spaces their place below the folder
    weights           one number a member, in the same order; the base has the rest to 1
    method, density, seed, rank_error   of a soup; see `alignkit.adapters.merging`
    window            [start, stop): in which steps the mixture acts; the base acts in the others. null: in all
    null              whether text encoders act on the null condition of guidance too
    files             SHA-256 of the result's files
    sha256            of all of the above, so that an edit by hand is noticed

Deliberately not here: making a mixture (`alignkit.generators.soups`) and sampling with one
(`alignkit.generators.mixtures`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignkit.diffusion.tuned_steps import ALL_STEPS, TunedSteps
from alignkit.errors import ConfigError, DataError
from alignkit.paths import Bounds
from alignkit.storage import checksum, read_json, to_json, write_json

FILE, KIND = "alignkit.json", "mixture"
SPACES = ("weights", "embedding", "prediction")
BASE = "base"  # the name of the base model among the members of a mixture
HERE = "."  # the place of tuned text encoders, which are the folder itself (`alignkit.generators.tuned_encoders`)
_ADVICE = "make the mixture again with `alignkit soup`"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberRecord:
    """A member: its name, the SHA-256 of its files by their path within it, and its place below the folder ("" where
    nothing needs it any more: for soups and for the base).
    """

    name: str
    files: Mapping[str, str] = field(default_factory=dict)
    place: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """The content of `alignkit.json`; its keys are those at the top of this file, but for `null` of the window."""

    space: str
    base: str
    members: tuple[MemberRecord, ...]
    weights: tuple[float, ...]
    base_fingerprint: Mapping[str, str] = field(default_factory=dict)
    method: str = "linear"
    density: float = 1.0
    seed: int = 0
    rank_error: float = 0.0
    window: TunedSteps = ALL_STEPS
    files: Mapping[str, str] = field(default_factory=dict)


def write_mixture(folder: Path, mixture: Mixture) -> Path:
    """Write `folder/alignkit.json`. Raises ConfigError for one that could not be read back."""
    _require_sound(mixture, f"'{folder}'")
    content = {"kind": KIND, **asdict(mixture), "window": mixture.window.bounds, "null": mixture.window.null}
    write_json(folder / FILE, {**content, "sha256": _seal(content)})
    return folder / FILE


def is_mixture(path: Path) -> bool:
    """Whether `path` is the folder of a mixture."""
    return (path / FILE).is_file()


def acts_while_sampling(path: Path) -> bool:
    """Whether `path` is a mixture of embeddings or predictions, which has no weights of its own."""
    return is_mixture(path) and read_mixture(path).space != "weights"


def read_mixture(folder: Path) -> Mixture:
    """The mixture in `folder`, after checks of its record and of the files that it names.

    Raises DataError naming the file for a record that was edited or damaged, an unknown kind or space, weights that are
    not finite or not one a member, members outside of the folder, and files that changed since.
    """
    where = f"'{folder / FILE}'"
    content = read_json(folder / FILE)
    if not isinstance(content, dict) or content.get("kind") != KIND:
        kind = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{where} is of the kind {kind!r}; only '{KIND}' is known, {_ADVICE}")
    seal = content.pop("sha256", None)
    try:
        values = {key: value for key, value in content.items() if key != "kind"}
        members = tuple(MemberRecord(**member) for member in values.pop("members"))
        window = TunedSteps.between(values.get("window"), null=values.pop("null", True))
        values |= {"members": members, "window": window}
        mixture = Mixture(**{**values, "weights": tuple(map(float, values["weights"]))})
        _require_sound(mixture, where)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{where} is no record of a mixture: {error}; {_ADVICE}") from error
    if seal != _seal(content):
        raise DataError(f"{where} was changed after it was written: its content does not fit its sha256; {_ADVICE}")
    _require_files(folder, mixture.files, where)
    for member in mixture.members:
        if member.place:
            _require_files(Bounds(folder).path(member.place, f"{where}, member '{member.name}'"), member.files, where)
    return mixture


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(content).encode()).hexdigest()


def _require_sound(mixture: Mixture, where: str) -> None:
    if mixture.space not in SPACES:
        raise ConfigError(f"{where}: space is {mixture.space!r}; it must be one of {', '.join(SPACES)}")
    if len(mixture.weights) != len(mixture.members) or not mixture.members:
        raise ConfigError(f"{where}: {len(mixture.members)} members and {len(mixture.weights)} weights")
    wrong = [weight for weight in mixture.weights if not math.isfinite(weight)]
    if wrong:
        raise ConfigError(f"{where}: a weight is {wrong[0]}; give finite numbers")
    if mixture.space == "weights" and mixture.window != ALL_STEPS:
        raise ConfigError(f"{where}: a window is for embedding and prediction; mixed weights act in all steps")
    if mixture.space == "prediction" and not mixture.window.null:
        raise ConfigError(f"{where}: null: false is for embedding; predictions are mixed with and without a prompt")
    for member in mixture.members:
        if mixture.space != "weights" and member.name != BASE and not member.place:
            raise ConfigError(f"{where}: member '{member.name}' has no place below the folder")


def _require_files(folder: Path, files: Mapping[str, str], where: str) -> None:
    for name, expected in files.items():
        file = Bounds(folder).file(name, where)
        if checksum(file) != expected:
            raise DataError(f"{where}: '{file}' is not the file that the mixture was made with; {_ADVICE}")

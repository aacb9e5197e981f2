"""`alignkit init [NAME]`: a copy of a shipped recipe in the current folder, to be changed; nothing is overwritten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignkit.commands.verb import Verb, execute
from alignkit.errors import ConfigError, UnknownNameError, nearest
from alignkit.shipped import configs


@dataclass(frozen=True, kw_only=True, slots=True)
class InitJob:
    """Copy a recipe.

    name: the recipe; the word after `init` may stand for it.
    out: the copy; default: NAME.yaml in the current folder. An existing file stays as it is.
    """

    name: str = "demo"
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.name not in recipes():
            raise UnknownNameError(f"no recipe '{self.name}'.{nearest(self.name, recipes())}")

    @property
    def target(self) -> Path:
        """The file to be written."""
        return self.out or Path(f"{self.name}.yaml")


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in configs().glob("*.yaml"))


def _plan(job: InitJob) -> list[str]:
    exists = [f"{job.target} exists and stays as it is: choose another --out"] if job.target.exists() else []
    return [*exists, f"copy the recipe {job.name} to {job.target}"]


def _work(job: InitJob) -> None:
    text = (configs() / f"{job.name}.yaml").read_text(encoding="utf-8")
    text = text.replace(f"--config configs/{job.name}.yaml", f"--config {job.target}", 1)
    try:
        with job.target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"'{job.target}' exists and stays as it is; choose another --out") from error
    except FileNotFoundError as error:
        raise ConfigError(f"the folder of '{job.target}' does not exist; create it first") from error
    command = text.splitlines()[0].removeprefix("# ")
    print(f"recipe: {job.target}\nnext, change it, then:\n  {command} --dry-run")


def main(argv: Sequence[str]) -> None:
    """The verb; the recipe's name may stand alone as the first word."""
    words = ["--name", *argv] if argv and not argv[0].startswith("-") else list(argv)
    summary = f"Copy a recipe into the current folder: {', '.join(recipes())}."
    execute(Verb("init", summary, lambda *_: InitJob, _plan, _work), words)

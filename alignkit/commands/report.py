"""`alignkit report`: one self-contained HTML page from whatever parts of a run exist; loads no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignkit.commands.verb import Verb, execute
from alignkit.errors import ConfigError, DataError, MissingFileError, require_at_least
from alignkit.evaluation.report import ReportInputs, write_report


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportJob:
    """Write a report, of the folder of a run or of single parts.

    run: a folder that `alignkit run` wrote; the parts below then have their places in it.
    evaluation: the folder of an evaluation.
    training: the folder of a training.
    data: the folder of a ranked dataset.
    title: the page's title.
    note: a sentence under it: what the run shows.
    gallery: images or videos in each group of the gallery.
    out: the page, or report.html in the run's folder.
    """

    run: Path | None = None
    evaluation: Path | None = None
    training: Path | None = None
    data: Path | None = None
    title: str = "alignkit report"
    note: str = ""
    gallery: int = 6
    out: Path | None = None

    def __post_init__(self) -> None:
        require_at_least(0, {"gallery": self.gallery})
        if not (self.run or self.evaluation or self.training or self.data):
            raise ConfigError("nothing to report: give --run FOLDER, or --evaluation, --training or --data")
        if not (self.run or self.out):
            raise ConfigError("give --out report.html")

    @property
    def target(self) -> Path:
        """Where the page goes."""
        return self.out or (self.run or Path()) / "report.html"

    @property
    def parts(self) -> dict[str, Path | None]:
        """The folders of the parts; None for one that a run has not."""
        named = {"evaluation": self.evaluation, "training": self.training, "data": self.data}
        places = {"evaluation": "evaluation", "training": "train", "data": "ranked"}
        if self.run is None:
            return dict(named)
        inside = {part: self.run / place for part, place in places.items()}
        return {part: named[part] or (inside[part] if inside[part].is_dir() else None) for part in named}


def gather(job: ReportJob) -> ReportInputs:
    """What the parts hold. Raises MissingFileError for a named part that is not there, DataError if all are empty."""
    parts = job.parts
    for name, folder in {"run": job.run, **parts}.items():
        if folder is not None and not folder.is_dir():
            raise MissingFileError(f"{name} folder '{folder}' does not exist")
    home = job.run or parts["training"] or parts["evaluation"] or parts["data"]
    state = _read(parts["training"], "trainer_state.json")
    evaluation = parts["evaluation"]
    inputs = ReportInputs(
        title=job.title,
        note=job.note,
        evaluation=evaluation if evaluation and (evaluation / "evaluation.json").is_file() else None,
        log=state.get("log_history", []),
        data=_read(parts["data"], "statistics.json"),
        config=_read(home, "config.yaml"),
        versions=_read(home, "versions.json"),
        command=f"alignkit report --run {job.run}" if job.run else f"alignkit report --out {job.target} ...",
        gallery=job.gallery,
    )
    if not (inputs.evaluation or inputs.log or inputs.data):
        raise DataError(
            f"'{home}' holds no evaluation, training or ranked data; give a folder that `alignkit run`, `evaluate`, "
            "`train` or `rank` wrote"
        )
    return inputs


def _read(folder: Path | None, name: str) -> Any:
    """A JSON or YAML file of `folder`, or an empty dict where there is none."""
    path = (folder or Path()) / name
    if folder is None or not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"'{path}' cannot be read ({error}); remove it and run the stage again") from error


def _plan(job: ReportJob) -> list[str]:
    found = [f"{name} in {folder}" for name, folder in job.parts.items() if folder is not None]
    return [f"write {job.target} from {', '.join(found) or 'nothing yet'}"]


def _work(job: ReportJob) -> None:
    write_report(gather(job), job.target)
    print(f"report: {job.target}")


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Write one self-contained page with the table, curves, gallery, data and config of a run."
    execute(Verb("report", summary, lambda *_: ReportJob, _plan, _work), argv)

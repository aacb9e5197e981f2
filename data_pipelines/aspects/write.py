"""The aspects stage: a writer's questions about every prompt, checked, retried, stored in parts.

A draft with problems goes back to the writer with the problems as complaints; what still fails is left out, noted in
`quarantine.jsonl` and counted. Not here: what is wrong with a draft (checks.py), and any writer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from alignkit.aspects import ASPECTS, Draft, Question, QuestionWriter, Rules
from alignkit.claims import claim
from alignkit.errors import ConfigError, DataError, ServerError, require_at_least
from alignkit.locks import locked
from alignkit.paths import Bounds
from alignkit.records import Prompt
from alignkit.storage import (
    STAGE_FILES,
    Part,
    StageResult,
    finish_run,
    finished_part,
    part_name,
    read_table,
    write_part,
    write_quarantine,
    write_text,
)
from data_pipelines.aspects.card import card_text
from data_pipelines.aspects.checks import problems_of
from data_pipelines.prompts import drop_duplicates

if TYPE_CHECKING:
    import pyarrow as pa

_MEDIA = ("image", "video")  # columns of prompts: kept as columns, for rewards and losses that read them


@dataclass(frozen=True, kw_only=True, slots=True)
class AspectsConfig:
    """Which questions are written, and how.

    aspects: each prompt gets at least one question of each: alignment, physics, quality.
    max_questions: the most questions of one prompt.
    weights: what each aspect weighs in a prompt's score, 1 where none is given: the sum of the weights of its
        questions, which keep their proportions. Default: each question has the weight that the writer gives it, so
        an aspect with more questions weighs more.
    attempts: drafts of one prompt before it is left out.
    part_size: prompts of one file, which the writer gets at once.
    quarantine_limit: the stage stops once more than this share of all prompts is left out.
    """

    aspects: Sequence[str] = ("alignment",)
    max_questions: int = 16
    weights: Mapping[str, float] | None = None
    attempts: int = 3
    part_size: int = 256
    quarantine_limit: float = 0.05

    def __post_init__(self) -> None:
        counts = {"max_questions": self.max_questions, "attempts": self.attempts, "part_size": self.part_size}
        require_at_least(1, counts)
        wrong = [name for name in self.aspects if name not in ASPECTS]
        if wrong or not self.aspects or len(set(self.aspects)) < len(self.aspects):
            raise ConfigError(f"aspects: {list(self.aspects)}; give some of {', '.join(ASPECTS)}, each once")
        for name, weight in (self.weights or {}).items():
            if name not in self.aspects or not 0 < weight < math.inf:
                raise ConfigError(f"weights.{name} is {weight}; give a number above 0 of one of {list(self.aspects)}")
        if not 0 <= self.quarantine_limit <= 1:
            raise ConfigError(f"quarantine_limit is {self.quarantine_limit}; it is a share and must be within 0 and 1")

    @property
    def rules(self) -> Rules:
        """What a writer and the checks need of this."""
        return Rules(tuple(self.aspects), self.max_questions)

    def weighted(self, questions: Sequence[Question]) -> list[Question]:
        """The questions of one prompt with the weights of their aspects."""
        if self.weights is None:
            return list(questions)
        sums: Counter[str] = Counter()
        for question in questions:
            sums[question.aspect] += question.weight  # type: ignore[assignment]  # a Counter adds any numbers
        weights = {aspect: self.weights.get(aspect, 1.0) / total for aspect, total in sums.items()}
        return [replace(question, weight=question.weight * weights[question.aspect]) for question in questions]


@dataclass(frozen=True, slots=True)
class Checked:
    """The last draft of a prompt, its problems (none if it is kept), and how many drafts were written."""

    draft: Draft
    problems: Sequence[str]
    attempts: int


def checked_drafts(prompts: Sequence[Prompt], config: AspectsConfig, writer: QuestionWriter) -> list[Checked]:
    """A checked draft for every prompt, in order; one with problems is written again, up to `config.attempts` times.

    Those without problems have the weights of the config. Raises ServerError naming the first prompt whose last draft
    `is_failed`: another time the same request may succeed; ConfigError where the writer gives another number of
    drafts.
    """
    results = [Checked(Draft(), (), 0)] * len(prompts)
    waiting = list(range(len(prompts)))
    for attempt in range(1, config.attempts + 1):
        if not waiting:
            break
        complaints = [results[index].problems for index in waiting]
        drafts = list(writer.write([prompts[index] for index in waiting], config.rules, complaints))
        if len(drafts) != len(waiting):
            raise ConfigError(
                f"writer {type(writer).__name__} gave {len(drafts)} drafts for {len(waiting)} prompts; its write must "
                "return one for each, in order"
            )
        for index, draft in zip(waiting, drafts, strict=True):
            problems = problems_of(draft, config.rules)
            kept = draft if problems else replace(draft, questions=config.weighted(draft.questions))
            results[index] = Checked(kept, problems, attempt)
        waiting = [index for index in waiting if results[index].problems]
    failed = [index for index in waiting if results[index].draft.is_failed]
    if failed:
        first = results[failed[0]]
        raise ServerError(
            f"{len(failed)} of {len(prompts)} prompts got no questions in {config.attempts} attempts, the first one "
            f"'{prompts[failed[0]].text}': {'; '.join(first.problems)}. Nothing of these {len(prompts)} prompts is "
            "stored; answers in the writer's cache are kept. Once the server works, run the same command again"
        )
    return results


def write_aspects(
    prompts: Sequence[Prompt],
    config: AspectsConfig,
    out_dir: str | Path,
    *,
    build_writer: Callable[[], QuestionWriter],
    identity: str = "",
) -> StageResult:
    """Questions for every prompt into `out_dir/data/part-*.parquet`, one row a prompt, with manifest and dataset card.

    Columns: prompt_id, prompt, metadata (JSON), questions [{name, aspect, text, negated, weight, answer}] (as the
    rewards `yes_no` and `explanation` take them), facts [{kind, text}] that the writer found, and `image` and `video`
    with the bytes of the prompts' media, where any prompt has one (bytes, {bytes, path}, or a path below the current
    folder: bytes of other files must not get into a dataset that is passed on). Opened by
    `datasets.load_dataset(out_dir)`. `identity` says what the questions depend on beside the config: the writer, its
    template, its model; where it differs from that of an earlier run in `out_dir`, the run is refused. The writer is
    built only when a part is missing.

    Raises DataError without prompts, or over the quarantine limit, which may differ from that of an earlier run;
    ServerError, ResumeError, StorageError; what the writer raises.
    """
    folder = Path(out_dir)
    media = sorted({name for prompt in prompts for name in _MEDIA if prompt.metadata.get(name)})
    unique, duplicates = drop_duplicates(prompts)
    if not unique:
        raise DataError("no prompts to write questions for; give at least one")
    inputs = {"prompts": len(unique), "prompts_sha256": _digest(unique, media), "writer": identity}
    with locked(folder):
        record = {"stage": "aspects", "config": asdict(config), "inputs": inputs}
        claim(folder, record, free=("config.quarantine_limit",), writes=STAGE_FILES)
        writer, parts = functools.cache(build_writer), []
        with tqdm(total=len(unique), desc="aspects", unit="prompt") as bar:
            for index in range(-(-len(unique) // config.part_size)):
                rows = unique[index * config.part_size :][: config.part_size]
                name = part_name(index)
                parts.append(finished_part(folder, name) or _write((folder, name), rows, config, writer(), media))
                bar.update(len(rows))
                _require_within_limit(folder, parts, config, len(unique))
        return _finish(folder, config, parts, duplicates)


def _write(
    place: tuple[Path, str],
    rows: Sequence[Prompt],
    config: AspectsConfig,
    writer: QuestionWriter,
    media: Sequence[str],
) -> Part:
    """One finished part, (folder, name): the good drafts as rows, counts and quarantine as notes."""
    folder, name = place
    kept, quarantined = [], []
    counts: Counter[str] = Counter()
    for prompt, result in zip(rows, checked_drafts(rows, config, writer), strict=True):
        named, draft = {"prompt_id": prompt.id, "prompt": prompt.text}, result.draft
        questions = list(map(asdict, draft.questions))
        counts["written_again"] += result.attempts > 1
        if result.problems:
            reason = "; ".join(result.problems)
            quarantined.append({**named, "reason": reason, "attempts": result.attempts, "questions": questions})
            continue
        facts = list(map(asdict, draft.facts))
        own = {column: _medium(prompt, column) for column in media}
        kept.append({**named, "metadata": _metadata(prompt), "questions": questions, "facts": facts, **own})
        counts.update(f"questions_{question.aspect}" for question in draft.questions)
        counts.update(f"facts_{fact.kind}" for fact in draft.facts)
    notes = {"rows": len(kept), "counts": dict(counts), "quarantined": quarantined}
    return write_part(folder, name, {f"data/{name}.parquet": _table(kept, media)}, notes=notes)


def _table(rows: list[dict[str, Any]], media: Sequence[str]) -> pa.Table:
    import pyarrow as pa
    from datasets import Features, Image, List, Value, Video

    text = Value("string")
    texts = dict.fromkeys(("name", "aspect", "text", "negated", "answer"), text)
    named: dict[str, Any] = dict.fromkeys(("prompt_id", "prompt", "metadata"), text)
    named |= {"questions": List({**texts, "weight": Value("float64")}), "facts": List({"kind": text, "text": text})}
    named |= {name: Image(decode=False) if name == "image" else Video(decode=False) for name in media}
    return pa.Table.from_pylist(rows, schema=Features(named).arrow_schema)


def _metadata(prompt: Prompt) -> str:
    """The other columns of the prompt as JSON, less its media."""
    plain = {name: value for name, value in prompt.metadata.items() if name not in _MEDIA}
    return json.dumps(plain, sort_keys=True, default=str)


def _medium(prompt: Prompt, name: str) -> dict[str, Any] | None:
    """The medium in this column of the prompt with its bytes, as `datasets` has it; None where there is none."""
    medium = prompt.metadata.get(name)
    if isinstance(medium, Mapping):
        medium = medium.get("bytes") or medium.get("path")
    where = f"prompt '{prompt.text}', {name}"
    if isinstance(medium, str | Path) and medium:
        try:
            medium = Bounds(Path.cwd()).file(str(medium), where).read_bytes()
        except OSError as error:
            raise DataError(f"{where}: '{medium}' cannot be read: {error.strerror}; check its permissions") from error
    if medium and not isinstance(medium, bytes):
        raise DataError(f"{where}: it is a {type(medium).__name__}; give a path or the bytes of a file")
    return {"bytes": medium, "path": None} if medium else None


def _digest(prompts: Sequence[Prompt], media: Sequence[str]) -> str:
    """Of the prompts with their columns; of media in files the paths count."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.id}\x1f{_metadata(prompt)}".encode())
        for name in media:
            medium = prompt.metadata.get(name)
            if isinstance(medium, Mapping):
                medium = medium.get("bytes") or medium.get("path")
            digest.update(medium if isinstance(medium, bytes) else f"{medium}".encode())
        digest.update(b"\x1e")
    return digest.hexdigest()


def _quarantined(parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [fault for part in parts for fault in part.notes["quarantined"]]


def _require_within_limit(folder: Path, parts: Sequence[Part], config: AspectsConfig, rows: int) -> None:
    bad = _quarantined(parts)
    if len(bad) > config.quarantine_limit * rows:
        path = write_quarantine(folder, bad)
        raise DataError(
            f"{len(bad)} of {rows} prompts have no usable questions, over quarantine_limit "
            f"{config.quarantine_limit:.0%}; the first one, '{bad[0]['prompt']}': {bad[0]['reason']}. See '{path}'; "
            "change the prompts, the writer or its template, and write into another folder, or raise quarantine_limit "
            "and run again"
        )


def _finish(folder: Path, config: AspectsConfig, parts: Sequence[Part], duplicates: int) -> StageResult:
    counts: Counter[str] = Counter({"duplicate_prompts": duplicates, "quarantined": len(_quarantined(parts))})
    for part in parts:
        counts.update(part.notes["counts"])
    write_quarantine(folder, _quarantined(parts))
    rows = sum(part.notes["rows"] for part in parts)
    examples = first_rows(folder, parts, 3)
    write_text(folder / "README.md", card_text(asdict(config), counts, rows, examples))
    return finish_run(folder, "aspects", parts, rows=rows, counts=counts)


def first_rows(folder: Path, parts: Sequence[Part], count: int) -> list[Mapping[str, Any]]:
    """The first `count` rows of the stage in `folder`."""
    rows: list[Mapping[str, Any]] = []
    for part in parts:
        (path,) = part.files
        rows += read_table(folder / path).slice(0, count - len(rows)).to_pylist()
        if len(rows) >= count:
            break
    return rows

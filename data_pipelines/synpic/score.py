"""The score stage: every reward's raw score of every candidate; rows with a score that is not finite go to quarantine.

Not here: what a reward is, and any combination of rewards (ranking.py). Raw scores are kept: re-ranking never
re-scores.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from alignkit.claims import RUN, claim
from alignkit.errors import ConfigError, MissingFileError, NumericsError, UnknownNameError, nearest
from alignkit.escape import get_logger
from alignkit.locks import locked
from alignkit.media import (
    clip_shape,
    decode_clip,
    decode_image,
    has_transparency,
    image_size,
    to_pixels,
    transparency_note,
)
from alignkit.protocols import Reward, as_scores, require_independent, require_modality
from alignkit.records import Prompt
from alignkit.storage import (
    STAGE_FILES,
    Part,
    StageResult,
    checksum,
    finish_run,
    finished_part,
    read_json,
    read_table,
    recorded_parts,
    write_part,
    write_quarantine,
)
from data_pipelines.synpic.media_columns import MEDIA, media_column

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from torch import Tensor

logger = get_logger(__name__)
QUARANTINE_LIMIT = 0.05  # share of all rows
TOTAL = ""  # a reward's verdict among its parts

Built = TypeVar("Built")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """Which rewards score the candidates; `batch_size` candidates of one shape go into one call."""

    rewards: Sequence[str]
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ConfigError("rewards is empty; name at least one reward")
        if len(set(self.rewards)) < len(self.rewards):
            raise ConfigError(f"rewards: {list(self.rewards)} names one twice")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")


def check_names(names: Iterable[str], builders: Mapping[str, Any], *, kind: str) -> None:
    """UnknownNameError, with the nearest known name, for the first name without a builder."""
    for name in names:
        if name not in builders:
            raise UnknownNameError(f"unknown {kind} '{name}'.{nearest(name, builders)}")


def build_all(names: Iterable[str], builders: Mapping[str, Callable[[], Built]]) -> dict[str, Built]:
    """Call each builder once."""
    return {name: builders[name]() for name in names}


def _build_independent(names: Iterable[str], builders: Mapping[str, Callable[[], Reward]]) -> dict[str, Reward]:
    """Rewards that score each candidate alone, for parts and batches cut the candidates anywhere."""
    rewards = build_all(names, builders)
    require_independent(rewards)
    return rewards


def named_identities(names: Iterable[str], identities: Mapping[str, str] | None) -> dict[str, Any]:
    """The part of a stage's settings that tells its models apart; empty where nothing is known of them."""
    return {"models": {name: identities[name] for name in names}} if identities else {}


def score_candidates(
    candidates_dir: str | Path,
    config: ScoreConfig,
    out_dir: str | Path,
    *,
    build_rewards: Mapping[str, Callable[[], Reward]],
    identities: Mapping[str, str] | None = None,
) -> StageResult:
    """Score every candidate of a finished generate stage into `out_dir/data/part-*.parquet`, one row a prompt.

    Columns: prompt_id, scores {reward: float64 [K]} and, where a reward has parts (heads, questions, members), parts
    {reward: {part: float64 [K]}}. A row where a reward is NaN or infinite is left out, noted in
    `quarantine.jsonl` and counted; over 5% of all rows stops the stage. Images with transparency are scored on white;
    a warning counts them, and the manifest (`transparent`) where there are some. `identities` says what stands for the
    weights of each reward: where it differs from that of an earlier run in `out_dir`, the run is refused.

    Raises UnknownNameError for a reward without a builder, ConfigError for one whose rows depend on each other
    (`alignkit.protocols.Dependent`), DataError naming file, row and candidate of an image or video that
    cannot be read, NumericsError over the quarantine limit, MissingFileError when generation is not finished.
    """
    candidates_dir = Path(candidates_dir)
    manifest, parts = recorded_parts(candidates_dir, "generate")
    with locked(Path(out_dir)):
        scorer = Scorer.open(
            Path(out_dir), config, candidates_dir, build_rewards, rows=manifest["rows"], identities=identities
        )
        with scorer.bar:
            for part in parts:
                scorer.score(part)
            return scorer.finish()


@dataclass(frozen=True, slots=True)
class Scorer:
    """A score stage in progress: `score` parts in any order, then `finish`. One thread at a time."""

    folder: Path
    config: ScoreConfig
    candidates_dir: Path
    rows: int
    rewards: Callable[[], Mapping[str, Reward]]
    parts: dict[str, Part]
    bar: tqdm[Any]

    @classmethod
    def open(
        cls,
        folder: Path,
        config: ScoreConfig,
        candidates_dir: Path,
        build_rewards: Mapping[str, Callable[[], Reward]],
        *,
        rows: int,
        identities: Mapping[str, str] | None = None,
    ) -> Scorer:
        """Begin or resume in `folder`; `candidates_dir` is at least begun and will have `rows` rows."""
        check_names(config.rewards, build_rewards, kind="reward")
        if not (candidates_dir / RUN).is_file():
            raise MissingFileError(
                f"'{candidates_dir}' has no {RUN}: an earlier version made it; generate the candidates again, into "
                "another folder"
            )
        inputs = {"candidates_run_sha256": checksum(candidates_dir / RUN)}
        inputs |= named_identities(config.rewards, identities)
        claim(folder, {"stage": "score", "config": asdict(config), "inputs": inputs}, writes=STAGE_FILES)
        rewards = functools.cache(functools.partial(_build_independent, config.rewards, build_rewards))
        return cls(folder, config, candidates_dir, rows, rewards, {}, tqdm(total=rows, desc="score", unit="prompt"))

    def score(self, part: Part) -> None:
        """Score one part of candidates, unless that is done; NumericsError over the quarantine limit."""
        done = finished_part(self.folder, part.name, inputs=part.files)
        self.parts[part.name] = done or self._score(part)
        self.bar.update(self.parts[part.name].notes["rows"])
        bad = self._quarantined()
        if len(bad) > QUARANTINE_LIMIT * self.rows:
            path = write_quarantine(self.folder, bad)
            raise NumericsError(
                f"{len(bad)} of {self.rows} rows have a reward that is NaN or infinite, over the limit of "
                f"{QUARANTINE_LIMIT:.0%}; see '{path}', correct or leave out that reward and score into another folder"
            )

    def finish(self) -> StageResult:
        """Write `quarantine.jsonl` and the manifest."""
        quarantined = len(self._quarantined())
        write_quarantine(self.folder, self._quarantined())
        parts = [self.parts[name] for name in sorted(self.parts)]
        kept = sum(part.notes["rows"] for part in parts) - quarantined
        counts = {"quarantined": quarantined}
        if transparent := sum(part.notes.get("transparent", 0) for part in parts):
            counts["transparent"] = transparent
            images = read_json(self.candidates_dir / "manifest.json")["counts"]["pictures"]
            logger.warning("%s: %s", self.candidates_dir, transparency_note(transparent, images))
        return finish_run(self.folder, "score", parts, rows=kept, counts=counts)

    def _score(self, part: Part) -> Part:
        import pyarrow as pa

        (path,) = part.files
        column = media_column(self.candidates_dir, part)
        require_modality(self.rewards(), MEDIA[column])
        table = read_table(self.candidates_dir / path, columns=["prompt_id", "prompt", "metadata", column])
        rows = table.to_pylist()
        cells = _Cells(rows, column, self.candidates_dir / path)
        measured = _score_rows(cells, self.rewards(), self.config.batch_size)
        totals = {name: columns[TOTAL] for name, columns in measured.items()}
        faults = [_fault(row, index, totals) for index, row in enumerate(rows)]
        parts = {name: {key: columns[key] for key in columns if key != TOTAL} for name, columns in measured.items()}
        is_kept = pa.array([fault is None for fault in faults], pa.bool_())  # a part may have no row
        result = _table([row["prompt_id"] for row in rows], totals, parts).filter(is_kept)
        quarantined = [fault | {"file": path} for fault in faults if fault is not None]
        notes: dict[str, Any] = {"rows": len(rows), "quarantined": quarantined}
        if transparent := cells.transparent():
            notes["transparent"] = transparent
        return write_part(self.folder, part.name, {path: result}, inputs=part.files, notes=notes)

    def _quarantined(self) -> list[dict[str, Any]]:
        return [fault for name in sorted(self.parts) for fault in self.parts[name].notes["quarantined"]]


@dataclass(frozen=True, slots=True)
class _Cells:
    """The media of some rows of candidates: `column` of `rows`, read from `path`."""

    rows: Sequence[Mapping[str, Any]]
    column: str
    path: Path

    @property
    def candidates(self) -> int:
        """K, the number of candidates a row; 0 of a part whose rows were all left out."""
        return len(self.rows[0][self.column]) if self.rows else 0

    def batches(self, size: int) -> Iterable[list[tuple[int, int]]]:
        """(row, candidate) of media of one shape, at most `size` at a time, in order."""
        by_shape: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        measure = image_size if self.column == "images" else clip_shape
        for row in range(len(self.rows)):
            for k in range(self.candidates):
                by_shape.setdefault(measure(self._data(row, k), self._where(row, k)), []).append((row, k))
        for cells in by_shape.values():
            yield from (cells[start : start + size] for start in range(0, len(cells), size))

    def transparent(self) -> int:
        """How many of the images have transparency."""
        if self.column != "images":
            return 0
        places = ((row, k) for row in range(len(self.rows)) for k in range(self.candidates))
        return sum(has_transparency(self._data(*place), self._where(*place)) for place in places)

    def pixels(self, cells: Sequence[tuple[int, int]]) -> Tensor:
        """Float pixels [B, 3, H, W], or [B, F, 3, H, W] of videos, in [0, 1]."""
        import numpy as np

        decode = decode_image if self.column == "images" else decode_clip
        return to_pixels(np.stack([decode(self._data(row, k), self._where(row, k)) for row, k in cells]))

    def _data(self, row: int, candidate: int) -> Any:
        return self.rows[row][self.column][candidate]["bytes"]  # the path beside them is not followed

    def _where(self, row: int, candidate: int) -> str:
        return f"'{self.path}', row {row} (prompt {self.rows[row]['prompt_id']}), candidate {candidate}"


def _score_rows(cells: _Cells, rewards: Mapping[str, Reward], batch_size: int) -> dict[str, dict[str, np.ndarray]]:
    """float64 [rows, K] of every reward and its parts; media are decoded once and grouped by shape."""
    import numpy as np
    import torch

    rows, shape = cells.rows, (len(cells.rows), cells.candidates)
    prompts = [Prompt(row["prompt_id"], row["prompt"], json.loads(row["metadata"])) for row in rows]
    measured = {name: {TOTAL: np.full(shape, np.nan)} for name in rewards}
    for batch in cells.batches(batch_size):
        media = cells.pixels(batch)
        index = tuple(np.array(batch).T)
        for name, reward in rewards.items():
            with torch.no_grad():  # a setting of this thread, so it cannot be made outside
                scores = as_scores(reward(media, [prompts[row] for row, _ in batch]), name, len(batch))
            for part, values in {TOTAL: scores.total, **scores.parts}.items():
                column = measured[name].setdefault(part, np.full(shape, np.nan))
                column[index] = values.detach().double().cpu().numpy()
    return measured


def _fault(row: Mapping[str, Any], index: int, scores: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """What is wrong with the row's first score that is not finite, or None."""
    for name, values in scores.items():
        for candidate, value in enumerate(values[index].tolist()):
            if not math.isfinite(value):
                reason = f"reward '{name}' is {value} for candidate {candidate}"
                place = {"row": index, "candidate": candidate, "reward": name}
                return {**place, "prompt_id": row["prompt_id"], "prompt": row["prompt"], "reason": reason}
    return None


def _table(
    prompt_ids: list[str], totals: Mapping[str, np.ndarray], parts: Mapping[str, Mapping[str, np.ndarray]]
) -> pa.Table:
    import pyarrow as pa
    from datasets import Features, List, Value

    numbers = List(Value("float64"))
    features: dict[str, Any] = {"prompt_id": Value("string"), "scores": dict.fromkeys(totals, numbers)}
    columns: dict[str, Any] = {"prompt_id": prompt_ids, "scores": _rows(totals)}
    if named := {name: columns for name, columns in parts.items() if columns}:
        features["parts"] = {name: dict.fromkeys(columns, numbers) for name, columns in named.items()}
        split = {name: _rows(columns) for name, columns in named.items()}
        columns["parts"] = [{name: split[name][row] for name in named} for row in range(len(prompt_ids))]
    return pa.table(columns, schema=Features(features).arrow_schema)


def _rows(columns: Mapping[str, np.ndarray]) -> list[dict[str, list[float]]]:
    """{name: [rows, K]} as one {name: [K]} a row."""
    lists = {name: values.tolist() for name, values in columns.items()}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]

"""The rank stage, and the ranked dataset it writes (design: one row a prompt, K candidates with raw scores and phi).

Not here: the arithmetic of rankings (ranking.py), statistics (statistics.py), the words of the card (card.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from alignkit.claims import claim
from alignkit.errors import ConfigError, DataError
from alignkit.locks import locked
from alignkit.storage import (
    STAGE_FILES,
    Part,
    StageResult,
    checksum,
    finish_run,
    finished_part,
    read_table,
    recorded_parts,
    require_intact,
    write_json,
    write_part,
    write_text,
)
from data_pipelines import ranking
from data_pipelines.prompts import split_of
from data_pipelines.synpic.card import card_text, write_previews
from data_pipelines.synpic.media_columns import find_column, media_column, media_feature
from data_pipelines.synpic.pixel_statistics import describe, load_columns

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features
    from torch import Tensor

SPLITS = ("train", "heldout")
COLUMNS = ("prompt_id", "prompt", "images", "generators", "seeds", "sampling", "scores", "phi")
VIDEO_COLUMNS = tuple("videos" if name == "images" else name for name in COLUMNS)
TIE = 1e-12  # soft win rates of tied candidates may differ in their last bits


@dataclass(frozen=True, kw_only=True, slots=True)
class RankConfig:
    """How scores become rankings, and which rows stay.

    `temperature` None counts strict wins as the paper does; a number gives the calibrated soft form. `held_out` is the
    share of prompts, chosen by hash, in the held-out split. A row is dropped (and counted under the first that applies)
    when two of its images or videos are identical (`dedup`), all its phi tie (`drop_ties`), its rewards' mean
    concordance is below `min_agreement` (0.5 is chance), or best minus worst phi is below `min_margin`.
    """

    temperature: float | None = None
    held_out: float = 0.1
    min_agreement: float = 0.0
    min_margin: float = 0.0
    drop_ties: bool = True
    dedup: bool = True

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature > 0:
            raise ConfigError(f"temperature must be positive, got {self.temperature}; null counts strict wins")
        for key in ("held_out", "min_agreement", "min_margin"):
            value = asdict(self)[key]
            if not 0 <= value <= 1:
                raise ConfigError(f"{key} is a share and must be within 0 and 1, got {value}")


def rank_candidates(
    candidates_dir: str | Path, scores_dir: str | Path, config: RankConfig, out_dir: str | Path
) -> StageResult:
    """Candidates and their scores -> the ranked dataset, with manifest, statistics and dataset card, in `out_dir`.

    Opened by `datasets.load_dataset(out_dir)`, splits train and heldout. Ranking again with another config needs no
    scoring. The result's counts tell rows kept by split and rows dropped by reason.

    Raises DataError when the scores belong to other candidates, a part is damaged, or no row is left.
    """
    candidates_dir, scores_dir, folder = Path(candidates_dir), Path(scores_dir), Path(out_dir)
    generated, candidates = recorded_parts(candidates_dir, "generate")
    _, scores = recorded_parts(scores_dir, "score")
    _check_match(candidates, scores, candidates_dir, scores_dir)
    inputs = {
        "candidates_sha256": checksum(candidates_dir / "manifest.json"),
        "scores_sha256": checksum(scores_dir / "manifest.json"),
    }
    with locked(folder):
        claim(folder, {"stage": "rank", "config": asdict(config), "inputs": inputs}, writes=STAGE_FILES)
        scale = None if config.temperature is None else _scale(scores_dir, scores)
        parts = []
        for candidate, score in tqdm(list(zip(candidates, scores, strict=True)), desc="rank", unit="part"):
            done = finished_part(folder, candidate.name)
            if done is None:
                require_intact(candidates_dir, candidate)
                require_intact(scores_dir, score)
                joined = _join(_only(candidates_dir, candidate), _only(scores_dir, score))
                done = _rank_part(folder, candidate.name, joined, config, scale)
            parts.append(done)
        counts = Counter({"duplicate_prompts": generated["counts"]["duplicate_prompts"]})
        column = media_column(candidates_dir, candidates[0])
        counts.update(dict.fromkeys((*_reasons_for(column), *SPLITS), 0))
        counts["quarantined"] += generated["counts"].get("quarantined", 0)
        for part in parts:
            counts.update(part.notes)
        return _finish(folder, config, parts, counts, column)


def _reasons_for(column: str) -> tuple[str, ...]:
    """Why rows may be dropped, in the order in which it is checked."""
    return ("quarantined", f"identical_{column}", "all_tied", "low_agreement", "low_margin")


def ranked_features(rewards: Iterable[str], column: str = "images") -> Features:
    """The `datasets` features of a ranked dataset with these rewards, columns in their order on disk.

    `column` is "images" or "videos".
    """
    from datasets import Features, List, Value

    text, numbers = Value("string"), List(Value("float64"))
    named = {
        "prompt_id": text,
        "prompt": text,
        column: List(media_feature(column)),
        "generators": List(Value("string")),
    }
    measured = {"scores": dict.fromkeys(rewards, numbers), "phi": numbers}
    return Features({**named, "seeds": List(Value("int64")), "sampling": text, **measured})


def _check_match(candidates: Sequence[Part], scores: Sequence[Part], candidates_dir: Path, scores_dir: Path) -> None:
    made_from = [part.inputs for part in scores]
    if made_from != [part.files for part in candidates]:
        raise DataError(f"'{scores_dir}' was not scored from '{candidates_dir}' as it is now; run score again")


def _only(folder: Path, part: Part) -> pa.Table:
    (path,) = part.files
    return read_table(folder / path)


def _score_tensor(scores: pa.Table) -> Tensor:
    """[R, P, K] float64, rewards in the order of the columns."""
    import torch

    rewards = scores.column("scores").combine_chunks().flatten()
    return torch.tensor([reward.to_pylist() for reward in rewards], dtype=torch.float64)


def _scale(scores_dir: Path, parts: Sequence[Part]) -> Tensor:
    """T [R] over all parts: the root of the mean of squares, weighted by rows."""
    import torch

    tensors = (_score_tensor(_only(scores_dir, part)) for part in parts)
    measured = [(t.shape[1], ranking.difference_scale(t).square()) for t in tensors if t.shape[1]]
    rows = sum(count for count, _ in measured)
    return torch.stack([count * square for count, square in measured]).sum(dim=0).div(rows).sqrt()


def _join(candidates: pa.Table, scores: pa.Table) -> tuple[pa.Table, pa.Table, int]:
    """The candidates that have scores, their scores, and how many have none (they are in quarantine)."""
    import pyarrow.compute as pc

    scored = candidates.filter(pc.is_in(candidates["prompt_id"], value_set=scores["prompt_id"].combine_chunks()))
    return scored, scores, len(candidates) - len(scored)


def _rank_part(
    folder: Path, name: str, joined: tuple[pa.Table, pa.Table, int], config: RankConfig, scale: Tensor | None
) -> Part:
    candidates, scores, quarantined = joined
    counts: Counter[str] = Counter({"quarantined": quarantined})
    tables: dict[str, pa.Table] = {}
    if len(candidates):
        scores_RPK = _score_tensor(scores)
        phi_PK = ranking.win_rates(scores_RPK, temperature=config.temperature, scale_R=scale)
        reasons = list(_reasons(candidates, scores_RPK, phi_PK, config))
        counts.update(reason for reason in reasons if reason)
        whole = _ranked_table(candidates, scores, phi_PK)
        for split, rows in _split(whole["prompt_id"].to_pylist(), reasons, config.held_out).items():
            counts[split] = len(rows)
            if rows:
                tables[f"data/{split}-{name[5:]}.parquet"] = whole.take(rows)
    return write_part(folder, name, tables, notes=dict(counts))


def _reasons(candidates: pa.Table, scores_RPK: Tensor, phi_PK: Tensor, config: RankConfig) -> Iterator[str | None]:
    """Why each row is dropped, or None."""
    column = find_column(candidates.column_names, "candidates")
    agreement = ranking.agreement(scores_RPK).tolist()
    margin = ranking.margin(phi_PK).tolist()
    for row, media in enumerate(candidates[column].to_pylist()):
        distinct = {medium["bytes"] for medium in media}
        checks = {
            f"identical_{column}": config.dedup and len(distinct) < len(media),
            "all_tied": config.drop_ties and margin[row] <= TIE,
            "low_agreement": agreement[row] < config.min_agreement,
            "low_margin": margin[row] < config.min_margin,
        }
        yield next((reason for reason, applies in checks.items() if applies), None)


def _ranked_table(candidates: pa.Table, scores: pa.Table, phi_PK: Tensor) -> pa.Table:
    import pyarrow as pa

    rewards = [field.name for field in scores.schema.field("scores").type]
    column = find_column(candidates.column_names, "candidates")
    schema = ranked_features(rewards, column).arrow_schema
    names = COLUMNS if column == "images" else VIDEO_COLUMNS
    columns = {name: candidates[name] for name in names[:6]}
    columns |= {"scores": scores["scores"], "phi": pa.array(phi_PK.tolist())}
    return pa.table(columns).cast(schema)


def _split(prompt_ids: Sequence[str], reasons: Sequence[str | None], held_out: float) -> dict[str, list[int]]:
    kept = [row for row, reason in enumerate(reasons) if reason is None]
    sides = {row: split_of(prompt_ids[row], held_out) for row in kept}
    return {split: [row for row in kept if sides[row] == split] for split in SPLITS}


def _finish(
    folder: Path, config: RankConfig, parts: Sequence[Part], counts: Mapping[str, int], column: str
) -> StageResult:
    kept = sum(counts[split] for split in SPLITS)
    if not kept:
        reasons = ", ".join(f"{reason} {counts[reason]}" for reason in _reasons_for(column) if counts[reason])
        raise DataError(f"no row is left to rank: {reasons}; loosen the filters or look at the rewards")
    paths = [folder / path for part in parts for path in part.files]
    statistics: dict[str, Any] = {"counts": dict(counts), **describe(*load_columns(paths))}
    write_json(folder / "statistics.json", statistics)
    splits = [split for split in SPLITS if counts[split]]
    previews = write_previews(folder, paths[0]) if column == "videos" else []
    write_text(folder / "README.md", card_text(asdict(config), statistics, splits, previews=previews))
    return finish_run(folder, "rank", parts, rows=kept, counts=counts)

"""What an evaluation folder holds, as records, and how it is read back without torch.

    OUT/run.json                 what determines the images and scores; another evaluation is refused here
    OUT/base/00000.parquet ...   prompt_id, prompt, category, seed, image (PNG) or video (FFV1), score/<reward>
    OUT/tuned/00000.parquet ...  the same rows, in the same order
    OUT/base/parts/00000.json .. the record of each finished part, with its checksum
    OUT/evaluation.json          the statistics, each with its sampler settings

Deliberately not here: generating and scoring (`paired`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from alignkit.errors import DataError, MissingFileError
from alignkit.evaluation.statistics import Comparison, Floats, Interval
from alignkit.records import Prompt, Sampling
from alignkit.storage import read_json, read_schema, read_table, write_json

SCORE = "score/"
MEDIA = ("image", "video")
_INTERVALS = ("base", "tuned", "gain", "win_rate")


@dataclass(frozen=True, slots=True)
class RewardResult:
    """One reward over all pairs and per category; `sampling` is what the images or videos were made with."""

    reward: str
    is_gold: bool
    sampling: Sampling
    overall: Comparison
    categories: Mapping[str, Comparison]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A finished paired evaluation; `results` has gold first, then the proxies in the order they were given."""

    base: str
    tuned: str
    sampling: Sampling
    prompts: int
    seeds_per_prompt: int
    run_seed: int
    confidence: float
    results: tuple[RewardResult, ...]

    @property
    def gold(self) -> RewardResult | None:
        """The held-out reward, where there is one."""
        return next((result for result in self.results if result.is_gold), None)

    def result(self, reward: str) -> RewardResult:
        """The result of one reward by name."""
        for result in self.results:
            if result.reward == reward:
                return result
        raise DataError(f"no reward '{reward}' in this evaluation; it has {[r.reward for r in self.results]}.")


@dataclass(frozen=True, slots=True)
class Pairs:
    """Every pair behind an evaluation: N rows ordered by prompt, then seed index; scores [N] by reward."""

    folder: Path
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    seeds_per_prompt: int
    base: Mapping[str, Floats]
    tuned: Mapping[str, Floats]

    def gain(self, reward: str) -> Floats:
        """tuned - base [N]."""
        return self.tuned[reward] - self.base[reward]

    @property
    def modality(self) -> str:
        """What was generated, "image" or "video"; also the name of the column."""
        return next(name for name in MEDIA if name in read_schema(part_files(self.folder / "base")[0]).names)

    def media(self, side: str, rows: Collection[int]) -> dict[int, bytes]:
        """Encoded bytes of some rows of one side ("base" or "tuned"); only their parts are read."""
        encoded: dict[int, bytes] = {}
        start, column = 0, self.modality
        for part in part_files(self.folder / side):
            size = len(read_table(part, columns=["seed"]))
            inside = [row for row in rows if start <= row < start + size]
            if inside:
                values = read_table(part, columns=[column])[column]
                encoded |= {row: values[row - start].as_py() for row in inside}
            start += size
        return encoded


def part_files(folder: Path) -> list[Path]:
    """The parts of one side, in order."""
    return sorted(folder.glob("[0-9]*.parquet"))


def read_pairs(folder: Path) -> Pairs:
    """All prompts, seeds and scores of an evaluation folder; images and videos stay on disk."""
    base, tuned = (_read_side(folder / side) for side in ("base", "tuned"))
    if base["prompt_id"] != tuned["prompt_id"] or base["seed"] != tuned["seed"]:
        raise DataError(
            f"{folder}: base and tuned hold different prompts or seeds; delete the folder and evaluate again."
        )
    prompts = tuple(
        Prompt(id_, text, {"category": category})
        for id_, text, category in zip(base["prompt_id"], base["prompt"], base["category"], strict=True)
    )
    scores = [_scores(side) for side in (base, tuned)]
    seeds_per_prompt = len(prompts) // len(set(base["prompt_id"]))  # the prompts of an evaluation are distinct
    return Pairs(folder, prompts, tuple(base["seed"]), seeds_per_prompt, *scores)


def read_scores(folder: Path) -> dict[str, Floats]:
    """The scores of one side [prompts * seeds] by reward, in the order of generation."""
    return _scores(_read_side(folder))


def _read_side(folder: Path) -> dict[str, list[Any]]:
    parts = part_files(folder)
    if not parts:
        raise MissingFileError(f"{folder} holds no results; run `alignkit evaluate` first.")
    columns = [name for name in read_schema(parts[0]).names if name not in MEDIA]
    table = pa.concat_tables([read_table(part, columns) for part in parts])
    return {name: table[name].to_pylist() for name in columns}


def _scores(side: Mapping[str, list[Any]]) -> dict[str, Floats]:
    return {name.removeprefix(SCORE): np.array(side[name], np.float64) for name in side if name.startswith(SCORE)}


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write `evaluation.json`: NaN bounds become null, every result carries its sampler settings."""
    plain = asdict(evaluation) | {"sampling": evaluation.sampling.plain()}
    for result in plain["results"]:
        result["sampling"] = plain["sampling"]
        for comparison in (result["overall"], *result["categories"].values()):
            comparison.update({name: _each(comparison[name], _to_null) for name in _INTERVALS})
    write_json(folder / "evaluation.json", plain)


def read_evaluation(folder: Path) -> Evaluation:
    """The records back from `evaluation.json`; DataError where keys are missing or unknown."""
    path = folder / "evaluation.json"
    plain = read_json(path)
    try:
        results = tuple(_result(result) for result in plain.pop("results"))
        evaluation = Evaluation(sampling=Sampling(**plain.pop("sampling")), results=results, **plain)
        _require_types(evaluation)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} has other keys than this version writes ({error}); evaluate again.") from error
    return evaluation


def _require_types(evaluation: Evaluation) -> None:
    """TypeError for a text where a number belongs, or the reverse: the file may be of someone else."""
    compared = [c for result in evaluation.results for c in (result.overall, *result.categories.values())]
    intervals = [interval for c in compared for interval in (c.base, c.tuned, c.gain, c.win_rate)]
    numbers = [evaluation.prompts, evaluation.seeds_per_prompt, evaluation.run_seed, evaluation.confidence]
    numbers += [number for c in compared for number in (c.prompts, c.dropped)]
    numbers += [bound for interval in intervals for bound in (interval.mean, interval.low, interval.high)]
    names = [evaluation.base, evaluation.tuned, *(result.reward for result in evaluation.results)]
    kinds = [*zip(numbers, itertools.repeat(int | float)), *zip(names, itertools.repeat(str))]
    for value, kind in kinds:
        if not isinstance(value, kind):
            raise TypeError(f"{value!r} is a {type(value).__name__}")


def _result(plain: dict[str, Any]) -> RewardResult:
    categories = {name: _comparison(value) for name, value in plain.pop("categories").items()}
    overall, sampling = _comparison(plain.pop("overall")), Sampling(**plain.pop("sampling"))
    return RewardResult(overall=overall, categories=categories, sampling=sampling, **plain)


def _comparison(plain: dict[str, Any]) -> Comparison:
    return Comparison(**plain | {name: Interval(**_each(plain[name], _from_null)) for name in _INTERVALS})


def _each(interval: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    return {key: change(value) for key, value in interval.items()}


def _to_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _from_null(value: float | None) -> float:
    return math.nan if value is None else value

"""Judges on a finished paired evaluation: tuned against base, pair by pair, as stored.

    OUT/judged/NAME/judge.json           which judge: another one under the same name is refused
    OUT/judged/NAME/00000.json ...       verdicts of one batch: 1 tuned is better, -1 base is better, 0 abstains
    OUT/judged/NAME/result.json          counts and the win rate

A batch is written whole: run again, only missing batches are judged. Deliberately not here: how a judge decides
(`alignkit.protocols.Judge`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from alignkit.claims import holds_results
from alignkit.errors import DataError, ResumeError
from alignkit.escape import to_html, to_line
from alignkit.evaluation import page
from alignkit.evaluation.paired import EvaluateConfig
from alignkit.evaluation.results import Pairs, read_pairs
from alignkit.evaluation.statistics import Bootstrap, compare
from alignkit.media import decode_clip, decode_image, to_pixels
from alignkit.paths import require_plain_names
from alignkit.protocols import Judge
from alignkit.seeds import derive_seed
from alignkit.storage import read_json, write_json

FOLDER = "judged"


@dataclass(frozen=True, slots=True)
class Judged:
    """One judge's verdicts on an evaluation: pairs by verdict, and the share that tuned wins.

    An abstention counts as half a win. `low` and `high` bound the win rate, by bootstrap over prompts; None for a
    single prompt.
    """

    judge: str
    wins: int
    losses: int
    abstentions: int
    win_rate: float
    low: float | None
    high: float | None


def judge_pairs(folder: Path, name: str, judge: Judge, *, identity: str, config: EvaluateConfig) -> Judged:
    """Verdicts of `judge` on every pair that the evaluation in `folder` stored; resumable.

    `identity` must change with the judge's options and weights. Raises ResumeError over the verdicts of another judge
    of this name, DataError for verdicts that are not one of 1, 0, -1 for each pair, and what the judge raises.
    """
    require_plain_names([name], "judges")
    pairs, target = read_pairs(folder), folder / FOLDER / name
    _claim(target, identity)
    write_json(target / "judge.json", {"identity": identity})
    verdicts: list[int] = []
    rows = range(len(pairs.prompts))
    for number, start in enumerate(
        tqdm(range(0, len(rows), config.batch_size), desc=to_line(f"judge {name}"), unit="batch")
    ):
        part = target / f"{number:05d}.json"
        if not part.is_file():
            batch = _compare(judge, name, pairs, rows[start : start + config.batch_size])
            write_json(part, {"verdicts": batch})
        verdicts += read_json(part)["verdicts"]
    result = _summary(name, verdicts, pairs, config)
    write_json(target / "result.json", asdict(result))
    return result


def read_judged(folder: Path, name: str, identity: str) -> Judged | None:
    """The stored result of judge `name`, or None where it is not finished. Raises ResumeError for another judge's."""
    require_plain_names([name], "judges")
    target = folder / FOLDER / name
    _claim(target, identity)
    stored = target / "result.json"
    return _read_result(stored) if stored.is_file() else None


def read_all(folder: Path) -> dict[str, Judged]:
    """The results of all judges that have finished the evaluation in `folder`, by name."""
    results = [_read_result(path) for path in sorted((folder / FOLDER).glob("*/result.json"))]
    return {result.judge: result for result in results}


def _read_result(path: Path) -> Judged:
    """DataError for a result that has other keys, or a text where a number belongs."""
    stored = read_json(path)
    try:
        result = Judged(**stored)
    except TypeError as error:
        raise DataError(f"'{path}' has other keys than this version writes ({error}); judge again") from error
    numbers = (result.wins, result.losses, result.abstentions, result.win_rate, result.low or 0, result.high or 0)
    if not isinstance(result.judge, str) or not all(isinstance(number, int | float) for number in numbers):
        raise DataError(f"'{path}' holds a text where a number belongs; judge again")
    return result


def _claim(target: Path, identity: str) -> None:
    path = target / "judge.json"
    before = read_json(path)["identity"] if path.is_file() else identity
    if before != identity and holds_results(target):
        raise ResumeError(
            f"'{target}' holds the verdicts of another judge; give this one another name.",
            f"  {before!r} there, {identity!r} now",
        )


def _compare(judge: Judge, name: str, pairs: Pairs, rows: Sequence[int]) -> list[int]:
    """Verdicts of one batch. Tuned is always the first; a judge with a preference for a position corrects for it."""
    decode = decode_clip if pairs.modality == "video" else decode_image
    sides = []
    for side in ("tuned", "base"):
        stored = pairs.media(side, rows)
        arrays = [decode(stored[row], f"{side} of pair {row}") for row in rows]
        sides.append(to_pixels(np.stack(arrays)))
    verdicts = list(judge.compare(*sides, [pairs.prompts[row] for row in rows]))
    if len(verdicts) != len(rows) or not set(verdicts) <= {1, 0, -1}:
        raise DataError(f"judge '{name}' gave {verdicts} for {len(rows)} pairs; it must give 1, 0 or -1 for each")
    return verdicts


def _summary(name: str, verdicts: Sequence[int], pairs: Pairs, config: EvaluateConfig) -> Judged:
    verdicts_PS = np.array(verdicts, np.float64).reshape(-1, pairs.seeds_per_prompt)
    bootstrap = Bootstrap(config.bootstrap_samples, config.confidence, derive_seed("bootstrap", config.seed))
    rate = compare(np.zeros_like(verdicts_PS), verdicts_PS, bootstrap).win_rate
    counts = {verdict: verdicts.count(verdict) for verdict in (1, -1, 0)}
    low, high = (float(bound) if np.isfinite(bound) else None for bound in (rate.low, rate.high))
    return Judged(name, counts[1], counts[-1], counts[0], rate.mean, low, high)


# --- shown ----------------------------------------------------------------------------------------------------------


def judged_lines(results: Mapping[str, Judged]) -> list[str]:
    """One line a judge for the terminal."""
    return [
        f"judge {to_line(name)}: tuned wins {_rate(result)} ({_counts(result)})" for name, result in results.items()
    ]


def judged_section(results: Mapping[str, Judged]) -> str:
    """The report's section on judges; empty where there was none."""
    if not results:
        return ""
    lead = "Each judge compares tuned with base, pair by pair. Tuned's win rate counts an abstention as half a win."
    rows = [[to_html(name), _rate(result), _counts(result)] for name, result in results.items()]
    table = page.table(["Judge", "Win rate of tuned", "Pairs"], rows, "Win rates with bootstrap intervals over prompts")
    return page.section("judges", "Judges", lead, table)


def _rate(result: Judged) -> str:
    if result.low is None or result.high is None:
        return f"{result.win_rate:.2f}"
    return f"{result.win_rate:.2f} [{result.low:.2f}, {result.high:.2f}]"


def _counts(result: Judged) -> str:
    return f"{result.wins} won, {result.losses} lost, {result.abstentions} abstentions"

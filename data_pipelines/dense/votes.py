"""Votes on segments of pairs: what each labeller answered, kept as it was, and how far labellers agree.

    OUT/votes/LABELLER.jsonl    one vote a line, only ever appended to
    {"pair": "9f0c…", "segment": 2, "label": 1, "labeller": "anna", "details": {}}

A later vote of a labeller on the same segment replaces the earlier one, and one with the label null withdraws it. So a
labeller can be undone and resumed, and labels can be made again from the votes. Not here: how several labellers become
one label (`aggregate`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignkit.errors import ConfigError, DataError, StorageError
from alignkit.escape import get_logger
from alignkit.storage import sync, write_atomic
from data_pipelines.dense.rows import SCHEDULE, WEIGHTS

logger = get_logger(__name__)

VOTES = "votes"  # folder
# What decides which two clips and which segments a pair has: a vote on other clips must not be taken for one on these.
IDENTITY = (
    "prompt",
    "source_id",
    "source_sha256",
    "seeds",
    "etas",
    "eta_meaning",
    "sampling",
    "codec",
    "num_frames",
    "segments",
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PAIR = re.compile(r"[0-9a-f]{16}")
_MOST_LINE = 64 << 10  # bytes of a line
_MOST_SEGMENTS = 100_000  # of a pair

Place = tuple[str, int]  # pair and segment


@dataclass(frozen=True, slots=True)
class Vote:
    """One answer of one labeller on one segment.

    pair: `pair_id` of the row. segment: its number. label: 1, the first clip is better in it; -1, the second; 0, a tie;
    None withdraws the labeller's earlier vote. details: what else the labeller noted, JSON values, such as the answers
    to both orders. Raises DataError for other values.
    """

    pair: str
    segment: int
    label: int | None
    labeller: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.pair, str) or not _PAIR.fullmatch(self.pair):
            raise DataError(f"a vote on the pair {self.pair!r:.80}; give its pair_id, 16 hexadecimal digits")
        if type(self.segment) is not int or not 0 <= self.segment < _MOST_SEGMENTS:
            raise DataError(f"a vote on segment {self.segment!r:.80} of pair {self.pair}; give its number, 0 the first")
        if self.label is not None and (type(self.label) is not int or self.label not in (1, 0, -1)):
            raise DataError(
                f"a vote with the label {self.label!r:.80} on pair {self.pair}; labels are 1 (the first clip is "
                "better), 0 (a tie), -1 (the second) and null (withdrawn)"
            )
        require_labeller(self.labeller)
        if not isinstance(self.details, Mapping):
            raise DataError(f"a vote with the details {self.details!r:.80}; give a JSON object")

    @property
    def place(self) -> Place:
        """The pair and the segment."""
        return self.pair, self.segment


def require_labeller(name: Any) -> None:
    """DataError for a labeller's name that is not safe as the name of a file."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DataError(
            f"'{name!s:.80}' is no name of a labeller; use 1 to 64 of the letters a to z, A to Z, digits, '.', '_' and "
            "'-', the first a letter or digit"
        )


def pair_id(row: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for the two clips of a row and their segments.

    The first of the SHA-256 of the columns `IDENTITY` as JSON, absent ones null, and of `weights` and `schedule`.
    Labels, latents and videos do not count, so that the id of a row stays when it is labelled; a pair made again with
    another seed, by other weights or with another noise schedule has another one.
    """
    known = {name: row.get(name) for name in IDENTITY}
    known |= {name: row[name] for name in (WEIGHTS, SCHEDULE) if row.get(name)}  # pairs of earlier versions have none
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def append_votes(folder: Path, labeller: str, votes: Sequence[Vote]) -> None:
    """Add `votes` to `folder/votes/LABELLER.jsonl`; they are on the disk when this returns.

    A half line that a killed process left at the end is removed first. Raises DataError for votes of another labeller
    or a line over 64 KiB, StorageError where the file cannot be written; then a part of the votes may be in it.
    """
    require_labeller(labeller)
    lines = [_line(vote, labeller) for vote in votes]
    path = folder / VOTES / f"{labeller}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # another process may append for the same labeller
            _mend_end(handle)
            handle.write(b"".join(lines))
            handle.flush()
            os.fsync(handle.fileno())
        sync(path.parent)
    except OSError as error:
        raise StorageError(
            f"could not write '{path}': {error}; make room on the disk or fix the folder, then run the same command "
            "again"
        ) from error


def _line(vote: Vote, labeller: str) -> bytes:
    if vote.labeller != labeller:
        raise DataError(f"a vote of '{vote.labeller}' for the file of '{labeller}'; each labeller has an own file")
    line = json.dumps(asdict(vote), sort_keys=True, ensure_ascii=False).encode() + b"\n"
    if len(line) > _MOST_LINE:
        raise DataError(f"a vote of '{labeller}' has {len(line)} bytes, at most {_MOST_LINE}; shorten its details")
    return line


def _mend_end(handle: Any) -> None:
    """End the file in a line break: complete its last line where that is a vote, else cut it off."""
    size = handle.seek(0, os.SEEK_END)
    handle.seek(max(0, size - _MOST_LINE - 1))
    tail = handle.read().rpartition(b"\n")[2]
    if _is_vote(tail):
        handle.write(b"\n")
    else:
        handle.truncate(size - len(tail))


def _is_vote(line: bytes) -> bool:
    try:
        Vote(**json.loads(line))
    except (ValueError, TypeError, RecursionError):  # DataError is a ValueError
        return False
    return True


def read_votes(folder: Path, labeller: str | None = None, *, withdrawn: bool = False) -> list[Vote]:
    """The votes in `folder/votes` that hold, of all labellers by name or of one, in the order of the last votes.

    `withdrawn`: also those with the label None, withdrawn or never given. Empty where there are none. A half line at
    the end, which a killed process left, is left out. Raises DataError naming file and line of what is no vote, of a
    vote of another labeller than the file's.
    """
    names = f"{labeller}.jsonl" if labeller is not None else "*.jsonl"
    if labeller is not None:
        require_labeller(labeller)
    return [
        vote
        for path in sorted((folder / VOTES).glob(names))
        for vote in _read_file(path)
        if withdrawn or vote.label is not None
    ]


def import_votes(source: Path, folder: Path, taken: Collection[str]) -> None:
    """Copy the votes in `source/votes` to `folder/votes`, file by file, in place of earlier copies.

    Raises DataError where there is none, or for a file that is not one of votes; ConfigError for a labeller in `taken`,
    and where the earlier copy has votes that the source lacks.
    """
    files = sorted((source / VOTES).glob("*.jsonl"))
    if not files or source.resolve() == folder.resolve():
        raise DataError(f"'{source}' holds no votes of others; give a folder with {VOTES}/LABELLER.jsonl")
    for path in files:
        if path.stem in taken:
            raise ConfigError(
                f"'{path}' has votes of '{path.stem}', which is also a labeller here; rename the labeller"
            )
        read_votes(source, path.stem)  # before anything is copied
        copy, votes = folder / VOTES / path.name, _whole_lines(path)
        if copy.is_file() and not votes.startswith(_whole_lines(copy)):
            raise ConfigError(
                f"'{copy}' has votes that '{path}' lacks; add them to '{path}', or leave '{source}' out of `votes`"
            )
        write_atomic(copy, votes)


def _whole_lines(path: Path) -> bytes:
    """The file as the labeller's next vote leaves it: its last line completed, or cut off where it is no vote."""
    data = path.read_bytes()
    tail = data.rpartition(b"\n")[2]
    return data + b"\n" if _is_vote(tail) else data[: len(data) - len(tail)]


def _read_file(path: Path) -> list[Vote]:
    found: dict[Place, Vote] = {}
    try:
        with path.open("rb") as handle:
            for number, line in enumerate(iter(lambda: handle.readline(_MOST_LINE + 1), b""), 1):
                vote = _parsed(line, f"'{path}', line {number}", path.stem)
                if vote is None:
                    continue
                found.pop(vote.place, None)
                found[vote.place] = vote
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error}; correct its permissions") from error
    return list(found.values())


def _parsed(line: bytes, where: str, labeller: str) -> Vote | None:
    """The vote of a line; None for a half line at the end of the file."""
    if len(line) > _MOST_LINE:
        raise DataError(f"{where}: over {_MOST_LINE} bytes; it is no vote, remove it")
    try:
        vote = Vote(**json.loads(line))
    except (ValueError, TypeError, RecursionError) as error:
        if not line.endswith(b"\n"):
            logger.warning("%s: a half line at the end is left out", where)
            return None
        raise DataError(f"{where}: {error}; correct or remove the line, a vote is one JSON object a line") from error
    if vote.labeller != labeller:
        raise DataError(f"{where}: a vote of '{vote.labeller}' in the file of '{labeller}'; move it to its own file")
    return vote


def agreement(votes: Iterable[Vote]) -> float | None:
    """Krippendorff's alpha of the labels, nominal; see `alpha`. The units are the segments of the pairs."""
    units: dict[Place, list[int | None]] = defaultdict(list)
    for vote in votes:
        units[vote.place].append(vote.label)
    return alpha(units.values())


def alpha(units: Iterable[Iterable[float | None]]) -> float | None:
    """Krippendorff's alpha for nominal values: 1 perfect agreement, 0 that of chance, below 0 less than that.

    `units` are the values that the labellers gave to each unit; None and NaN stand for no value. With m_u values of
    unit u, o_ck = sum_u (ordered pairs of values c, k of two labellers in u) / (m_u - 1), n_c = sum_k o_ck and
    n = sum_c n_c,

        alpha = 1 - (n - 1) sum_{c != k} o_ck / sum_{c != k} n_c n_k

    (K. Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011, part C). A unit with one value does not count.
    None where no unit has two values, or all values are equal: then no agreement by chance is known.
    """
    totals: Counter[float] = Counter()  # n_c
    apart = 0.0
    for unit in units:
        counts = Counter(value for value in unit if value is not None and not math.isnan(value))
        size = counts.total()
        if size > 1:
            totals += counts
            apart += (size**2 - sum(count**2 for count in counts.values())) / (size - 1)
    n = totals.total()
    by_chance = n**2 - sum(count**2 for count in totals.values())
    return 1 - (n - 1) * apart / by_chance if by_chance else None

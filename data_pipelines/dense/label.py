"""The label stage: votes on the segments of pairs, and a new dataset of the pairs with labels, resumable.

First every labeller answers what it has not answered yet; each batch of pairs is in its file of votes before the next
one (`votes`). Then the votes become labels (`aggregate`), and each part of the pairs is written again with them. The
folder of the pairs is only read. A labeller that stops, such as a judge whose server is down, costs no vote: run
again, it goes on. A pair that cannot be labelled has the reason in the details of its votes, and is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from alignkit.claims import RUN, claim
from alignkit.errors import ConfigError, DataError, NumericsError, ServerError, require_at_least
from alignkit.escape import get_logger
from alignkit.locks import locked
from alignkit.pairs import Labeller, ShownPair
from alignkit.records import FAILED, Verdict
from alignkit.segments import LABELS, LEAST_LABELLED, is_labelled
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
    write_part,
    write_quarantine,
    write_text,
)
from data_pipelines.dense.aggregate import AGGREGATES
from data_pipelines.dense.card import labels_card_text
from data_pipelines.dense.index import Index, IndexedPair, read_index
from data_pipelines.dense.pairs import STAGE as PAIRS_STAGE
from data_pipelines.dense.shown import BuildDecoder, PairReader
from data_pipelines.dense.summary import REASON, Labelled, statistics_of
from data_pipelines.dense.votes import (
    VOTES,
    Vote,
    append_votes,
    import_votes,
    read_votes,
    require_labeller,
)

if TYPE_CHECKING:
    import pyarrow as pa

logger = get_logger(__name__)

STAGE = "label"
_LONGEST_REASON = 1000  # characters
SOURCE = "label_source"


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """How votes become labels.

    aggregate: majority (the most frequent label, else a tie), or dawid_skene (weights labellers; needs crowd-kit).
    least_labelled: share of segments without a tie that a pair needs; one without any is always left out.
    truth: the labels to compare with: a labeller, whose votes then give no label, or a column of the pairs.
    batch_size: pairs that a labeller gets at once; their votes are stored together.
    retry: ask again about segments that got no answer, and pairs that could not be labelled.
    """

    aggregate: Literal["majority", "dawid_skene"] = "majority"
    least_labelled: float = LEAST_LABELLED
    truth: str | None = None
    batch_size: int = 2
    retry: bool = False

    def __post_init__(self) -> None:
        require_at_least(1, {"batch_size": self.batch_size})
        if not 0 <= self.least_labelled <= 1:
            raise ConfigError(f"least_labelled is {self.least_labelled}; it must be within 0 and 1")


def label_pairs(
    pairs_dir: str | Path,
    config: LabelConfig,
    out_dir: str | Path,
    *,
    build_labellers: Mapping[str, Callable[[], Labeller]],
    identities: Mapping[str, str] | None = None,
    votes_dirs: Sequence[Path] = (),
    build_decoder: BuildDecoder | None = None,
) -> StageResult:
    """The pairs of a finished dense-pairs stage with labels, into `out_dir/data/part-*.parquet`, and all votes.

    `build_labellers` are asked about every pair that they have not voted on in `out_dir`; one is built only then.
    `votes_dirs` are folders with votes of others, such as people, which are copied. `identities` says what stands for
    each labeller: where it differs from that of an earlier run in `out_dir`, the run is refused. `build_decoder` makes
    the decoder of pairs that have no videos.

    The manifest has the counts of what was left out, and `statistics` of the labels. Raises DataError where no pair
    gets a label, ServerError where a judge cannot be reached, ConfigError for latents of another VAE, ResumeError,
    StorageError; what a labeller raises.
    """
    pairs_dir, folder = Path(pairs_dir), Path(out_dir)
    _, parts = recorded_parts(pairs_dir, PAIRS_STAGE)
    index = read_index(pairs_dir, parts, config.truth)
    with locked(folder):
        imported = sorted({path.stem for source in votes_dirs for path in (source / VOTES).glob("*.jsonl")})
        known = dict.fromkeys(imported, "votes") | dict(identities or dict.fromkeys(build_labellers, ""))
        if config.truth is not None and config.truth not in known and not index.has_truth:
            raise ConfigError(f"truth names '{config.truth}', which is no labeller and no column of the pairs")
        sections = {f"labeller {name}": {"identity": identity} for name, identity in known.items()}
        inputs = {"pairs_run_sha256": checksum(pairs_dir / RUN)}
        claim(folder, {"stage": STAGE, "inputs": inputs, **sections}, writes=(*STAGE_FILES, VOTES))
        for source in votes_dirs:
            import_votes(source, folder, build_labellers)
        _Asker(folder, index, config, build_labellers, PairReader(build_decoder)).ask()
        labelled = Labelled.of(_known_votes(folder, index, known), index, config.truth, AGGREGATES[config.aggregate])
        return _Writer(folder, index, config, labelled).write()


def _known_votes(folder: Path, index: Index, names: Mapping[str, str]) -> list[Vote]:
    """All votes of labellers `names` on pairs of `index`; others are counted in a warning.

    Raises DataError where none of a labeller's votes is on one of the pairs, and for a segment that a pair has not.
    """
    votes: list[Vote] = []
    for name in names:
        own = read_votes(folder, name, withdrawn=True)
        kept = [vote for vote in own if vote.pair in index.pairs]
        if own and not kept:
            raise DataError(
                f"none of the {len(own)} votes of '{name}' is on a pair of '{index.folder}', the first is on "
                f"{own[0].pair}; give the pairs that were labelled"
            )
        if len(kept) < len(own):
            others = len(own) - len(kept)
            logger.warning("%d of %d votes of '%s' are on other pairs; they are left out", others, len(own), name)
        for vote in kept:
            count = len(index.pairs[vote.pair].segments)
            if vote.segment >= count:
                raise DataError(
                    f"'{name}' voted on segment {vote.segment} of pair {vote.pair}, which has {count}; remove this "
                    f"vote from {VOTES}/{name}.jsonl in the folder given as `votes`, and delete its copy, "
                    f"'{folder / VOTES / name}.jsonl'"
                )
        votes += kept
    return votes


# --- asking -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asker:
    """Asks the labellers what they have not answered, in the order of the pairs."""

    folder: Path
    index: Index
    config: LabelConfig
    builders: Mapping[str, Callable[[], Labeller]]
    reader: PairReader

    def ask(self) -> None:
        """Every labeller about every pair; of a pair that it has answered in part, all segments again."""
        missing = self._missing()
        labellers = {name: self.builders[name]() for name, ids in missing.items() if ids}
        unlabelled = set().union(*missing.values())
        todo = [pair for pair in self.index.pairs.values() if pair.id in unlabelled]
        with tqdm(total=len(todo), desc=STAGE, unit="pair", disable=not todo) as bar:
            for batch in self.index.batches(todo, self.config.batch_size):
                shown = self._show(batch)
                for name, labeller in labellers.items():
                    wanted = [pair for pair in batch if pair.id in missing[name]]
                    if wanted:
                        append_votes(self.folder, name, self._votes(name, labeller, wanted, shown))
                bar.update(len(batch))

    def _missing(self) -> dict[str, set[str]]:
        """By labeller the pairs with a segment that it has not answered; with `retry` those without a label, too."""
        missing = {}
        for name in self.builders:
            require_labeller(name)
            votes = read_votes(self.folder, name, withdrawn=True)
            if self.config.retry:
                votes = [vote for vote in votes if vote.label is not None]
            # Requests that failed are repeated in any case: the server was down.
            done = Counter(vote.pair for vote in votes if vote.details.get(REASON) != FAILED)
            missing[name] = {pair.id for pair in self.index.pairs.values() if done[pair.id] < len(pair.segments)}
        return missing

    def _show(self, batch: Sequence[IndexedPair]) -> dict[str, ShownPair | str]:
        """The clips of each pair, or what is wrong with them."""
        shown: dict[str, ShownPair | str] = {}
        for pair in batch:
            try:
                shown[pair.id] = self.reader.read(self.index.media(pair), pair.where)
            except (DataError, NumericsError) as error:
                shown[pair.id] = str(error)
        return shown

    def _votes(
        self, name: str, labeller: Labeller, pairs: Sequence[IndexedPair], shown: Mapping[str, ShownPair | str]
    ) -> list[Vote]:
        whole = {pair.id: clips for pair in pairs if isinstance(clips := shown[pair.id], ShownPair)}
        try:
            verdicts = _verdicts(labeller, name, whole)
        except ServerError as error:
            kept = f"the votes so far are in '{self.folder / VOTES}'; run the same command again to go on from there"
            raise ServerError(*error.args, kept) from error
        votes = []
        for pair in pairs:
            given = verdicts.get(pair.id) or [Verdict(None, str(shown[pair.id])[:_LONGEST_REASON])] * len(pair.segments)
            for segment, verdict in enumerate(given):
                details = {**verdict.details, **({REASON: verdict.reason} if verdict.reason else {})}
                votes.append(Vote(pair.id, segment, verdict.label, name, details))
        return votes


def _verdicts(labeller: Labeller, name: str, shown: Mapping[str, ShownPair]) -> dict[str, Sequence[Verdict]]:
    """Verdicts by pair. Pairs of a batch that the labeller refuses are asked alone; a refused one gets the reason."""
    if not shown:
        return {}
    try:
        found = labeller.label(list(shown.values()))
    except (DataError, NumericsError) as error:
        if len(shown) > 1:
            alone: dict[str, Sequence[Verdict]] = {}
            for pair, clips in shown.items():
                alone |= _verdicts(labeller, name, {pair: clips})
            return alone
        ((pair, clips),) = shown.items()
        return {pair: [Verdict(None, str(error)[:_LONGEST_REASON])] * len(clips.segments)}
    lengths = [len(own) for own in found]
    expected = [len(clips.segments) for clips in shown.values()]
    if lengths != expected:
        raise ConfigError(f"labeller '{name}' gave {lengths} verdicts for pairs of {expected} segments; give one each")
    return dict(zip(shown, found, strict=True))


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Writer:
    """Writes the pairs that have labels enough, part by part, and the records of the stage."""

    folder: Path
    index: Index
    config: LabelConfig
    labelled: Labelled

    def write(self) -> StageResult:
        """Parts whose labels are those of an earlier run stay as they are."""
        quarantined = self.labelled.quarantined()
        path = write_quarantine(self.folder, quarantined)
        kept = [pair for pair, own in self.labelled.labels.items() if is_labelled(own, self.config.least_labelled)]
        if not kept:
            count = len(self.index.pairs)
            raise DataError(
                f"no pair is left: of {count} pairs {len(quarantined)} got no label (see '{path}'), and in the others "
                f"less than {self.config.least_labelled:.0%} of the segments are no tie; the votes are kept"
            )
        parts = [self._part(part, set(kept)) for part in self.index.parts]
        counts = {"pairs": len(self.index.pairs), "kept": len(kept), "quarantined": len(quarantined)}
        counts["filtered"] = len(self.labelled.labels) - len(kept)
        counts["unanswered"] = self.labelled.unanswered()
        settings = {name: value for name, value in asdict(self.config).items() if name not in ("batch_size", "retry")}
        facts = {"labels": settings, "statistics": statistics_of(self.labelled)}
        write_text(self.folder / "README.md", labels_card_text({**settings, **facts["statistics"]}, counts))
        return finish_run(self.folder, STAGE, parts, rows=len(kept), counts=counts, facts=facts)

    def _part(self, part: Part, kept: set[str]) -> Part:
        """A part of the pairs with its labels; unchanged where the labels are as before."""
        import pyarrow as pa

        own = [pair for path in part.files for pair in self.index.by_file.get(path, ())]
        rows = [
            (pair.id in kept, self.labelled.labels.get(pair.id, []), self.labelled.sources.get(pair.id, ""))
            for pair in own
        ]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        inputs = {**part.files, LABELS: digest}
        if done := finished_part(self.folder, part.name, inputs=inputs):
            return done
        require_intact(self.index.folder, part)
        tables = {}
        for path in part.files if any(is_kept for is_kept, *_ in rows) else ():
            table = read_table(self.index.folder / path)
            table = _with_column(table, LABELS, [labels for _, labels, _ in rows])
            table = _with_column(table, SOURCE, [source for *_, source in rows])
            tables[path] = table.filter(pa.array([is_kept for is_kept, *_ in rows]))
        for path in set(part.files) - set(tables):  # of an earlier run; the dataset is what lies in the folder
            (self.folder / path).unlink(missing_ok=True)
        notes = {"rows": sum(row[0] for row in rows)}
        return write_part(self.folder, part.name, tables, inputs=inputs, notes=notes, row_group_size=1)


def _with_column(table: pa.Table, name: str, values: Sequence[Any]) -> pa.Table:
    """`table` with other values in a column that it has, of the same type."""
    import pyarrow as pa

    place = table.schema.get_field_index(name)
    field = table.schema.field(place)
    return table.set_column(place, field, pa.array(values, field.type))

"""The label stage with a labeller that is a formula: labels, votes, resuming, what is left out, and statistics."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from alignkit.errors import ConfigError, DataError, MissingFileError, ResumeError, ServerError
from alignkit.media import encode_clip
from alignkit.pairs import Pair, PairRequest
from alignkit.records import FAILED, Prompt, Sampling, Verdict
from alignkit.segments import read_labels
from alignkit.storage import checksum, finish_run, write_json, write_part
from data_pipelines.dense.clips import Clip
from data_pipelines.dense.config import PairsConfig
from data_pipelines.dense.label import LabelConfig, label_pairs
from data_pipelines.dense.rows import pair_row, table_of
from data_pipelines.dense.votes import Vote, alpha, append_votes, pair_id, read_votes

SAMPLING = Sampling(steps=2, num_frames=9, fps=4, height=8, width=8)
PAIRS, CONFIG = PairsConfig(), LabelConfig(batch_size=2)
LEVELS = ([1, 1], [1, -1], [0, 0], [-1, 0], [0, 1])  # the label that the brightness of each pair's segments asks for
CODEC = "float32:abc"


def row_of(number: int, levels, *, videos: bool) -> dict:
    """A row whose first copy is brighter in a segment where the level is 1, darker where it is -1."""
    clip = Clip(f"{number}.mkv", Prompt.from_text(f"caption {number}"), number, "here")
    request = PairRequest(clip.prompt.text, (number, number + 1), (0.7, 0.7))
    latents = torch.zeros(2, 1, 9, 1, 1)
    for (start, end), level in zip(((0, 4), (4, 9)), levels, strict=True):
        latents[0, :, start:end] = 0.5 + 0.2 * level
        latents[1, :, start:end] = 0.5
    row = pair_row(clip, request, Pair(latents, (0.7, 0.7)), PAIRS, SAMPLING)
    row |= {"source_sha256": "", "generator": "formula", "weights": "abc", "codec": CODEC}
    if videos:
        shown = Formula().decode(latents)
        row["videos"] = [{"bytes": encode_clip(one, 4), "path": None} for one in shown]
    return row


@dataclass
class Formula:
    """A decoder: the brightness of a frame is the value of its latent."""

    codec: str = CODEC
    shown: int = 0

    def decode(self, latents):
        self.shown += 1
        values = (latents[:, 0, :, 0, 0] * 255).round().to(torch.uint8).numpy()
        return np.broadcast_to(values[:, :, None, None, None], (len(latents), 9, 8, 8, 3)).copy()


def write_pairs(folder, levels=LEVELS, *, videos=False, change=lambda row: row):
    """A finished dense-pairs stage with two pairs a part."""
    rows = [change(row_of(number, own, videos=videos)) for number, own in enumerate(levels)]
    write_json(folder / "run.json", {"stage": "dense-pairs"})
    parts = []
    for start in range(0, len(rows), 2):
        name = f"part-{start // 2:05d}"
        tables = {f"data/{name}.parquet": table_of(rows[start : start + 2], videos=videos)}
        parts.append(write_part(folder, name, tables, notes={"rows": len(rows[start : start + 2]), "quarantined": []}))
    finish_run(folder, "dense-pairs", parts, rows=len(rows), counts={"pairs": len(rows)})
    return folder


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs")


@dataclass
class Brighter:
    """The brighter segment is better. It stops at its call `stops`, and refuses captions with `refuses` in them."""

    stops: int = 10**9
    refuses: str = "nothing"
    seen: list = field(default_factory=list)

    def label(self, pairs):
        if len(self.seen) == self.stops:
            raise ServerError("no server answers at http://here")
        if any(self.refuses in pair.prompt.text for pair in pairs):
            raise DataError("the caption is refused")
        self.seen.append([pair.prompt.text for pair in pairs])
        return [[self.verdict(pair.clips[:, start:end]) for start, end in pair.segments] for pair in pairs]

    def verdict(self, clips):
        difference = float(clips[0].mean()) - float(clips[1].mean())
        return Verdict(int(np.sign(difference)), "" if difference else "tie", {"difference": difference})


@dataclass
class Garbage(Brighter):
    """No usable answer on dark segments."""

    reason: str = "malformed"

    def verdict(self, clips):
        return Verdict(None, self.reason) if clips[0].mean() < 100 else super().verdict(clips)


def run(pairs, out, labeller=None, config=CONFIG, decoder=None, **options):
    builders = {"formula": lambda: labeller or Brighter()}
    given = {"build_labellers": builders, "build_decoder": lambda _: decoder or Formula(), **options}
    return label_pairs(pairs, config, out, **given)


def rows_of(out):
    return datasets.load_dataset("parquet", data_files=str(out / "data" / "*.parquet"), split="train")


def manifest(out):
    return json.loads((out / "manifest.json").read_text("utf-8"))


def bytes_of(folder):
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in ("versions.json", "lock.json")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_every_segment_gets_its_label_and_the_pairs_stay(pairs, tmp_path, world):
    before = bytes_of(pairs)
    result = run(pairs, tmp_path / "out")
    assert bytes_of(pairs) == before
    counts = {"pairs": 5, "kept": 4, "quarantined": 0, "filtered": 1, "unanswered": 0}
    assert (result.rows, dict(result.counts)) == (4, counts)
    rows = rows_of(tmp_path / "out")
    assert rows["labels"][:] == [own for own in LEVELS if own != [0, 0]]
    assert set(rows["label_source"][:]) == {"formula"}
    assert read_labels(rows)[0] == rows["labels"][:]
    stored = {row["source_id"]: row["latents"] for row in rows_of(pairs)}
    assert all(row["latents"] == stored[row["source_id"]] for row in rows)
    said = read_votes(tmp_path / "out")
    assert [vote.label for vote in said] == [label for own in LEVELS for label in own]
    assert said[0].pair == pair_id(rows_of(pairs)[0])
    assert said[0].details == {"difference": 50.0}
    assert said[4].details["reason"] == "tie"
    facts = manifest(tmp_path / "out")["statistics"]
    assert (facts["tie_rate"], facts["mixed"], facts["usable"], facts["alpha"]) == (0.4, 0.2, 0.8, None)
    card = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert card["labels"][:] == rows["labels"][:]


def test_stored_videos_are_used_and_need_no_generator(tmp_path, world):
    pairs = write_pairs(tmp_path / "pairs", videos=True)
    assert run(pairs, tmp_path / "out", build_decoder=None).rows == 4
    assert rows_of(tmp_path / "out")["labels"][:] == [own for own in LEVELS if own != [0, 0]]


def test_a_judge_that_is_down_costs_nothing(pairs, tmp_path):
    """It stops at its third batch. Run again, only the third is asked; the end is that of an unbroken run."""
    run(pairs, tmp_path / "whole")
    first = Brighter(stops=2)
    with pytest.raises(ServerError, match=r"no server answers(.|\n)*the votes so far are in '.*votes'; run the same"):
        run(pairs, tmp_path / "out", first)
    assert len(read_votes(tmp_path / "out")) == 8
    again, decoder = Brighter(), Formula()
    run(pairs, tmp_path / "out", again, decoder=decoder)
    assert (again.seen, decoder.shown) == ([["caption 4"]], 1)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    idle, decoder = Brighter(), Formula()
    run(pairs, tmp_path / "out", idle, decoder=decoder)
    assert (idle.seen, decoder.shown) == ([], 0)
    with pytest.raises(ResumeError, match=r"labeller formula\.identity"):
        run(pairs, tmp_path / "out", identities={"formula": "other"})


def test_a_damaged_part_is_written_again_without_asking(pairs, tmp_path):
    run(pairs, tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    (tmp_path / "out" / "data" / "part-00000.parquet").write_bytes(b"nothing")
    idle = Brighter()
    run(pairs, tmp_path / "out", idle)
    assert not idle.seen
    assert bytes_of(tmp_path / "out") == before
    path = pairs / "data" / "part-00000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="part-00000"):
        run(pairs, tmp_path / "other")
    start = whole.index(b"caption")  # the file still opens
    path.write_bytes(whole[:start] + b"Caption" + whole[start + 7 :])
    with pytest.raises(DataError, match=r"part-00000\.parquet' .*run the stage that made it again"):
        run(pairs, tmp_path / "another")


def test_garbage_is_counted_and_not_asked_again(tmp_path):
    """A segment without an answer is a tie; a pair without any is left out, with the reason."""
    pairs = write_pairs(tmp_path / "pairs", [[1, -1], [-1, -1]])
    result = run(pairs, tmp_path / "out", Garbage())
    assert dict(result.counts) == {"pairs": 2, "kept": 1, "quarantined": 1, "filtered": 0, "unanswered": 1}
    assert rows_of(tmp_path / "out")["labels"][:] == [[1, 0]]
    (fault,) = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text("utf-8").splitlines())
    assert (fault["source_id"], fault["reason"]) == ("1.mkv", "formula: malformed")
    assert manifest(tmp_path / "out")["statistics"]["labellers"]["formula"]["unanswered"] == {"malformed": 3}
    again = Brighter()
    run(pairs, tmp_path / "out", again)
    assert not again.seen
    run(pairs, tmp_path / "out", again, LabelConfig(retry=True))
    assert again.seen == [["caption 0", "caption 1"]]
    assert rows_of(tmp_path / "out")["labels"][:] == [[1, -1], [-1, -1]]


def test_failed_requests_are_repeated(tmp_path):
    """A server that is down fails some requests before it counts as down."""
    pairs = write_pairs(tmp_path / "pairs", [[1, -1], [-1, -1]])
    run(pairs, tmp_path / "out", Garbage(reason=FAILED))
    again = Brighter()
    run(pairs, tmp_path / "out", again)
    assert again.seen == [["caption 0", "caption 1"]]
    assert rows_of(tmp_path / "out")["labels"][:] == [[1, -1], [-1, -1]]


def test_imported_votes_do_not_replace_newer_ones(pairs, tmp_path):
    append_votes(tmp_path / "people", "anna", [Vote(pair, 0, 1, "anna") for pair in ids_of(pairs)])
    given = {"build_labellers": {}, "votes_dirs": [tmp_path / "people"]}
    run(pairs, tmp_path / "out", **given)
    append_votes(tmp_path / "out", "anna", [Vote(ids_of(pairs)[0], 1, -1, "anna")])
    with pytest.raises(ConfigError, match=r"anna\.jsonl' has votes that '.*people.*' lacks"):
        run(pairs, tmp_path / "out", **given)
    assert len(read_votes(tmp_path / "out", "anna")) == len(ids_of(pairs)) + 1


def test_a_half_vote_is_no_vote_that_a_source_lacks(pairs, tmp_path):
    """The labeller's next vote removes it from the source: it must not be in the copy."""
    append_votes(tmp_path / "people", "anna", [Vote(pair, 0, 1, "anna") for pair in ids_of(pairs)])
    source = tmp_path / "people" / "votes" / "anna.jsonl"
    whole = source.read_bytes()
    given = {"build_labellers": {}, "votes_dirs": [tmp_path / "people"]}
    copy = tmp_path / "out" / "votes" / "anna.jsonl"
    source.write_bytes(whole + b'{"pair": "9f0')
    run(pairs, tmp_path / "out", **given)
    assert copy.read_bytes() == whole
    source.write_bytes(whole[:-1])  # the last vote is whole, its line break is missing
    run(pairs, tmp_path / "out", **given)
    assert copy.read_bytes() == whole
    append_votes(tmp_path / "people", "anna", [Vote(ids_of(pairs)[0], 1, -1, "anna")])
    run(pairs, tmp_path / "out", **given)
    assert copy.read_bytes() == source.read_bytes() != whole


def test_a_pair_that_fails_does_not_stop_the_others(tmp_path):
    """One caption that the labeller refuses, and one pair whose latents are damaged."""

    def change(row):
        return row | {"latents": [row["latents"][0], {"bytes": b"no", "path": None}]} if "3" in row["prompt"] else row

    pairs = write_pairs(tmp_path / "pairs", change=change)
    result = run(pairs, tmp_path / "out", Brighter(refuses="1"))
    assert (result.counts["kept"], result.counts["quarantined"]) == (2, 2)
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text("utf-8").splitlines()
    reasons = {fault["source_id"]: fault["reason"] for fault in map(json.loads, lines)}
    assert reasons["1.mkv"] == "formula: the caption is refused"
    assert "row 1: the latents cannot be read" in reasons["3.mkv"]


def test_latents_need_the_generator_that_made_them(pairs, tmp_path):
    with pytest.raises(ConfigError, match="has latents and no videos; give `generator`"):
        run(pairs, tmp_path / "out", build_decoder=None)
    with pytest.raises(ConfigError, match="those of the VAE float32:abc, and `generator` has float32:other"):
        run(pairs, tmp_path / "out", decoder=Formula(codec="float32:other"))
    assert not (tmp_path / "out" / "votes").exists()


# --- people, several labellers, and the truth -------------------------------------------------------------------------


def people(folder, ids, **labels):
    """Votes of each labeller: LABELS by pair, None where there is no vote."""
    for name, own in labels.items():
        votes = [
            Vote(pair, segment, label, name)
            for pair, listed in zip(ids, own, strict=True)
            for segment, label in enumerate(listed)
            if label is not None
        ]
        append_votes(folder, name, votes)
    return folder


def ids_of(pairs):
    return [pair_id(row) for row in rows_of(pairs)]


def test_votes_alone_become_labels(pairs, tmp_path):
    """Majority of two: equal votes stand, different ones are a tie, a segment with one vote has its label."""
    anna = [[1, 1], [1, -1], [1, 0], [None, None], [0, 1]]
    bob = [[1, -1], [1, None], [1, 0], [None, None], [0, 1]]
    source = people(tmp_path / "people", ids_of(pairs), anna=anna, bob=bob)
    result = run(pairs, tmp_path / "out", build_labellers={}, build_decoder=None, votes_dirs=[source])
    assert rows_of(tmp_path / "out")["labels"][:] == [[1, 0], [1, -1], [1, 0], [0, 1]]
    assert (result.counts["quarantined"], rows_of(tmp_path / "out")["label_source"][0]) == (1, "anna+bob")
    facts = manifest(tmp_path / "out")["statistics"]
    units = [[1, 1], [1, -1], [1, 1], [1, 1], [0, 0], [0, 0], [1, 1]]
    assert facts["alpha"] == pytest.approx(alpha(units))
    assert (tmp_path / "out" / "votes" / "bob.jsonl").read_bytes() == (source / "votes" / "bob.jsonl").read_bytes()
    append_votes(source, "anna", [Vote(ids_of(pairs)[0], 1, -1, "anna")])  # she changes her mind
    before = (tmp_path / "out" / "data" / "part-00001.parquet").stat().st_mtime_ns
    run(pairs, tmp_path / "out", build_labellers={}, votes_dirs=[source])
    assert rows_of(tmp_path / "out")["labels"][0] == [1, -1]
    assert (tmp_path / "out" / "data" / "part-00001.parquet").stat().st_mtime_ns == before
    append_votes(source, "anna", [Vote(ids_of(pairs)[number], 0, 0, "anna") for number in (2, 4)])
    append_votes(source, "anna", [Vote(ids_of(pairs)[4], 1, 0, "anna")])
    run(pairs, tmp_path / "out", build_labellers={}, votes_dirs=[source])
    assert rows_of(tmp_path / "out")["labels"][:] == [[1, -1], [1, -1]], "no file of an earlier run is left"


def test_agreement_with_the_truth_by_a_labeller_or_a_column(pairs, tmp_path):
    truth = [[1, -1], [1, 1], [0, 0], [-1, -1], [0, 0]]
    source = people(tmp_path / "people", ids_of(pairs), gold=truth)
    run(pairs, tmp_path / "out", config=LabelConfig(truth="gold"), votes_dirs=[source])
    facts = manifest(tmp_path / "out")["statistics"]
    assert facts["agreement"]["segments"] == {"counted": 6, "equal": 0.5, "tie": 1 / 6}
    assert facts["agreement"]["clips"] == {"counted": 2, "equal": 0.5, "tie": 0.5}
    assert set(facts["labellers"]) == {"formula"}
    assert set(rows_of(tmp_path / "out")["label_source"][:]) == {"formula"}
    with pytest.raises(ConfigError, match="truth names 'glod'"):
        run(pairs, tmp_path / "other", config=LabelConfig(truth="glod"))
    # As a column of the pairs: `labels`, which a shortcut has filled, are compared like any other column.
    known = write_pairs(tmp_path / "known", truth, change=lambda row: row | {"labels": [1, 1]})
    run(known, tmp_path / "column", config=LabelConfig(truth="labels"))
    facts = manifest(tmp_path / "column")["statistics"]["agreement"]["segments"]
    assert facts == {"counted": 10, "equal": 0.3, "tie": 0.4}


@pytest.mark.parametrize(
    ("votes", "message"),
    [
        ([Vote("0" * 16, 0, 1, "anna")], "none of the 1 votes of 'anna' is on a pair of"),
        ([("first", 2, 1)], "'anna' voted on segment 2 of pair .*, which has 2; remove .* from votes/anna.jsonl"),
        ([], "holds no votes of others"),
    ],
)
def test_votes_that_do_not_fit(pairs, tmp_path, votes, message):
    made = [Vote(ids_of(pairs)[0], *one[1:], "anna") if isinstance(one, tuple) else one for one in votes]
    if made:
        append_votes(tmp_path / "people", "anna", made)
    with pytest.raises(DataError, match=message):
        run(pairs, tmp_path / "out", build_labellers={}, votes_dirs=[tmp_path / "people"])


def test_some_votes_on_other_pairs_are_left_out(pairs, tmp_path, caplog):
    source = people(tmp_path / "people", ids_of(pairs)[:1], anna=[[1, 1]])
    append_votes(source, "anna", [Vote("0" * 16, 0, 1, "anna")])
    run(pairs, tmp_path / "out", build_labellers={}, votes_dirs=[source])
    assert "1 of 3 votes of 'anna' are on other pairs" in caplog.text
    people(source, ids_of(pairs)[:1], formula=[[1, 1]])
    with pytest.raises(ConfigError, match="'formula', which is also a labeller here"):
        run(pairs, tmp_path / "other", votes_dirs=[source])


def test_nothing_to_label_or_nothing_left(pairs, tmp_path):
    with pytest.raises(MissingFileError, match="is not a finished stage"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DataError, match=r"of 5 pairs 0 got no label .* no tie; the votes are kept"):
        run(write_pairs(tmp_path / "ties", [[0, 0]] * 5), tmp_path / "out")
    assert len(read_votes(tmp_path / "out")) == 10
    write_json(tmp_path / "none" / "run.json", {})
    finish_run(tmp_path / "none", "dense-pairs", [], rows=0, counts={})
    with pytest.raises(DataError, match="holds no pair"):
        run(tmp_path / "none", tmp_path / "out")
    mixed = write_pairs(tmp_path / "mixed", change=lambda row: row | {"segments": [[4, 9], [0, 4]]})
    with pytest.raises(DataError, match=r"row 0: segments are \[\[4, 9\], \[0, 4\]\]; give"):
        run(mixed, tmp_path / "out")
    short = write_pairs(tmp_path / "short")
    path = short / "data" / "part-00000.parquet"
    pq.write_table(pa.table({"prompt": ["a"]}), path)
    record = json.loads((short / "parts" / "part-00000.json").read_text())
    write_json(short / "parts" / "part-00000.json", record | {"files": {"data/part-00000.parquet": checksum(path)}})
    with pytest.raises(DataError, match="lacks the columns prompt_id, segments"):
        run(short, tmp_path / "out")


@pytest.mark.parametrize(
    ("verdicts", "error", "message"),
    [
        ([[Verdict(1)]], ConfigError, r"gave \[1\] verdicts for pairs of \[2, 2\]"),
        ([[Verdict(1), Verdict(2)]] * 2, DataError, "the label 2"),
    ],
)
def test_a_labeller_that_is_wrong_stops(pairs, tmp_path, verdicts, error, message):
    class Wrong(Brighter):
        def label(self, pairs):
            return verdicts

    with pytest.raises(error, match=message):
        run(pairs, tmp_path / "out", Wrong())


@pytest.mark.parametrize(("keys", "message"), [({"batch_size": 0}, "batch_size"), ({"least_labelled": 2.0}, "within")])
def test_settings_that_make_no_sense(keys, message):
    with pytest.raises(ConfigError, match=message):
        LabelConfig(**keys)

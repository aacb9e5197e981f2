"""Votes on segments: the file of each labeller, damage to it, Krippendorff's alpha against its published example."""

from __future__ import annotations

import json
import math

import pytest

from alignkit.errors import DataError
from data_pipelines.dense.votes import Vote, agreement, alpha, append_votes, pair_id, read_votes

PAIR, OTHER = "0123456789abcdef", "fedcba9876543210"


def vote(label, segment=0, labeller="anna", pair=PAIR, **details):
    return Vote(pair, segment, label, labeller, details)


def test_a_later_vote_replaces_and_null_withdraws(tmp_path):
    append_votes(tmp_path, "anna", [vote(1), vote(0, 1), vote(-1, 2)])
    append_votes(tmp_path, "anna", [vote(-1, both=[1, 1]), vote(None, 2)])
    append_votes(tmp_path, "bob", [vote(1, labeller="bob")])
    assert read_votes(tmp_path) == [vote(0, 1), vote(-1, both=[1, 1]), vote(1, labeller="bob")]
    assert read_votes(tmp_path, "bob") == [vote(1, labeller="bob")]
    assert len((tmp_path / "votes" / "anna.jsonl").read_text().splitlines()) == 5, "nothing is ever removed"
    assert read_votes(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("cut", [1, 20])
def test_a_half_line_at_the_end_is_left_out_and_cut_off(tmp_path, cut):
    append_votes(tmp_path, "anna", [vote(1), vote(-1, 1)])
    path = tmp_path / "votes" / "anna.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    kept = [vote(1), vote(-1, 1)] if cut == 1 else [vote(1)]  # only the line break is lost: the vote is whole
    assert read_votes(tmp_path) == kept
    append_votes(tmp_path, "anna", [vote(0, 2)])
    assert read_votes(tmp_path) == [*kept, vote(0, 2)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no json\n", "line 2: Expecting value"),
        ('{"pair": "x"}\n', "line 2: .*missing"),
        (json.dumps({"pair": "x", "segment": 0, "label": 1, "labeller": "anna"}) + "\n", "the pair 'x'"),
        (json.dumps({"pair": PAIR, "segment": -1, "label": 1, "labeller": "anna"}) + "\n", "segment -1"),
        (json.dumps({"pair": PAIR, "segment": 0, "label": 2, "labeller": "anna"}) + "\n", "the label 2"),
        (json.dumps({"pair": PAIR, "segment": 0, "label": True, "labeller": "anna"}) + "\n", "the label True"),
        (json.dumps({"pair": PAIR, "segment": 0, "label": math.nan, "labeller": "anna"}) + "\n", "the label nan"),
        (json.dumps({"pair": PAIR, "segment": 0, "label": 1, "labeller": "bob"}) + "\n", "a vote of 'bob' in"),
        ("[" * 70_000 + "\n", "over 65536 bytes"),
        ("[" * 60_000 + "\n", "line 2: "),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    append_votes(tmp_path, "anna", [vote(1)])
    with (tmp_path / "votes" / "anna.jsonl").open("a") as handle:
        handle.write(line)
    with pytest.raises(DataError, match=message):
        read_votes(tmp_path)


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "anna\n", "Jürgen", "x" * 65, None])
def test_names_that_are_not_safe_as_files_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="no name of a labeller"):
        append_votes(tmp_path, name, [])
    assert not (tmp_path / "votes").exists()


def test_a_pair_keeps_its_id_when_it_is_labelled_and_loses_it_with_other_clips():
    row = {"prompt": "a car", "source_id": "a.mp4", "seeds": [1, 2], "segments": [[0, 4], [4, 8]], "labels": []}
    assert pair_id(row | {"labels": [1, 0], "label_source": "anna"}) == pair_id(row)
    assert len({pair_id(row), pair_id(row | {"seeds": [1, 3]}), pair_id(row | {"segments": [[0, 8]]})}) == 3
    assert len({pair_id(row), *(pair_id(row | {"weights": name}) for name in ("a", "b"))}) == 3  # of a tuned model
    Vote(pair_id(row), 0, 1, "anna")  # an id is accepted as one


def test_alpha_is_that_of_the_published_example():
    """Krippendorff 2011, part C: four observers, twelve units, five values, missing ones; nominal alpha 0.743."""
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, math.nan],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    assert alpha(zip(*observers, strict=True)) == pytest.approx(0.743, abs=5e-4)


def test_alpha_at_its_ends():
    assert alpha([[1, 1], [0, 0], [-1, -1, -1]]) == 1
    assert alpha([[1, -1], [-1, 1]]) == pytest.approx(-0.5)  # 1 - 3 * 4 / 8
    assert alpha([[1], [0], []]) is None
    assert alpha([[1, 1], [1, 1]]) is None


def test_agreement_counts_segments_of_pairs():
    votes = [
        vote(label, segment, name, pair)
        for name in ("anna", "bob")
        for pair in (PAIR, OTHER)
        for segment, label in enumerate([1, 0])
    ]
    assert agreement(votes) == 1
    more = [*votes, vote(-1, 0, "carl"), vote(None, 1, "carl")]
    assert agreement(more) == alpha([[1, 1, -1], [0, 0], [1, 1], [0, 0]])

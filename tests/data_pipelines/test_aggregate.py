"""Several labellers' votes become one label: the majority, and Dawid and Skene's estimate where crowd-kit is there."""

from __future__ import annotations

import sys

import pytest

from alignkit.errors import ConfigError
from data_pipelines.dense.aggregate import dawid_skene, majority
from data_pipelines.dense.votes import Vote

PAIR = "0123456789abcdef"


def votes(**labels):
    """The labels of each labeller by segment; None where there is none."""
    return [Vote(PAIR, segment, label, name) for name, own in labels.items() for segment, label in enumerate(own)]


@pytest.mark.parametrize(
    ("labels", "label"),
    [([1], 1), ([1, 1, -1], 1), ([-1, 0, -1], -1), ([1, -1], 0), ([1, 0], 0), ([1, 1, -1, -1, 0], 0), ([1, None], 1)],
)
def test_the_most_frequent_label_or_a_tie(labels, label):
    given = votes(**{f"labeller{number}": [own] for number, own in enumerate(labels)})
    assert majority(given) == {(PAIR, 0): label}


def test_nothing_gives_nothing():
    assert majority(votes(anna=[None])) == {}


def test_dawid_and_skene_trust_those_who_agree():
    """Two labellers agree on 30 segments; of three who are wrong at random the majority errs, the estimate does not."""
    pytest.importorskip("crowdkit")
    truth = [1, -1, 0] * 10
    liar = [-1, 1, 0] * 10
    noise = [(1, 0, -1, 0, 1)[(3 * number) % 5] for number in range(30)]
    given = votes(anna=truth, bob=truth, carl=noise, dora=liar, eve=liar[::-1])
    found = dawid_skene(given)
    assert [found[PAIR, segment] for segment in range(30)] == truth
    assert majority(given) != found


def test_without_crowd_kit_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "crowdkit.aggregation", None)
    with pytest.raises(ConfigError, match=r"needs crowd-kit .*alignkit\[crowd\].* or use aggregate: majority"):
        dawid_skene(votes(anna=[1]))

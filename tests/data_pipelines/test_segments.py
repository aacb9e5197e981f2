"""Segments and their labels: the mapping to latent frames, what is refused, the filter, and statistics."""

from __future__ import annotations

import datasets
import pytest
import torch

from alignkit.errors import ConfigError, DataError
from alignkit.segments import NONE, equal_segments, owners, places_of, read_labels
from data_pipelines.segments import clip_label, is_labelled, latent_labels, load_dense, statistics

# frames, frames a second (a segment is one second), temporal ratio, latent frames of each segment
TABLE = [
    (121, 24, 4, [7, 6, 6, 6, 6]),  # the paper; Wan 2.2 5B; HunyuanVideo 1.5
    (81, 16, 4, [5, 4, 4, 4, 4]),  # Wan 2.1 and 2.2 14B
    (49, 8, 4, [3, 2, 2, 2, 2, 2]),  # CogVideoX
    (129, 24, 4, [7, 6, 6, 6, 8]),  # HunyuanVideo; the tail of 9 frames joins
    (121, 24, 8, [4, 3, 3, 3, 3]),  # LTX
    (161, 24, 8, [4, 3, 3, 3, 3, 3, 2]),  # LTX; the tail of 17 frames is a segment
    (85, 30, 6, [6, 5, 4]),  # Mochi
    (163, 30, 6, [6, 5, 5, 5, 7]),  # Mochi; the tail of 13 frames joins
]


@pytest.mark.parametrize(("frames", "fps", "ratio", "counts"), TABLE)
def test_latent_frames_of_segments(frames, fps, ratio, counts):
    labels = [(1, 0, -1)[number % 3] for number in range(len(counts))]
    found = latent_labels(labels, num_frames=frames, frames_per_segment=fps, temporal_ratio=ratio)
    repeated = torch.repeat_interleave(torch.tensor(labels), torch.tensor(counts))
    assert found.tolist() == repeated.tolist()
    assert len(found) == 1 + (frames - 1) // ratio


def test_a_tensor_of_labels_keeps_its_dtype():
    found = latent_labels(torch.tensor([1.0, -1.0]), num_frames=9, frames_per_segment=4, temporal_ratio=4)
    assert torch.equal(found, torch.tensor([1.0, 1.0, -1.0]))


def test_ties_go_to_the_earlier_segment_and_gaps_to_none():
    """Latent frame 1 covers frames 1 to 4: two of each segment; frames 5 to 8 are mostly in no segment."""
    assert owners(((0, 3), (3, 6)), range(9), 4) == (0, 0, NONE)
    assert owners(((1, 2),), range(5), 4) == (NONE, NONE)


def test_a_clip_at_another_frame_rate_shows_other_frames():
    """From 8 to 4 frames a second every second frame, from 8 to 16 each twice; halves to the even one."""
    assert list(places_of(5, 8, 4)) == [0, 2, 4, 6, 8]
    assert list(places_of(5, 8, 16)) == [0, 0, 1, 2, 2]
    assert places_of(5, 8, None) == range(5)
    assert owners(((0, 4), (4, 9)), places_of(5, 8, 4), 4) == (0, 1)


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        ([1, 0], {"num_frames": 81}, DataError, r"\[2\] labels; 81 frames in segments of 16 have 5"),
        ([1] * 5, {"num_frames": 82}, ConfigError, r"82 frames; a codec of temporal ratio 4 takes 1 \+ r k"),
        ([1] * 5, {"num_frames": 0}, ConfigError, "0 frames in segments of 16; both must be at least 1"),
    ],
)
def test_what_has_no_mapping(labels, options, error, message):
    with pytest.raises(error, match=message):
        latent_labels(labels, frames_per_segment=16, temporal_ratio=4, **options)


def test_short_clips_are_one_segment():
    assert equal_segments(5, 24) == ((0, 5),)
    assert equal_segments(35, 24) == ((0, 35),)
    assert equal_segments(36, 24) == ((0, 24), (24, 36))


# --- rows -----------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "a", "videos": ["a.mkv"] * 2, "labels": [1, 0], "segments": [[0, 4], [4, 9]], "num_frames": 9}


def rows(*changes):
    return datasets.Dataset.from_list([GOOD | change for change in changes])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1, 2]}, r"row 1: label 1 is 2; labels are 1 .*, 0 .tie. and -1"),
        ({"labels": [None, 1]}, r"row 1: label 0 is None"),
        ({"labels": [1]}, r"row 1: 1 labels \[1\] for 2 segments; give one for each"),
        ({"segments": [[0, 4], [4, 10]]}, r"row 1: segments are \[\[0, 4\], \[4, 10\]\]; .* of 9 frames"),
        ({"segments": [[0, 4], [3, 9]]}, "in order, without overlap"),
        ({"segments": [[4, 9], [0, 4]]}, "in order, without overlap"),
        ({"segments": [[0, 4], [4, 4]]}, "in order, without overlap"),
        ({"segments": [[-1, 4], [4, 9]]}, "in order, without overlap"),
        ({"segments": [[0, 4], [4]]}, r"row 1: segments are .*; give \[start, end\) in frames, two integers, for each"),
        ({"segments": []}, r"row 1: segments are \[\]"),
    ],
)
def test_rows_that_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        read_labels(rows({}, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": [["0", "4"], ["4", "9"]]}, r"row 0: segments are .*'0'.*; give .*, two integers, for each"),
        ({"segments": [[0, 4.5], [4.5, 9]]}, "two integers, for each"),
        ({"segments": [0, 9]}, "two integers, for each"),
        ({"labels": 1}, "row 0: labels are 1; give a list"),
        ({"num_frames": "9"}, "row 0: num_frames is '9'; give an integer"),
    ],
)
def test_values_of_another_type_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        read_labels(rows(change))


def test_rows_without_labels_yet():
    labels, segments = read_labels(rows({}, {"labels": []}, {"labels": None}))
    assert labels == [[1, 0], [], []]
    assert segments == [((0, 4), (4, 9))] * 3
    assert read_labels(rows({}).remove_columns(["segments"])) == ([[1, 0]], None)


def test_a_dataset_is_checked_with_its_own_row_numbers(tmp_path):
    """Also on the side of the split that does not hold the row; a JSON lines file is read with its segments."""
    file = tmp_path / "pairs.jsonl"
    (tmp_path / "a.mkv").write_bytes(b"video")
    many = [{"prompt": f"scene {number}"} for number in range(9)]
    rows(*many).to_json(file)
    sides = [load_dense(file, side, held_out=0.5) for side in ("train", "heldout")]
    assert sum(map(len, sides)) == 9
    assert sides[0][0]["segments"] == GOOD["segments"]
    rows(*many, {"labels": [0, 7]}).to_json(file)
    for side in ("train", "heldout"):
        with pytest.raises(DataError, match=r"pairs\.jsonl', row 9: label 1 is 7"):
            load_dense(file, side, held_out=0.5)


# --- filter and statistics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "is_kept"),
    [([0, 0, 1, 0, 0], True), ([0, 0, 0, -1, 0, 0], False), ([1, -1], True), ([0], False), ([], False)],
)
def test_one_of_five_segments_is_enough(labels, is_kept):
    assert is_labelled(labels) == is_kept


def test_without_a_least_share_one_label_is_enough():
    assert is_labelled([0] * 9 + [1], 0.0)
    assert not is_labelled([0] * 9, 0.0)


def test_the_clips_label_is_the_majority():
    assert [clip_label(labels) for labels in ([1, 1, -1], [0, -1, 0], [1, -1, 0], [])] == [1, -1, 0, 0]


def test_statistics_counted_by_hand():
    labels = [[1, -1, 0, 0, 1], [0, 0, 0, 0, 0], [], [-1, 0, 0, 0, 0]]
    truth = [[1, 1, 0, -1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [-1, -1, 0, 0, 0]]
    found = statistics(labels, truth)
    assert found == {
        "pairs": 4,
        "labelled": 3,
        "segments": 15,
        "tie_rate": 11 / 15,
        "mixed": 1 / 3,
        "usable": 2 / 3,
        # 7 segments with a truth: equal in 3 (twice +1, once -1), a tie in 3
        "agreement": {
            "segments": {"counted": 7, "equal": 3 / 7, "tie": 3 / 7},
            "clips": {"counted": 3, "equal": 2 / 3, "tie": 1 / 3},
        },
    }


def test_statistics_of_nothing():
    assert statistics([[]]) == {
        "pairs": 1,
        "labelled": 0,
        "segments": 0,
        "tie_rate": None,
        "mixed": None,
        "usable": None,
    }

"""Pairs that `alignkit annotate` shows: frames from videos, latents or previews, and what cannot be shown."""

from __future__ import annotations

import json
import shutil

import moving_pairs
import numpy as np
import pyarrow.parquet as pq
import pytest
from annotating import images, request, served

from alignkit.errors import ConfigError, DataError, MissingFileError
from data_pipelines.annotation import Pairs
from data_pipelines.annotation.pairs import packed


@pytest.fixture(scope="module")
def pairs(pairs_folder):
    return Pairs(pairs_folder)


def test_frames_are_those_of_the_stored_videos(pairs, pairs_folder):
    """Each row is read without the others of its file."""
    assert [len(row.segments) for row in pairs.rows] == [4, 4, 4, 4]
    assert pairs.segments == 16
    files = sorted((pairs_folder / "data").iterdir())
    assert [pq.ParquetFile(file).num_row_groups for file in files] == [3, 1]
    for number, row in enumerate(pairs.rows):
        made = moving_pairs.both(row.prompt, number, 16)
        for copy in range(2):
            assert (images(packed(pairs.clips(number)[copy])) == made[copy]).all()


def test_large_frames_become_smaller():
    frames = np.random.default_rng(0).integers(0, 256, (2, 600, 900, 3), dtype=np.uint8)
    shown = images(packed(frames // 2 + 64))
    assert shown.shape == (2, 512, 768, 3)


def test_a_folder_without_videos(tmp_path):
    """Previews are shown, or with a model the latents; with neither it is said what to do."""
    shapes = moving_pairs.write(tmp_path, 2, previews=True)
    row = Pairs(tmp_path).rows[1]
    good = moving_pairs.both(row.prompt, 1, 16)[0].astype(int)
    assert np.abs(Pairs(tmp_path).clips(1)[0] - good).mean() < 12  # lossy
    loaded = []
    decoded = Pairs(tmp_path, lambda sampling: loaded.append(sampling) or shapes)
    assert (decoded.clips(1)[0] == good).all()
    assert loaded[0].num_frames == 16
    shapes.codec = "float32:other"
    with pytest.raises(ConfigError, match="VAE float32:shapes, and `generator` has float32:other"):
        decoded.clips(1)[0]
    next((tmp_path / "clips").iterdir()).unlink()  # no longer one for each row
    with pytest.raises(DataError, match="`videos: true` or `previews: true`, or give `generator`"):
        Pairs(tmp_path)


def test_a_preview_of_fewer_frames_is_stretched(tmp_path):
    """A preview has at most 128 frames, here of 160 every second one."""
    moving_pairs.write(tmp_path, 1, frames=160, previews=True)
    pairs = Pairs(tmp_path)
    frames = pairs.clips(0)[1]
    assert len(frames) == 160
    assert (frames[::2] == frames[1::2]).all()


def test_folders_that_hold_no_pairs(tmp_path, pairs_folder):
    with pytest.raises(MissingFileError, match="is not a finished stage"):
        Pairs(tmp_path)
    shutil.copytree(pairs_folder, tmp_path / "pairs")
    (tmp_path / "pairs" / "data" / "part-00001.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match="is damaged or not a parquet file"):
        Pairs(tmp_path / "pairs")


def test_segments_that_the_clip_has_not(pairs_folder, tmp_path):
    """Refused at the start where the row says so, else when the pair is shown."""
    shutil.copytree(pairs_folder, tmp_path / "pairs")
    file = tmp_path / "pairs" / "data" / "part-00001.parquet"
    table = pq.read_table(file)
    for num_frames in (16, 99):
        rows = [row | {"segments": [[0, 99]], "num_frames": num_frames} for row in table.to_pylist()]
        pq.write_table(table.from_pylist(rows, schema=table.schema), file)
        if num_frames == 16:
            with pytest.raises(DataError, match=r"segments are \[\[0, 99\]\]"):
                Pairs(tmp_path / "pairs")
    pairs = Pairs(tmp_path / "pairs")
    with served(pairs, tmp_path) as running:
        status, answer = request(running, f"/api/clips/{pairs.rows[3].id}/left?annotator=anna")
    assert status == 422
    assert "the clips have 16 frames" in json.loads(answer)["error"]

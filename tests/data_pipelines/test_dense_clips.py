"""Captioned real videos: what is found in folders and tables, what is left out, and clips as they are decoded."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import clips as made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from alignkit import media
from alignkit.errors import DataError, MissingFileError
from alignkit.records import Sampling
from data_pipelines.dense import read_clips
from data_pipelines.dense.decoding import Decoded, decode_listed, decoded

SAMPLING = Sampling(steps=2, num_frames=5, fps=8, height=16, width=24)
VIDEO = made.encoded(made.frames(6))


def webp(pictures, durations):
    buffer = io.BytesIO()
    images = [Image.fromarray(picture) for picture in pictures]
    images[0].save(buffer, "WEBP", save_all=True, append_images=images[1:], duration=durations, lossless=True)
    return buffer.getvalue()


def fill(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_a_folder_with_captions(tmp_path):
    """Subfolders too; what does not match is listed with its reason and does not stop the rest."""
    files = {"a.mp4": VIDEO, "a.txt": "a  cat\n", "sub/b.webm": VIDEO, "sub/b.caption": "a dog", "c.mkv": VIDEO}
    files |= {"lone.txt": "no video", "e.webp": VIDEO, "e.txt": " \n", "f.gif": VIDEO, "f.txt": b"\xff"}
    files |= {"g.mov": VIDEO, "g.txt": "one", "g.caption": "two", ".hidden.mp4": VIDEO}
    found = read_clips(fill(tmp_path, files))
    assert [(clip.id, clip.prompt.text) for clip in found.items] == [("a.mp4", "a cat"), ("sub/b.webm", "a dog")]
    reasons = {fault["source_id"]: fault["reason"] for fault in found.faults}
    assert list(reasons) == ["c.mkv", "e.webp", "f.gif", "g.mov", "lone.txt"]
    for name, part in [("c.mkv", "a video without a caption"), ("e.webp", "the caption is empty")]:
        assert part in reasons[name]
    assert "is not UTF-8" in reasons["f.gif"]
    assert "two captions" in reasons["g.mov"]
    assert "a caption without a video of its name" in reasons["lone.txt"]
    assert Path(found.read(found.items[1].place, "here")) == (tmp_path / "sub" / "b.webm").resolve()


def test_a_folder_with_a_metadata_file(tmp_path):
    """A file that is missing or outside the folder is found out when it is read; a second caption has its own id."""
    rows = [
        {"file_name": "a.mp4", "caption": "a cat"},
        {"file_name": "gone.mp4", "caption": "a dog"},
        {"file_name": "../a.mp4", "caption": "a bird"},
        {"file_name": "a.mp4", "caption": "the same cat"},
        {"file_name": "b.mp4", "caption": None},
        {"file_name": 7, "caption": "seven"},
        {"file_name": "b.mp4"},
        {"file_name": "./d.mp4", "caption": "a fish"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    found = read_clips(
        fill(tmp_path, {**dict.fromkeys(["a.mp4", "b.mp4", "c.mp4", "d.mp4"], VIDEO), "metadata.jsonl": text})
    )
    assert [clip.id for clip in found.items] == ["a.mp4", "gone.mp4", "../a.mp4", "a.mp4#2", "./d.mp4"]
    assert [fault["source_id"] for fault in found.faults] == ["b.mp4", "line 6", "line 7", "c.mp4"]
    assert "line 7: none of the columns caption, text, prompt; it has file_name" in found.faults[2]["reason"]
    results = [decode_listed(found, clip, SAMPLING) for clip in found.items]
    assert [type(result) for result in results] == [Decoded, DataError, DataError, Decoded, Decoded]
    assert "line 2, 'gone.mp4': the file" in str(results[1])
    assert "without '..'" in str(results[2])


@pytest.mark.parametrize("kind", ["bytes", "struct"])
def test_a_dataset_with_a_column_of_videos(tmp_path, world, kind):
    """Plain bytes, or {bytes, path} as `datasets` writes them; a row without a caption is left out."""
    cells = [VIDEO, b"broken", VIDEO]
    videos = cells if kind == "bytes" else [{"bytes": cell, "path": None} for cell in cells]
    pq.write_table(pa.table({"clip": videos, "text": ["a cat", "a dog", None]}), tmp_path / "v.parquet")
    found = read_clips(tmp_path / "v.parquet", video_column="clip")
    assert [clip.id for clip in found.items] == ["row-0", "row-1"]
    assert [fault["source_id"] for fault in found.faults] == ["row-2"]
    first, second = (decode_listed(found, clip, SAMPLING) for clip in found.items)
    assert np.array_equal(first.frames, made.frames(6)[:5])
    assert "row 1, clip: the clip cannot be decoded" in str(second)


def test_no_clip_at_all(tmp_path, world):
    with pytest.raises(MissingFileError, match="give a folder or dataset of captioned videos"):
        read_clips(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no video with a caption.*a video without a caption"):
        read_clips(fill(tmp_path, {"a.mp4": VIDEO}))
    with pytest.raises(DataError, match="none of the columns caption, text, prompt"):
        read_clips(fill(tmp_path / "m", {"metadata.jsonl": '{"video": "a.mp4"}\n'}))


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_a_variable_frame_rate_is_read_by_time():
    """Ten frames 50 ms apart, then five 125 ms apart: at 8 frames a second every frame of the second half is taken."""
    pictures = made.frames(15)
    times = [50 * k for k in range(10)] + [500 + 125 * k for k in range(5)]
    result = decoded(made.timed(pictures, times), "here", Sampling(steps=1, num_frames=8, fps=8, height=16, width=24))
    assert np.array_equal(result.frames, pictures[[0, 2, 5, 8, 10, 11, 12, 13]])  # 375 ms lies between 350 and 400


def test_a_rotation_flag_is_applied():
    pictures = made.frames(5, 24, 16)
    data = made.timed(pictures, [125 * k for k in range(5)], degrees=90)
    assert np.array_equal(decoded(data, "here", SAMPLING).frames, np.stack([np.rot90(p) for p in pictures]))


@pytest.mark.parametrize(("height", "width"), [(17, 25), (33, 49), (9, 31)])
def test_odd_sizes_are_covered_and_cut(height, width):
    """The expected pixels come from the float formula of a bright left half, whose edge stays where it was."""
    pictures = np.zeros((5, height, width, 3), np.uint8)
    pictures[:, :, : width // 2] = 200
    frames = decoded(made.encoded(pictures), "here", SAMPLING).frames
    scale = max(16 / height, 24 / width)
    edge = round((width // 2) * scale - (max(24, round(width * scale)) - 24) / 2)
    assert frames.shape == (5, 16, 24, 3)
    assert (frames[:, :, : edge - 2] > 180).all()
    assert (frames[:, :, edge + 2 :] < 20).all()


def test_too_few_frames_are_told():
    with pytest.raises(DataError, match="here: the clip has 3 frames at 8 frames a second, 5 are asked for"):
        decoded(made.encoded(made.frames(6), fps=16), "here", SAMPLING)


def test_a_file_without_a_video_stream():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.rate = 8000
        file.mux(stream.encode(sound))
        file.mux(stream.encode(None))
    with pytest.raises(DataError, match="here: the file holds no video"):
        decoded(buffer.getvalue(), "here", SAMPLING)


# --- moving WebP ------------------------------------------------------------------------------------------------------


def test_a_moving_webp_is_read_by_its_durations(tmp_path):
    pictures = made.frames(6)
    data = webp(pictures, [125, 125, 250, 125, 125, 125])
    assert media.clip_shape(data, "here") == (6, 16, 24)
    assert np.array_equal(media.decode_clip(data, "here", count=2), pictures[:2])
    assert np.array_equal(media.decode_clip(data, "here", fps=8), pictures[[0, 1, 2, 2, 3, 4, 5]])
    (tmp_path / "a.webp").write_bytes(data)
    assert np.array_equal(media.decode_clip(tmp_path / "a.webp", "here"), pictures)


def test_transparent_parts_of_a_webp_are_white():
    pictures = np.zeros((2, 8, 8, 4), np.uint8)
    pictures[:, :, 4:] = (10, 20, 30, 255)
    pictures[1, :, 7] = 255  # another picture, or the file would hold one frame
    frames = media.decode_clip(webp(pictures, 100), "here")
    assert (frames[:, :, :4] == 255).all()
    assert (frames[:, :, 4:7] == (10, 20, 30)).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (webp(made.frames(1), 100), "an image, where a video is expected"),
        (webp(made.frames(3), 0), "all frames have the same time"),
        (webp(made.frames(3), 100)[:40], "the clip cannot be decoded"),
        (webp(made.frames(3), 100)[:-400], "the clip cannot be decoded"),
    ],
)
def test_a_webp_that_cannot_be_used(data, message):
    with pytest.raises(DataError, match=f"here: {message}"):
        media.decode_clip(data, "here", fps=8)

"""What users have: saved datasets, JSON lines, caption folders, own splits; and what a row must not name."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from alignkit.errors import DataError
from alignkit.media import decode_clip
from alignkit.paths import Bounds
from data_pipelines.importers import load_ranked
from data_pipelines.synpic.rank import VIDEO_COLUMNS

Capture = pytest.LogCaptureFixture


@pytest.fixture(autouse=True)
def own_cache(world: Any) -> None:
    """The cache of `datasets` is not the user's."""


def colour(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def reds(rows: datasets.Dataset) -> list[list[int]]:
    """The red value of every image, by row."""
    return [[image.convert("RGB").getpixel((0, 0))[0] for image in row] for row in rows["images"]]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def images(folder: Path, *values: int) -> Path:
    """Files such as 7.png, whose red value is 7."""
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        (folder / f"{value}.png").write_bytes(colour(value))
    return folder


# --- JSON lines and CSV ---------------------------------------------------------------------------------------------


def test_pairs_of_trl_in_json_lines(tmp_path: Path) -> None:
    """Paths belong to the file's folder, whatever its name and the working folder are."""
    folder = images(tmp_path / "my [v1] ~*data", 1, 2, 4).resolve()
    inline = {"bytes": base64.b64encode(colour(3)).decode()}
    rows = [
        {"prompt": "a cat", "chosen": "1.png", "rejected": {"path": "2.png"}, "extra": [1]},
        {"prompt": "a dog", "chosen": inline, "rejected": str(folder / "4.png")},
    ]
    ranked = load_ranked(jsonl(folder / "pairs.jsonl", rows), "train", held_out=0.0)
    assert ranked["prompt"][:] == ["a cat", "a dog"]
    assert reds(ranked) == [[1, 2], [3, 4]]
    assert ranked["phi"][:] == [[1.0, 0.0]] * 2
    assert reds(load_ranked(folder, "train", held_out=0.0)) == [[1, 2], [3, 4]]


def test_pairs_of_pickapic_in_csv_with_soft_labels(tmp_path: Path, caplog: Capture) -> None:
    images(tmp_path, 1, 2)
    text = 'caption,jpg_0,jpg_1,label_0\n"a cat, asleep",1.png,2.png,0.75\na dog,2.png,1.png,0.5\na cow,2.png,1.png,0\n'
    (tmp_path / "pairs.csv").write_text(text, encoding="utf-8")
    ranked = load_ranked(tmp_path / "pairs.csv", "train", held_out=0.0)
    assert ranked["prompt"][:] == ["a cat, asleep", "a cow"]
    assert ranked["phi"][:] == [[0.75, 0.25], [0.0, 1.0]]
    assert ranked["scores"][0] == {"label": [0.75, 0.25]}
    assert "the probability that the first is better" in caplog.text
    assert "1 ties dropped, 2 rows kept" in caplog.text
    caplog.clear()
    load_ranked(tmp_path / "pairs.csv", "heldout", held_out=1.0)
    assert not caplog.text


def test_clips_in_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"clip")
    rows = jsonl(tmp_path / "clips.jsonl", [{"prompt": "a", "videos": ["a.mp4", "a.mp4"], "phi": [1, 0.25]}])
    loaded = load_ranked(rows, "train", held_out=0.0)
    assert loaded["phi"][:] == [[1.0, 0.25]]
    assert [Path(cell["path"]) for cell in loaded["videos"][0]] == [(tmp_path / "a.mp4").resolve()] * 2


def clip(codec: str = "ffv1", container: str = "matroska", pixels: str = "bgr0") -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 24, pixels
        for value in (0, 100, 200):
            picture = np.full((16, 24, 3), value, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return buffer.getvalue()


def moving(kind: str) -> bytes:
    buffer = io.BytesIO()
    pictures = [Image.new("RGB", (24, 16), (value, 0, 0)) for value in (0, 100, 200)]
    pictures[0].save(buffer, format=kind, save_all=True, append_images=pictures[1:], duration=100)
    return buffer.getvalue()


VIDEOS = {
    "a.mp4": clip("mpeg4", "mp4", "yuv420p"),
    "a.webm": clip("libvpx-vp9", "webm", "yuv420p"),
    "a.mkv": clip(),
    "a.mov": clip("mpeg4", "mov", "yuv420p"),
    "a.avi": clip("mpeg4", "avi", "yuv420p"),
    "a.gif": moving("GIF"),
    "a.webp": moving("WEBP"),
}
LAYOUTS = {
    "trl": {"prompt": "a cat", "chosen": "first", "rejected": "second"},
    "pickapic": {"caption": "a cat", "jpg_0": "first", "jpg_1": "second", "label_0": 1},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", VIDEOS)
def test_pairs_of_videos_in_json_lines(tmp_path: Path, name: str, layout: str) -> None:
    """By path, and inline, where no ending says what it is."""
    first = VIDEOS[name]
    (tmp_path / name).write_bytes(first)
    (tmp_path / "b.mkv").write_bytes(VIDEOS["a.mkv"])
    inline = {"bytes": base64.b64encode(first).decode()}
    for given in (name, inline):
        words = {"first": given, "second": "b.mkv"}
        row = {key: words.get(str(value), value) for key, value in LAYOUTS[layout].items()}
        loaded = load_ranked(jsonl(tmp_path / "pairs.jsonl", [row]), "train", held_out=0.0)
        assert loaded.column_names == list(VIDEO_COLUMNS)
        assert [cell["bytes"] for cell in loaded["videos"][0]] == [first, VIDEOS["a.mkv"]]
        assert (loaded["prompt"][:], loaded["phi"][:]) == (["a cat"], [[1.0, 0.0]])
        assert decode_clip(loaded["videos"][0][0], "here").shape == (3, 16, 24, 3)


def test_pairs_of_videos_in_plain_parquet(tmp_path: Path) -> None:
    first, second = VIDEOS["a.mp4"], VIDEOS["a.mkv"]
    pq.write_table(pa.table({"prompt": ["a"], "chosen": [first], "rejected": [second]}), tmp_path / "p.parquet")
    loaded = load_ranked(tmp_path / "p.parquet", "train", held_out=0.0)
    assert [cell["bytes"] for cell in loaded["videos"][0]] == [first, second]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("a.mkv", "1.png", "row 0, rejected: an image, where a video is expected; keep images and videos in separate"),
        ("1.png", "a.mkv", "row 0, rejected: a video, where an image is expected; keep images and videos in separate"),
        ("a.mkv", "still.webp", "row 0, rejected: an image, where a video is expected; keep images and videos in"),
        ("broken.mp4", "a.mkv", "row 0, chosen: the clip cannot be decoded"),
    ],
)
def test_pairs_with_media_that_are_no_videos(tmp_path: Path, first: str, second: str, message: str) -> None:
    images(tmp_path, 1)
    Image.new("RGB", (24, 16)).save(tmp_path / "still.webp")
    for name, data in {"a.mkv": VIDEOS["a.mkv"], "broken.mp4": b"clip"}.items():
        (tmp_path / name).write_bytes(data)
    row = {"prompt": "a cat", "chosen": first, "rejected": second}
    with pytest.raises(DataError, match=message):
        load_ranked(jsonl(tmp_path / "pairs.jsonl", [row]), "train", held_out=0.0)


def test_still_images_of_moving_formats_are_images(tmp_path: Path) -> None:
    for name in ("a.webp", "a.gif"):
        Image.new("RGB", (4, 4), (9, 0, 0)).save(tmp_path / name)
    row = {"prompt": "a cat", "chosen": "a.gif", "rejected": "a.webp"}
    rows = load_ranked(jsonl(tmp_path / "pairs.jsonl", [row]), "train", held_out=0.0)
    assert [image.format for image in rows[0]["images"]] == ["GIF", "WEBP"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "../secret.png"}, r"line 2, chosen: '\.\./secret\.png' is no path below .* without '\.\.'"),
        ({"chosen": "/etc/hostname"}, "line 2, chosen: '/etc/hostname' is outside"),
        ({"chosen": "link.png"}, "line 2, chosen: 'link.png' is outside"),
        ({"chosen": "http://host/a.png"}, "line 2, chosen: 'http://host/a.png' is a URL; download the file"),
        ({"chosen": "zip://a.png::b.zip"}, "is a URL"),
        ({"chosen": "absent.png"}, "line 2, chosen: the file '.*absent.png' does not exist"),
        ({"chosen": "a" * 5000}, "line 2, chosen: "),
        ({"chosen": {"bytes": "?"}}, "line 2, chosen: 'bytes' must be in base64"),
        ({"chosen": 3}, "line 2, chosen: expected a path, .* not int"),
        ({"prompt": [{"role": "user"}]}, "line 2: 'prompt' must be text, got"),
        ({"prompt": " "}, "row 1: the prompt is empty"),
    ],
)
def test_rows_that_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    folder = images(tmp_path / "data", 1)
    images(tmp_path, 9)
    (folder / "link.png").symlink_to(tmp_path / "9.png")
    good = {"prompt": "a", "chosen": "1.png", "rejected": "1.png"}
    with pytest.raises(DataError, match=message):
        load_ranked(jsonl(folder / "p.jsonl", [good, {**good, **row}]), "train", held_out=0.0)


def test_a_wider_root(tmp_path: Path) -> None:
    images(tmp_path / "pool", 1, 2)
    (tmp_path / "lists").mkdir()
    rows = [{"prompt": "a", "chosen": str(tmp_path / "pool" / f"{n}.png"), "rejected": "../x.png"} for n in (1, 2)]
    rows = [{**row, "rejected": row["chosen"]} for row in rows]
    path = jsonl(tmp_path / "lists" / "p.jsonl", rows)
    assert reds(load_ranked(path, "train", held_out=0.0, root=tmp_path)) == [[1, 1], [2, 2]]
    with pytest.raises(DataError, match="is outside"):
        load_ranked(path, "train", held_out=0.0)


# --- paths in parquet, cards and saved datasets ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["http://127.0.0.1:9/a.mp4", "/etc/hostname", "../9.png"])
def test_a_path_in_parquet_stays_inside(tmp_path: Path, name: str) -> None:
    """PyAV and `datasets` would fetch the URL and open the file."""
    images(tmp_path, 9)
    folder = images(tmp_path / "data", 1)
    cells = [{"bytes": colour(1), "path": "https://where.it/came/from.png"}, {"bytes": None, "path": name}]
    ranked = {
        "prompt_id": ["a", "b"],
        "prompt": ["a", "b"],
        "images": [[cell, cell] for cell in cells],
        "phi": [[1.0, 0.0]] * 2,
        "generators": [["g", "g"]] * 2,
        "seeds": [[1, 2]] * 2,
        "sampling": ["{}"] * 2,
        "scores": [{"r": [1.0, 0.0]}] * 2,
    }
    for column, table in {
        "video": {"prompt": ["a", "b"], "video": cells},
        "videos": {"prompt": ["a", "b"], "videos": [[cell, cell] for cell in cells]},
        "chosen": {"prompt": ["a", "b"], "chosen": cells, "rejected": cells},
        "images": ranked,
    }.items():
        pq.write_table(pa.table(table), folder / "p.parquet")
        with pytest.raises(DataError, match=f"row 1, {column}: '{name}' is"):
            load_ranked(folder / "p.parquet", "train", held_out=0.0)


def test_paths_inside_are_read(tmp_path: Path) -> None:
    folder = images(tmp_path / "~[x]*", 5)
    cells = [{"bytes": colour(1), "path": "https://where.it/came/from.png"}, {"bytes": None, "path": "5.png"}]
    table = pa.table({"prompt": ["a"], "chosen": cells[:1], "rejected": cells[1:]})
    pq.write_table(table, folder / "p[0].parquet")
    assert reds(load_ranked(folder / "p[0].parquet", "train", held_out=0.0)) == [[1, 5]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("README.md", "---\nconfigs: [{data_files: 'https://host/a.parquet'}]\n---\n", "is a URL"),
        ("README.md", "---\nconfigs: [{data_files: [{split: train, path: ../a.parquet}]}]\n---\n", "is no path below"),
        ("README.md", "\n \n---\nconfigs: [{data_files: /etc/passwd}]\n---\n", "is outside"),
        ("README.md", "---\na: |\n---b\nconfigs: [{data_files: /etc/passwd}]\n---\n", "is outside|broken header"),
        ("README.md", "---\r\nconfigs: [{data_dir: /etc}]\r\n---\r\n", "is outside"),
        (".huggingface.yaml", "configs: [{data_files: 'hf://datasets/x/y.parquet'}]\n", "is a URL"),
        ("README.md", "---\nconfigs: &a [*a]\n---\n", "aliases"),
        ("README.md", "---\nconfigs: [\n---\n", "has a broken header"),
    ],
)
def test_a_card_names_no_data_elsewhere(tmp_path: Path, name: str, text: str, message: str) -> None:
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(text.encode())
    with pytest.raises(DataError, match=message):
        load_ranked(tmp_path / "data", "train")


def test_saved_datasets(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": colour(n), "path": None} for n in (1, 2)], "text": ["a", "b"]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.save_to_disk(tmp_path / "one [1]")
    assert reds(load_ranked(tmp_path / "one [1]", "train", held_out=0.0)) == [[1], [2]]
    datasets.DatasetDict({"train": saved.select([0]), "test": saved.select([1])}).save_to_disk(tmp_path / "both")
    assert reds(load_ranked(tmp_path / "both", "train")) == [[1]]
    assert reds(load_ranked(tmp_path / "both", "heldout")) == [[2]]
    state = tmp_path / "one [1]" / "state.json"
    changed = json.loads(state.read_text(encoding="utf-8"))
    changed["_data_files"] = [{"filename": "../both/train/data-00000-of-00001.arrow"}]
    state.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(DataError, match=r"state\.json': '\.\./both/.* is no path below"):
        load_ranked(tmp_path / "one [1]", "train")
    state.write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="is no whole `save_to_disk` folder"):
        load_ranked(tmp_path / "one [1]", "train")


# --- splits ---------------------------------------------------------------------------------------------------------


def test_the_users_own_split_is_the_held_out_one(tmp_path: Path, caplog: Capture) -> None:
    images(tmp_path, 1, 2, 3)
    for name, value in (("train", 1), ("validation", 2), ("test", 3)):
        row = {"prompt": name, "chosen": f"{value}.png", "rejected": f"{value}.png"}
        jsonl(tmp_path / f"{name}.jsonl", [row])
    assert reds(load_ranked(tmp_path, "train")) == [[1, 1]]
    assert "its split 'validation' is the held-out one" in caplog.text
    assert "not used: test" in caplog.text
    assert reds(load_ranked(tmp_path, "heldout")) == [[2, 2]]


def test_a_parquet_folder_with_a_test_file(tmp_path: Path) -> None:
    for name in ("train", "test"):
        rows = [{"prompt": f"{name} {n}", "chosen": colour(1), "rejected": colour(2)} for n in range(3)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    sides = {side: load_ranked(tmp_path, side, held_out=0.5)["prompt"][:] for side in ("train", "heldout")}
    assert sides == {
        side: [f"{name} {n}" for n in range(3)] for side, name in (("train", "train"), ("heldout", "test"))
    }


def test_splits_without_train_are_refused(tmp_path: Path) -> None:
    for name in ("first", "second"):
        jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "a"}])
    with pytest.raises(DataError, match=r"holds first\.jsonl, second\.jsonl; name one"):
        load_ranked(tmp_path, "train")


# --- folders --------------------------------------------------------------------------------------------------------


def test_kohya_folders(tmp_path: Path, caplog: Capture) -> None:
    for name, value in (("20_dog", 1), ("10_cat", 2)):
        (images(tmp_path / name, value) / f"{value}.txt").write_bytes(f"\ufeffa {name}\n".encode())
    images(tmp_path / "10_cat", 3)
    (tmp_path / "10_cat" / "9.caption").write_text("lost", encoding="utf-8")
    ranked = load_ranked(tmp_path, "train", held_out=0.0)
    assert ranked["prompt"][:] == ["a 10_cat", "a 20_dog", "a 20_dog"]
    assert reds(ranked) == [[2], [1], [1]]
    assert ranked["phi"][:] == [[0.0]] * 3
    for said in ("1 images without a caption", "'3.png'", "1 captions without an image", "20_dog 2 times"):
        assert said in caplog.text


def test_equal_repeats_change_nothing_and_captions_may_end_in_caption(tmp_path: Path, caplog: Capture) -> None:
    (images(tmp_path / "10_a", 1) / "1.caption").write_text("a", encoding="utf-8")
    assert reds(load_ranked(tmp_path, "train", held_out=0.0)) == [[1]]
    assert "every folder has 10 repeats" in caplog.text
    (tmp_path / "10_a" / "1.txt").write_text("b", encoding="utf-8")
    with pytest.raises(DataError, match=r"has two captions, 1\.txt and 1\.caption"):
        load_ranked(tmp_path, "train")


def test_what_a_folder_of_pairs_does_not_use_is_counted(tmp_path: Path, caplog: Capture) -> None:
    images(tmp_path / "w", 1)
    images(tmp_path / "l", 1, 2, 3)
    (tmp_path / "w" / "1.txt").write_bytes("\ufeffa\rcat\r".encode())
    (tmp_path / "w" / "7.txt").write_text("x", encoding="utf-8")
    assert load_ranked(tmp_path, "train", held_out=0.0)["prompt"][:] == ["a cat"]
    assert "2 images in l/ without a partner in w/ are not used, for example '2.png'" in caplog.text
    assert "1 captions in w/ without an image are not used" in caplog.text


def test_images_without_a_metadata_row_are_counted(tmp_path: Path, caplog: Capture) -> None:
    folder = images(tmp_path / "a[b]", 1, 2)
    jsonl(folder / "metadata.jsonl", [{"file_name": "1.png", "text": "a"}])
    assert reds(load_ranked(folder, "train", held_out=0.0)) == [[1]]
    assert "1 files without a row in the metadata are not used, for example '2.png'" in caplog.text
    jsonl(folder / "metadata.jsonl", [{"file_name": "../9.png", "text": "a"}])
    with pytest.raises(DataError, match=r"cannot be opened: .*not allowed"):
        load_ranked(folder, "train")


def test_phi_lies_within_0_and_1(tmp_path: Path) -> None:
    for phi in ([1.5, 0.0], [float("nan"), 0.0], []):
        table = pa.table({"prompt": ["a"], "videos": [[b"x", b"y"]], "phi": pa.array([phi], pa.list_(pa.float64()))})
        pq.write_table(table, tmp_path / "p.parquet")
        with pytest.raises(DataError, match=r"row 0: phi is .*; it must be a list of numbers within 0 and 1"):
            load_ranked(tmp_path / "p.parquet", "train")


def test_bounds(tmp_path: Path) -> None:
    bounds = Bounds(tmp_path / "a")
    assert bounds.path("b/c", "x") == (tmp_path / "a" / "b" / "c").resolve()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("", "..", "b/../c", "b\\..\\c", "/", "file:///etc/hostname", "a\0b", str(tmp_path / "ab")):
        with pytest.raises(DataError, match="'x'"):
            bounds.path(name, "'x'")

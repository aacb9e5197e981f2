"""Importers and exporters: every layout opens as ranked rows, and what goes out comes back."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from alignkit.errors import ConfigError, DataError, MissingFileError
from data_pipelines.exporters import export, export_pairs
from data_pipelines.importers import load_ranked
from data_pipelines.synpic.rank import COLUMNS


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(buffer, format="JPEG")
    return buffer.getvalue()


def pickapic(path: Path, labels: list[float]) -> list[dict[str, Any]]:
    rows = [
        {"jpg_0": picture(2 * i), "jpg_1": picture(2 * i + 1), "label_0": label, "caption": f"caption {i}", "extra": i}
        for i, label in enumerate(labels)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return rows


def encoded(ranked: datasets.Dataset) -> list[list[bytes]]:
    cells = ranked.cast_column("images", datasets.List(datasets.Image(decode=False)))["images"]
    return [[cell["bytes"] for cell in row] for row in cells]


def better(ranked: datasets.Dataset) -> list[bytes]:
    return [row[phi.index(max(phi))] for row, phi in zip(encoded(ranked), ranked["phi"][:], strict=True)]


def test_pickapic_becomes_ranked_rows(world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pickapic(tmp_path / "p.parquet", [1.0, 0.0, 0.5, 1.0])
    ranked = load_ranked(tmp_path / "p.parquet", "train", held_out=0.0)
    assert ranked.column_names == list(COLUMNS)
    assert ranked["prompt"][:] == ["caption 0", "caption 1", "caption 3"]
    assert ranked["phi"][:] == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    assert encoded(ranked) == [[rows[i]["jpg_0"], rows[i]["jpg_1"]] for i in (0, 1, 3)]
    assert "1 ties dropped, 3 rows kept" in caplog.text


def test_an_imagefolder_with_captions_becomes_rows_of_one(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
    lines = [f'{{"file_name": "{number}.jpg", "text": "caption {number}"}}' for number in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    ranked = load_ranked(tmp_path, "train", held_out=0.0)
    assert ranked["prompt"][:] == ["caption 0", "caption 1"]
    assert ranked["phi"][:] == [[0.0], [0.0]]
    assert encoded(ranked) == [[picture(0)], [picture(1)]]


def test_a_videofolder_with_captions_keeps_its_clips(tmp_path: Path) -> None:
    """The files are neither opened nor copied here."""
    for number in range(2):
        (tmp_path / f"{number}.mp4").write_bytes(b"clip")
    lines = [f'{{"file_name": "{number}.mp4", "text": " caption  {number}"}}' for number in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rows = load_ranked(tmp_path, "train", held_out=0.0)
    assert rows["prompt"][:] == ["caption 0", "caption 1"]
    assert [Path(cell["path"]).name for cell in rows["video"]] == ["0.mp4", "1.mp4"]


def test_ranked_clips_keep_their_labels(tmp_path: Path) -> None:
    rows = [{"prompt": f"caption {i}", "videos": [b"a", b"b"], "phi": [1.0, 0.0]} for i in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "clips.parquet")
    found = load_ranked(tmp_path / "clips.parquet", "train", held_out=0.0)
    assert found["phi"][:] == [[1.0, 0.0]] * 2
    assert [[cell["bytes"] for cell in row] for row in found["videos"]] == [[b"a", b"b"]] * 2
    pq.write_table(pa.table({"videos": [[b"a"]]}), tmp_path / "mute.parquet")
    with pytest.raises(DataError, match="has clips, but none of the columns text, caption, prompt"):
        load_ranked(tmp_path / "mute.parquet", "train", held_out=0.0)


def test_pickapic_round_trip(world: Any, tmp_path: Path) -> None:
    rows = pickapic(tmp_path / "in.parquet", [1.0, 0.0, 0.0])
    ranked = load_ranked(tmp_path / "in.parquet", "train", held_out=0.0)
    assert export_pairs(ranked, tmp_path / "out.parquet") == 3
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [
        {key: row[key] for key in ("jpg_0", "jpg_1", "label_0", "caption")} for row in rows
    ]


def test_trl_round_trip(world: Any, tmp_path: Path) -> None:
    rows = pickapic(tmp_path / "in.parquet", [1.0, 0.0])
    ranked = load_ranked(tmp_path / "in.parquet", "train", held_out=0.0)
    export_pairs(ranked, tmp_path / "trl.parquet", layout="trl")
    table = pq.read_table(tmp_path / "trl.parquet")
    assert table.column_names == ["prompt", "chosen", "rejected"]
    assert [cell["bytes"] for cell in table["chosen"].to_pylist()] == [rows[0]["jpg_0"], rows[1]["jpg_1"]]
    back = load_ranked(tmp_path / "trl.parquet", "train", held_out=0.0)
    assert back["phi"][:] == [[1.0, 0.0]] * 2
    assert encoded(back)[1] == [rows[1]["jpg_1"], rows[1]["jpg_0"]]
    export_pairs(back, tmp_path / "again.parquet", layout="trl")
    assert pq.read_table(tmp_path / "again.parquet").equals(table)


@pytest.mark.parametrize("layout", ["trl", "pickapic"])
def test_what_is_exported_comes_back(world: Any, tmp_path: Path, layout: str) -> None:
    """Every pair keeps its prompt, its images and which is better; a soft label becomes a hard one."""
    pickapic(tmp_path / "in.parquet", [0.75, 0.25, 0.5, 1.0])
    assert export(tmp_path / "in.parquet", tmp_path / "out.parquet", layout=layout) == 3
    before, after = (load_ranked(tmp_path / name, "train", held_out=0.0) for name in ("in.parquet", "out.parquet"))
    assert after["prompt"][:] == before["prompt"][:] == ["caption 0", "caption 1", "caption 3"]
    best = [
        [row[phi.index(max(phi))] for row, phi in zip(encoded(d), d["phi"][:], strict=True)] for d in (before, after)
    ]
    assert best[0] == best[1]
    assert [sorted(row) for row in encoded(after)] == [sorted(row) for row in encoded(before)]
    assert [sorted(phi) for phi in after["phi"][:]] == [[0.0, 1.0]] * 3
    if layout == "pickapic":
        assert after["phi"][:] == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
        assert pq.read_table(tmp_path / "out.parquet")["label_0"].to_pylist() == [1.0, 0.0, 1.0]


def test_export_of_a_split(world: Any, tmp_path: Path) -> None:
    folder = world.ranked(tmp_path)
    counts = {split: export(folder, tmp_path / f"{split}.parquet", split=split) for split in ("train", "heldout")}
    assert counts == {split: len(load_ranked(folder, split)) for split in counts}
    captioned = datasets.Dataset.from_dict({"video": ["a"], "prompt": ["x"]})
    with pytest.raises(DataError, match="only ranked rows can be exported; the columns are video, prompt"):
        export_pairs(captioned, tmp_path / "videos.parquet")


def test_lists_become_pairs(world: Any, tmp_path: Path) -> None:
    folder = world.ranked(tmp_path)
    ranked = load_ranked(folder, "train")
    decided = [sum(a != b for i, a in enumerate(phi) for b in phi[:i]) for phi in ranked["phi"]]
    assert export_pairs(ranked, tmp_path / "best.parquet") == len(ranked)
    assert export_pairs(ranked, tmp_path / "all.parquet", pairs="all") == sum(decided)
    images = encoded(ranked)
    for row, pair in enumerate(pq.read_table(tmp_path / "best.parquet").to_pylist()):
        phi = dict(zip(images[row], ranked["phi"][row], strict=True))
        winner, loser = (pair["jpg_0"], pair["jpg_1"]) if pair["label_0"] else (pair["jpg_1"], pair["jpg_0"])
        assert (phi[winner], phi[loser]) == (max(phi.values()), min(phi.values()))


def test_splits_of_ranked_and_of_plain_pairs(world: Any, tmp_path: Path) -> None:
    folder = world.ranked(tmp_path)
    own = {split: set(load_ranked(folder, split)["prompt_id"]) for split in ("train", "heldout")}
    assert all(own.values())
    assert not own["train"] & own["heldout"]
    pickapic(tmp_path / "p.parquet", [1.0] * 40)
    parts = [load_ranked(tmp_path / "p.parquet", split, held_out=0.3)["prompt_id"][:] for split in own]
    assert sorted(parts[0] + parts[1]) == sorted(load_ranked(tmp_path / "p.parquet", "train", held_out=0)["prompt_id"])
    with pytest.raises(DataError, match="no row in the split 'heldout'"):
        load_ranked(tmp_path / "p.parquet", "heldout", held_out=0.0)


def folders(base: Path) -> Path:
    for side, value in (("w", 10), ("l", 200)):
        (base / side).mkdir(parents=True)
        for name in ("b", "a"):
            (base / side / f"{name}.jpg").write_bytes(picture(value))
    for name in ("a", "b"):
        (base / "w" / f"{name}.txt").write_text(f"caption {name}\n")
    return base


def test_folders(world: Any, tmp_path: Path) -> None:
    ranked = load_ranked(folders(tmp_path / "f"), "train", held_out=0.0)
    assert ranked["prompt"][:] == ["caption a", "caption b"]
    assert ranked["phi"][0] == [1.0, 0.0]
    assert np.asarray(ranked[0]["images"][0]).mean() == pytest.approx(10, abs=2)
    assert export_pairs(ranked, tmp_path / "out.parquet") == 2
    assert pq.read_table(tmp_path / "out.parquet")["jpg_1"][0].as_py() == picture(200)


@pytest.mark.parametrize("missing", ["l/a.jpg", "w/a.txt"])
def test_folder_pairs_that_are_not_whole_are_named(world: Any, tmp_path: Path, missing: str) -> None:
    (folders(tmp_path) / missing).unlink()
    with pytest.raises(DataError, match=rf"{missing}' .*is missing or empty"):
        load_ranked(tmp_path, "train")


def test_wrong_columns_name_expected_and_found(world: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"foo": [1], "bar": ["x"]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"columns foo, bar; expected prompt_id, .*jpg_0, .*prompt, chosen, rejected"):
        load_ranked(tmp_path / "p.parquet", "train")


def test_bad_rows_are_named(world: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "x", "chosen": picture(1), "rejected": picture(2)}, {"prompt": "y", "chosen": b""}]
    schema = pa.schema([("prompt", pa.string()), ("chosen", pa.binary()), ("rejected", pa.binary())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="row 1, chosen: the image or video is empty"):
        load_ranked(tmp_path / "p.parquet", "train")


def test_missing_paths_and_options(world: Any, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="download the dataset first"):
        load_ranked(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="unknown split 'test'"):
        load_ranked(tmp_path, "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be opened"):
        load_ranked(tmp_path / "empty", "train")
    pickapic(tmp_path / "p.parquet", [1.0])
    ranked = load_ranked(tmp_path / "p.parquet", "train", held_out=0.0)
    with pytest.raises(ConfigError, match=r"layout: unknown 'pickpic'\. Did you mean 'pickapic'"):
        export_pairs(ranked, tmp_path / "o.parquet", layout="pickpic")
    with pytest.raises(DataError, match="exists and is not overwritten"):
        export_pairs(ranked, tmp_path / "p.parquet")
    tied = ranked.remove_columns("phi").add_column("phi", [[0.5, 0.5]])
    with pytest.raises(DataError, match="no pair to export"):
        export_pairs(tied, tmp_path / "o.parquet")
    assert not (tmp_path / "o.parquet").exists()

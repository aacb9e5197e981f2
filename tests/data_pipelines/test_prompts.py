"""Prompt files of every kind, good and bad."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignkit.errors import DataError, MissingFileError
from alignkit.records import Prompt
from data_pipelines.prompts import drop_duplicates, read_prompts, split_of


def test_text_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa red cube\r\n\n  a blue   ball \n".encode())
    assert [prompt.text for prompt in read_prompts(path)] == ["a red cube", "a blue ball"]


def test_every_format_gives_the_same_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"caption": "a cat", "text": "x"}\n\n{"caption": "a dog", "text": "y"}\n')
    (tmp_path / "p.csv").write_text('caption,text\n"a cat",x\na dog,y\n')
    pq.write_table(pa.table({"caption": ["a cat", "a dog"], "text": ["x", "y"]}), tmp_path / "p.parquet")
    for ending in ("jsonl", "csv", "parquet"):
        prompts = read_prompts(tmp_path / f"p.{ending}", column="caption")
        assert prompts == [Prompt.from_text("a cat"), Prompt.from_text("a dog")]
        assert [prompt.metadata for prompt in prompts] == [{"text": "x"}, {"text": "y"}]


def test_duplicates_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a cat\na dog\na  cat\n")
    assert [prompt.text for prompt in read_prompts(path)] == ["a cat", "a dog"]
    assert "1 duplicate" in caplog.text
    assert drop_duplicates([Prompt.from_text("x")] * 3) == ([Prompt.from_text("x")], 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b" \n\n", "holds no prompt"),
        ("p.txt", b"good\nbad \xff here\n", r"p\.txt', line 2: byte 0xff at offset 9 is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{oops\n', r"line 2: .*one JSON object a line"),
        ("p.jsonl", b'["a"]\n', r"line 1: got \['a'\]"),
        ("p.jsonl", b'{"text": "a"}\n', "line 1: no column 'prompt'; found: text"),
        ("p.jsonl", b'{"prompt": 3}\n', "line 1: 'prompt' must be text, got 3"),
        ("p.csv", b"text,id\na,1\n", "no column 'prompt'; found: text, id"),
        ("p.parquet", b"no parquet", "no readable parquet"),
        ("p.json", b"{}", r"cannot read '\.json' files\. Did you mean '\.jsonl'\?"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / name)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"nowhere\.txt"):
        read_prompts(tmp_path / "nowhere.txt")


def test_split_has_its_share_and_only_grows() -> None:
    ids = [Prompt.from_text(str(number)).id for number in range(2000)]
    small, large = ({i for i in ids if split_of(i, share) == "heldout"} for share in (0.1, 0.3))
    assert small < large
    # Binomial(2000, 0.1) has a standard deviation of 13.4.
    assert abs(len(small) - 200) < 5 * 13.4
    assert {split_of(i, 0.0) for i in ids} == {"train"}
    assert {split_of(i, 1.0) for i in ids} == {"heldout"}

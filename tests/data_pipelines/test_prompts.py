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
        ("p.csv", b"prompt,id\nred, blue,1\n", "line 2: 3 fields, but the header has 2; a text with a comma must be"),
        ("p.csv", b"prompt,id\n\na\n", "line 3: 1 fields, but the header has 2"),
        ("p.csv", b'prompt,id\na,1\n"open,2\nb,3\n', r"line 3: unexpected end of data \(read up to line 4\)"),
        ("p.csv", b'prompt,id\n"open,2\n"b",3\n', "line 2: ',' expected after"),
        ("p.csv", b"prompt,id\n" + b"x" * 140_000 + b",1\n", "line 2: field larger than field limit"),
        ("p.csv", b"prompt,id,id\na,1,2\n", "line 1: columns of equal names: id"),
        ("p.csv", b"prompt,id\n", "holds no prompt"),
        ("p.csv", b"", "holds no prompt"),
        ("p.txt", b"x" * 140_000, "line 1: 'prompt' has 140000 characters, the limit is 131072"),
        ("p.txt", "a cat".encode("utf-16"), r"p\.txt' is UTF-16 or UTF-32 text; save it as UTF-8"),
        ("p.txt", "a cat".encode("utf-16-le"), "line 1: a NUL byte; the file is binary or UTF-16"),
        ("p.txt", b"\x1f\x8b\x08", "is a gzip archive; decompress it first"),
        ("p.csv", b"PK\x03\x04", "is a zip archive or a spreadsheet"),
        ("p.txt.gz", b"\x1f\x8b\x08", r"cannot read '\.gz' files"),
        ("p.txt", b"a\rb\r\xff\r", "line 3: byte 0xff at offset 4 is not UTF-8"),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"prompt": "x\\ud800"}\n',
            r"line 2: 'prompt' holds half of a character \(.ud800\)",
        ),
        ("p.jsonl", b'{"prompt": "a\\u0000b"}\n', "line 1: 'prompt' holds a NUL character"),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}\n', "line 1: a name is there twice: prompt"),
        ("p.jsonl", b'{"prompt": null}\n', "line 1: 'prompt' must be text, got None"),
        ("p.jsonl", b'{"prompt": NaN}\n', "line 1: 'prompt' must be text, got nan"),
        ("p.jsonl", b'{"prompt": {"text": "a"}}\n', "line 1: 'prompt' must be text, got {'text': 'a'}"),
        ("p.jsonl", b"[" * 200_000, "line 1: .*one JSON object a line"),
        ("p.jsonl", b"9" * 10_000, "line 1: .*one JSON object a line"),
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


def test_line_ends_byte_order_marks_and_case_of_the_ending(tmp_path: Path) -> None:
    """Joined files have a mark in the middle; old Macintosh files end lines in CR alone."""
    (tmp_path / "P.TXT").write_bytes(b"\xef\xbb\xbfa cat\ra dog\r\xef\xbb\xbfa cow\r")
    assert [prompt.text for prompt in read_prompts(tmp_path / "P.TXT")] == ["a cat", "a dog", "a cow"]
    (tmp_path / "p.csv").write_bytes(b'\xef\xbb\xbfprompt,id\r"a cat,\rsitting",1\ra dog,2')
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.csv")] == ["a cat, sitting", "a dog"]


def test_white_space_is_no_prompt_and_zero_width_characters_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u200bcat"}\n{"prompt": " \\t\u3000"}\n{"prompt": "\u200b"}\n', encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(path)] == ["a\u200bcat", "\u200b"]
    assert "1 rows without text in 'prompt' skipped" in caplog.text


def test_a_line_over_the_limit_is_refused_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_bytes(b"a cat\n" + b"x" * (2 << 20))
    monkeypatch.setattr("data_pipelines.tables.MAX_LINE", 1 << 20)
    with pytest.raises(DataError, match="line 2: over 1 MiB long, the limit for one line"):
        read_prompts(tmp_path / "p.txt")


def test_parquet_of_wrong_types_names_the_row(tmp_path: Path) -> None:
    for cells, message in (([1, 2], "row 0: 'prompt' must be text, got 1"), (["a", None], "row 1: 'prompt' must be")):
        pq.write_table(pa.table({"prompt": cells}), tmp_path / "p.parquet")
        with pytest.raises(DataError, match=message):
            read_prompts(tmp_path / "p.parquet")
    whole = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "p.parquet").write_bytes(whole[:8] + b"\0" * 40 + whole[48:])
    with pytest.raises(DataError, match="no readable parquet"):
        read_prompts(tmp_path / "p.parquet")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(twice, tmp_path / "p.parquet")
    with pytest.raises(DataError, match="columns of equal names: prompt"):
        read_prompts(tmp_path / "p.parquet")

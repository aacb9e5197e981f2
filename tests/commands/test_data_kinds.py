"""Training data by kind: its section in a run's config, its columns, and rows of evaluation prompts left out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest
import yaml
from PIL import Image

from alignkit import cli
from alignkit.commands.data import DATA, TrainingData
from alignkit.diffusion.estimators import ESTIMATORS
from alignkit.errors import ConfigError, DataError
from alignkit.losses import LOSSES
from alignkit.provenance import fingerprint
from alignkit.records import Prompt
from alignkit.trainers import METHODS, Method

SAMPLING = {"height": 8, "width": 8}


@pytest.fixture
def config(work, monkeypatch):
    """Writes run.yaml with changed keys (None takes a key out) and returns its command as a dry run.

    A dry run imports no method of a user's own, so those of the other kinds stand in the table.
    """
    for kind in ("dense", "aspects", "prompts", "other"):
        classes = ("alignkit.trainers.sft:SFTConfig", "alignkit.trainers.sft:SFTTrainer")
        monkeypatch.setitem(METHODS, f"kinds:{kind.upper()}", Method(*classes, data=kind, summary="made up"))

    def write(**changes):
        keys = {
            "out": "run",
            "prompts": {"file": "prompts.txt"},
            "generators": {"a": {"model": "mine_for_commands:Painter"}},
            "rewards": {"red": {"reward": "mine_for_commands:Red"}},
            "policy": "a",
        } | changes
        (work / "run.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
        return ["run", "--config=run.yaml", "--dry-run"]

    return write


SYNPIC = {
    "generate": {"sources": [{"name": "a", "seeds_per_prompt": 2, "sampling": SAMPLING}]},
    "score": {"rewards": ["red"]},
}


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (SYNPIC, "generate: 2 candidates (a x 2)"),
        ({"data": {"path": "there"}}, "data: ranked candidates (or pairs, or captioned media) in there"),
        ({"data": {"path": "there"}, "method": "kinds:DENSE"}, "data: pairs of clips with labels"),
        ({"data": {"path": "there"}, "method": "kinds:ASPECTS"}, "data: prompts with questions about them in there"),
        ({"method": "kinds:PROMPTS"}, "data: the training share of all prompts of prompts.txt"),
    ],
)
def test_a_run_takes_the_data_section_of_its_method(config, keys, line, capsys):
    assert cli.main(config(**keys)) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert line in text
    assert ("NOT THERE YET: there (data)" in text) == ("data" in keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "key 'generate' is missing"),
        ({"method": "kinds:DENSE"}, "key 'clips' is missing"),
        (SYNPIC | {"data": {"path": "there"}}, "trains on an existing dataset (key `data`) here; remove 'generate'"),
        (SYNPIC | {"method": "kinds:PROMPTS"}, "method 'kinds:PROMPTS' trains on prompts here; remove 'score'"),
        ({"data": {"path": "x"}, "method": "kinds:PROMPTS"}, "trains on prompts here; remove 'data'"),
        ({"method": "kinds:OTHER"}, "asks for data of the kind 'other'; known kinds: ranked, dense, aspects, prompts"),
        (
            {"data": {"path": "there"}, "train": {"eval_strategy": "steps"}},
            "give `validation`, or data.held_out above 0",
        ),
    ],
)
def test_sections_of_other_data_are_refused(config, keys, message, capsys):
    assert cli.main(config(**keys)) == 2
    assert message in capsys.readouterr().err


def test_train_on_prompts_alone_takes_no_data(config, capsys):
    config()
    words = ["--model=m/n", "--out=out", "--prompts.file=prompts.txt", "--dry-run"]
    assert cli.main(["train", "kinds:PROMPTS", *words]) == 0, capsys.readouterr().err
    assert "on the training share of all prompts of prompts.txt" in capsys.readouterr().out
    assert cli.main(["train", "kinds:PROMPTS", *words, "--data=x"]) == 2
    assert "unknown key 'data'" in capsys.readouterr().err
    assert cli.main(["train", "kinds:PROMPTS", "--model=m/n", "--out=out"]) == 2
    assert "key 'prompts' is missing" in capsys.readouterr().err


PROMPTS = [f"prompt {number}" for number in range(40)]


def test_rows_of_a_dataset_by_path(tmp_path):
    """A share is held out by prompt; the excluded prompts are left out of the training rows alone."""
    file = tmp_path / "dense.parquet"
    columns = {"prompt": PROMPTS, "latents": [[b"a", b"b"]] * 40, "labels": [[1, 0, -1]] * 40}
    datasets.Dataset.from_dict(columns).to_parquet(file)
    whole = TrainingData(kind="dense", path=file)
    assert whole.train()["prompt"][:] == PROMPTS
    assert whole.heldout() is None
    split = TrainingData(kind="dense", path=file, held_out=0.3)
    train, heldout = split.train(), split.heldout()
    assert {*train["prompt"], *heldout["prompt"]} == set(PROMPTS)
    assert not set(train["prompt"]) & set(heldout["prompt"])
    assert train[0]["labels"] == [1, 0, -1]
    assert train["prompt_id"][0] == Prompt.from_text(train["prompt"][0]).id
    excluded = frozenset(Prompt.from_text(text).id for text in PROMPTS[:10])
    remaining = TrainingData(kind="dense", path=file, held_out=0.3, excluded=excluded).train()["prompt"]
    assert list(remaining) == [text for text in train["prompt"] if text not in PROMPTS[:10]]
    with pytest.raises(DataError, match="every training row"):
        TrainingData(kind="dense", path=file, excluded=frozenset(Prompt.from_text(text).id for text in PROMPTS)).train()


def test_the_columns_of_a_kind_are_required(tmp_path):
    file = tmp_path / "rows.jsonl"
    question = {"name": "legs", "aspect": "anatomy", "text": "Has it four legs?", "negated": False, "weight": 1.0}
    file.write_text("".join(json.dumps({"prompt": text, "questions": [question]}) + "\n" for text in PROMPTS), "utf-8")
    assert TrainingData(kind="aspects", path=file).train()[0]["questions"] == [question]
    with pytest.raises(DataError, match=r"lacks the columns videos or latents, labels; it has prompt, questions"):
        TrainingData(kind="dense", path=file).train()
    file.write_text('{"prompt": "a", "questions": []}\n{"prompt": " ", "questions": []}\n', encoding="utf-8")
    with pytest.raises(DataError, match="row 1: the prompt is empty"):
        TrainingData(kind="aspects", path=file).train()
    with pytest.raises(ConfigError, match="are the prompts themselves"):
        TrainingData(kind="prompts", path=file).train()


def test_references_of_questions_stay_encoded_and_lie_in_the_folder(tmp_path):
    file = tmp_path / "lists" / "rows.jsonl"
    file.parent.mkdir()
    (tmp_path / "lists" / "a.png").write_bytes(b"image")
    row = {"prompt": "a", "questions": [{"text": "Is it?"}], "image": "a.png"}
    file.write_text(json.dumps(row) + "\n", "utf-8")
    (found,) = TrainingData(kind="aspects", path=file).train()["image"]
    assert found == {"bytes": None, "path": str(tmp_path / "lists" / "a.png")}
    file.write_text(json.dumps({**row, "image": str(tmp_path / "b.png")}) + "\n", "utf-8")
    with pytest.raises(DataError, match=r"line 1, image: '.*b\.png' is outside"):
        TrainingData(kind="aspects", path=file).train()


def test_rows_name_videos_in_the_folder_or_a_wider_root(tmp_path):
    """Also where the data has a held-out split of its own."""
    (tmp_path / "lists").mkdir()
    video = tmp_path / "a.mkv"
    video.write_bytes(b"video")
    for split in ("train", "test"):
        row = {"prompt": split, "videos": [str(video), str(video)], "labels": [1, 0]}
        (tmp_path / "lists" / f"{split}.jsonl").write_text(json.dumps(row), "utf-8")
    data = TrainingData(kind="dense", path=tmp_path / "lists", root=tmp_path, held_out=0.5)
    assert data.train().select_columns(["prompt", "videos", "labels"])[:] == {
        "prompt": ["train"],
        "videos": [[{"bytes": None, "path": str(video.resolve())}] * 2],
        "labels": [[1, 0]],
    }
    assert data.heldout()["prompt"][:] == ["test"]
    with pytest.raises(DataError, match=r"test\.jsonl', line 1, videos: '.*a\.mkv' is outside"):
        TrainingData(kind="dense", path=tmp_path / "lists").train()
    cells = [{"bytes": None, "path": str(video)}]
    file = tmp_path / "lists" / "rows.parquet"
    datasets.Dataset.from_dict({"prompt": ["a"], "videos": [cells], "labels": [[1]]}).to_parquet(file)
    assert TrainingData(kind="dense", path=file, root=tmp_path).train()[0]["videos"] == cells
    with pytest.raises(DataError, match=r"row 0, videos: '.*' is outside"):
        TrainingData(kind="dense", path=file).train()


@pytest.mark.parametrize("values", [[[1], "x"], [{"a": 1}, [2]]])
def test_values_of_several_types_are_named(tmp_path, values):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "a", "questions": value}) for value in values), "utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl', questions: the values are not of one type"):
        TrainingData(kind="aspects", path=file).train()


def test_prompts_alone_are_passed_on_as_they_are():
    prompts = [Prompt.from_text("a cat", category="single"), Prompt.from_text("a dog")]
    data = TrainingData(kind="prompts", prompts=(prompts[:1], prompts[1:]))
    assert (data.train(), data.heldout()) == (prompts[:1], prompts[1:])
    assert data.train()[0].metadata == {"category": "single"}
    assert data.identity != TrainingData(kind="prompts", prompts=(prompts, [])).identity
    assert TrainingData(kind="prompts", prompts=(prompts, [])).heldout() is None
    with pytest.raises(DataError, match="no prompts to train on"):
        TrainingData(kind="prompts").train()


def test_the_page_of_methods_lists_the_tables():
    lines = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
    rows = [f"| `{name}` | {method.data} | {method.summary} |" for name, method in METHODS.items()]
    listed = [line for line in lines if line.startswith("| `")]
    assert listed[: len(rows)] == rows
    assert {*LOSSES, *ESTIMATORS} <= {line.split("`")[1] for line in listed[len(rows) :]}
    first_cells = [line.split(" | ")[0] for line in lines]
    start = first_cells.index("| ranked")
    assert first_cells[start : start + len(DATA)] == [f"| {kind}" for kind in DATA]
    assert {method.data for method in METHODS.values()} <= set(DATA)


@pytest.mark.parametrize("verb", ["generate", "score"])
def test_a_data_stage_refuses_several_processes(work, verb, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main([verb, f"--config={verb}.yaml", "--dry-run"]) == 0
    capsys.readouterr()
    assert cli.main([verb, f"--config={verb}.yaml"]) == 2
    message = capsys.readouterr().err
    assert f"`alignkit {verb}` runs in one process, and WORLD_SIZE is 2" in message
    assert "torchrun ... -m alignkit train METHOD" in message
    assert not (work / "candidates").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    if verb == "generate":
        assert cli.main([verb, f"--config={verb}.yaml"]) == 0


# --- the same data --------------------------------------------------------------------------------------------------


def jsonl(folder):
    (folder / "rows.jsonl").write_text('{"text": "a", "image": "images/a.png"}', encoding="utf-8")
    return {"path": folder / "rows.jsonl"}


def lists(folder):
    (folder / "lists").mkdir()
    names = ",".join(str(folder / "images" / name) for name in ("a.png", "b.png"))
    (folder / "lists" / "rows.csv").write_text(f"prompt,chosen,rejected\nx,{names}\n", encoding="utf-8")
    return {"path": folder / "lists", "root": folder}


def parquet(folder):
    cells = [{"bytes": None, "path": str(folder / "images" / name)} for name in ("a.png", "b.png")]
    rows = datasets.Dataset.from_dict({"prompt": ["x"], "videos": [cells], "labels": [[1]]})
    rows.to_parquet(folder / "rows.parquet")
    return {"path": folder / "rows.parquet", "root": folder}


def kohya(folder):
    (folder / "images" / "a.txt").write_text("a", encoding="utf-8")
    (folder / "images").rename(folder / "10_images")
    return {"path": folder}


@pytest.mark.parametrize("layout", [jsonl, lists, parquet, kohya])
def test_data_are_the_same_while_the_files_that_rows_name_are(tmp_path, layout):
    """By content: not where the data lies, nor when it was written; a file that no row names is none of it."""
    first, other = tmp_path / "first", tmp_path / "other"
    (first / "images").mkdir(parents=True)
    for name in ("a", "b"):
        (first / "images" / f"{name}.png").write_bytes(f"image {name}".encode())
    given = layout(first)
    before = TrainingData(kind="ranked", **given).identity
    if "root" not in given:  # rows that name files outside the data's folder do it by absolute paths
        first.rename(other)
        given = {"path": other / given["path"].relative_to(first)}
    data = TrainingData(kind="ranked", **given)
    (image,) = tmp_path.rglob("a.png")
    os.utime(image, (1, 1))
    assert data.identity == before
    if layout is not kohya:  # there every file of the folder counts
        (image.parent / "unused.png").write_bytes(b"")
        assert data.identity == before
    image.write_bytes(b"image c")
    assert data.identity != before


def test_bytes_in_rows_need_no_other_file(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["x"], "image": [{"bytes": b"image", "path": "a.png"}]})
    rows.to_parquet(tmp_path / "rows.parquet")
    alone = TrainingData(kind="ranked", path=tmp_path / "rows.parquet").identity
    assert alone == fingerprint(tmp_path / "rows.parquet")


def test_a_changed_image_is_what_is_trained_on(tmp_path, monkeypatch):
    """The cache of `datasets` knows the table, not the images that its rows name."""
    monkeypatch.chdir(tmp_path)  # `to_parquet` looks for the file
    Path("a.png").write_bytes(b"")
    cells = {"bytes": None, "path": "a.png"}
    rows = datasets.Dataset.from_dict({"text": ["x"], "image": [cells]}).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "rows.parquet")
    data = TrainingData(kind="ranked", path=tmp_path / "rows.parquet")
    for color in ((255, 0, 0), (0, 0, 255)):
        Image.new("RGB", (8, 8), color).save(tmp_path / "a.png")
        assert data.train()[0]["images"][0].getpixel((0, 0)) == color

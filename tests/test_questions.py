"""Questions as users write them: keys that some rows lack, values of other types, and errors that name the prompt."""

from __future__ import annotations

import json

import datasets
import pytest

from alignkit.aspects import Question, questions_of
from alignkit.commands.training_data import TrainingData
from alignkit.errors import ConfigError, DataError
from alignkit.records import Prompt
from alignkit.trainers.data import PromptData


def test_a_key_that_some_questions_of_a_file_lack_has_its_default(tmp_path):
    """`datasets` fills such a key with null."""
    asked = [{"text": "Is there a ring?", "weight": 2}, {"negated": "Is it blue?"}]
    rows = [{"prompt": "a ring", "questions": asked}, {"prompt": "a cross", "questions": asked[1:]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    data = PromptData(TrainingData(kind="aspects", path=path).train(), 0)
    first, second = map(questions_of, data.prompts)
    assert first == [
        Question("Is there a ring?", 2, name="question_1"),
        Question(negated="Is it blue?", name="question_2"),
    ]
    assert second == [Question(negated="Is it blue?", name="question_1")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "question 3: it is a text or has"),
        (None, "question None"),
        ({"text": ["Is it?"]}, r"its text is \['Is it\?'\]; give a text"),
        ({"text": 5}, "its text is 5; give a text"),
        ({"text": "Is it?", "name": 1}, "its name is 1; give a text"),
        ({"text": "Is it?", "weight": "2"}, "its weight is '2'; give a number above 0"),
        ({"text": "Is it?", "weight": True}, "its weight is True"),
        ({"text": "Is it?", "weight": 0}, "its weight is 0"),
        ({"text": "Is it?", "weight": float("inf")}, "its weight is inf"),
        ({"text": "Is it?", "wieght": 1}, "'wieght'} is unknown"),
        ({"text": None}, "at least text or negated"),
    ],
)
def test_what_is_no_question_is_named_with_its_prompt(given, message):
    with pytest.raises(ConfigError, match=message):
        Question.of(given)
    with pytest.raises(DataError, match=f"prompt 'a ring': .*{message}"):
        questions_of(Prompt.from_text("a ring", questions=[given]))


def test_held_out_prompts_get_the_questions_of_the_dataset(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": text, "questions": [f"Is there {text}?"]} for text in ("a ring", "a cross")]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    prompts = [Prompt.from_text("a  ring", mark=1), Prompt.from_text("a cross", questions=["own"])]
    data = TrainingData(kind="aspects", path=path)
    found = data.with_questions(prompts)
    assert found[0].metadata == {"mark": 1, "questions": ["Is there a ring?"]}
    assert found[1].metadata == {"questions": ["own"]}
    assert not caplog.records
    assert data.with_questions([*prompts, other := Prompt.from_text("a star")])[2] == other
    assert "1 of 3 prompts of validation or evaluation have no questions" in caplog.text
    assert "the first one 'a star': a critic asks them what its options" in caplog.text
    assert TrainingData(kind="captions", path=path).with_questions([other]) == [other]


def test_held_out_prompts_get_the_media_of_the_dataset_and_no_file_outside_it(tmp_path):
    kept = {"bytes": b"a picture", "path": None}
    for reference in (kept, {"bytes": None, "path": "/etc/hostname"}):
        columns = {"prompt": ["a ring"], "questions": [["Is it?"]], "image": [reference], "mark": [None]}
        rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
        rows.to_parquet(tmp_path / "rows.parquet")
        data = TrainingData(kind="aspects", path=tmp_path / "rows.parquet")
        if reference is kept:
            (found,) = data.with_questions([Prompt.from_text("a ring")])
            assert found.metadata == {"questions": ["Is it?"], "image": kept}
        else:
            with pytest.raises(DataError, match="/etc/hostname"):
                data.with_questions([Prompt.from_text("a ring")])


def test_questions_are_a_list():
    assert questions_of(Prompt.from_text("a ring")) == []
    for given in ("Is it?", {"text": ["Is it?"]}, 3):
        with pytest.raises(DataError, match=r"prompt 'a ring': its questions are .*; give a list"):
            questions_of(Prompt.from_text("a ring", questions=given))

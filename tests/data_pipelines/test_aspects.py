"""The aspects stage: what a draft must be like, another try with complaints, quarantine, and resuming byte by byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from alignkit.aspects import Draft, Fact, Question, Rules
from alignkit.commands.training_data import TrainingData
from alignkit.errors import ConfigError, DataError, ResumeError, ServerError
from alignkit.records import Prompt
from alignkit.trainers.data import PromptData
from data_pipelines.aspects import AspectsConfig, checked_drafts, problems_of, write_aspects

RULES = Rules(("alignment", "quality"), 3)
FACTS = (Fact("object", "dogs"), Fact("count", "two dogs"), Fact("extra", "anything else"))
GOOD = Draft(
    FACTS,
    (
        Question("Is there a dog?", 1.0, "Is the picture empty?", "dog", "alignment"),
        Question("Is the number of dogs two?", 1.0, "", "count", "alignment"),
        Question('Does it show "no cats"? Please answer Yes or No.', 2.0, "", "sharp", "quality"),
    ),
    ((0,), (1, 2), ()),
)


def asked(text="Is there a dog?", **changes):
    """GOOD with its first question changed."""
    return replace(GOOD, questions=(replace(GOOD.questions[0], text=text, **changes), *GOOD.questions[1:]))


def test_a_good_draft_has_no_problem():
    assert problems_of(GOOD, RULES) == []
    assert problems_of(asked("", negated="Is the dog without a tail?"), RULES) == []  # no is good


@pytest.mark.parametrize(
    ("draft", "problem"),
    [
        (Draft(), "there is no question"),
        (Draft(problems=["no reply"]), "no reply"),
        (asked("Which dog is there?"), "must begin with a word such as Is"),
        (asked("Is there a dog"), "ends with a question mark"),
        (asked("Is there a dog? Is it red?"), "must be one question"),
        (asked("Is there a dog or a wolf?"), "offers a choice"),
        (asked("Is there a dog that isn't red?"), '"isn\'t" is a negation'.replace('"', "'")),
        (asked("Is there a dog without a tail?"), "'without' is a negation"),
        (asked("Is the dog not there?"), "'not' is a negation"),
        (asked("Is the dog not there?"), "or leave text empty and ask the opposite in negated"),
        (asked(negated="How many dogs are there?"), "'How many dogs are there?': it must begin"),
        (asked("Is the number of dogs two?"), "repeats 'Is the number of dogs two?'"),
        (asked("Are there dogs?", negated="Are there the dogs?"), "repeats 'Are there dogs?'"),
        (asked("", negated=""), "a question has no text"),
        (asked(weight=float("nan")), "its weight is nan"),
        (asked(weight=0.0), "its weight is 0.0"),
        (asked(name=""), "give it a short one"),
        (asked(name="count"), "2 questions have the name 'count'"),
        (asked(aspect="physics"), "use alignment or quality"),
        (replace(GOOD, questions=GOOD.questions[:2], covers=GOOD.covers[:2]), "no question has the aspect 'quality'"),
        (replace(GOOD, covers=((0,), (1,), ())), "no question covers the extra 'anything else'"),
        (replace(GOOD, covers=((0, 3), (1, 2), ())), "covers fact 3; there are 3 facts"),
        (replace(GOOD, covers=((0,),)), "1 lists of facts for 3 questions"),
        (replace(GOOD, facts=(Fact("thing", "dogs"), *FACTS[1:])), "of the kind 'thing'; known kinds: object"),
        (replace(GOOD, facts=(Fact("object", "wolf"), *FACTS[1:])), "uses any of its words"),
    ],
)
def test_what_is_wrong_with_a_draft_is_said(draft, problem):
    problems = problems_of(draft, RULES)
    assert any(problem in said for said in problems), problems


def covering(kind, fact, *texts, twin="", negated=""):
    """What is said of a draft in which questions cover one fact; `twin` is the opposite of each text."""
    questions = [Question(text, 1.0, twin, f"q{number}", "alignment") for number, text in enumerate(texts)]
    questions += [Question("", 1.0, negated, "no", "alignment")] if negated else []
    draft = Draft((Fact(kind, fact),), questions, ((0,),) * len(questions))
    return problems_of(draft, Rules(("alignment",), 9))


@pytest.mark.parametrize(
    ("kind", "fact", "texts"),
    [
        ("count", "two dogs", ["Is the number of dogs 2?"]),
        ("count", "a single dog", ["Is there exactly one dog?"]),
        ("count", "three boxes", ["Is there a box?", "Are there three of them?"]),
        ("relation", "cat left of dog", ["Is the cat to the left of the dog?"]),
        ("relation", "boy\u2019s hat on table", ["Is the boy's hat on the table?"]),
        ("attribute", "dirty dishes", ["Is every dish dirty?"]),
        ("attribute", "ripe berries", ["Is the berry ripe?"]),
        ("attribute", "two old knives", ["Is the knife old?", "Are there two?"]),
        ("object", "leather armchair", ["Is there an armchair?"]),
    ],
)
def test_questions_that_have_the_words_of_a_fact_cover_it(kind, fact, texts):
    assert covering(kind, fact, *texts) == []


@pytest.mark.parametrize(
    ("kind", "fact", "text", "twin"),
    [
        ("attribute", "man without hat", "Is the man bareheaded?", "Is the man wearing a hat?"),
        ("attribute", "man without hat", "", "Is the man wearing a hat?"),
        ("count", "no cars", "Is the number of cars zero?", ""),
        ("count", "no cars", "Is the street free of cars?", "Are there cars?"),
        ("relation", "dog not on sofa", "Is the dog beside the sofa?", "Is the dog on the sofa?"),
        ("attribute", "black or white cat", "Is the colour of the cat one of black and white?", ""),
        ("count", "two or three birds", "Is the number of birds at least two and at most three?", ""),
        ("attribute", "dog runs", "Is the dog running?", ""),
        ("relation", "dog chasing cat", "Does the dog chase the cat?", ""),
        ("attribute", "sitting cats", "Does each cat sit?", ""),
        ("object", "buildings", "Is there a building?", ""),
        ("attribute", "kings' rings", "Is it a king's ring?", ""),
    ],
)
def test_negations_choices_and_forms_of_verbs_in_a_fact_can_be_asked_for(kind, fact, text, twin):
    if text:
        assert covering(kind, fact, text, twin=twin) == []
    else:
        assert covering(kind, fact, negated=twin) == []
    assert covering(kind, fact, "Is it sharp?") != []


@pytest.mark.parametrize(
    ("kind", "fact", "text", "lacking"),
    [
        ("count", "two dogs", "Is there a dog?", "2"),
        ("count", "one dog", "Is there a dog?", "1"),
        ("relation", "cat left of dog", "Is the cat present?", "left, dog"),
        ("relation", "cup on table", "Is the cup under the table?", "on"),
        ("attribute", "red ball", "Is there a ball?", "red"),
    ],
)
def test_one_shared_word_does_not_cover_a_count_an_attribute_or_a_relation(kind, fact, text, lacking):
    assert covering(kind, fact, text) == [
        f"no question that covers the {kind} '{fact}' has its words {lacking}; use them"
    ]
    assert covering(kind, fact, negated=f"Is the {fact.split()[-1]} absent?") == []  # the opposite, in other words


def test_quotes_of_any_kind_are_no_negation_and_apostrophes_hide_none():
    for text in (
        "Does the sign say 'no entry'?",
        "Does it say \u2018don\u2019t walk\u2019?",
        "Is \u201cno\u201d on it?",
    ):
        assert problems_of(asked(text), RULES) == problems_of(asked("Does the sign say hello?"), RULES)
    for text in ("Is there a dog that isn\u2019t red?", "Is the dogs' bowl not the cats' bowl?"):
        assert any("is a negation" in said for said in problems_of(asked(text), RULES))


def test_too_many_questions_are_refused():
    assert problems_of(GOOD, Rules(RULES.aspects, 2)) == ["there are 3 questions; write at most 2"]


class Writer:
    """Good drafts, except for prompts that end with a number: those need as many attempts. `told`: what it got."""

    def __init__(self):
        self.told = []

    def write(self, prompts, rules, complaints):
        drafts = []
        for prompt, complaint in zip(prompts, complaints, strict=True):
            self.told.append((prompt.text, list(complaint)))
            needed = int(prompt.text.split()[-1]) if prompt.text[-1].isdigit() else 1
            tries = sum(text == prompt.text for text, _ in self.told)
            drafts.append(GOOD if tries >= needed else asked("Where is the dog?"))
        return drafts


CONFIG = AspectsConfig(aspects=RULES.aspects, max_questions=3, attempts=2, part_size=2, quarantine_limit=0.5)
PROMPTS = [Prompt.from_text(text, mark=index) for index, text in enumerate(("dogs", "dogs 2", "dogs 9", "two dogs"))]


def test_a_draft_with_problems_is_written_again_with_complaints():
    writer = Writer()
    results = checked_drafts(PROMPTS[:3], CONFIG, writer)
    assert [(result.attempts, bool(result.problems)) for result in results] == [(1, False), (2, False), (2, True)]
    assert [text for text, _ in writer.told] == ["dogs", "dogs 2", "dogs 9", "dogs 2", "dogs 9"]
    assert all(("'Where is the dog?'" in "".join(complaint)) == (n > 2) for n, (_, complaint) in enumerate(writer.told))


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "versions.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_the_stage_stores_quarantines_and_resumes(tmp_path):
    """A writer that stops half-way costs the unfinished part alone; in the end every byte is the same."""
    whole = write_aspects([*PROMPTS, PROMPTS[0]], CONFIG, tmp_path / "a", build_writer=Writer, identity="w")
    assert (whole.rows, whole.counts["quarantined"], whole.counts["written_again"]) == (3, 1, 2)
    assert (whole.counts["questions_alignment"], whole.counts["questions_quality"]) == (6, 3)
    (line,) = (tmp_path / "a" / "quarantine.jsonl").read_text("utf-8").splitlines()
    fault = json.loads(line)
    assert (fault["prompt"], fault["attempts"]) == ("dogs 9", 2)
    assert "must begin" in fault["reason"]

    class Stops(Writer):
        def write(self, prompts, rules, complaints):
            if prompts[0].text == "dogs 9":
                raise ConnectionError("down")
            return super().write(prompts, rules, complaints)

    with pytest.raises(ConnectionError):
        write_aspects([*PROMPTS, PROMPTS[0]], CONFIG, tmp_path / "b", build_writer=Stops, identity="w")
    second = Writer()
    write_aspects([*PROMPTS, PROMPTS[0]], CONFIG, tmp_path / "b", build_writer=lambda: second, identity="w")
    assert {text for text, _ in second.told} == {"dogs 9", "two dogs"}
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    write_aspects([*PROMPTS, PROMPTS[0]], CONFIG, tmp_path / "b", build_writer=pytest.fail, identity="w")  # not called
    for given in ({"identity": "other"}, {"identity": "w", "prompts": PROMPTS[:3]}):
        rows = given.pop("prompts", [*PROMPTS, PROMPTS[0]])
        with pytest.raises(ResumeError, match="another config or other inputs"):
            write_aspects(rows, CONFIG, tmp_path / "b", build_writer=Writer, **given)


def test_the_rows_are_what_a_training_reads(tmp_path):
    write_aspects(PROMPTS, CONFIG, tmp_path / "a", build_writer=Writer)
    row = TrainingData(kind="aspects", path=tmp_path / "a").train()[0]
    assert row["questions"][0] == {
        "name": "dog",
        "aspect": "alignment",
        "text": "Is there a dog?",
        "negated": "Is the picture empty?",
        "weight": 1.0,
        "answer": "",
    }
    assert (row["prompt_id"], json.loads(row["metadata"])) == (PROMPTS[0].id, {"mark": 0})
    assert [fact["kind"] for fact in row["facts"]] == ["object", "count", "extra"]
    loaded = datasets.load_dataset(str(tmp_path / "a"), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(loaded["prompt"]) == ["dogs", "dogs 2", "two dogs"]
    card = (tmp_path / "a" / "README.md").read_text("utf-8")
    assert "3 prompts, each with yes/no questions" in card
    assert "- alignment, weight 1: `Is there a dog?` against `Is the picture empty?`" in card


def test_the_columns_of_prompts_reach_a_training(tmp_path, monkeypatch):
    """Media with their bytes, so that the folder is whole; the rest as it was. Files lie below the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ring.png").write_bytes(b"one")
    media = [str(tmp_path / "ring.png"), {"bytes": b"two", "path": "x"}, None]
    prompts = [Prompt.from_text(f"dogs of {n}", mark=n, image=medium) for n, medium in zip("abc", media, strict=True)]
    write_aspects(prompts, CONFIG, tmp_path / "a", build_writer=Writer)
    rows = TrainingData(kind="aspects", path=tmp_path / "a").train()
    found = [prompt.metadata for prompt in PromptData(rows, 0).prompts]
    assert [metadata["mark"] for metadata in found] == ["a", "b", "c"]
    assert [metadata["image"] and metadata["image"]["bytes"] for metadata in found] == [b"one", b"two", None]
    refused = {"nowhere.png": "does not exist", "/etc/hostname": "outside", "../x.png": r"without '\.\.'"}
    for name, message in refused.items():
        asked = [Prompt.from_text("dogs", image=name)]
        with pytest.raises(DataError, match=f"prompt 'dogs', image: .*{message}"):
            write_aspects(asked, CONFIG, tmp_path / "b", build_writer=Writer)


def test_too_much_quarantine_stops_the_stage(tmp_path):
    strict = replace(CONFIG, quarantine_limit=0.2)
    with pytest.raises(DataError, match=r"1 of 4 prompts have no usable questions.*'dogs 9'.*quarantine\.jsonl"):
        write_aspects(PROMPTS, strict, tmp_path / "a", build_writer=Writer)
    assert (tmp_path / "a" / "quarantine.jsonl").is_file()
    with pytest.raises(DataError, match="no prompts to write questions for"):
        write_aspects([], CONFIG, tmp_path / "b", build_writer=Writer)
    assert write_aspects(PROMPTS, CONFIG, tmp_path / "a", build_writer=Writer).rows == 3  # a higher limit continues it


def test_aspects_weigh_what_the_config_says(tmp_path):
    """Whatever the number of an aspect's questions, whose own weights keep their proportions."""
    config = replace(CONFIG, weights={"alignment": 3})
    double = replace(GOOD, questions=(replace(GOOD.questions[0], weight=2.0), *GOOD.questions[1:]))

    class Fixed(Writer):
        def write(self, prompts, rules, complaints):
            return [double] * len(prompts)

    write_aspects(PROMPTS[:1], config, tmp_path / "a", build_writer=Fixed)
    (row,) = TrainingData(kind="aspects", path=tmp_path / "a").train()
    assert [question["weight"] for question in row["questions"]] == [2.0, 1.0, 1.0]  # 3 of 4 is alignment
    (plain,) = checked_drafts(PROMPTS[:1], CONFIG, Fixed())
    assert [question.weight for question in plain.draft.questions] == [2.0, 1.0, 2.0]


def test_prompts_that_a_server_failed_are_not_left_out(tmp_path):
    """The stage stops without the part, and the next run asks for it again."""

    class Down(Writer):
        def write(self, prompts, rules, complaints):
            drafts = super().write(prompts, rules, complaints)
            failed = Draft(problems=["the server gave no reply"], is_failed=True)
            return [
                failed if prompt.text == "two dogs" else draft for prompt, draft in zip(prompts, drafts, strict=True)
            ]

    with pytest.raises(ServerError, match="1 of 2 prompts got no questions in 2 attempts, the first one 'two dogs'"):
        write_aspects(PROMPTS, CONFIG, tmp_path / "a", build_writer=Down)
    assert [file.name for file in (tmp_path / "a" / "data").iterdir()] == ["part-00000.parquet"]
    assert write_aspects(PROMPTS, CONFIG, tmp_path / "a", build_writer=Writer).rows == 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"aspects": ("beauty",)}, "give some of alignment, physics, quality"),
        ({"aspects": ()}, "give some of"),
        ({"aspects": ("quality", "quality")}, "each once"),
        ({"weights": {"physics": 1.0}}, "weights.physics is 1.0; give a number above 0 of one of"),
        ({"weights": {"alignment": 0.0}}, "weights.alignment is 0.0"),
        ({"attempts": 0}, "attempts is 0"),
        ({"quarantine_limit": 1.5}, "quarantine_limit is 1.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        AspectsConfig(**keys)

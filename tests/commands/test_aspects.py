"""`alignkit aspects`: from prompts to a dataset, what `--show` prints, and the section of a run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml

from alignkit import cli
from alignkit.commands.data import DATA, PromptShares, QuestionsJob
from alignkit.commands.specs import GeneratorSpec, PromptsConfig
from alignkit.records import Prompt, Scores
from alignkit.trainers import METHODS, Method
from data_pipelines.aspects import AspectsConfig

CAPTIONS = ["a circle", "two red rings", "a cross above a ring"]


class Critic:
    """Says yes with probability 0.75 to everything; the parts are log-probabilities of the good answer."""

    name, modality, needs_prompt, differentiable = "critic", "image", True, False
    comparable_across_prompts, native_range, licence, source = True, (-9.0, 0.0), "Apache-2.0", "here"

    def __call__(self, media, prompts):
        (prompt,) = prompts
        good = {q["name"]: 0.75 if q["text"] else 0.25 for q in prompt.metadata["questions"]}
        parts = {name: torch.tensor([p]).log() for name, p in good.items()}
        return Scores(media.mean((1, 2, 3)) + prompt.metadata.get("mark", 0), parts)


class Short:
    """A writer that forgets all prompts."""

    def write(self, prompts, rules, complaints):
        return []


@pytest.fixture
def folder(work, monkeypatch):
    """A folder with captions and a config; the critic is a module of the user's."""
    module = type(pytest)("critic_for_aspects")
    module.Critic, module.Short = Critic, Short
    monkeypatch.setitem(__import__("sys").modules, "critic_for_aspects", module)
    (work / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    preview = {
        "prompts": 2,
        "critic": {"reward": "critic_for_aspects:Critic"},
        "generator": {"model": "mine_for_commands:Painter"},
        "sampling": {"height": 8, "width": 8},
    }
    config = {"out": "questions", "prompts": {"file": "captions.txt"}, "preview": preview}
    (work / "aspects.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return work


RUN = ["aspects", "--config", "aspects.yaml"]


def test_prompts_become_a_dataset_and_a_free_text_says_what_to_use(folder, capsys):
    assert cli.main(RUN) == 0, capsys.readouterr().err
    assert "3 prompts with questions in questions: questions_alignment" in capsys.readouterr().out
    manifest = json.loads((folder / "questions" / "manifest.json").read_text("utf-8"))
    assert (manifest["stage"], manifest["rows"]) == ("aspects", 3)
    assert cli.main([*RUN, "--writer.options", "{twins: true}"]) == 2
    assert "was made with another config or other inputs" in capsys.readouterr().err
    assert cli.main([*RUN, "--prompts.file", "prompts.txt", "--out", "other"]) == 2
    assert "'a cat' is no sandbox caption" in (message := capsys.readouterr().err)
    assert "set `writer` to 'served'" in message


@pytest.mark.parametrize("stored", [False, True])
def test_show_prints_questions_with_answers_and_writes_no_dataset(folder, stored, capsys):
    """Of a finished stage those that are stored, also where the writer's options are others now."""
    if stored:
        assert cli.main(RUN) == 0
    capsys.readouterr()
    assert cli.main([*RUN, "--show", "--writer.options", "{twins: true}"]) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith("prompt:")] == [f"prompt: {c}" for c in CAPTIONS[:2]]
    assert "  0.75   1.00  alignment  Is there a circle?\n" in text
    assert "  0.25   0.25  alignment  (no is good) Is there a ring?\n" in text
    assert ("Is the number of circles one?  (no is good) Is the number of circles two?" in text) == (not stored)
    assert "for each question P(good answer)" in text
    assert (folder / "questions" / "manifest.json").exists() == stored
    assert len(list((folder / "questions_show").glob("*.png"))) == 2


@pytest.mark.parametrize("stored", [False, True])
def test_show_gives_the_critic_all_columns_of_a_prompt(folder, stored, capsys):
    rows = [json.dumps({"prompt": caption, "mark": 5}) for caption in CAPTIONS]
    (folder / "marked.jsonl").write_text("\n".join(rows), encoding="utf-8")
    marked = [*RUN, "--prompts.file", "marked.jsonl"]
    assert not stored or cli.main(marked) == 0
    assert cli.main([*marked, "--show"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("  total 5.") == 2


def test_show_without_a_critic_and_of_a_text_that_cannot_be_used(folder, capsys):
    assert cli.main(["aspects", "--prompts.file=prompts.txt", "--out=other", "--show"]) == 0
    text = capsys.readouterr().out
    assert "prompt: a cat\n  not usable: 'a cat' is no sandbox caption" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--writer.writer", "servd"], "Did you mean 'served'?"),
        (["--preview.image", "a.png"], "give either `generator` or `image`"),
        (["--writer.writer=served"], "writer 'served' needs the option 'base_url'. To get it: `vllm serve"),
        (
            ["--writer.options", "{extra_weight: abc}"],
            "'sandbox': its option 'extra_weight' is 'abc'; it must be float",
        ),
        (["--writer.options", "{whole: true, twins: 3}"], "writer 'sandbox': its option 'twins' is 3; it must be bool"),
        (["--writer.options", "{extra_weight: true}"], "its option 'extra_weight' is True; it must be float"),
        (
            ["--writer.writer=served", "--writer.options", "{base_url: 5, model: m, template: captions.txt}"],
            "writer 'served': its option 'base_url' is 5; it must be str",
        ),
        (["--writer.writer=critic_for_aspects:Short"], "writer Short gave 0 drafts for 3 prompts"),
        (["--writer.writer=mine_for_commands:Painter"], "is a Painter without `write`"),
        (["--aspects.aspects", "[quality]"], "no question has the aspect 'quality'"),
    ],
)
def test_mistakes_are_said(folder, words, message, capsys):
    assert cli.main([*RUN, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_says_what_is_missing(folder, capsys):
    served = ["--writer.writer=served", "--writer.options", "{base_url: 'http://h', model: m, template: t.txt}"]
    assert cli.main([*RUN, *served, "--show", "--dry-run"]) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert "NOT THERE YET: t.txt (template)" in text
    assert "print the questions (alignment) of 2 prompts of all prompts of captions.txt with the writer 's" in text
    assert " into " not in text.splitlines()[-1]


def test_a_run_writes_the_questions_of_its_prompts(folder, monkeypatch, capsys):
    method = Method("alignkit.trainers.sft:SFTConfig", "alignkit.trainers.sft:SFTTrainer", "aspects", "made up")
    monkeypatch.setitem(METHODS, "kinds:ASPECTS", method)
    keys = {
        "out": "run",
        "method": "kinds:ASPECTS",
        "prompts": {"file": "captions.txt"},
        "generators": {"a": {"model": "mine_for_commands:Painter"}},
        "rewards": {"red": {"reward": "mine_for_commands:Red"}},
        "policy": "a",
        "writer": {"writer": "sandbox", "options": {"whole": True}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    assert cli.main(["run", "--config=run.yaml", "--dry-run"]) == 0, capsys.readouterr().err
    assert (
        "aspects: questions (alignment) about all prompts of captions.txt, written by 'sandbox'"
        in capsys.readouterr().out
    )
    assert DATA["aspects"].made is QuestionsJob
    job = QuestionsJob(
        out=folder / "run",
        prompts=PromptsConfig(file=folder / "captions.txt"),
        generators={"a": GeneratorSpec(model="mine_for_commands:Painter")},
        rewards={},
        policy="a",
    )
    prompts = [Prompt.from_text(text) for text in CAPTIONS]
    shares = PromptShares(
        train=prompts[:1], validation=prompts[1:2], evaluation=[prompts[2], Prompt.from_text("a cat")]
    )
    data = job.make_data(shares)
    assert (data.kind, data.train()["prompt"][:]) == ("aspects", CAPTIONS[:1])
    job = replace(job, aspects=AspectsConfig(quarantine_limit=1.0))
    prepared = job.prepared(shares)
    assert prepared.train == shares.train
    validation, evaluation = prepared.validation, prepared.evaluation
    assert [prompt.id for prompt in (*validation, *evaluation)] == [
        p.id for p in (*shares.validation, *shares.evaluation)
    ]
    assert {question["aspect"] for question in evaluation[0].metadata["questions"]} == {"alignment"}
    assert validation[0].metadata["questions"] != evaluation[0].metadata["questions"]
    assert evaluation[1].metadata == {}  # outside the grammar: it has no questions

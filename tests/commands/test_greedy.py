"""`alignkit soup --method greedy`: the best soup of a painter whose scores are known, stopped and continued."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from random_adapters import stir

from alignkit import cli
from alignkit.adapters.mixture import read_mixture
from alignkit.commands import greedy

# The red of each candidate by its members; two and three members are read from the record of the mixture.
RED = {"a": 0.2, "b": 0.5, "c": 0.4, "b+c": 0.5, "a+b": 0.6, "a+b+c": 0.55}
SAMPLING = {"height": 16, "width": 16, "steps": 2}


class Painter:
    """Paints the red of a candidate, and fails at the image `fails_at`."""

    name, drawn, fails_at, table = "painter", 0, -1, RED

    def __init__(self, _name, spec):
        members = sorted(member.name.rpartition("/")[2] for member in read_mixture(spec.adapter).members)
        self.red = self.table["+".join(members)]

    def generate(self, prompts, seeds, sampling):
        if Painter.drawn == Painter.fails_at:
            raise KeyboardInterrupt
        Painter.drawn += 1
        image = torch.zeros(len(seeds), 3, sampling.height, sampling.width)
        image[:, 0] = self.red
        return image


@pytest.fixture
def painter(monkeypatch):
    monkeypatch.setattr(Painter, "drawn", 0)
    monkeypatch.setattr(Painter, "fails_at", -1)
    monkeypatch.setattr(greedy, "build_generator", Painter)
    return Painter


@pytest.fixture(scope="module")
def adapters(load, tmp_path_factory):
    """Three random adapters, `a`, `b` and `c`."""
    folder = tmp_path_factory.mktemp("adapters")
    for rank, name in enumerate("abc", start=1):
        generator = load("unet")
        generator.add_lora(rank, None, None, 0.0)
        stir(generator.net)
        generator.save_adapter(folder / name)
    return folder


@pytest.fixture
def soup(work, model_folders, adapters):
    """The command line of a greedy soup of the adapters."""
    shutil.copytree(adapters, work, dirs_exist_ok=True)

    def write(given=None, **changes):
        scored = {
            "prompts": {"file": "prompts.txt", "held_out": 0},
            "reward": {"reward": "mine_for_commands:Red"},
            "evaluate": {"seeds_per_prompt": 1, "sampling": SAMPLING},
        }
        config = {"out": "mix", "base": str(model_folders["unet"]), "members": ["a", "b", "c"], "method": "greedy"}
        config |= {"greedy": scored | (given or {})} | changes
        (work / "soup.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        return ["soup", "--config", "soup.yaml"]

    return write


@pytest.mark.parametrize("space", ["weights", "prediction"])
def test_members_join_while_the_score_rises(work, soup, painter, space, capsys):
    """b is best alone; c does not raise it, a does."""
    assert cli.main(soup(space=space)) == 0, capsys.readouterr().err
    mixture = read_mixture(work / "mix")
    assert [member.name for member in mixture.members] == ["a", "b"]
    assert mixture.weights == (0.5, 0.5)
    assert (mixture.space, (work / "mix" / "pytorch_lora_weights.safetensors").is_file()) == (space, space == "weights")
    kept = {path.name: json.loads((path / "finished.json").read_text()) for path in (work / "mix-greedy").iterdir()}
    expected = {"0": 0.2, "1": 0.5, "2": 0.4, "0-1": 0.6, "1-2": 0.5}
    assert {name: round(note["score"], 2) for name, note in kept.items()} == expected
    assert not list((work / "mix-greedy").glob("*/mixture"))
    assert painter.drawn == 5


def test_a_stopped_choice_goes_on(work, soup, painter, monkeypatch, capsys):
    monkeypatch.setattr(painter, "fails_at", 3)
    command = soup({"evaluate": {"seeds_per_prompt": 2, "batch_size": 2, "sampling": SAMPLING}})
    assert cli.main(command) == 130
    assert not (work / "mix" / "alignkit.json").exists()
    monkeypatch.setattr(painter, "fails_at", -1)
    assert cli.main(command) == 0, capsys.readouterr().err
    assert painter.drawn == 5 * 3  # candidates x batches: none twice
    shutil.rmtree(work / "mix")
    assert cli.main(command) == 0
    assert painter.drawn == 5 * 3
    shutil.rmtree(work / "mix")
    assert cli.main(soup({"evaluate": {"seeds_per_prompt": 1, "sampling": SAMPLING}})) == 2
    assert "greedy.evaluate.seeds_per_prompt: 2 -> 1" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_refused(work, soup, painter, monkeypatch, bad, capsys):
    """Of one image in many, too."""
    source = "\n\nclass Bad(Red):\n    def __call__(self, media, prompts):\n        total = media[:, 0].mean((1, 2))\n"
    source += f"        total[[prompt.text == 'a dog' for prompt in prompts]] = float('{bad}')\n"
    source += "        return Scores(total)\n"
    with (work / "mine_for_commands.py").open("a", encoding="utf-8") as file:
        file.write(source)
    monkeypatch.setattr("alignkit.evaluation.paired.MOST_NOT_FINITE", 0.5)
    assert cli.main(soup({"reward": {"reward": "mine_for_commands:Bad"}})) == 2
    text = capsys.readouterr().err
    assert "'mine_for_commands:Bad' is NaN or infinite on 1 of 3 images of a, in 'mix-greedy/0'" in text
    assert not (work / "mix" / "alignkit.json").exists()


def test_generated_images_choose_the_soup(work, soup, capsys):
    """The tiny U-Net itself: the result is the candidate with the highest score, and loads."""
    assert cli.main(soup(members=["a", "base"])) == 0, capsys.readouterr().err
    notes = [json.loads((path / "finished.json").read_text()) for path in (work / "mix-greedy").iterdir()]
    best = max(notes, key=lambda note: note["score"])
    assert len({note["score"] for note in notes}) == 3
    assert [member.name for member in read_mixture(work / "mix").members] == best["members"]


def test_a_result_that_cannot_be_written_is_refused_before_images_are_drawn(soup, painter, capsys):
    assert cli.main(soup(rank=2, output="components")) == 2
    assert "rank is 2, but full weights are written" in capsys.readouterr().err
    assert painter.drawn == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"greedy": None}, "method: greedy and the section `greedy` (prompts, reward) belong together"),
        ({"method": "linear"}, "method: greedy and the section `greedy` (prompts, reward) belong together"),
        ({"weights": [0.5, 0.3, 0.2]}, "leave out weights"),
        ({"members": ["a"]}, "from at least two members"),
        ({"density": 0.5}, "density is 0.5, which linear does not use"),
        ({"space": "prediction", "rank": 2}, "a mixture of predictions takes none of them"),
    ],
)
def test_wrong_configs_are_refused_before_any_work(work, soup, changes, message, capsys):
    assert cli.main([*soup(**changes), "--dry-run"]) == 2
    assert message in capsys.readouterr().err
    assert not (work / "mix").exists()


def test_the_dry_run_names_the_prompts(soup, capsys):
    assert cli.main([*soup(members=["a", "gone"]), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "NOT THERE YET: gone" in printed
    assert "score 3 candidates by mine_for_commands:Red on the share of all prompts of prompts.txt" in printed

"""`alignkit doctor --reward`: photographs and captions, the table, and an honest verdict."""

from __future__ import annotations

import sys

import pytest
import torch

from alignkit import cli
from alignkit.commands.doctor import rewards as doctor_rewards
from rewards.photographs import CAPTIONS, photographs

# Rewards that know the photographs: by their mean colour, and by words of the captions.
ORACLES = """\
import torch
from alignkit.records import Scores
from rewards.photographs import photographs

MEANS = torch.stack([picture.mean((1, 2)) for picture in photographs().values()])
WORDS = ("astronaut", "woman"), ("coffee",), ("cat", "chelsea")


class Oracle:
    name, modality, needs_prompt, differentiable = "oracle", "image", True, True
    comparable_across_prompts, native_range, licence, source = True, (-9.0, 9.0), "Apache-2.0", "https://example.org"

    def __init__(self, sign: float = 1.0) -> None:
        self.sign = sign

    def __call__(self, media, prompts):
        colors = media.mean((-2, -1)).reshape(len(media), -1, 3).mean(1)
        wanted = torch.stack([MEANS[self.subject(prompt)] for prompt in prompts])
        far = (colors - wanted).norm(dim=1)
        return Scores(-self.sign * far, {"red": colors[:, 0], "far": far})

    def subject(self, prompt):
        return next(i for i, words in enumerate(WORDS) if any(word in prompt.text for word in words))


class VideoOracle(Oracle):
    modality = "video"


class MetadataOracle(Oracle):
    def subject(self, prompt):
        return ["person", "cup", "cat"].index(prompt.metadata["include"][0]["class"])


class Blind(Oracle):
    def __call__(self, media, prompts):
        return Scores(torch.full((len(media),), float("nan")))


class NameReader:
    # tells the written names apart by where they end

    def __init__(self):
        self.ends = {self.end(picture): name for name, picture in written().items()}

    def end(self, picture):
        band = picture[: picture.shape[0] // 7, :, 0] < 128
        return band.any(0).nonzero()[0].max() / band.shape[1]

    def __call__(self, picture):
        return self.ends[min(self.ends, key=lambda end: abs(end - self.end(picture)))]


def written():
    from alignkit.commands.doctor.rewards import subjects
    from rewards.text_rendering import TextRendering

    reader = TextRendering("builtins:dict")  # never asked
    return {name: (255 * item).byte().permute(1, 2, 0).numpy() for name, item in subjects(reader)[0].items()}
"""


@pytest.fixture(autouse=True)
def oracles(tmp_path, monkeypatch):
    (tmp_path / "oracles_for_doctor.py").write_text(ORACLES, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("oracles_for_doctor", None)


def doctor(*words):
    return cli.main(["doctor", *words])


def numbers(said, title):
    """The rows of the table under the line that starts with `title`."""
    lines = said.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    return [[float(cell) for cell in line.split()[1:]] for line in lines[start + 2 : start + 5]]


def test_the_photographs_are_small_and_captioned():
    found = photographs()
    assert list(found) == list(CAPTIONS)
    for picture in found.values():
        assert picture.dtype == torch.float32
        assert max(picture.shape) == 320
        assert 0 <= picture.min() < 0.1
        assert 0.8 < picture.max() <= 1


@pytest.mark.parametrize("kind", ["Oracle", "MetadataOracle", "VideoOracle"])
def test_a_right_reward_wins(kind, capsys):
    assert doctor("--reward", f"oracles_for_doctor:{kind}") == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "right: all 12 comparisons are won" in said
    assert all(caption in said for caption in CAPTIONS.values())
    assert "https://example.org" in said
    table = torch.tensor(numbers(said, "scores"))
    assert table.shape == (3, 3)
    assert (table.argmax(0) == torch.arange(3)).all()
    assert (table.argmax(1) == torch.arange(3)).all()
    far = [row[1] for row in numbers(said, "parts")]
    torch.testing.assert_close(torch.tensor(far), -table.diagonal(), rtol=1e-4, atol=1e-6)
    assert ("a slow pan and its first frame frozen" in said) == (kind == "VideoOracle")


def test_a_wrong_reward_does_not(capsys):
    assert doctor("--reward", "oracles_for_doctor:Oracle", "--options.sign", "-1") == 2
    captured = capsys.readouterr()
    assert "oracle: not right, 12 of 12 comparisons are lost: astronaut.jpg: caption of coffee" in captured.err
    assert "scores, a photograph a row" in captured.out  # the numbers are there all the same
    assert doctor("--reward", "oracles_for_doctor:Blind") == 2
    assert "not right, 12 of 12" in capsys.readouterr().err


def test_faults_name_rows_and_columns():
    table = {"a": [3.0, 1.0], "b": [3.5, 4.0]}
    assert doctor_rewards.faults(table) == ["caption of a: b.jpg 3.5, its own 3"]
    assert doctor_rewards.faults({"a": [1.0, 1.0], "b": [0.0, 2.0]}) == ["a.jpg: caption of b 1, its own 1"]


def test_a_weak_clip_is_told_so(capsys):
    """The sandbox's CLIP has seen shapes only; its numbers are still printed, float beside 8 bits."""
    assert doctor("--reward", "clip_score", "--options", "{model: alignkit/sandbox/weights/clip}") == 2
    captured = capsys.readouterr()
    assert "not right" in captured.err
    for exact, stored, difference in numbers(captured.out, "at 3/4 of the size"):
        assert stored - exact == pytest.approx(difference, abs=1e-3)
        assert 0 < abs(difference) < 0.05  # of a scale of 100


def test_rewards_without_a_prompt_print_numbers(capsys):
    assert doctor("--reward", "rewards.pixel_statistics:Saturation") == 0
    said = capsys.readouterr().out
    assert "captions" not in said
    assert [len(row) for row in numbers(said, "scores")] == [1, 1, 1]
    assert doctor("--reward", "rewards.motion:Flicker") == 0
    for pan, frozen in numbers(capsys.readouterr().out, "a slow pan and its first frame frozen"):
        assert 0 == frozen < pan < 0.01


def test_a_reader_of_text_gets_text_to_read(capsys):
    words = ["--reward", "rewards.text_rendering:TextRendering", "--options.recogniser=oracles_for_doctor:NameReader"]
    assert doctor(*words) == 0
    said = capsys.readouterr().out
    assert "the word “coffee”" in said
    assert numbers(said, "parts") == [[1], [1], [1]]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--reward", "clip_scor"], "Did you mean 'clip_score'"),
        (["--reward", "clip_score"], "'model'"),
        (["--reward", "clip_score", "--options.model", "no/where"], "'no/where' is no CLIP folder"),
        (["--options.model", "x"], "name it with --reward"),
        (["--reward", "clip_score", "--model", "x"], "one at a time"),
    ],
)
def test_what_cannot_be_is_named(words, told, capsys):
    assert doctor(*words) == 2
    assert told in capsys.readouterr().err


def test_a_dry_run_loads_nothing(capsys):
    assert doctor("--reward", "clip_score", "--options.model", "no/where", "--dry-run") == 0
    assert "three photographs" in capsys.readouterr().out

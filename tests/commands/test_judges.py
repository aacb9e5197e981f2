"""Judges by their names in a config, and their verdicts on stored pairs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from chat_server import ChatServer, said

from alignkit.commands.specs import JudgeSpec, build_judge
from alignkit.errors import ConfigError, DataError, ResumeError, UnknownNameError
from alignkit.evaluation.judged import judge_pairs, judged_lines, read_all, read_judged
from alignkit.evaluation.paired import EvaluateConfig, evaluate
from alignkit.evaluation.statistics import Bootstrap, bootstrap_mean
from alignkit.protocols import Judge
from alignkit.records import Prompt, Sampling, Scores
from alignkit.resolve import resolve
from alignkit.seeds import derive_seed
from rewards import JUDGES

QUESTION = """\
template: 'Which shows "{prompt}"?'
answers: {left: 1, right: -1, both: 0}
labels: ["one:", "two:"]
"""


def test_a_question_from_a_file(tmp_path):
    file = tmp_path / "question.yaml"
    file.write_text(QUESTION, encoding="utf-8")
    before = JudgeSpec(judge="served", options={"question": str(file), "cache": "a"}).identity
    assert before == JudgeSpec(judge="served", options={"question": str(file), "cache": "b"}).identity
    with ChatServer(lambda request, *_: said("right" if "one:" in json.dumps(request) else "left")) as server:
        judge = build_judge("served", {"base_url": server.url, "model": "m", "question": str(file)})
        image = torch.rand(1, 3, 8, 8)
        assert judge.compare(image, image, [Prompt.from_text("a cat")]) == [0]  # "right" in both orders: no verdict
    texts = [part["text"] for part in server.requests[0]["messages"][0]["content"] if part["type"] == "text"]
    assert texts == ["one:", "two:", 'Which shows "a cat"?']
    file.write_text(QUESTION + "max_tokens: 9\n", encoding="utf-8")
    assert JudgeSpec(judge="served", options={"question": str(file), "cache": "a"}).identity != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("template: x\n", "needs the option 'answers'"),
        ("template: x\nanswers: {a: 1}\n", "1 and -1 must both be there"),
        ("template: x\nanswers: {a: 1, b: 2, c: -1}\n", "each must be 1"),
        ("template: x\nanswers: {a: 1, b: -1}\nlabel: [x, y]\n", "no option 'label'. Did you mean 'labels'"),
        ("- a\n", "must hold the keys"),
        ("a: [", "cannot be read"),
    ],
)
def test_wrong_questions_are_named(tmp_path, text, message):
    file = tmp_path / "question.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        build_judge("served", {"base_url": "http://127.0.0.1:1", "model": "m", "question": str(file)})


class NoJudge:
    pass


def test_judges_by_name():
    assert all(callable(resolve(name, JUDGES, kind="judge")) for name in JUDGES)
    judge = build_judge("reward", {"reward": "saturation", "least_difference": 0.2})
    grey, red = torch.full((1, 3, 4, 4), 0.5), torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert judge.compare(red, grey, [Prompt.from_text("x")]) == [1]
    assert judge.compare(grey, grey, [Prompt.from_text("x")]) == [0]
    with pytest.raises(UnknownNameError, match=r"unknown judge 'servd'. Did you mean 'served'"):
        JudgeSpec(judge="servd")
    with pytest.raises(UnknownNameError, match="unknown reward 'saturaton'"):
        build_judge("reward", {"reward": "saturaton"})
    with pytest.raises(ConfigError, match="judge 'reward' needs the option 'reward'"):
        build_judge("reward", {})
    with pytest.raises(ConfigError, match="reward 'saturation' has no option 'x'"):
        build_judge("reward", {"reward": "saturation", "options": {"x": 1}})
    with pytest.raises(ConfigError, match="without `compare`"):
        build_judge(f"{__name__}:NoJudge", {})


# --- verdicts on stored pairs ---------------------------------------------------------------------------------------

SAMPLING = Sampling(height=8, width=8)
CONFIG = EvaluateConfig(seeds_per_prompt=2, batch_size=3, sampling=SAMPLING, bootstrap_samples=200)
PROMPTS = [Prompt.from_text(f"image {number}") for number in range(5)]


class Painter:
    def __init__(self, name, offset):
        self.name, self.offset = name, offset

    def generate(self, prompts, seeds, sampling):
        levels = [((seed % 251) / 251 + self.offset) % 1 for seed in seeds]
        return torch.tensor(levels).reshape(-1, 1, 1, 1).expand(-1, 3, sampling.height, sampling.width)


class Mean:
    name, modality, needs_prompt, differentiable = "mean", "image", False, True
    comparable_across_prompts, native_range, licence, source = True, (0.0, 1.0), "Apache-2.0", "here"

    def __call__(self, media, prompts):
        return Scores(media.mean((1, 2, 3)))


class Brighter:
    """The brighter image wins; fails at the call number `fails_at`."""

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = 0, fails_at

    def compare(self, first, second, prompts):
        if self.calls == self.fails_at:
            raise DataError("the server went away")
        self.calls += 1
        difference = first.mean((1, 2, 3)) - second.mean((1, 2, 3))
        return [0 if abs(d) < 0.2 else int(np.sign(d)) for d in difference.tolist()]


@pytest.fixture
def stored(tmp_path):
    """The folder of a finished evaluation, and its paired gains [prompts, seeds]."""
    rewards = {"mean": Mean()}
    evaluate(Painter("base", 0.0), Painter("tuned", 0.3), PROMPTS, CONFIG, tmp_path, rewards=rewards, gold=None)
    from alignkit.evaluation.results import read_pairs

    return tmp_path, read_pairs(tmp_path).gain("mean").reshape(5, 2)


def test_verdicts_of_stored_pairs(stored):
    folder, gain_PS = stored
    verdicts_PS = np.where(abs(gain_PS) < 0.2, 0, np.sign(gain_PS))
    assert isinstance(Brighter(), Judge)
    result = judge_pairs(folder, "b", Brighter(), identity="b 1", config=CONFIG)
    counts = [int((verdicts_PS == verdict).sum()) for verdict in (1, -1, 0)]
    assert [result.wins, result.losses, result.abstentions] == counts
    assert counts[0] * counts[1] > 0  # the painter wraps around, so that both happen
    rate = bootstrap_mean((verdicts_PS + 1) / 2, Bootstrap(200, 0.95, derive_seed("bootstrap", 0)))
    assert (result.win_rate, result.low, result.high) == pytest.approx((rate.mean, rate.low, rate.high))
    assert read_judged(folder, "b", "b 1") == result
    assert read_judged(folder, "c", "c 1") is None
    assert read_all(folder) == {"b": result}
    line = f"judge b: tuned wins {rate.mean:.2f} [{rate.low:.2f}, {rate.high:.2f}] ({counts[0]} won, {counts[1]} lost"
    assert judged_lines({"b": result})[0].startswith(line)


def test_only_missing_batches_are_judged_again(stored):
    folder, _ = stored
    with pytest.raises(DataError, match="went away"):
        judge_pairs(folder, "b", Brighter(fails_at=2), identity="b 1", config=CONFIG)
    assert read_judged(folder, "b", "b 1") is None
    again = Brighter()
    result = judge_pairs(folder, "b", again, identity="b 1", config=CONFIG)
    assert again.calls == 2  # of four batches
    assert result == judge_pairs(folder, "b", Brighter(fails_at=0), identity="b 1", config=CONFIG)
    for call in (
        lambda: read_judged(folder, "b", "b 2"),
        lambda: judge_pairs(folder, "b", Brighter(), identity="b 2", config=CONFIG),
    ):
        with pytest.raises(ResumeError, match="another judge"):
            call()


@pytest.mark.parametrize("verdicts", [[1], [2, 0, 0], [1, None, 0]])
def test_verdicts_that_are_none_are_refused(stored, verdicts):
    class Wrong:
        def compare(self, first, second, prompts):
            return verdicts

    with pytest.raises(DataError, match="must give 1, 0 or -1 for each"):
        judge_pairs(stored[0], "w", Wrong(), identity="w", config=CONFIG)
    assert not list((stored[0] / "judged" / "w").glob("0*.json"))


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden"])
def test_a_judges_name_stays_inside_the_folder(stored, name):
    with pytest.raises(ConfigError, match="becomes a folder"):
        judge_pairs(stored[0], name, Brighter(), identity="b", config=CONFIG)

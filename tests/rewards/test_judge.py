"""Judges agree with themselves in both orders or abstain, against a real server that sees which picture is which."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
import torch
from chat_server import ChatServer, failed, said
from PIL import Image

from alignkit.errors import ConfigError, DataError, ServerError
from alignkit.protocols import Judge, Reward
from alignkit.records import Prompt, Scores
from rewards.pixel_statistics import Saturation
from rewards.served_yes_no import ServedYesNo
from rewards.serving.judge import QUESTIONS, PairQuestion, RewardJudge, ServedJudge
from rewards.serving.messages import media_parts

QUICK = {"timeout": 60.0, "backoff": 0.01, "retries": 1}


def prompts(count):
    return [Prompt.from_text(f"picture {n}") for n in range(count)]


def seen(request):
    """What a server sees of a request: its pictures [H, W, 3] and texts, in order."""
    pictures, texts = [], []
    for part in request["messages"][0]["content"]:
        if part["type"] == "text":
            texts.append(part["text"])
        else:
            _, _, data = part[part["type"]]["url"].partition(";base64,")
            pictures += [np.asarray(Image.open(io.BytesIO(base64.b64decode(frame)))) for frame in data.split(",")]
    return pictures, texts


def brighter(request, _=0):
    """A judge without bias: the brighter picture is better."""
    first, second = (picture.mean() for picture in seen(request)[0])
    word = "first" if first > second else "second"
    sure = abs(first - second) / 255
    return said(word, {word: -0.01, {"first": "second", "second": "first"}[word]: -0.01 - 10 * sure})


def grey(*values, size=4):
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 3, size, size)


def test_an_unbiased_judge_decides(tmp_path):
    with ChatServer(brighter) as server:
        judge = ServedJudge(server.url, "tiny", cache=tmp_path, **QUICK)
        assert isinstance(judge, Judge)
        first, second = grey(0.2, 0.9, 0.6), grey(0.8, 0.1, 0.5)
        assert judge.compare(first, second, prompts(3)) == [-1, 1, 1]
        assert judge.compare(second, first, prompts(3)) == [1, -1, -1]  # the same questions in the other order: cached
    assert len(server.requests) == 6
    asked = {seen(request)[1][0] for request in server.requests}
    assert asked == {QUESTIONS["plain"].template.format(prompt=f"picture {n}") for n in range(3)}
    assert judge.report().abstentions == {}


@pytest.mark.parametrize("word", ["first", "second", "Second."])
def test_a_judge_that_prefers_a_place_abstains(word):
    with ChatServer(lambda *_: said(word)) as server:
        judge = ServedJudge(server.url, "tiny", **QUICK)
        assert judge.compare(torch.rand(5, 3, 4, 4), torch.rand(5, 3, 4, 4), prompts(5)) == [0] * 5
    assert judge.report().abstentions == {"disagreed": 5}


@pytest.mark.parametrize("text", ["", "the first", "first or second", "1", "first second", "neither"])
def test_malformed_answers_abstain(text):
    with ChatServer(lambda *_: said(text)) as server:
        judge = ServedJudge(server.url, "tiny", **QUICK)
        assert judge.compare(grey(0.1), grey(0.9), prompts(1)) == [0]
    assert judge.report().abstentions == {"malformed": 1}


def test_low_confidence_abstains():
    """A difference of d in brightness gives log-odds of 10 d."""
    with ChatServer(brighter) as server:
        judge = ServedJudge(server.url, "tiny", least_margin=3.0, **QUICK)
        assert judge.compare(grey(0.5, 0.5, 0.5), grey(0.6, 0.9, 0.1), prompts(3)) == [0, -1, 1]
    assert judge.report().abstentions == {"unsure": 1}
    assert server.requests[0]["top_logprobs"] == 20


def test_a_request_that_fails_alone_abstains_and_a_dead_server_raises():
    def script(request, _):
        return failed(500) if "picture 1" in str(request["messages"]) else brighter(request)

    with ChatServer(script) as server:
        judge = ServedJudge(server.url, "tiny", **QUICK)
        assert judge.compare(grey(0.1, 0.2, 0.3), grey(0.9, 0.8, 0.7), prompts(3)) == [-1, 0, -1]
        assert judge.report().abstentions == {"failed": 1}
    with pytest.raises(ServerError, match="no server answers"):
        judge.compare(grey(0.4), grey(0.5), prompts(1))


def test_unified_rewards_conclusions_are_found_in_text():
    question = QUESTIONS["unified_reward"]
    assert question.read("... so\nImage 1  is better.") == 1
    assert question.read("Image 2 is better.") == -1
    assert question.read("Both images are equally good.") == 0
    assert question.read("Image 1 is better. No, Image 2 is better.") is None
    assert question.read("Image 3 is better.") is None
    with ChatServer(lambda *_: said("Both images are equally good.")) as server:
        judge = ServedJudge(server.url, "tiny", question="unified_reward", **QUICK)
        assert judge.compare(grey(0.1), grey(0.9), prompts(1)) == [0]
    assert judge.report().abstentions == {"tie": 1}


def test_a_long_answer_that_is_cut_off_abstains(tmp_path):
    """What follows might contradict it; a short answer must match as a whole, so nothing that matters can follow."""
    with ChatServer(lambda *_: said("Image 1 is better", finish="length")) as server:
        judge = ServedJudge(server.url, "tiny", question="unified_reward", cache=tmp_path, **QUICK)
        assert judge.compare(grey(0.1), grey(0.9), prompts(1)) == [0]
        assert judge.report().abstentions == {"cut off": 1}
    assert not list(tmp_path.rglob("*.json"))
    with ChatServer(lambda *_: said("first\n\n", finish="length")) as server:
        judge = ServedJudge(server.url, "tiny", **QUICK)
        judge.compare(grey(0.1), grey(0.9), prompts(1))
    assert judge.report().abstentions == {"disagreed": 1}


def test_labels_stand_before_their_media():
    question = PairQuestion("{prompt}?", {"a": 1, "b": -1}, labels=("one:", "two:"))
    with ChatServer(lambda *_: said("a")) as server:
        judge = ServedJudge(server.url, "tiny", question=question, modality="video", frames=2, **QUICK)
        judge.compare(torch.rand(1, 5, 3, 4, 4), torch.rand(1, 4, 3, 4, 4), [Prompt.from_text("it moves")])
    kinds = [part["type"] for part in server.requests[0]["messages"][0]["content"]]
    assert kinds == ["text", "image_url", "image_url"] * 2 + ["text"]
    assert seen(server.requests[0])[1] == ["one:", "two:", "it moves?"]


def test_what_a_judge_cannot_take():
    judge = ServedJudge("http://127.0.0.1:1", "tiny")
    with pytest.raises(DataError, match="served_judge: media are"):
        judge.compare(torch.rand(1, 4, 4, 3), torch.rand(1, 4, 4, 3), prompts(1))
    with pytest.raises(ConfigError, match="no question 'nice'"):
        ServedJudge("http://127.0.0.1:1", "tiny", question="nice")
    with pytest.raises(ConfigError, match="first token"):
        ServedJudge("http://127.0.0.1:1", "tiny", question="unified_reward", least_margin=1.0)
    numbered = PairQuestion("Which?", {"image 1": 1, "image 2": -1, "neither of them": 0})
    with pytest.raises(ConfigError, match=r"several words, \['image 1', 'image 2'\]"):
        ServedJudge("http://127.0.0.1:1", "tiny", question=numbered, least_margin=1.0)
    ServedJudge("http://127.0.0.1:1", "tiny", question=numbered)


class Brightness:
    def __call__(self, media, prompts):
        return Scores(media.flatten(1).mean(1))


def test_any_reward_judges_by_its_difference():
    judge = RewardJudge(Brightness(), least_difference=0.15)
    assert isinstance(judge, Judge)
    first, second = grey(0.1, 0.9, 0.5, math.nan, 0.5), grey(0.9, 0.1, 0.6, 0.5, 0.5)
    assert judge.compare(first, second, prompts(5)) == [-1, 1, 0, 0, 0]


# --- pictures on the wire -------------------------------------------------------------------------------------------


def test_a_reward_that_judges_builds_no_graph():
    seen = []

    class Watched(Saturation):
        def measure(self, media):
            seen.append(super().measure(media))
            return seen[-1]

    first, second = (torch.rand(2, 3, 4, 4).requires_grad_() for _ in range(2))
    RewardJudge(Watched()).compare(first, second, prompts(2))
    assert [one.requires_grad for one in seen] == [False, False]


def test_pictures_arrive_as_an_8_bit_file_keeps_them():
    media = torch.rand(3, 5, 7, dtype=torch.float64)
    (picture,), _ = seen({"messages": [{"content": media_parts(media)}]})
    expected = np.rint(media.permute(1, 2, 0).numpy().astype(np.float32) * np.float32(255))
    np.testing.assert_array_equal(picture, expected.astype(np.uint8))


@pytest.mark.parametrize("clips", ["frames", "video"])
@pytest.mark.parametrize(("length", "shown"), [(3, [0, 1, 2]), (8, [0, 2, 4, 6]), (9, [0, 2, 4, 6]), (4, [0, 1, 2, 3])])
def test_clips_are_shown_evenly(clips, length, shown):
    clip = torch.arange(length).div(255).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    parts = media_parts(clip, frames=4, clips=clips)
    assert [part["type"] for part in parts] == (["video_url"] if clips == "video" else ["image_url"] * len(shown))
    assert [picture[0, 0, 0] for picture in seen({"messages": [{"content": parts}]})[0]] == shown


def test_a_clip_form_must_be_known():
    with pytest.raises(ConfigError, match="'gif' and 8"):
        media_parts(torch.rand(2, 3, 4, 4), clips="gif")


# --- yes or no ------------------------------------------------------------------------------------------------------


def believes(request, _=0):
    """P(yes) is the brightness; "Yes" and " yes" share it."""
    p = float(seen(request)[0][0].mean()) / 255
    return said("Yes", {"Yes": math.log(0.6 * p), " yes": math.log(0.2 * p), "No": math.log(0.8 - 0.8 * p), "It": -9.0})


def test_yes_no_is_the_share_of_yes():
    with ChatServer(believes) as server:
        reward = ServedYesNo(server.url, "tiny", question="Is it {prompt}?", **QUICK)
        assert isinstance(reward, Reward)
        scores = reward(grey(0.2, 0.6, 0.8), prompts(3))
        alone = torch.cat([reward(grey(v), [p]).total for v, p in zip((0.2, 0.6, 0.8), prompts(3), strict=True)])
    torch.testing.assert_close(scores.total, torch.tensor([0.2, 0.6, 0.8], dtype=torch.float64))
    torch.testing.assert_close(scores.parts["margin"], torch.logit(scores.total))
    assert torch.equal(scores.total, alone)
    assert "Is it picture 0?" in {seen(request)[1][0] for request in server.requests}


def test_yes_no_without_yes_or_no_is_nan():
    def script(request, _):
        return said("red", {"red": -0.1}) if "picture 1" in str(request["messages"]) else believes(request)

    with ChatServer(script) as server:
        reward = ServedYesNo(server.url, "tiny", **QUICK)
        assert reward(grey(0.4, 0.4), prompts(2)).total.isnan().tolist() == [False, True]
    assert reward.report().abstentions == {"malformed": 1}
    with ChatServer(lambda *_: said("Yes")) as server, pytest.raises(ServerError, match="no log-probabilities"):
        ServedYesNo(server.url, "tiny", **QUICK)(grey(0.4), prompts(1))


def test_yes_no_is_complete_at_its_one_token(tmp_path):
    with ChatServer(lambda *_: said("Yes", {"Yes": -0.1, "No": -2.0}, finish="length")) as server:
        for _ in range(2):
            reward = ServedYesNo(server.url, "tiny", cache=tmp_path, **QUICK)
            assert reward(grey(0.4), prompts(1)).parts["margin"].tolist() == pytest.approx([1.9])
    assert len(server.requests) == 1
    assert reward.report().abstentions == {}


def test_words_of_a_belief_are_lists():
    with pytest.raises(ConfigError, match=r"served_yes_no: yes is 'yes'; give a list"):
        ServedYesNo("http://127.0.0.1:1/v1", "judge", yes="yes")

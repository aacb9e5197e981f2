"""Labellers of segments: which frames a judge sees, both orders, tie bands, and rewards that need the whole clip."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
import tiny_vlm
import torch
from chat_server import ChatServer, failed, said
from PIL import Image

from alignkit.errors import ConfigError, ServerError
from alignkit.pairs import Labeller, ShownPair
from alignkit.protocols import ExplainingJudge, SegmentScoring
from alignkit.records import Prompt, Scores
from alignkit.resolve import resolve
from alignkit.shipped import configs
from rewards.labellers import LABELLERS, JudgeLabeller, RewardLabeller, shown_frames
from rewards.serving.judge import PairQuestion, read_question
from rewards.vlm_judge import VlmJudge, side_by_side

QUICK = {"retries": 0, "backoff": 0.0, "timeout": 60.0}
QUESTION = str(configs() / "judges" / "segments.yaml")


def pair(first, second, segments=((0, 4), (4, 9)), fps=16.0, text="a car"):
    """A pair of the brightness of each frame of both clips; 8 x 8 pixels."""
    levels = np.array([first, second], np.uint8)
    clips = np.broadcast_to(levels[:, :, None, None, None], (*levels.shape, 8, 8, 3)).copy()
    return ShownPair(Prompt.from_text(text), clips, fps, segments)


def levels_of(request):
    """The brightness of each frame that a server sees, in order."""
    urls = [part["image_url"]["url"] for part in request["messages"][0]["content"] if part["type"] == "image_url"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(";base64,")[2]))) for url in urls]
    return [np.asarray(picture)[0, 0, 0].item() for picture in pictures]


def brighter(request, _=0):
    """A judge without bias, by the mean of each half of the frames; equal ones are a tie."""
    levels = levels_of(request)
    halves = sum(levels[: len(levels) // 2]), sum(levels[len(levels) // 2 :])
    return said("tie" if halves[0] == halves[1] else "First." if halves[0] > halves[1] else "second")


def labels(found):
    return [[verdict.label for verdict in own] for own in found]


@pytest.mark.parametrize(
    ("segment", "fps", "rate", "frames"),
    [
        ((16, 32), 16, 8, list(range(16, 32, 2))),
        ((64, 81), 16, 8, list(range(64, 80, 2))),  # Wan's last segment of 81 frames has 17
        ((0, 24), 24, 8, list(range(0, 24, 3))),
        ((24, 54), 30, 8, [24, 28, 32, 35, 39, 43, 46, 50]),
        ((4, 8), 4, 8, [4, 5, 6, 7]),
        ((4, 8), 4, None, [4, 5, 6, 7]),
        ((0, 8), 16, 0.5, [0, 7]),
        ((3, 4), 16, 8, [3]),
    ],
)
def test_frames_are_shown_at_a_rate(segment, fps, rate, frames):
    """8 a second is 8 of each second, whatever the clip's own rate; two at least."""
    assert list(shown_frames(segment, fps, rate)) == frames


def test_a_served_judge_sees_each_segment_in_both_orders():
    first, second = [10, 20, 30, 40, 50, 60, 70, 80, 90], [11, 21, 31, 41, 49, 59, 69, 79, 89]
    with ChatServer(brighter) as server:
        options = {"base_url": server.url, "model": "m", "question": QUESTION, **QUICK}
        labeller = JudgeLabeller(options=options)
        assert isinstance(labeller, Labeller)
        found = labeller.label([pair(first, second), pair(second, first), pair(first, first)])
    assert labels(found) == [[-1, 1], [1, -1], [0, 0]]
    assert found[0][0].details == {"answers": ["second", "First."]}
    assert found[2][0].reason == "tie"
    seen = {tuple(levels_of(request)) for request in server.requests}
    assert {(10, 30, 11, 31), (11, 31, 10, 30), (50, 70, 49, 69)} <= seen  # 8 a second of 16; 5 frames: 2 of them
    assert len(server.requests) == 6  # equal ones are sent once: two orders of two segments, and two of equal clips
    texts = [part["text"] for part in server.requests[0]["messages"][0]["content"] if part["type"] == "text"]
    assert texts[:2] == ["Frames of the first clip:", "Frames of the second clip:"]
    assert "abstained (tie)" in str(labeller.report())


def test_disagreement_is_a_tie_and_garbage_is_no_answer():
    answers = iter(["first", "first", "maybe", "second"])
    with ChatServer(lambda *_: said(next(answers))) as server:
        options = {"base_url": server.url, "model": "m", "question": QUESTION, "concurrency": 1, **QUICK}
        one, two = ([[level] * 4 for level in levels] for levels in ((1, 2), (3, 4)))
        (biased,) = JudgeLabeller(options=options).label([pair(*one, segments=((0, 4),))])
        (garbage,) = JudgeLabeller(options=options).label([pair(*two, segments=((0, 4),))])
    assert [(verdict.label, verdict.reason) for verdict in (*biased, *garbage)] == [
        (0, "disagreed"),
        (None, "malformed"),
    ]
    assert garbage[0].details == {"answers": ["maybe", "second"]}


def test_a_server_that_fails_once_gives_no_answer_and_one_that_is_down_stops():
    def script(request, number):
        return failed(500) if number == 0 else brighter(request)

    with ChatServer(script) as server:
        labeller = JudgeLabeller(
            options={"base_url": server.url, "model": "m", "question": QUESTION, "concurrency": 1, **QUICK}
        )
        (found,) = labeller.label([pair([9] * 4 + [7] * 5, [1] * 9)])
    assert [(verdict.label, verdict.reason) for verdict in found] == [(None, "failed"), (1, "")]
    with pytest.raises(ServerError, match="no server answers"):
        labeller.label([pair([8] * 9, [1] * 9)])


@pytest.mark.parametrize("name", ["segments", "side_by_side"])
def test_shipped_questions_are_read(name):
    question = read_question(configs() / "judges" / f"{name}.yaml")
    assert sorted(question.answers.values()) == [-1, 0, 1]
    assert all(question.read(word) == meaning for word, meaning in question.answers.items())
    assert all(word in question.template for word in question.answers)


# --- rewards ----------------------------------------------------------------------------------------------------------


class Brightness:
    name, modality, needs_prompt, differentiable = "brightness", "video", False, True
    comparable_across_prompts, native_range, licence, source = True, (0.0, 1.0), "Apache-2.0", "here"

    def __call__(self, media, prompts):
        return Scores(media.mean((1, 2, 3, 4)))


class Whole(Brightness):
    """It scores segments of the whole clip: by the frame before the segment, which a cut-out segment does not have."""

    def score_segments(self, media, prompts, segments):
        levels = media.mean((2, 3, 4))
        return [[levels[row, start - 1] for start, _ in own] for row, own in enumerate(segments)]


class Broken(Brightness):
    def __call__(self, media, prompts):
        return Scores(torch.full((len(media),), math.nan))


def test_a_reward_labels_with_a_tie_band():
    first, second = [100, 100, 100, 100, 50, 50, 50, 50, 50], [110, 110, 110, 110, 49, 49, 49, 49, 49]
    labeller = RewardLabeller(Brightness(), least_difference=5 / 255)
    assert isinstance(labeller, Labeller)
    (found,) = labeller.label([pair(first, second)])
    assert [(verdict.label, verdict.reason) for verdict in found] == [(-1, ""), (0, "tie")]
    assert found[0].details["scores"] == pytest.approx([100 / 255, 110 / 255], abs=1e-6)
    (found,) = RewardLabeller(Broken()).label([pair(first, second)])
    assert [(verdict.label, verdict.reason) for verdict in found] == [(None, "not finite")] * 2
    assert labels(RewardLabeller("flicker").label([pair([0, 90, 0, 90], [50] * 4, segments=((0, 4),))])) == [[1]]


def test_a_reward_of_segments_gets_whole_clips():
    assert isinstance(Whole(), SegmentScoring)
    assert not isinstance(Brightness(), SegmentScoring)
    shown = pair([9, 1, 1, 5, 1, 1], [0, 1, 1, 6, 1, 1], segments=((1, 4), (4, 6)))
    assert labels(RewardLabeller(Whole()).label([shown])) == [[1, -1]]

    class Short(Whole):
        def score_segments(self, media, prompts, segments):
            return [[1.0], [1.0]]

    with pytest.raises(ConfigError, match=r"score_segments gave \[1, 1\] scores for two clips of 2 segments"):
        RewardLabeller(Short()).label([shown])


def test_a_judge_of_ones_own_may_only_compare():
    class Own:
        def __init__(self, verdicts):
            self.verdicts_given = verdicts

        def compare(self, first, second, prompts):
            return self.verdicts_given

    assert labels(JudgeLabeller(Own([1])).label([pair([1] * 4, [2] * 4, segments=((0, 4),))])) == [[1]]
    with pytest.raises(ConfigError, match=r"a Own gave \[3\] for 1 pairs"):
        JudgeLabeller(Own([3])).label([pair([1] * 4, [2] * 4, segments=((0, 4),))])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: JudgeLabeller(Brightness()), "has no `compare`"),
        (lambda: JudgeLabeller("served", rate=0.0), "rate is 0.0"),
        (lambda: JudgeLabeller("served"), "judge 'served' needs the option 'base_url'"),
        (lambda: RewardLabeller("saturation"), "reward 'saturation' scores images"),
        (lambda: RewardLabeller("flicker", least_difference=-1.0), "least_difference is -1.0"),
    ],
)
def test_what_cannot_label(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_labellers_by_name():
    assert all(callable(resolve(name, LABELLERS, kind="labeller")) for name in LABELLERS)


# --- a model in this process ------------------------------------------------------------------------------------------


class Scripted:
    """A critic that looks at the pixels: the brighter half is better."""

    def write(self, media, pairs, *, limit):
        width = (media.shape[-1] * 8) // 17  # 17 eighths of a half: two halves and a gap
        halves = media[..., :width].mean((1, 2, 3, 4)), media[..., -width:].mean((1, 2, 3, 4))
        self.asked = [text for _, text in pairs]
        return ["Left" if one > other else "right." for one, other in zip(*halves, strict=True)]


def test_a_vlm_sees_both_clips_side_by_side_in_both_orders(tmp_path):
    judge = VlmJudge(
        str(tiny_vlm.save("qwen2_5_vl", tmp_path)),
        question=str(configs() / "judges" / "side_by_side.yaml"),
        modality="video",
    )
    assert isinstance(judge, ExplainingJudge)
    labeller = JudgeLabeller(judge, rate=8)
    shown = [pair([10] * 9, [20] * 9), pair([30] * 9, [20] * 9)]
    random = labeller.label(shown)  # a random model writes no answer
    assert {verdict.reason for own in random for verdict in own} == {"malformed"}
    assert len(random[0][0].details["answers"]) == 2
    judge.critic = Scripted()
    assert labels(labeller.label(shown)) == [[-1, -1], [1, 1]]
    assert "left, right or tie" in judge.critic.asked[0]
    assert "abstained (malformed) 4" in str(labeller.report())


def test_two_media_of_one_size_are_joined():
    left, right = torch.zeros(2, 3, 4, 16), torch.ones(2, 3, 4, 16)
    joined = side_by_side(left, right)
    assert joined.shape == (2, 3, 4, 34)
    assert torch.equal(joined[..., :16], left)
    assert torch.equal(joined[..., 18:], right)
    assert (joined[..., 16:18] == 0.5).all()
    with pytest.raises(ConfigError, match="both must have one size"):
        side_by_side(left, right[..., :8])
    assert PairQuestion("?", {"a": 1, "b": -1}).verdict("a", "a").label == 0

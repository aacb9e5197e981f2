"""UnifiedReward's answers are read strictly, asked for again a bounded number of times, and put aside as NaN."""

from __future__ import annotations

import pytest
import torch
from chat_server import ChatServer, said

from alignkit.errors import ConfigError, ServerError
from alignkit.protocols import Reward
from alignkit.records import Prompt
from rewards.unified_reward import FORMS, UnifiedReward

QUICK = {"timeout": 60.0, "backoff": 0.01, "retries": 1}
PROMPTS = [Prompt.from_text("a red fox"), Prompt.from_text("a blue car")]
V1 = "fox (animal): 1\nred (attribute): 1\nFinal Score: 4.5"
V1_CLIP = """visual quality: 4
temporal consistency: 3
dynamic degree: 2.5
text-to-video alignment: 1
factual consistency: 2
Final Score: 6"""
V2 = "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.3715\nStyle Score (1-5): 2.8025"
V2_CLIP = "Alignment Score (1-5): 2.4036\nPhysics Score (1-5): 3.0987\nStyle Score (1-5): 3.3889"
READ = {
    (1, "image"): (V1, 4.5, {}),
    (1, "video"): (
        V1_CLIP,
        6.0,
        {
            "visual quality": 4.0,
            "temporal consistency": 3.0,
            "dynamic degree": 2.5,
            "text-to-video alignment": 1.0,
            "factual consistency": 2.0,
        },
    ),
    (2, "image"): (V2, 2.6229, {"alignment": 2.6947, "coherence": 2.3715, "style": 2.8025}),
    (2, "video"): (V2_CLIP, 2.9637, {"alignment": 2.4036, "physics": 3.0987, "style": 3.3889}),
}


def media(modality):
    return torch.rand(2, 3, 4, 4) if modality == "image" else torch.rand(2, 9, 3, 4, 4)


@pytest.mark.parametrize(("version", "modality"), READ)
def test_published_answers_are_read(version, modality):
    text, total, parts = READ[version, modality]
    with ChatServer(lambda *_: said(text)) as server:
        reward = UnifiedReward(server.url, "UnifiedReward", version=version, modality=modality, **QUICK)
        assert isinstance(reward, Reward)
        scores = reward(media(modality), PROMPTS)
    assert scores.total.tolist() == pytest.approx([total] * 2, abs=1e-4)
    assert {name: values[0].item() for name, values in scores.parts.items()} == pytest.approx(parts, abs=1e-4)
    low, high = reward.native_range
    assert low <= total <= high
    content = server.requests[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url"] * (1 if modality == "image" else 8) + ["text"]
    assert content[-1]["text"].endswith(": [a red fox]") or content[-1]["text"].endswith(": [a blue car]")
    assert server.requests[0]["temperature"] == 0


def test_questions_are_the_published_ones():
    """Their length and ends, counted in the published files."""
    texts = {key: form.template for key, form in FORMS.items()}
    assert not any(name in text for text in texts.values() for name in ("{medium}", "{axis}", "{second}", "{look}"))
    assert "\n- Coherence Score: How logically consistent the image is (absence of" in texts[2, "image"]
    assert "\n- Style Score: How visually appealing the video looks, regardless" in texts[2, "video"]
    assert "[1,2,3,4], \nin which '1' means 'Bad', '2' means 'Average', '3' means 'Good', \n'4'" in texts[1, "video"]
    assert "assign a score from 1 to 5 after 'Final Score:'.\nYour task is provided" in texts[1, "image"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I like it",
        "Final Score:",
        "Final Score: five",
        "Final Score: 7",
        "Final Score: 0.5",
        "Final Score: 4/5",
        "Final Score: 1-5",
        "Final Score: 3\nFinal Score: 4",
        "Final Score: 4.",
        "Final Score: -3",
    ],
)
def test_malformed_answers_are_not_scores(text):
    if text == "Final Score: 4.":  # a full stop is no fault
        assert FORMS[1, "image"].read(text) == {"total": 4.0}
    else:
        assert FORMS[1, "image"].read(text) is None


@pytest.mark.parametrize("text", ["**Final Score:** 4", "- Final Score: 4", "final score : 4.0", "Final Score: 4\r\n"])
def test_marks_around_a_score_do_not_matter(text):
    assert FORMS[1, "image"].read(f"some words\n{text}") == {"total": 4.0}


def test_a_missing_axis_is_malformed():
    assert FORMS[2, "image"].read(V2.replace("Style", "Stile")) is None
    assert FORMS[2, "image"].read(V2_CLIP) is None


def test_malformed_answers_are_asked_for_again_then_nan(tmp_path):
    """The fox's answers are never readable, the car's at the second attempt."""

    def script(request, _):
        is_fox = "fox" in str(request["messages"])
        return said("hm" if is_fox or request["temperature"] == 0 else V2)

    with ChatServer(script) as server:
        reward = UnifiedReward(server.url, "UnifiedReward", attempts=3, cache=tmp_path, **QUICK)
        pictures = media("image")
        scores = reward(pictures, PROMPTS)
        assert scores.total.isnan().tolist() == [True, False]
        assert all(values.isnan().tolist() == [True, False] for values in scores.parts.values())
        assert len(server.requests) == 5
        assert reward.report().abstentions == {"malformed": 1}
        assert len({request.get("seed") for request in server.requests}) == 3
        again = UnifiedReward(server.url, "UnifiedReward", attempts=3, cache=tmp_path, **QUICK)(pictures, PROMPTS)
    assert torch.equal(again.total[1], scores.total[1])
    assert len(server.requests) == 5


def test_scores_cut_off_are_not_scores(tmp_path):
    """`4` may be the beginning of `4.5`."""
    texts = ["hm", "Final Score: 4"]
    with ChatServer(lambda _, number: said(texts[number], finish=("stop", "length")[number])) as server:
        options = {"version": 1, "attempts": 2, "cache": tmp_path}
        reward = UnifiedReward(server.url, "UnifiedReward", **options, **QUICK)
        assert reward(media("image")[:1], PROMPTS[:1]).total.isnan().all()
    assert reward.report().abstentions == {"cut off": 1}
    assert len(list(tmp_path.rglob("*.json"))) == 1


def test_a_dead_server_is_an_error_not_a_nan():
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:1/v1 .*vllm serve"):
        UnifiedReward("http://127.0.0.1:1", "UnifiedReward", **QUICK)(media("image"), PROMPTS)


def test_versions_and_modalities_are_known():
    with pytest.raises(ConfigError, match="version 1 or 2"):
        UnifiedReward("http://127.0.0.1:1", "x", version=3)

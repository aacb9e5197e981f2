"""Dense answers: teacher forcing against the library's own forward, own answers against its own generation."""

from __future__ import annotations

import io
import json

import pytest
import tiny_vlm
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from alignkit.errors import ConfigError, DataError
from alignkit.media import encode_clip
from alignkit.protocols import ExampleMaker, Preparing, Reward
from alignkit.records import Prompt
from rewards.explanation import Explanation
from rewards.models.vlm import VlmCritic

ASKED = [
    {"text": "Is it {prompt}?", "answer": "Yes, {prompt}.", "weight": 3.0, "name": "whole", "aspect": "alignment"},
    {"text": "", "negated": "Is it blurred?", "answer": "No.", "name": "sharp", "aspect": "quality"},
]
PROMPTS = [Prompt.from_text("a cat", questions=ASKED), Prompt.from_text("a ring", questions=ASKED[:1])]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("vlm")
    return {kind: str(tiny_vlm.save(kind, root / kind, bounds=(64, 256))) for kind in tiny_vlm.KINDS}


def media(shape=(2, 3, 16, 16), seed=1):
    pixels = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return pixels.mul(255).round().div(255)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def reward_of(folder, **options):
    return Explanation(folder, dtype="float64", **options)


def whole_model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()


def as_inputs(folder, pixels, text):
    """What the library's model takes for one 16 x 16 medium in patches of 4, merged 2 x 2, and `text`."""
    critic = VlmCritic(folder, dtype="float64")
    kind = "video" if pixels.dim() == 4 else "image"
    patches, grid = critic._reader.patches[kind](pixels[None])
    seen = critic._reader.see(pixels[None])
    ids = torch.tensor([critic._reader.tokens(seen, text)])
    config = whole_model(folder).config
    kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    suffix = "_videos" * (kind == "video")
    given = {f"pixel_values{suffix}": patches, f"{kind}_grid_thw": grid, "mm_token_type_ids": kinds}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}


@pytest.mark.parametrize("kind", tiny_vlm.KINDS)
@pytest.mark.parametrize("shape", [(3, 16, 16), (4, 3, 16, 16)], ids=["image", "clip"])
def test_what_the_critic_writes_is_the_librarys_greedy_generation(folders, kind, shape):
    """With keys and values kept, for images and clips; activation checkpointing changes nothing."""
    if kind == "qwen2_5_vl" and len(shape) == 4:
        pytest.skip("the library's generation counts a clip's time by its own rate")
    pixels, text = media(shape), "Describe it."
    model, words = whole_model(folders[kind]), AutoTokenizer.from_pretrained(folders[kind])
    inputs = as_inputs(folders[kind], pixels, text)
    ends = words.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    made = model.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=ends, pad_token_id=ends[1])
    expected = words.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    for checkpointing in (False, True):
        critic = VlmCritic(folders[kind], dtype="float64", checkpointing=checkpointing)
        assert critic.write(pixels[None], [(0, text)], limit=12) == [expected]
        assert critic._whole.training == checkpointing
    assert len(expected) > 2


def test_the_score_is_the_mean_log_likelihood_of_the_answers_tokens(folders):
    """Against one forward of the library's model on the whole turn with the answer behind it."""
    folder = folders["qwen2_5_vl"]
    scores = reward_of(folder, eight_bit=True)(media(), PROMPTS)
    model, words = whole_model(folder), AutoTokenizer.from_pretrained(folder)

    def likelihood(row, text, answer):
        inputs = as_inputs(folder, media()[row], text)
        end = words(answer, return_tensors="pt").input_ids
        ids = torch.cat([inputs["input_ids"], end], 1)
        kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(end)], 1)
        given = {**inputs, "input_ids": ids, "mm_token_type_ids": kinds, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            logits = model(**given).logits[0, -end.shape[1] - 1 : -1]
        return logits.log_softmax(-1).gather(1, end[0][:, None]).mean()

    whole = likelihood(0, "Is it a cat?", "Yes, a cat."), likelihood(1, "Is it a ring?", "Yes, a ring.")
    sharp = likelihood(0, "Is it blurred?", "No.")
    torch.testing.assert_close(scores.parts["whole"], torch.stack(whole), rtol=0, atol=1e-6)
    assert scores.parts["sharp"][0] == pytest.approx(sharp.item(), abs=1e-6)
    assert torch.isnan(scores.parts["aspect/quality"]).tolist() == [False, True]
    expected = [(3 * whole[0] + sharp) / 4, whole[1]]
    torch.testing.assert_close(scores.total, torch.stack(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(scores.parts["eight_bit"], scores.total, rtol=0, atol=1e-3)


def test_every_token_has_a_gradient_at_the_pixels_from_one_vision_pass(folders, monkeypatch):
    """Central differences in fp64; two questions look once."""
    tiny_vlm.exact_norms(monkeypatch)
    reward = reward_of(folders["qwen2_vl"])
    assert isinstance(reward, Reward)
    assert isinstance(reward, Preparing)
    seen = []
    see = type(reward._critic._reader).see
    monkeypatch.setattr(type(reward._critic._reader), "see", lambda *a, **k: seen.append(1) or see(*a, **k))
    pixels = (media() * 0.8 + 0.1).requires_grad_()
    total = reward(pixels, PROMPTS).total
    assert len(seen) == 1
    (gradient,) = torch.autograd.grad(total[0], pixels)
    assert gradient[1].abs().sum() == 0 < gradient[0].abs().sum()
    measured, expected = tiny_vlm.slope(reward, pixels, PROMPTS, 0, gradient)
    assert measured == pytest.approx(expected, rel=1e-3)


def test_without_an_answer_the_reference_gives_one_that_is_written_once(folders, tmp_path, monkeypatch, caplog):
    """From bytes, a file or an opened image alike; kept in memory and on disk; a damaged file is written again."""
    folder, cache = folders["qwen2_vl"], tmp_path / "cache"
    real = png(media()[0])
    (tmp_path / "real.png").write_bytes(real)
    asked = [ASKED[1], {"text": "What is it?", "name": "what", "answer": None}]

    def prompt(reference):
        return Prompt.from_text("a cat", questions=asked, image=reference)

    calls = []
    write = VlmCritic.write
    monkeypatch.setattr(VlmCritic, "write", lambda *a, **k: calls.append(a[2]) or write(*a, **k))
    first = reward_of(folder, cache=str(cache), limit=6)
    first.prepare([prompt({"bytes": real, "path": None})])
    assert calls == [[(0, "What is it?")]]
    scores = first(media(seed=2)[:1], [prompt(str(tmp_path / "real.png"))])
    expected = write(first._critic, media()[:1].float(), [(0, "What is it?")], limit=6)
    given = [asked[0], {**asked[1], "answer": expected[0]}]
    direct = reward_of(folder)(media(seed=2)[:1], [Prompt.from_text("a cat", questions=given)])
    assert torch.equal(scores.total, direct.total)
    again = reward_of(folder, cache=str(cache), limit=6)
    assert torch.equal(again(media(seed=2)[:1], [prompt(real)]).total, scores.total)
    assert len(calls) == 1
    (file,) = cache.rglob("*.json")
    assert json.loads(file.read_text())["answer"] == expected[0]
    file.write_text('{"answer": 3')
    reward_of(folder, cache=str(cache), limit=6).prepare([prompt(real)])
    assert "is damaged" in caplog.text
    reward_of(folder, cache=str(cache), limit=7).prepare([prompt(real)])
    reward_of(folders["qwen3_vl"], cache=str(cache), limit=6).prepare([prompt(real)])
    reward_of(folder, limit=6).prepare([prompt(Image.open(io.BytesIO(real)))])
    assert len(calls) == 5
    assert len(list(cache.rglob("*.json"))) == 3
    again.prepare([prompt(real), prompt(png(media(seed=3)[0]))])  # the second medium is another one
    assert len(calls) == 6


def test_a_reference_clip_is_brought_to_the_critics_rate(folders, monkeypatch):
    frames = (media((8, 16, 16, 3)) * 255).byte().numpy()
    seen = []
    write = VlmCritic.write
    monkeypatch.setattr(VlmCritic, "write", lambda *a, **k: seen.append(a[1]) or write(*a, **k))
    clip = Prompt.from_text("a cat", questions=["What moves?"], real=encode_clip(frames, 8.0))
    options = {"modality": "video", "reference": "real", "limit": 4}
    reward_of(folders["qwen2_vl"], rate=4.0, **options).prepare([clip])
    reward_of(folders["qwen2_vl"], rate=8.0, reference_frames=2, **options).prepare([clip])
    assert [tuple(pixels.shape[:2]) for pixels in seen] == [(1, 4), (1, 2)]
    assert torch.equal(seen[0][0, 1], torch.from_numpy(frames[2]).permute(2, 0, 1) / 255)
    clips, given = media((1, 7, 3, 16, 16)), [Prompt.from_text("a cat", questions=ASKED)]
    fewer = reward_of(folders["qwen2_vl"], modality="video", frames=3)(clips, given).total
    assert torch.equal(fewer, reward_of(folders["qwen2_vl"], modality="video")(clips[:, [0, 3, 6]], given).total)


def test_what_lacks_an_answer_is_named(folders):
    reward = reward_of(folders["qwen2_vl"])
    with pytest.raises(DataError, match=r"prompt 'a dog', question 'Is it\?' has no answer, and .* column image"):
        reward(media()[:1], [Prompt.from_text("a dog", questions=[ASKED[0], "Is it?"])])
    with pytest.raises(DataError, match=r"prompt 'a dog', column image: .* cannot be decoded"):
        reward.prepare([Prompt.from_text("a dog", questions=["Is it?"], image=b"no image")])
    for keys, message in (({"limit": 0}, "limit is 0"), ({"frames": 4}, "frames is 4, with modality image")):
        with pytest.raises(ConfigError, match=f"explanation: {message}"):
            Explanation(folders["qwen2_vl"], **keys)
    assert isinstance(reward, ExampleMaker)
    assert torch.isfinite(reward(media()[:1], [reward.example(media()[0], PROMPTS[0])[1]]).total).all()

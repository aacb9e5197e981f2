"""Rewards on vision-language models: formulas, published checkpoints' keys, gradients, and what they refuse."""

from __future__ import annotations

import hashlib
import json

import pytest
import tiny_vlm
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from alignkit.errors import ConfigError, DataError, MissingFileError
from alignkit.protocols import Reward
from alignkit.records import Prompt
from rewards.hpsv3 import HPSv3
from rewards.models.templates import HPSV3, VIDEO_REWARD
from rewards.models.vlm import Readout, VlmCritic
from rewards.video_reward import TOKENS, VideoReward
from rewards.vqa_score import VqaScore
from rewards.yes_no import YesNo

PROMPTS = [Prompt.from_text(text) for text in ("a red cat", "two blue rings on a gray mat")]
MOMENTS = {"VQ_mean": 0.4, "VQ_std": 2.0, "MQ_mean": -0.1, "MQ_std": 0.5, "TA_mean": 0.2, "TA_std": 1.5}


def media(kind="image", frames=6):
    shape = (2, 3, 16, 16) if kind == "image" else (2, frames, 3, 16, 16)
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_vlm.save("qwen2_vl", tmp_path_factory.mktemp("base") / "qwen2_vl", bounds=(64, 256))


@pytest.fixture(scope="module")
def flat(folder):
    """The model's weights under the keys of transformers 4.45, as the library itself still stores them."""
    state = load_file(folder / "model.safetensors")
    assert {name.split(".")[0] for name in state} == {"model", "visual", "lm_head"}
    return state


def with_tokens(state, count):
    """Rows for new tokens at the end of the embeddings."""
    generator = torch.Generator().manual_seed(2)
    rows = {name: torch.randn(count, state[name].shape[1], generator=generator) for name in EMBEDDINGS}
    return {**state, **{name: torch.cat([state[name], rows[name]]) for name in EMBEDDINGS}}


EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def linear(name, wide, out, *, bias=True):
    generator = torch.Generator().manual_seed(wide + out)
    weight = {f"{name}.weight": torch.randn(out, wide, generator=generator) / wide**0.5}
    return weight | ({f"{name}.bias": torch.randn(out, generator=generator)} if bias else {})


@pytest.fixture(scope="module")
def hpsv3_state(flat):
    head = linear("rm_head.0", 16, 1024) | linear("rm_head.3", 1024, 16) | linear("rm_head.5", 16, 2)
    return with_tokens(flat, 1) | head


@pytest.fixture(scope="module")
def video_folder(flat, tmp_path_factory):
    """KwaiVGI/VideoReward's layout: the PEFT model's whole state dict in checkpoint-N/model.pth, model_config.json."""
    state = with_tokens(flat, 3) | linear("rm_head", 16, 1, bias=False)
    published, generator = {}, torch.Generator().manual_seed(4)
    for name, value in state.items():
        adapted = "_proj." in name and "visual" not in name
        layer, _, kind = name.rpartition(".")
        published[f"base_model.model.{layer}.base_layer.{kind}" if adapted else f"base_model.model.{name}"] = value
        if adapted and kind == "weight":
            for half, shape in (("A", (2, value.shape[1])), ("B", (value.shape[0], 2))):
                added = torch.randn(*shape, generator=generator) * 0.1
                published[f"base_model.model.{layer}.lora_{half}.default.weight"] = added
    root = tmp_path_factory.mktemp("video_reward")
    for step, content in (("9", state), ("11352", published)):  # the latest counts, by number
        (root / f"checkpoint-{step}").mkdir()
        torch.save(content, root / f"checkpoint-{step}" / "model.pth")
    data = {"fps": 2.0, "num_frames": None, "max_frame_pixels": 256, "prompt_template_type": "detailed_special"}
    config = {"data_config": data, "peft_lora_config": {"lora_alpha": 8, "lora_r": 2, "use_rslora": False}}
    (root / "model_config.json").write_text(json.dumps(config | {"inference_config": MOMENTS}))
    return root


@pytest.fixture(autouse=True)
def small_frames(monkeypatch):
    monkeypatch.setattr("rewards.video_reward.LEAST_PIXELS", 64)


@pytest.fixture
def short(monkeypatch):
    """Short texts, in which pixels matter more, and norms in the dtype of the model rather than in float32."""
    tiny_vlm.exact_norms(monkeypatch)
    monkeypatch.setattr("rewards.hpsv3.HPSV3", "{text_prompt} <|Reward|>")
    monkeypatch.setattr("rewards.video_reward.VIDEO_REWARD", f"{{text_prompt}} {' '.join(TOKENS)}")


def hpsv3(folder, state, tmp_path, **options):
    save_file(state, tmp_path / "HPSv3.safetensors")
    return HPSv3(str(tmp_path / "HPSv3.safetensors"), model=str(folder), dtype="float64", pixels=256, **options)


def video_reward(folder, weights, **options):
    options = {"rate": 2.0, "dtype": "float64", **options}
    return VideoReward(str(weights), model=str(folder), **options)


def build(name, folder, hpsv3_state, video_folder, tmp_path, **options):
    if name == "hpsv3":
        return hpsv3(folder, hpsv3_state, tmp_path, **options)
    if name == "video_reward":
        return video_reward(folder, video_folder, **options)
    return {"vqa_score": VqaScore, "yes_no": YesNo}[name](str(folder), dtype="float64", **options)


def states(folder, state, tokens, text, pixels):
    """Last hidden states [L, D] of one turn and its token ids, from the library's own layers with plain positions."""
    words = AutoTokenizer.from_pretrained(folder)
    words.add_tokens(tokens, special_tokens=True)
    config = tiny_vlm.config("qwen2_vl")
    config.text_config.vocab_size = len(words)
    names = {n: n.replace("visual.", "model.visual.") if n.startswith("visual") else n for n in state}
    names |= {n: n.replace("model.", "model.language_model.", 1) for n in state if n.startswith("model.")}
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64).eval()
    model.load_state_dict({names[n]: v.double() for n, v in state.items() if not n.startswith("rm_head")})
    kind = "image" if len(pixels) == 1 else "video"
    rows = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    rows = rows.expand(max(2, len(rows)), -1, -1, -1).unflatten(0, (-1, 2))
    rows = rows.unflatten(-1, (2, 2, 4)).unflatten(-4, (2, 2, 4)).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    grid = torch.tensor([[len(rows), 4, 4]])
    shown = f"<|vision_start|>{f'<|{kind}_pad|>' * (4 * len(rows))}<|vision_end|>"
    turn = f"<|im_start|>system\nBe fair.<|im_end|>\n<|im_start|>user\n{shown}{text}<|im_end|>\n"
    ids = words(f"{turn}<|im_start|>assistant\n", return_tensors="pt").input_ids
    given = {"pixel_values" + "_videos" * (kind == "video"): rows.flatten(5).flatten(0, 4), f"{kind}_grid_thw": grid}
    plain = torch.arange(ids.shape[1]).expand(3, 1, -1)
    with torch.no_grad():
        output = model.model(input_ids=ids, position_ids=plain, attention_mask=torch.ones_like(ids), **given)
    return output.last_hidden_state[0], words.convert_ids_to_tokens(ids[0])


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def test_templates_are_the_published_ones():
    """SHA-256 of the texts in hpsv3 1.0.0 and in VideoAlign's prompt_template.py (detailed_special)."""
    digests = [hashlib.sha256(text.encode()).hexdigest()[:16] for text in (HPSV3, VIDEO_REWARD)]
    assert digests == ["f6ee57479d4e9eee", "fdb6309bac618dd0"]


def test_vqa_score_is_the_probability_of_yes(folder):
    scores = VqaScore(str(folder), dtype="float64", eight_bit=True)(media(), PROMPTS)
    critic = VlmCritic(str(folder), dtype="float64")
    for row, prompt in enumerate(PROMPTS):
        question = f'Does this figure show "{prompt.text}"? Please answer Yes or No.'
        expected = critic.answers(media()[row : row + 1], [question], ["Yes"])[0, 0].exp()
        assert abs(scores.total[row] - expected) < 1e-12
    assert 0 < (scores.parts["eight_bit"] - scores.total).abs().max() < 1e-3
    several = VqaScore(str(folder), dtype="float64", answer=("Yes", "yes"))(media(), PROMPTS).total
    assert (several > scores.total).all()


def test_yes_no_is_the_weighted_mean_and_its_twins_cancel_a_leaning(folder):
    asked = [
        {"text": "Is it {prompt}?", "weight": 3, "name": "whole"},
        {"text": "Is it sharp?", "negated": "Is it blurred?"},
    ]
    scores = YesNo(str(folder), dtype="float64", questions=asked, eight_bit=True)(media(), PROMPTS)
    margins = VlmCritic(str(folder), dtype="float64").margins
    whole = margins(media(), [[f"Is it {prompt.text}?"] for prompt in PROMPTS])[:, 0].sigmoid().log()
    sharp, blurred = margins(media(), ["Is it sharp?", "Is it blurred?"]).unbind(1)
    twins = ((sharp - blurred) / 2).sigmoid().log()
    assert list(scores.parts) == ["whole", "question_2", "eight_bit"]
    torch.testing.assert_close(scores.parts["whole"], whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.parts["question_2"], twins, rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.total, (3 * whole + twins) / 4, rtol=0, atol=1e-12)
    # a read-out that counts more words as yes leans to yes for every question: single questions move, twins hardly
    same = Readout(("Yes", "yes"), ("No",))
    leaning = YesNo(str(folder), dtype="float64", questions=asked, readout=same)(media(), PROMPTS)
    moved = [(leaning.parts[name] - scores.parts[name]).abs().min() for name in ("whole", "question_2")]
    assert moved[0] > 0.1 > 10 * moved[1]


def test_an_aspect_is_a_part_and_a_question_may_have_its_opposite_alone(folder):
    """The opposite alone turns the sign; an aspect is the weighted mean of its questions, NaN where it has none."""
    own = [
        {"text": "Is there a ring?", "name": "ring", "aspect": "alignment", "weight": 3.0, "negated": ""},
        {"text": "", "name": "cross", "aspect": "alignment", "weight": 1.0, "negated": "Is there a cross?"},
        {"text": "Is it sharp?", "name": "sharp", "aspect": "quality", "weight": 2.0, "negated": ""},
    ]
    prompts = [Prompt.from_text("a ring", questions=own), Prompt.from_text("a ring", questions=own[:2])]
    scores = YesNo(str(folder), dtype="float64")(media(), prompts)
    critic = VlmCritic(str(folder), dtype="float64")
    ring, cross, sharp = critic.margins(media(), ["Is there a ring?", "Is there a cross?", "Is it sharp?"]).unbind(1)
    ring, cross, sharp = ring.sigmoid().log(), (-cross).sigmoid().log(), sharp.sigmoid().log()
    assert list(scores.parts) == ["ring", "cross", "sharp", "aspect/alignment", "aspect/quality"]
    torch.testing.assert_close(scores.parts["cross"], cross, rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.parts["aspect/alignment"], (3 * ring + cross) / 4, rtol=0, atol=1e-12)
    assert torch.isnan(scores.parts["aspect/quality"]).tolist() == [False, True]
    assert abs(scores.parts["aspect/quality"][0] - sharp[0]) < 1e-12
    assert abs(scores.total[0] - (3 * ring + cross + 2 * sharp)[0] / 6) < 1e-12
    with pytest.raises(ConfigError, match="at least text or negated is not empty"):
        YesNo(str(folder), questions=[{"text": "", "name": "x"}])


def test_a_prompt_brings_its_own_questions(folder):
    own = [{"text": "Is there a ring?", "name": "ring", "weight": 2}, "Is it blue?"]
    prompts = [PROMPTS[0], Prompt.from_text("a ring", questions=own)]
    scores = YesNo(str(folder), dtype="float64")(media(), prompts)
    alone = YesNo(str(folder), dtype="float64", questions=own)(media()[1:], prompts[1:])
    assert abs(scores.total[1] - alone.total[0]) < 1e-12
    assert torch.isnan(scores.parts["ring"]).tolist() == [True, False]
    assert torch.isfinite(scores.total).all()
    with pytest.raises(DataError, match="its questions are 'Is it'"):
        YesNo(str(folder))(media()[:1], [Prompt.from_text("x", questions="Is it")])
    for wrong in (
        [{"text": "a", "wieght": 1}],
        [{"text": "a", "weight": 0}],
        [{"text": "a", "name": "question_2"}, "b"],
    ):
        with pytest.raises(ConfigError, match="question"):
            YesNo(str(folder), questions=wrong)


def test_hpsv3_reads_its_token(folder, hpsv3_state, tmp_path):
    """Against the library's layers and the head written out, one picture at a time; other keys are refused."""
    scores = hpsv3(folder, hpsv3_state, tmp_path, eight_bit=True)(media(), PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        text = HPSV3.format(text_prompt=prompt.text)
        hidden, names = states(folder, hpsv3_state, ["<|Reward|>"], text, media()[row : row + 1])
        value = hidden[names.index("<|Reward|>")]
        for number, relu in ((0, True), (3, True), (5, False)):
            value = hpsv3_state[f"rm_head.{number}.weight"].double() @ value + hpsv3_state[f"rm_head.{number}.bias"]
            value = value.clamp(min=0) if relu else value
        assert abs(scores.total[row] - value[0]) < 1e-5  # the library's norms have float32
        assert abs(scores.parts["log_sigma"][row] - value[1]) < 1e-5
    assert torch.equal(scores.total, scores.parts["mu"])
    assert 0 < (scores.parts["eight_bit"] - scores.total).abs().max() < 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("rm_head.3.bias"), r"rm_head\.\*: .*1 missing \(3\.bias\)"),
        (lambda s: s.pop("visual.merger.ln_q.weight"), r"1 missing \(visual\.merger\.ln_q\.weight\)"),
        (lambda s: s.update({"rm_head.1.weight": torch.ones(2)}), r"rm_head\.\*: .*1 unexpected \(1\.weight\)"),
        (lambda s: s.update({"model.layers.2.x": torch.ones(2)}), r"1 unexpected \(language_model\.layers\.2\.x\)"),
        (lambda s: s.update({"model.norm.weight": torch.ones(2)}), r"1 of another shape"),
        (lambda s: s.pop("model.embed_tokens.weight"), "is it a whole"),
        (lambda s: s.update({n: s[n][:-1] for n in EMBEDDINGS}), "more tokens than the checkpoint"),
    ],
)
def test_other_checkpoints_are_refused(folder, hpsv3_state, tmp_path, change, words):
    state = dict(hpsv3_state)
    change(state)
    with pytest.raises(DataError, match=words):
        hpsv3(folder, {name: value.contiguous() for name, value in state.items()}, tmp_path)


def test_video_reward_reads_three_tokens_of_adapted_weights(folder, video_folder):
    """Against the library's layers on weights merged here: W + 8 / 2 * B A, plain positions, z-scores."""
    scores = video_reward(folder, video_folder)(media("video"), PROMPTS)
    published = torch.load(video_folder / "checkpoint-11352" / "model.pth", weights_only=True)
    state = {n.removeprefix("base_model.model.").replace("base_layer.", ""): v for n, v in published.items()}
    for name in [name for name in state if "lora_A" in name]:
        up = state.pop(name.replace("lora_A", "lora_B"))
        state[name.replace("lora_A.default.", "")] += 4 * up @ state.pop(name)
    for row, prompt in enumerate(PROMPTS):
        text = VIDEO_REWARD.format(text_prompt=prompt.text)
        hidden, names = states(folder, state, list(TOKENS), text, media("video")[row])
        raw = [(hidden[names.index(token)] @ state["rm_head.weight"][0].double()) for token in TOKENS]
        z = [(raw[i] - MOMENTS[f"{p}_mean"]) / MOMENTS[f"{p}_std"] for i, p in enumerate(("VQ", "MQ", "TA"))]
        assert max(abs(scores.parts[p][row] - z[i]) for i, p in enumerate(("VQ", "MQ", "TA"))) < 1e-5
        assert abs(scores.total[row] - sum(z)) < 1e-5
    merged = video_folder.parent / "merged"
    merged.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, merged / "model.safetensors")
    (merged / "model_config.json").write_text((video_folder / "model_config.json").read_text())
    again = video_reward(folder, merged)(media("video"), PROMPTS)
    torch.testing.assert_close(again.total, scores.total, rtol=0, atol=1e-6)


def test_video_reward_looks_at_as_many_frames_as_its_reader_counts(folder, video_folder):
    """Rate 16, 2 frames a second: 33 / 16 * 2 = 4.1 -> 4; 81 -> 10.1 -> 10; never under 4, nor more than there are."""
    reward = video_reward(folder, video_folder, rate=16.0)
    assert [reward._count(frames) for frames in (33, 81, 8, 3, 2)] == [4, 10, 4, 2, 2]
    clips = media("video", frames=33)
    looked_at = clips[:, [0, 11, 21, 32]]
    dense = video_reward(folder, video_folder, fps=16.0, rate=16.0)(looked_at, PROMPTS)
    torch.testing.assert_close(reward(clips, PROMPTS).total, dense.total, rtol=0, atol=1e-9)
    six = video_reward(folder, video_folder, frames=6, normalise=False)
    assert [six._count(frames) for frames in (81, 5)] == [6, 5]
    with pytest.raises(ConfigError, match="not both"):
        video_reward(folder, video_folder, fps=1.0, frames=4)


def test_folders_of_video_reward_that_cannot_be_read(folder, video_folder, tmp_path):
    with pytest.raises(MissingFileError, match=r"no '.*model_config\.json'.*hf download KwaiVGI/VideoReward"):
        video_reward(folder, tmp_path)
    config = json.loads((video_folder / "model_config.json").read_text())
    (tmp_path / "model_config.json").write_text(json.dumps(config))
    with pytest.raises(MissingFileError, match=r"no model\.pth or model\.safetensors"):
        video_reward(folder, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(MissingFileError, match="adapter is apart"):
        video_reward(folder, tmp_path)
    torch.save({"base_model.model.a.lora_A.default.weight": torch.ones(2, 2)}, tmp_path / "model.pth")
    with pytest.raises(DataError, match=r"lacks the other half of the adapter .* download it again"):
        video_reward(folder, tmp_path)
    (tmp_path / "model_config.json").write_text(json.dumps({"data_config": {"prompt_template_type": "simple"}}))
    with pytest.raises(DataError, match="template 'simple'"):
        video_reward(folder, tmp_path)
    with pytest.raises(MissingFileError, match="hf download MizzenAI/HPSv3"):
        HPSv3(str(tmp_path / "none.safetensors"), model=str(folder))


@pytest.mark.parametrize("name", ["vqa_score", "yes_no", "hpsv3", "video_reward"])
def test_they_are_differentiable_rewards(name, folder, hpsv3_state, video_folder, tmp_path, short):
    """Central differences in fp64 to 1e-3 (the library rotates vision in float32); rows know nothing of each other."""
    reward = build(name, folder, hpsv3_state, video_folder, tmp_path)
    assert isinstance(reward, Reward)
    pixels = (media(reward.modality) * 0.8 + 0.1).requires_grad_()
    total = reward(pixels, PROMPTS).total
    assert total.dtype == torch.float64
    low, high = reward.native_range
    assert ((low <= total) & (total <= high)).all()
    (gradient,) = torch.autograd.grad(total[1], pixels)
    assert gradient[0].abs().sum() == 0 < gradient[1].abs().sum()
    measured, expected = tiny_vlm.slope(reward, pixels, PROMPTS, 1, gradient)
    assert measured == pytest.approx(expected, rel=1e-3)
    alone = torch.cat([reward(pixels[i : i + 1], PROMPTS[i : i + 1]).total for i in range(2)])
    torch.testing.assert_close(alone, total, rtol=0, atol=1e-9)
    assert torch.equal(reward(pixels, PROMPTS).total, total)
    assert (reward(pixels, PROMPTS[::-1]).total - total).abs().max() > 1e-6
    saving = build(name, folder, hpsv3_state, video_folder, tmp_path, checkpointing=True)(pixels, PROMPTS).total
    (again,) = torch.autograd.grad(saving[1], pixels)
    assert torch.equal(saving, total)
    assert (again - gradient).abs().max() <= 1e-12


def test_a_prompt_cannot_hold_the_reward_token(folder, hpsv3_state, tmp_path):
    with pytest.raises(DataError, match="row 0: each reward token must be there once"):
        hpsv3(folder, hpsv3_state, tmp_path)(media()[:1], [Prompt.from_text("good <|Reward|>")])


def test_modalities_are_checked(folder):
    clips = VqaScore(str(folder), modality="video", dtype="float64")
    assert clips(media("video"), PROMPTS).total.shape == (2,)
    with pytest.raises(DataError, match="vqa_score: media are"):
        clips(media(), PROMPTS)
    with pytest.raises(ConfigError, match="modality 'audio'"):
        YesNo(str(folder), modality="audio")


def test_texts_are_not_taken_apart(folder):
    with pytest.raises(ConfigError, match=r"vqa_score: answer is 'Yes'; give a list, \['Yes'\]"):
        VqaScore(str(folder), answer="Yes")
    with pytest.raises(ConfigError, match="yes_no: questions is 'Is it"):
        YesNo(str(folder), questions="Is it?")


@pytest.mark.parametrize("make", [VqaScore, YesNo])
def test_half_precision_media_score_in_float32(make, folder):
    reward, pixels = make(str(folder)), media().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert reward(pixels, PROMPTS).total.dtype == torch.float32
    assert torch.equal(reward(pixels, PROMPTS).total, reward(pixels.float(), PROMPTS).total)


def test_heads_read_in_float32_in_autocast(folder, hpsv3_state, tmp_path):
    reward = hpsv3(folder, hpsv3_state, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert reward(media().float(), PROMPTS).total.dtype == torch.float64

"""The critic equals the library's own processor and forward, shares its vision pass exactly, and differentiates."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_vlm
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from alignkit.errors import ConfigError, DataError, MissingFileError
from rewards.models.vlm import Readout, VlmCritic

QUESTIONS = ["Is it red?", "Does the picture show a cat on a very long mat?"]
RATE = 4.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("vlm")
    return {kind: str(tiny_vlm.save(kind, root / kind)) for kind in tiny_vlm.KINDS}


@pytest.fixture(params=tiny_vlm.KINDS)
def folder(request, folders):
    return folders[request.param]


def critic(folder, **options):
    return VlmCritic(folder, dtype="float64", rate=RATE, **options)


def media(kind="image", count=2, frames=5, seed=0):
    shape = (count, 3, 16, 24) if kind == "image" else (count, frames, 3, 16, 8)
    pixels = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return pixels.mul(255).round().div(255)


def log_odds(logits, words):
    """Log-sum-exp over the single-token spellings of yes, less that of no."""
    yes, no = ([words.convert_tokens_to_ids(word) for word in pair] for pair in (("Yes", "yes"), ("No", "no")))
    return logits[..., yes].logsumexp(-1) - logits[..., no].logsumexp(-1)


def by_the_library(folder, kind, pixels, question, answer=""):
    """Logits [L, words] of the whole turn: one medium, one text, the library's processor, positions and forward."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    words = AutoTokenizer.from_pretrained(folder)
    stored = json.loads((Path(folder) / "preprocessor_config.json").read_text())
    cut = Qwen2VLImageProcessorPil(**stored)
    frames = [Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy()) for frame in pixels]
    shown = f"<|vision_start|><|{kind}_pad|><|vision_end|>"
    text = f"<|im_start|>system\nBe fair.<|im_end|>\n<|im_start|>user\n{shown}{question}<|im_end|>\n"
    text += f"<|im_start|>assistant\n{answer}"
    given = {}
    if kind == "image":
        values = cut(frames, return_tensors="pt")
        given |= {"pixel_values": values["pixel_values"].double(), "image_grid_thw": values["image_grid_thw"]}
        count = int(values["image_grid_thw"].prod()) // 4
        text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
    else:
        # each pair of frames cut as two pictures, whose patches hold them twice: take one half of each
        frames += frames[-1:] * (len(frames) % 2)
        each = [cut([frame], return_tensors="pt") for frame in frames]
        halves = [values["pixel_values"].double().unflatten(1, (3, 2, -1))[:, :, 0] for values in each]
        pairs = [torch.stack(halves[i : i + 2], dim=2).flatten(1) for i in range(0, len(frames), 2)]
        grid = each[0]["image_grid_thw"].clone()
        grid[0, 0] = len(pairs)
        given |= {"pixel_values_videos": torch.cat(pairs), "video_grid_thw": grid}
        count = len(pairs[0]) // 4
        pads = "<|video_pad|>" * count
        if "qwen3" in folder:
            times = np.minimum(np.arange(len(frames)), len(pixels) - 1).reshape(-1, 2).mean(1) / RATE
            steps = "".join(f"<{time:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for time in times)
            text = text.replace(shown, steps)
        else:
            text = text.replace("<|video_pad|>", pads * len(pairs))
        if "qwen2_5" in folder:
            given["second_per_grid_ts"] = torch.tensor([2 / RATE])
    ids = words(text, return_tensors="pt").input_ids
    names = words.convert_ids_to_tokens(ids[0])
    kinds = torch.tensor([[{"<|image_pad|>": 1, "<|video_pad|>": 2}.get(name, 0) for name in names]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **given).logits[0]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_answers_are_the_librarys(folder, kind):
    """At a size that needs no resize, so that nothing is rounded: equal to 1e-6 (its processor has float32)."""
    pixels, words = media(kind), AutoTokenizer.from_pretrained(folder)
    asked = critic(folder)
    given = asked.ask(pixels, QUESTIONS)
    said = asked.answers(pixels, QUESTIONS, ["a red cat", "Yes"])
    for row in range(2):
        frames = pixels[row : row + 1] if kind == "image" else pixels[row]
        for column, (question, answer) in enumerate(zip(QUESTIONS, ["a red cat", "Yes"], strict=True)):
            logits = by_the_library(folder, kind, frames, question, answer)
            ids = words(answer).input_ids
            first = len(logits) - len(ids) - 1
            expected = torch.nn.functional.logsigmoid(log_odds(logits[first], words))
            assert abs(given[row, column] - expected) < 1e-6
            forced = logits[first:-1].log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()
            assert abs(said[row, column] - forced) < 1e-5
    mean = asked.answers(pixels, QUESTIONS, ["a red cat", "Yes"], reduce="mean")
    torch.testing.assert_close(mean * torch.tensor([len(words("a red cat").input_ids), 1]), said)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_shared_vision_pass_has_the_gradient_of_separate_ones(folder, kind, monkeypatch):
    tiny_vlm.exact_norms(monkeypatch)
    pixels, asked = media(kind).requires_grad_(), critic(folder)
    weights = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    together = asked.ask(pixels, QUESTIONS)
    (shared,) = torch.autograd.grad((together * weights).sum(), pixels)
    apart = torch.zeros_like(pixels)
    for row in range(2):
        for column, question in enumerate(QUESTIONS):
            alone = asked.ask(pixels[row : row + 1], [question])
            assert abs(alone - together[row, column]) <= 1e-10  # nor does anything depend on the batch
            apart += torch.autograd.grad(alone[0, 0] * weights[row, column], pixels)[0]
    assert (shared - apart).abs().max() <= 1e-10
    assert shared.abs().max() > 1e-4
    (own,) = torch.autograd.grad(asked.ask(pixels, QUESTIONS)[1, 0], pixels)
    assert own[0].abs().sum() == 0 < own[1].abs().sum()


@pytest.mark.parametrize("kind", ["image", "video"])
def test_pixel_gradients_are_central_differences(folder, kind, monkeypatch):
    """To 5e-4, a step of 1e-3 and vision rotated in float32 by the library allow no less. With a resize."""
    tiny_vlm.exact_norms(monkeypatch)
    torch.manual_seed(0)
    pixels = (media(kind, frames=4)[..., :13, :] * 0.8 + 0.1).requires_grad_()
    asked = critic(folder)
    for value in (
        lambda x: asked.ask(x, QUESTIONS)[0, 1] + asked.ask(x, QUESTIONS)[1, 0],
        lambda x: asked.answers(x, QUESTIONS, ["a dog", "it is"]).sum(),
    ):
        (gradient,) = torch.autograd.grad(value(pixels), pixels)
        step = 1e-3 * gradient.sign()
        with torch.no_grad():
            difference = (value(pixels + step) - value(pixels - step)) / 2e-3
        assert difference.item() == pytest.approx(gradient.abs().sum().item(), rel=5e-4)


def test_checkpointing_changes_nothing(folder):
    pixels = media("video").requires_grad_()
    plain, saving = (critic(folder, checkpointing=on).ask(pixels, QUESTIONS) for on in (False, True))
    assert torch.equal(plain, saving)
    gradients = [torch.autograd.grad(total.sum(), pixels)[0] for total in (plain, saving)]
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-12


def test_checkpointing_recomputes_every_layer_and_only_then(folder):
    asked, calls, pixels = critic(folder, checkpointing=True), [], media()
    for layer in [*asked._reader.network.visual.blocks, *asked._reader.network.language_model.layers]:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    assert not asked.ask(pixels, QUESTIONS).requires_grad
    assert len(calls) == 4
    asked.ask(pixels.requires_grad_(), QUESTIONS).sum().backward()
    assert len(calls) == 12


def test_each_medium_may_have_its_own_questions(folder):
    pixels, asked = media(), critic(folder)
    both = asked.ask(pixels, QUESTIONS)
    own = asked.ask(pixels, [QUESTIONS, QUESTIONS[::-1]])
    torch.testing.assert_close(own, torch.stack([both[0], both[1].flip(0)]), rtol=0, atol=1e-10)
    ragged = asked.margins_of(pixels, [(1, QUESTIONS[0]), (0, QUESTIONS[1]), (1, QUESTIONS[1])])
    expected = asked.margins(pixels, QUESTIONS)[[1, 0, 1], [0, 1, 1]]
    torch.testing.assert_close(ragged, expected, rtol=0, atol=1e-10)


def test_without_negative_words_it_is_the_probability_over_all_words(folder):
    pixels, words = media(), AutoTokenizer.from_pretrained(folder)
    given = critic(folder, readout=Readout(("Yes",), ())).ask(pixels, QUESTIONS[:1])
    expected = critic(folder).answers(pixels, QUESTIONS[:1], ["Yes"])
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)
    with pytest.raises(ConfigError, match="no spelling is a single token"):
        Readout(("Certainly",)).ids(words)
    with pytest.raises(ConfigError, match="on both sides"):
        Readout(("Yes",), ("Yes",)).ids(words)


def test_eight_bits_and_half_precision_stay_near(folder):
    pixels = torch.rand(2, 3, 21, 30, generator=torch.Generator().manual_seed(3))
    exact = critic(folder).margins(pixels.double(), QUESTIONS)
    stored = critic(folder).margins(pixels.double().requires_grad_(), QUESTIONS, eight_bit=True)
    assert not stored.requires_grad
    assert 0 < (stored - exact).abs().max() < 2e-2
    half = VlmCritic(folder, dtype="bfloat16", rate=RATE).margins(pixels, QUESTIONS)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.1


def test_a_folder_may_lack_a_template_or_keep_it_apart(tmp_path):
    bare = tiny_vlm.save("qwen2_vl", tmp_path / "bare", template=False)
    plain = critic(str(bare)).ask(media(), QUESTIONS)
    wordy = tiny_vlm.TEMPLATE.replace("<|im_start|>system\nBe fair.<|im_end|>\n", "")
    (bare / "chat_template.json").write_text(json.dumps({"chat_template": wordy}))
    assert torch.equal(plain, critic(str(bare)).ask(media(), QUESTIONS))
    (bare / "chat_template.json").write_text(json.dumps({"chat_template": tiny_vlm.TEMPLATE}))
    assert not torch.equal(plain, critic(str(bare)).ask(media(), QUESTIONS))


def test_time_matters_where_the_family_counts_it(folders):
    clips = media("video")
    for kind, counts in (("qwen2_vl", False), ("qwen2_5_vl", True), ("qwen3_vl", True)):
        slow, fast = (VlmCritic(folders[kind], rate=rate).ask(clips, QUESTIONS[:1]) for rate in (1.0, 8.0))
        assert torch.equal(slow, fast) != counts, kind


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c: c.ask(media(), "Is it?"), "give a list of texts"),
        (lambda c: c.ask(media(), []), "give a list of texts"),
        (lambda c: c.ask(media(), [["a"]]), "2 media with 1 lists"),
        (lambda c: c.ask(media(), [["a"], ["a", "b"]]), "different numbers of questions"),
        (lambda c: c.ask(media(), ["<|image_pad|>?"]), "not exactly one"),
        (lambda c: c.ask(media(), ["a", " "]), "critic: a question of ['a', ' ', 'a', ' '] is empty"),
        (lambda c: c.answers(media(), [""], ["a"]), "is empty"),
        (lambda c: c.ask(media(), [[], []]), "is empty"),
        (lambda c: c.ask(media(), [["a"], "b"]), "2 media with 2 lists"),
        (lambda c: c.answers(media(), ["a"], [""]), "an answer is empty"),
        (lambda c: c.answers(media(), ["a"], ["b", "c"]), "differ in number"),
    ],
)
def test_questions_that_cannot_be_asked(folders, call, words):
    with pytest.raises(DataError, match=re.escape(words)):
        call(critic(folders["qwen2_vl"]))


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        (lambda x: x * 255, "divide by 255"),
        (lambda x: x * 2 - 1, "x / 2 + 0.5"),
        (lambda x: x.index_fill(0, torch.tensor(1), torch.nan), "a pixel of row 1 is NaN"),
        (lambda x: x.mul(255).byte(), "media are torch.uint8"),
        (lambda x: x.movedim(1, -1), "channels come last"),
        (lambda x: x[0], "expected [B, 3, H, W]"),
        (lambda x: x[:, None], "clips of 1 frames"),
        (lambda x: x[:, None][:, :0], "clips of 0 frames"),
    ],
)
def test_media_that_cannot_be_asked_about(folders, spoilt, words):
    asked = VlmCritic(folders["qwen2_vl"])
    for call in (asked.ask, asked.margins, lambda media, questions: asked.answers(media, questions, ["Yes"])):
        with pytest.raises(DataError, match=f"critic: .*{re.escape(words)}"):
            call(spoilt(media()), ["Is it?"])


@pytest.mark.parametrize("readout", [Readout(), Readout(("Yes",), ())])
def test_margins_are_float32_in_autocast_and_of_half_precision_media(folders, readout):
    asked = VlmCritic(folders["qwen2_vl"], readout=readout)
    pixels = media().bfloat16()
    exact = asked.margins(pixels.float(), QUESTIONS)
    assert torch.equal(asked.margins(pixels, QUESTIONS), exact)
    with torch.autocast("cpu", torch.bfloat16):
        margins, said = asked.margins(pixels, QUESTIONS), asked.answers(pixels, QUESTIONS, ["a cat", "No"])
    assert margins.dtype == said.dtype == torch.float32
    assert not torch.equal(margins.bfloat16().float(), margins)
    torch.testing.assert_close(margins, exact, rtol=0, atol=0.2)


def test_the_head_of_half_precision_is_promoted_once(folders):
    asked = VlmCritic(folders["qwen2_vl"], dtype="bfloat16", readout=Readout(("Yes",), ()))
    asked.ask(media(), QUESTIONS)
    kept = asked._all_words
    asked.answers(media(), QUESTIONS, ["Yes", "No"])
    assert asked._all_words is kept
    assert kept.dtype == torch.float32


def test_a_readout_may_come_from_a_config(folders):
    stored = {"positive": ["Yes", "yes"], "negative": ["No"]}
    given, wanted = (VlmCritic(folders["qwen2_vl"], readout=r) for r in (stored, Readout(("Yes", "yes"), ("No",))))
    assert torch.equal(given.margins(media(), QUESTIONS), wanted.margins(media(), QUESTIONS))
    with pytest.raises(ConfigError, match="readout: good is unknown"):
        VlmCritic(folders["qwen2_vl"], readout={"good": ["Yes"]})
    with pytest.raises(ConfigError, match=r"readout: positive is 'Yes'; give a list, \['Yes'\]"):
        VlmCritic(folders["qwen2_vl"], readout={"positive": "Yes"})


@pytest.mark.parametrize("is_tied", [False, True])
def test_folders_are_loaded_strictly(folders, tmp_path, is_tied):
    """A head that is tied to the words need not be stored; nothing else may be absent, and nothing left over."""
    folder = shutil.copytree(folders["qwen2_vl"], tmp_path / "folder")
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = is_tied
    (folder / "config.json").write_text(json.dumps(config))
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    if is_tied:
        VlmCritic(str(folder))
        del state["model.norm.weight"]
        save_file(state | {"other": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        DataError, match=r"critic: .*folder'.*1 unexpected \(other" if is_tied else r"1 missing \(lm_head"
    ):
        VlmCritic(str(folder))


def test_models_that_cannot_be_read(folders, clip_folder):
    for missing in ("/no/such/folder", "./nowhere", "alignkit/no/where"):
        with pytest.raises(MissingFileError, match=f"critic: '{missing}'"):
            VlmCritic(missing)
    with pytest.raises(ConfigError, match="is a clip; Qwen2-VL"):
        VlmCritic(str(clip_folder))
    with pytest.raises(ConfigError, match="dtype 'int8'"):
        VlmCritic(folders["qwen2_vl"], dtype="int8")
    with pytest.raises(ConfigError, match="frames per second"):
        VlmCritic(folders["qwen2_vl"], rate=0)


@pytest.fixture(scope="module")
def adapter(folders, tmp_path_factory):
    """A LoRA of PEFT with weights that change answers, on the last kind of model; its folder and the merged model's."""
    kind = tiny_vlm.KINDS[-1]
    model = AutoModelForImageTextToText.from_pretrained(folders[kind], dtype=torch.float64)
    tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    source = torch.Generator().manual_seed(0)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=source, dtype=weight.dtype)
    root = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(root / "lora")
    shutil.copytree(folders[kind], root / "merged")
    tuned.merge_and_unload().save_pretrained(root / "merged")
    return folders[kind], root / "lora", root / "merged"


def test_an_adapter_is_merged_into_the_critic(adapter):
    folder, lora, merged = adapter
    plain, tuned, expected = critic(folder), critic(folder, adapter=str(lora)), critic(str(merged))
    answers = [one.margins(media(), QUESTIONS) for one in (plain, tuned, expected)]
    torch.testing.assert_close(answers[1], answers[2])
    assert (answers[0] - answers[1]).abs().min() > 1e-6
    assert not any(weight.requires_grad for weight in tuned._whole.parameters())


def test_an_adapter_that_does_not_fit_is_refused(adapter, tmp_path):
    folder, lora, _ = adapter
    with pytest.raises(MissingFileError, match=r"no adapter_config\.json"):
        critic(folder, adapter=str(tmp_path))
    shutil.copytree(lora, tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    first, *others = stored
    save_file(
        {name: stored[name] for name in others} | {"odd": stored[first]},
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    with pytest.raises(DataError, match=r"1 missing .*1 unexpected \(odd\)"):
        critic(folder, adapter=str(tmp_path / "lora"))
    save_file(stored | {first: stored[first][:, :1].contiguous()}, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(DataError, match="1 of another shape"):
        critic(folder, adapter=str(tmp_path / "lora"))
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(MissingFileError, match="save the adapter with PEFT, as safetensors"):
        critic(folder, adapter=str(tmp_path / "lora"))
    (tmp_path / "lora" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"]})
    )
    save_file(stored, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="only a LoRA can be merged"):
        critic(folder, adapter=str(tmp_path / "lora"))
    for text, message in (("{", "no config of PEFT"), (json.dumps({"peft_type": "odd"}), "no config of PEFT")):
        (tmp_path / "lora" / "adapter_config.json").write_text(text)
        with pytest.raises(DataError, match=message):
            critic(folder, adapter=str(tmp_path / "lora"))
    elsewhere = {"peft_type": "LORA", "target_modules": ["odd"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(elsewhere))
    with pytest.raises(DataError, match="is for another model"):
        critic(folder, adapter=str(tmp_path / "lora"))

"""CLIP-FlanT5 against transformers' CLIPVisionModel and T5 with labels on PIL pictures, from the published keys."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from pictures import photograph, tensor
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration, T5Tokenizer

from alignkit.errors import DataError, MissingFileError
from alignkit.protocols import Reward
from alignkit.records import Prompt
from rewards.clip_flant5 import ClipFlanT5

TEXTS = ["a red circle", "two {blue} circles", "red"]
PROMPTS = [Prompt.from_text(text) for text in TEXTS]
WORDS = [
    "chat",
    "between",
    "curious",
    "user",
    "assistant.",
    "The",
    "USER:",
    "Does",
    "this",
    "figure",
    "Please",
    "answer",
]
SIZE, PATCH = 28, 7
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def tokenizer():
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    pieces += [(f"▁{word}", -1.0) for word in [*WORDS, "ASSISTANT:", "Yes", "No", "a", "red"]]
    letters = sorted(set("".join(TEXTS) + SYSTEM + '?"▁'))
    return T5Tokenizer(vocab=[*pieces, *((letter, -9.0) for letter in letters)], extra_ids=0)


@pytest.fixture(scope="module")
def networks(tokenizer):
    """Random CLIP, projector and T5; rows beyond the tokenizer's words pad the vocabulary as in google/flan-t5-*."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=SIZE,
                patch_size=PATCH,
            )
        )  # fmt: skip
        projector = torch.nn.Sequential(torch.nn.Linear(128, 48), torch.nn.GELU(), torch.nn.Linear(48, 48))
        t5 = T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tokenizer) + 5, d_model=48, d_kv=16, d_ff=64, num_layers=2, num_heads=3,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
            )
        )  # fmt: skip
        t5.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn_like(t5.shared.weight))  # Flan-T5's is not tied
        for part in (tower, projector):
            for weights in part.parameters():
                weights.data += 0.1 * torch.randn_like(weights)
    return [part.double().eval() for part in (tower, projector, t5)]


def published_state(networks):
    """Names as in zhiqiulin/clip-flant5-xl."""
    tower, projector, t5 = networks
    state = {f"vision_tower.vision_tower.vision_model.{key}": value for key, value in tower.state_dict().items()}
    state |= {f"mm_projector.{key}": value for key, value in projector.state_dict().items()}
    return state | t5.state_dict() | {"embed_tokens.weight": t5.shared.weight.detach()}


def store(folder, state, networks, tokenizer):
    """Two shards with their index, the config of the model and the tokenizer."""
    keys = sorted(state)
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": keys[i::2] for i in range(2)}
    for name, part in shards.items():
        torch.save({key: state[key].clone() for key in part}, folder / name)
    weight_map = {key: name for name, part in shards.items() for key in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    told = networks[2].config.to_dict() | {"model_type": "clip_t5", "mm_vision_select_layer": -2}
    told |= {"tie_word_embeddings": False, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (folder / "config.json").write_text(json.dumps(told))
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(networks, tokenizer, tmp_path_factory):
    return store(tmp_path_factory.mktemp("clip_flant5"), published_state(networks), networks, tokenizer)


@pytest.fixture(scope="module")
def exact(folder):
    return ClipFlanT5(folder, tokenizer=folder, dtype="float64")


def pictures(count=3, size=SIZE):
    media = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return media.mul(255).round().div(255)


def by_pil(picture):
    """LLaVA's expand2square with the mean colour, then CLIP's processor."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    width, height = picture.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    pixels = tensor(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]


def reference(networks, tokenizer, prepared, answer="Yes"):
    """One picture at a time: the published template cut at the picture, T5's own loss over the answer."""
    tower, projector, t5 = networks
    scores = []
    for pixels, text in zip(prepared, TEXTS, strict=True):
        asked = f'{SYSTEM} USER: <image>\nDoes this figure show "{text}"? Please answer yes or no. ASSISTANT: '
        before, after = (torch.tensor(tokenizer(part).input_ids) for part in asked.split("<image>"))
        labels = torch.tensor([tokenizer(answer).input_ids])
        with torch.no_grad():
            states = tower(pixels[None], output_hidden_states=True).hidden_states[-2][0, 1:]
            embedded = torch.cat([t5.shared(before), projector(states), t5.shared(after)])[None]
            logits = t5(inputs_embeds=embedded, labels=labels).logits[..., : len(tokenizer)]
        scores.append(functional.cross_entropy(logits[0], labels[0]).neg().exp())
    return torch.stack(scores)


def to_pil(media):
    return [Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy()) for picture in media]


def test_the_score_is_the_likelihood_of_yes(networks, tokenizer, folder, exact):
    """Same pixels: 1e-12 in fp64, 1e-4 in fp32 (relative); rows of padded questions included."""
    wanted = reference(networks, tokenizer, torch.stack([by_pil(picture) for picture in to_pil(pictures())]))
    assert wanted.std() / wanted.mean() > 0.05
    torch.testing.assert_close(exact(pictures(), PROMPTS).total, wanted, rtol=1e-12, atol=0)
    single = ClipFlanT5(f"{folder}/pytorch_model.bin.index.json", tokenizer=folder)(pictures().float(), PROMPTS).total
    torch.testing.assert_close(single, wanted.float(), rtol=1e-4, atol=0)
    other = ClipFlanT5(folder, tokenizer=folder, answer="No", dtype="float64")(pictures(), PROMPTS).total
    torch.testing.assert_close(other, reference(networks, tokenizer, map(by_pil, to_pil(pictures())), "No"))


def test_the_head_is_not_tied_to_the_words(networks, exact):
    """transformers 5 ties them in the class; tying here would score by the wrong words."""
    assert torch.equal(exact._t5.lm_head.weight, networks[2].lm_head.weight[:-5])
    assert torch.equal(exact._t5.decoder.embed_tokens.weight, networks[2].shared.weight[:-5])
    assert not exact._t5.config.scale_decoder_outputs


@pytest.mark.parametrize("size", [(64, 64), (40, 73), (73, 40), (20, 17)])
def test_the_tensor_path_follows_pil(networks, tokenizer, exact, size):
    """Padded and resized pictures differ by PIL's rounding to 8 bits: scores that spread by 10% move by under 0.5%."""
    photographs = [photograph(*size, seed) for seed in range(3)]
    wanted = reference(networks, tokenizer, [by_pil(picture) for picture in photographs])
    found = exact(torch.stack([tensor(picture) for picture in photographs]), PROMPTS).total
    torch.testing.assert_close(found, wanted, rtol=0.005, atol=0)


def test_the_gradient_is_the_slope(exact):
    """Central differences along the gradient, through padding and resampling; T5's norms are in fp32, hence 1e-3."""
    media = pictures(2, 40)[..., :30].mul(0.8).add(0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(exact(media, PROMPTS[:2]).total[1], media)
    assert gradient[0].abs().sum() == 0 < gradient[1].abs().sum()
    direction = gradient / gradient.abs().max()
    with torch.no_grad():
        sides = [exact(media + step * direction, PROMPTS[:2]).total[1] for step in (3e-4, -3e-4)]
    torch.testing.assert_close((gradient * direction).sum(), (sides[0] - sides[1]) / 6e-4, rtol=1e-3, atol=0)


def test_rows_stand_alone_and_repeat(exact):
    together = exact(pictures(), PROMPTS).total
    alone = torch.cat([exact(pictures()[i : i + 1], PROMPTS[i : i + 1]).total for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=0)
    assert torch.equal(together, exact(pictures(), PROMPTS).total)
    assert ((together > 0) & (together < 1)).all()
    assert isinstance(exact, Reward)


def test_weights_in_bfloat16_score_in_float32(folder, exact):
    total = ClipFlanT5(folder, tokenizer=folder, dtype="bfloat16")(pictures().float(), PROMPTS).total
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), exact(pictures(), PROMPTS).total, rtol=0.1, atol=0)
    half = pictures().bfloat16()
    assert torch.equal(exact(half, PROMPTS).total, exact(half.float(), PROMPTS).total)


def test_weights_without_a_tower_take_the_named_one(networks, tokenizer, exact, tmp_path):
    state = {key: value for key, value in published_state(networks).items() if not key.startswith("vision_tower")}
    model = store(tmp_path, state, networks, tokenizer)
    networks[0].save_pretrained(tmp_path / "clip")
    found = ClipFlanT5(model, tokenizer=model, vision_tower=str(tmp_path / "clip"), dtype="float64")
    torch.testing.assert_close(found(pictures(), PROMPTS).total, exact(pictures(), PROMPTS).total, rtol=1e-5, atol=0)
    with pytest.raises(MissingFileError, match="'/no/clip' here; hf download openai/clip-vit-large-patch14-336"):
        ClipFlanT5(model, tokenizer=model, vision_tower="/no/clip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lm_head.weight"), r"1 missing \(lm_head.weight\)"),
        (lambda s: s.pop("mm_projector.2.bias"), r"mm_projector.*1 missing \(2.bias\)"),
        (lambda s: s.pop("vision_tower.vision_tower.vision_model.pre_layrnorm.bias"), r"1 missing \(pre_layrnorm.bias"),
        (lambda s: s.update({"model.norm.weight": torch.ones(1)}), r"1 unexpected \(model.norm.weight\)"),
        (lambda s: s.update({"shared.weight": torch.ones(400, 48)}), r"the weights 400; give Flan-T5's"),
    ],
)
def test_other_weights_are_refused(networks, tokenizer, tmp_path, change, message):
    state = published_state(networks)
    change(state)
    model = store(tmp_path, state, networks, tokenizer)
    with pytest.raises(DataError, match=message):
        ClipFlanT5(model, tokenizer=model)


def test_a_tower_of_its_own_is_loaded_strictly(networks, tokenizer, tmp_path):
    """From a whole CLIP's folder, too, whose other tower is left."""
    state = {k: v for k, v in published_state(networks).items() if not k.startswith("vision_tower")}
    model = store(tmp_path, state, networks, tokenizer)
    networks[0].save_pretrained(tmp_path / "tower")
    file = tmp_path / "tower" / "model.safetensors"
    tower = load_file(file)
    save_file(tower | {"text_model.final_layer_norm.bias": torch.ones(2)}, file, {"format": "pt"})
    ClipFlanT5(model, tokenizer=model, vision_tower=str(tmp_path / "tower"))
    save_file(tower | {"vision_model.other": torch.ones(2)}, file, {"format": "pt"})
    with pytest.raises(DataError, match=r"clip_flant5: vision_tower: .*1 unexpected \(other\)"):
        ClipFlanT5(model, tokenizer=model, vision_tower=str(tmp_path / "tower"))


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(MissingFileError, match=r"'/no/where' .*hf download zhiqiulin/clip-flant5-xl"):
        ClipFlanT5("/no/where", tokenizer=folder)
    with pytest.raises(MissingFileError, match="no T5 tokenizer '/no/where'"):
        ClipFlanT5(folder, tokenizer="/no/where")
    shutil.copytree(folder, tmp_path / "part")
    (tmp_path / "part" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(MissingFileError, match=r"00002-of-00002.bin' is named by its index"):
        ClipFlanT5(str(tmp_path / "part"), tokenizer=folder)

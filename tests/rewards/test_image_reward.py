"""ImageReward against transformers' own BLIP on PIL pictures, from a file with the published keys."""

from __future__ import annotations

import re

import pytest
import torch
from pictures import photograph, tensor
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from alignkit.errors import ConfigError, DataError, MissingFileError
from alignkit.protocols import Reward
from alignkit.records import Prompt
from rewards.image_reward import MEAN, STD, ImageReward

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "##s", "on", "two"]
TEXTS = ["a red circle", "two blue circles on a red circle", "blue"]
PROMPTS = [Prompt.from_text(text) for text in TEXTS]
WIDTH, INNER, LAYERS, PATCH, GRID, SEEN = 128, 96, 2, 8, 4, 192  # two and three heads of 64; pictures of 32 pixels
HEAD = {0: (12, WIDTH), 2: (8, 12), 4: (6, 8), 6: (4, 6), 7: (1, 4)}


def linear(name, out, width):
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def published_shapes():
    """Names as in THUDM/ImageReward's ImageReward.pt, at a tiny size."""
    see, read = "blip.visual_encoder", "blip.text_encoder"
    shapes = {f"{see}.cls_token": (1, 1, SEEN), f"{see}.pos_embed": (1, GRID**2 + 1, SEEN)}
    shapes |= {f"{see}.patch_embed.proj.weight": (SEEN, 3, PATCH, PATCH), f"{see}.patch_embed.proj.bias": (SEEN,)}
    shapes |= norm(f"{see}.norm", SEEN) | norm(f"{read}.embeddings.LayerNorm", WIDTH)
    shapes |= {f"{read}.embeddings.word_embeddings.weight": (len(VOCABULARY) + 2, WIDTH)}
    shapes |= {f"{read}.embeddings.position_embeddings.weight": (40, WIDTH)}
    for n in range(LAYERS):
        block, layer = f"{see}.blocks.{n}", f"{read}.encoder.layer.{n}"
        shapes |= linear(f"{block}.attn.qkv", 3 * SEEN, SEEN) | linear(f"{block}.attn.proj", SEEN, SEEN)
        shapes |= linear(f"{block}.mlp.fc1", INNER, SEEN) | linear(f"{block}.mlp.fc2", SEEN, INNER)
        shapes |= norm(f"{block}.norm1", SEEN) | norm(f"{block}.norm2", SEEN)
        for kind, width in (("attention", WIDTH), ("crossattention", SEEN)):
            shapes |= linear(f"{layer}.{kind}.self.query", WIDTH, WIDTH)
            shapes |= linear(f"{layer}.{kind}.self.key", WIDTH, width)
            shapes |= linear(f"{layer}.{kind}.self.value", WIDTH, width)
            shapes |= linear(f"{layer}.{kind}.output.dense", WIDTH, WIDTH)
            shapes |= norm(f"{layer}.{kind}.output.LayerNorm", WIDTH)
        shapes |= linear(f"{layer}.intermediate.dense", INNER, WIDTH) | linear(f"{layer}.output.dense", WIDTH, INNER)
        shapes |= norm(f"{layer}.output.LayerNorm", WIDTH)
    for number, sizes in HEAD.items():
        shapes |= linear(f"mlp.layers.{number}", *sizes)
    return shapes | linear("blip.vision_proj", 8, SEEN) | linear("blip.text_proj", 8, WIDTH)


@pytest.fixture(scope="module")
def state():
    generator = torch.Generator().manual_seed(3)
    made = {key: 0.08 * torch.randn(shape, generator=generator) for key, shape in published_shapes().items()}
    made = {key: 6 * value if key.startswith("mlp") else value for key, value in made.items()}  # scores of order 1
    made = {key: value + 1 if re.search(r"(norm\d?|LayerNorm)\.weight", key) else value for key, value in made.items()}
    return made | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward")
    torch.save(state, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    return str(folder)


@pytest.fixture(scope="module")
def reward(folder):
    return ImageReward(folder, tokenizer=folder)


@pytest.fixture(scope="module")
def exact(folder):
    return ImageReward(folder, tokenizer=folder, dtype="float64")


def pictures(count=3, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_pil(picture, size=GRID * PATCH):
    """torchvision's Resize, CenterCrop, ToTensor and Normalize on a PIL picture."""
    width, height = picture.size
    short = min(width, height)
    picture = picture.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in picture.size)
    pixels = tensor(picture.crop((left, top, left + size, top + size)))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]


RENAMED = (
    ("blocks", "encoder.layers"),
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
    ("attn.proj", "self_attn.projection"),
    ("attn.qkv", "self_attn.qkv"),
    ("patch_embed.proj", "embeddings.patch_embedding"),
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
)


def library_model(kind, config, state, prefix):
    """transformers' half of BLIP in fp64, its weights taken by its own names."""
    mapped = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    mapped.pop("embeddings.position_ids", None)
    if kind is BlipVisionModel:
        for old, new in RENAMED:
            mapped = {key.replace(old, new): value for key, value in mapped.items()}
        mapped = {re.sub(r"^norm\.", "post_layernorm.", key): value for key, value in mapped.items()}
    options = {"add_pooling_layer": False} if kind is BlipTextModel else {}
    model = kind(config, **options).double().eval()
    model.load_state_dict(mapped)
    return model


def reference(state, prepared, texts):
    """The published score: BLIP by transformers, words cut up by hand, the head's maps in a row."""
    sizes = {"intermediate_size": INNER, "num_hidden_layers": LAYERS}
    vision = BlipVisionConfig(
        hidden_size=SEEN, num_attention_heads=3, image_size=32, patch_size=PATCH, layer_norm_eps=1e-6, **sizes
    )
    text = BlipTextConfig(
        vocab_size=14, hidden_size=WIDTH, encoder_hidden_size=SEEN, num_attention_heads=2, max_position_embeddings=40,
        layer_norm_eps=1e-12, bos_token_id=12, sep_token_id=3, **sizes
    )  # fmt: skip
    see = library_model(BlipVisionModel, vision, state, "blip.visual_encoder.")
    read = library_model(BlipTextModel, text, state, "blip.text_encoder.")
    words = [["[CLS]", *text.replace("circles", "circle ##s").split(), "[SEP]"] for text in texts]
    rows = [[VOCABULARY.index(word) for word in row] + [0] * (35 - len(row)) for row in words]
    tokens = torch.tensor(rows)
    with torch.no_grad():
        seen = see(prepared).last_hidden_state
        output = read(tokens, attention_mask=(tokens != 0).long(), encoder_hidden_states=seen, is_decoder=False)
        values = output.last_hidden_state[:, 0]
        for number in HEAD:
            values = functional.linear(
                values, *(state[f"mlp.layers.{number}.{n}"].double() for n in ("weight", "bias"))
            )
    return (values[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_the_score_is_that_of_blip_and_the_head(state, exact, reward):
    """Same pixels, scores that spread over several units: equal to 1e-12 in fp64 and 1e-4 in fp32."""
    prepared = torch.stack([by_pil(Image.fromarray((p.permute(1, 2, 0) * 255).byte().numpy())) for p in pictures()])
    media = pictures().mul(255).byte().double().div(255)
    wanted = reference(state, prepared, TEXTS)
    assert wanted.std() > 1
    torch.testing.assert_close(exact(media, PROMPTS).total, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(reward(media.float(), PROMPTS).total, wanted.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (57, 90), (90, 57), (21, 25)])
def test_the_tensor_path_follows_pil(state, exact, size):
    """Resized pictures differ by PIL's rounding to 8 bits alone; scores that spread over units move by under 0.1."""
    photographs = [photograph(*size, seed) for seed in range(3)]
    media = torch.stack([tensor(picture) for picture in photographs])
    wanted = reference(state, torch.stack([by_pil(picture) for picture in photographs]), TEXTS)
    torch.testing.assert_close(exact(media, PROMPTS).total, wanted, rtol=0, atol=0.1)


def test_the_gradient_is_the_slope(exact):
    """Central differences in fp64 along random directions, through the resampling too."""
    media = pictures(2, 40).mul(0.9).add(0.05).requires_grad_()
    (gradient,) = torch.autograd.grad(exact(media, PROMPTS[:2]).total[1], media)
    assert gradient[0].abs().sum() == 0 < gradient[1].abs().sum()
    direction = torch.randn(media.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        sides = [exact(media + step * direction, PROMPTS[:2]).total[1] for step in (1e-6, -1e-6)]
    torch.testing.assert_close((gradient * direction).sum(), (sides[0] - sides[1]) / 2e-6, rtol=1e-6, atol=0)


def test_rows_stand_alone_and_repeat(reward):
    media = pictures().float()
    together = reward(media, PROMPTS).total
    alone = torch.cat([reward(media[i : i + 1], PROMPTS[i : i + 1]).total for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
    assert torch.equal(together, reward(media, PROMPTS).total)
    assert together.dtype == torch.float32
    assert isinstance(reward, Reward)


def test_weights_in_bfloat16_score_in_float32(folder, reward):
    low = ImageReward(folder, tokenizer=folder, dtype="bfloat16")(pictures().float(), PROMPTS).total
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, reward(pictures(), PROMPTS).total, rtol=0.1, atol=0.1)
    half = pictures().bfloat16()
    assert torch.equal(reward(half, PROMPTS).total, reward(half.float(), PROMPTS).total)
    with pytest.raises(ConfigError, match=r"dtype 'bf16' is unknown. Did you mean 'bfloat16'\?"):
        ImageReward(folder, tokenizer=folder, dtype="bf16")


def test_the_head_scores_in_float32_in_autocast(folder, reward):
    low = ImageReward(folder, tokenizer=folder, dtype="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        totals = [made(pictures().float(), PROMPTS).total for made in (reward, low)]
    raw = torch.stack(totals) * STD + MEAN
    assert raw.dtype == torch.float32
    assert (raw.bfloat16().float() - raw).abs().amin(1).gt(1e-5).all()


def test_long_prompts_are_cut_to_35_tokens(reward):
    ends = [Prompt.from_text("red " * count + "blue " * 3) for count in (32, 33, 34)]
    first, second, third = reward(pictures(1).expand(3, -1, -1, -1), ends).total
    torch.testing.assert_close(second, third, rtol=0, atol=1e-5)
    assert (first - second).abs() > 1e-3  # its 33rd word is read


def test_files_and_safetensors_are_found(state, folder, reward, tmp_path):
    save_file(state, tmp_path / "ImageReward.safetensors")
    for model in (str(tmp_path), f"{folder}/ImageReward.pt"):
        total = ImageReward(model, tokenizer=folder)(pictures(), PROMPTS).total
        assert torch.equal(total, reward(pictures(), PROMPTS).total)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blip.visual_encoder.norm.bias"), r"1 missing \(blip.visual_encoder.norm.bias\)"),
        (lambda s: s.pop("mlp.layers.6.weight"), r"no mlp.layers.6.weight among"),
        (lambda s: s.update(more=torch.ones(1)), r"1 unexpected \(more\)"),
        (
            lambda s: s.update({"mlp.layers.2.bias": torch.ones(3)}),
            r"1 of another shape \(mlp.layers.2.bias \[3\] for \[8\]\)",
        ),
        (lambda s: s.update(epoch=3), "no plain state dict"),
    ],
)
def test_other_weights_are_refused(state, folder, tmp_path, change, message):
    other = dict(state)
    change(other)
    torch.save(other, tmp_path / "ImageReward.pt")
    with pytest.raises(DataError, match=message):
        ImageReward(str(tmp_path), tokenizer=folder)


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(MissingFileError, match=r"'/no/where' .*hf download THUDM/ImageReward"):
        ImageReward("/no/where", tokenizer=folder)
    with pytest.raises(MissingFileError, match="no BERT tokenizer '/no/where'"):
        ImageReward(folder, tokenizer="/no/where")
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, "green"]))
    with pytest.raises(DataError, match=r"has 15 words .*the weights 14"):
        ImageReward(folder, tokenizer=str(tmp_path))
    (tmp_path / "ImageReward.pt").write_bytes(b"<html>")
    with pytest.raises(DataError, match="damaged"):
        ImageReward(str(tmp_path), tokenizer=folder)

"""Every reward on CLIP against its published algorithm: PIL processor, library forward, and the score written anew."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_clips
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from alignkit.errors import ConfigError, DataError, MissingFileError
from alignkit.protocols import Reward
from alignkit.records import Prompt
from rewards.aesthetic import Aesthetic
from rewards.clip_score import ClipScore
from rewards.hps import Hps
from rewards.models.clip import LAION_H
from rewards.models.media import CLIP_MEAN, CLIP_STD, quantised
from rewards.mps import CONDITIONS, Mps
from rewards.pick_score import PickScore

TEXTS = ["a red circle", "two blue rings on a gray background", "a cross. " * 20, "light"]
PROMPTS = [Prompt.from_text(text) for text in TEXTS]
NAMES = ["clip_score", "paper", "pick_score", "hps", "aliased", "aesthetic", "mps"]
HEADS, HEAD, WIDE = 3, 8, 40


@pytest.fixture(scope="module")
def clip():
    return tiny_clips.clip()


@pytest.fixture(scope="module")
def head():
    """The aesthetic head under its published names; dropouts leave gaps in the numbers."""
    widths, places = (tiny_clips.WIDTH, 1024, 128, 64, 16, 1), (0, 2, 4, 6, 7)
    numbers, tensors = torch.Generator().manual_seed(3), {}
    for place, wide, narrow in zip(places, widths, widths[1:], strict=False):
        tensors[f"layers.{place}.weight"] = torch.randn(narrow, wide, generator=numbers) / wide**0.5
        tensors[f"layers.{place}.bias"] = torch.randn(narrow, generator=numbers)
    return tensors


@pytest.fixture(scope="module")
def crossing():
    """Two layers of MPS's cross model under the published names, and the CLIP under `model.`."""
    width, shapes = tiny_clips.WIDTH, {}
    for layer in range(2):
        asking, thinking = (f"cross_model.layers.{layer}.{part}.fn." for part in (0, 1))
        shapes |= {asking + "to_q.weight": (HEADS * HEAD, width), asking + "to_kv.weight": (2 * HEAD, width)}
        shapes |= {asking + "to_out.weight": (width, HEADS * HEAD), asking + "ff.0.weight": (2 * WIDE, width)}
        shapes |= {asking + "ff.2.weight": (width, WIDE), thinking + "ff_out.1.weight": (width, WIDE)}
        shapes |= {thinking + "fused_attn_ff_proj.weight": (HEADS * HEAD + 2 * HEAD + 2 * WIDE, width)}
        shapes |= {thinking + "attn_out.weight": (width, HEADS * HEAD), thinking + "rotary_emb.inv_freq": (HEAD // 2,)}
        shapes |= {f"{part}norm.{kind}": (width,) for part in (asking, thinking) for kind in ("weight", "bias")}
    numbers = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape, generator=numbers) / shape[-1] ** 0.5 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory, clip, head, crossing):
    folder = tmp_path_factory.mktemp("clip")
    clip.save_pretrained(folder)
    tiny_clips.tokenizer().save_pretrained(folder)
    torch.save(head, folder / "sac+logos+ava1-l14-linearMSE.pth")
    own = {f"model.{name}": value.contiguous() for name, value in clip.state_dict().items()}
    positions = {"model.text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(own | crossing | positions, folder / "mps.safetensors")
    return folder


@pytest.fixture(scope="module")
def build(files):
    def builder(name, **options):
        place = str(files)
        return {
            "clip_score": lambda: ClipScore(place, **options),
            "paper": lambda: ClipScore(place, form="paper", **options),
            "pick_score": lambda: PickScore(place, processor=place, **options),
            "hps": lambda: Hps(place, processor=place, **options),
            "aliased": lambda: Hps(place, antialias=False, processor=place, **options),
            "aesthetic": lambda: Aesthetic(place, head=str(files / "sac+logos+ava1-l14-linearMSE.pth"), **options),
            "mps": lambda: Mps(str(files / "mps.safetensors"), processor=place, **options),
        }[name]()

    return builder


# --- the published algorithms, written anew -------------------------------------------------------------------------


def processed(picture):
    options = {"size": {"shortest_edge": tiny_clips.SIDE}, "crop_size": tiny_clips.SIDE}
    return CLIPImageProcessorPil(**options)(picture, return_tensors="pt").pixel_values


def padded(picture, *, antialias=True):
    """HPSv2: floats first, the longest side to 32, black around, then CLIP's statistics."""
    pixels, side = tiny_clips.media(picture), tiny_clips.SIDE
    size = [round(length * side / max(pixels.shape[-2:])) for length in pixels.shape[-2:]]
    pixels = functional.interpolate(pixels, size, mode="bicubic", antialias=antialias)
    rows, columns = (side - length for length in size)
    around = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (functional.pad(pixels, around) - mean) / std


def tokens(text):
    return tiny_clips.tokenizer()([text], padding="max_length", max_length=77, truncation=True, return_tensors="pt")


def cosine(clip, pixels, text):
    output = clip(pixel_values=pixels, **tokens(text))
    return float(output.image_embeds[0] @ output.text_embeds[0])


def layer_norm(x, tensors, prefix):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * tensors[prefix + "norm.weight"] + tensors[prefix + "norm.bias"]


def attention(query, key, value, hidden=None):
    """One head of keys and values for all heads of queries, head by head."""
    parts = []
    for head in range(HEADS):
        logits = query[:, head * HEAD : (head + 1) * HEAD] @ key.T / HEAD**0.5
        logits = logits if hidden is None else np.where(hidden, -np.inf, logits)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        parts.append(weights / weights.sum(-1, keepdims=True) @ value)
    return np.concatenate(parts, -1)


def gated(x):
    value, gate = x[:, :WIDE], x[:, WIDE:]
    return value * gate / (1 + np.exp(-gate))


def turned(x):
    """Each plane (p, p + half) of the token at place n turned by n / 10000^(2p / head)."""
    result, half = x.copy(), HEAD // 2
    for start in range(0, x.shape[1], HEAD):
        for plane in range(half):
            angle = np.arange(len(x)) / 10000 ** (2 * plane / HEAD)
            a, b = x[:, start + plane], x[:, start + plane + half]
            result[:, start + plane] = a * np.cos(angle) - b * np.sin(angle)
            result[:, start + plane + half] = b * np.cos(angle) + a * np.sin(angle)
    return result


def mps(clip, tensors, pixels, text, threshold=0.3):
    """(score, hidden tokens) of one picture and one prompt, in numpy."""
    t = {name: value.double().numpy() for name, value in tensors.items()}

    def read(words):
        output = clip.text_model(input_ids=tokens(words).input_ids)
        return (clip.text_projection(x)[0].double().numpy() for x in (output.last_hidden_state, output.pooler_output))

    (said, pooled), (condition, _) = read(text), read(CONDITIONS["overall"])
    similar = np.array([max(word @ other for other in condition) for word in said])
    hidden = ~(similar / similar.max() > threshold)
    x = clip.visual_projection(clip.vision_model(pixels).last_hidden_state)[0].double().numpy()
    for layer in range(2):
        one, two = (f"cross_model.layers.{layer}.{part}.fn." for part in (0, 1))
        y, (key, value) = layer_norm(x, t, one), np.split(said @ t[one + "to_kv.weight"].T, 2, -1)
        asked = attention(y @ t[one + "to_q.weight"].T, key, value, hidden) @ t[one + "to_out.weight"].T
        x = x + asked + gated(y @ t[one + "ff.0.weight"].T) @ t[one + "ff.2.weight"].T
        fused = layer_norm(x, t, two) @ t[two + "fused_attn_ff_proj.weight"].T
        query, key, value, wide = np.split(fused, np.cumsum([HEADS * HEAD, HEAD, HEAD]), -1)
        thought = attention(turned(query), turned(key), value) @ t[two + "attn_out.weight"].T
        x = x + thought + gated(wide) @ t[two + "ff_out.1.weight"].T
    cosine = x[0] @ pooled / np.linalg.norm(x[0]) / np.linalg.norm(pooled)
    return clip.logit_scale.exp().item() * cosine, hidden


@pytest.fixture(scope="module")
def published(clip, head, crossing):
    """name -> function(picture, text) -> the published score."""

    def aesthetic(picture, _):
        x = clip.visual_projection(clip.vision_model(processed(picture)).pooler_output)[0].double().numpy()
        x = x / np.linalg.norm(x)
        for place in (0, 2, 4, 6, 7):
            x = head[f"layers.{place}.weight"].double().numpy() @ x + head[f"layers.{place}.bias"].double().numpy()
        return float(x[0])

    scale = clip.logit_scale.exp().item()
    return {
        "clip_score": lambda picture, text: 100 * cosine(clip, processed(picture), text),
        "paper": lambda picture, text: 2.5 * max(cosine(clip, processed(picture), f"A photo depicts {text}"), 0),
        "pick_score": lambda picture, text: scale * cosine(clip, processed(picture), text),
        "hps": lambda picture, text: cosine(clip, padded(picture), text),
        "aliased": lambda picture, text: cosine(clip, padded(picture, antialias=False), text),
        "aesthetic": aesthetic,
        "mps": lambda picture, text: mps(clip, crossing, processed(picture), text)[0],
    }


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_scores_are_the_published_ones(name, build, published):
    """To float precision where nothing is resampled; else within 0.5% of the range, which is what 8 bits move.

    The picture that is only cut goes through PIL without resampling; HPSv2's path has floats throughout.
    """
    reward = build(name)
    scale = {"clip_score": 100, "paper": 2.5, "pick_score": 14.3, "mps": 14.3}.get(name, 1)
    for picture, prompt in zip(tiny_clips.pictures(), PROMPTS, strict=True):
        wanted = published[name](picture, prompt.text)
        difference = abs(reward(tiny_clips.media(picture), [prompt]).total.item() - wanted) / scale
        print(name, picture.size, f"{wanted:.5f} differs by {difference:.2e} of its range")
        is_exact = picture.size == (tiny_clips.SIDE + 9, tiny_clips.SIDE) or name in ("hps", "aliased")
        assert difference < (2e-6 if is_exact else 5e-3)


@torch.no_grad()
def test_conditions_hide_some_words_and_not_others(clip, crossing, build):
    """Else the comparison above says nothing of the mask; the ports' threshold hides fewer words."""
    _, hidden = mps(clip, crossing, processed(tiny_clips.pictures()[0]), TEXTS[3])
    assert 0 < hidden.sum() < len(hidden)
    media = tiny_clips.media(tiny_clips.pictures()[0])
    ways = [build("mps"), build("mps", condition="aesthetics"), build("mps", threshold=0.9)]
    scores = [way(media, PROMPTS[3:]).total.item() for way in ways]
    assert len(set(scores)) == 3


# --- what every reward keeps ----------------------------------------------------------------------------------------


def noise(count=3, size=(40, 36), seed=0, dtype=torch.float32):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed)).to(dtype) * 0.6 + 0.2


@pytest.mark.parametrize("name", NAMES)
def test_every_reward_declares_itself_and_scores_row_by_row(name, build):
    reward, media, prompts = build(name), noise(), PROMPTS[:3]
    assert isinstance(reward, Reward)
    total = reward(media, prompts).total
    assert torch.equal(reward(media, prompts).total, total)
    low, high = reward.native_range
    assert ((low <= total) & (total <= high)).all()
    alone = torch.cat([reward(media[i : i + 1], prompts[i : i + 1]).total for i in range(3)])
    torch.testing.assert_close(alone, total, rtol=1e-4, atol=1e-5)
    other = reward(media, prompts[::-1]).total
    assert torch.equal(other, total) != reward.needs_prompt
    assert (quantised(media) - media).abs().max() < 0.002
    moved = (reward(quantised(media), prompts).total - total).abs().max() / (1 if high == float("inf") else high)
    print(name, f"8 bits move the score by {moved:.1e} of its range")
    assert moved < 5e-3


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_totals_are_finer_than_bfloat16_in_autocast(name, build):
    """Towers may round; what is left to do with their features is done in float32, or near scores would be equal."""
    reward, media = build(name), noise()
    with torch.autocast("cpu", torch.bfloat16):
        total = reward(media, PROMPTS[:3]).total
    assert total.dtype == torch.float32
    assert not torch.equal(total.bfloat16().float(), total)
    assert not torch.equal(total, reward(media, PROMPTS[:3]).total)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_differences(name, build):
    """fp64, central differences along a random direction; and row 1's score moves with picture 1 alone."""
    reward = build(name, dtype="float64")
    media, prompts = noise(dtype=torch.float64).requires_grad_(), PROMPTS[:3]
    totals = reward(media, prompts).total
    row = int(totals.argmax())  # the paper's form is flat below zero
    (gradient,) = torch.autograd.grad(totals[row], media)
    others = [i for i in range(3) if i != row]
    assert gradient[others].abs().max() == 0
    assert totals.dtype == torch.float64
    way = torch.randn(media.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    step = 1e-5
    with torch.no_grad():
        up, down = (reward(media + sign * step * way, prompts).total[row] for sign in (1, -1))
    torch.testing.assert_close((gradient * way).sum(), (up - down) / (2 * step), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_near(name, build):
    reward, half = build(name), build(name, dtype="bfloat16")
    media, prompts = noise(dtype=torch.bfloat16), PROMPTS[:3]
    _, high = reward.native_range
    scale = 1 if high == float("inf") else high
    assert (reward(media, prompts).total - half(media, prompts).total).abs().max() / scale < 0.05
    assert half(media, prompts).total.dtype == torch.float32


def test_only_the_picture_counts_for_beauty(build):
    assert torch.isfinite(build("aesthetic")(noise(1), [Prompt.from_text("")]).total).all()
    with pytest.raises(DataError, match="prompt of row 0 is empty"):
        build("hps")(noise(1), [Prompt.from_text("")])


def test_heads_and_crossings_load_strictly(files, head, crossing, clip, tmp_path):
    torch.save({name: value for name, value in head.items() if name != "layers.6.bias"}, tmp_path / "lost.pth")
    with pytest.raises(DataError, match=r"aesthetic: .*lost.pth.*1 missing \(layers.6.bias\)"):
        Aesthetic(str(files), head=str(tmp_path / "lost.pth"))
    torch.save(head | {"layers.0.weight": torch.zeros(1024, 768)}, tmp_path / "wide.pth")
    with pytest.raises(DataError, match=r"aesthetic: .*layers.0.weight \[1024, 768\] for \[1024, 24\]"):
        Aesthetic(str(files), head=str(tmp_path / "wide.pth"))
    with pytest.raises(MissingFileError, match=r"no weights .*improved-aesthetic-predictor"):
        Aesthetic(str(files), head=str(tmp_path / "none.pth"))
    own = {f"mps.model.{name}": value.contiguous() for name, value in clip.state_dict().items()}
    ported = {f"mps.{name}": value for name, value in crossing.items()}
    save_file(own | ported, tmp_path / "port.safetensors")
    port, first = (
        Mps(str(path), processor=str(files)) for path in (tmp_path / "port.safetensors", files / "mps.safetensors")
    )
    assert torch.equal(port(noise(), PROMPTS[:3]).total, first(noise(), PROMPTS[:3]).total)
    save_file(
        own | ported | {"mps.cross_model.layers.0.2.fn.norm.weight": torch.ones(2)}, tmp_path / "more.safetensors"
    )
    with pytest.raises(DataError, match=r"mps: .*1 unexpected \(cross_model.layers.0.2.fn.norm.weight\)"):
        Mps(str(tmp_path / "more.safetensors"), processor=str(files))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "MPS_overall_checkpoint.pth")
    with pytest.raises(DataError, match=r"mps: .*pickled code.*save_model"):
        Mps(str(tmp_path / "MPS_overall_checkpoint.pth"), processor=str(files))


def test_options_are_checked(files):
    with pytest.raises(ConfigError, match="form is 'papr'; choose 'cosine' or 'paper'"):
        ClipScore(str(files), form="papr")
    with pytest.raises(MissingFileError, match=r"pick_score: .*PickScore_v1"):
        PickScore(processor=str(files))
    with pytest.raises(MissingFileError, match=f"hps: no tokenizer in '{LAION_H}'"):
        Hps(str(files))

"""The one CLIP: every published layout gives the published features, strictly; what is shared is never stale."""

from __future__ import annotations

import json

import pytest
import tiny_clips
import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from alignkit.errors import ConfigError, DataError, MissingFileError
from alignkit.records import Prompt
from rewards.clip_score import ClipScore
from rewards.hps import Hps
from rewards.models.clip import Clip, share_vision
from rewards.pick_score import PickScore

TEXTS = ["a red circle", "two blue rings on a gray background", "a cross. " * 20]
PROMPTS = [Prompt.from_text(text) for text in TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny_clips.clip().save_pretrained(folder)
    tiny_clips.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same tower, but for one number of its vision weights."""
    folder, model = tmp_path_factory.mktemp("other"), tiny_clips.clip()
    with torch.no_grad():
        model.vision_model.encoder.layers[1].mlp.fc2.bias[3] += 0.5
    model.save_pretrained(folder)
    return folder


def noise(count=3, side=tiny_clips.SIDE, seed=0, **options):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed), **options)


def open_clip_file(path, model, rename=str):
    torch.save({"state_dict": {rename(key): value for key, value in model.state_dict().items()}}, path)
    return str(path)


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [{}, {"width": 1280, "heads": 16, "text_width": 1024, "side": 28, "patch": 14, "layers": 1}],
    ids=["small", "widths of ViT-H-14"],
)
@torch.no_grad()
def test_open_clip_weights_give_open_clip_features(folder, tmp_path, sizes):
    torch.manual_seed(0)
    theirs = tiny_clips.OpenClip(**sizes).eval()
    ours = Clip(open_clip_file(tmp_path / "HPS.pt", theirs), name="hps", processor=str(folder))
    media = noise(side=sizes.get("side", tiny_clips.SIDE))
    torch.testing.assert_close(ours.embed_media(media), theirs.encode_image(media), rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.embed_prompts(TEXTS), theirs.encode_text(TEXTS), rtol=0, atol=2e-5)
    assert ours.scale == pytest.approx(torch.tensor(4.6).exp().item())
    quick = Clip(str(tmp_path / "HPS.pt"), name="hps", processor=str(folder), activation="quick_gelu")
    assert (quick.embed_media(media) - ours.embed_media(media)).abs().max() > 1e-4


def test_text_towers_may_stand_under_a_name_of_their_own(folder, tmp_path):
    theirs = tiny_clips.OpenClip().eval()
    inside = ("transformer", "token", "positional", "ln_final", "text_projection")
    file = open_clip_file(tmp_path / "a.pt", theirs, lambda key: f"text.{key}" if key.startswith(inside) else key)
    ours = Clip(file, name="clip_score", processor=str(folder))
    torch.testing.assert_close(ours.embed_prompts(TEXTS), theirs.encode_text(TEXTS), rtol=0, atol=2e-5)


def test_a_file_in_transformers_names_is_the_folder(folder, tmp_path):
    """Files of older versions also store positions, which are constants."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, tmp_path / "w.safetensors")
    one, two = ClipScore(str(folder)), ClipScore(str(tmp_path / "w.safetensors"), processor=str(folder))
    assert torch.equal(one(noise(), PROMPTS).total, two(noise(), PROMPTS).total)


@pytest.mark.parametrize("layout", ["open_clip", "transformers", "folder"])
def test_keys_must_all_be_there_and_no_others(folder, tmp_path, layout):
    if layout == "open_clip":
        tensors, lost = dict(tiny_clips.OpenClip().state_dict()), "visual.ln_post.bias"
        named = "vision_model.post_layernorm.bias"
    else:
        tensors, lost = load_file(folder / "model.safetensors"), "text_model.final_layer_norm.bias"
        named = lost
    damaged = {key: value for key, value in tensors.items() if key != lost} | {"visual.trunk": torch.ones(2)}
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(damaged, tmp_path / "model.safetensors", {"format": "pt"})
    model = tmp_path if layout == "folder" else tmp_path / "model.safetensors"
    with pytest.raises(DataError, match=rf"hps: .*1 missing \({named}\); 1 unexpected \(visual.trunk\)"):
        Hps(str(model), processor=str(folder))


def test_shapes_must_fit(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["text_model.encoder.layers.1.mlp.fc1.weight"] = torch.zeros(7, 64)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=r"layers.1.mlp.fc1.weight \[7, 64\] for \[96, 64\]"):
        ClipScore(str(tmp_path / "w.safetensors"), processor=str(folder))


def test_files_that_cannot_be_used_are_named(folder, tmp_path):
    options = {"processor": str(folder)}
    with pytest.raises(MissingFileError, match=r"hps: .*nowhere.pt.*hf download xswu/HPSv2"):
        Hps(str(tmp_path / "nowhere.pt"), **options)
    with pytest.raises(MissingFileError, match=r"clip_score: no tokenizer in .*hf download laion"):
        ClipScore(str(folder), processor=str(tmp_path))
    torch.save({"state_dict": torch.nn.Linear(2, 2)}, tmp_path / "module.pt")
    with pytest.raises(DataError, match=r"pickled code.*safetensors"):
        Hps(str(tmp_path / "module.pt"), **options)
    torch.save(dict(tiny_clips.OpenClip().state_dict()), tmp_path / "whole.pt")
    for name, whole in (("cut.pt", tmp_path / "whole.pt"), ("cut.safetensors", folder / "model.safetensors")):
        (tmp_path / name).write_bytes(whole.read_bytes()[:5000])
        with pytest.raises(DataError, match=f"{name}' is no readable file of weights"):
            Hps(str(tmp_path / name), **options)
    save_file({"weight": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=r"no CLIP checkpoint: it lacks 'vision_model.embeddings.patch_embedding"):
        Hps(str(tmp_path / "w.safetensors"), **options)
    with pytest.raises(ConfigError, match="dtype 'half' is unknown"):
        Hps(str(folder), dtype="half", **options)


@pytest.mark.parametrize("words", [50, 60, 65, 100])
def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path, words):
    """Larger or smaller: its words would be others."""
    tiny_clips.clip(vocab_size=words, eos_token_id=49, bos_token_id=48, pad_token_id=49).save_pretrained(tmp_path)
    tiny_clips.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(DataError, match=rf"has 58 tokens and the weights .* {words}; give `processor`"):
        ClipScore(str(tmp_path))


def test_a_vocabulary_may_be_filled_up(tmp_path):
    tiny_clips.clip(vocab_size=64).save_pretrained(tmp_path)
    tiny_clips.tokenizer().save_pretrained(tmp_path)
    ClipScore(str(tmp_path))


# --- preparation and prompts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored",
    [
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 2},
        {"size": 32, "crop_size": 32, "image_mean": [0.5] * 3, "image_std": [0.4, 0.5, 0.6]},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
    ],
    ids=["bilinear", "old form", "stretched"],
)
def test_pictures_are_prepared_as_the_folder_says(folder, tmp_path, stored):
    """Within rounding to 8 bits, which PIL does after resampling: half a level and one more where both passes round."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    ours = Clip(str(folder), name="clip_score", processor=_with_tokenizer(tmp_path)).preparation
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path)
    for picture in tiny_clips.pictures():
        wanted = theirs(picture, return_tensors="pt").pixel_values
        difference = (ours(tiny_clips.media(picture)) - wanted).abs().amax((0, 2, 3)) * torch.tensor(ours.std) * 255
        assert difference.max() < 1.6


@pytest.mark.parametrize("stored", [{"size": {"shortest_edge": 40}}, {"resample": 0}, {"do_rescale": False}])
def test_forms_that_clip_does_not_have_are_refused(folder, tmp_path, stored):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"crop_size": 32, "size": 32} | stored))
    with pytest.raises(DataError, match="known are CLIP's forms at the tower's 32 pixels"):
        Clip(str(folder), name="clip_score", processor=_with_tokenizer(tmp_path))


def _with_tokenizer(path):
    tiny_clips.tokenizer().save_pretrained(path)
    return str(path)


def test_prompts_are_read_once_and_never_out_of_an_earlier_batch(folder):
    clip, calls = Clip(str(folder), name="clip_score"), []
    clip.model.text_model.register_forward_hook(lambda _m, _i, out: calls.append(len(out.pooler_output)))
    with torch.inference_mode():
        first = clip.embed_prompts([TEXTS[0], TEXTS[1], TEXTS[0]])
    assert torch.equal(first[0], first[2])
    again = clip.embed_prompts([TEXTS[0], TEXTS[1]])
    assert calls == [2]
    assert torch.equal(again, first[:2])
    assert torch.equal(clip.embed_prompts(TEXTS[:1]), Clip(str(folder), name="x").embed_prompts(TEXTS[:1]))
    media = noise(2).requires_grad_()  # what was read in inference mode may stand in a graph
    (clip.embed_media(media) * again).sum().backward()
    assert media.grad.abs().sum() > 0


def test_long_prompts_end_with_the_window(folder):
    clip = Clip(str(folder), name="clip_score")
    long = "a b c d e f g h " * 20
    assert torch.equal(clip.embed_prompts([long]), clip.embed_prompts([long + "and more"]))
    assert (clip.embed_prompts([long]) - clip.embed_prompts(["z " + long])).abs().max() > 1e-3


# --- shared vision --------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(folder):
    """Two rewards on equal towers, what they say apart, and how often the tower looked once it is shared."""
    rewards = [PickScore(str(folder), processor=str(folder)), Hps(str(folder), processor=str(folder))]
    apart = [PickScore(str(folder), processor=str(folder)), Hps(str(folder), processor=str(folder))]
    assert share_vision(rewards) == 1
    looks = []
    rewards[0].clip.model.vision_model.register_forward_hook(lambda *_: looks.append(1))
    assert rewards[0].clip.model.vision_model is rewards[1].clip.model.vision_model
    return rewards, apart, looks


def gradient(rewards, media):
    total = sum(reward(media, PROMPTS).total.sum() for reward in rewards)
    return torch.autograd.grad(total, media)[0]


@pytest.mark.parametrize(("side", "times"), [(tiny_clips.SIDE, 1), (48, 2)])
def test_equal_towers_look_once_with_the_same_scores_and_gradients(pair, side, times):
    """Unless pictures are resized, which HPSv2 does otherwise."""
    rewards, apart, looks = pair
    media = noise(side=side).requires_grad_()
    shared, alone = gradient(rewards, media), gradient(apart, media)
    assert len(looks) == times
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-6)
    for one, two in zip(rewards, apart, strict=True):
        assert torch.equal(one(media, PROMPTS).total, two(media, PROMPTS).total)


def test_other_numbers_are_not_shared(folder, other):
    rewards = [PickScore(str(path), processor=str(folder)) for path in (folder, other, folder)]
    wanted = [reward(noise(), PROMPTS).total for reward in rewards]
    assert share_vision(rewards) == 2
    got = [reward(noise(), PROMPTS).total for reward in rewards]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not torch.equal(got[0], got[1])


def test_pictures_that_are_fitted_otherwise_are_looked_at_anew(pair):
    rewards, apart, looks = pair
    media = noise()[..., :20]
    for one, two in zip(rewards, apart, strict=True):
        assert torch.equal(one(media, PROMPTS).total, two(media, PROMPTS).total)
    assert len(looks) == 2


def test_features_are_never_stale(pair):
    (one, two), (lone, _), looks = pair
    media = noise()
    one(media, PROMPTS)
    media[1].mul_(0.5)  # edited in place
    assert torch.equal(one(media, PROMPTS).total, lone(media, PROMPTS).total)
    assert len(looks) == 2
    with torch.no_grad():
        media.requires_grad_()
        assert not one(media, PROMPTS).total.requires_grad
    assert one(media, PROMPTS).total.requires_grad  # another gradient mode
    del media
    for seed in range(3):  # another tensor, perhaps at the old one's place
        media = noise(seed=seed)
        assert torch.equal(one(media, PROMPTS).total, lone(media, PROMPTS).total)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(two(media, PROMPTS).total, lone(media, PROMPTS).total)
        assert torch.equal(one(media, PROMPTS).total, lone(media, PROMPTS).total)
    with torch.inference_mode():
        media = noise()
        assert torch.equal(one(media, PROMPTS).total, lone(media, PROMPTS).total)
        media.mul_(0.5)
        assert torch.equal(one(media, PROMPTS).total, lone(media, PROMPTS).total)


def test_back_propagation_drops_the_features(pair):
    (one, two), (_, lone), looks = pair
    media = noise().requires_grad_()
    gradient([one], media)
    torch.testing.assert_close(gradient([two], media), gradient([lone], media), rtol=1e-5, atol=1e-7)
    assert len(looks) == 2
    assert not one.clip.vision._features


def test_features_do_not_outlive_their_media(pair):
    (one, _), _, _ = pair
    media = noise()
    one(media, PROMPTS)
    assert one.clip.vision._features
    del media
    assert not one.clip.vision._features


def test_shared_rewards_may_be_recomputed(pair):
    """Activation checkpointing runs the rewards anew on another tensor object."""
    rewards, apart, _ = pair
    media = noise().requires_grad_()

    def total(members):
        return lambda pixels: sum(reward(pixels, PROMPTS).total.sum() for reward in members)

    checkpointed = checkpoint(total(rewards), media * 1.0, use_reentrant=False)
    plain = total(apart)(media * 1.0)
    one, two = (torch.autograd.grad(value, media)[0] for value in (checkpointed, plain))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)

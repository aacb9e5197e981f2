"""The recipes of the video generator, shortened to a step or two: they run, save what loads, and continue."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from PIL import Image

from alignkit.generators import load_generator, wrap
from alignkit.records import Sampling
from alignkit.sandbox import film, film_models, film_vae, films, recipes
from alignkit.sandbox.film_captions import parse
from alignkit.sandbox.flow import collate

SHORT = recipes.Recipe(steps=2, batch=2, learning_rate=1e-3, seed=1, warmup=1)
SAMPLING = Sampling(steps=2, guidance_scale=2.0, height=films.SIZE, width=films.SIZE, num_frames=films.FRAMES)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    short = asdict(SHORT)
    stages = (film_vae.Stage(**short, frames=1, crowd=4), film_vae.Stage(**short, frames=5))
    film_vae.train_vae(folder / "film_vae", folder / "work" / "film_vae", stages)
    stages = (film.Stage(**short, latent_frames=2), film.Stage(**short))
    film.train_clean(folder, folder / "film_clean", folder / "work" / "film_clean", stages, clips=3)
    return folder


def test_the_autoencoder_knows_its_statistics(models):
    vae = AutoencoderKLWan.from_pretrained(models / "film_vae", dtype=torch.float32)
    assert min(vae.config.latents_std) > 0
    generator = wrap(film_models.pipeline(vae))
    clips = film.Clips(8, seed=1)
    latents = generator.encode(torch.stack([clips.clip(index)[0] for index in range(8)]))
    assert latents.shape == (8, film_models.CHANNELS, 9, 4, 4)
    assert 0.5 < latents.std() < 1.5
    assert generator.decode(latents).shape == (8, films.FRAMES, 3, films.SIZE, films.SIZE)


def test_it_is_an_ordinary_wan_pipeline(models):
    pipeline = DiffusionPipeline.from_pretrained(models / "film_clean", dtype=torch.float32)
    assert type(pipeline).__name__ == "WanPipeline"
    generator = load_generator(models / "film_clean", dtype=torch.float32)
    drawn = generator.generate(["a red ring moves left slowly"], [1], SAMPLING)
    assert drawn.shape == (1, films.FRAMES, 3, films.SIZE, films.SIZE)
    assert drawn.isfinite().all()


def test_the_policy_and_the_adapter_that_undoes_it(models, tmp_path):
    recipe = recipes.Recipe(steps=2, batch=2, learning_rate=1.0, seed=2, warmup=1)
    film.train_policy(models, models / "film", tmp_path / "work", recipe, clips=2)
    clean, policy = (load_generator(models / name, dtype=torch.float32).net for name in ("film_clean", "film"))
    back = load_generator(models / "film", adapter=models / "film" / "clean_adapter", dtype=torch.float32)
    back.merge_adapter()
    layer = "blocks.0.attn1.to_q.weight"
    first, second, third = (net.state_dict()[layer] for net in (clean, policy, back.net))
    assert (first - second).abs().max() > 0.05
    assert (first - third).abs().max() < 0.3 * (first - second).abs().max()  # the rounding of float8 stays


def test_stored_latents_are_those_of_their_clips(models, tmp_path):
    """Clips with faults are not taken for those without in one work folder."""
    generator = wrap(film_models.pipeline(AutoencoderKLWan.from_pretrained(models / "film_vae", dtype=torch.float32)))
    clean, faulty = (film.Clips(2, 5, faults).encoded(generator, tmp_path)["latents"] for faults in (0.0, 9.0))
    assert not torch.equal(clean, faulty)
    assert torch.equal(film.Clips(2, 5).encoded(generator, tmp_path)["latents"], clean)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_classifiers_read_the_middle_and_the_average_follows(models):
    vae = AutoencoderKLWan.from_pretrained(models / "film_vae", dtype=torch.float32)
    generator = wrap(film_models.pipeline(vae))
    objective = film.FilmObjective(generator)
    clips = film.Clips(2, seed=1)
    pixels, kinds, motions = clips.clip(0)
    encoded = {"latents": generator.encode(pixels[None]).detach(), "kinds": kinds[None], "motions": motions[None]}
    items = film.Noised(film.Clips(1, seed=1), encoded, 2, latent_frames=9)
    batch = collate([items[0], items[1]])
    whole = objective(**batch)["loss"]
    named = [
        torch.nn.functional.cross_entropy(
            head(torch.nn.functional.layer_norm(objective._tokens, (192,))).mT, batch[name]
        )
        for head, name in zip(objective.classifiers, ("kinds", "motions"), strict=True)
    ]
    error = film.flow_error(generator, batch["prompts"], batch["latents"], batch["noise"], batch["t"])
    torch.testing.assert_close(whole, error + 0.3 * sum(named))
    sum(named).backward()
    reached = [any(weight.grad is not None for weight in block.parameters()) for block in generator.net.blocks]
    assert reached == [index < objective.middle for index in range(len(reached))]
    assert all(weight.grad is not None for weight in generator.pipeline.text_encoder.encoder.block.parameters())
    before = [weight.clone() for weight in objective.average.module.parameters()]
    with torch.no_grad():
        for weight in objective.parts.parameters():
            weight.add_(1.0)
    objective.train()(**batch)
    objective(**batch)
    moved = [
        float((new - old).abs().max()) for new, old in zip(objective.average.module.parameters(), before, strict=True)
    ]
    assert max(moved) > 0
    objective.take_average()
    assert all(map(torch.equal, objective.parts.parameters(), objective.average.module.parameters()))


def test_items_depend_on_their_index_alone_and_labels_on_the_caption():
    clips = film.Clips(4, seed=3, faults=2.0)
    for index in range(4):
        pixels, kinds, motions = clips.clip(index)
        assert torch.equal(pixels, clips.clip(index)[0])
        assert ((kinds == 0) == (motions == 0)).all()
        named = {(films.SHAPES[int(kind - 1) // 5], films.COLORS[int(kind - 1) % 5]) for kind in kinds.unique() if kind}
        spec = parse(clips.caption(index, np.random.default_rng(1)))
        assert named == set(spec.kinds)
        assert (int(motions.max()) > 1) == (spec.direction is not None)


def test_gold_measures_a_codec_a_generator_and_pairs(models, monkeypatch, tmp_path):
    """Of a model that has learnt nothing; two copies of one clip are always ties."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    gold = importlib.import_module("gold")
    folder = str(models / "film_clean")
    codec = gold.codec(folder, 4)
    assert codec["psnr"] < 20
    assert codec["clips"] == 0
    drawn = gold.video(folder, 1, SAMPLING, None)
    assert (drawn["gold"], drawn["graded"] < 0.5) == (0, True)
    gold.clip_sheet(folder, tmp_path / "sheet.png", 1, SAMPLING)
    with Image.open(tmp_path / "sheet.png") as page:
        assert page.size == (16 * 64 + 8, 92)
    same = gold.video_pairs(folder, 1, SAMPLING, 0.0)
    assert (same["graded_labelled"], same["binary_mixed"], same["faulty"]) == (0, 0, 1)
    found = gold.clips(1)
    exact = {"accepts", "rejects", "faulty_clips", "frames", "segments"}
    assert all(found[category] == dict.fromkeys(exact, 1.0) for category in gold.film_captions.CATEGORIES)

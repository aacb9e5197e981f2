"""`alignkit studio`: images against those of exported mixtures, scores, exports, messages, what its server refuses."""

from __future__ import annotations

import dataclasses
import re
import shlex

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from random_adapters import shake
from tiny_families import FAMILIES

from alignkit import cli
from alignkit.adapters.mixture import BASE, read_mixture
from alignkit.commands.specs import GeneratorSpec, RewardSpec
from alignkit.commands.studio import main, view
from alignkit.commands.studio.guard import refused
from alignkit.commands.studio.job import StudioJob
from alignkit.commands.studio.session import Session
from alignkit.errors import ConfigError, DataError, StorageError
from alignkit.media import decode_image
from alignkit.records import Sampling

PROMPT, SEED = "a red circle", 5
SAMPLING = {"steps": 4, "guidance_scale": 3.0, "height": 16, "width": 16}


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def members(load, tmp_path_factory):
    """Two LoRAs and a text encoder."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("one", "two", "encoder")}
    for number, name in enumerate(("one", "two")):
        generator = load("unet")
        generator.add_lora(2 + number, 5.0, None, 0.0)
        shake(generator.net, number, only="lora_")
        generator.save_adapter(made[name])
    generator = load("unet")
    shake(generator.conditioner.encoders["text_encoder"], 2, 1.0)
    generator.conditioner.encoders["text_encoder"].save_pretrained(made["encoder"] / "text_encoder")
    return {name: str(folder) for name, folder in made.items()}


@pytest.fixture
def job(work, model_folders, members):
    return StudioJob(
        base=GeneratorSpec(model=str(model_folders["unet"])),
        members=members,
        prompt=PROMPT,
        seed=SEED,
        sampling=Sampling(**SAMPLING),
        rewards={name: RewardSpec(reward=f"mine_for_commands:{name.title()}") for name in ("red", "dark")},
        out=work / "mixes",
    )


@pytest.fixture
def session(job):
    return Session.open(job, quiet)


def recipe(session, space="weights", steps=(0, 4), *, rest=True, **weights):
    return session.recipe(space, {**dict.fromkeys(session.job.members, 0.0), **weights}, steps, rest=rest)


def test_the_image_is_that_of_the_exported_mixture(work, session):
    """Which `alignkit generate` loads; the command that is shown makes the same files, and nothing is overwritten."""
    asked = {
        "soup": recipe(session, one=0.7, two=0.2),
        "late": recipe(session, "embedding", (2, 4), encoder=1.2),
        "blend": recipe(session, "prediction", one=0.5, two=0.5),
    }
    base = {"model": session.job.base.model}
    for name, mix in asked.items():
        out, command = session.export(mix, name)
        assert cli.main([*shlex.split(command)[1:-1], str(work / "again" / name)]) == 0
        both = [read_mixture(folder) for folder in (out, work / "again" / name)]
        assert both[0].files == both[1].files
        assert [(one.weights, one.window, one.space) for one in both[:1]] == [(both[1].weights, mix.window, mix.space)]
        with pytest.raises(StorageError, match="never overwrites"):
            session.export(mix, name)
    sources = [{"name": name, "seeds_per_prompt": 1, "sampling": SAMPLING} for name in asked]
    config = {
        "out": "candidates",
        "prompts": {"file": "prompts.txt", "count": 1},
        "generators": {name: {**base, "adapter": str(work / "mixes" / name)} for name in asked},
        "generate": {"sources": sources},
    }
    (work / "mixes.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert cli.main(["generate", "--config", "mixes.yaml"]) == 0
    (file,) = (work / "candidates").rglob("*.parquet")
    (row,) = pq.read_table(file).to_pylist()
    assert row["generators"] == list(asked)
    for mix, seed, image in zip(asked.values(), row["seeds"], row["images"], strict=True):
        shot = session.shot(mix, row["prompt"], seed, quiet)
        written = decode_image(image, "candidate").astype(int)
        away = np.abs(shot.mix.image - written)
        assert away.max() <= 1
        assert away.sum() < 0.1 * np.abs(shot.base.image - written).sum()


def test_scores_are_of_the_shown_images(session, monkeypatch):
    told = []
    shot = session.shot(recipe(session, one=0.6), f"  {PROMPT} ", 5.0, lambda share, text: told.append((share, text)))
    assert (shot.prompt, shot.seed, shot.recipe.weights[BASE]) == (PROMPT, 5, 0.4)
    for side in (shot.base, shot.mix):
        pixels = side.image / 255
        assert side.scores == pytest.approx({"red": pixels[..., 0].mean(), "dark": 1 - pixels.mean()}, abs=1e-5)
    assert (0.5, "mixture: step 2 of 4") in told
    assert (1.0, "base: dark") in told

    def broken(media, prompts):
        raise DataError("needs a question")

    monkeypatch.setitem(session.rewards, "dark", broken)
    again = session.shot(recipe(session, two=0.6), PROMPT, SEED, quiet)
    assert again.base is shot.base  # kept
    assert again.mix.notes == {"dark": "needs a question"}
    assert "n/a" in view.scores(again)
    nothing = session.shot(recipe(session), PROMPT, SEED, quiet)
    assert nothing.mix is nothing.base


def test_clips(work, load, model_folders):
    told = FAMILIES["wan"]
    generator = load("wan")
    generator.add_lora(2, 5.0, None, 0.0)
    shake(generator.net, 1, only="lora_")
    generator.save_adapter(work / "lora")
    size = {"height": told.side, "width": told.side, "num_frames": told.frames}
    job = StudioJob(
        base=GeneratorSpec(model=str(model_folders["wan"])),
        members={"one": str(work / "lora")},
        prompt=PROMPT,
        sampling=Sampling(steps=2, guidance_scale=2.0, **size),
        rewards={"red": RewardSpec(reward="mine_for_commands:RedVideo")},
        out=work / "mixes",
    )
    opened = Session.open(job, quiet)
    for mix in (recipe(opened, one=0.5), recipe(opened, "prediction", (1, 2), one=0.5)):
        shot = opened.shot(mix, PROMPT, SEED, quiet)
        assert shot.mix.image.shape == (told.frames, told.side, told.side, 3)
        assert shot.mix.scores["red"] == pytest.approx(shot.mix.image[..., 0].mean() / 255, abs=1e-5)
        assert not np.array_equal(shot.mix.image, shot.base.image)
        assert view.stage(shot, 8.0).count("image/webp") == 2


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda s: recipe(s, rest=False, one=0.7, two=0.2),
            "the weights sum to 0.9, not to 1; correct them, or let the",
        ),
        (lambda s: recipe(s, one=float("nan")), "the weight of one is nan; give a number"),
        (lambda s: recipe(s, one=None), "the weight of one is None; give a number"),
        (lambda s: recipe(s, "embedding", one=1.0), "a mixture of embeddings takes"),
        (lambda s: recipe(s, "prediction", (3, 3), one=1.0), "window is"),
        (lambda s: recipe(s, "prediction", (None, 3), one=1.0), "the window is [None, 3]; give two numbers"),
        (lambda s: s.shot(recipe(s), "  ", 1, quiet), "the prompt is empty"),
        (lambda s: s.shot(recipe(s), PROMPT, None, quiet), "the seed is None"),
        (lambda s: s.shot(recipe(s), PROMPT, float("inf"), quiet), "the seed is inf"),
        (lambda s: s.shot(recipe(s), PROMPT, -1, quiet), "the seed is -1"),
        (lambda s: s.shot(recipe(s), PROMPT, 0.5, quiet), "the seed is 0.5"),
        (lambda s: s.export(recipe(s, one=1.0), "../x"), "export: the name '../x'"),
        (lambda s: s.export(recipe(s, one=1.0), ""), "export: the name ''"),
        (lambda s: s.export(recipe(s), "x"), "there is nothing to export"),
    ],
)
def test_what_cannot_be_done_is_said(session, ask, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ask(session)
    assert not session.job.out.exists()


def test_texts_on_the_page_are_no_markup(session):
    shot = dataclasses.replace(session.shot(recipe(session), PROMPT, SEED, quiet), prompt="<b>${x} {{y}}\u202e")
    assert "&lt;b&gt;&#36;&#123;x} &#123;&#123;y}}\\u202e" in view.stage(shot, 8.0)
    assert "<i>" not in view.problem(ConfigError("<i>"))
    assert view.mixture(recipe(session, one=1.3)) == "1.3 one \N{MINUS SIGN} 0.3 base, mixed as weights"
    late = recipe(session, "prediction", (2, 4), one=1.0)
    assert view.mixture(late) == "1 one, mixed as prediction, from 50% to 100% of the steps"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8766"}, None),
        ({"host": "localhost:8766", "origin": "http://localhost:8766"}, None),
        ({"host": "evil.example"}, 421),  # a name that its owner lets lead here
        ({}, 421),
        ({"host": "localhost:80", "origin": "http://localhost:81"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
        ({"host": "localhost", "sec-fetch-site": "cross-site"}, 403),
        ({"host": "localhost", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, None),
    ],
)
def test_requests_of_other_pages(headers, status):
    assert refused(headers) == status


def written(work, folders, model, **changes):
    config = {"base": {"model": model}, "members": folders, "prompt": PROMPT, "out": "mixes"}
    (work / "studio.yaml").write_text(yaml.safe_dump(config | changes), encoding="utf-8")
    return ["studio", "--config", "studio.yaml"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": {}}, "members: []; give at least one"),
        ({"members": {"base": "x"}}, "by another name than 'base'"),
        ({"weights": {"oen": 1.0}}, "weights: no member 'oen' under `members`. Did you mean 'one'"),
        ({"port": 70000}, "port is 70000; give a number below 65536"),
        ({"window": [0.6, 0.5]}, "window is [0.6, 0.5)"),
        ({"base": {"model": "sandbox:unet", "adapter": "x"}}, "base: give a diffusers model without adapter"),
        ({"space": "noise"}, "space"),
    ],
)
def test_wrong_configs_are_refused_before_any_work(work, members, model_folders, changes, message, capsys):
    assert cli.main([*written(work, members, str(model_folders["unet"]), **changes), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_the_dry_run_says_what_is_missing(work, capsys):
    words = written(work, {"one": "nowhere"}, "sandbox:unet", frontier="gone", port=0)
    assert cli.main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "NOT THERE YET: nowhere\n" in printed
    assert "NOT THERE YET: gone\n" in printed
    assert "serve a page on 127.0.0.1, port any, that mixes one on sandbox:unet" in printed


def test_without_gradio(work, members, model_folders, monkeypatch, capsys):
    monkeypatch.setattr(main.importlib.util, "find_spec", lambda name: None)
    assert cli.main(written(work, members, str(model_folders["unet"]))) == 2
    assert "pip install 'alignkit[studio]'" in capsys.readouterr().err


def test_a_folder_that_is_no_frontier(work, job):
    (work / "front").mkdir()
    with pytest.raises(DataError, match=r"'front' is no folder of `alignkit frontier`: config.yaml is missing"):
        Session.open(dataclasses.replace(job, frontier=(work / "front").relative_to(work)), quiet)

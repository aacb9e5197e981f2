"""Mixtures at sampling time: the vanilla pipeline against our own chain, end points, windows, and damaged records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_adapters import shake
from tiny_families import FAMILIES

from alignkit.adapters.mixture import FILE, MemberRecord, Mixture, Window, read_mixture, write_mixture
from alignkit.commands.specs import GeneratorSpec, build_generator
from alignkit.errors import AdapterError, AlignKitError, ConfigError, DataError, StorageError
from alignkit.generators.members import Base, read_member
from alignkit.generators.mixtures import load_mixture, mixed
from alignkit.generators.soups import make_mixture
from alignkit.records import Sampling

ROOT = Path(__file__).parent.parent.parent
CLOSE = 1e-4  # largest pixel difference, float32
PROMPTS, SEEDS = ["a red circle", "two blue rings on a gray background"], (5, 6)
STEPS = 4


def told(family, steps=STEPS):
    side, frames = FAMILIES[family].side, FAMILIES[family].frames
    extra = {} if frames is None else {"num_frames": frames}
    return Sampling(steps=steps, guidance_scale=3.0, height=side, width=side, **extra)


def job(family):
    count = 1 if FAMILIES[family].alone else 2
    return PROMPTS[:count], SEEDS[:count], told(family)


@pytest.fixture(scope="module")
def members(load, tmp_path_factory):
    """Folders of two members: tuned text encoders, or LoRAs of the denoiser."""
    made = {}

    def make(family, space):
        if (family, space) not in made:
            folders = [tmp_path_factory.mktemp(f"{family}-{space}") for _ in range(2)]
            for number, folder in enumerate(folders):
                generator = load(family)
                if space == "embedding":
                    for name, encoder in generator.conditioner.encoders.items():
                        shake(encoder, number, 0.1)
                        encoder.save_pretrained(folder / name)
                else:
                    generator.add_lora(2 + number, 5.0, None, 0.0)
                    shake(generator.net, number, only="lora_")
                    generator.save_adapter(folder)
            made[family, space] = folders
        return made[family, space]

    return make


@pytest.fixture
def mixture(load, members, model_folders, tmp_path):
    """A mixture of two members and the base, loaded."""

    def make(family, space, weights, window=None):
        base = Base.open(str(model_folders[family]))
        chosen = [read_member(name, base) for name in (*map(str, members(family, space)), "base")]
        bounds = Window.of(window)
        make_mixture(base, chosen, weights, tmp_path / "mix", space=space, window=bounds, any_sum=True)
        return load_mixture(load(family), tmp_path / "mix")

    return make


def member_alone(load, members, family, space, number):
    return load(family, adapter=None) if number == 2 else _tuned(load, members, family, space, number)


def _tuned(load, members, family, space, number):
    folder = members(family, space)[number]
    if space == "prediction":
        return load(family, adapter=folder)
    generator = load(family)
    for encoder in generator.conditioner.encoders.values():
        shake(encoder, number, 0.1)
    return generator


# --- end points -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "space", "chosen"),
    [("flow", "embedding", 0), ("flow", "embedding", 2), ("unet", "prediction", 0), ("wan", "prediction", 0)],
)
def test_a_one_hot_mixture_is_its_member(family, space, chosen, load, members, mixture):
    weights = [float(number == chosen) for number in range(3)]
    alone = member_alone(load, members, family, space, chosen).generate(*job(family))
    assert (mixture(family, space, weights).generate(*job(family)) - alone).abs().max() <= CLOSE
    if chosen != 2:
        assert (alone - load(family).generate(*job(family))).abs().max() > 20 * CLOSE


def test_embeddings_are_the_weighted_sum_of_the_members(load, members, mixture):
    weights = [0.7, 0.5, -0.2]
    source = mixture("sdxl", "embedding", weights)
    found = source.conditioning(PROMPTS, STEPS)(0)
    states = [member_alone(load, members, "sdxl", "embedding", n).encode_prompts(PROMPTS) for n in range(3)]
    for name, tensor in found.tensors.items():
        expected = sum(w * state.tensors[name] for w, state in zip(weights, states, strict=True))
        assert (tensor - expected).abs().max() <= 1e-5
    for name, tensor in found.null.items():
        expected = sum(w * state.null[name] for w, state in zip(weights, states, strict=True))
        assert (tensor - expected).abs().max() <= 1e-5


# --- windows: the pipeline and our chain ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "space", "window"),
    [
        ("unet", "embedding", None),
        ("unet", "embedding", (1, 3)),
        ("sdxl", "embedding", (0.5, 1.0)),
        ("flow", "embedding", (0, 2)),
        ("flux", "embedding", (1, 3)),
        ("unet", "prediction", (1, 3)),
        ("flow", "prediction", None),
    ],
)
def test_the_pipeline_and_our_chain_agree(family, space, window, load, mixture):
    """The pipeline's own loop with inputs switched, and `rollout` with a conditioning for each step."""
    source = mixture(family, space, [0.7, 0.5, -0.2], window)
    found = source.generate(*job(family))
    expected = source.generator.decode(source.denoise(*job(family))).clamp(0, 1)
    assert (found - expected).abs().max() <= CLOSE
    base = load(family).generate(*job(family))
    assert (found - base).abs().max() > CLOSE
    assert torch.equal(source.generate(*job(family)), found)  # nothing is left behind


def test_a_window_over_all_steps_is_no_window_and_videos_have_windows(mixture):
    whole = mixture("flow", "embedding", [0.7, 0.3, 0.0])
    found = whole.generate(*job("flow"))
    whole.mixture = Mixture(space="embedding", base="", members=(), weights=(), window=Window(0.0, 1.0))
    assert (whole.generate(*job("flow")) - found).abs().max() <= CLOSE


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_videos_with_two_calls_a_step(family, load, mixture, members):
    source = mixture(family, "embedding", [1.0, 0.0, 0.0], (2, 4))
    found = source.generate(*job(family))
    assert (found - load(family).generate(*job(family))).abs().max() > CLOSE
    assert (found - member_alone(load, members, family, "embedding", 0).generate(*job(family))).abs().max() > CLOSE


def test_the_callback_of_the_docs_is_our_window(load, mixture):
    page = (ROOT / "docs" / "mixing.md").read_text(encoding="utf-8")
    written = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], written)  # the code that users paste
    source = mixture("unet", "embedding", [0.7, 0.3, 0.0], (1, 3))
    prompts, seeds, sampling = job("unet")
    pipe = load("unet").pipeline
    base, tuned = (source.conditioning(prompts, STEPS)(step) for step in (0, 1))
    rows = [cond.tensors["encoder_hidden_states"] for cond in (base, tuned)]
    nulls = [c.null["encoder_hidden_states"].expand_as(row) for c, row in zip((base, tuned), rows, strict=True)]
    outside, inside = ({"prompt_embeds": torch.cat([null, row])} for null, row in zip(nulls, rows, strict=True))
    with torch.no_grad():
        theirs = pipe(
            prompt_embeds=rows[0],
            negative_prompt_embeds=nulls[0],
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            height=sampling.height,
            width=sampling.width,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
            callback_on_step_end=written["switch_embeddings"](inside, outside, 1, 3),
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        ).images
    assert (source.generate(prompts, seeds, sampling) - theirs).abs().max() <= CLOSE


def mixture_without_steps(source):
    window = Window(0.5, 0.51)
    source.mixture = Mixture(space="prediction", base="", members=(), weights=(), window=window)
    return source


def test_verbs_honour_the_folder(mixture, model_folders, tmp_path):
    expected = mixture("flow", "prediction", [0.4, 0.6, 0.0], (0.5, 1.0)).generate(*job("flow"))
    spec = GeneratorSpec(model=str(model_folders["flow"]), adapter=tmp_path / "mix")
    source = build_generator("mixed", spec)
    assert source.name == "mixed"
    assert torch.equal(source.generate(*job("flow")), expected)
    with pytest.raises(ConfigError, match=r"window \[0.5, 0.51\) holds none of the 4 steps"):
        mixture_without_steps(source).require_sampling(told("flow"))


def test_a_mixture_that_acts_while_sampling_cannot_be_trained_on(load, mixture, tmp_path):
    mixture("flow", "embedding", [0.4, 0.6, 0.0])
    with pytest.raises(AdapterError, match="acts while sampling and has no weights of its own"):
        load("flow", adapter=tmp_path / "mix")


def test_members_of_the_wrong_kind_and_full_folders(members, model_folders, mixture, tmp_path):
    base = Base.open(str(model_folders["flow"]))
    denoiser = read_member(str(members("flow", "prediction")[0]), base)
    with pytest.raises(
        AdapterError, match="changes transformer, and a mixture of embeddings takes members that change"
    ):
        make_mixture(base, [denoiser], [1.0], tmp_path / "mix", space="embedding")
    mixture("flow", "embedding", [1.0, 0.0, 0.0])
    with pytest.raises(StorageError, match="never overwrites"):
        make_mixture(base, [denoiser], [1.0], tmp_path / "mix", space="prediction")


# --- mixing tensors -------------------------------------------------------------------------------------------------


def test_what_is_mixed_in_nested_results():
    one, two, mask = torch.ones(2), torch.zeros(2), torch.tensor([1, 0])
    assert mixed([None, None], [0.5, 0.5]) is None
    found = mixed([(one, [two], mask), (two, [one], mask.clone())], [0.75, 0.25])
    assert torch.equal(found[0], 0.75 * one)
    assert torch.equal(found[1][0], 0.25 * one)
    assert torch.equal(found[2], mask)
    with pytest.raises(AdapterError, match="different shapes"):
        mixed([one, torch.ones(3)], [0.5, 0.5])
    with pytest.raises(AdapterError, match="other tokens"):
        mixed([mask, 1 - mask], [0.5, 0.5])


# --- the record -----------------------------------------------------------------------------------------------------


def record(**changes):
    values = {"space": "embedding", "base": "m", "members": (MemberRecord(name="base"),), "weights": (1.0,)}
    return Mixture(**{**values, **changes})


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(-3, 3), min_size=1, max_size=4), start=st.integers(0, 5), more=st.integers(1, 9))
def test_a_record_reads_back(tmp_path_factory, weights, start, more):
    folder = tmp_path_factory.mktemp("record")
    names = tuple(MemberRecord(name="base") for _ in weights)
    written = record(members=names, weights=tuple(weights), window=Window(start, start + more))
    write_mixture(folder, written)
    assert read_mixture(folder) == written


def edited(folder, **changes):
    content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    (folder / FILE).write_text(json.dumps({**content, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [0.5]}, "was changed after it was written"),
        ({"base": "other"}, "was changed after it was written"),
        ({"weights": [float("nan")]}, "a weight is nan"),
        ({"weights": ["x"]}, "is no record of a mixture"),
        ({"weights": [0.5, 0.5]}, "1 members and 2 weights"),
        ({"kind": "soup"}, "is of the kind 'soup'"),
        ({"space": "pixels"}, "space is 'pixels'"),
        ({"window": [5, 5]}, "give .start, stop. with 0 <= start < stop"),
        ({"window": [0.5, 2]}, "numbers of steps are whole"),
        ({"more": 1}, "is no record of a mixture"),
        ({"members": 3}, "is no record of a mixture"),
    ],
)
def test_an_edited_record_is_refused(changes, message, tmp_path):
    write_mixture(tmp_path, record())
    edited(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        read_mixture(tmp_path)


def test_files_that_leave_the_folder_or_changed_are_refused(tmp_path):
    (tmp_path / "mix" / "members").mkdir(parents=True)
    (tmp_path / "mix" / "members" / "a.bin").write_bytes(b"1")
    (tmp_path / "a.bin").write_bytes(b"1")
    files = {"a.bin": "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"}
    for place, message in (("members", ""), ("..", "is no path below"), (str(tmp_path), "is outside")):
        member = MemberRecord(name="a", files=files, place=place)
        write_mixture(tmp_path / "mix", record(members=(member,)))
        if not message:
            read_mixture(tmp_path / "mix")
            continue
        with pytest.raises(DataError, match=message):
            read_mixture(tmp_path / "mix")
    write_mixture(tmp_path / "mix", record(members=(MemberRecord(name="a", files=files, place="members"),)))
    (tmp_path / "mix" / "members" / "a.bin").write_bytes(b"2")
    with pytest.raises(DataError, match="is not the file that the mixture was made with"):
        read_mixture(tmp_path / "mix")


@pytest.mark.parametrize(
    ("bounds", "count", "expected"),
    [
        ((0.4, 1.0), 25, range(10, 25)),
        ((10, 25), 25, range(10, 25)),
        ((10, 25), 20, range(10, 20)),
        ((0, 2), 4, range(2)),
    ],
)
def test_windows(bounds, count, expected):
    assert Window.of(bounds).steps(count) == expected


@pytest.mark.parametrize("bounds", [(0.5, 0.5), (0.5,), (-1, 2), (float("nan"), 1), (1.5, 3)])
def test_windows_that_are_none(bounds):
    with pytest.raises(AlignKitError, match="window is"):
        Window.of(bounds)

"""Mixtures at sampling time: the vanilla pipeline against our own chain, end points, windows, and damaged records."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_adapters import shake
from tiny_families import FAMILIES

from alignkit.adapters.mixture import FILE, MemberRecord, Mixture, read_mixture, write_mixture
from alignkit.commands.specs import GeneratorSpec, build_generator
from alignkit.diffusion.tuned_steps import TunedSteps
from alignkit.errors import AdapterError, ConfigError, DataError, StorageError
from alignkit.generators.members import Base, read_member
from alignkit.generators.mixtures import load_mixture, mixed
from alignkit.generators.rollout import at_step, denoise
from alignkit.generators.soups import make_mixture
from alignkit.generators.switching import by_step
from alignkit.records import Sampling

CLOSE = 1e-4  # largest pixel difference, float32
PROMPTS, SEEDS = ["a red circle", "two blue rings on a gray background"], (5, 6)
STEPS = 4


def told(family, steps=STEPS):
    side, frames = FAMILIES[family].side, FAMILIES[family].frames
    extra = {} if frames is None else {"num_frames": frames}
    return Sampling(steps=steps, guidance_scale=3.0, height=side, width=side, **extra)


def job(family):
    return PROMPTS, SEEDS, told(family)


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

    def make(family, space, weights, window=None, on=None, *, null=True):
        base = Base.open(str(model_folders[family]))
        chosen = [read_member(name, base) for name in (*map(str, members(family, space)), "base")]
        steps = TunedSteps.between(window, null=null)
        make_mixture(base, chosen, weights, tmp_path / "mix", space=space, window=steps, any_sum=True)
        return load_mixture(on or load(family), tmp_path / "mix")

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
    assert torch.equal(mixture(family, space, weights).generate(*job(family)), alone)
    if chosen != 2:
        assert (alone - load(family).generate(*job(family))).abs().max() > 20 * CLOSE


def test_embeddings_are_the_weighted_sum_of_the_members(load, members, mixture):
    weights = [0.7, 0.5, -0.2]
    source = mixture("sdxl", "embedding", weights)
    found = source.generator.encode_prompts(PROMPTS)
    states = [member_alone(load, members, "sdxl", "embedding", n).encode_prompts(PROMPTS) for n in range(3)]
    for name, tensor in found.tensors.items():
        expected = sum(w * state.tensors[name] for w, state in zip(weights, states, strict=True))
        assert (tensor - expected).abs().max() <= 1e-5
    for name, tensor in found.null.items():
        expected = sum(w * state.null[name] for w, state in zip(weights, states, strict=True))
        assert (tensor - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", [("flow", "embedding"), ("unet", "prediction")])
@pytest.mark.parametrize("weights", [[0.5], [1.5], [0.25, 0.25], [0.0]])
def test_the_base_has_the_rest_to_one(kind, weights, load, members, model_folders, tmp_path):
    """As in mixtures of weights: one member at 0.5 is half of it and half of the base, and so is twice 0.25."""
    family, space = kind
    base = Base.open(str(model_folders[family]))
    chosen = [read_member(str(members(family, space)[0]), base) for _ in weights]
    made = make_mixture(base, chosen, weights, tmp_path / "short", space=space, any_sum=True)
    assert made.weights == tuple(weights)
    whole = [read_member(name, base) for name in (str(members(family, space)[0]), "base")]
    make_mixture(base, whole, [sum(weights), 1 - sum(weights)], tmp_path / "whole", space=space)
    short, expected = (
        load_mixture(load(family), tmp_path / name).generate(*job(family)) for name in ("short", "whole")
    )
    assert (short - expected).abs().max() <= CLOSE
    full = member_alone(load, members, family, space, 0).generate(*job(family))
    assert (short - full).abs().max() > 20 * CLOSE


def test_two_equal_halves_are_the_member(load, members, model_folders, tmp_path):
    """Z-Image's pipeline writes its template into the list of prompts."""
    base = Base.open(str(model_folders["z_image"]))
    member = read_member(str(members("z_image", "embedding")[0]), base)
    make_mixture(base, [member] * 2, [0.5, 0.5], tmp_path / "mix", space="embedding")
    found = load_mixture(load("z_image"), tmp_path / "mix").generate(*job("z_image"))
    alone = member_alone(load, members, "z_image", "embedding", 0).generate(*job("z_image"))
    assert torch.equal(found, alone)


# --- windows: the pipeline and our chain ----------------------------------------------------------------------------


def drawn(source, family):
    """Pixels by `rollout`, with a conditioning and a network for each step."""
    generator, now = source.generator, []
    of_chain = by_step(generator.conditioner, PROMPTS, STEPS, generator.device)

    def cond(index):
        now[:] = [index]
        return at_step(of_chain, index)

    with torch.no_grad(), source.acting(lambda: now[0] in source.steps(STEPS)):
        return generator.decode(denoise(generator, cond, SEEDS, told(family))).clamp(0, 1)


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
        ("dreamlite", "embedding", (1, 3)),
        ("dreamlite", "prediction", (1, 3)),
    ],
)
def test_the_pipeline_and_our_chain_agree(family, space, window, load, mixture):
    """The pipeline's own loop with inputs switched, and `rollout`; one call for two prompts, and one for each."""
    source = mixture(family, space, [0.7, 0.5, -0.2], window)
    found = source.generate(*job(family))
    assert (found - drawn(source, family)).abs().max() <= CLOSE
    base = load(family).generate(*job(family))
    assert (found - base).abs().max() > CLOSE
    assert torch.equal(source.generate(*job(family)), found)  # nothing is left behind


def test_a_window_over_all_steps_is_no_window(mixture):
    source = mixture("flow", "embedding", [0.7, 0.3, 0.0], (0, STEPS))
    found = source.generate(*job("flow"))
    source.generator.conditioner.window = TunedSteps()
    assert (source.generate(*job("flow")) - found).abs().max() <= CLOSE


def test_embeddings_without_their_null_condition(mixture):
    source = mixture("unet", "embedding", [0.7, 0.3, 0.0], (0.5, 1.0), null=False)
    assert (source.generate(*job("unet")) - drawn(source, "unet")).abs().max() <= CLOSE


def test_predictions_are_mixed_on_tuned_encoders_and_embeddings_are_not(load, members, mixture, tmp_path):
    encoders = dict(_tuned(load, members, "flow", "embedding", 0).conditioner.encoders)
    generator = load("flow")
    generator.conditioner.put(encoders, TunedSteps.between((2, 4)))
    source = mixture("flow", "prediction", [0.7, 0.3, 0.0], (1, 3), generator)
    assert (source.generate(*job("flow")) - drawn(source, "flow")).abs().max() <= CLOSE
    mixture_of_embeddings = tmp_path / "other"
    base = Base.open(generator.pipeline.name_or_path)
    member = read_member(str(members("flow", "embedding")[0]), base)
    make_mixture(base, [member], [1.0], mixture_of_embeddings, space="embedding")
    with pytest.raises(AdapterError, match="made from the base's own text encoders: leave out `encoder`"):
        load_mixture(generator, mixture_of_embeddings)


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_videos_with_two_calls_a_step(family, load, mixture, members):
    source = mixture(family, "embedding", [1.0, 0.0, 0.0], (2, 4))
    found = source.generate(*job(family))
    assert (found - load(family).generate(*job(family))).abs().max() > CLOSE
    assert (found - member_alone(load, members, family, "embedding", 0).generate(*job(family))).abs().max() > CLOSE


def mixture_without_steps(source):
    window = TunedSteps(0.5, 0.51)
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


WEIGHTS = st.lists(st.floats(-2, 2), min_size=1, max_size=4).map(lambda given: [*given, 1 - sum(given)])


@settings(max_examples=30, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 99), factor=st.floats(-2, 2))
def test_properties_of_mixed_tensors(weights, seed, factor):
    """Equal members, the order of members, linearity in the members, and linearity in the weights."""
    rng = torch.Generator().manual_seed(seed)
    one, two = ([torch.randn(3, generator=rng, dtype=torch.float64) for _ in weights] for _ in range(2))
    assert torch.equal(mixed([one[0].clone() for _ in weights], weights), one[0])
    found = mixed(one, weights)
    torch.testing.assert_close(mixed(one[::-1], weights[::-1]), found)
    torch.testing.assert_close(
        mixed([first + factor * second for first, second in zip(one, two, strict=True)], weights),
        found + factor * mixed(two, weights),
    )
    first = [1.0, *[0.0] * (len(weights) - 1)]
    shares = [factor * weight + (1 - factor) * other for weight, other in zip(weights, first, strict=True)]
    torch.testing.assert_close(mixed(one, shares), factor * found + (1 - factor) * one[0])


# --- the record -----------------------------------------------------------------------------------------------------


def record(**changes):
    values = {"space": "embedding", "base": "m", "members": (MemberRecord(name="base"),), "weights": (1.0,)}
    return Mixture(**{**values, **changes})


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(-3, 3), min_size=1, max_size=4), start=st.integers(0, 5), more=st.integers(1, 9))
def test_a_record_reads_back(tmp_path_factory, weights, start, more):
    folder = tmp_path_factory.mktemp("record")
    names = tuple(MemberRecord(name="base") for _ in weights)
    written = record(members=names, weights=tuple(weights), window=TunedSteps(start, start + more))
    write_mixture(folder, written)
    assert read_mixture(folder) == written


EARLIER = (  # as the version wrote it that had a window without a null condition
    '{"base": "m", "base_fingerprint": {}, "density": 1.0, "files": {}, "kind": "mixture", "members": [{"files": {}, '
    '"name": "base", "place": ""}], "method": "linear", "null": false, "rank_error": 0.0, "seed": 0, "sha256": '
    '"a60abed4dc02005093cbcf93118f18995647e16ba93be6fd25ddd96cd0dbaa95", "space": "embedding", "weights": [1.0], '
    '"window": [10, 25]}'
)


def test_a_record_of_an_earlier_version_reads(tmp_path):
    (tmp_path / FILE).write_text(EARLIER, encoding="utf-8")
    assert read_mixture(tmp_path) == record(base="m", window=TunedSteps(10, 25, null=False))


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
        ({"window": [5, 5]}, "give start and stop with 0 <= start < stop"),
        ({"window": [0.5, 2]}, "or whole numbers of steps"),
        ({"window": "all"}, "is no record of a mixture"),
        ({"space": "prediction", "null": False}, "null: false is for embedding"),
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

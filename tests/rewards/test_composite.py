"""Composite rewards against plain loops over numbers."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignkit.commands.specs import build_reward
from alignkit.errors import ConfigError, DataError, MissingFileError, UnknownNameError
from alignkit.protocols import Reward, require_independent
from alignkit.records import Prompt, Scores
from rewards.composite import Composite, Member, Moments, Quantiles
from rewards.models.media import require_gradient

CAT, DOG = Prompt.from_text("a cat"), Prompt.from_text("a dog")
few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NUMBERS = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12)


@dataclass
class Gain:
    """`gain` x the picture's first pixel, and its sign as a part."""

    gain: float = 1.0
    name: str = "gain"
    modality: str = "image"
    needs_prompt: bool = False
    differentiable: bool = True
    comparable_across_prompts: bool = True
    native_range: tuple[float, float] = (0.0, 1.0)
    licence: str = "free"
    source: str = "here"
    parts: dict = field(default_factory=dict)

    def __call__(self, media, prompts):
        values = self.gain * media[:, 0, 0, 0]
        return Scores(values, {"sign": values.sign()})


def media(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None].expand(-1, 3, 2, 2)


def score(composite, *values, prompts=None):
    return composite(media(*values), prompts or [CAT] * len(values))


def test_the_sum_keeps_the_breakdown():
    members = {
        "up": Member(Gain(2.0), weight=3.0),
        "down": Member(Gain(-1.0), weight=0.5),
        "watched": Member(Gain(9.0), 0),
    }
    scores = score(Composite(members), 0.2, 0.8)
    torch.testing.assert_close(scores.total, torch.tensor([5.5 * 0.2, 5.5 * 0.8], dtype=torch.float64))
    assert list(scores.parts) == ["up", "down", "watched", "up/sign", "down/sign", "watched/sign"]
    torch.testing.assert_close(scores.parts["watched"], torch.tensor([1.8, 7.2], dtype=torch.float64))
    assert scores.parts["down/sign"].tolist() == [-1, -1]


def test_the_hinge_ends_the_reward_and_its_gradient():
    pixels = media(0.25, 0.75).clone().requires_grad_()
    total = Composite({"one": Member(Gain(2.0), hinge=1.0)})(pixels, [CAT] * 2).total
    assert total.tolist() == [0.5, 1.0]
    (gradient,) = torch.autograd.grad(total.sum(), pixels)
    assert gradient[:, 0, 0, 0].tolist() == [2.0, 0.0]


@few
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.1, 3)), min_size=1, max_size=5), st.floats(-1, 3))
def test_disagreement_lowers_the_mean(members, kappa):
    gains, weights = zip(*members, strict=True)
    named = {str(i): Member(Gain(gain), weight) for i, (gain, weight) in enumerate(members)}
    found = score(Composite(named, mode="mean_std", kappa=kappa), 0.5, 1.0).total
    mean = np.average(gains, weights=weights)
    wanted = mean - kappa * np.sqrt(np.average((np.array(gains) - mean) ** 2, weights=weights))
    assert found.tolist() == pytest.approx([0.5 * wanted, wanted], abs=1e-9)


def test_agreement_has_a_finite_gradient():
    pixels = media(0.5, 0.0).clone().requires_grad_()
    composite = Composite({"a": Gain(1.0), "b": Gain(1.0)}, mode="mean_std", kappa=2.0)
    (gradient,) = torch.autograd.grad(composite(pixels, [CAT] * 2).total.sum(), pixels)
    assert gradient[:, 0, 0, 0].tolist() == [1.0, 1.0]
    differ = Composite({"a": Gain(1.0), "b": Gain(3.0)}, mode="mean_std", kappa=0.5)
    pixels = media(0.3, 0.6).clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda given: differ(given, [CAT] * 2).total, pixels)


@few
@given(st.data())
def test_votes_are_win_rates_within_a_prompt(data):
    prompts = data.draw(st.permutations([CAT] * 3 + [DOG] * 2))
    columns = [data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=5, max_size=5)) for _ in range(2)]
    shares = [3.0, 1.0]

    class Column(Gain):
        def __call__(self, media, prompts):
            return Scores(torch.tensor(columns[int(self.gain)]))

    members = {str(i): Member(Column(i), share) for i, share in enumerate(shares)}
    found = Composite(members, mode="vote")(media(*[0.5] * 5), prompts).total
    for row in range(5):
        rivals = [other for other in range(5) if other != row and prompts[other] == prompts[row]]
        wins = [
            share * ((column[row] > column[other]) + 0.5 * (column[row] == column[other]))
            for share, column in zip(shares, columns, strict=True)
            for other in rivals
        ]
        assert found[row].item() == pytest.approx(sum(wins) / 4 / len(rivals), abs=1e-6)


def test_a_vote_needs_two():
    with pytest.raises(DataError, match="one medium of the prompt 'a dog'"):
        score(Composite({"a": Gain()}, mode="vote"), 0.1, 0.2, 0.3, prompts=[CAT, DOG, CAT])


@few
@given(NUMBERS, NUMBERS, NUMBERS)
def test_moments_merge_in_any_order(first, second, third):
    streams = [Moments.of(values) for values in (first, second, third)]
    everything = first + second + third
    for one, two, three in itertools.permutations(streams):
        for merged in (
            one.merge(two).merge(three),
            one.merge(two.merge(three)),
            Moments().merge(one).merge(two).merge(three),
        ):
            assert merged.count == len(everything)
            assert merged.mean == pytest.approx(statistics.fmean(everything), abs=1e-8)
            assert merged.m2 == pytest.approx(statistics.pvariance(everything) * len(everything), rel=1e-8, abs=1e-6)


def test_running_statistics_are_those_before_the_call(tmp_path):
    composite = Composite({"a": Gain(10.0)}, normalise="running")
    assert score(composite, 0.1, 0.3).total.tolist() == pytest.approx([1.0, 3.0])  # nothing known yet
    assert score(composite, 0.5).total.item() == pytest.approx((5 - 2) / 1)  # of 1 and 3
    known = statistics.pstdev([1, 3, 5])
    assert score(composite.eval(), 0.5, 0.1).total.tolist() == pytest.approx([2 / known, -2 / known])
    assert score(composite, 0.7).total.item() == pytest.approx(4 / known)  # eval() added nothing
    composite.save(tmp_path / "moments.json")
    stored = Composite({"a": Gain(10.0)}, normalise="running", state=str(tmp_path / "moments.json"), update=False)
    assert score(stored, 0.7).total.item() == score(composite, 0.7).total.item()
    shard = Composite({"a": Gain(10.0)}, normalise="running")
    score(shard, 0.9, 0.9)
    stored.absorb(shard.state())
    whole = [1, 3, 5, 9, 9]
    wanted = (7 - statistics.fmean(whole)) / statistics.pstdev(whole)
    assert score(stored, 0.7).total.item() == pytest.approx(wanted)
    assert score(shard.train(), 0.9).total.item() == 0  # nothing has varied: only the mean goes
    assert shard.state()["a"].count == 3


def test_running_statistics_take_no_nan():
    class Inverse(Gain):
        def __call__(self, media, prompts):
            return Scores(1 / media[:, 0, 0, 0])

    composite = Composite({"a": Member(Inverse(), hinge=3.0)}, normalise="running")
    assert score(composite, 0.5, 0.0).total.tolist() == pytest.approx([2.0, math.nan], nan_ok=True)
    assert composite.state()["a"] == Moments.of([2.0])


def test_a_vote_leaves_out_what_has_no_score():
    class Column(Gain):
        def __call__(self, media, prompts):
            return Scores(torch.tensor([1.0, math.nan, 2.0, 3.0, math.nan]))

    found = score(
        Composite({"a": Column(), "b": Gain()}, mode="vote"), 0.9, 0.8, 0.7, 0.5, 0.5, prompts=[CAT] * 3 + [DOG] * 2
    )
    assert found.total.tolist() == pytest.approx([0.5, math.nan, 0.5, math.nan, math.nan], nan_ok=True)


def test_members_of_several_precisions_are_added_in_the_widest():
    class Narrow(Gain):
        def __call__(self, media, prompts):
            return Scores(media[:, 0, 0, 0].bfloat16())

    total = score(Composite({"a": Narrow(), "b": Gain()}), 0.5).total
    assert (total.dtype, total.item()) == (torch.float64, 1.0)


def test_rows_that_depend_on_each_other_are_refused_with_advice():
    running = Composite({"a": Gain()}, normalise="running")
    vote = Composite({"a": Gain()}, mode="vote")
    for reward, advice in ((running, "update: false"), (vote, "rank stage"), (Composite({"v": vote}), "rank stage")):
        with pytest.raises(ConfigError, match=f"reward 'mine': .*{advice}"):
            require_independent({"fine": Gain(), "mine": reward})
    require_independent({"sum": Composite({"a": Gain()}), "frozen": running.eval(), "own": Gain()})


def test_statistics_of_others_are_refused(tmp_path):
    path = tmp_path / "moments.json"
    for text, message in (('{"b": {"count": 1, "mean": 0, "m2": 0}}', r"is of \['b'\]"), ("[1]", "no running")):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            Composite({"a": Gain()}, normalise="running", state=str(path))
    with pytest.raises(MissingFileError, match="no statistics"):
        Composite({"a": Gain()}, normalise="running", state=str(tmp_path / "none.json"))


@few
@given(st.lists(st.integers(-20, 20).map(float), min_size=2, max_size=20), st.floats(-30, 30))
def test_quantiles_are_the_middle_ranks(stored, value):
    if len(set(stored)) < 2:
        with pytest.raises(ConfigError, match="at least 2"):
            Quantiles.of(stored)
        return
    points = sorted(set(stored))
    levels = [sum((v < p) + (v == p) / 2 for v in stored) / len(stored) for p in points]
    found = Quantiles.of(stored)(torch.tensor([value], dtype=torch.float64)).item()
    assert found == pytest.approx(np.interp(value, points, levels), abs=1e-12)
    assert 0 < found < 1


def test_quantiles_of_close_values_in_low_precision():
    """In bfloat16 both values are 100."""
    found = Quantiles.of([100.0, 100.001])(torch.tensor([100.0, 101.0], dtype=torch.bfloat16))
    assert (found.dtype, found.tolist()) == (torch.bfloat16, [0.25, 0.75])
    with pytest.raises(ConfigError, match="NaN or infinite"):
        Quantiles.of([0.0, math.nan, 1.0])


def test_references_standardise():
    reference = {"a": {"mean": 1.0, "std": 4.0}, "b": {"values": [0.0, 1.0, 2.0, 3.0]}}
    composite = Composite({"a": Gain(2.0), "b": Member(Gain(3.0), 2.0)}, normalise="reference", reference=reference)
    pixels = media(0.5, 0.9).clone().requires_grad_()
    total = composite(pixels, [CAT] * 2).total
    assert total.tolist() == pytest.approx([0 / 4 + 2 * 0.5, 0.8 / 4 + 2 * (2.7 + 0.5) / 4])
    (gradient,) = torch.autograd.grad(total.sum(), pixels)
    assert gradient[:, 0, 0, 0].tolist() == pytest.approx([2 / 4 + 2 * 3 / 4] * 2)


def test_it_declares_what_its_members_allow():
    blind = Gain(differentiable=False, needs_prompt=True, comparable_across_prompts=False, licence="other")
    composite = Composite({"a": Gain(), "b": blind})
    assert isinstance(composite, Reward)
    flags = (composite.differentiable, composite.needs_prompt, composite.comparable_across_prompts)
    assert flags == (False, True, False)
    assert (composite.modality, composite.licence) == ("image", "free; other")
    assert Composite({"a": Gain(), "b": Member(blind, 0)}).differentiable  # only reported
    vote = Composite({"a": Gain()}, mode="vote")
    assert [vote.differentiable, vote.comparable_across_prompts] == [False, False]
    assert vote.native_range == (0, 1)


def test_a_run_through_rewards_needs_their_gradient():
    """A member that only is reported may lack it; one that counts may not."""
    seeing, blind = Gain(name="seeing"), Gain(name="blind", differentiable=False)
    fine = Composite({"a": seeing, "b": Member(blind, 0)})
    require_gradient([seeing, fine, Composite({"a": seeing}, mode="mean_std", normalise="running")])
    composites = [Composite({"a": seeing, "b": blind}, name="sum"), Composite({"a": seeing}, mode="vote", name="vote")]
    with pytest.raises(ConfigError, match="no gradient reaches the pixels through blind, sum, vote; train on"):
        require_gradient([seeing, blind, fine, *composites])


def test_the_range_is_that_of_the_members():
    wide, pair = Gain(native_range=(-math.inf, math.inf)), {"a": Member(Gain(), 2.0), "b": Member(Gain(), -1.0)}
    assert Composite(pair).native_range == (-1, 2)
    assert Composite({"a": Gain(), "b": Member(wide, hinge=2.0)}).native_range == (-math.inf, 3)
    assert Composite({"a": Gain(), "b": Gain()}, mode="mean_std").native_range == (-0.5, 1)
    assert Composite({"a": wide}, mode="mean_std", kappa=0.0).native_range == (-math.inf, math.inf)
    assert Composite({"a": Gain()}, normalise="running").native_range == (-math.inf, math.inf)
    quantiles = {"a": {"values": [1.0, 2.0]}}
    assert Composite({"a": wide}, normalise="reference", reference=quantiles).native_range == (0.25, 0.75)


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ({}, {}, "no member has a weight"),
        ({"a": Gain(), "b": Gain(modality="video")}, {}, "members judge different media: .*'b': 'video'"),
        ({"a": Gain()}, {"mode": "some"}, "mode 'some' is unknown. Did you mean 'sum'"),
        ({"a": Gain()}, {"normalise": "batch"}, "normalise 'batch' is unknown"),
        ({"a": Member(Gain(), -1.0), "b": Gain()}, {"mode": "vote"}, "a negative weight has no meaning"),
        ({"a": Gain()}, {"normalise": "reference"}, "belong together"),
        ({"a": Gain()}, {"normalise": "reference", "reference": {"b": {"values": [1, 2]}}}, r"names \['b'\]"),
        ({"a": Gain()}, {"normalise": "reference", "reference": {"a": {"mean": 1}}}, "give mean and std > 0"),
        ({"a": Gain()}, {"state": "x.json"}, "`state` is for normalise: running"),
        ({"a": {"reward": "clip_score", "wieght": 1}}, {}, "'a': unknown key 'wieght'. Did you mean 'weight'"),
        ({"a": {"options": {}}}, {}, "`reward` is missing"),
        (
            {"a": {"reward": "clip_score", "options": {"modle": "x"}}},
            {},
            "member 'a': reward 'clip_score' has no option 'modle'. Did you mean 'model'.*Its options: model, form",
        ),
    ],
)
def test_contradictions_are_named(members, options, message):
    with pytest.raises(ConfigError, match=message):
        Composite(members, **options)


def test_it_is_built_from_yaml(clip_folder):
    text = f"""
    mode: sum
    normalise: reference
    reference: {{near: {{mean: 20, std: 5}}, own: {{values: [10, 20, 30]}}}}
    members:
      near: {{reward: clip_score, options: {{model: '{clip_folder}'}}, weight: 0.5}}
      own: {{reward: 'rewards.clip_score:ClipScore', options: {{model: '{clip_folder}'}}, hinge: 30}}
    """
    composite = build_reward("rewards.composite:Composite", yaml.safe_load(text))
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    scores = composite(pixels, [CAT, DOG])
    assert torch.equal(scores.parts["near"], scores.parts["own"])
    torch.testing.assert_close(
        scores.total, 0.5 * (scores.parts["near"] - 20) / 5 + Quantiles.of([10, 20, 30])(scores.parts["own"])
    )
    with pytest.raises(UnknownNameError, match=r"unknown reward 'clipscore'. Did you mean 'clip_score'"):
        build_reward("rewards.composite:Composite", {"members": {"a": {"reward": "clipscore"}}})

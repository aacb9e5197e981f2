"""Properties of every way to merge, on changes computed here; what of PEFT is right and what is wrong."""

from __future__ import annotations

import itertools
import json
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alignkit.adapters import lora, soup
from alignkit.adapters.low_rank import factorised, product, truncated
from alignkit.adapters.merging import Merge, combine, greedy_weights, require_weights
from alignkit.adapters.mixing import Full, Lora, WeightSoup
from alignkit.adapters.tensor_files import Layout, StoredTensors, write_stream
from alignkit.errors import AdapterError, ConfigError, DataError

METHODS = ["linear", "ties", "dare"]
QUICK = settings(max_examples=20, deadline=None)
SEEDS = st.integers(0, 10**6)
PARTS = st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4)


def simplex(parts):
    return [part / sum(parts) for part in parts]


def changes(seed, count, shape=(6, 5)):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(count)]


def merged(members, weights, merge, name="w"):
    return combine([lambda member=member: member for member in members], weights, merge, name)


def lora_state(seed, rank, alpha=None, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    state = {"a.to_q" + lora.DOWN: torch.randn(rank, 5, generator=rng, dtype=torch.float64).to(dtype)}
    state["a.to_q" + lora.UP] = torch.randn(6, rank, generator=rng, dtype=torch.float64).to(dtype)
    state["c.conv" + lora.DOWN] = torch.randn(rank, 2, 3, 3, generator=rng, dtype=torch.float64).to(dtype)
    state["c.conv" + lora.UP] = torch.randn(3, rank, 1, 1, generator=rng, dtype=torch.float64).to(dtype)
    if alpha is not None:
        state |= {f"{path}.alpha": torch.tensor(float(alpha)) for path in ("a.to_q", "c.conv")}
    return state


def change_of(state, path="a.to_q"):
    return Lora.of(state).change(path, ())


# --- properties of merging ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@QUICK
@given(seed=SEEDS, chosen=st.integers(0, 2))
def test_a_one_hot_weight_gives_the_endpoint_exactly(method, seed, chosen):
    members = changes(seed, 3)
    weights = [float(number == chosen) for number in range(3)]
    assert torch.equal(merged(members, weights, Merge(method)), members[chosen])


@pytest.mark.parametrize("method", METHODS)
@QUICK
@given(seed=SEEDS, parts=PARTS)
def test_equal_members_give_the_member(method, seed, parts):
    one = changes(seed, 1)[0]
    assert (merged([one] * len(parts), simplex(parts), Merge(method)) - one).abs().max() <= 1e-12


@pytest.mark.parametrize("merge", [Merge(), Merge("ties", 0.5)])
@QUICK
@given(seed=SEEDS, parts=PARTS)
def test_the_order_does_not_matter(merge, seed, parts):
    members, weights = changes(seed, len(parts)), simplex(parts)
    turned = merged(members[::-1], weights[::-1], merge)
    assert (merged(members, weights, merge) - turned).abs().max() <= 1e-12


@pytest.mark.parametrize("merge", [Merge(), Merge("ties", 0.5), Merge("dare", 0.5, seed=3)])
@QUICK
@given(seed=SEEDS, parts=PARTS, scale=st.floats(0.1, 4.0))
def test_a_scale_of_all_weights_is_a_scale_of_the_result(merge, seed, parts, scale):
    members = changes(seed, len(parts))
    more = merged(members, [scale * part for part in parts], merge)
    assert (more - scale * merged(members, parts, merge)).abs().max() <= 1e-10


@QUICK
@given(seed=SEEDS, parts=PARTS, share=st.floats(-1.0, 2.0))
def test_linear_is_linear_in_the_weights(seed, parts, share):
    members, other = changes(seed, len(parts)), parts[::-1]
    between = [share * one + (1 - share) * two for one, two in zip(parts, other, strict=True)]
    expected = share * merged(members, parts, Merge()) + (1 - share) * merged(members, other, Merge())
    assert (merged(members, between, Merge()) - expected).abs().max() <= 1e-10


def test_ties_by_hand():
    """Half of each change survives: 4 and -3 of the first, -9 and 2 of the second; signs by 0.75 and 0.25 of them."""
    one, two = torch.tensor([4.0, -3.0, 1.0, 0.5]), torch.tensor([-9.0, 0.1, 2.0, 1.0])
    result = merged([one, two], [0.75, 0.25], Merge("ties", 0.5))
    assert result.tolist() == [4.0, -3.0, 2.0, 0.0]


def test_dare_is_seeded_unbiased_and_leaves_torchs_generator_alone():
    one = torch.ones(200, 200, dtype=torch.float64)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (merged([one], [1.0], Merge("dare", 0.25, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert set(first.unique().tolist()) == {0.0, 4.0}
    assert abs(float(first.mean()) - 1) < 0.05


def test_what_peft_gets_wrong():
    """Its `ties` halves two equal members at 0.5 and 0.5; its `prune`, used here, is right."""
    one = torch.tensor([1.0, -2.0, 3.0])
    with pytest.warns(UserWarning, match="no pruning"):
        assert torch.equal(merge_utils.ties([one, one], torch.tensor([0.5, 0.5]), 1.0), 0.5 * one)
    assert torch.equal(merge_utils.prune(one, 2 / 3, "magnitude"), torch.tensor([0.0, -2.0, 3.0]))


@pytest.mark.parametrize(
    ("weights", "merge", "message"),
    [
        ([0.7, 0.7], Merge(), "sum to 1.4, not to 1"),
        ([0.5, float("nan")], Merge(), "a weight is nan"),
        ([], Merge(), "at least one member"),
        ([0.5, 0.5], Merge("ties", 0.0), r"density is 0.0; it must lie in \(0, 1\]"),
        ([0.5, 0.5], Merge("linear", 0.5), "density is 0.5, which linear does not use"),
        ([0.5, 0.5], Merge("wise_ft"), "wise_ft takes one member"),
        ([1.5, -0.5], Merge("ties", 0.5), "no weight may be negative"),
    ],
)
def test_what_cannot_be_merged_is_said(weights, merge, message):
    with pytest.raises(ConfigError, match=message):
        merge.check(weights, any_sum=False)


def test_other_sums_on_request_and_sums_with_rounding():
    require_weights([0.7, 0.7], any_sum=True)
    require_weights([0.1, 0.2, 0.7], any_sum=False)
    Merge("wise_ft").check([0.3], any_sum=False)


def test_a_greedy_soup_takes_what_raises_the_score():
    """Scores by the mean of values: 3 is best alone, 2 joins for the bonus of two, 1 does not."""
    values, asked = [1.0, 3.0, 2.0], []

    def score(weights):
        asked.append(list(weights))
        return sum(w * v for w, v in zip(weights, values, strict=True)) + 2 * (weights[1] > 0 and weights[2] > 0)

    assert greedy_weights(3, score) == [0.0, 0.5, 0.5]
    assert len(asked) == 5
    assert greedy_weights(1, lambda _: 0.0) == [1.0]
    with pytest.raises(ConfigError, match="score of members \\[0\\] is nan"):
        greedy_weights(2, lambda _: float("nan"))


# --- ranks ----------------------------------------------------------------------------------------------------------


@QUICK
@given(seed=SEEDS, ranks=st.lists(st.integers(1, 4), min_size=2, max_size=3))
def test_a_sum_is_exact_for_different_ranks_and_alphas(seed, ranks):
    members = [lora_state(seed + n, rank, alpha=n + 0.5) for n, rank in enumerate(ranks)]
    weights = simplex([1.0 + n for n in range(len(ranks))])
    result = soup(members, weights)
    for path in ("a.to_q", "c.conv"):
        assert len(result[path + lora.DOWN]) == sum(ranks)
        expected = sum(w * change_of(m, path) for w, m in zip(weights, members, strict=True))
        assert (change_of(result, path) - expected).abs().max() <= 1e-10


@QUICK
@given(seed=SEEDS, rank=st.integers(1, 4))
def test_a_cut_is_the_best_of_its_rank_and_its_error_is_told(seed, rank):
    state = lora_state(seed, 5)
    down, up = state["c.conv" + lora.DOWN], state["c.conv" + lora.UP]
    whole = product(down, up)
    values = torch.linalg.svdvals(whole.flatten(1))
    for one, two, lost in (truncated(down, up, rank), factorised(whole, rank)):
        error = (product(one, two) - whole).norm()
        assert abs(error - values[rank:].norm()) <= 1e-9
        assert abs(lost.share - error / whole.norm()) <= 1e-9
        assert (one.shape[1:], two.shape[2:]) == ((2, 3, 3), (1, 1))


def test_a_cut_to_the_full_rank_loses_nothing():
    members = [lora_state(1, 2), lora_state(2, 2, alpha=5)]
    exact, cut = soup(members, [0.4, 0.6]), soup(members, [0.4, 0.6], rank=4)
    assert (change_of(exact) - change_of(cut)).abs().max() <= 1e-12
    assert len(soup(members, [0.4, 0.6], rank=2)["a.to_q" + lora.DOWN]) == 2


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_methods_that_leave_the_rank_work_on_the_product(method):
    members = [lora_state(1, 2), lora_state(2, 3)]
    result = soup(members, [0.4, 0.6], method=method, density=0.5, seed=1, rank=6)
    merge = Merge(method, 0.5, 1)
    expected = merged([change_of(one) for one in members], [0.4, 0.6], merge, "a.to_q")
    assert (change_of(result) - expected).abs().max() <= 1e-10
    alone = {key: value for key, value in members[0].items() if key.startswith("a.")}
    result = soup([alone, members[1]], [0.4, 0.6], method=method, density=0.5, seed=1, rank=6)
    merge_of_one = merged([torch.zeros(3, 2, 3, 3), change_of(members[1], "c.conv")], [0.4, 0.6], merge, "c.conv")
    assert (change_of(result, "c.conv") - merge_of_one).abs().max() <= 1e-10
    nothing = soup(members, [0.0, 0.0], method=method, rank=2, any_sum=True)  # all of the weight is the base's
    assert not change_of(nothing, "c.conv").any()
    with pytest.raises(AdapterError, match="no product of two factors; give the rank"):
        soup(members, [0.4, 0.6], method=method, density=0.5)


# --- full weights ---------------------------------------------------------------------------------------------------


def full_state(seed, dtype=torch.float32, size=4):
    rng = torch.Generator().manual_seed(seed)
    state = {f"{n}.weight": torch.randn(6, 5, generator=rng).to(dtype) for n in range(size)}
    return state | {"steps": torch.tensor(3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_end_points_of_full_weights_are_exact(method, dtype):
    base, one, two = (full_state(seed, dtype) for seed in range(3))
    for weights, expected in (([1.0, 0.0], one), ([0.0, 1.0], two)):
        result = soup([one, two], weights, method=method, base=base)
        assert all(torch.equal(result[name], expected[name]) for name in expected)
    equal = soup([one, one], [0.3, 0.7], method=method, base=base)
    assert all(torch.equal(equal[name], one[name]) for name in one)


def test_a_base_in_eight_bits_gives_float32():
    base = {"0.weight": torch.full((6, 5), 1.5).to(torch.float8_e4m3fn)}
    adapter = {"0" + lora.DOWN: torch.full((1, 5), 0.001), "0" + lora.UP: torch.ones(6, 1)}
    found = WeightSoup([Lora.of(adapter)], [1.0], Merge(), base).weight("0.weight")
    assert torch.equal(found, torch.full((6, 5), 1.501))


def test_wise_ft_is_a_strength():
    base, one = full_state(0), full_state(1)
    for strength in (0.0, 0.5, 1.0, 1.5):
        result = soup([one], [strength], method="wise_ft", base=base)
        expected = base["0.weight"] + strength * (one["0.weight"] - base["0.weight"])
        assert (result["0.weight"] - expected).abs().max() <= 1e-6
    assert all(torch.equal(soup([one], [0.0], method="wise_ft", base=base)[name], base[name]) for name in base)


def test_loras_and_full_weights_mix_on_one_base():
    base, one = full_state(0), full_state(1)
    adapter = {"0" + lora.DOWN: torch.ones(2, 5), "0" + lora.UP: torch.ones(6, 2)}
    mixed = WeightSoup([Full(one), Lora.of(adapter)], [0.25, 0.75], Merge(), base)
    expected = base["0.weight"] + 0.25 * (one["0.weight"] - base["0.weight"]) + 0.75 * 2
    assert (mixed.weight("0.weight") - expected).abs().max() <= 1e-6
    with pytest.raises(AdapterError, match="the base and member 0 differ in the names or shapes of '0"):
        WeightSoup([Full({**one, "0.weight": torch.ones(2)})], [1.0], Merge(), base)
    with pytest.raises(AdapterError, match="ties works on changes of full weights, so it needs their base"):
        soup([one, one], [0.5, 0.5], method="ties")


# --- files ----------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are alive, and the most that ever were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.data_ptr() not in given:  # no view, no operation in place
                self.now += made.nbytes
                self.peak = max(self.peak, self.now)
                weakref.finalize(made, self.gone, made.nbytes)
        return result

    def gone(self, size):
        self.now -= size


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_mixture_of_files_holds_a_few_tensors_whatever_their_number(method, tmp_path):
    peaks = []
    for size in (4, 40):
        for seed in range(3):
            save_file(full_state(seed, size=size), tmp_path / f"{size}-{seed}.safetensors")
        base, *members = (StoredTensors([tmp_path / f"{size}-{seed}.safetensors"]) for seed in range(3))
        mixed = WeightSoup([Full(one) for one in members], [0.3, 0.7], Merge(method), base)
        layouts = {name: Layout(mixed.dtype(name), base.layout(name).shape) for name in mixed.names}
        with Live() as live:
            write_stream(tmp_path / f"{method}-{size}.safetensors", layouts, mixed.weight, {"format": "pt"})
        peaks.append(live.peak)
        states = [full_state(seed, size=size) for seed in range(3)]
        expected = soup(states[1:], [0.3, 0.7], method=method, base=states[0])
        written = load_file(tmp_path / f"{method}-{size}.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert 6 * 5 * 8 <= peaks[0] == peaks[1] <= 10 * 6 * 5 * 8  # a weight in float64 is 240 bytes


def test_a_soup_of_loras_holds_its_result_and_a_few_tensors():
    """What is alive beyond the result does not grow with the number of layers."""
    beyond = []
    for size in (4, 40):
        rng = torch.Generator().manual_seed(0)
        states = [{}, {}]
        for state, number in itertools.product(states, range(size)):
            state |= {f"{number}{lora.DOWN}": torch.randn(4, 50, generator=rng)}
            state |= {f"{number}{lora.UP}": torch.randn(60, 4, generator=rng)}
        with Live() as live:
            result = soup(states, [0.3, 0.7])
        beyond.append(live.peak - sum(value.nbytes for value in result.values()))
    assert beyond[0] == beyond[1] <= 4 * 60 * 8 * 8


def test_a_written_file_is_canonical_and_a_failed_one_is_not_there(tmp_path):
    state = {"b": torch.ones(3, dtype=torch.bfloat16), "a": torch.arange(4), "c": torch.tensor(2.0)}
    layouts = {name: Layout(value.dtype, tuple(value.shape)) for name, value in state.items()}
    for name, order in (("one", state), ("two", reversed(state))):
        told = {key: layouts[key] for key in order}
        write_stream(tmp_path / f"{name}.safetensors", told, state.__getitem__, {"y": "1", "x": "2"})
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    read = load_file(tmp_path / "one.safetensors")
    assert all(torch.equal(read[name], value) for name, value in state.items())
    with pytest.raises(KeyError):
        write_stream(tmp_path / "three.safetensors", layouts, {}.__getitem__, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def test_damaged_files_are_named(tmp_path):
    save_file({"x": torch.tensor([1.0, float("nan")])}, tmp_path / "nan.safetensors")
    with pytest.raises(DataError, match=r"nan.safetensors': 'x' holds NaN"):
        StoredTensors([tmp_path / "nan.safetensors"])["x"]
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "nan.safetensors").read_bytes()[:-3])
    with pytest.raises(DataError, match=r"cut.safetensors' is truncated"):
        StoredTensors([tmp_path / "cut.safetensors"])
    (tmp_path / "x.bin").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(DataError, match="is no safetensors file"):
        StoredTensors([tmp_path / "x.bin"])

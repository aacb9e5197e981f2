"""Soups against dense changes of weights, computed here in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from alignkit.adapters import lora, soup, with_alphas
from alignkit.errors import AdapterError, ConfigError

SHAPES = {"a.to_q": (6, 5), "b.to_k": (4, 7), "c.conv": (3, 2, 3, 3)}


def member(seed, rank, alpha=None, layers=tuple(SHAPES), ends=(lora.DOWN, lora.UP), dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for path in layers:
        out, *inside = SHAPES[path]
        state[path + ends[0]] = torch.randn(rank, *inside, generator=rng, dtype=torch.float64).to(dtype)
        up = torch.randn(out, rank, *([1] * (len(inside) - 1)), generator=rng, dtype=torch.float64)
        state[path + ends[1]] = up.to(dtype)
        if alpha is not None:
            state[path + ".alpha"] = torch.tensor(alpha)
    return state


def change(state, path, ends=(lora.DOWN, lora.UP)):
    """The dense change of a layer, alpha / rank times up times down; zero where the layer is not adapted."""
    if path + ends[0] not in state:
        return torch.zeros(SHAPES[path], dtype=torch.float64)
    down, up = state[path + ends[0]].double(), state[path + ends[1]].double()
    scale = float(state.get(path + ".alpha", len(down))) / len(down)
    return scale * torch.einsum("or,r...->o...", up.flatten(1), down)


@pytest.mark.parametrize("ends", [(lora.DOWN, lora.UP), (".lora_down.weight", ".lora_up.weight")])
def test_a_soup_of_loras_is_the_weighted_sum_of_their_changes(ends):
    """Different ranks, alphas and layers, and a negative weight."""
    members = [member(1, 2, 7.0, ends=ends), member(2, 3, ends=ends), member(3, 1, 0.5, ("a.to_q",), ends)]
    weights = [0.3, 0.9, -1.7]
    mixed = soup(members, weights, any_sum=True)
    assert mixed["a.to_q" + ends[0]].shape == (6, 5)
    assert mixed["b.to_k" + ends[0]].shape == (5, 7)
    for path in SHAPES:
        expected = sum(weight * change(state, path, ends) for weight, state in zip(weights, members, strict=True))
        assert (change(mixed, path, ends) - expected).abs().max() <= 1e-12


def test_two_halves_of_one_adapter_are_the_adapter():
    """PEFT's linear combination gives twice the adapter."""
    one = member(1, 2, 7.0)
    for path in SHAPES:
        assert (change(soup([one, one], [0.5, 0.5]), path) - change(one, path)).abs().max() <= 1e-12


def test_half_precision_members_give_a_float32_soup():
    members = [member(seed, 2, dtype=torch.bfloat16) for seed in (1, 2)]
    mixed = soup(members, [0.3, 0.7])
    assert {value.dtype for value in mixed.values()} == {torch.float32}
    expected = 0.3 * change(members[0], "a.to_q") + 0.7 * change(members[1], "a.to_q")
    assert (change(mixed, "a.to_q") - expected).abs().max() <= 1e-6


def test_full_weights():
    members = [nn.BatchNorm1d(3).double().state_dict() for _ in range(2)]
    for scale, state in zip((1.0, 5.0), members, strict=True):
        state["weight"] = scale * torch.arange(1.0, 4.0, dtype=torch.float64)
    mixed = soup(members, [0.25, 0.75])
    assert torch.equal(mixed["weight"], 4 * torch.arange(1.0, 4.0, dtype=torch.float64))
    assert mixed["num_batches_tracked"] == 0
    members[1]["num_batches_tracked"] += 1
    with pytest.raises(AdapterError, match=r"'num_batches_tracked' holds integers that differ"):
        soup(members, [0.25, 0.75])


def test_a_soup_of_injected_adapters_matches_both_active(load):
    """The soup in one network equals two adapters active with those weights."""
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    for number, (name, alpha) in enumerate((("one", 3.0), ("two", 8.0))):
        lora.inject(net, rank=2 + number, targets=["0", "1"], alpha=alpha, name=name)
        for layer in lora.lora_layers(net, name):
            nn.init.normal_(layer.lora_B[name].weight, generator=torch.Generator().manual_seed(number))
    net.double()
    lora.activate(net, {"one": 0.4, "two": -0.6})
    x = torch.randn(7, 5, dtype=torch.float64)
    expected = net(x)
    states = [with_alphas(lora.adapter_state(net, n), net.peft_config[n].to_dict()) for n in ("one", "two")]
    lora.load(net, soup(states, [0.4, -0.6], any_sum=True), {}, where="the soup", origin=lambda: "a test", name="soup")
    net.double()
    lora.activate(net, {"soup": 1.0})
    assert (net(x) - expected).abs().max() <= 1e-12


def test_alphas_of_a_config():
    """rsLoRA scales by alpha / sqrt(rank): 6 / sqrt(4) is 3, which alpha 12 gives at rank 4."""
    state = member(1, 4)
    config = {"lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"b.to_k": 10}}
    alphas = with_alphas(state, config)
    assert (float(alphas["a.to_q.alpha"]), float(alphas["b.to_k.alpha"])) == (12.0, 20.0)
    assert float(with_alphas(state, {"lora_alpha": 6})["a.to_q.alpha"]) == 6.0
    patterns = {"to_k": 1, "b.to_k": 8, r"c\..*": 5}  # the longest that fits; a pattern may be a regular expression
    alphas = with_alphas(state, {"lora_alpha": 6, "alpha_pattern": patterns})
    assert [float(alphas[f"{path}.alpha"]) for path in SHAPES] == [6.0, 8.0, 5.0]
    with pytest.raises(AdapterError, match="use_dora"):
        with_alphas(state, {"use_dora": True})


def test_what_does_not_mix_is_named():
    one = member(1, 2)
    with pytest.raises(AdapterError, match=r"member 1 is a DoRA \('a.to_q.lora_magnitude_vector'\).* train it again"):
        soup([one, {**one, "a.to_q.lora_magnitude_vector": torch.ones(6)}], [0.5, 0.5])
    with pytest.raises(AdapterError, match="2 state dicts and 1 weights"):
        soup([one, one], [1.0])
    with pytest.raises(AdapterError, match="weight of member 1 is nan"):
        soup([one, one], [1.0, float("nan")])
    with pytest.raises(ConfigError, match=r"the weights \[0.5, 0.25\] sum to 0.75, not to 1"):
        soup([one, one], [0.5, 0.25])
    for value in (float("nan"), float("inf")):
        for key in ("a.to_q" + lora.UP, "a.to_q.alpha"):
            with pytest.raises(AdapterError, match=f"member 1: '{key}' holds NaN or infinite values"):
                soup([one, {**one, key: torch.full_like(one.get(key, torch.ones(())), value)}], [0.5, 0.5])
    with pytest.raises(AdapterError, match="member 0: 'x' holds NaN"):
        soup([{"x": torch.tensor([float("nan")])}], [1.0])
    with pytest.raises(AdapterError, match="member 1 has another layout"):
        soup([one, {"a.to_q.weight": torch.ones(6, 5)}], [0.5, 0.5])
    with pytest.raises(AdapterError, match=r"'a.to_q.lora_B.weight' of member 0 does not belong to a plain LoRA"):
        soup([{key: value for key, value in one.items() if key != "a.to_q" + lora.UP}], [1.0])
    other = {key: value[:, :-1] if key.endswith(lora.DOWN) else value for key, value in one.items()}
    with pytest.raises(AdapterError, match=r"different shapes at 'a\.to_q'"):
        soup([one, other], [0.5, 0.5])
    with pytest.raises(
        AdapterError, match="member 0 and member 1 differ in the names or shapes of 'y'; give members of one base"
    ):
        soup([{"x": torch.ones(2)}, {"x": torch.ones(2), "y": torch.ones(2)}], [0.5, 0.5])


@pytest.mark.parametrize(
    "key",
    [
        *("a.lora_A.default.weight", "a_lora.down.weight", "a.lora_embedding_A", "lora_unet_a.hada_w1_a"),
        *("lora_unet_a.lokr_w1", "a.oft_R.weight", "a.boft_s", "a.ia3_l"),
    ],
)
def test_adapters_of_other_layouts_are_no_full_weights(key):
    state = {key: torch.ones(2, 2)}
    with pytest.raises(AdapterError, match=f"'{key}' of member 0 is an adapter's, in a layout that is not known"):
        soup([state, state], [0.5, 0.5])


def test_full_weights_with_such_words_in_their_names_mix():
    state = {"flora.soft_gate.weight": torch.ones(2, 2)}
    assert torch.equal(soup([state, state], [0.5, 0.5])["flora.soft_gate.weight"], torch.ones(2, 2))


def test_members_without_a_common_layer_are_refused():
    one, two = member(1, 2), member(2, 2)
    with pytest.raises(AdapterError, match=r"member 0 shares no layer with another \('a.to_q', 'unet.a.to_q'\)"):
        soup([one, {f"unet.{key}": value for key, value in two.items()}], [0.5, 0.5])
    with pytest.raises(AdapterError, match="member 2 shares no layer with another"):
        soup([one, two, {f"unet.{key}": value for key, value in two.items()}], [0.5, 0.3, 0.2])


def test_the_package_loads_no_torch():
    code = "import sys, alignkit.adapters; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Several named adapters on one network, and adapters that are refused."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from alignkit.adapters import exports, lora
from alignkit.errors import AdapterError, MissingFileError

PROMPTS = ["a red circle", "two blue rings"]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def stir(net, name, seed):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if f".{name}." in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))


def prediction(generator):
    x = torch.randn(2, *generator.latent_shape(16, 16), generator=torch.Generator().manual_seed(1))
    return generator.predict(x, torch.tensor([0.3, 0.8]), generator.encode_prompts(PROMPTS))


BOTH = pytest.mark.parametrize("family", ["unet", "pixart"])  # PixArt's network has no adapter methods of its own


@pytest.fixture
def family():
    return "unet"


@pytest.fixture
def two(load, family):
    """A generator with the adapters `default` and `style`, of different ranks, alphas and layers, both active."""
    generator = load(family)
    lora.inject(generator.net, rank=3, targets=TARGETS, alpha=7.0)
    lora.inject(generator.net, rank=2, targets=["to_q", "ff.net.2"], alpha=5.0, name="style")
    stir(generator.net, "default", 0)
    stir(generator.net, "style", 1)
    return generator


@torch.no_grad()
def folded(load, family, generator, weights):
    """The prediction of a plain network to which the weighted changes are added by hand."""
    plain = load(family)
    for name, weight in weights.items():
        state = lora.adapter_state(generator.net, name)
        scale = {"default": 7 / 3, "style": 5 / 2}[name]
        for key in state:
            if key.endswith(lora.DOWN):
                path = key.removesuffix(lora.DOWN)
                plain.net.get_submodule(path).weight += weight * scale * state[path + lora.UP] @ state[key]
    return prediction(plain)


@pytest.mark.parametrize(
    "weights", [{"default": 1.0, "style": 1.0}, {"default": 0.4, "style": -1.5}, {"style": 0.7}, {"default": 1.0}]
)
def test_active_adapters_add_up_with_their_weights(load, family, two, weights):
    two.set_adapters(weights)
    assert lora.active_weights(two.net) == pytest.approx(weights)
    torch.testing.assert_close(prediction(two), folded(load, family, two, weights), rtol=0, atol=2e-5)


@BOTH
@torch.no_grad()
def test_the_reference_is_the_base_exactly_and_returns_to_what_was_active(load, family, two):
    base = prediction(load(family))
    two.set_adapters({"style": 0.5})
    before = prediction(two)
    with two.reference():
        assert torch.equal(prediction(two), base)
    assert torch.equal(prediction(two), before)
    assert lora.active_weights(two.net) == {"style": 0.5}
    two.set_adapters({})
    assert torch.equal(prediction(two), base)


@pytest.mark.parametrize("style_weight", [None, 0.8])
def test_one_adapter_trains_while_the_other_is_frozen_and_active_or_off(two, style_weight):
    lora.set_trainable(two.net, {"default"})
    two.set_adapters({"default": 1.0} | ({} if style_weight is None else {"style": style_weight}))
    with two.reference():
        pass
    assert lora.trainable_adapters(two.net) == {"default"}
    prediction(two).square().sum().backward()
    graded = {key for key, parameter in two.net.named_parameters() if parameter.grad is not None}
    assert graded
    assert all(".default." in key for key in graded)


@BOTH
def test_a_second_adapter_leaves_the_first_as_it_was(load, family, two, tmp_path):
    """A file is loaded as a frozen adapter beside the policy's, whose weight and training stay."""
    two.save_adapter(tmp_path, name="style")
    other = load(family)
    other.add_lora(2, None, None, 0.0)
    other.set_adapters({"default": 0.5})
    other.load_adapter(tmp_path, "style", trainable=False)
    assert lora.active_weights(other.net) == {"default": 0.5, "style": 1.0}
    assert lora.trainable_adapters(other.net) == {"default"}
    with pytest.raises(AdapterError, match="already has an adapter 'style'; give another name"):
        other.load_adapter(tmp_path, "style")
    with pytest.raises(AdapterError, match="no adapter 'stile'; its adapters: default, style"):
        other.set_adapters({"stile": 1.0})
    with pytest.raises(AdapterError, match="weight of adapter 'style' is nan"):
        other.set_adapters({"style": float("nan")})


@torch.no_grad()
@pytest.mark.parametrize("name", ["default", "style"])
def test_each_is_saved_by_its_name_with_its_own_scale(load, family, two, tmp_path, name):
    """The weight that it has at the moment is not part of the file."""
    two.set_adapters({name: 1.0})
    expected = prediction(two)
    two.set_adapters({"default": 0.3, "style": 0.2})
    two.save_adapter(tmp_path, name)
    for layout in (".", "peft"):
        assert torch.equal(prediction(load(family, adapter=tmp_path / layout)), expected)


@BOTH
@torch.no_grad()
def test_merging_folds_what_is_active_and_keeps_the_rest(load, family, two):
    two.set_adapters({"style": 0.5})
    expected = prediction(two)
    two.merge_adapter()
    assert lora.adapter_names(two.net) == ["default"]
    torch.testing.assert_close(prediction(two), expected, rtol=0, atol=2e-5)
    lora.remove(two.net)
    assert not lora.lora_layers(two.net)
    torch.testing.assert_close(prediction(two), expected, rtol=0, atol=2e-5)
    two.add_lora(2, None, None, 0.0)
    lora.remove(two.net)
    assert lora.adapter_names(two.net) == []


@BOTH
@torch.no_grad()
def test_removing_and_negating_touch_one_adapter(load, family, two):
    lora.negate(two.net, "style")
    torch.testing.assert_close(
        prediction(two), folded(load, family, two, {"default": 1.0, "style": 1.0}), rtol=0, atol=2e-5
    )
    lora.remove(two.net, "style")
    torch.testing.assert_close(prediction(two), folded(load, family, two, {"default": 1.0}), rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_copy_with_adapters_of_the_same_kinds(load, family, two):
    two.set_adapters({"default": 0.3, "style": 2.0})
    lora.set_trainable(two.net, {"style"})
    other = load(family)
    lora.inject_like(other.net, two.net)
    other.net.load_state_dict(two.net.state_dict())
    assert torch.equal(prediction(other), prediction(two))
    assert lora.trainable_adapters(other.net) == {"style"}


# --- what is refused, and scales --------------------------------------------------------------------------------------


@pytest.fixture
def saved(load, tmp_path):
    """A U-Net's file without metadata, as other trainers write it."""
    unet = load("unet")
    lora.inject(unet.net, rank=4, targets=TARGETS)
    stir(unet.net, "default", 0)
    unet.save_adapter(tmp_path)
    state = load_file(tmp_path / lora.DIFFUSERS_FILE)
    return state, tmp_path / "other.safetensors"


def test_mixed_ranks_without_alphas_load_at_scale_one(load, saved):
    """Rank 2 beside rank 4: alpha is each layer's own rank, not the largest."""
    state, file = saved
    small = {path.removesuffix(lora.DOWN) for path in state if "to_q" in path and path.endswith(lora.DOWN)}
    for path in small:
        state[path + lora.DOWN] = state[path + lora.DOWN][:2].contiguous()
        state[path + lora.UP] = state[path + lora.UP][:, :2].contiguous()
    save_file(state, file)
    net = load("unet", adapter=file).net
    assert {layer.r["default"] for layer in lora.lora_layers(net)} == {2, 4}
    assert {layer.scaling["default"] for layer in lora.lora_layers(net)} == {1.0}


def test_an_alpha_beside_layers_without_one_counts_for_its_layer(load, saved):
    state, file = saved
    path = min(key for key in state if key.endswith(lora.DOWN)).removesuffix(lora.DOWN)
    save_file({**state, f"{path}.alpha": torch.tensor(6.0)}, file)
    net = load("unet", adapter=file).net
    scales = [layer.scaling["default"] for layer in lora.lora_layers(net)]
    assert sorted(set(scales)) == [1.0, 1.5]
    assert net.get_submodule(path.removeprefix("unet.")).scaling["default"] == 1.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(load, saved, value):
    state, file = saved
    key = min(state)
    state[key][0, 0] = value
    save_file(state, file)
    generator = load("unet")
    with pytest.raises(AdapterError, match=f"'{re.escape(key.removeprefix('unet.'))}' holds NaN or infinite"):
        generator.load_adapter(file)
    assert not lora.lora_layers(generator.net)


@pytest.mark.parametrize(
    ("file", "data", "match"),
    [
        ("pytorch_lora_weights.safetensors", b"", r"weights\.safetensors' is truncated or no safetensors file"),
        ("pytorch_lora_weights.safetensors", b"\xff" * 64, r"weights\.safetensors' is truncated or no safetensors"),
        ("peft/adapter_model.safetensors", b"\0" * 8, r"adapter_model\.safetensors' is truncated or no safetensors"),
        ("peft/adapter_config.json", b"{no", r"adapter_config\.json' is no valid JSON"),
        ("peft/adapter_config.json", b"[]", r"adapter_config\.json' holds a list, not a JSON object"),
    ],
)
def test_damaged_files_of_an_adapter(load, tmp_path, file, data, match):
    generator = load("unet")
    generator.add_lora(2, None, None, 0.0)
    generator.save_adapter(tmp_path)
    (tmp_path / file).write_bytes(data)
    folder = (tmp_path / file).parent
    with pytest.raises(AdapterError, match=match):
        load("unet", adapter=folder)
    if file.startswith("peft"):
        (folder / "adapter_config.json").unlink()
        with pytest.raises(MissingFileError, match=r"adapter_config\.json' is missing beside"):
            load("unet", adapter=folder)


def test_a_dora_is_not_exported():
    config = LoraConfig(r=2, target_modules=["0"], use_dora=True)
    net = inject_adapter_in_model(config, torch.nn.Sequential(torch.nn.Linear(4, 4)), adapter_name=lora.NAME)
    with pytest.raises(AdapterError, match=r"more than a plain LoRA: .*; train it again as a plain LoRA, or merge"):
        exports.layer_weights(net)


def test_a_dora_file_is_refused_before_training(load, saved):
    state, file = saved
    path = min(key for key in state if key.endswith(lora.DOWN)).removesuffix(lora.DOWN)
    save_file({**state, f"{path}.lora_magnitude_vector": torch.ones(4)}, file)
    with pytest.raises(AdapterError, match=r"lora_magnitude_vector.*use_dora \(DoRA\) is more than a plain LoRA"):
        load("unet").load_adapter(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"use_dora \(DoRA\) is more than a plain LoRA"),
        ({"lora_bias": True}, "lora_bias is more than"),
        ({"bias": "all"}, "bias is more than"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base weights"),
        ({"init_lora_weights": "olora"}, "'olora' changes the base weights"),
    ],
)
def test_a_config_that_is_no_plain_lora_is_refused_and_changes_nothing(load, options, message):
    net = load("unet").net
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        lora.inject_config(net, LoraConfig(target_modules=["to_q"], **options))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with pytest.raises(AdapterError, match=message):
        lora.load(net, {}, options, where="'x'", origin=lambda: "a test")


def test_targets_that_match_nothing_are_named_with_the_nearest_names(load):
    net = load("unet").net
    with pytest.raises(AdapterError, match=r"without a layer: \['to_qq'\].* UNet2D.* Did you mean 'to_q'"):
        lora.inject(net, rank=2, targets=["to_q", "to_qq"])
    assert not lora.lora_layers(net)


def test_injection_reports_what_it_covers(caplog):
    """By hand: of linear layers 5 x 4 + 4 and 4 x 3 + 3 the first is adapted, by 2 (5 + 4) numbers."""
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    with caplog.at_level(logging.INFO):
        coverage = lora.inject(net, rank=2, targets=["0"])
    assert coverage == lora.Coverage(layers=1, all_layers=2, parameters=24, all_parameters=24 + 15 + 6, added=18)
    assert "LoRA 'default' on Sequential: 1 of 2 layers, 53.3% of 45 parameters; it adds 18" in caplog.text

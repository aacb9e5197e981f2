"""Lists of modules and parameters: what a walk finds, after every change of adapters, and no walk in a step."""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from alignkit.adapters import lora
from alignkit.adapters.module_tree import ModuleTree

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def same(ours, walked):
    ours, walked = list(ours), list(walked)
    return len(ours) == len(walked) and all(one is other for one, other in zip(ours, walked, strict=True))


def test_the_lists_follow_every_change_of_adapters(load):
    """Fresh, one beside it, one removed, the same name on other layers, merged, by PEFT's own call, new weights."""
    generator = load("unet")
    net = generator.net
    tree = ModuleTree(net)

    def swap_trained():
        layer = lora.lora_layers(net)[0].lora_A["raw"]
        layer.weight = nn.Parameter(layer.weight.detach().clone())  # as FSDP does

    raw = LoraConfig(r=2, target_modules=["to_q"])
    changes = [
        lambda: lora.inject(net, rank=2, targets=["to_q"]),
        lambda: lora.inject(net, rank=2, targets=TARGETS, name="second"),
        lambda: lora.remove(net, "second"),
        lambda: (lora.remove(net), lora.inject(net, rank=2, targets=["to_k", "to_v"])),
        lambda: lora.merge(net),
        lambda: inject_adapter_in_model(raw, net, adapter_name="raw"),
        swap_trained,
        lambda: net.requires_grad_(True),
    ]
    sizes = []
    for change in [lambda: None, *changes]:
        change()
        assert same(tree.parameters(), net.parameters())
        assert same(tree.lora_layers(), lora.lora_layers(net))
        sizes.append(len(tree.lora_layers()))
    count = sizes[1]
    assert sizes == [0, count, 4 * count, 4 * count, 2 * count, 0, count, count, count]
    net.extra = nn.Linear(2, 2)
    assert same(tree.parameters(), net.parameters())  # directly below the root it is noticed
    deep = lora.lora_layers(net)[0].get_base_layer()
    deep.extra = nn.Linear(2, 2)
    tree.reset()
    assert same(tree.parameters(), net.parameters())


def test_the_reference_is_the_base_whichever_adapter_is_on(load):
    """Also after the adapter was replaced by another of the same name, and after the network was."""
    generator = load("flow")
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.5])
    with torch.no_grad():
        cond = generator.encode_prompts(["a ring"])
        base = generator.predict(x, t, cond)
        for targets in (["attn.to_q"], ["attn.to_k", "attn.to_v"]):
            generator.add_lora(2, None, targets, 0.0)
            for layer in lora.lora_layers(generator.net):
                layer.lora_B["default"].weight.normal_()
            assert not torch.equal(generator.predict(x, t, cond), base)
            with generator.reference():
                assert torch.equal(generator.predict(x, t, cond), base)
            lora.remove(generator.net)
        other = load("flow")
        other.add_lora(2, None, None, 0.0)
        for layer in lora.lora_layers(other.net):
            layer.lora_B["default"].weight.normal_()
        generator.put_net(other.net)
        with generator.reference():
            assert torch.equal(generator.predict(x, t, cond), base)


def test_modes_and_gradients_are_torchs(load):
    """`train` after a change anywhere it is looked for; `zero_grad` of all parameters."""
    generator = load("unet")
    model = generator.model
    for mode in (True, False, True, True):
        model.train(mode)
        assert {module.training for module in model.modules()} == {mode}
    generator.net.eval()
    assert {module.training for module in model.train().modules()} == {True}
    model.eval()
    generator.add_lora(2, None, None, 0.5)  # its dropout begins in training mode
    assert {module.training for module in model.eval().modules()} == {False}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.zero_grad(set_to_none=False)
    assert all((parameter.grad == 0).all() for parameter in model.parameters())
    model.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_precision_is_the_networks(load):
    """Of weights, after a change of it, and of layerwise casting, whose weights are stored in another one."""
    for dtype in (torch.float32, torch.bfloat16):
        model = load("unet", dtype=dtype).model
        assert model._dtype(model.net) == model.net.dtype == dtype
        model.net.to(torch.float64)
        assert model._dtype(model.net) == torch.float64
    net = load("unet").net
    net.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert ModuleTree(net).dtype() == net.dtype == torch.bfloat16

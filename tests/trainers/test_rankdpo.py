"""RankDPO's step: against a derivation with nothing but diffusers, and each shortcut against the plain way."""

from __future__ import annotations

import copy
import math
import traceback

import pytest
import torch

from alignkit.errors import ConfigError, DataError, UnknownNameError
from alignkit.losses import rank_dpo
from alignkit.records import LossOutput
from alignkit.trainers import reference
from alignkit.trainers.rankdpo import RankDPOConfig

FAMILIES = ["unet", "flow"]
HEALTH = {"implicit_accuracy", "margin", "saturated", "winner_error_delta", "loser_error_delta"}


def gradients(trainer, batch):
    loss = trainer.method_loss(trainer.model, batch).loss
    trained = {name: p for name, p in trainer.generator.net.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss.mean(), list(trained.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(trained, found, strict=True))


def assert_same(one, other, tolerance):
    assert one.keys() == other.keys()
    scale = max(value.abs().max() for value in other.values())
    assert scale > 0
    for name, value in one.items():
        assert (value - other[name]).abs().max() <= tolerance * scale, name


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def derived_loss(family, net, base, batch, null, beta):
    """RankDPO of a batch with diffusers' own calls, one picture after another, no code of the trainer's."""
    total = 0.0
    for p in range(len(batch["phi"])):
        deltas = []
        for k in range(4):
            x0, noise, t = (batch[name][p, k][None] for name in ("latents", "noise", "t"))
            cond = {name: null[name] if batch["dropped"][p] else batch[f"cond.{name}"][p][None] for name in null}
            if family == "flow":
                x_t, target, time = (1 - t) * x0 + t * noise, noise - x0, t * 1000
            else:
                time = (t * 1000).round().long() - 1
                kept = base.alphas_cumprod[time]
                x_t, target = kept.sqrt() * x0 + (1 - kept).sqrt() * noise, noise
            with torch.no_grad():
                frozen = base.net(x_t, timestep=time, **cond).sample
            moved = net(x_t, timestep=time, **cond).sample
            deltas.append((moved - target).square().mean() - (frozen - target).square().mean())
        phi = batch["phi"][p].tolist()
        order = [1 + sum(b > a for b in phi) + (sum(b == a for b in phi) - 1) / 2 for a in phi]
        for i in range(4):
            for j in range(4):
                if phi[i] > phi[j]:
                    weight = abs(2 ** phi[i] - 2 ** phi[j])
                    weight *= abs(1 / math.log(1 + order[i]) - 1 / math.log(1 + order[j]))
                    total = total + weight * torch.nn.functional.softplus(beta / 2 * (deltas[i] - deltas[j]))
    return total / len(batch["phi"])


# --- the whole step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_full_tuning_is_what_the_equations_say(make, batch_of, stir, family):
    """Frozen copy as reference, float64: loss and every gradient equal a derivation without LoRA and without us."""
    trainer = make(family, full_finetune=True, beta=40.0)
    trainer.generator.model.double()
    base = copy.copy(trainer.generator.pipeline.scheduler)
    base.net = copy.deepcopy(trainer.generator.net)
    trainer.generator.model._frozen[0].double()
    if family == "unet":
        base.alphas_cumprod = trainer.generator.noise_schedule.alphas_cumprod
    stir(trainer)
    batch = batch_of(trainer, 2, torch.float64)
    null = {name: value.double() for name, value in trainer.null.items()}
    loss, ours = gradients(trainer, batch)
    net = trainer.generator.net
    expected = derived_loss(family, net, base, batch, null, 40.0)
    names, parameters = zip(*net.named_parameters(), strict=True)
    derived = torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True)
    assert loss.mean().item() == pytest.approx(expected.item(), rel=1e-9)
    assert_same(ours, dict(zip(names, derived, strict=True)), 1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_logs_losses_and_health(make, family):
    """The first step starts at the reference: accuracy one half, no margin, loss = log 2 times the mean of weights."""
    trainer = make(family)
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {f"health/{name}" for name in HEALTH} | {"loss", "grad_norm", "learning_rate"} <= set(first)
    assert (first["health/implicit_accuracy"], first["health/margin"]) == (0.5, 0.0)
    rows = trainer.train_dataset.targets["phi"].double()
    at_start = rank_dpo(torch.zeros_like(rows), torch.zeros_like(rows), rows, beta=1).loss
    assert at_start.min() <= first["loss"] <= at_start.max() + 1e-6
    assert last["health/margin"] != 0
    assert first["grad_norm"] > 0


def test_training_prefers_what_is_preferred(make, ranked_rows):
    """On one row, drawn the same way each step, the loss falls and pairs come right."""
    options = {"max_steps": 8, "per_device_train_batch_size": 1, "learning_rate": 2e-3, "caption_dropout": 0.0}
    trainer = make("flow", rows=ranked_rows(1), beta=500.0, **options)
    plan = trainer.train_dataset.plan
    trainer.train_dataset.plan = type("Fixed", (), {"draw": lambda self, i, _, shape: plan.draw("x", 0, shape)})()
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert losses(trainer)[0] > losses(trainer)[1] > losses(trainer)[-1]
    assert last["health/implicit_accuracy"] > 0.5


@pytest.mark.parametrize("loss", ["diffusion_dpo", "plackett_luce"])
def test_other_losses_train(make, loss):
    trainer = make("flow", loss=loss, max_steps=2)
    trainer.train()
    pair = {"diffusion_dpo": math.log(2), "plackett_luce": None}[loss]
    assert pair is None or losses(trainer)[0] == pytest.approx(pair, rel=1e-6)
    assert trainer.train_dataset[0]["phi"].shape == ((2,) if loss == "diffusion_dpo" else (4,))


def test_diffusion_dpo_takes_best_and_worst(make):
    trainer = make("flow", loss="diffusion_dpo")
    item = trainer.train_dataset[0]
    assert item["phi"].tolist() == pytest.approx([0.9, 0.1])
    plain = make("flow").train_dataset[0]
    assert torch.equal(item["latents"], plain["latents"][[0, 1]])


def own_loss(policy_err, reference_err, phi, *, beta):
    """A loss of the user's own, with a metric of its own."""
    return LossOutput((policy_err - reference_err).square().sum(-1) * beta, {"mine": beta * phi.mean()})


def test_a_loss_of_the_users_own(make, monkeypatch):
    import sys
    import types

    module = types.ModuleType("users_losses")
    module.own = own_loss
    monkeypatch.setitem(sys.modules, "users_losses", module)
    trainer = make("flow", loss="users_losses:own", max_steps=2)
    trainer.train()
    assert "health/mine" in trainer.state.log_history[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("full", [False, True])
def test_half_precision_weights_and_autocast(make, family, full):
    """bf16 base weights with float32 trainable ones, under autocast: finite, and the step moves the weights."""
    trainer = make(family, bf16=True, full_finetune=full, max_steps=2, low_memory=True)
    trainer.generator.pipeline.text_encoder.to(torch.bfloat16)
    if not full:
        for name, parameter in trainer.generator.net.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    before = {name: value.clone() for name, value in trainer._trainable().items()}
    trainer.train()
    assert {value.dtype for value in before.values()} == {torch.float32}
    assert any(not torch.equal(value, trainer._trainable()[name]) for name, value in before.items())
    assert all(math.isfinite(value) for value in losses(trainer))


# --- shortcuts are exact --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("full", [False, True])
def test_low_memory_gradient_is_the_plain_gradient(make, batch_of, stir, family, full):
    trainer = make(family, full_finetune=full)
    trainer.generator.model.double()
    if full:
        trainer.generator.model._frozen[0].double()
    stir(trainer)
    batch = batch_of(trainer, 3, torch.float64)
    plain_loss, plain = gradients(trainer, batch)
    trainer.args.low_memory = True
    low_loss, low = gradients(trainer, batch)
    torch.testing.assert_close(low_loss, plain_loss, rtol=1e-12, atol=0)
    assert_same(low, plain, 1e-12)


@pytest.mark.parametrize("full", [False, True])
def test_gradient_checkpointing_gives_the_same_gradient(make, batch_of, stir, full):
    """The recomputation must see the adapters on, though the reference pass switched them off in between."""
    trainer = make("flow", full_finetune=full)
    trainer.generator.model.double().train()
    if full:
        trainer.generator.model._frozen[0].double()
    stir(trainer)
    batch = batch_of(trainer, 2, torch.float64)
    _, plain = gradients(trainer, batch)
    trainer.generator.model.activation_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert trainer.generator.net.is_gradient_checkpointing
    _, checkpointed = gradients(trainer, batch)
    assert_same(checkpointed, plain, 1e-12)


def test_gradient_checkpointing_trains(make):
    trainer = make("flow", gradient_checkpointing=True, max_steps=1)
    trainer.train()
    assert trainer.generator.net.is_gradient_checkpointing
    assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize(("family", "full"), [("unet", False), ("flow", True)])
def test_precomputed_reference_is_the_reference(make, monkeypatch, tmp_path, family, full):
    """Over two epochs and a half; a second run with another beta and policy seed shares the file."""
    shared = {"max_steps": 5, "full_finetune": full, "cache_dir": str(tmp_path / "cache")}
    plain = make(family, **shared)
    plain.train()
    ready = make(family, precompute_reference=True, **shared)
    assert ready.train_dataset.reference.shape == (3, 4, 4)
    ready.train()
    assert losses(ready) == pytest.approx(losses(plain), rel=1e-5)
    monkeypatch.setattr(reference, "_one_epoch", None)  # any further forward would fail
    again = make(family, precompute_reference=True, **shared, beta=7.0, seed=9)
    assert torch.equal(again.train_dataset.reference, ready.train_dataset.reference)
    changes = {"noise_seed": 1, "share_noise": False, "caption_dropout": 0.5, "t_min": 0.5, "max_steps": 7}
    for other in ({name: value} for name, value in changes.items()):
        with pytest.raises(TypeError, match="not callable"):
            make(family, precompute_reference=True, **{**shared, **other})


def test_precomputing_spends_no_epoch_too_many(make, ranked_rows):
    """5 rows in batches of 2, accumulated twice: 2 steps an epoch (the last of one batch); 5 steps touch 3 epochs."""
    trainer = make("flow", rows=ranked_rows(5))
    trainer.args.gradient_accumulation_steps, trainer.args.max_steps = 2, 5
    shapes = trainer.train_dataset.latent_shapes
    assert reference.epochs_needed(trainer.args, shapes) == 3
    trainer.args.dataloader_drop_last = True
    assert reference.epochs_needed(trainer.args, shapes) == 5
    trainer.args.max_steps, trainer.args.num_train_epochs = -1, 1.5
    assert reference.epochs_needed(trainer.args, shapes) == 2


def test_base_fingerprint_ignores_adapters_and_sees_training(make, load):
    generator = load("flow")
    plain = reference.fingerprint(generator.net)
    generator.add_lora(2, None, None, 0.0)
    assert reference.fingerprint(generator.net) == plain
    with torch.no_grad():
        generator.net.proj_out.weight[0, 0] += 1e-3
    assert reference.fingerprint(generator.net) != plain


def test_the_velocity_space_weighs_policy_and_reference_alike(make, batch_of, stir):
    """Both errors carry 1 / alpha(t)^2, in one batched call, one by one, and with residuals for the protection."""
    native, weighted = (make("unet", error_space=space) for space in ("native", "velocity"))
    for trainer in (native, weighted):
        stir(trainer)
    batch = batch_of(weighted)
    batch["t"] = torch.tensor([0.1, 0.3, 0.6]).unsqueeze(1).expand(batch["t"].shape)
    alpha_PK, _ = weighted.generator.noise_schedule.coefficients(batch["t"])
    with torch.no_grad():
        plain_PK, errors_PK = (trainer.errors(trainer.model, batch) for trainer in (native, weighted))
        torch.testing.assert_close(errors_PK, plain_PK / alpha_PK.square())
        torch.testing.assert_close(weighted.errors(weighted.model, batch, one_by_one=True), errors_PK)
        reference_PK = native.reference_errors(native.model, batch)
        torch.testing.assert_close(weighted.reference_errors(weighted.model, batch), reference_PK / alpha_PK.square())


@pytest.mark.parametrize("low_memory", [False, True])
def test_gradient_accumulation_is_a_larger_batch(make, low_memory):
    shared = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "max_grad_norm": 0.5}
    runs = [
        make("flow", per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, low_memory=low, **shared)
        for size, low in ((4, False), (1, low_memory), (2, low_memory))
    ]
    for run in runs:
        run.train()
    whole, *split = runs
    for run in split:
        assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
        assert_same({n: p.detach() for n, p in run._trainable().items()}, whole._trainable(), 1e-5)


# --- options --------------------------------------------------------------------------------------------------------


def test_the_sft_term_is_the_winners_error(make, batch_of, stir):
    trainer, added = make("flow"), make("flow", sft_weight=0.3)
    for one in (trainer, added):
        stir(one)
    batch = batch_of(trainer)
    with torch.no_grad():
        plain, both = (one.method_loss(one.model, batch).loss for one in (trainer, added))
        errors = trainer.errors(trainer.model, batch)
    best = batch["phi"].argmax(-1)
    torch.testing.assert_close(both - plain, 0.3 * errors[torch.arange(3), best])


def test_protection_changes_gradients_and_no_value(make, batch_of, stir):
    trainer = make("flow")
    stir(trainer)
    batch = batch_of(trainer)
    loss, plain = gradients(trainer, batch)
    trainer.args.protect_winner = 0.9
    same, protected = gradients(trainer, batch)
    torch.testing.assert_close(same, loss)
    assert any((protected[name] - plain[name]).abs().max() > 1e-6 for name in plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_source": "labels"}, "rank_source is 'labels'; use label or model"),
        ({"weighting": "ndcg"}, "weighting is 'ndcg'; use rank_gain or gain or none"),
        ({"beta": 0.0}, "beta is 0.0; it must be positive"),
        ({"t_min": 1.0}, r"t_min is 1.0; it must lie in \[0, 1\)"),
        ({"caption_dropout": 1.5}, r"caption_dropout is 1.5; it must lie in \[0, 1\]"),
        ({"lora_rank": 0}, "lora_rank is 0; give at least 1"),
        ({"lora_alpha": 0}, "lora_alpha is 0; it must be positive"),
        ({"lora_dropout": 1.0}, r"lora_dropout is 1.0; it must lie in \[0, 1\)"),
        ({"fps": float("nan")}, "fps is nan; it must be positive"),
        ({"seed": -1}, r"seed is -1; NumPy takes seeds from 0 to 2\*\*32 - 1"),
        ({"data_seed": 2**32}, "data_seed is 4294967296; NumPy takes"),
        ({"protect_winner": 0.9, "loss": "plackett_luce"}, "protect_winner needs pairs"),
        ({"protect_winner": 0.9, "low_memory": True}, "switch off low_memory"),
        ({"full_finetune": True, "lora_targets": ["to_q"]}, "exclude each other"),
        ({"logging_nan_inf_filter": True}, "must be false"),
        ({"hub_strategy": "checkpoint"}, "use end or every_save"),
    ],
)
def test_contradictory_settings_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        RankDPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a device takes bf16 as it is")
def test_bf16_needs_no_word_of_the_cpu(tmp_path):
    """Trainer alone refuses bf16 without a GPU unless use_cpu is said."""
    assert RankDPOConfig(output_dir=str(tmp_path), bf16=True).use_cpu


def test_an_unknown_loss_is_named_at_once(tmp_path):
    RankDPOConfig(output_dir=str(tmp_path), use_cpu=True, loss="not_imported:here")
    with pytest.raises(UnknownNameError, match=r"unknown loss 'rankdpo'\. Did you mean 'rank_dpo'"):
        RankDPOConfig(output_dir=str(tmp_path), use_cpu=True, loss="rankdpo")


def test_full_tuning_of_a_model_with_an_adapter_is_refused(make, load, ranked_rows, tmp_path, monkeypatch):
    from alignkit.trainers.rankdpo import RankDPOTrainer

    generator = load("flow")
    generator.add_lora(2, None, None, 0.0)
    arguments = RankDPOConfig(output_dir=str(tmp_path), use_cpu=True, full_finetune=True)
    with pytest.raises(ConfigError, match="merge the adapter first"):
        RankDPOTrainer(generator, arguments, ranked_rows(2))


@pytest.mark.parametrize(
    ("phi", "drop", "message"),
    [
        ([(0.5,)], [], "K >= 2 candidates, these have 1"),
        ([(0.5, 0.5)], [], "every row is a tie"),
        ([(0.5, 0.1)], ["phi"], r"need the column phi; these have \['prompt_id', 'prompt', 'images'\]"),
        ([(0.5, 0.1)], ["images"], r"lacks \['images'\]"),
    ],
)
def test_rows_that_cannot_be_ranked(make, ranked_rows, phi, drop, message):
    with pytest.raises(DataError, match=message):
        make("flow", rows=ranked_rows(2, phi).remove_columns(drop))


@pytest.mark.parametrize("precompute", [False, True])
def test_a_step_does_not_walk_over_all_modules(make, monkeypatch, precompute):
    """On SDXL's 7,529 modules with a LoRA each walk costs 20 to 40 ms; here those of whole networks are counted."""
    trainer = make("unet", max_steps=3, precompute_reference=precompute, logging_steps=10)
    generator, walks, steps = trainer.generator, [], []
    whole = {generator.model, generator.net, generator.conditioner, *generator.conditioner.encoders.values()}
    real = torch.nn.Module.named_modules

    def named_modules(module, *rest, **options):
        if module in whole and len(steps) == 2:  # the end of the second step and the third: the first makes lists
            walks.append(traceback.format_stack(limit=6))
        return real(module, *rest, **options)

    monkeypatch.setattr(torch.nn.Module, "named_modules", named_modules)
    step = trainer.training_step
    monkeypatch.setattr(trainer, "training_step", lambda *a, **k: (step(*a, **k), steps.append(1))[0])
    trainer.train()
    assert walks == []

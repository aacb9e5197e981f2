"""Reward gradients equal plain autograd over a chain written out here; caps, limits, refusals and ranks."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import datasets
import pytest
import torch
from red_reward import PROMPTS, SETTINGS, STEPS, Red
from safetensors.torch import load_file
from two_processes import run_two

from alignkit.diffusion.estimators import ESTIMATORS
from alignkit.errors import ConfigError, DataError, NumericsError, UnknownNameError
from alignkit.records import Scores, texts
from alignkit.seeds import derive_seed


class RedVideo(Red):
    modality = "video"

    def __call__(self, media, prompts):
        return Scores(torch.sin(3 * media[:, :, 0]).mean((1, 2, 3)))


class Blind(Red):
    def __call__(self, media, prompts):
        return Scores((media * 255).round().mean((1, 2, 3)))


class Fixed(Red):
    differentiable = False


@pytest.fixture
def make(load, tmp_path):
    """A trainer on prompts, from config keys."""
    from alignkit.trainers.reward_flow import RewardConfig, RewardTrainer

    def build(family="flow", *, rewards=None, rows=PROMPTS, held_out=None, kind=(RewardConfig, RewardTrainer), **keys):
        args = kind[0](**{**SETTINGS, "output_dir": str(tmp_path / "run"), **keys})
        return kind[1](load(family), args, rows, held_out, rewards=rewards or {"red": Red()})

    return build


def exact(trainer):
    """The trainer in float64, off the zero of LoRA initialisation, and a batch of two rows."""
    trainer.generator.model.double()
    trainer.generator.pipeline.vae.double()
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer._trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return trainer.data_collator([trainer.train_dataset[row] for row in range(2)])


def gradients(trainer, loss):
    found = torch.autograd.grad(loss, list(trainer._trainable().values()), allow_unused=True)
    return torch.cat([grad.flatten() for grad in found if grad is not None])


def flown(trainer, batch):
    return gradients(trainer, trainer.method_loss(trainer.model, batch).loss.mean())


def derived(trainer, batch, active, *, end=STEPS - 1, kl=0.0, noise_samples=0, eta=0.0, level=0.0):
    """The loss by a chain of plain tensors, with no checkpoint and nothing of the engine but the network and its times.

    Euler's step for flow, Song's DDIM step for eps; guidance 2; inactive steps have constant predictions.
    `eta`: DDIM's, in its paper's form; `level`: the noise of Flow-GRPO's step, in its authors' form.
    """
    generator, flow = trainer.generator, trainer.generator.prediction == "flow"
    grid = generator.grid(STEPS, generator.latent_shape(16, 16))
    sources = [torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]]
    with torch.no_grad():
        cond = generator.encode_prompts(texts(batch["prompts"]))

    def noise():
        shape = generator.latent_shape(16, 16)
        return torch.cat([torch.randn(1, *shape, generator=source) for source in sources]).double()

    def guided(x, index):
        t = grid.t[index].double().expand(len(x))
        null = generator.model(x, t, cond.unconditional())
        return null + 2.0 * (generator.model(x, t, cond) - null)

    def step(x, p, index, last):
        alpha, sigma = grid.alpha[index].double(), grid.sigma[index].double()
        after = -1 if last else index
        alpha_next, sigma_next = grid.alpha_next[after].double(), grid.sigma_next[after].double()
        keyed = [torch.Generator().manual_seed(derive_seed("step", int(seed), index)) for seed in batch["seed"]]
        z = torch.cat([torch.randn(1, *x.shape[1:], generator=source) for source in keyed]).double()
        if eta and sigma_next > 0:
            now, then = alpha**2, alpha_next**2
            c = eta * ((1 - then) / (1 - now)).sqrt() * (1 - now / then).sqrt()
            return alpha_next * (x - sigma * p) / alpha + (1 - then - c**2).sqrt() * p + c * z
        if level and sigma_next > 0:
            dt, w = sigma_next - sigma, level * (sigma / (1 - (sigma_next if sigma == 1 else sigma))).sqrt()
            mean = x * (1 + w**2 / (2 * sigma) * dt) + p * (1 + w**2 * (1 - sigma) / (2 * sigma)) * dt
            return mean + w * (-dt).sqrt() * z
        return x + (sigma_next - sigma) * p if flow else alpha_next * (x - sigma * p) / alpha + sigma_next * p

    def reward(x):
        config = generator.pipeline.vae.config
        raw = x / config.scaling_factor + (config.shift_factor or 0.0)
        return Red()((generator.pipeline.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1), None).total

    x, penalties = noise() * grid.start, []
    for index in range(end + 1):
        p = guided(x, index)
        if index in active and kl:
            with generator.reference():
                base = guided(x, index)
            weight = 1.0 if flow else min(20.0, 1 / float(grid.alpha[index]) ** 2)
            penalties.append(weight * (p - base).square().mean((1, 2, 3)))
        x = step(x, p if index in active else p.detach(), index, index == end)
    rewards = [reward(x)]
    for _ in range(noise_samples):
        start = grid.alpha[end].double() * x.detach() + grid.sigma[end].double() * noise()
        rewards.append(reward(step(start, guided(start, end), end, True)))
    loss = -torch.stack(rewards).mean()
    return loss + kl * torch.stack(penalties).mean() if kl else loss


@pytest.mark.parametrize("family", ["flow", "unet"])
def test_the_gradient_is_that_of_plain_autograd(make, family):
    """One, two and all steps; an early end; further noise samples; and the velocity penalty. In float64."""
    trainer = make(family, state_gradient_cap=None, kl_weight=0.7)
    batch = exact(trainer)
    cases = [
        ({"gradient_steps": "last 1"}, {2}, {}),
        ({"gradient_steps": "last 2"}, {1, 2}, {}),
        ({"gradient_steps": "all"}, {0, 1, 2}, {"kl": 0.7}),
        ({"gradient_steps": "first 1"}, {0}, {}),
        ({"gradient_steps": "last 1", "early_end": "1"}, {1}, {"end": 1}),
        ({"gradient_steps": "last 1", "noise_samples": 2}, {2}, {"noise_samples": 2}),
        ({"eta": 0.8, "gradient_steps": "all"}, {0, 1, 2}, {"eta": 0.8})
        if family == "unet"
        else ({"flow_sde": 0.7, "gradient_steps": "all"}, {0, 1, 2}, {"level": 0.7}),
    ]
    settings = trainer.args
    for keys, active, told in cases:
        args = replace(settings, kl_weight=told.get("kl", 0.0), **keys)
        trainer.args, trainer._estimator = args, args.gradient
        found, expected = flown(trainer, batch), gradients(trainer, derived(trainer, batch, active, **told))
        assert expected.norm() > 0
        assert (found - expected).norm() <= 1e-6 * expected.norm(), keys  # grids are float32


def test_the_cap_scales_what_comes_before_it(make):
    """One row, two steps: last step's part + factor x first step's part, the factor from the norms without a cap."""
    trainer = make(state_gradient_cap=None, gradient_steps="all", sampling_steps=2)
    batch = {name: value[:1] for name, value in exact(trainer).items()}
    whole, norms = flown(trainer, batch), trainer._gradients.norms
    trainer._estimator = replace(trainer._estimator, steps="last 1")
    last = flown(trainer, batch)
    trainer._estimator, trainer.args.state_gradient_cap = replace(trainer._estimator, steps="all"), 0.3
    factor = 0.3 * norms[1] / norms[0]
    assert factor < 0.9
    torch.testing.assert_close(flown(trainer, batch), last + factor * (whole - last))
    assert trainer._gradients.norms[0] == pytest.approx(norms[0].item())  # what is logged is before the cap


class Satisfied(Red):
    """Almost 0, with almost no gradient."""

    def __call__(self, media, prompts):
        return Scores(torch.nn.functional.logsigmoid(18 + media.mean((1, 2, 3))))


def test_the_penalty_of_a_satisfied_reward_is_no_explosion(make):
    """The state's gradient is compared with those that begin in the penalty too, and the cap does not remove these."""
    trainer = make(rewards={"red": Satisfied()}, kl_weight=50.0, gradient_steps="all", max_steps=3)
    trainer.train()
    growth, norms = trainer._gradients.growth(), trainer._gradients.norms
    assert norms[0].max() > 1e3 * norms[STEPS - 1].max()
    assert growth[0] < 1e2
    assert growth[STEPS - 1] == 1.0


def test_a_fixed_batch_rises(make):
    """Held-out prompts are the training prompts; several rewards, a hinge, and what is logged."""
    rewards = {"red": Red(), "other": Red(), "unused": Fixed()}
    keys = {"reward_weights": {"red": 1, "other": 3}, "reward_targets": {"other": -5.0}, "gradient_steps": "all"}
    trainer = make(
        "unet",
        learning_rate=3e-2,
        rewards=rewards,
        held_out=PROMPTS,
        max_steps=6,
        per_device_train_batch_size=4,
        **keys,
    )
    before = trainer.evaluate()["eval_reward/red"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_reward/red"] > before + 0.03
    assert after["eval_satisfied/other"] == 1.0
    assert after["eval_loss"] == pytest.approx(-(0.25 * after["eval_reward/red"] + 0.75 * -5.0), rel=1e-5)
    logged = trainer.state.log_history[1]
    assert {"health/reward", *(f"health/state_gradient/{step:02d}" for step in range(STEPS))} <= set(logged)
    assert logged["grad_norm"] > 0


def test_rows_do_not_hang_on_the_batch(make):
    """Micro-batches of one row equal one batch: draws are keyed by prompt and by step."""
    ends, starts = [], []
    for size in (1, 4):
        keys = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "optim": "sgd"}
        trainer = make(estimator="drtune", gradient_steps="even 1", **keys)
        starts.append({name: value.detach().clone() for name, value in trainer._trainable().items()})
        trainer.train()
        ends.append(trainer._trainable())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-7)
    assert any(not torch.equal(value, starts[0][name]) for name, value in ends[0].items())


def test_bf16_gradients_reach_the_weights(make):
    """Autocast keeps casts of weights that a step without gradients has made; a step with gradients makes its own."""
    trainer = make(bf16=True, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_a_video_model_gets_the_gradient_of_plain_autograd(make, monkeypatch):
    """A causal video VAE is decoded again in the backward pass; without any checkpoint the gradient is the same."""
    from alignkit.trainers import reward_flow

    keys = {"num_frames": 5, "gradient_steps": "last 2", "state_gradient_cap": None}
    trainer = make("wan", rewards={"red": RedVideo()}, **keys)
    batch = exact(trainer)
    found = flown(trainer, batch)
    monkeypatch.setattr(reward_flow.RewardConfig, "decoding", None)
    monkeypatch.setattr(reward_flow, "rollout", functools.partial(reward_flow.rollout, checkpointed=False))
    torch.testing.assert_close(found, flown(trainer, batch))
    assert found.norm() > 0
    with pytest.raises(ConfigError, match="reward 'red' scores images, but here are videos"):
        make("wan", num_frames=5)


def test_steps_of_the_other_expert_are_refused_and_it_gets_no_gradient(make):
    """Of Wan 2.2's two experts the second has the last steps here, the first is trained."""
    rewards = {"rewards": {"red": RedVideo()}, "num_frames": 5, "max_steps": 1}
    trainer = make("wan_high", **rewards, gradient_steps="last 1")
    with pytest.raises(ConfigError, match=r"gradient_steps: at training step 0 .*\[2\].* call no trained .* expert"):
        trainer.train()
    trainer = make("wan_high", **rewards, gradient_steps="first 1")
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0
    parts = trainer.generator.pipeline.components
    assert all(p.grad is None for p in parts["transformer_2"].parameters())


def test_explosion_stops_before_the_weights_change(make):
    trainer = make(gradient_steps="all", growth_limit=1e-9)
    before = {name: value.detach().clone() for name, value in trainer._trainable().items()}
    with pytest.raises(NumericsError, match=r"after denoising step 2 is 1 times .* at training step 0"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer._trainable().items())


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Fixed, "reward 'red' is not differentiable"),
        (Blind, "reward 'red' is declared differentiable, but its gradient at the pixels is zero"),
    ],
)
def test_a_reward_without_gradient_is_refused(make, reward, message):
    with pytest.raises(ConfigError, match=message):
        make(rewards={"red": reward()})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"reward_weights": None}, "reward_weights is missing"),
        ({"reward_weights": {"red": 0.0}}, "reward_weights.red is 0.0; it must be positive"),
        ({"reward_targets": {"blue": 1.0}}, "reward_targets.blue"),
        ({"gradient_steps": "window 1-3"}, "the chain has steps 0 to 2"),
        ({"estimator": "draftt"}, "Did you mean 'draft'"),
        ({"train_text_encoder": True}, "train_text_encoder"),
        ({"height": 0}, "height is 0"),
        ({"eta": 1.5}, "eta is 1.5; it must lie in"),
        ({"eta": 0.5, "flow_sde": 0.7}, "set one of them"),
        ({"family": "unet", "flow_sde": 0.7}, "eta is 0.0, flow_sde 0.7: .* cannot have them"),
        ({"family": "lcm", "eta": 0.5}, "eta is 0.5, flow_sde 0.0: .* cannot have them"),
    ],
)
def test_bad_settings_are_named(make, keys, message):
    with pytest.raises(ConfigError, match=message):
        make(**keys)


def test_a_weight_without_a_reward_is_named(make):
    with pytest.raises(UnknownNameError, match=r"'redd', which is none of the rewards\. Did you mean 'red'"):
        make(reward_weights={"redd": 1.0})


def test_drf_needs_questions(make):
    from alignkit.trainers.drf import DRFConfig, DRFTrainer

    rows = [{"prompt": "a ring", "questions": ["Is there a ring?"]}, {"prompt": "a cross", "questions": []}]
    keys = {"kind": (DRFConfig, DRFTrainer), "rewards": {"critic": Red()}, "reward_weights": {"critic": 1.0}}
    with pytest.raises(DataError, match="prompt 'a cross' has no questions"):
        make(rows=rows, **keys)
    trainer = make(rows=rows[:1], **keys)
    assert trainer.train_dataset[0]["prompts"].metadata["questions"] == ["Is there a ring?"]
    assert trainer.args.gradient.steps == "last 3"


def test_drf_uses_the_estimator_that_is_named(tmp_path):
    from alignkit.trainers.drf import DRFConfig

    keys = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    for name, estimator in ESTIMATORS.items():
        assert DRFConfig(estimator=name, **keys).gradient == estimator
    assert DRFConfig(**keys).gradient.steps == "last 3"
    assert DRFConfig(estimator="exact", gradient_steps="last 2", **keys).gradient.steps == "last 2"


TWO = """
import torch

from alignkit.aspects import questions_of
from alignkit.records import Scores
from alignkit.trainers.drf import DRFTrainer
from alignkit.trainers.reward_flow import RewardTrainer


class Red:
    name, modality, differentiable = "red", "image", True

    def __call__(self, media, prompts):
        return Scores(media[:, 0].square().mean((1, 2)))


class WithRed(RewardTrainer):
    def __init__(self, *args, **options):
        super().__init__(*args, rewards={"red": Red()}, **options)


class Critic(Red):
    asks_questions, needs_prompt, native_range = True, True, (0.0, 1.0)
    comparable_across_prompts, licence, source = True, "Apache-2.0", "here"

    def __call__(self, media, prompts):
        channels = [int(question.text) for prompt in prompts for question in questions_of(prompt)]
        return Scores(torch.stack([pixels[channel].square().mean() for pixels, channel in zip(media, channels)]))


class WithCritic(DRFTrainer):
    def __init__(self, *args, **options):
        super().__init__(*args, rewards={"red": Critic()}, **options)
"""


def test_two_processes_equal_one(tmp_path, model_folders, worker, monkeypatch):
    """The worker gives no rewards, so the trainer has its own. Steps are repeated inside DDP's backward pass; every
    rank draws the same steps. With windows per aspect each rank's rows lack the other rank's window.
    """
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "two_reward_flow.py").write_text(TWO)
    asked = [[{"text": str(row // 2), "aspect": ("alignment", "quality")[row // 2]}] for row in range(4)]
    datasets.Dataset.from_dict({"prompt": PROMPTS, "questions": asked}).save_to_disk(tmp_path / "rows")
    keys = {"optim": "sgd", "kl_weight": 0.1, "train_sampling_strategy": "sequential"}
    windows = {"gradient_steps": "last 1", "aspect_steps": {"alignment": "first 1"}}
    methods = {
        ("reward_flow:RewardConfig", "WithRed"): {"estimator": "alignprop"},
        ("drf:DRFConfig", "WithCritic"): windows,
    }
    jobs = [
        {
            "model": str(model_folders["flow"]),
            "rows": str(tmp_path / "rows"),
            "method": [f"alignkit.trainers.{config}", f"two_reward_flow:{trainer}"],
            "path": str(tmp_path),
            "settings": SETTINGS | keys | own | {"output_dir": str(tmp_path / trainer), "ddp_backend": "gloo"},
        }
        for (config, trainer), own in methods.items()
    ]
    run_two(tmp_path, jobs)
    for number, job in enumerate(jobs):
        alone = {"output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 4, "ddp_backend": None}
        one = worker["train"](job | {"settings": job["settings"] | alone})
        stored = tmp_path / ("job-0.log" if number == 0 else f"job-0-{number}.log")
        history = json.loads(stored.read_text())
        for name in ("loss", "grad_norm", "health/reward/red", "health/state_gradient/02"):
            found, expected = ([log[name] for log in logs if name in log] for logs in (history, one.state.log_history))
            assert len(expected) == 2
            assert found == pytest.approx(expected, rel=1e-4), name
        weights = load_file(stored.with_suffix(".safetensors"))
        for name, value in one._trainable().items():
            torch.testing.assert_close(weights[name], value.detach(), rtol=1e-4, atol=1e-6)

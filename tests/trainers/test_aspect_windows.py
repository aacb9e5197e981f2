"""Step windows per aspect: the sum of separate runs, shared predictions with coupling 0, and what is refused."""

from __future__ import annotations

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.records import Prompt, Scores
from alignkit.trainers.aspect_windows import ByWindow, windows_of
from rewards.models.questions import named, parts_of

QUESTIONS = [
    {"text": "red", "aspect": "alignment", "weight": 3.0},
    {"text": "green", "aspect": "quality", "weight": 2.0, "name": "sharp"},
    {"text": "blue", "aspect": "", "weight": 1.0},
    {"text": "red", "aspect": "quality", "weight": 0.5},
]
ROWS = [{"prompt": "a red circle", "questions": QUESTIONS}, {"prompt": "a cross", "questions": QUESTIONS[1:3]}]
WINDOWS = {"alignment": "first 1", "quality": "last 1"}
ACTIVE = {"first 1": ("alignment",), "last 1": ("quality",), "last 2": ("",)}


class Critic:
    """Each question is a curved function of one channel; with `counted`, other aspects count 0."""

    name, modality, needs_prompt, differentiable, asks_questions = "critic", "image", True, True, True
    comparable_across_prompts, native_range, licence, source = True, (-1.0, 1.0), "Apache-2.0", "here"

    def __init__(self, counted=None):
        self.counted, self.calls = counted, []

    def __call__(self, media, prompts):
        own = [named(prompt.metadata["questions"]) for prompt in prompts]
        self.calls.append([[question.name for question in questions] for questions in own])
        rows = []
        for pixels, questions in zip(media, own, strict=True):
            values = {q.name: torch.sin(3 * pixels[["red", "green", "blue"].index(q.text)]).mean() for q in questions}
            ignored = [q.name for q in questions if self.counted is not None and q.aspect not in self.counted]
            rows.append({name: value * (name not in ignored) for name, value in values.items()})
        return Scores(*parts_of(own, rows))


class Plain(Critic):
    """A reward that asks nothing."""

    asks_questions = False

    def __call__(self, media, prompts):
        return Scores(media.square().mean((1, 2, 3)))


SETTINGS = {
    "reward_weights": {"critic": 1.0},
    "sampling_steps": 3,
    "guidance_scale": 2.0,
    "height": 16,
    "width": 16,
    "lora_rank": 2,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_steps": "last 2",
    "state_gradient_cap": None,
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
}


@pytest.fixture
def make(load, tmp_path, stir):
    """A trainer with a LoRA off its zero, from config keys."""
    from alignkit.trainers.drf import DRFConfig, DRFTrainer

    def build(family="flow", *, rewards=None, rows=ROWS, **keys):
        args = DRFConfig(**{**SETTINGS, "output_dir": str(tmp_path / "run"), **keys})
        trainer = DRFTrainer(load(family), args, rows, rewards=rewards or {"critic": Critic()})
        stir(trainer)
        return trainer

    return build


def gradients(trainer, loss=None):
    """By the trained weights, of the mean loss of both rows, in float64."""
    trainer.generator.model.double()
    trainer.generator.pipeline.vae.double()
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(len(trainer.train_dataset))])
    loss = trainer.method_loss(trainer.model, batch).loss.mean()
    found = torch.autograd.grad(loss, list(trainer._trainable().values()), allow_unused=True)
    return torch.cat([grad.flatten() for grad in found if grad is not None]), loss.item()


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("flow", {}),
        ("flow", {"coupling": 0.0, "kl_weight": 0.5}),
        ("unet", {"coupling": 0.5, "kl_weight": 0.5, "eta": 0.7, "early_end": "1-2"}),
        ("unet", {"coupling": 0.0, "eta": 0.7}),
        ("lcm", {"guidance_scale": 8.5}),
    ],
)
def test_the_gradient_is_the_sum_of_separate_runs(make, family, keys):
    """A run for each window, in which only that window's questions count, with their share of the whole weight."""
    found, loss = gradients(make(family, aspect_steps=WINDOWS, **keys))
    total, value = 0, 0
    for steps, aspects in ACTIVE.items():
        own = {**keys, "kl_weight": keys.get("kl_weight", 0.0) if steps == "last 2" else 0.0}
        part, one = gradients(make(family, rewards={"critic": Critic(aspects)}, **{**own, "gradient_steps": steps}))
        total, value = total + part, value + one
    assert (found - total).norm() <= 1e-6 * total.norm()
    assert loss == pytest.approx(value, rel=1e-6)
    one_window, _ = gradients(make(family, **keys))
    assert (one_window - found).norm() > 0.05 * found.norm()


@pytest.mark.parametrize(("coupling", "forward"), [(1.0, 3 + 2 + (1 + 3) + (1 + 1)), (0.0, 3 + 3)])
def test_the_denoisers_calls_are_what_the_docstring_says(make, coupling, forward):
    """Windows last 2, first 1, last 1 of 3: each chain from its first step on and its repeated steps, or all once."""
    trainer = make(aspect_steps=WINDOWS, coupling=coupling, guidance_scale=1.0)
    calls = []
    trainer.generator.net.register_forward_pre_hook(lambda *_: calls.append(1))  # repeated steps end early
    gradients(trainer)
    assert len(calls) == forward


def test_a_critic_reads_each_question_once_and_another_reward_the_default_window(make):
    critic = Critic()
    weights = {"critic": 1.0, "plain": 2.0}
    rewards = {"critic": critic, "plain": Plain()}
    trainer = make(aspect_steps=WINDOWS, rewards=rewards, reward_weights=weights, reward_targets={"critic": -3.0})
    critic.calls.clear()
    satisfied, _ = gradients(trainer)
    forward = [[["question_3"], ["question_2"]], [["question_1"]], [["sharp", "question_4"], ["sharp"]]]
    assert critic.calls[:3] == forward
    alone, _ = gradients(make(rewards={"plain": Plain()}, reward_weights={"plain": 2.0}))
    torch.testing.assert_close(satisfied, alone * 2 / 3)


class Stored(Critic):
    def __call__(self, media, prompts):
        scores = super().__call__(media, prompts)
        return Scores(scores.total, {**scores.parts, "eight_bit": scores.total.detach()})


def test_on_equal_media_all_parts_are_those_of_the_plain_reward():
    """The third prompt's question `sharp` has another aspect than in the other prompts."""
    other = [{**QUESTIONS[1], "aspect": "alignment"}, {"text": "red", "aspect": "quality", "name": "clean"}]
    prompts = [Prompt.from_text(row["prompt"], questions=row["questions"]) for row in ROWS]
    prompts.append(Prompt.from_text("a ring", questions=other))
    media = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    windows = windows_of(WINDOWS, "last 2")
    plain, found = Stored()(media, prompts), ByWindow(Stored(), windows)(torch.stack([media] * 3, 1), prompts)
    torch.testing.assert_close(found.total, plain.total)
    torch.testing.assert_close(found.parts, dict(plain.parts), equal_nan=True)


def test_a_training_logs_the_largest_norms(make):
    trainer = make(aspect_steps=WINDOWS, state_gradient_cap=1.0)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {f"health/state_gradient/{step:02d}" for step in range(3)} <= set(logged)
    assert logged["grad_norm"] > 0
    assert logged["health/reward/critic"] == pytest.approx(-logged["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"aspect_steps": {"alignment": "last 4"}}, "K is from 1 to 3"),
        ({"aspect_steps": {"alignment": "later 1"}}, "steps with gradients are 'later 1'"),
        ({"aspect_steps": {"qualities": "last 1"}}, "aspect_steps.qualities: no question .* Did you mean 'quality'"),
        ({"aspect_steps": WINDOWS, "noise_samples": 2}, "exclude each other"),
        (
            {"aspect_steps": WINDOWS, "rewards": {"p": Plain()}, "reward_weights": {"p": 1.0}},
            "none of the rewards p asks the questions",
        ),
    ],
)
def test_what_cannot_be_is_named(make, keys, message):
    with pytest.raises(ConfigError, match=message):
        make(**keys)

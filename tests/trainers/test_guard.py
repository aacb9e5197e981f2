"""The guard stops, restores and survives a resume; what it reads is computed by hand."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from red_reward import PROMPTS, SETTINGS, Red

from alignkit.errors import ConfigError, UnknownNameError
from alignkit.records import Prompt, Sampling, Scores
from alignkit.resolve import resolve
from alignkit.shipped import model_path
from alignkit.trainers.guard import FALLEN, Guard
from alignkit.trainers.shared_weights import shared_weights
from alignkit.trainers.validation import Validation
from rewards import REWARDS
from rewards.composite import Composite, Member

SMALL = Sampling(2, 1.0, 16, 16)
EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "sampling_steps": 2, "guidance_scale": 1.0}


class Scripted(Red):
    """The next value of a script at every call with three prompts, for all but the last of them."""

    def __init__(self, *script):
        self.script = list(script)

    def __call__(self, media, prompts):
        value = self.script.pop(0)
        return Scores(torch.tensor([value - 0.1, value, value + 0.1]))


class Network(Red):
    def __init__(self, weight):
        self.parts = {"inner": [torch.nn.Linear(4, 4)]}
        self.parts["inner"][0].weight.data = weight


@pytest.fixture
def make(load, tmp_path):
    """A trainer whose validation scores three prompts by `held_out`, in one folder."""
    from alignkit.trainers.reward_flow import RewardConfig, RewardTrainer

    def build(held_out=None, **keys):
        settings = SETTINGS | EACH_STEP | {"output_dir": str(tmp_path / "run")} | keys
        trained = settings.pop("trained", Red())
        validation = None
        if held_out is not None:
            validation = Validation([Prompt.from_text(text) for text in PROMPTS[:3]], SMALL, held_out)
        args = RewardConfig(**settings)
        return RewardTrainer(load("flow"), args, PROMPTS, rewards={"red": trained}, validation=validation)

    return build


def values(trainer):
    return {name: value.detach().clone() for name, value in trainer._trainable().items()}


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("alignkit.trainers.guard")]


def test_it_stops_restores_and_is_resumed(make, caplog):
    """Best after step 1, fallen after 2 and 3 (standard error 0.058): step 4 is not trained, also after a resume."""
    trainer = make({"held": Scripted(1.0, 2.0, 1.9, 1.8)}, max_steps=5)
    steps = []
    trainer.training_step, step = (
        lambda *a, **o: (steps.append(values(trainer)), step(*a, **o))[1],
        trainer.training_step,
    )
    with caplog.at_level(logging.INFO, logger="alignkit.trainers.guard"):
        trainer.train()
    assert trainer.state.global_step == len(steps) == 3
    log = [row for row in trainer.state.log_history if FALLEN in row]
    assert [row[FALLEN] for row in log] == [0, 0, 1, 2]
    assert [row["step"] for row in log] == [0, 1, 2, 3]
    assert trainer.state.best_metric == pytest.approx(2.0)
    for name, value in values(trainer).items():
        assert torch.equal(value, steps[1][name])  # the second step began with the weights after the first
    stop, result = messages(caplog)
    assert "stops at step 3 of 5, after 2 fallen evaluations: 'held' is 1.8, at step 1 it was 2" in stop
    assert "checkpoint-1" in result
    again = make({"held": Scripted(1.8)}, max_steps=5)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert all(torch.equal(value, steps[1][name]) for name, value in values(again).items())


def test_what_never_rises_ends_as_it_was(make, caplog):
    """A guard that falls from the start: the result is the model before the first step. Patience 1."""
    trainer = make({"held": Scripted(1.0, 0.5)}, max_steps=3, guard_patience=1, save_total_limit=1)
    before = values(trainer)
    trainer.train()
    assert trainer.state.global_step == 1
    assert all(torch.equal(value, before[name]) for name, value in values(trainer).items())
    assert "so the result is the model as it was" in messages(caplog)[-1]


def test_a_fallen_evaluation_is_never_the_best(make):
    """Its guard may be the highest, where diversity or motion fell."""
    trainer = make({"held": Scripted()})
    for value, fallen, best in ((1.0, 0.0, 1.0), (9.0, 1.0, 1.0), (2.0, 0.0, 2.0)):
        trainer._determine_best_metric({"eval_guard/held": value, FALLEN: fallen}, None)
        assert trainer.state.best_metric == best


def read(guard, *rows):
    """FALLEN of the rows (value, diversity), whose standard error is 0.1."""
    log = []
    for step, (value, diversity) in enumerate(rows):
        metrics = {"eval_guard/held": value, "eval_guard_error": 0.1, "eval_diversity": diversity}
        log.append(metrics | guard.read(log, step, metrics) | {"step": step})
        again = guard.read(log, step, metrics)  # an evaluation that a resumed training repeats
        assert again[FALLEN] == log[-1][FALLEN]
    return [row[FALLEN] for row in log]


def test_what_counts_as_fallen():
    guard = Guard("held", patience=2, margin=1.0, floor=0.5)
    assert read(guard, (1.0, 0.2), (0.95, 0.2), (0.85, 0.2), (0.8, 0.2), (0.95, 0.2)) == [0, 0, 1, 2, 0]
    assert read(guard, (1.0, 0.2), (1.5, 0.09), (1.2, 0.11), (0.85, 0.11)) == [0, 1, 0, 1]  # 1.5 was no best value
    assert read(Guard("held", patience=2, margin=3.0, floor=0.0), (1.0, 0.2), (0.75, 0.0)) == [0, 0]


def test_weights_are_compared(make):
    weight = torch.randn(4, 4)
    trained = Network(weight)
    with pytest.raises(ConfigError, match="guard 'other' shares weights with the trained reward 'red'"):
        make({"other": Network(weight.clone().bfloat16().float())}, trained=trained, guard="other")
    with pytest.raises(ConfigError, match="guard 'other' shares weights"):
        make({"other": trained}, trained=trained, guard="other")
    chosen = make({"other": Network(weight.clone()), "held": Network(torch.randn(4, 4))}, trained=trained)
    assert chosen._guard.name == "held"
    assert chosen.args.metric_for_best_model == "eval_guard/held"
    assert chosen.args.load_best_model_at_end
    assert chosen.args.save_strategy == "steps"


def test_the_preference_rewards_of_the_sandbox_are_related():
    """Both heads were trained from one model; CLIP was not."""
    kinds = {"careful": "preference", "showy": "preference", "clip": "clip_score"}
    loaded = {
        name: resolve(kind, REWARDS, kind="reward")(model=model_path(f"sandbox:{name}")) for name, kind in kinds.items()
    }
    assert shared_weights(loaded["careful"], loaded["showy"]) == 1
    assert shared_weights(loaded["careful"], loaded["clip"]) == 0
    within = Composite({"one": Member(loaded["careful"]), "two": Red()})
    assert shared_weights(within, loaded["careful"]) == shared_weights(loaded["careful"], loaded["careful"]) > 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"guard": "hold"}, "guard names 'hold', which is none of `validation.rewards`. Did you mean 'held'"),
        ({"guard": "red"}, "guard is 'red', which is trained on"),
        ({"guard": "held", "eval_strategy": "no"}, "guard is read at evaluations"),
        ({"metric_for_best_model": "eval_reward/held"}, "the guard 'held' chooses the best checkpoint"),
        ({"guard_floor": 2.0}, "guard_floor is 2.0"),
    ],
)
def test_bad_guards_are_named(make, keys, message):
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        make({"held": Scripted()}, **keys)


def test_no_guard_is_a_warning_unless_asked_for(make, caplog):
    trainer = make({"red": Red()})
    assert trainer._guard is None
    assert not trainer.args.load_best_model_at_end
    (message,) = messages(caplog)
    assert message.startswith("no guard: a reward that is maximised may rise")
    caplog.clear()
    make({"held": Scripted()}, guard=None)
    assert not messages(caplog)


class Clips:
    name = "clips"

    def generate(self, prompts, seeds, sampling):
        levels = torch.tensor([0.1001, 0.2001, 0.4001])
        media = torch.zeros(len(prompts), 3, 3, 4, 4) + levels.reshape(1, 3, 1, 1, 1)
        shift = torch.tensor([0.3 if seed % 2 else 0.0 for seed in seeds])
        return media + shift.reshape(-1, 1, 1, 1, 1)


def test_what_is_read_is_what_is_said():
    from alignkit.seeds import derive_seed

    class Level(Red):
        def __call__(self, media, prompts):
            return Scores(media.mean((1, 2, 3, 4)))

    prompts = [Prompt.from_text(text) for text in PROMPTS]
    given = {"prompts": prompts, "sampling": SMALL, "rewards": {"held": Level()}, "trained": {"level": Level()}}
    found = Validation(**given, batch_size=3, repeated=2, guard="held").run(Clips(), None)
    shifts = [[0.3 * (derive_seed(0, prompt.id, number) % 2) for prompt in prompts] for number in range(2)]
    scores = torch.tensor([0.7003 / 3 + shift for shift in shifts[0]])
    stored = torch.stack([torch.tensor([0.1001, 0.2001, 0.4001]) + shift for shift in shifts[0]]).mul(255).round() / 255
    apart = sum(abs(a - b) for a, b in list(zip(*shifts, strict=True))[:2]) / 2
    assert found == pytest.approx(
        {
            "reward/held": scores.mean().item(),
            "reward/level": scores.mean().item(),
            "eight_bit/level": stored.mean().item(),
            "motion": 0.15,
            "diversity": apart,
            "guard/held": scores.mean().item(),
            "guard_error": scores.std().item() / math.sqrt(4),
        },
        abs=1e-6,
    )
    assert abs(found["eight_bit/level"] - found["reward/level"]) > 1e-5
    assert set(Validation(**given | {"trained": {}}).run(Clips(), None)) == {"reward/held"}

"""Checks while rewards are maximised: recomputation, constant rewards, parts, a resume after an explosion."""

from __future__ import annotations

import functools
import logging
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from red_reward import PROMPTS, SETTINGS, Red
from transformers import TrainerCallback

from alignkit.errors import ConfigError, DataError, NumericsError
from alignkit.generators.decoding import Decoding
from alignkit.records import Prompt, Sampling, Scores
from alignkit.trainers.checkpoint import find_checkpoint
from alignkit.trainers.means import WeightedMeans
from alignkit.trainers.reward_watch import MOST_PARTS, ConstantWatch, logged_parts
from alignkit.trainers.self_check import SelfCheck
from alignkit.trainers.validation import Validation

QUICK = {"sampling_steps": 2, "guidance_scale": 1.0, "guard": None}


@pytest.fixture
def make(load, tmp_path):
    from alignkit.trainers.reward_flow import RewardConfig, RewardTrainer

    def build(family="flow", *, rewards=None, rows=PROMPTS, validation=None, **keys):
        args = RewardConfig(**{**SETTINGS, **QUICK, "output_dir": str(tmp_path / "run"), **keys})
        return RewardTrainer(load(family), args, rows, rewards=rewards or {"red": Red()}, validation=validation)

    return build


class Restless(Red):
    """Each call weighs the pixels by another factor."""

    calls = 0

    def __call__(self, media, prompts):
        self.calls += 1
        return Scores(media.mean((1, 2, 3)) * self.calls)


def restless(function):
    """`function`, whose results grow from call to call."""
    calls = []

    def call(*given, **options):
        calls.append(1)
        return function(*given, **options) * (1 + 0.1 * len(calls))

    return call


def growing(function):
    """`function`, whose batch has a further row in every call, as with a cache that keeps state."""
    calls = []

    def call(latents, *rest):
        calls.append(1)
        return function(torch.cat([latents] * len(calls)), *rest)[:1]

    return call


def train(trainer):
    trainer.args.max_steps = 1
    trainer.train()


@pytest.mark.parametrize(("wrap", "said"), [(restless, r"by 0\.\d+ of its norm"), (growing, "different metadata")])
def test_a_vae_that_computes_otherwise_again_is_refused(make, wrap, said):
    trainer = make()
    decoder = trainer.generator.pipeline.vae.decoder
    decoder.forward = wrap(decoder.forward)
    with pytest.raises(ConfigError, match=rf"^VAE: its gradient with recomputed activations differs.*{said}"):
        train(trainer)


def counting(forward):
    """A decoder that weighs its input by the number of the frame: right in every decoding from the first frame on."""
    frames = []

    @functools.wraps(forward)
    def call(x, feat_cache=None, **options):
        if all(cached is None for cached in feat_cache):
            frames.clear()
        frames.append(1)
        return forward(x * (1 + 0.5 * len(frames)), feat_cache=feat_cache, **options)

    return call


def test_a_clip_is_decoded_as_in_the_training(load):
    """With a checkpoint for each latent frame: repeating the whole decoding would not see this fault."""
    generator, options = load("wan"), {"half": False, "decoding": Decoding(frames=2)}
    plain = Sampling(2, 1.0, 16, 16, num_frames=9), torch.device("cpu"), nullcontext, nullcontext
    check = SelfCheck(generator, *plain, **options)
    check.run(Prompt.from_text("a ring"), {})
    decoder = generator.pipeline.vae.decoder
    decoder.forward = counting(decoder.forward)
    with pytest.raises(ConfigError, match=r"^VAE: its gradient with recomputed activations differs"):
        check.run(Prompt.from_text("a ring"), {})


class Measuring(Red):
    """Notes the shapes of clips."""

    modality = "video"

    def __init__(self):
        self.shapes = []

    def __call__(self, media, prompts):
        self.shapes.append(tuple(media.shape))
        return Scores(torch.sin(3 * media[:, :, 0]).mean((1, 2, 3)))


def test_rewards_are_checked_on_as_many_frames_as_they_are_trained_on(make):
    rewards = {"red": Measuring(), "other": Measuring()}
    keys = {"num_frames": 9, "decode_frames": 2, "per_device_train_batch_size": 1}
    train(make("wan", rewards=rewards, reward_weights={"red": 1.0, "other": 1.0}, **keys))
    assert {shape for reward in rewards.values() for shape in reward.shapes} == {(1, 2, 3, 16, 16)}


def test_the_denoiser_and_rewards_are_named_too(make):
    trainer = make()
    trainer.generator.guided = restless(trainer.generator.guided)
    with pytest.raises(ConfigError, match=r"^denoiser: its gradient"):
        train(trainer)
    several = {"rewards": {"red": Red(), "odd": Restless()}, "reward_weights": {"red": 1.0, "odd": 1.0}}
    with pytest.raises(ConfigError, match=r"^reward 'odd': its gradient"):
        train(make(**several))
    train(make(**several, self_check=False))


def test_dropout_passes_and_no_random_number_changes(make):
    """A checkpoint runs again with the same dropout. The step is the one without the check."""
    ends = []
    for self_check in (True, False):
        torch.manual_seed(3)
        trainer = make(lora_dropout=0.5, self_check=self_check)
        train(trainer)
        ends.append(trainer._trainable())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


class Referring(Red):
    """Reads the column `image` of every prompt."""

    def prepare(self, prompts):
        for prompt in prompts:
            if prompt.metadata.get("image") is None:
                raise DataError(f"prompt '{prompt.text}' has no reference")

    def __call__(self, media, prompts):
        self.prepare(prompts)
        return super().__call__(media, prompts)


def test_validation_prompts_are_prepared_before_the_training(make):
    rows = [{"prompt": text, "image": b"a picture"} for text in PROMPTS]
    keys = {"rewards": {"red": Referring()}, "rows": rows, "eval_strategy": "steps", "eval_steps": 1}
    scored = {"held": Red()}
    with pytest.raises(DataError, match="prompt 'a star' has no reference"):
        make(validation=Validation([Prompt.from_text("a star")], Sampling(2, 1.0, 16, 16), scored), **keys)
    prompts = [Prompt.from_text("a star", image=b"a picture")]
    train(trainer := make(validation=Validation(prompts, Sampling(2, 1.0, 16, 16), scored), **keys))
    assert any("eval_reward/red" in log for log in trainer.state.log_history)


def noted(watch, steps, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="alignkit.trainers.reward_watch"):
        for step, scores in enumerate(steps):
            for name, values in scores.items():
                watch.note(step, {name: torch.tensor(values)})
    return [record.getMessage() for record in caplog.records]


def test_a_constant_reward_is_named_once(caplog):
    """Rows of one or several numbers; a spread between steps counts, for a batch may be a single row."""
    flat, alive = [0.5, 0.5001], [0.5, 0.6]
    (message,) = noted(ConstantWatch(1e-3, 3), [{"flat": flat, "alive": alive}] * 9, caplog)
    assert "reward 'flat' gives almost the same score to everything: over the last 3 steps" in message
    assert "6 scores around 0.5" in message
    assert not noted(ConstantWatch(1e-3, 3), [{"flat": flat}] * 3, caplog)  # the newest step may not be whole
    assert not noted(ConstantWatch(1e-3, 3), [{"single": [0.1 * step]} for step in range(9)], caplog)
    assert not noted(ConstantWatch(1e-3, 3), [{"a": flat if step % 3 else alive} for step in range(9)], caplog)
    assert not noted(ConstantWatch(0.0, 1), [{"flat": [0.5, 0.5]}] * 9, caplog)


def question(name, aspect):
    return {"text": "Is it so?", "name": name, "aspect": aspect}


def test_parts_are_those_of_all_prompts_if_they_are_few():
    rows = [[question(f"q{row}", ("alignment", "quality")[row % 2])] for row in range(MOST_PARTS + 1)]
    prompts = [Prompt("a ring", str(row), {"questions": asked}) for row, asked in enumerate(rows)]
    first, aspects = ("q0", "aspect/alignment"), ("aspect/alignment", "aspect/quality")
    assert logged_parts(first, prompts[:2]) == (*aspects, "q0", "q1")
    assert logged_parts(first, prompts) == aspects
    assert logged_parts(("mu", "sigma"), prompts) == ("mu", "sigma")
    assert logged_parts((), prompts) == ()


def test_rows_without_a_number_do_not_count():
    means, nan = WeightedMeans(), float("nan")
    means.add({"part": torch.tensor([1.0, nan]), "never": torch.tensor([nan, nan]), "loss": torch.tensor(2.0)}, 2)
    means.add({"part": torch.tensor([4.0, 7.0]), "never": torch.tensor([nan, nan]), "loss": torch.tensor(4.0)}, 2)
    means.add({"part": torch.tensor([9.0, 9.0]), "never": torch.tensor([nan, nan]), "loss": torch.tensor(nan)}, 0)
    assert means.reduce(Accelerator(cpu=True)) == pytest.approx({"part": 4.0, "loss": 3.0})


class Asked(Red):
    """Two questions, of which the second is about the prompt with a cross alone."""

    def __call__(self, media, prompts):
        total = super().__call__(media, prompts).total
        has = torch.tensor([0.0 if "cross" in prompt.text else float("nan") for prompt in prompts])
        return Scores(total, {"aspect/alignment": total, "aspect/quality": has - 0.25})


def test_each_aspect_is_logged(make):
    rows = [{"prompt": text, "questions": [question("", "alignment"), question("", "quality")]} for text in PROMPTS]
    trainer = make(rewards={"red": Asked()}, rows=rows, max_steps=2, constant_spread=10.0, constant_steps=1)
    trainer.train()
    logs = trainer.state.log_history[:2]
    for log in logs:
        assert log["health/part/red/aspect/alignment"] == pytest.approx(log["health/reward/red"], rel=1e-5)
        assert log["health/spread/red"] > 0
    found = [log["health/part/red/aspect/quality"] for log in logs if "health/part/red/aspect/quality" in log]
    assert found == pytest.approx([-0.25])  # one of the two batches has the prompt with a cross
    assert trainer._constant._warned == {"red"}


class Lowered(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            args.growth_limit = 1e-9


def test_after_an_explosion_the_checkpoint_is_resumed(make):
    """What is resumed from the checkpoint before the explosion ends as a training without it."""
    keys = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "gradient_steps": "all"}
    trainer = make(**keys)
    trainer.add_callback(Lowered())
    with pytest.raises(NumericsError, match="at training step 1; weights and the last checkpoint"):
        trainer.train()
    folder = Path(trainer.args.output_dir)
    assert find_checkpoint(folder).name == "checkpoint-1"
    resumed = make(**keys)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    unbroken = make(**keys, output_dir=str(folder.parent / "unbroken"))
    unbroken.train()
    for name, value in unbroken._trainable().items():
        torch.testing.assert_close(resumed._trainable()[name], value, rtol=1e-5, atol=1e-8)

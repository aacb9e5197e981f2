"""A trainer's config: how long it trains, which numbers it takes, and defaults that depend on the model."""

from __future__ import annotations

import math

import pytest

from alignkit import cli
from alignkit.config import load
from alignkit.errors import ConfigError, DataError
from alignkit.provenance import dump
from alignkit.records import Sampling
from alignkit.trainers.beta import stored_prediction
from alignkit.trainers.rankdpo import RankDPOConfig
from alignkit.trainers.sft import SFTConfig
from alignkit.trainers.validation import Validation


def config(schema=SFTConfig, **keys):
    return schema(output_dir="unused", use_cpu=True, bf16=False, **keys)


@pytest.mark.parametrize(
    ("keys", "steps", "epochs", "words"),
    [
        ({}, 400, 0.0, "400 steps"),
        ({"max_steps": 7}, 7, 0.0, "7 steps"),
        ({"num_train_epochs": 2.5}, -1, 2.5, "2.5 epochs"),
        ({"num_train_epochs": 2, "max_steps": -1}, -1, 2, "2 epochs"),
        ({"max_steps": -1}, -1, 3.0, "3 epochs"),
    ],
)
def test_the_length_that_was_set_counts(tmp_path, keys, steps, epochs, words):
    made = config(**keys)
    assert (made.max_steps, made.num_train_epochs, made.length) == (steps, epochs, words)
    (tmp_path / "config.yaml").write_text(dump(made), encoding="utf-8")
    again = load(SFTConfig, file=tmp_path / "config.yaml")
    assert (again.max_steps, again.num_train_epochs) == (steps, epochs)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_steps": 5, "num_train_epochs": 3.0}, r"max_steps \(5\) and num_train_epochs \(3.0\) are both set"),
        ({"max_steps": 0}, "max_steps is 0; it must be at least 1 and finite"),
        ({"max_steps": -2}, "max_steps is -2"),
        ({"num_train_epochs": 0.0}, "num_train_epochs is 0.0; it must be positive and finite"),
        ({"num_train_epochs": math.nan}, "num_train_epochs is nan"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": -1e-4}, "learning_rate is -0.0001"),
        ({"adam_beta1": 1.0}, "adam_beta1 is 1.0; it must be at least 0 and below 1"),
        ({"adam_beta2": -0.1}, "adam_beta2 is -0.1"),
        ({"max_grad_norm": math.inf}, "max_grad_norm is inf"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"per_device_train_batch_size": -1}, "per_device_train_batch_size is -1"),
        ({"save_steps": 0}, "save_steps is 0"),
        ({"fps": math.nan}, "fps is nan"),
        ({"num_frames": -3}, "num_frames is -3"),
    ],
)
def test_numbers_are_checked_at_the_door(keys, message):
    with pytest.raises(ConfigError, match=message):
        config(**keys)


@pytest.mark.parametrize(
    "keys", [{"beta": math.nan}, {"beta": 0.0}, {"sft_weight": -1.0}, {"protect_winner": 1.0}, {"protect_winner": -0.1}]
)
def test_numbers_of_rankdpo_are_checked_at_the_door(keys):
    with pytest.raises(ConfigError, match=f"{next(iter(keys))} is"):
        config(RankDPOConfig, **keys)


def test_epochs_are_trained(make):
    trainer = make(method="sft", max_steps=None, num_train_epochs=2, per_device_train_batch_size=2)
    trainer.train()
    assert trainer.state.global_step == 4  # 4 rows, 2 a step


def test_phi_outside_its_range_is_refused(make, ranked_rows):
    rows = ranked_rows(4)
    values = [[-1.0, 0.0, 1.0, 0.0], *rows["phi"][1:]]
    with pytest.raises(DataError, match=r"row 0: phi is \[-1.0, .*numbers within 0 and 1"):
        make(rows=rows.remove_columns("phi").add_column("phi", values))


@pytest.mark.parametrize(("family", "beta"), [("flow", 500.0), ("unet", 5000.0)])
def test_beta_follows_from_what_the_network_predicts(make, model_folders, capsys, family, beta):
    trainer = make(family, beta=None)
    assert trainer.args.beta == beta
    said = f"beta is not set: {beta:g}, as the network predicts {trainer.generator.prediction}"
    assert said in capsys.readouterr().err
    assert stored_prediction(str(model_folders[family])) == trainer.generator.prediction
    words = ["train", "rankdpo", f"--model={model_folders[family]}", "--data=none", "--output_dir=none", "--dry-run"]
    assert cli.main(words) == 0
    assert said in capsys.readouterr().out
    assert cli.main([*words, "--beta=70"]) == 0
    assert "beta is not set" not in capsys.readouterr().out


def test_a_dry_run_knows_beta_for_models_of_the_sandbox(capsys):
    words = ["train", "rankdpo", "--model=sandbox:flow", "--data=none", "--output_dir=none", "--dry-run"]
    assert cli.main(words) == 0
    assert "beta is not set: 500, as the network predicts flow" in capsys.readouterr().out


def test_a_validation_that_cannot_be_generated_is_refused_before_the_training(make):
    validation = Validation([], Sampling(steps=1, height=18, width=16), {})
    with pytest.raises(ConfigError, match=r"height is 18; .* takes multiples of 4: 16 or 20"):
        make(parts={"validation": validation})

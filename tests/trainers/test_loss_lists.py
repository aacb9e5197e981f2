"""Several losses in one training: their sum, their log, and what cannot be added."""

from __future__ import annotations

import pytest
import torch
import yaml

from alignkit import cli
from alignkit.errors import ConfigError, UnknownNameError
from alignkit.trainers.rankdpo import RankDPOConfig


def losses_of(trainer, batch):
    with torch.no_grad():
        return trainer.method_loss(trainer.model, batch)


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_a_list_is_the_weighted_sum_of_its_losses(make, batch_of, stir):
    names, weights = ["rank_dpo", "lair", "winner_sft"], [1.0, 0.5, 0.1]
    trainers = {name: make("flow", loss=name) for name in names}
    together = make("flow", loss=names, loss_weights=weights)
    for trainer in (*trainers.values(), together):
        stir(trainer)
    batch = batch_of(together)
    alone = {name: losses_of(trainer, batch) for name, trainer in trainers.items()}
    both = losses_of(together, batch)
    expected = sum(weight * alone[name].loss for name, weight in zip(names, weights, strict=True))
    torch.testing.assert_close(both.loss, expected)
    for name in names:
        torch.testing.assert_close(both.metrics[f"loss_{name}"], alone[name].loss.mean())
    assert alone["rank_dpo"].metrics.items() <= both.metrics.items()


@pytest.mark.parametrize("partner", ["linear_dpo", "winner_sft"])
def test_pairs_go_with_pairs_and_with_the_winners_error(make, partner):
    trainer = make("flow", loss=["diffusion_dpo", partner], loss_weights=[1.0, 0.1], max_steps=1)
    trainer.train()
    (entry,) = logged(trainer)
    assert trainer.train_dataset[0]["phi"].shape == (2,)
    parts = [entry[f"health/loss_{name}"] for name in ("diffusion_dpo", partner)]
    assert entry["loss"] == pytest.approx(parts[0] + 0.1 * parts[1], rel=1e-5)


@pytest.mark.parametrize("loss", ["lair", "linear_dpo"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_they_train(make, loss, low_memory):
    """The loss falls on one batch of all rows with one draw; step 0 of LAIR costs nothing."""
    options = {"max_steps": 8, "learning_rate": 1e-3, "caption_dropout": 0.0, "low_memory": low_memory}
    options["per_device_train_batch_size"] = 4
    trainer = make("flow", loss=loss, **options)
    plan = trainer.train_dataset.plan
    trainer.train_dataset.plan = type("Fixed", (), {"draw": lambda self, i, _, shape: plan.draw("x", 0, shape)})()
    trainer.train()
    first, *_, last = logged(trainer)
    assert last["loss"] < first["loss"]
    assert last["health/margin"] > first["health/margin"] == 0
    assert first["loss"] == 0 or loss == "linear_dpo"


def test_the_old_weight_is_the_new_list(make, batch_of, stir):
    trainers = (
        make("flow", sft_weight=0.3),
        make("flow", loss=["rank_dpo", "winner_sft"], loss_weights=[1.0, 0.3]),
    )
    for trainer in trainers:
        stir(trainer)
    one, other = (losses_of(trainer, batch_of(trainer)) for trainer in trainers)
    assert torch.equal(one.loss, other.loss)
    assert one.metrics.keys() == other.metrics.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": []}, "name at least one"),
        ({"loss": ["lair", "lair"]}, "each once"),
        ({"loss": ["rank_dpo", "winner_sft"], "sft_weight": 0.1}, "winner_sft or sft_weight, not both"),
        ({"loss": ["rank_dpo", "lair"], "loss_weights": [1.0]}, r"loss_weights are \[1.0\] for the losses"),
        ({"loss": "lair", "loss_weights": [1.0, 2.0]}, "give one for each"),
        (
            {"loss": ["lair", "rank_dpo"], "loss_weights": [1.0, 0.0]},
            "loss_weights, for rank_dpo is 0.0; it must be pos",
        ),
        ({"loss": ["rank_dpo", "diffusion_dpo"]}, "diffusion_dpo trains on the best and worst .* rank_dpo on all"),
        ({"loss": ["diffusion_dpo", "own.module:loss"]}, "own.module:loss on all"),
        ({"loss": "linear_dpo"}, r"linear_dpo needs beta, .* 100 \(SD1.5\) and 500 \(SDXL\)"),
        ({"loss": "lair"}, r"lair needs beta, .* so start with 1"),
        (
            {"loss": ["rank_dpo", "lair"], "beta": 1.0, "protect_winner": 0.5},
            "protect_winner needs pairs; lair has none",
        ),
        ({"lair_tau": 0.0}, "lair_tau is 0.0; it must be positive"),
        ({"linear_eta": 0.5}, "linear_eta is 0.5; it must be at least 0 and below 0.5"),
    ],
)
def test_what_cannot_be_added_is_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        RankDPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_an_unknown_name_in_a_list(tmp_path):
    """TRL's name for the winner's error is answered with the names there are."""
    with pytest.raises(UnknownNameError, match=r"unknown loss 'sft'\. Known: .*winner_sft"):
        RankDPOConfig(output_dir=str(tmp_path), use_cpu=True, loss=["rank_dpo", "sft"])


@pytest.mark.parametrize("key", ["loss", "loss_type"])
def test_lists_on_the_command_line_and_in_files(tmp_path, monkeypatch, capsys, key):
    """A flag replaces the file's list; TRL's name of the key is taken; dry runs show what was read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(
        f"model: m/n\ndata: rows\ndata_root: '.'\noutput_dir: out\n{key}: [rank_dpo, winner_sft]\n"
        "loss_weights: [1.0, 0.1]\n"
    )
    command = ["train", "rankdpo", "--config", "job.yaml", "--dry-run"]
    flags = [f"--{key}", "lair", "winner_sft", "--loss_weights", "2", "1e-1", "--beta", "1"]
    for given, names, weights in (([], ["rank_dpo", "winner_sft"], [1.0, 0.1]), (flags, flags[1:3], [2.0, 0.1])):
        assert cli.main([*command, *given]) == 0, capsys.readouterr().err
        text = capsys.readouterr().out
        shown = yaml.safe_load(text)["train"]
        assert (shown["loss"], shown["loss_weights"]) == (names, weights)
    assert cli.main([*command, f"--{key}", "lair", "--loss_weights", "1", "2"]) == 2
    assert "loss_weights are [1.0, 2.0] for the losses ['lair']" in capsys.readouterr().err

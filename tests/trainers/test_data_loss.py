"""The denoising loss beside rewards: that of supervised fine-tuning on the same rows and draws."""

from __future__ import annotations

import datasets
import pytest
import red_reward
import torch
from red_reward import TRAINING, Red

from alignkit.errors import ConfigError, DataError
from alignkit.trainers.data_loss import data_errors

CHAIN = red_reward.CHAIN | {"sampling_steps": 2, "guidance_scale": 1.0}


@pytest.fixture
def rows(random_png):
    """Two prompts with an image each, of these (width, height)."""

    def build(*sizes):
        images = [{"bytes": random_png(*size, seed), "path": None} for seed, size in enumerate(sizes)]
        columns = {"prompt": ["a red circle", "two blue rings"], "image": images}
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))

    return build


@pytest.fixture
def make(load, tmp_path):
    from alignkit.trainers.reward_flow import RewardConfig, RewardTrainer

    def build(rows, *, rewards=None, **keys):
        args = RewardConfig(**{**TRAINING, **CHAIN, "output_dir": str(tmp_path / "run"), **keys})
        return RewardTrainer(load("unet"), args, rows, rewards=rewards or {"red": Red()})

    return build


def collated(trainer):
    return trainer.data_collator([trainer.train_dataset[row] for row in range(2)])


@pytest.mark.parametrize("epoch", [0, 1])
def test_it_is_the_loss_of_supervised_fine_tuning(make, rows, load, tmp_path, stir, epoch):
    """Times, noise and dropped prompts too, in every epoch; added to the reward's with its weight."""
    from alignkit.trainers.sft import SFTConfig, SFTTrainer

    given, keys = rows((16, 16), (16, 16)), {"data_weight": 0.5, "data_dropout": 0.4}
    trainer, plain = make(given, **keys), make(given)
    args = SFTConfig(**TRAINING, output_dir=str(tmp_path / "sft"), caption_dropout=0.4)
    tuned = SFTTrainer(load("unet"), args, given)
    for one in (trainer, plain, tuned):
        stir(one)
        one.train_dataset.epoch = epoch
    with torch.no_grad():
        expected = tuned.errors(tuned.model, collated(tuned)).mean(-1)
        found = trainer.method_loss(trainer.model, collated(trainer))
        torch.testing.assert_close(
            data_errors(trainer.generator, trainer.model, collated(trainer), trainer._null), expected
        )
        torch.testing.assert_close(found.loss, plain.method_loss(plain.model, collated(plain)).loss + 0.5 * expected)
    assert found.metrics["data_error"] == pytest.approx(expected.mean().item())


def test_media_of_any_size_are_brought_to_that_of_the_chains(make, rows):
    trainer = make(rows((40, 24), (16, 33)), data_weight=1.0)
    batch = collated(trainer)
    assert batch["data.latents"].shape[1:] == (1, *trainer.generator.latent_shape(16, 16))
    trainer.train()
    assert trainer.state.log_history[0]["health/data_error"] > 0


class Reads(Red):
    """Reads the media of rows."""

    def prepare(self, prompts):
        self.read = [prompt.metadata["image"] for prompt in prompts]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_encoded_media_stay_in_memory_only_for_a_reward_that_reads_them(make, rows, weight):
    given = rows((16, 16), (16, 16)).add_column("mark", [0, 1])
    trainer = make(given, data_weight=weight)
    assert [prompt.metadata for prompt in trainer.prompts] == [{"mark": 0}, {"mark": 1}]
    reward = Reads()
    make(given, data_weight=weight, rewards={"red": reward})
    assert [medium["bytes"] for medium in reward.read] == [row["image"]["bytes"] for row in given]


def test_it_trains_on_the_data(make, rows):
    """With no gradient of the reward, the error on the images falls."""
    keys = {"data_dropout": 0.0, "max_steps": 25, "full_finetune": True, "reward_targets": {"red": -1.0}}
    trainer = make(rows((16, 16), (16, 16)), data_weight=1.0, **keys)
    trainer.train()
    errors = [entry["health/data_error"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(errors[-5:]) < 0.9 * sum(errors[:5])


def test_what_cannot_be_is_named(make, rows):
    with pytest.raises(DataError, match=r"the rows are a list: give a datasets\.Dataset"):
        make([{"prompt": "a ring"}], data_weight=1.0)
    with pytest.raises(DataError, match=r"lacks \['images'\]"):
        make(rows((16, 16), (16, 16)).remove_columns("image"), data_weight=1.0)
    with pytest.raises(ConfigError, match="data_weight is -1"):
        make(rows((16, 16), (16, 16)), data_weight=-1.0)

"""Methods whose terms are weighted: micro-batches, ranks and missing labels.

The two of docs/add_a_method.md as the page has them, and DenseDPO.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from pathlib import Path

import datasets
import pytest
import torch
from clips import encoded, frames
from safetensors.torch import load_file
from two_processes import run_two

from alignkit.errors import ConfigError
from alignkit.records import LossOutput

PAGE = Path(__file__).parents[2] / "docs" / "add_a_method.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
MODULES = ("page_bright", "page_frames")
METHODS = {
    "bright": ["page_bright:BrightConfig", "page_bright:BrightTrainer"],
    "frames": ["page_frames:FrameLabelsConfig", "page_frames:FrameLabelsTrainer"],
    "dense": ["alignkit.trainers.densedpo:DenseDPOConfig", "alignkit.trainers.densedpo:DenseDPOTrainer"],
}
MODELS = {"bright": "flow", "frames": "wan", "dense": "wan"}
LABELS = [[1, 0], [0, -1], [0, 0], [0, 0]]  # the last two rows have none; two latent frames each
METRICS = ("health/brightness", "health/accuracy", "health/implicit_accuracy")
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "lora_rank": 2,
    "optim": "sgd",
    "learning_rate": 0.5,
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
}


@pytest.fixture(autouse=True)
def page(tmp_path, monkeypatch):
    """The page's blocks as modules that can be imported, here and in other processes."""
    folder = tmp_path / "page"
    folder.mkdir()
    for name, block in zip(MODULES, BLOCKS, strict=True):
        (folder / f"{name}.py").write_text(block)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    return folder


def rows(method, labels=LABELS):
    prompts = [f"scene number {number}" for number in range(len(labels))]
    if method == "bright":
        return datasets.Dataset.from_dict({"prompt": prompts})
    if method == "dense":  # which leaves out rows without labels, so these have two
        labels = [own if any(own) else [-1, 1] for own in labels]
        pairs = [[encoded(frames(5, 16, 16, seed=9 * row + k)) for k in range(2)] for row in range(len(labels))]
        segments = [[[0, 1], [1, 5]]] * len(labels)
        columns = {"prompt": prompts, "videos": pairs, "labels": labels, "segments": segments}
        return datasets.Dataset.from_dict(columns)
    videos = [[encoded(frames(5, 16, 16, seed=number))] for number in range(len(labels))]
    return datasets.Dataset.from_dict({"prompt": prompts, "videos": videos, "labels": labels})


@pytest.fixture
def job(tmp_path, model_folders, page):
    """A job of worker.py for one of the methods."""

    def build(method, name, data=None, **changes):
        folder = tmp_path / f"rows-{name}"
        (rows(method) if data is None else data).save_to_disk(folder)
        own = {"side": 16} if method == "bright" else {"beta": 100.0}
        held_out = changes.pop("held_out", 0)
        settings = SETTINGS | own | {"output_dir": str(tmp_path / name)} | changes
        told = {"model": str(model_folders[MODELS[method]]), "rows": str(folder), "settings": settings}
        return told | {"method": METHODS[method], "path": str(page), "held_out": held_out}

    return build


def values(history, name):
    return [entry[name] for entry in history if name in entry]


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer._trainable().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_each_method_is_short():
    assert len(BLOCKS) == len(MODULES)
    assert all(len(block.splitlines()) < 40 for block in BLOCKS)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_are_one_batch(job, worker, method, size):
    """Also when micro-batches have other numbers of labels, or none: 1, 1, 0 and 0 (dense: 2) in the rows."""
    whole = worker["train"](job(method, "whole"))
    parts = job(method, "parts", per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
    split = worker["train"](parts)
    for name in ("loss", "grad_norm", *METRICS):
        assert values(split.state.log_history, name) == pytest.approx(values(whole.state.log_history, name), rel=1e-5)
    assert_same(weights(split), weights(whole))
    start = worker["build"](job(method, "start"))
    assert any(not torch.equal(value, weights(start)[name]) for name, value in weights(whole).items())


def test_two_processes_equal_one(tmp_path, job, worker):
    """The second process has the rows without labels (dense: with most); of three held-out rows the last has one."""
    labels = [*LABELS, [1, 1], [0, 0], [-1, 0]]
    options = {"held_out": 3, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1}
    data = {method: rows(method, labels) for method in METHODS}
    shared = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    run_two(tmp_path, [job(method, f"two-{method}", data[method], **shared, **options) for method in METHODS])
    for number, method in enumerate(METHODS):
        stem = f"job-0-{number}" if number else "job-0"
        history = json.loads((tmp_path / f"{stem}.log").read_text())
        one = worker["train"](job(method, f"one-{method}", data[method], **options))
        for name in ("loss", "grad_norm", "eval_loss", *METRICS, "eval_accuracy"):
            expected = pytest.approx(values(one.state.log_history, name), rel=1e-5, abs=1e-7)
            assert values(history, name) == expected, (method, name)
        assert len(values(history, "eval_loss")) == 2
        assert_same(load_file(tmp_path / f"{stem}.safetensors"), weights(one))


def test_the_loss_is_the_mean_over_labelled_frames(job, worker):
    """At the start each labelled frame costs log 2, whatever the share of labels."""
    trainer = worker["train"](job("frames", "run", per_device_train_batch_size=1, gradient_accumulation_steps=4))
    assert values(trainer.state.log_history, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)


def test_nothing_that_counts_changes_nothing(job, worker):
    blank = rows("frames", [[0, 0]] * 4)
    trainer = worker["build"](job("frames", "run", blank, optim="adamw_torch", held_out=1, eval_strategy="epoch"))
    before = weights(trainer)
    trainer.train()
    for name in ("loss", "grad_norm", "eval_loss"):
        assert set(values(trainer.state.log_history, name)) == {0.0}
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


def test_errors_by_frame_are_parts_of_the_item_error(job, worker):
    """Their mean over frames is the item's error, one by one and in one call, of policy and reference."""
    trainer = worker["build"](job("frames", "run"))
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(3)])
    for errors in (trainer.errors, trainer.reference_errors):
        item_PK = errors(trainer.model, batch)
        for one_by_one in (False, True):
            frame_PKT = errors(trainer.model, batch, per="frame", one_by_one=one_by_one)
            assert frame_PKT.shape == (3, 1, 2)
            torch.testing.assert_close(frame_PKT.mean(-1), item_PK)
    residual = trainer.residuals(trainer.model, batch)
    torch.testing.assert_close(frame_PKT[1, 0, 1], residual[1, 0, :, 1].square().mean())


def test_a_weight_that_the_batch_does_not_tell_is_refused(job, worker):
    trainer = worker["build"](job("frames", "run"))
    trainer.loss_weight = lambda batch: 8.0
    with pytest.raises(ConfigError, match=r"returns weight 2 for a loss of shape \(4, 2\), but .*loss_weight.* is 8"):
        trainer.train()


def test_a_scalar_loss_is_averaged_over_micro_batches(job, worker):
    """One term a batch: the step's loss is the mean of the batches' numbers, and each is seen in evaluation once."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1, "held_out": 1}
    trainer = worker["build"](job("bright", "run", rows("bright", [[0]] * 5), **options))
    trainer.loss_weight = lambda batch: 1
    seen = []

    def loss(model, batch):
        real = type(trainer).method_loss(trainer, model, batch)
        seen.append(real.loss.mean().item())
        return LossOutput(real.loss.mean(), real.metrics)

    trainer.method_loss = loss
    trainer.train()
    assert len(seen) == 2
    assert values(trainer.state.log_history, "loss") == pytest.approx([sum(seen) / 2])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(seen[-1])


def test_prompts_have_seeds_of_their_own(job, worker):
    """One for each row and epoch, also where texts repeat; the other columns are the prompts' metadata."""
    from alignkit.trainers.data import PromptData

    data = PromptData([{"prompt": "a ring", "topic": 3}, "a ring", "a cross"], noise_seed=0)
    first = [int(data[row]["seed"]) for row in range(3)]
    data.epoch = 1
    assert len({*first, *(int(data[row]["seed"]) for row in range(3))}) == 6
    assert data[0]["prompts"].metadata == {"topic": 3}
    other = PromptData(["a cross"], noise_seed=0)
    assert int(other[0]["seed"]) == first[2]

"""Interrupted trainings go on bit for bit, damaged checkpoints are refused, results are exported and pushed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer
from two_processes import ended, run_two, start

from alignkit.errors import CheckpointMismatchError, ResumeError
from alignkit.trainers.checkpoint import MARK, damage, find_checkpoint

SETTINGS = {
    "max_steps": 6,
    "per_device_train_batch_size": 1,
    "lora_rank": 2,
    "learning_rate": 1e-2,
    "beta": 100.0,
    "use_cpu": True,
    "disable_tqdm": True,
    "save_steps": 2,
    "lora_dropout": 0.1,
    "bf16": False,
}


def job(tmp_path, model_folders, ranked_rows, name="run", family="flow", count=4, **changes):
    """A job of worker.py; `changes` to the settings, or keys of the job itself."""
    rows = tmp_path / "rows"
    if not rows.exists():
        ranked_rows(count).save_to_disk(rows)
    own = {key: changes.pop(key) for key in ("kill_at", "held_out", "validate", "resume", "export") if key in changes}
    settings = SETTINGS | {"output_dir": str(tmp_path / name)} | changes
    return {"model": str(model_folders[family]), "rows": str(rows), "settings": settings, **own}


def logged(trainer_or_file):
    history = trainer_or_file if isinstance(trainer_or_file, list) else trainer_or_file.state.log_history
    return [(entry["step"], entry["loss"], entry["health/margin"]) for entry in history if "loss" in entry]


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer._trainable().items()}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- resume ---------------------------------------------------------------------------------------------------------


def test_resume_after_sigkill_equals_the_unbroken_run(tmp_path, model_folders, ranked_rows, worker, one_thread):
    """Killed in step 5 of 6, after the checkpoint of step 4, with dropout inside the LoRA and across an epoch."""
    told = job(tmp_path, model_folders, ranked_rows, kill_at=5)
    process = start(tmp_path, told)
    whole = worker["train"](job(tmp_path, model_folders, ranked_rows, name="whole"))
    assert ended(process) == -9, (tmp_path / "out-0.txt").read_text()
    assert find_checkpoint(tmp_path / "run").name == "checkpoint-4"
    told.pop("kill_at")
    resumed = worker["train"](told, resume=True)
    assert logged(resumed) == logged(whole)
    assert len(logged(resumed)) == 6
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


@pytest.mark.parametrize("full", [False, True])
def test_resume_in_the_middle_of_an_epoch(tmp_path, model_folders, ranked_rows, worker, full):
    """From every checkpoint; in full tuning the frozen copy must not move to the resumed weights."""
    options = {"full_finetune": full, "lora_dropout": 0.0, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    whole = worker["train"](job(tmp_path, model_folders, ranked_rows, name="whole", **options))
    for step in (2, 4):
        told = job(tmp_path, model_folders, ranked_rows, name=f"from-{step}", **options)
        resumed = worker["train"](told, resume=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert logged(resumed) == logged(whole)
        expected = weights(whole)
        assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


@pytest.fixture
def finished(tmp_path, model_folders, ranked_rows, worker):
    """A run with checkpoints 2, 4 and 6, and its job."""
    told = job(tmp_path, model_folders, ranked_rows)
    worker["train"](told)
    return told, tmp_path / "run"


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def _zero_tail(file):
    contents = file.read_bytes()
    file.write_bytes(contents[:-64] + bytes(64))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda folder: (folder / "rng_state.pth").unlink(), "rng_state.pth is missing"),
        (lambda folder: _truncate(folder / "model.safetensors"), r"model.safetensors has \d+ bytes instead of \d+"),
        (lambda folder: _zero_tail(folder / "optimizer.pt"), r"optimizer.pt is damaged \(its checksum differs\)"),
        (lambda folder: (folder / MARK).unlink(), "complete.json is missing, so its writing was interrupted"),
        (lambda folder: _truncate(folder / MARK), "complete.json cannot be read"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(finished, worker, harm, said):
    """Named, it is an error that tells which one to use; otherwise the one before it is used, with a warning."""
    told, folder = finished
    harm(folder / "checkpoint-4")
    with pytest.raises(ResumeError, match=rf"checkpoint-4' cannot be resumed: {said}; use '.*checkpoint-6'"):
        worker["train"](told, resume=str(folder / "checkpoint-4"))
    harm(folder / "checkpoint-6")
    with pytest.warns(UserWarning, match="is refused") as caught:
        assert find_checkpoint(folder).name == "checkpoint-2"
    assert re.search(rf"checkpoint-6' is refused: {said}; trying the one before it", str(caught[0].message))
    trainer = worker["build"](told)
    with pytest.warns(UserWarning, match="is refused"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert damage(folder / "checkpoint-6") is None


def test_nothing_to_resume(tmp_path, finished, worker):
    told, folder = finished
    with pytest.raises(ResumeError, match=r"there is no such folder; use '.*checkpoint-6'"):
        worker["train"](told, resume=str(folder / "checkpoint-9"))
    with pytest.raises(ResumeError, match="start anew"):
        worker["train"](told, resume=str(tmp_path / "elsewhere" / "checkpoint-9"))
    assert find_checkpoint(tmp_path / "elsewhere") is None


def test_a_checkpoint_of_other_weights_is_refused(finished, worker):
    told, folder = finished
    told["settings"] |= {"lora_targets": ["to_q"]}
    with pytest.raises(CheckpointMismatchError, match="written with other trainable weights"):
        worker["train"](told, resume=str(folder / "checkpoint-4"))
    told["settings"] |= {"lora_targets": None, "lora_rank": 3}
    with pytest.raises(CheckpointMismatchError, match="resume with the same LoRA rank"):
        worker["train"](told, resume=str(folder / "checkpoint-4"))


def test_checkpoints_hold_what_is_trained_and_nothing_else(finished, model_folders):
    _, folder = finished
    stored = load_file(folder / "checkpoint-6" / "model.safetensors")
    assert stored
    assert all("lora_" in name for name in stored)


def test_a_checkpoint_written_again_is_not_whole_until_its_end(finished, worker, monkeypatch):
    """An older mark must not vouch for files being replaced, nor old checkpoints go before the new one is marked."""
    told, folder = finished
    told["settings"] |= {"save_total_limit": 1}
    trainer = worker["build"](told)
    seen = []
    real = Trainer._save_optimizer_and_scheduler

    def saving(self, output_dir):
        seen.append((Path(output_dir).name, damage(Path(output_dir)), find_checkpoint(folder)))
        real(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", saving)
    with pytest.warns(UserWarning, match="checkpoint-6' is refused: complete.json is missing"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    ((name, problem, newest),) = seen
    assert name == "checkpoint-6"
    assert "complete.json is missing" in problem
    assert newest.name == "checkpoint-4"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]


# --- evaluation during training -------------------------------------------------------------------------------------


def watched(tmp_path, model_folders, ranked_rows, **changes):
    options = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "held_out": 2,
        "validate": 2,
        "metric_for_best_model": "reward/brightness",
        "load_best_model_at_end": True,
    }
    return job(tmp_path, model_folders, ranked_rows, count=7, **{**options, **changes})


def test_validation_grids_rewards_and_the_best_checkpoint(tmp_path, model_folders, ranked_rows, worker):
    trainer = worker["build"](watched(tmp_path, model_folders, ranked_rows, greater_is_better=False))
    trainer.train()
    seen = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in seen] == [2, 4]
    assert {"eval_reward/brightness", "eval_margin", "eval_implicit_accuracy"} <= set(seen[0])
    grids = sorted(path.name for path in (tmp_path / "run" / "validation").iterdir())
    assert grids == ["step-000002.png", "step-000004.png"]
    rewards = [entry["eval_reward/brightness"] for entry in seen]
    best = tmp_path / "run" / f"checkpoint-{2 * (1 + rewards.index(min(rewards)))}"
    assert trainer.state.best_model_checkpoint == str(best)
    stored = load_file(best / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in weights(trainer).items())
    from PIL import Image

    with Image.open(tmp_path / "run" / "validation" / "step-000002.png") as grid:
        assert grid.size == (32, 16)


def test_held_out_loss_meets_the_same_draws_each_time(tmp_path, model_folders, ranked_rows, worker):
    """And is the mean over rows, whatever the batch size; the model goes back to training."""
    trainer = worker["build"](
        watched(
            tmp_path,
            model_folders,
            ranked_rows,
            validate=False,
            held_out=3,
            load_best_model_at_end=False,
            per_device_eval_batch_size=2,
            metric_for_best_model=None,
        )
    )
    first = trainer.evaluate()
    assert trainer.evaluate() == pytest.approx(first)
    trainer.args.per_device_eval_batch_size = 3
    assert trainer.evaluate() == pytest.approx(first, rel=1e-5)
    assert trainer.model.training


def test_reporters_see_health_and_rewards(tmp_path, model_folders, ranked_rows, worker):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = watched(tmp_path, model_folders, ranked_rows, report_to=["tensorboard"], max_steps=2)
    worker["train"](told)
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events))
    reader.Reload()
    assert {"train/loss", "train/health/margin", "train/grad_norm", "eval/reward/brightness"} <= set(
        reader.Tags()["scalars"]
    )


# --- two processes --------------------------------------------------------------------------------------------------


def _same(file, expected):
    found = load_file(file)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}


@pytest.mark.parametrize(
    "layout",
    [{}, {"reference_ema": 0.75}, FSDP, FSDP | {"full_finetune": True}],
    ids=["ddp", "ddp average", "fsdp", "fsdp full"],
)
def test_two_processes_equal_one(tmp_path, model_folders, ranked_rows, worker, one_thread, layout):
    """The same global batch, across epochs, with the low-memory step, held-out rows that do not divide, validation,
    the best checkpoint and reference errors computed once, or a moving reference: same losses, same metrics, same
    weights, same export.
    """
    options = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "low_memory": True,
        "precompute_reference": "reference_ema" not in layout,
        "reference_ema": layout.get("reference_ema"),
        "lora_dropout": 0.0,
        "held_out": 3,
        "max_grad_norm": 0.3,
        "gradient_accumulation_steps": 2,
        "full_finetune": "full_finetune" in layout,
    }
    told = watched(tmp_path, model_folders, ranked_rows, name="two", export=str(tmp_path / "export"), **options)
    told["settings"] |= {"ddp_backend": "gloo", **layout}
    history = run_two(tmp_path, told)
    one = worker["train"](watched(tmp_path, model_folders, ranked_rows, per_device_train_batch_size=2, **options))
    # Not the margin: it is a mean over pairs, and prompts with ties have fewer of them, so means of means differ.
    names = ("loss", "grad_norm", "health/winner_error_delta", "eval_loss", "eval_reward/brightness")
    for ours, theirs in zip(one.state.log_history, history, strict=True):
        assert ours.keys() == theirs.keys()
        for name in set(names) & set(ours):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), name
    assert ("sharded" in (tmp_path / "out-0.txt").read_text()) is ("fsdp" in layout)
    assert damage(tmp_path / "two" / "checkpoint-4") is None
    _same(tmp_path / "job-0.safetensors", weights(one))
    for file in ["model.safetensors", *(["reference.safetensors"] if "reference_ema" in layout else [])]:
        _same(tmp_path / "two/checkpoint-4" / file, load_file(tmp_path / "run/checkpoint-4" / file))
    exported = [file.relative_to(tmp_path / "alone") for file in one.export(tmp_path / "alone").rglob("*.safetensors")]
    assert exported
    for file in exported:
        _same(tmp_path / "export" / file, load_file(tmp_path / "alone" / file))


def test_two_processes_equal_one_on_mixed_sizes(tmp_path, model_folders, mixed, ranked_rows, worker, one_thread):
    """At one step the processes have batches of other sizes and lengths, in training and in evaluation."""
    sizes = [(16, 16), (24, 16), (16, 16), (24, 16), (16, 16), (24, 16)]
    mixed(*sizes, (16, 16), (16, 24), (16, 16)).save_to_disk(tmp_path / "rows")
    options = {"optim": "sgd", "learning_rate": 0.5, "lora_dropout": 0.0, "held_out": 3, "loss": "diffusion_dpo"}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    options |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    two = job(tmp_path, model_folders, ranked_rows, name="two", ddp_backend="gloo", **options)
    history = run_two(tmp_path, two)
    one = worker["train"](job(tmp_path, model_folders, ranked_rows, gradient_accumulation_steps=2, **options))
    for name in ("loss", "eval_loss"):
        ours, theirs = ([log[name] for log in logs if name in log] for logs in (one.state.log_history, history))
        assert len(ours) == {"loss": 4, "eval_loss": 2}[name]
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-6)
    _same(tmp_path / "job-0.safetensors", weights(one))


def test_sharded_training_resumes(tmp_path, model_folders, ranked_rows, worker):
    """From the middle: the same losses and weights, and no copy of the frozen weights in a checkpoint."""
    told = job(tmp_path, model_folders, ranked_rows, max_steps=4, lora_dropout=0.0, ddp_backend="gloo", **FSDP)
    whole = run_two(tmp_path, told)
    expected = load_file(tmp_path / "job-0.safetensors")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not list(checkpoint.glob("pytorch_model*"))
    resumed = run_two(tmp_path, told | {"resume": str(checkpoint)})
    assert logged(resumed) == logged(whole)
    _same(tmp_path / "job-0.safetensors", expected)


# --- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_save_model_and_push_give_a_loadable_folder(make, uploads, full):
    """A push uploads the adapter at its root, with the card, and neither caches nor checkpoints."""
    trainer = make("flow", full_finetune=full, max_steps=1, push_to_hub=True, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.push_to_hub()
    folder = Path(trainer.args.output_dir)
    assert [upload["commit_message"] for upload in uploads] == ["Training in progress, step 1", "End of training"]
    assert uploads[-1]["repo_id"] == f"someone/{folder.name}"
    assert uploads[-1]["folder_path"] == trainer.args.output_dir
    assert "_*" in uploads[-1]["ignore_patterns"]
    assert (folder / "_cache").is_dir()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "trained with RankDPO" in card
    assert "candidates a prompt: 4" in card
    assert ("load_lora_weights" in card) is not full
    pickles = {".bin", ".pt", ".pth", ".pkl"}
    kept = {f.suffix for f in folder.rglob("*") if f.is_file() and "checkpoint-" not in str(f.relative_to(folder))}
    assert not kept & pickles
    expected = ["model_index.json"] if full else ["pytorch_lora_weights.safetensors", "peft/adapter_model.safetensors"]
    assert all((folder / name).is_file() for name in expected)


def test_trained_adapters_draw_as_exported(make, model_folders, tmp_path):
    from alignkit.generators import load_generator
    from alignkit.records import Sampling

    trainer = make("unet", learning_rate=0.05, lora_alpha=5.0)
    trainer.train()
    trainer.export(tmp_path / "adapter")
    sampling = Sampling(2, 2.0, 16, 16)
    ours = trainer.generator.generate(["a red circle"], [1], sampling)
    again = load_generator(model_folders["unet"], adapter=tmp_path / "adapter", device="cpu")
    assert (again.generate(["a red circle"], [1], sampling) - ours).abs().max() <= 1e-4
    base = load_generator(model_folders["unet"], device="cpu").generate(["a red circle"], [1], sampling)
    assert (base - ours).abs().max() > 1e-3

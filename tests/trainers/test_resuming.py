"""What a resumed training must not do: train too far, go on with another batch, lose its way, or end on a full disk."""

from __future__ import annotations

import contextlib
import io
import re
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from full_disk import STEPS, full_disk
from safetensors import SafetensorError

from alignkit import cli
from alignkit.errors import DataError, ResumeError, StorageError
from alignkit.trainers.checkpoint import StepBatch, best_checkpoint, find_checkpoint, require_batch


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer._trainable().items()}


@pytest.fixture
def run(make, tmp_path):
    """Builds a trainer over 4 rows in one folder, a row a step, with a checkpoint every 2 steps."""

    def build(**changes):
        defaults = {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 1, "save_strategy": "steps"}
        return make(**{**defaults, "save_steps": 2, "max_steps": 3, **changes})

    return build


def test_a_run_stopped_after_its_last_checkpoint_trains_no_further_step(run):
    """Step 3 of 3 is in the middle of an epoch of 4 rows, where transformers would train a fourth."""
    first = run()
    first.train()
    for _ in range(2):
        again = run()
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 3
        assert all(torch.equal(value, weights(first)[name]) for name, value in weights(again).items())
    longer = run(max_steps=4)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 4
    with pytest.raises(ResumeError, match=r"checkpoint-4' is at step 4, past the last step 3: raise max_steps"):
        run().train(resume_from_checkpoint=True)


def test_another_number_of_rows_a_step_is_refused(run, tmp_path):
    run(gradient_accumulation_steps=2, max_steps=2).train()
    for changes in ({"per_device_train_batch_size": 2}, {"per_device_train_batch_size": 3}):
        trainer = run(gradient_accumulation_steps=2, **changes)
        rows = 2 * changes["per_device_train_batch_size"]
        with pytest.raises(ResumeError, match=rf"with 2 rows a step \(1 .*\), now they are {rows} .*product is 2"):
            trainer.train(resume_from_checkpoint=True)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    with pytest.raises(ResumeError, match=r"now they are 4 \(2 processes x 1 rows x 2 accumulated\)"):
        require_batch(checkpoint, StepBatch(2, 1, 2))
    trainer = run(per_device_train_batch_size=2)
    with pytest.warns(UserWarning, match="still 2 rows a step"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def test_rows_that_make_no_step_are_no_training(run, ranked_rows):
    with pytest.raises(DataError, match="no step was trained"):
        run(per_device_train_batch_size=5, dataloader_drop_last=True).train()
    for method in ("rankdpo", "sft"):
        with pytest.raises(DataError, match="of 0 rows none is left"):
            run(method=method, rows=ranked_rows(1).select([]))


def test_the_best_checkpoint_moves_with_its_folder(run, tmp_path):
    run(max_steps=2).train()
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "run", moved)
    state = moved / "checkpoint-2" / "trainer_state.json"
    best = f'"best_model_checkpoint": "{tmp_path}/run/checkpoint-2"'
    state.write_text(re.sub(r'"best_model_checkpoint": [^,]*', best, state.read_text()))
    assert best_checkpoint(moved / "checkpoint-2") == str(moved / "checkpoint-2")


@contextmanager
def file_limit(size):
    """Within it no file grows past `size` bytes: the operating system's own error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [2000, 8000])
def test_a_full_disk_ends_with_the_file_and_keeps_the_last_checkpoint(run, tmp_path, size):
    """At the weights, and at the optimizer's state."""
    run(max_steps=2).train()
    trainer = run(max_steps=4, logging_strategy="no")
    printed = io.StringIO()  # pytest captures into a file, for which the limit holds too
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), file_limit(size):
        expected = pytest.raises(StorageError, match=r"could not write '.*checkpoint-4.*make room")
        with expected:
            trainer.train(resume_from_checkpoint=True)
    with pytest.warns(UserWarning, match="checkpoint-4' is refused"):
        assert find_checkpoint(tmp_path / "run").name == "checkpoint-2"


def write_half(state, file):
    Path(file).write_bytes(b"\0" * 100)
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def fail_to_save(message):
    def save(*_, **__):
        raise RuntimeError(message)

    return save


TORCH = ("basic_ios::clear: iostream error", "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


@pytest.mark.parametrize("step", ["weights", *TORCH, *STEPS])
def test_a_checkpoint_on_a_full_disk(run, tmp_path, monkeypatch, capsys, step):
    """What safetensors and torch.save say on a full disk, and each step of what Python writes."""
    run(max_steps=2).train()
    training = run(max_steps=4).train
    monkeypatch.setattr(cli, "_dispatch", lambda _: training(resume_from_checkpoint=True))
    capsys.readouterr()
    with monkeypatch.context() as patch, full_disk(tmp_path / "run", step):
        if step == "weights":
            patch.setattr("alignkit.trainers.base.save_file", write_half)
        elif step in TORCH:
            patch.setattr(torch, "save", fail_to_save(step))
        assert cli.main(["train"]) == 2
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("alignkit: "))
    assert re.search(r"could not write '.*checkpoint-4.*make room on the disk", said)
    with pytest.warns(UserWarning, match="checkpoint-4' is refused"):
        assert find_checkpoint(tmp_path / "run").name == "checkpoint-2"
    again = run(max_steps=4)
    with pytest.warns(UserWarning, match="checkpoint-4' is refused"):
        again.train(resume_from_checkpoint=True)
    assert find_checkpoint(tmp_path / "run").name == "checkpoint-4"


def test_a_folder_deleted_during_the_training_is_an_error(run, tmp_path):
    trainer = run()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(StorageError, match=r"run' was deleted or moved during the training"):
        trainer.train()


def test_other_errors_stay_what_they_are(tmp_path):
    from alignkit.trainers.checkpoint import writing

    for error in (RuntimeError("shapes differ"), OSError(24, "Too many open files"), ValueError("x")):
        with pytest.raises(type(error)) as caught, writing(tmp_path):
            raise error
        assert caught.value is error

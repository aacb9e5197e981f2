"""`ResumingTrainer`: `transformers.Trainer` with checkpoints that are whole, checked, and continued as begun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from typing_extensions import override

from alignkit.errors import DataError, ResumeError, StorageError
from alignkit.escape import get_logger
from alignkit.trainers.checkpoint import (
    StepBatch,
    best_checkpoint,
    find_checkpoint,
    mark_complete,
    mark_incomplete,
    require_batch,
    require_whole,
    stored_state,
    writing,
)

logger = get_logger(__name__)


class ResumingTrainer(Trainer):
    """Knows which checkpoints are whole; never trains past the last step, nor goes on with another number of rows."""

    @override
    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Trainer's train; `True` or "latest" means the newest whole checkpoint, a named damaged one is refused.

        Raises ResumeError for a checkpoint with another number of rows a step, or past the last step; DataError when
        no step was trained; StorageError when a checkpoint cannot be written.
        """
        checkpoint = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str | Path) else None
        if resume_from_checkpoint in (True, "latest"):
            checkpoint = find_checkpoint(Path(str(self.args.output_dir)))
        elif checkpoint is not None:
            require_whole(checkpoint)
        if checkpoint is not None and not self.args.auto_find_batch_size:
            require_batch(checkpoint, self._step_batch())
        output = super().train(resume_from_checkpoint=str(checkpoint) if checkpoint else None, **options)
        if self.state.global_step == 0:
            raise DataError(
                f"no step was trained: the rows give no batch of {self.args.train_batch_size}; give more rows, a "
                "smaller batch, or dataloader_drop_last: false"
            )
        return output

    def _step_batch(self) -> StepBatch:
        args = self.args
        return StepBatch(args.world_size, args.train_batch_size, args.gradient_accumulation_steps)

    def _init_training_state(self, *numbers: Any) -> tuple[int, int]:
        start: tuple[int, int] = super()._init_training_state(*numbers)
        checkpoint = numbers[3]
        if checkpoint is not None:
            self.state.best_model_checkpoint = best_checkpoint(Path(checkpoint))
            self._report_length(Path(checkpoint))
        if self.state.global_step > self.state.max_steps:
            raise ResumeError(
                f"'{checkpoint}' is at step {self.state.global_step}, past the last step {self.state.max_steps}: raise "
                "max_steps (or num_train_epochs), name an earlier checkpoint, or train in another folder"
            )
        return start

    def _report_length(self, checkpoint: Path) -> None:
        before, now = stored_state(checkpoint).max_steps, self.state.max_steps
        if before != now and self.is_world_process_zero():
            print(
                f"'{checkpoint}' was to be trained for {before} steps, now for {now}; from here on the learning rate "
                f"follows the schedule of {now} steps",
                file=sys.stderr,
            )

    def _run_epoch(self, **options: Any) -> None:
        """Trainer's, but a training that was stopped, or interrupted after its last step, trains no other one."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            logger.info("step %d was the last one; the result is that of its checkpoint", self.state.global_step)
        else:
            super()._run_epoch(**options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(str(self.args.output_dir))
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if not output_dir.is_dir():
            raise StorageError(f"'{output_dir}' was deleted or moved during the training; start it again")
        if self.args.should_save:
            mark_incomplete(folder)
        # Trainer would delete the old checkpoints before this one is marked whole: a kill in between would lose all.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        with writing(folder):
            super()._save_checkpoint(model, trial)
            self.args.save_total_limit = limit
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(folder, self._step_batch())
                rotate_checkpoints(str(output_dir), limit, self.state.best_model_checkpoint, use_mtime=True)

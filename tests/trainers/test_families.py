"""RankDPO on every image family, SFT on every video family: exact gradients under activation checkpointing, resume.

Preference losses of both start at log 2.
"""

from __future__ import annotations

import math

import datasets
import pytest
import torch
from clips import encoded, frames
from tiny_families import FAMILIES, IMAGES


# Of the Wans those whose training differs: the second of two experts sees another half of the times.
@pytest.fixture(params=[name for name in FAMILIES if name not in ("wan_tokens", "wan_high")])
def family(request):
    return request.param


@pytest.fixture
def job(family):
    """What is trained on which rows: RankDPO on pictures, SFT on clips."""
    return {} if family in IMAGES else {"method": "sft", "rows": clips_of(family)}


def clips_of(family, candidates=1):
    """Four rows of clips of the family's size."""
    kind = FAMILIES[family]
    size = (kind.frames, kind.side, kind.side)
    clips = [[encoded(frames(*size, seed=9 * i + k)) for k in range(candidates)] for i in range(4)]
    columns = {"phi": [[1.0, 0.0]] * 4} if candidates == 2 else {}
    return datasets.Dataset.from_dict({"prompt": [f"a clip {i}" for i in range(4)], "videos": clips, **columns})


@pytest.mark.parametrize("bf16", [False, True])
def test_an_untrained_pair_costs_log_two(make, batch_of, family, bf16):
    """Exactly, also in bf16: policy and reference run the same code on the same draws."""
    rows = None if family in IMAGES else clips_of(family, 2)
    trainer = make(family, loss="diffusion_dpo", bf16=bf16, rows=rows)
    with trainer.accelerator.autocast():
        output = trainer.method_loss(trainer.generator.model, batch_of(trainer))
    health = output.metrics
    assert output.loss.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-7)
    assert health["margin"].item() == 0
    assert health["implicit_accuracy"].item() == 0.5


def test_two_steps_with_activation_checkpointing(make, stir, family, job):
    """The same weights as without it, and weights that moved."""
    ends = []
    for checkpointing in (False, True):
        trainer = make(
            family, **job, max_steps=2, activation_checkpointing=checkpointing, learning_rate=1e-3, optim="sgd"
        )
        stir(trainer)
        before = {name: value.detach().clone() for name, value in trainer._trainable().items()}
        trainer.train()
        ends.append({name: value.detach().clone() for name, value in trainer._trainable().items()})
    moved = [not torch.equal(ends[0][name], before[name]) for name in before if "lora_B" in name]
    assert sum(moved) > 0.7 * len(moved)  # the last block's text stream ends unused in some families
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-7)


def test_a_resumed_run_equals_the_whole(make, family, job, tmp_path):
    options = {**job, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = make(family, **options, output_dir=str(tmp_path / "whole"))
    whole.train()
    resumed = make(family, **options, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    expected = whole._trainable()
    assert all(torch.equal(value, expected[name]) for name, value in resumed._trainable().items())

"""A full disk, for each writer at each step: one clear error, nothing half-written stays, and a second start ends.

Not here: checkpoints, which libraries write (trainers/test_resuming.py).
"""

from __future__ import annotations

import pyarrow as pa
import pytest
from full_disk import STEPS, full_disk

from alignkit import cli, storage
from alignkit.claims import claim
from alignkit.commands.verb import mark_finished
from alignkit.evaluation.report import ReportInputs, write_report
from alignkit.locks import locked
from data_pipelines.exporters import export_pairs
from rewards.serving.reply_cache import Reply, ReplyCache

PART = storage.Part("part-00000", {})


def write_lock(folder):
    with locked(folder):
        assert (folder / "lock.json").stat().st_size > 0


@pytest.fixture
def writers(load, ranked_rows):
    """By name: writes what it writes below a folder, always the same bytes."""
    import torch

    from alignkit.trainers.draws import DrawPlan
    from alignkit.trainers.latents import encode_rows

    def write_adapter(folder):
        generator = load("unet")
        generator.add_lora(2, None, None, 0.0)
        for name, parameter in generator.net.named_parameters():
            if "lora_" in name:
                torch.nn.init.ones_(parameter.data)
        generator.save_adapter(folder)

    def write_latents(folder):
        plan = DrawPlan(sample_t=lambda n, rng: torch.rand(n, generator=rng), noise_seed=0, caption_dropout=0.5)
        encode_rows(load("flow"), ranked_rows(2), plan, folder)

    return {
        "part": lambda folder: storage.write_part(folder, "part-00000", {"a.parquet": pa.table({"x": [1]})}),
        "manifest": lambda folder: storage.finish_run(folder, "generate", [], rows=0, counts={}),
        "claim": lambda folder: claim(folder, {"inputs": {"data": "1"}}),
        "note": lambda folder: mark_finished(folder, {"max_steps": 1}),
        "pairs": lambda folder: export_pairs(ranked_rows(2), folder / "pairs.parquet"),
        "adapter": write_adapter,
        "latents": write_latents,
        "report": lambda folder: write_report(ReportInputs("title"), folder / "report.html"),
        "reply": lambda folder: ReplyCache(folder).put("ab", Reply("yes")),
        "lock": write_lock,
    }


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CASES = [
    *((writer, step) for writer in ("part", "manifest", "claim", "note", "pairs", "report") for step in STEPS),
    *((writer, step) for writer in ("adapter", "latents") for step in ("write", "close", "replace")),
    *(("reply", step) for step in ("write", "close", "replace")),  # it is not synced: a lost reply is asked for again
    ("lock", "write"),
]


@pytest.mark.parametrize(("writer", "step"), CASES)
def test_a_full_disk(tmp_path, monkeypatch, capsys, writers, writer, step):
    write, whole, folder = writers[writer], tmp_path / "whole", tmp_path / "out"
    write(whole)
    monkeypatch.setattr(cli, "_dispatch", lambda _: write(folder))
    capsys.readouterr()
    with full_disk(folder, step):
        assert cli.main(["verb"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("alignkit: ")]
    assert len(said) == 1
    assert f"could not write '{folder}" in said[0]
    assert "No space left on device" in said[0]
    assert "make room on the disk" in said[0]
    assert files_of(folder).items() <= files_of(whole).items()
    assert cli.main(["verb"]) == 0
    assert files_of(folder) == files_of(whole)

"""The picture of base and trained images: right ones in a green frame, others in a red one."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from alignkit.records import Prompt
from alignkit.sandbox.captions import parse
from alignkit.sandbox.scenes import compose, contradict, render

CAPTIONS = ("a red circle", "two blue rings")
GREEN, RED = (0, 128, 0), (255, 0, 0)


def encoded(spec, rng):
    stream = io.BytesIO()
    Image.fromarray((render(compose(spec, rng), rng) * 255).astype(np.uint8)).save(stream, "png")
    return stream.getvalue()


def evaluation(captions):
    """Two seeds a prompt; the base's images contradict their captions, the trained model's show them."""
    rng = np.random.default_rng(0)
    specs = [parse(text) for text in captions for _ in range(2)]
    sides = {
        "base": [encoded(contradict(spec, rng), rng) for spec in specs],
        "tuned": [encoded(spec, rng) for spec in specs],
    }
    return SimpleNamespace(
        prompts=tuple(Prompt.from_text(text) for text in captions for _ in range(2)),
        seeds=(0, 1) * len(captions),
        seeds_per_prompt=2,
        media=lambda side, rows: {row: sides[side][row] for row in rows},
    )


def test_frames_tell_the_verdicts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    gold = importlib.import_module("gold")
    made = {"runs/arms/drf/seed-0/evaluation": evaluation(CAPTIONS), "other": evaluation(CAPTIONS[::-1])}
    monkeypatch.setattr(gold, "read_pairs", lambda folder: made[folder.as_posix()])
    found = gold.strip(tmp_path / "strip.png", ["runs/arms/drf/seed-0/evaluation"], 9)
    assert (found["columns"], found["rows"]) == (["base", "drf"], 2)
    page = np.asarray(Image.open(tmp_path / "strip.png"))
    for line in range(2):
        top = 22 + 104 * line + 2
        assert tuple(page[top, 232 + 52]) == RED
        assert tuple(page[top, 232 + 104 + 52]) == GREEN
    with pytest.raises(SystemExit, match="differ in prompts or seeds"):
        gold.strip(tmp_path / "none.png", [*made], 9)
    assert not (tmp_path / "none.png").exists()

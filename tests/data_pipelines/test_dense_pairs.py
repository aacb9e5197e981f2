"""The dense-pairs stage with a maker that is a formula: rows, seeds, quarantine, resuming, and memory."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path

import clips as made
import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from alignkit.errors import ConfigError, DataError, NumericsError, ResumeError
from alignkit.media import decode_clip
from alignkit.pairs import Pair
from alignkit.records import Prompt, Sampling
from data_pipelines.dense import Clip, Clips, PairsConfig, make_pairs, read_clips, rebuild_pair
from data_pipelines.dense.decoding import ahead
from data_pipelines.dense.rows import request_for
from data_pipelines.dense.votes import pair_id

SAMPLING = Sampling(steps=2, num_frames=9, fps=4, height=8, width=8)
CONFIG = PairsConfig(seed=3, part_size=2, workers=2)


@dataclass
class Formula:
    """latents = mean of the clip + noise of each copy's seed; it stops at its `last` pair. `seen`: what it got."""

    name: str = "formula"
    codec: str = "float32:abc"
    weights: str = "abc"
    schedule: str = "steps"
    sampling: Sampling = SAMPLING
    last: int = 10**9
    seen: list = field(default_factory=list)

    def make(self, request, clip):
        self.seen.append(request)
        if len(self.seen) > self.last:
            raise NumericsError("the model makes NaN")
        noise = [torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in request.seeds]
        mean = 0.0 if clip is None else float(clip.mean()) / 255
        return Pair(torch.stack(noise) * torch.tensor(request.etas).reshape(2, 1, 1, 1, 1) + mean, request.etas)

    def decode(self, latents):
        value = (latents.mean((1, 2, 3, 4)).clamp(0, 1) * 255).to(torch.uint8).numpy()
        return np.broadcast_to(value[:, None, None, None, None], (len(latents), 9, 8, 8, 3))


@pytest.fixture
def folder(tmp_path):
    """Five videos, of which the third is broken and the fourth too short; one caption has no video."""
    root = tmp_path / "videos"
    root.mkdir()
    for number, count in enumerate((9, 12, 0, 4, 10)):
        data = made.encoded(made.frames(count, 8, 8, seed=number), fps=4) if count else b"no video at all"
        (root / f"{number}.mkv").write_bytes(data)
        (root / f"{number}.txt").write_text(f"caption {number}", encoding="utf-8")
    (root / "lone.txt").write_text("alone", encoding="utf-8")
    return root


def run(folder, out, config=CONFIG, maker=None, **options):
    return make_pairs(read_clips(folder), config, SAMPLING, out, build_maker=lambda: maker or Formula(), **options)


def rows_of(out: Path):
    return datasets.load_dataset("parquet", data_files=str(out / "data" / "*.parquet"), split="train")


def stored(row):
    return torch.stack([load(cell["bytes"])["latents"] for cell in row["latents"]])


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "versions.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_rows_have_the_columns_of_the_dense_format(folder, tmp_path, world):
    """The bad clips are left out and listed; the run goes on. Segments of 4 frames: 9 are two, the tail joins."""
    result = run(folder, tmp_path / "out", identity="w")
    assert (result.rows, dict(result.counts)) == (3, {"pairs": 3, "quarantined": 3})
    rows = rows_of(tmp_path / "out")
    assert rows["source_id"][:] == ["0.mkv", "1.mkv", "4.mkv"]
    assert rows["prompt"][:] == ["caption 0", "caption 1", "caption 4"]
    assert rows["prompt_id"][0] == Prompt.from_text("caption 0").id
    row = rows[1]
    assert (row["fps"], row["num_frames"], row["kind"], row["codec"]) == (4.0, 9, "guided", "float32:abc")
    assert (row["segments"], row["labels"], row["label_source"]) == ([[0, 4], [4, 9]], [], "")
    assert row["etas"] == [row["eta"]] * 2
    assert row["sigma_starts"] == [row["sigma_start"]] * 2
    assert Sampling(**json.loads(row["sampling"])) == SAMPLING
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text("utf-8").splitlines()
    reasons = {fault["source_id"]: fault["reason"] for fault in map(json.loads, lines)}
    assert list(reasons) == ["lone.txt", "2.mkv", "3.mkv"]
    assert "cannot be decoded" in reasons["2.mkv"]
    assert "4 frames at 4 frames a second, 9 are asked for" in reasons["3.mkv"]
    card = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert card["source_id"][:] == rows["source_id"][:]


def test_eta_is_drawn_once_for_each_video_within_its_range():
    clips = [Clip(f"{number}.mkv", Prompt.from_text("a"), "0.mkv", "here") for number in range(64)]
    requests = [request_for(clip, CONFIG) for clip in clips]
    assert all(request.etas[0] == request.etas[1] for request in requests)
    etas = np.array([request.etas[0] for request in requests])
    assert 0.65 <= etas.min() < 0.67
    assert 0.78 < etas.max() < 0.8
    assert abs(etas.mean() - 0.725) < 4 * 0.15 / 12**0.5 / 8  # four standard errors of a uniform draw
    assert len({seed for request in requests for seed in request.seeds}) == 128


@pytest.mark.parametrize("kind", ["vanilla", "structural"])
def test_baselines_have_one_segment(folder, tmp_path, world, kind):
    """Vanilla pairs are full generations of independent noise; no video is read, so the broken ones count too."""
    maker = Formula()
    run(folder, tmp_path / "out", replace(CONFIG, kind=kind), maker)
    rows = rows_of(tmp_path / "out")
    assert rows["segments"][:] == [[[0, 9]]] * len(rows)
    assert len(rows) == (5 if kind == "vanilla" else 3)
    assert {request.etas == (1.0, 1.0) for request in maker.seen} == {kind == "vanilla"}
    assert (rows["source_sha256"][0] == "") == (kind == "vanilla")
    assert len({seed for request in maker.seen for seed in request.seeds}) == 2 * len(rows)


def test_pairs_that_the_paper_saw_fail_are_refused_unless_asked_for(folder, tmp_path, world):
    with pytest.raises(ConfigError, match="same_eta: the copies of such a pair differ in noise statistics"):
        PairsConfig(same_eta=False)
    with pytest.raises(ConfigError, match="real_first: "):
        PairsConfig(real_first=True)
    with pytest.raises(ConfigError, match="kind is vanilla"):
        PairsConfig(real_first=True, kind="vanilla", allow_shortcuts=True)
    run(folder, tmp_path / "eta", replace(CONFIG, same_eta=False, allow_shortcuts=True))
    for row in rows_of(tmp_path / "eta"):
        assert row["etas"][0] != row["etas"][1]
        assert (row["eta"], row["sigma_start"], row["label_source"]) == (None, None, "eta")
        assert row["labels"] == [1 if row["etas"][0] < row["etas"][1] else -1] * 2
    run(folder, tmp_path / "real", replace(CONFIG, real_first=True, allow_shortcuts=True))
    row = rows_of(tmp_path / "real")[0]
    assert (row["etas"][0], row["labels"], row["label_source"]) == (0.0, [1, 1], "real")
    assert (stored(row)[0] == stored(row)[0].flatten()[0]).all()  # the formula's clip without noise


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eta": (0.8, 0.65)}, "lowest and highest start"),
        ({"eta": (0.0, 0.5)}, "within 0 and 1"),
        ({"eta": (0.7,)}, "lowest and highest start"),
        ({"segment_seconds": 0.0}, "segment_seconds is 0.0"),
        ({"part_size": 0}, "part_size is 0"),
    ],
)
def test_settings_that_make_no_sense(keys, message):
    with pytest.raises(ConfigError, match=message):
        PairsConfig(**keys)


@pytest.mark.parametrize(
    ("frames", "fps", "lengths"),
    [
        (121, 24, [24] * 4 + [25]),
        (129, 24, [24] * 4 + [33]),
        (81, 16, [16] * 4 + [17]),
        (85, 30, [30, 30, 25]),
        (5, 24, [5]),
    ],
)
def test_a_short_tail_belongs_to_the_last_segment(frames, fps, lengths):
    assert [end - start for start, end in PairsConfig().segments(frames, fps)] == lengths


def test_a_stopped_stage_continues_to_the_same_bytes(folder, tmp_path):
    """The model stops in the second part; the finished part is kept and not made again."""
    run(folder, tmp_path / "whole", identity="w")
    with pytest.raises(NumericsError):
        run(folder, tmp_path / "out", maker=Formula(last=2), identity="w")
    again = Formula()
    run(folder, tmp_path / "out", replace(CONFIG, workers=1), again, identity="w")
    assert len(again.seen) == 1
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    damaged = tmp_path / "out" / "data" / "part-00000.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run(folder, tmp_path / "out", maker=(mended := Formula()), identity="w")
    assert len(mended.seen) == 2
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    for changes in ({"identity": "other"}, {"config": replace(CONFIG, seed=4)}):
        with pytest.raises(ResumeError, match="another config or other inputs"):
            run(folder, tmp_path / "out", **{"identity": "w", **changes})


def test_every_pair_can_be_built_again_from_its_row(folder, tmp_path, world):
    """Bit for bit, from the row, its video and the maker; another video, VAE or other weights are refused."""
    run(folder, tmp_path / "out")
    for row in rows_of(tmp_path / "out"):
        data = (folder / row["source_id"]).read_bytes()
        assert torch.equal(rebuild_pair(row, data, Formula()).latents, stored(row))
    with pytest.raises(DataError, match=r"'4\.mkv': the video is another file"):
        rebuild_pair(row, (folder / "1.mkv").read_bytes(), Formula())
    with pytest.raises(DataError, match="made with the VAE float32:abc, and here is float32:other"):
        rebuild_pair(row, data, Formula(codec="float32:other"))
    with pytest.raises(DataError, match="made with the weights abc, and here are other; load the model"):
        rebuild_pair(row, data, Formula(weights="other"))
    with pytest.raises(DataError, match="made with the schedule steps, and here are other; give the model the sched"):
        rebuild_pair(row, data, Formula(schedule="other"))
    with pytest.raises(
        DataError, match=r'made with the sampling .*"guidance_scale": 5.0.* here is .*: 3.0, .*sampling_of'
    ):
        rebuild_pair(row, data, Formula(sampling=replace(SAMPLING, guidance_scale=3.0)))
    for column in ("weights", "schedule"):  # votes on one are none on the other
        assert pair_id(row) != pair_id({**row, column: "other"}) != pair_id({**row, column: None})
    run(folder, tmp_path / "vanilla", replace(CONFIG, kind="vanilla"))
    row = rows_of(tmp_path / "vanilla")[2]
    assert torch.equal(rebuild_pair(row, None, Formula()).latents, stored(row))


def test_precision_clips_and_previews(folder, tmp_path, world):
    config = replace(CONFIG, latents_dtype="bfloat16", videos=True, previews=True)
    run(folder, tmp_path / "out", config)
    run(folder, tmp_path / "plain")
    row, plain = rows_of(tmp_path / "out")[0], rows_of(tmp_path / "plain")[0]
    assert stored(row).dtype == torch.bfloat16
    assert torch.equal(stored(row), stored(plain).bfloat16())
    expected = Formula().decode(stored(plain))
    for copy, cell in enumerate(row["videos"]):
        assert np.array_equal(decode_clip(cell, "here"), expected[copy])
    names = sorted(file.name for file in (tmp_path / "out" / "clips").iterdir())
    assert names == [f"{number:06d}-{copy}.webp" for number in (0, 1, 4) for copy in (0, 1)]
    with Image.open(tmp_path / "out" / "clips" / names[0]) as image:
        assert image.format == "WEBP"


def test_nothing_left_is_an_error(folder, tmp_path):
    clips = read_clips(folder)
    bad = Clips(clips.items[2:4], (), clips.read)
    with pytest.raises(DataError, match="no pair is left: all 2 videos are in quarantine"):
        make_pairs(bad, CONFIG, SAMPLING, tmp_path / "out", build_maker=Formula)


# --- decoding ahead ---------------------------------------------------------------------------------------------------


def test_memory_does_not_depend_on_the_number_of_clips(folder, tmp_path, monkeypatch):
    """Decoded clips that are alive while a pair is made: the one in use and `workers` more, of 12 or of 48 clips."""
    from data_pipelines.dense import pairs

    references: list = []

    class Tracked(np.ndarray):
        """An array that can be referred to weakly."""

    def decode(clips, clip, sampling):
        frames = np.zeros((9, 8, 8, 3), np.uint8).view(Tracked)
        references.append(weakref.ref(frames))
        return pairs.Decoded(frames, "")

    peaks = {}
    for count in (12, 48):

        class Counting(Formula):
            def make(self, request, clip):
                gc.collect()
                self.seen.append(sum(reference() is not None for reference in list(references)))
                return Pair(torch.zeros(2, 1, 1, 1, 1), request.etas)

        monkeypatch.setattr(pairs, "decode_listed", decode)
        items = [Clip(f"{number}.mkv", Prompt.from_text("a"), number, "here") for number in range(count)]
        maker = Counting()
        clips = replace(read_clips(folder), items=items)
        config = replace(CONFIG, part_size=12)  # several parts
        make_pairs(clips, config, SAMPLING, tmp_path / str(count), build_maker=lambda maker=maker: maker)
        assert len(maker.seen) == count
        peaks[count] = max(maker.seen)
    assert max(peaks.values()) <= 1 + CONFIG.workers


def test_clips_are_decoded_while_another_is_in_use():
    """With the first result in hand, the second is being made although nobody has asked for it."""
    begun = [threading.Event() for _ in range(5)]

    def make(number):
        begun[number].set()
        return number

    with ahead(make, range(5), 1) as results:
        assert next(results) == 0
        assert begun[1].wait(60)
        assert not begun[2].is_set()
        assert list(results) == [1, 2, 3, 4]


def test_an_error_of_the_consumer_stops_the_decoding():
    numbers: list[int] = []

    def consume():
        with ahead(numbers.append, range(1000), 2) as results:
            next(results)
            raise NumericsError("the model makes NaN")

    with pytest.raises(NumericsError):
        consume()
    assert len(numbers) <= 4

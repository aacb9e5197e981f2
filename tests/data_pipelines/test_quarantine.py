"""What the Syn-Pic stages leave out or report: broken and transparent images, rewards that are NaN, flagged images."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from alignkit import storage
from alignkit.errors import DataError, FlaggedError, NumericsError
from alignkit.records import Scores
from data_pipelines import synpic


def replace_picture(folder: Path, data: bytes) -> None:
    """Swap the picture of row 1, candidate 2 of the second part, as if it had been drawn so."""
    path = folder / "data/part-00001.parquet"
    table = pq.read_table(path)
    images = table["images"].to_pylist()
    images[1][2]["bytes"] = data
    column = pa.array(images, type=table.schema.field("images").type)
    pq.write_table(table.set_column(table.column_names.index("images"), table.schema.field("images"), column), path)


@pytest.mark.parametrize(("keep", "message"), [(0, "empty"), (60, "truncated")])
def test_broken_picture_is_named(world: Any, tmp_path: Path, keep: int, message: str) -> None:
    folder = world.generate(tmp_path / "c")
    good = world.rows(folder)[5]["images"][2]["bytes"]
    replace_picture(folder, good[:keep])
    with pytest.raises(DataError, match=rf"part-00001\.parquet', row 1 .*candidate 2: the image .*{message}"):
        synpic.score_candidates(folder, world.score, tmp_path / "s", build_rewards=world.rewards)


def test_images_with_transparency_are_scored_on_white_and_counted(
    world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = world.generate(tmp_path / "c")
    with io.BytesIO() as buffer:
        Image.new("RGBA", (8, 8), (0, 0, 0, 51)).save(buffer, "PNG")
        replace_picture(folder, buffer.getvalue())
    (tmp_path / "c/parts/part-00001.json").write_text(
        json.dumps(
            storage.read_json(tmp_path / "c/parts/part-00001.json")
            | {"files": {"data/part-00001.parquet": storage.checksum(folder / "data/part-00001.parquet")}}
        )
    )
    for _ in range(2):  # scored, and finished already
        caplog.clear()
        result = synpic.score_candidates(folder, world.score, tmp_path / "s", build_rewards=world.rewards)
        assert result.counts == {"quarantined": 0, "transparent": 1}
        assert caplog.text.count("1 of 30 images have transparency; they are composited on white") == 1
    assert world.rows(tmp_path / "s")[5]["scores"]["red"][2] == pytest.approx(0.8)
    assert "transparent" not in storage.read_json(world.scored(tmp_path / "plain")[1] / "manifest.json")["counts"]


@dataclass
class FailingReward:
    """NaN for the prompts whose text ends in one of `bad`."""

    bad: tuple[str, ...]

    def __call__(self, media: torch.Tensor, prompts: Any) -> Scores:
        total = media.mean(dim=(1, 2, 3))
        return Scores(total.masked_fill(torch.tensor([p.text.split()[-1] in self.bad for p in prompts]), float("nan")))


def score_failing(world: Any, base: Path, bad: tuple[str, ...]) -> storage.StageResult:
    folder = world.generate(base / "c", count=20)
    config = synpic.ScoreConfig(rewards=["failing", "red"])
    builders = {"failing": lambda: FailingReward(bad), "red": world.rewards["red"]}
    return synpic.score_candidates(folder, config, base / "s", build_rewards=builders)


def test_rows_that_are_not_finite_are_quarantined(world: Any, tmp_path: Path) -> None:
    result = score_failing(world, tmp_path, ("6",))
    assert (result.rows, result.counts) == (19, {"quarantined": 1})
    (line,) = (tmp_path / "s/quarantine.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["prompt"] == "picture number 6"
    assert (entry["file"], entry["row"]) == ("data/part-00001.parquet", 2)
    assert entry["reason"] == "reward 'failing' is nan for candidate 0"
    ranked = synpic.rank_candidates(tmp_path / "c", tmp_path / "s", synpic.RankConfig(), tmp_path / "r")
    assert ranked.counts["quarantined"] == 1
    assert "picture number 6" not in [row["prompt"] for row in world.rows(tmp_path / "r")]


def test_over_five_percent_stops_with_advice(world: Any, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match=r"2 of 20 rows .*5%.*quarantine\.jsonl.*leave out that reward"):
        score_failing(world, tmp_path, ("6", "3"))
    assert len((tmp_path / "s/quarantine.jsonl").read_text().splitlines()) == 2


# --- images that a safety checker replaced --------------------------------------------------------------------------


@dataclass
class Checked:
    """A source whose checker replaces the image of every prompt whose text ends in one of `bad`."""

    inner: Any
    bad: tuple[str, ...]
    calls: int = 0
    dies_at: int = 0

    def generate(self, prompts: Any, seeds: Any, sampling: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        pixels = self.inner.generate(prompts, seeds, sampling)
        flags = [prompt.split()[-1] in self.bad for prompt in prompts]
        if any(flags):
            pixels[torch.tensor(flags)] = 0
            raise FlaggedError("unsafe", pixels=pixels, flags=flags)
        return pixels


def checked(world: Any, *bad: str, dies_at: int = 0) -> dict[str, Any]:
    bright = Checked(world.sources["bright"](), bad, dies_at=dies_at)
    return {"dull": world.sources["dull"], "bright": lambda: bright}


def test_flagged_images_are_quarantined_and_the_run_goes_on(world: Any, tmp_path: Path) -> None:
    bad = ("1", "4", "5", "6", "7")  # of the first part one, of the second all
    folders = tmp_path / "c", tmp_path / "s"
    builders = {"build_sources": checked(world, *bad), "build_rewards": world.rewards}
    results = synpic.generate_and_score(world.prompts(10), world.config(), world.score, folders, **builders)
    counts = {"duplicate_prompts": 0, "pictures": 15, "quarantined": 5, "flagged": 5}
    assert [(result.rows, result.counts) for result in results] == [(5, counts), (5, {"quarantined": 0})]
    assert storage.read_json(tmp_path / "c/manifest.json")["counts"] == counts
    lines = [json.loads(line) for line in (tmp_path / "c/quarantine.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [f"picture number {number}" for number in bad]
    assert {(line["generator"], line["candidate"]) for line in lines} == {("bright", 2)}
    assert lines[0]["reason"] == "the pipeline of generator 'bright' flagged candidate 2 as unsafe and replaced it"

    plain = {row["prompt_id"]: row for row in world.rows(world.generate(tmp_path / "plain"))}
    rows = world.rows(folders[0])
    assert [row["prompt"][-1] for row in rows] == ["0", "2", "3", "8", "9"]
    assert all(row == plain[row["prompt_id"]] for row in rows)  # the rest is what it is without a checker

    synpic.score_candidates(folders[0], world.score, tmp_path / "again", build_rewards=world.rewards)
    assert world.snapshot(folders[1]) == world.snapshot(tmp_path / "again")
    ranked = synpic.rank_candidates(*folders, synpic.RankConfig(temperature=1.0, held_out=0.0), tmp_path / "r")
    assert (ranked.rows, ranked.counts["quarantined"]) == (5, 5)
    assert storage.read_json(tmp_path / "r/statistics.json")["counts"]["quarantined"] == 5


def test_a_resumed_run_leaves_out_the_same_images(world: Any, tmp_path: Path) -> None:
    def generate(folder: Path, **options: int) -> None:
        builders = checked(world, "1", "6", **options)
        synpic.generate_candidates(world.prompts(10), world.config(), folder, build_sources=builders)

    generate(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "broken", dies_at=3)
    assert (tmp_path / "broken/parts/part-00000.json").is_file()
    assert not (tmp_path / "broken/manifest.json").exists()
    for _ in range(2):  # resumed, and then finished already
        generate(tmp_path / "broken")
        assert world.snapshot(tmp_path / "broken") == world.snapshot(tmp_path / "whole")


def test_nothing_left_is_an_error(world: Any, tmp_path: Path) -> None:
    builders = checked(world, *map(str, range(10)))
    with pytest.raises(DataError, match=r"no prompt is left: pipelines flagged 10 images as unsafe.*quarantine\.jsonl"):
        synpic.generate_candidates(world.prompts(10), world.config(), tmp_path, build_sources=builders)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 10

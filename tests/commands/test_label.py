"""`alignkit label`: from pairs of a tiny Wan to rows that `train densedpo` takes, by judges, rewards and people."""

from __future__ import annotations

import json

import datasets
import pytest
import tiny_families
import yaml
from chat_server import ChatServer, said

from alignkit import cli
from alignkit.media import encode_clip
from data_pipelines.dense.votes import Vote, append_votes, pair_id, read_votes

OWN = """
from alignkit.records import Verdict


class Own:
    def label(self, pairs):
        return [[Verdict(1 - 2 * (number % 2)) for number, _ in enumerate(pair.segments)] for pair in pairs]


class Nothing:
    pass
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "wan"
    tiny_families.build("wan").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    """A folder of three pairs of 9 frames at 4 a second, in two segments, without videos."""
    import clips

    root = tmp_path_factory.mktemp("made")
    (root / "real").mkdir()
    for number in range(3):
        data = encode_clip(clips.frames(9, 16, 16, seed=number), 4)
        (root / "real" / f"{number}.mkv").write_bytes(data)
        (root / "real" / f"{number}.txt").write_text(f"scene {number}", encoding="utf-8")
    sampling = {"steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16, "num_frames": 9, "fps": 4}
    config = {"out": str(root / "pairs"), "clips": {"path": str(root / "real")}, "sampling": sampling}
    config |= {"generator": {"model": str(model)}, "part_size": 2}
    (root / "pairs.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert cli.main(["dense-pairs", "--config", str(root / "pairs.yaml")]) == 0
    return root / "pairs"


@pytest.fixture
def work(tmp_path, monkeypatch, made, model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "own_labeller.py").write_text(OWN, encoding="utf-8")
    config = {"pairs": str(made), "out": "labelled", "generator": {"model": str(model)}}
    config["labellers"] = {"motion": {"labeller": "reward", "options": {"reward": "motion"}}}
    (tmp_path / "label.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return tmp_path


RUN = ["label", "--config", "label.yaml"]
JUDGE = ["--labellers", "{vlm: {labeller: judge, options: {options: {base_url: 'URL', model: m, retries: 0}}}}"]


def rows_of(folder):
    return datasets.load_dataset("parquet", data_files=str(folder / "data" / "*.parquet"), split="train")


def judge(url):
    return [word.replace("URL", url) for word in JUDGE]


def test_a_reward_labels_and_the_method_trains(work, made, model, capsys):
    assert cli.main(RUN) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    assert "3 labelled pairs in labelled: pairs 3, kept 3" in told
    assert "next: alignkit train densedpo --data labelled" in told
    rows = rows_of(work / "labelled")
    assert set(rows["label_source"][:]) == {"motion"}
    assert {label for own in rows["labels"][:] for label in own} <= {1, -1}
    assert rows["latents"][:] == rows_of(made)["latents"][:]
    scores = read_votes(work / "labelled")[0].details["scores"]
    assert rows["labels"][0][0] == (1 if scores[0] > scores[1] else -1)
    words = ["--model", str(model), "--data", "labelled", "--out", "trained", "--held_out", "0", "--max_steps", "1"]
    words += [
        "--lora_rank",
        "2",
        "--per_device_train_batch_size",
        "3",
        "--save_strategy",
        "no",
        "--disable_tqdm",
        "true",
    ]
    assert cli.main(["train", "densedpo", *words, "--bf16", "false"]) == 0, capsys.readouterr().err
    assert (work / "trained" / "adapter" / "pytorch_lora_weights.safetensors").is_file()


def by_pictures(request, _=0):
    """A judge without bias: the order of the pictures' data decides."""
    pictures = [part["image_url"]["url"] for part in request["messages"][0]["content"] if part["type"] == "image_url"]
    half = len(pictures) // 2
    return said("First." if pictures[:half] > pictures[half:] else "second")


def test_a_served_judge_with_the_shipped_question(work, capsys):
    with ChatServer(by_pictures) as server:
        words = [*RUN, *judge(server.url), "--labellers.vlm.options.options.concurrency", "1"]
        assert cli.main(words) == 0, capsys.readouterr().err
        assert "vlm: 12 requests" in capsys.readouterr().out  # 3 pairs x 2 segments x 2 orders
        assert "Frames of the first clip:" in json.dumps(server.requests[0])
    assert {label for own in rows_of(work / "labelled")["labels"][:] for label in own} <= {1, -1}
    before = (work / "labelled" / "votes" / "vlm.jsonl").read_bytes()
    assert cli.main(words) == 0  # the server is gone, and nothing is asked again
    assert (work / "labelled" / "votes" / "vlm.jsonl").read_bytes() == before


def test_a_judge_that_is_down_is_named(work, capsys):
    assert cli.main([*RUN, *judge("http://127.0.0.1:1")]) == 2
    told = capsys.readouterr().err
    assert "http://127.0.0.1:1" in told
    assert "the votes so far are in 'labelled/votes'; run the same command again" in told


def test_votes_of_people_alone(work, made, capsys):
    for row, label in zip(rows_of(made), (1, 0, -1), strict=True):
        append_votes(work / "people", "anna", [Vote(pair_id(row), segment, label, "anna") for segment in range(2)])
    words = ["label", "--pairs", str(made), "--votes", "people", "--out", "by_people"]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert rows_of(work / "by_people")["labels"][:] == [[1, 1], [-1, -1]]
    manifest = json.loads((work / "by_people" / "manifest.json").read_text("utf-8"))
    assert (manifest["counts"]["filtered"], manifest["statistics"]["tie_rate"]) == (1, pytest.approx(1 / 3))
    assert cli.main([*RUN, "--votes", "people", "--truth", "anna"]) == 0, capsys.readouterr().err
    facts = json.loads((work / "labelled" / "manifest.json").read_text("utf-8"))["statistics"]
    assert facts["agreement"]["segments"]["counted"] == 4


def test_a_labeller_of_ones_own(work, capsys):
    own = ["--labellers", "{mine: {labeller: 'own_labeller:Own'}}", "--batch_size", "1"]
    assert cli.main([*RUN, *own]) == 0, capsys.readouterr().err
    assert rows_of(work / "labelled")["labels"][:] == [[1, -1]] * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labellers", "{}"], "nothing labels the pairs: give `labellers`, or `votes`"),
        (["--labellers.motion.labeller", "judg"], "unknown labeller 'judg'"),
        (["--labellers", "{m: {labeller: 'own_labeller:Nothing'}}"], "is a Nothing without `label`"),
        (["--labellers", "{a/b: {labeller: reward, options: {reward: motion}}}"], "'a/b' is no name of a labeller"),
        (["--generator", "null"], "has latents and no videos; give `generator`"),
        (["--generator.dtype", "bfloat16"], "the latents are those of the VAE float32:"),
        (["--votes", "nowhere"], "'nowhere' holds no votes of others"),
        (["--pairs", "nowhere"], "'nowhere' is not a finished stage"),
        (["--aggregate", "mean"], "aggregate"),
        (["--truth", "glod"], "truth names 'glod'"),
    ],
)
def test_what_stops_the_verb(work, flags, message, capsys):
    assert cli.main([*RUN, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_reads_nothing(work, capsys):
    question = ["--labellers.vlm", "{labeller: judge, options: {options: {question: mine.yaml}}}"]
    assert cli.main([*RUN, "--pairs", "nowhere", "--votes", "people", *question, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "NOT THERE YET: mine.yaml (labeller 'vlm')" in told
    assert "NOT THERE YET: nowhere (pairs)" in told
    assert (
        "label the segments of the pairs in nowhere with motion, vlm, the votes in people/votes into labelled" in told
    )
    assert not (work / "labelled").exists()
    assert cli.main([*RUN, "--pairs", "labelled"]) == 2
    assert "the folder of the pairs, which is only read" in capsys.readouterr().err

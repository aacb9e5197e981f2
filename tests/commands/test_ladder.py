"""The ladder: arms trained in worker processes on shared candidates, one table; finished work is not done again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import yaml

from alignkit import cli
from alignkit.aspects import questions_of
from alignkit.commands import ladder as ladders
from alignkit.commands.ladder_job import LadderJob
from alignkit.config import load

OWN = """\
from alignkit.trainers import Method

DENSE = Method("alignkit.trainers.sft:SFTConfig", "alignkit.trainers.sft:SFTTrainer", data="dense", summary="made up")
"""
SAMPLING = {"height": 16, "width": 16, "steps": 2}
CHAIN = {"height": 16, "width": 16, "sampling_steps": 2, "learning_rate": 0.01}


@pytest.fixture
def ladder(work, model_folders):
    """Writes a ladder's config and gives its name: two arms, two seeds, a user's painter beside the policy."""

    def write(**changes):
        config = {
            "out": "ladder",
            "data": "shared",
            "table": "ladder.md",
            "prompts": {"file": "many.txt", "held_out": 0.4},
            "generators": {
                "policy": {"model": str(model_folders["unet"])},
                "painter": {"model": "mine_for_commands:Painter"},
            },
            "rewards": {"red": {"reward": "mine_for_commands:Red"}, "dark": {"reward": "mine_for_commands:Dark"}},
            "policy": "policy",
            "gold": "dark",
            "generate": {
                "sources": [{"name": n, "seeds_per_prompt": 1, "sampling": SAMPLING} for n in ("policy", "painter")]
            },
            "score": {"rewards": ["red"]},
            "rank": {"held_out": 0.0},
            "evaluate": {"seeds_per_prompt": 1, "sampling": SAMPLING},
            "evaluate_from": 1,
            "training_seeds": [0, 1],
            "train": {
                "max_steps": 2,
                "per_device_train_batch_size": 2,
                "save_strategy": "no",
                "learning_rate": 0.3,
            },
            "arms": {"sft": {"method": "sft"}, "shuffled": {"labels": "random"}},
        } | changes
        (work / "many.txt").write_text("\n".join(f"picture {number}" for number in range(12)), encoding="utf-8")
        name = f"{config['out']}.yaml"
        (work / name).write_text(yaml.safe_dump(config), encoding="utf-8")
        return ["ladder", "--config", name]

    return write


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in {".parquet", ".safetensors"}}


def forget_key(file, section, key):
    """Make a record what a version without the key would have written."""
    record = json.loads(file.read_text(encoding="utf-8"))
    del record[section][key]
    file.write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.usefixtures("quick_workers")
def test_arms_and_a_second_ladder_on_the_same_candidates(work, ladder, capsys):
    assert cli.main(ladder()) == 0, capsys.readouterr().err
    page = (work / "ladder.md").read_text(encoding="utf-8")
    assert "command: `alignkit ladder --config ladder.yaml`" in page
    rows = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("|")}
    assert {"sft", "shuffled"} <= set(rows)
    assert rows["sft"].count("[") == 2  # gold and red
    assert len(rows["sft"].split(" | ")[2].split(",")) == 2  # one gain a seed
    made = json.loads((work / "shared" / "cost-ranked.json").read_text())["cpu_seconds"]
    assert f"rows made in {made / 60:.1f} CPU min" in page
    assert rows["sft"] != rows["shuffled"].replace("shuffled", "sft")
    before = stamps(work / "shared") | stamps(work / "ladder")
    assert len([path for path in before if path.name == "pytorch_lora_weights.safetensors"]) == 4

    arms = {"broken": {"train": {"learning_rate": 1e30}}, "dpo": {"train": {"loss": "diffusion_dpo"}}}
    arms["gradients"] = {"method": "reward_flow", "train": {"reward_weights": {"red": 1}, **CHAIN}}
    changes = {"arms": arms, "training_seeds": [0], "workers": 1, "guidance_scales": [3.0]}
    changes["contrasts"] = [["gradients", "dpo"], ["broken", "dpo"]]
    assert cli.main(ladder(out="second", table="second.md", **changes)) == 2
    said = capsys.readouterr().err
    assert "1 runs failed: broken seed 0: NumericsError" in said
    second = (work / "second.md").read_text(encoding="utf-8")
    at_first, at_three = second.split("## Guidance 5\n")[1].split("## Guidance 3\n")
    assert "| dpo |" in at_first
    assert "| dpo |" in at_three
    assert "| gradients |" in at_three
    assert "arm gradients: reward\\_flow" in second
    assert at_first.split("Differences between arms")[1].count("| gradients - dpo | ") == 1
    assert "broken - dpo" not in second
    assert json.loads((work / "shared" / "cost-ranked.json").read_text()) == {"cpu_seconds": made}  # not made again
    costs = [json.loads(file.read_text())["cpu_seconds"] for file in (work / "second").rglob("cost.json")]
    assert len(costs) == 2
    assert min(costs) > 0
    assert "| CPU min |" in second
    folders = sorted((work / "second" / "arms" / "dpo" / "seed-0").glob("evaluation*"))
    sampled = [json.loads((folder / "evaluation.json").read_text())["sampling"]["guidance_scale"] for folder in folders]
    assert sampled == [5.0, 3.0]
    assert before.items() <= (stamps(work / "shared") | stamps(work / "ladder")).items()

    assert cli.main(ladder()) == 0
    assert (work / "ladder.md").read_text(encoding="utf-8") == page
    assert before.items() <= stamps(work / "ladder").items() | stamps(work / "shared").items()

    forget_key(work / "ladder" / "arms" / "sft" / "run.json", "arm", "ranked_by")
    changed = {"sft": {"method": "sft"}, "shuffled": {"labels": "random", "ranked_by": ["red"]}}
    assert cli.main(ladder(arms=changed)) == 2
    assert "arm.ranked_by" in (said := capsys.readouterr().err)
    assert "arms/sft" not in said
    changed = {"sft": {"method": "sft", "train": {"learning_rate": 0.2}}, "shuffled": {"labels": "random"}}
    assert cli.main(ladder(arms=changed)) == 2
    assert "arm.train.learning_rate: null -> 0.2" in capsys.readouterr().err
    cost = work / "ladder" / "arms" / "shuffled" / "seed-1" / "cost.json"
    cost.unlink()
    assert cli.main(ladder(arms={"shuffled": {"labels": "random"}}, training_seeds=[1])) == 0
    fewer = (work / "ladder.md").read_text(encoding="utf-8")
    assert not cost.exists()  # a finished training is not one of 0 seconds
    assert "| CPU min |" in page
    assert "| CPU min |" not in fewer
    assert "| sft |" not in fewer
    assert rows["shuffled"].split(" | ")[2].split(",")[1].strip() in fewer


def test_a_wrong_key_in_an_arm_stops_before_any_work(work, ladder, capsys):
    assert cli.main(ladder(arms={"odd": {"train": {"betta": 3}}})) == 2
    said = capsys.readouterr().err
    assert "arms.odd" in said
    assert "'beta'" in said
    assert cli.main([*ladder(train={"learning_rat": 1.0}), "--dry-run"]) == 2
    assert "'learning_rate'" in capsys.readouterr().err
    assert cli.main(ladder(arms={"a": {"method": "sftt"}})) == 2
    assert "unknown method 'sftt'. Did you mean 'sft'?" in capsys.readouterr().err
    (work / "own_for_ladder.py").write_text(OWN, encoding="utf-8")
    assert cli.main(ladder(arms={"a": {"method": "own_for_ladder:DENSE"}})) == 2
    assert "method 'own_for_ladder:DENSE' needs the sections clips and pairs and label" in capsys.readouterr().err
    assert cli.main(ladder(guidance_scales=[1.0, 1.0])) == 2
    assert "it repeats a guidance scale" in capsys.readouterr().err
    assert not (work / "shared").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arms": {"a": {"method": "drf", "labels": "random"}}},
            "labels is for arms that train on ranked candidates (or pairs, or captioned media) or pairs of clips",
        ),
        ({"arms": {"a": {"writer": {"writer": "sandbox"}}}}, "writer is for arms that train on prompts with questions"),
        ({"arms": {"a": {"pairs": {"kind": "vanilla"}}}}, "pairs is for arms that train on pairs of clips with labels"),
        ({"arms": {"../../evil": {}}}, "arms: the name '../../evil' becomes a folder"),
        ({"arms": {"a": {"share": 0}}}, "share is 0.0; it must lie in (0, 1]"),
        ({"contrasts": [["sft", "sfd"]]}, "contrasts: ['sft', 'sfd']; give pairs of arms: sft, shuffled"),
        ({"arms": {"a": {"ranked_by": ["dark"]}}}, "arms.a: ranked_by is ['dark']; score.rewards has ['red']"),
        ({"score": None}, "arms.sft: method 'sft' needs the sections score"),
        (
            {"arms": {"a": {"method": "reward_flow", "train": {"reward_weights": {"dark": 1}}}}},
            "gold is 'dark', which is also in reward_weights",
        ),
    ],
)
def test_arms_that_do_not_fit_the_ladder(ladder, changes, message, capsys):
    assert cli.main([*ladder(**changes), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_each_arm_has_data_of_its_kind(work, ladder):
    arms = {
        "ranked": {},
        "asked": {"method": "drf"},
        "twins": {"method": "drf", "writer": {"writer": "sandbox", "options": {"twins": True}}},
        "prompts": {"method": "reward_flow"},
    }
    job = load(LadderJob, file=work / ladder(arms=arms)[2])
    jobs = {name: job.data_job(name) for name in arms}
    assert [type(own).__name__ for own in jobs.values()] == ["SynPicJob", "QuestionsJob", "QuestionsJob", "PolicyJob"]
    assert [str(own.out) for own in jobs.values()] == ["shared", "shared", "shared/arms/twins", "shared"]
    assert jobs["twins"].writer.options == {"twins": True}


def test_arms_with_writers_of_their_own_are_evaluated_by_the_questions_of_the_ladder(work, ladder):
    """Else the critic asks them its one question for all prompts, and its gains differ between ladders."""
    writer = {"writer": "sandbox", "options": {"number_of_all": True}}
    prompts = {"source": "alignkit.sandbox.captions:prompts", "options": {"seed": 3}, "count": 12, "held_out": 0.5}
    own = load(LadderJob, file=work / ladder(arms={"own": {"method": "drf", "writer": writer}}, prompts=prompts)[2])
    shares, data = ladders._make_data(own)
    held_out = [{question.name for question in questions_of(prompt)} for prompt in shares.evaluation]
    assert held_out
    assert all(held_out)
    assert "all" not in set().union(*held_out)
    assert all("all" in {question["name"] for question in row["questions"]} for row in data["own"].train())


PARENT = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from alignkit.commands.ladder import die_with_parent

def work(file):
    with open(file, "w") as out:
        out.write(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=die_with_parent)
    pool.submit(work, sys.argv[1]).result()
"""


def is_running(pid):
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(status.strip()) and not status.startswith("Z")


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_ladder(tmp_path, how):
    (tmp_path / "parent.py").write_text(PARENT)
    file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py", file])
    try:
        assert wait_for(lambda: file.exists() and file.read_text())
        worker = int(file.read_text())
        assert is_running(worker)
        parent.send_signal(how)
        assert wait_for(lambda: not is_running(worker))
    finally:
        parent.kill()
        parent.wait()

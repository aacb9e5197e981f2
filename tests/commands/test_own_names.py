"""A made-up method, family, reward and judge, each one module outside the package, taken through the whole program."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import yaml

from alignkit import cli

METHOD = '''\
from dataclasses import dataclass, field

from alignkit.trainers import Method
from alignkit.trainers.sft import SFTConfig, SFTTrainer


@dataclass
class ScaledConfig(SFTConfig):
    """SFT with a scaled error."""

    scale: float = field(default=2.0, metadata={"help": "Factor of every error."})


class ScaledTrainer(SFTTrainer):
    def errors(self, *inputs, **options):
        return self.args.scale * super().errors(*inputs, **options)


METHOD = Method("my_method:ScaledConfig", "my_method:ScaledTrainer", data="ranked", summary="Train on scaled errors.")
NOT_A_METHOD = ScaledConfig
'''
FAMILY = '''\
from alignkit.generators.families.stable_diffusion import StableDiffusion


class Perturbed(StableDiffusion):
    """Adapter of `StableDiffusionPAGPipeline`, a pipeline class that alignkit does not know."""

    lora_targets = ("to_q",)
'''
REWARD = """\
from alignkit.records import Scores


class Red:
    name, modality, needs_prompt, differentiable = "red", "image", False, True
    comparable_across_prompts, native_range, licence, source = True, (0.0, 1.0), "Apache-2.0", "here"

    def __call__(self, media, prompts):
        return Scores(media[:, 0].mean((1, 2)))
"""
JUDGE = '''\
class FirstOfThree:
    """Abstains for two of three pairs in turn; the others are won by the first."""

    def __init__(self, *, start: int = 0):
        self.count = start

    def compare(self, first, second, prompts):
        assert first.shape == second.shape == (len(prompts), 3, 16, 16)
        verdicts = [int((self.count + row) % 3 == 0) for row in range(len(prompts))]
        self.count += len(prompts)
        return verdicts


class NoJudge:
    pass
'''
MODULES = {"my_method": METHOD, "my_family": FAMILY, "my_reward": REWARD, "my_judge": JUDGE}
SAMPLING = {"height": 16, "width": 16, "steps": 1, "guidance_scale": 1.0, "extra": {"pag_scale": 0.0}}


@pytest.fixture
def own(tmp_path, monkeypatch, model_folders):
    """A folder with the four modules, a model of an unknown pipeline class, prompts and a config for `run`."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    model = shutil.copytree(model_folders["unet"], tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    index["_class_name"] = "StableDiffusionPAGPipeline"
    (model / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("\n".join(f"image {number}" for number in range(12)), encoding="utf-8")
    config = {
        "out": "run",
        "method": "my_method:METHOD",
        "prompts": {"file": "prompts.txt", "held_out": 0.4},
        "generators": {"mine": {"model": "model", "family": "my_family:Perturbed"}},
        "rewards": {"red": {"reward": "my_reward:Red"}},
        "judges": {"mine": {"judge": "my_judge:FirstOfThree", "options": {"start": 3}}},
        "policy": "mine",
        "generate": {"sources": [{"name": "mine", "seeds_per_prompt": 2, "sampling": SAMPLING}]},
        "score": {"rewards": ["red"]},
        "train": {"max_steps": 1, "per_device_train_batch_size": 2, "scale": 3.0, "save_strategy": "no"},
        "evaluate": {"seeds_per_prompt": 1, "batch_size": 2, "sampling": SAMPLING},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


def test_help_and_dry_run_of_an_own_method(own, capsys):
    assert cli.main(["train", "my_method:METHOD", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: alignkit train my_method:METHOD ")
    assert "Train on scaled errors." in text
    assert "--scale  float  [2.0]" in text
    words = ["--model=model", "--family=my_family:Perturbed", "--data=ranked", "--out=out", "--scale=4"]
    del sys.modules["my_method"]
    assert cli.main(["train", "my_method:METHOD", *words, "--dry-run"]) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert "train model with my_method:METHOD on ranked" in text
    assert "method 'my_method:METHOD' is your own: its keys are not checked in a dry run" in text
    assert "scale: 4\n" in text
    assert cli.main(["run", "--config=run.yaml", "--dry-run"]) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert "train: my_method:METHOD on mine (model)\n" in text
    assert "method 'my_method:METHOD' is your own: its keys are not checked in a dry run" in text
    assert "generate: 2 candidates (mine x 2)" in text
    assert "by mine" in text
    assert not (own / "run").exists()
    assert "my_method" not in sys.modules


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "my_method:METOD", "--help"], "module 'my_method' has no 'METOD'"),
        (["train", "my_method:NOT_A_METHOD", "--help"], "must be an alignkit.trainers.Method record"),
        (["run", "--config=run.yaml", "--method=sftt"], "unknown method 'sftt'. Did you mean 'sft'?"),
        (["run", "--config=run.yaml", "--generators.mine.family=Fluxx"], "unknown generator family 'Fluxx'"),
        (["run", "--config=run.yaml", "--judges.mine.judge=servd"], "unknown judge 'servd'. Did you mean 'served'?"),
        (["run", "--config=run.yaml", "--judges={../x: {judge: served}}"], "judges: the name '../x' becomes a folder"),
    ],
)
def test_wrong_names_are_reported_before_any_work(own, words, message, capsys):
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err
    assert not (own / "run").exists()


def test_the_doctor_tries_an_own_reward(own, capsys):
    assert cli.main(["doctor", "--reward", "my_reward:Red"]) == 0, capsys.readouterr().err
    assert "red" in capsys.readouterr().out


def test_the_doctor_sizes_up_an_own_method(own, model_folders, capsys):
    """A subclass of SFT: one candidate, no reference."""
    words = ["doctor", "--model", str(model_folders["unet"]), "--resolution", "32"]
    texts = []
    for method in ("my_method:METHOD", "sft"):
        assert cli.main([*words, "--method", method]) == 0, capsys.readouterr().err
        texts.append(capsys.readouterr().out)
    assert "peak memory of my_method:METHOD, 1 x 1" in texts[0]
    assert texts[0].replace("my_method:METHOD", "sft").splitlines()[:-1] == texts[1].splitlines()[:-1]
    assert cli.main([*words, "--method", "my_method:METOD"]) == 2
    assert "module 'my_method' has no 'METOD'" in capsys.readouterr().err


def test_the_doctor_tries_a_judge(own, capsys):
    """A judge that always prefers the first loses half of the comparisons; one that abstains loses none."""
    (own / "my_judge.py").write_text(
        "class Fixed:\n"
        "    def __init__(self, *, verdict: int):\n"
        "        self.verdict = verdict\n\n"
        "    def compare(self, first, second, prompts):\n"
        "        assert first.shape == second.shape == (6, 3, 224, 224)\n"
        "        return [self.verdict] * len(prompts)\n",
        encoding="utf-8",
    )
    assert cli.main(["doctor", "--judge", "my_judge:Fixed", "--options.verdict", "0"]) == 0, capsys.readouterr().err
    assert "0 of 12 comparisons won, 12 abstentions, none lost" in capsys.readouterr().out
    assert cli.main(["doctor", "--judge", "my_judge:Fixed", "--options.verdict", "1"]) == 2
    assert "6 of 12 comparisons are lost" in capsys.readouterr().err
    assert cli.main(["doctor", "--judge", "my_judge:Fixed", "--options.verdict", "7"]) == 2
    assert "it must give 1, 0 or -1" in capsys.readouterr().err


def test_a_run_with_all_four(own, capsys):
    assert cli.main(["run", "--config=run.yaml"]) == 0, capsys.readouterr().err
    log = json.loads((own / "run" / "train" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert log[0]["health/error"] > 0
    adapter = json.loads((own / "run" / "train" / "adapter" / "peft" / "adapter_config.json").read_text("utf-8"))
    assert adapter["target_modules"] == ["to_q"]  # what the own family says
    pairs = len((own / "prompts.txt").read_text("utf-8").splitlines()) - rows(own / "run" / "ranked")
    wins = -(-pairs // 3)
    result = json.loads((own / "run" / "evaluation" / "judged" / "mine" / "result.json").read_text("utf-8"))
    assert (result["wins"], result["losses"], result["abstentions"]) == (wins, 0, pairs - wins)
    assert result["win_rate"] == pytest.approx((wins + (pairs - wins) / 2) / pairs)
    line = f"{wins} won, 0 lost, {pairs - wins} abstentions"
    assert line in capsys.readouterr().out
    assert line in (own / "run" / "report.html").read_text(encoding="utf-8")

    # Another judge may be added to a finished run; one under the same name is refused.
    again = ["run", "--config=run.yaml"]
    assert cli.main([*again, "--judges.mine.options.start=1"]) == 2
    assert "holds the verdicts of another judge" in capsys.readouterr().err
    judges = {
        "mine": {"judge": "my_judge:FirstOfThree", "options": {"start": 3}},
        "red": {"judge": "reward", "options": {"reward": "my_reward:Red"}},
    }
    assert cli.main([*again, f"--judges={json.dumps(judges)}"]) == 0, capsys.readouterr().err
    assert "judge red: tuned wins" in capsys.readouterr().out


def rows(folder):
    return json.loads((folder / "statistics.json").read_text(encoding="utf-8"))["counts"]["train"]

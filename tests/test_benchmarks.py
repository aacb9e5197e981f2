"""Benchmarks at their tiniest: every case runs, and the bare model does the work that the measured one does."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from alignkit.adapters import lora
from alignkit.media import encode_image
from alignkit.sandbox import generators
from alignkit.trainers.draws import DrawPlan
from alignkit.trainers.latents import COND, encode_rows

USES = {"reference", "train", "zero_grad", "clipping", "precision, reference and policy", "all"}
TINY = ["--tiny", "--batch", "2", "--size", "64", "--repeats", "1"]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")


@pytest.fixture
def scoring(benchmarks):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        yield importlib.import_module("scoring")


def operations(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_the_bare_model_does_the_same_work(scoring, tmp_path):
    """Operations of products and convolutions within 3% (MPS also finds relevant words): neither is spared a pass."""
    options = SimpleNamespace(
        batch=2, size=64, tiny=True, device="cpu", dtype="float32", model="", processor="", head=""
    )
    bench = scoring.Bench(tmp_path, options)
    found = {}
    for name, build in scoring.CASES.items():
        case = build(bench)
        case.reward(case.media, scoring.unseen(case.prompts, 0))  # a condition that all calls share is read
        bare = operations(case.bare)
        found[name] = operations(lambda case=case: case.reward(case.media, case.prompts)) / bare
        if case.full is not None:
            together, alone = case.bare().last_hidden_state, [output.last_hidden_state for output in case.full()]
            torch.testing.assert_close(together, torch.stack(alone, 1).flatten(0, 1), rtol=0, atol=1e-4)
            look = operations(lambda case=case: case.reward._critic._reader.see(case.media))
            assert operations(case.full) - bare == 3 * look
    assert found == pytest.approx(dict.fromkeys(found, 1), rel=0.03)


def test_it_prints_a_line_a_case(scoring, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scoring.py", "clip_score", "yes_no", "ensemble", *TINY])
    scoring.main()
    first, second, third = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["reward"] for line in (first, second, third)] == ["clip_score", "yes_no", "ensemble"]
    assert first["per_s"] > 0 < first["ratio"] < 3
    assert second["full_per_s"] > 0 < second["speed_up"]
    assert (third["members"], third["towers"]) == (3, 1)


def test_whole_trainings_are_foretold_from_short_ones(benchmarks, monkeypatch, tmp_path):
    """Where a training costs 3 s, 2 s a step and a generator's 10 ms a scene more, so do the whole recipes."""
    times = importlib.import_module("training_times")

    def pretend(train):
        recipe = train.keywords.get("recipe") or (*train.keywords.get("stages", ()), *train.args[2:])[0]
        is_ahead = isinstance(recipe, generators.GeneratorRecipe)
        ahead = recipe.scenes if is_ahead else train.keywords.get("scenes", train.keywords.get("clips", 0))
        return 3 + 2 * recipe.steps + 0.01 * ahead

    monkeypatch.setattr(times, "seconds", pretend)
    monkeypatch.setattr(times.recipes, "train_reader", lambda *_: None)
    assert times.staged("vae", 7) == pytest.approx(sum(3 + 2 * stage.steps for stage in times.recipes.VAE))
    assert times.head("careful", 7, tmp_path) == pytest.approx(3 + 2 * times.recipes.HEADS["careful"].steps)
    for name, (_, stages, scenes, _) in times.ENCODED.items():
        whole = 3 + 2 * sum(stage.steps for stage in stages) + 0.01 * scenes
        assert times.encoded(name, 7, tmp_path) == pytest.approx(whole)
    for name in ("unet_first", "unet", "flow"):
        recipe = generators.RECIPES[name]
        assert times.generator(name, 7, tmp_path) == pytest.approx(3 + 2 * recipe.steps + 0.01 * recipe.scenes)


def test_a_kind_of_step_is_measured_alone(benchmarks, monkeypatch, tmp_path):
    """It is the trainer's kind that its name says, and no other is built."""
    step = importlib.import_module("rankdpo_step")
    built = []

    def build(*given, **options):
        built.append(make(*given, **options))
        return built[-1]

    make = step.build
    monkeypatch.setattr(step, "build", build)
    only = "full, low memory, precomputed reference"
    chosen = SimpleNamespace(prompts=1, candidates=2, side=64, repeats=1, runs=2, bf16=False, only=[only])
    (found,) = step.speed(step.random_model(tmp_path / "model"), chosen, tmp_path)
    (trainer,) = built
    assert (trainer.args.full_finetune, trainer.args.low_memory, trainer.args.precompute_reference) == (True,) * 3
    assert found["kind"] == only
    assert found["amortised_images_per_s"] < found["images_per_s"]
    for name, (full, low, ready) in step.KINDS.items():
        assert name.startswith("full") is full
        assert ("low memory" in name, "precomputed" in name) == (low, ready)
    assert len(set(step.KINDS.values())) == 8


def test_the_fixed_cost_is_measured_on_sdxls_structure(benchmarks):
    """SDXL's structure with a LoRA has 7,531 modules. How long anything takes is not tested."""
    costs = importlib.import_module("fixed_cost").fixed_cost(repeats=1)
    assert costs["modules"] == 7531
    assert costs["lists_ms"].keys() == costs["walks_ms"].keys() == USES
    for times in (costs["lists_ms"], costs["walks_ms"]):
        assert times["all"] == pytest.approx(sum(value for name, value in times.items() if name != "all"), abs=0.02)


NO_TORCHVISION = "import torchvision_is_not_here\n"
STAND_IN = """import json, pathlib, sys
with pathlib.Path(__file__).with_suffix(".jsonl").open("a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
"""


def test_diffusers_loop_computes_our_loss(benchmarks, monkeypatch, capsys, tmp_path):
    """Both sides run on one folder; a script that cannot be run is named, and a bare loop measured in its place."""
    (tmp_path / "script.py").write_text(NO_TORCHVISION)
    told = {
        "script": tmp_path / "script.py",
        "work": tmp_path / "work",
        "side": 64,
        "pairs": 2,
        "epochs": 2,
        "steps": 1,
    }
    options = [str(part) for name, value in told.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["against_diffusers.py", "--tiny", *options])
    against = importlib.import_module("against_diffusers")
    monkeypatch.setattr(against, "keep_freed_memory", lambda: None)  # it would hold for the whole process
    against.main()
    (line,) = capsys.readouterr().out.splitlines()
    answer = json.loads(line)
    assert "a bare loop" in answer["theirs"]
    assert "No module named 'torchvision_is_not_here'" in answer["theirs"]
    loss = answer["loss"]["float64"]
    assert loss["relative_difference"] < 1e-4 < abs(loss["ours"] - math.log(2))
    assert answer["draws"] == {"rows x epochs": 4, "distinct": 4}
    for found in (answer["whole_run"], *answer["per_step"].values()):
        assert found["ratio"]["wall_s"] == pytest.approx(found["theirs"]["wall_s"] / found["ours"]["wall_s"], rel=0.05)
    saved = [load_file(tmp_path / "work" / side / lora.DIFFUSERS_FILE).values() for side in ("ours", "theirs")]
    ours, theirs = (sorted(tuple(tensor.shape) for tensor in tensors) for tensors in saved)
    assert ours == theirs


def test_diffusers_script_runs_twice_and_for_its_imports(benchmarks, tmp_path):
    (tmp_path / "script.py").write_text(STAND_IN)
    against = importlib.import_module("against_diffusers")
    settings = against.Settings(1, 64, 8, 1e-5, 5000.0, 0, bf16=True)
    script = against.Script(tmp_path / "script.py", tmp_path / "model", tmp_path / "pairs", settings, tmp_path)
    found = script.measure(epochs=3, steps=9)
    assert {name: values.shape for name, values in found.items()} == {"per_step": (2,), "whole_run": (2,)}
    first, *runs = map(json.loads, (tmp_path / "script.jsonl").read_text().splitlines())
    assert first == ["--help"]
    told = [dict(zip(run[1::2], run[2::2], strict=True)) for run in runs]
    assert [options.get("--max_train_steps") for options in told] == [str(against.FEW), None]
    assert told[1]["--num_train_epochs"] == "3"
    assert (told[1]["--beta_dpo"], told[1]["--mixed_precision"]) == ("5000", "bf16")


def test_diffusers_loop_crops_the_middle_of_both_images(benchmarks):
    bare = importlib.import_module("bare_dpo")
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8)[:, None], (64, 96, 3))
    pixels, facts = bare._pair(encode_image(ramp), encode_image(ramp[:, ::-1].copy()), 0.0, side=32)
    assert facts == [(64, 96), (0, 8)]
    levels = (pixels + 1) * 255 / 2
    assert levels[0, 0].tolist() == pytest.approx([95 - 2 * x - 0.5 for x in range(8, 40)], abs=0.01)
    assert levels[3, 0].tolist() == pytest.approx([2 * x + 0.5 for x in range(8, 40)], abs=0.01)


@pytest.fixture
def encoded(load, ranked_rows, tmp_path):
    """A row of 4 candidates as training stores it, and the side of its images."""
    plan = DrawPlan(sample_t=lambda n, rng: torch.rand(n, generator=rng), noise_seed=0, caption_dropout=0.0)
    rows = ranked_rows(2)
    side = rows[0]["images"][0].height
    return encode_rows(load("sdxl"), rows, plan, tmp_path)[0], side


def test_the_size_of_a_cache_is_that_of_the_tensors_of_an_encoded_row(
    benchmarks, monkeypatch, capsys, model_folders, encoded
):
    """Of the tiny model's shapes alone the benchmark gives what a real row takes."""
    row, side = encoded
    latents = row["latents"].numel()
    width = row[f"{COND}encoder_hidden_states"].shape[-1]  # of each of CLIP's 77 tokens; the tiny tokenizer's are fewer
    cond = 77 * width + row[f"{COND}text_embeds"].numel()
    cache_size = importlib.import_module("cache_size")
    monkeypatch.setattr(cache_size, "CONFIGS", model_folders["sdxl"].parent)
    words = ["--models", "sdxl", "--rows", "10000000", "--rows_a_prompt", "5", "--candidates", "4", "--side", str(side)]
    monkeypatch.setattr(sys, "argv", ["cache_size.py", *words])
    cache_size.main()
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"rows": 10_000_000, "rows_a_prompt": 5, "candidates": 4, "side": side}
    for name, size in (("float32_gb", 4), ("bfloat16_gb", 2)):
        expected = {"with every row": latents + cond, "once a prompt": latents + cond / 5}
        assert found[name] == {key: pytest.approx(size * value / 100, abs=0.051) for key, value in expected.items()}


def test_reward_gradients_at_full_size_are_measured_beside_the_doctor(benchmarks, monkeypatch, capsys):
    """At its tiniest: stages in order, a line for each case, and the doctor near the tensors that were counted."""
    script = importlib.import_module("full_size_reward_flow")
    monkeypatch.setattr(script.signal, "alarm", lambda _: 0)  # it would end the whole test run
    monkeypatch.setattr(sys, "argv", ["full_size_reward_flow.py", "--tiny", "--cases", "flux"])
    script.main()
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["case"] == "flux"
    assert list(line["seconds"]) == ["decoding forward", "the critic", "decoding", "a denoising step"]
    assert min(line["peak_gb"].values()) > line["weights_gb"] > 0
    assert all(0.8 < ratio < 1.25 for ratio in line["doctor_over_measured"].values())


def test_steps_at_full_size_are_measured_beside_the_doctor(benchmarks, monkeypatch, capsys):
    """At their tiniest: images twice, without and with precomputed reference, clips once."""
    script = importlib.import_module("full_size_step")
    words = ["--tiny", "--steps", "1", "--models", "sd35_medium", "wan21_1_3b"]
    monkeypatch.setattr(sys, "argv", ["full_size_step.py", *words])
    script.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(line["model"], line["precomputed_reference"]) for line in lines] == [
        ("sd35_medium", False),
        ("sd35_medium", True),
        ("wan21_1_3b", False),
    ]
    assert lines[2]["clips_per_s"] > 0 < lines[2]["doctor_gb"]
    assert lines[2]["paper_clips_per_s"] == 0.139


def test_a_step_of_text_encoders_runs_the_chain_once_in_bounded_memory(benchmarks, monkeypatch, capsys):
    """Whatever the number of rewards, and of steps with gradients."""
    script = importlib.import_module("textcraftor_step")
    words = ["--only", "rewards", "memory", "--prompts", "1", "--steps", "3", "--repeats", "1", "--window", "2"]
    monkeypatch.setattr(sys, "argv", ["textcraftor_step.py", *words])
    script.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    one, three = (line for line in lines if line["question"] == "rewards")
    assert (one["rewards"], three["rewards"]) == (1, 3)
    assert one["denoiser_calls"] == three["denoiser_calls"] == 2 * 3 + 2  # with guidance; the window runs again
    assert one["encoder_calls"] == three["encoder_calls"]
    assert max(line["over_one"] for line in lines if line["question"] == "memory") < 1.05


def test_soups_of_two_loras_and_of_two_denoisers_are_measured(benchmarks, model_folders, monkeypatch, capfd, tmp_path):
    """The bytes of a LoRA of the sum of both ranks, and of a whole denoiser in float16."""
    script = importlib.import_module("soup_memory")
    folder = model_folders["sdxl"]
    monkeypatch.setattr(script, "CONFIGS", folder.parent)
    words = ["--model", folder.name, "--rank", "2", "--work", str(tmp_path), "--only", "lora"]
    monkeypatch.setattr(sys, "argv", ["soup_memory.py", *words])
    script.main()
    assert not list(tmp_path.iterdir())
    base = script.make_base(folder.name, tmp_path / "base")
    script.measure("weights", str(base.folder), script.make_tuned(base, "unet", tmp_path), tmp_path / "mixed")
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    of_loras, of_weights = map(json.loads, lines)
    network = base.shapes("unet")
    layers = [part for name, part in network.named_modules() if script.LAYERS.search(name)]
    numbers = sum(value.numel() for value in network.state_dict().values())
    assert [of_loras["question"], of_weights["question"]] == ["lora", "weights"]
    for found, size in ((of_loras, sum(4 * 4 * sum(one.weight.shape) for one in layers)), (of_weights, 2 * numbers)):
        assert size < found["result_bytes"] < size + 2**17  # a header of names
        assert found["peak_bytes"] > 0 < found["two_tensors_bytes"]


def test_the_agreement_of_gradients_is_that_of_their_common_part(benchmarks, monkeypatch, capsys):
    script = importlib.import_module("gradient_agreement")
    same, opposite = torch.tensor([[3.0, 4.0], [6.0, 8.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    both = torch.cat([same, same])
    assert script.agreement(both) == {"cosine": 1, "error": 0, "norm": 7.5, "common": pytest.approx(7.3598, abs=1e-4)}
    assert script.agreement(torch.cat([opposite, opposite]))["common"] == 0
    words = ["--rewards", "saturation", "--settings", "first 1", "--batches", "3", "--prompts", "1"]
    monkeypatch.setattr(sys, "argv", ["gradient_agreement.py", *words])
    script.main()
    (line,) = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert (line["reward"], line["steps"]) == ("saturation", "first 1")
    assert -1 <= line["cosine"] <= 1
    assert line["norm"] > 0


def test_rounded_products_are_those_of_bfloat16_inputs(benchmarks):
    """Values and gradients of a convolution and a product under autocast: of rounded inputs, in float32, rounded."""
    rounded = importlib.import_module("rounded_bf16").RoundedBf16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, conv, linear = torch.randn(2, 8, 6, 6), torch.nn.Conv2d(8, 16, 3), torch.nn.Linear(16, 12)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            hidden = conv(x)
            out = linear(hidden.mean((2, 3)))
        out.float().square().mean().backward()
        grads = [weight.grad for weight in (conv.weight, linear.weight)]
        conv.zero_grad()
        linear.zero_grad()
        return [hidden, out, *grads]

    plain = run()
    with rounded():
        ours = run()
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in plain]
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-9)
    exact = torch.nn.functional.conv2d(
        x.bfloat16().float(), conv.weight.bfloat16().float(), conv.bias.bfloat16().float()
    )
    assert torch.equal(ours[0], exact.bfloat16())


def test_dense_steps_and_pairs_are_measured_beside_bare_calls(benchmarks, monkeypatch, capsys):
    """All three cases run at their smallest; the ratios of so short runs mean nothing."""
    script = importlib.import_module("dense_step")
    words = [
        "--pairs",
        "1",
        "--frames",
        "5",
        "--side",
        "16",
        "--repeats",
        "1",
        "--steps",
        "2",
        "--only",
        "step",
        "pairs",
    ]
    monkeypatch.setattr(sys, "argv", ["dense_step.py", *words])
    script.main()
    lines = {line["case"]: line for line in map(json.loads, capsys.readouterr().out.splitlines()[-2:])}
    assert min(lines[name]["ratio"] for name in ("step", "pairs")) > 0
    assert script.peak_of_stage(2, 16) > 0


def test_reward_gradients_are_measured(benchmarks, monkeypatch, capsys):
    """At their tiniest: the exact gradient first, and less memory with checkpoints than without."""
    script = importlib.import_module("reward_flow")
    words = ["--estimators", "--memory", "--step", "--repeats", "1"]
    words += ["--batches", "1", "--batch", "1", "--sampling_steps", "4", "--side", "32"]
    monkeypatch.setattr(sys, "argv", ["reward_flow.py", *words])
    script.main()
    printed = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in printed if line.startswith('{"question"')]
    assert [line["ratio"] > 0 for line in lines if line["question"] == "step"] == [True]
    first, *_ = estimators = [line for line in lines if "estimator" in line]
    assert (first["estimator"], first["cosine_to_exact"]) == ("exact", [1.0, 1.0, 1.0])
    assert all(abs(line["cosine_to_exact"][0]) <= 1.001 for line in estimators)
    memory = [line for line in lines if "differentiated_steps" in line]
    assert [line["differentiated_steps"] for line in memory] == [1, 2, 4]
    assert memory[-1]["checkpointed_bytes"] <= memory[-1]["steps_alone_bytes"] < memory[-1]["plain_bytes"]
    assert memory[-1]["checkpointed_bytes"] <= 1.1 * memory[0]["checkpointed_bytes"]
    assert memory[-1]["time_over_steps_alone"] > 0


def test_agreement_with_gold_is_measured(benchmarks, monkeypatch, capsys):
    script = importlib.import_module("agreement")
    monkeypatch.setattr(sys, "argv", ["agreement.py", "--prompts", "2", "--seeds", "1", "--steps", "1"])
    script.main()
    lines = {line["reward"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert {"aspects", "aspects/object", "vqa", "clip", "careful"} <= set(lines)
    assert lines["vqa"]["images"] == 2
    assert script.auc(np.array([0.1, 0.9]), np.array([0.0, 1.0])) == 1.0


def test_plain_and_compiled_sampling_are_measured_in_turns(benchmarks, monkeypatch, capsys):
    script = importlib.import_module("compiled_sampling")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _: None)  # compiling takes most of a minute
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    words = ["--only", "unet", "--batch", "1", "--repeats", "3"]
    monkeypatch.setattr(sys, "argv", ["compiled_sampling.py", *words])
    script.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["generator"], line["batch"]) == ("unet", 1)
    assert line["plain_s"] > 0 < line["compiled_s"]
    assert line["pays_after"] is None or line["plain_s"] >= line["compiled_s"]

"""Memory of reward gradients: each stage on the meta device against the same on a CPU, a whole step, and what fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_vlm
import torch

from alignkit import cli
from alignkit.commands.doctor import memory, stages
from alignkit.commands.doctor.critic_plan import CriticPlan
from alignkit.commands.doctor.dry_media import critic_numbers, critic_stage, decoding_stage
from alignkit.commands.doctor.dry_step import Guidance, Ledger, network_inputs
from alignkit.commands.doctor.main import DoctorJob, chain_of, setup_of
from alignkit.commands.doctor.model_shapes import read_model
from alignkit.diffusion.steps import Steps
from alignkit.errors import ConfigError, MissingFileError
from alignkit.generators.decoding import Decoding
from alignkit.generators.description import LatentSize
from alignkit.generators.rollout import rollout
from alignkit.records import Conditioning, Prompt
from alignkit.trainers.reward_flow import RewardConfig, RewardTrainer
from rewards.yes_no import YesNo

CRITICS = Path(__file__).parent.parent.parent / "configs" / "critics"
QUESTIONS = ["Is there a cat on the mat? Answer with yes or no.", "Is the mat red? Answer with yes or no."]


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    return tiny_vlm.save("qwen2_5_vl", tmp_path_factory.mktemp("critic"), bounds=(8 * 8, 64 * 64))


def tokens(folder):
    """Of a question in its turn."""
    reward = YesNo(str(folder), questions=QUESTIONS)
    seen = reward._critic._reader.see(torch.zeros(1, 3, 32, 32))
    return max(len(reward._critic._reader.tokens(seen, text)) for text in QUESTIONS) - len(seen.features[0])


def weights_of(*modules):
    return [tensor for module in modules for tensor in [*module.parameters(), *module.buffers()]]


# --- stages against measurements ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "size", "decoding"),
    [
        ("unet", (64, 64, 1), Decoding()),
        ("wan", (32, 32, 21), Decoding()),  # six latent frames, of which the doctor runs four and five
        ("wan", (32, 320, 5), Decoding(tiles=True)),  # two tiles
        ("cogvideox", (32, 32, 9), Decoding()),
    ],
)
def test_decoding_takes_what_it_takes(load, model_folders, family, size, decoding):
    generator = load(family)
    vae = generator.pipeline.vae.requires_grad_(False)
    latents = torch.randn(1, *generator.latent_shape(*size), requires_grad=True)
    with Ledger([latents, *weights_of(vae)]) as ledger:
        pixels = generator.decode(latents, decoding)
        kept = ledger.live
        pixels.backward(torch.ones_like(pixels))
    told = decoding_stage(read_model(model_folders[family]), size, "float32", decoding)
    assert told.peak == pytest.approx(ledger.peak, rel=0.1)
    assert told.kept == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize(("shape", "checkpointing"), [((2, 3, 64, 64), False), ((1, 6, 3, 64, 64), True)])
def test_a_critic_takes_what_it_takes(critic, shape, checkpointing):
    modality = "image" if len(shape) == 4 else "video"
    reward = YesNo(str(critic), modality=modality, questions=QUESTIONS, checkpointing=checkpointing)
    media = torch.rand(shape, requires_grad=True)
    network = reward._critic._reader.network
    with Ledger([media, *weights_of(network), reward._critic._words]) as ledger:
        reward(media, [Prompt.from_text("a cat")] * len(media)).total.sum().backward()
    plan = CriticPlan(model=critic, checkpointing=checkpointing, questions=len(QUESTIONS))
    assert critic_stage(plan, shape, tokens(critic)) == pytest.approx(ledger.peak, rel=0.1)
    assert (
        critic_numbers(plan)
        == sum(parameter.numel() for parameter in network.parameters()) + reward._critic._words.numel()
    )


@pytest.mark.parametrize("guidance", list(Guidance))
def test_a_denoising_step_takes_what_it_takes(load, model_folders, guidance):
    """A checkpointed step of the real chain, whose forward pass is repeated in the backward pass."""
    generator = load("flow")
    generator.add_lora(3, None, None, 0.0)
    generator.net.train()
    for parameter in generator.net.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    x = torch.randn(2, *generator.latent_shape(32, 32), requires_grad=True)
    given = network_inputs(type(generator), generator.net, LatentSize(2, 1, *x.shape[2:]))
    rows = {name: given[name] for name in ("encoder_hidden_states", "pooled_projections")}
    cond = Conditioning(rows, {name: row[:1] for name, row in rows.items()})
    known = [*weights_of(generator.net), *(p.grad for p in generator.net.parameters()), *rows.values(), x]
    grid, scale = generator.grid(4, x.shape[1:])[-1:], 1.0 if guidance is Guidance.NONE else 2.0
    steps = Steps(unconditional=guidance is not Guidance.CONDITIONAL)
    with Ledger(known) as ledger:
        rollout(generator, cond, x, grid, scale=scale, steps=steps).square().mean().backward()
    model = read_model(model_folders["flow"])
    setup = setup_of(DoctorJob(method="reward_flow", resolution=32, lora_rank=3, batch=2), model)
    chain = stages.Chain(setup, 0, guidance, Decoding())
    assert stages.stage(model, chain, stages.STEP) == pytest.approx(ledger.peak, rel=0.1)


@pytest.mark.parametrize(("count", "largest"), [(12, stages.CRITIC), (1, stages.DECODING)])
def test_a_whole_step_takes_what_it_takes(load, model_folders, critic, tmp_path, count, largest):
    """Chain, decoding and critic of the trainer itself: the doctor knows the peak, and which stage has it."""
    keys = {"height": 32, "width": 32, "num_frames": 5, "sampling_steps": 3, "guidance_scale": 2.0}
    args = RewardConfig(
        output_dir=str(tmp_path),
        reward_weights={"critic": 1.0},
        gradient_steps="last 2",
        lora_rank=3,
        max_steps=1,
        save_strategy="no",
        bf16=False,
        **keys,
    )
    reward = YesNo(str(critic), modality="video", questions=QUESTIONS[:1] * count, frames=4)
    trainer = RewardTrainer(load("wan"), args, [{"prompt": "a cat"}], rewards={"critic": reward})
    batch = trainer.data_collator([trainer.train_dataset[0]])
    pipeline = trainer.generator.pipeline
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    for parameter in trainer._trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in trainer._trainable().values()]
    with Ledger([*weights_of(*parts, reward._critic._reader.network), *grads]) as ledger:
        trainer.method_loss(trainer.model, batch).loss.mean().backward()
    model = read_model(model_folders["wan"])
    plan = CriticPlan(model=critic, questions=count, frames=4)
    job = DoctorJob(method="reward_flow", resolution=32, num_frames=5, lora_rank=3, critic=plan)
    chain = replace(chain_of(job, setup_of(job, model), model), states=2 * 2)
    name, told = stages.peak(model, chain)
    held = stages.resident(model, chain)
    assert name == largest
    assert told - sum(held.values()) + held["states of the chain"] == pytest.approx(ledger.peak, rel=0.15)


# --- what fits ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(model_folders, critic):
    """Of the tiny Wan, with nothing switched on."""
    model = read_model(model_folders["wan"])
    job = DoctorJob(method="reward_flow", resolution=32, num_frames=5, critic=CriticPlan(model=critic, questions=12))
    return model, chain_of(job, setup_of(job, model), model)


def test_switches_are_for_the_stage_with_the_peak(chain):
    """Each one lowers the peak; what fits as it is needs none; what cannot fit is told with all that helped."""
    model, plain = chain
    name, amount = stages.peak(model, plain)
    assert stages.what_fits(model, plain, 2 * amount) == ((), name, amount)
    keys, least_at, least = stages.what_fits(model, plain, 1)
    assert keys[0] == "dtype: bfloat16, bf16: true"
    assert "critic options.dtype: bfloat16" in keys
    assert least < amount
    capacity = int(least / (1 - memory.FREE)) + 1
    assert stages.what_fits(model, plain, capacity) == (keys, least_at, least)
    known = {switch.key: switch for switch in stages.SWITCHES}
    for key in keys:
        lower = known[key].on(plain)
        name, before = stages.peak(model, plain)
        assert stages.stage(model, lower, name) + sum(stages.resident(model, lower).values()) < before
        plain = lower


def test_tiles_are_for_a_video_of_several(chain):
    model, plain = chain
    switch = next(switch for switch in stages.SWITCHES if "tiles" in switch.changes)
    wide = replace(plain, setup=replace(plain.setup, width=512))
    assert stages.stage(model, switch.on(wide), stages.DECODING) < stages.stage(model, wide, stages.DECODING)
    assert stages.stage(model, switch.on(plain), stages.DECODING) == stages.stage(model, plain, stages.DECODING)


def test_switches_that_mean_nothing_are_left_out(chain):
    model, plain = chain
    bare = replace(plain, critic=None, guidance=Guidance.NONE, setup=replace(plain.setup, dtype="bfloat16", bf16=True))
    keys, *_ = stages.what_fits(model, bare, 1)
    assert not [key for key in keys if key.startswith(("critic", "dtype", "unconditional", "full"))]


def test_caches_on_the_cpu_leave_the_card(chain):
    model, plain = chain
    kept = [decoding_stage(model, plain.size, "float32", Decoding(cache_on_cpu=on)).kept for on in (False, True)]
    pixels = 5 * 3 * 32 * 32 * 4
    assert pixels <= kept[1] < kept[0]


def test_fewer_frames_need_less(chain):
    model, plain = chain
    few = replace(plain, decoding=Decoding(1))
    assert stages.stage(model, few, stages.DECODING) < stages.stage(model, plain, stages.DECODING)
    assert stages.stage(model, few, stages.CRITIC) < stages.stage(model, plain, stages.CRITIC)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_names_the_stage(model_folders, critic, capsys):
    words = ["doctor", f"--model={model_folders['unet']}", "--method=drf", "--resolution=64"]
    assert cli.main([*words, f"--critic.model={critic}", "--critic.questions=2"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "operations of a denoising step" in said
    assert "peak memory of drf, 64x64, batch 1, with the critic" in said
    rows = {line[:40].strip(): float(line.split()[-2]) for line in said.splitlines() if line.endswith(" GB")}
    assert {"critic weights", *(f"then {name}" for name in stages.STAGES)} <= rows.keys()
    assert any(name.startswith("the peak, ") for name in rows)
    assert said.count("GB GPU") == len(memory.CARDS)


def test_critics_that_are_not_there_or_of_another_kind(tmp_path, model_folders, clip_folder, capsys):
    with pytest.raises(MissingFileError, match=r"hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir FOLDER"):
        critic_numbers(CriticPlan(model=Path("Qwen/Qwen2.5-VL-7B-Instruct")))
    with pytest.raises(ConfigError, match=r"is a clip; the doctor counts Qwen2-VL and Qwen2.5-VL"):
        critic_numbers(CriticPlan(model=clip_folder))
    words = ["doctor", f"--model={model_folders['unet']}", "--method=sft", f"--critic.model={clip_folder}"]
    assert cli.main(words) == 2
    assert "critic: the method sft has none" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "millions"), [("qwen25_vl_3b", 3754.6), ("qwen25_vl_7b", 8292.2)])
def test_shipped_critics_have_the_published_size(name, millions):
    assert critic_numbers(CriticPlan(model=CRITICS / name)) / 1e6 == pytest.approx(millions, rel=0.001)

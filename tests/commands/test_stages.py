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
from alignkit.commands.doctor.dry_step import Guidance, Ledger
from alignkit.commands.doctor.main import DoctorJob, chain_of, setup_of
from alignkit.commands.doctor.model_shapes import read_model
from alignkit.errors import ConfigError, MissingFileError
from alignkit.generators.decoding import Decoding
from alignkit.records import Prompt
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
    ("family", "size"),
    [
        ("unet", (64, 64, 1)),
        ("wan", (32, 32, 9)),
        ("wan", (32, 32, 25)),  # seven latent frames, of which the doctor runs four and five
        ("cogvideox", (32, 32, 9)),
    ],
)
def test_decoding_takes_what_it_takes(load, model_folders, family, size):
    generator = load(family)
    vae = generator.pipeline.vae.requires_grad_(False)
    latents = torch.randn(1, *generator.latent_shape(*size), requires_grad=True)
    with Ledger([latents, *weights_of(vae)]) as ledger:
        pixels = generator.decode(latents, Decoding())
        kept = ledger.live
        pixels.backward(torch.ones_like(pixels))
    told = decoding_stage(read_model(model_folders[family]), size, "float32", Decoding())
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
    assert critic_numbers(plan) == sum(parameter.numel() for parameter in network.parameters()) + reward._critic._words.numel()


@pytest.mark.parametrize("guidance", list(Guidance))
def test_a_denoising_step_takes_what_it_takes(load, model_folders, guidance):
    from alignkit.generators.rollout import rollout

    generator = load("flow")
    generator.add_lora(3, None, None, 0.0)
    generator.net.train()
    parameters = [parameter for parameter in generator.net.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    cond = generator.encode_prompts(["a red circle"] * 2)
    x = torch.randn(2, *generator.latent_shape(32, 32), requires_grad=True)
    unconditional = guidance is not Guidance.CONDITIONAL
    known = [x, *weights_of(generator.net), *(p.grad for p in parameters), *cond.tensors.values(), *cond.null.values()]
    with Ledger(known) as ledger:
        steps = stages_of_one(unconditional)
        scale = 1.0 if guidance is Guidance.NONE else 2.0
        grid = generator.grid(4, x.shape[1:])[-1:]
        rollout(generator, cond, x, grid, scale=scale, steps=steps).square().mean().backward()
    model = read_model(model_folders["flow"])
    setup = setup_of(DoctorJob(method="reward_flow", resolution=32, lora_rank=3, batch=2), model)
    chain = stages.Chain(setup, 0, guidance, Decoding())
    assert stages.stage(model, chain, stages.STEP) == pytest.approx(ledger.peak, rel=0.1)


def stages_of_one(unconditional):
    from alignkit.diffusion.steps import Steps

    return Steps(frozenset({0}), 1.0, unconditional)


@pytest.mark.parametrize(("resolution", "largest"), [(32, stages.CRITIC), (64, stages.DECODING)])
def test_a_whole_step_takes_what_it_takes(load, model_folders, critic, tmp_path, resolution, largest):
    """Chain, decoding and critic of the trainer itself: the doctor knows the peak, and which stage has it."""
    from alignkit.trainers.reward_flow import RewardConfig, RewardTrainer

    keys = {"height": resolution, "width": resolution, "num_frames": 9, "sampling_steps": 3, "guidance_scale": 2.0}
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
    options = {"frames": 4, "checkpointing": largest is stages.DECODING}
    reward = YesNo(str(critic), modality="video", questions=QUESTIONS, **options)
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
    plan = CriticPlan(model=critic, questions=len(QUESTIONS), **options)
    job = DoctorJob(method="reward_flow", resolution=resolution, num_frames=9, lora_rank=3, critic=plan)
    chain = replace(chain_of(job, setup_of(job, model), model), states=2 * 2)
    name, told = stages.peak(model, chain)
    held = stages.resident(model, chain)
    assert name == largest
    assert told - sum(held.values()) + held["states of the chain"] == pytest.approx(ledger.peak, rel=0.15)

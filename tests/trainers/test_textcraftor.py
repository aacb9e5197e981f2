"""TextCraftor: gradients through a frozen denoiser to text encoders, in a window of steps; the resulting folder."""

from __future__ import annotations

import copy
from dataclasses import replace

import datasets
import pytest
import torch
from peft import LoraConfig
from red_reward import CHAIN, PROMPTS, TRAINING, Red

from alignkit.diffusion.steps import Steps
from alignkit.diffusion.tuned_steps import TunedSteps
from alignkit.errors import AdapterError, ConfigError, DataError, UnknownNameError
from alignkit.generators import load_generator
from alignkit.generators.tuned_encoders import load_tuned, save_tuned
from alignkit.records import Conditioning, texts
from alignkit.sandbox.captions import prompts
from alignkit.shipped import model_path
from alignkit.trainers.textcraftor import TextCraftorConfig, TextCraftorTrainer
from rewards.preference import PreferenceReward

COUNT = 5  # steps of a chain: the last 2 have gradients, the last 3 the tuned embedding
WINDOWS = {"sampling_steps": COUNT, "gradient_steps": "last 2", "tuned_steps": "last 3"}
SETTINGS = {
    **TRAINING,
    **CHAIN,
    **WINDOWS,
    "state_gradient_cap": None,
    "guard": None,
    "learning_rate": 1e-3,
    "self_check": False,
}


@pytest.fixture
def make(load, tmp_path):
    """A trainer on prompts, from config keys."""

    def build(family="flow", *, rewards=None, rows=PROMPTS, generator=None, **keys):
        args = TextCraftorConfig(**{**SETTINGS, "output_dir": str(tmp_path / "run"), **keys})
        return TextCraftorTrainer(generator or load(family), args, rows, rewards=rewards or {"red": Red()})

    return build


def exact(trainer):
    """The trainer in float64 with its encoders off their start, and a batch of two rows."""
    generator = trainer.generator
    frozen = generator.conditioner._frozen.values()
    for part in (generator.model, generator.conditioner, generator.pipeline.vae, *frozen):
        part.double()
    stir(trainer)
    return trainer.data_collator([trainer.train_dataset[row] for row in range(2)])


def stir(trainer, size=0.1):
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer._trainable().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=source).to(parameter))


def gradients(trainer, loss):
    found = torch.autograd.grad(loss, list(trainer._trainable().values()), allow_unused=True)
    return torch.cat([grad.flatten() for grad in found if grad is not None])


# --- the gradient ---------------------------------------------------------------------------------------------------


def derived(trainer, batch, *, active, used, null=True, kl=0.0):
    """The loss by plain tensors: no checkpoint, and of the engine nothing but the network and its times."""
    generator = trainer.generator
    conditioner, flow = generator.conditioner, generator.prediction == "flow"
    shape = generator.latent_shape(16, 16)
    grid = generator.grid(COUNT, shape).to(torch.float64)
    tuned, words = conditioner(texts(batch["prompts"])), texts(batch["prompts"])
    with torch.no_grad(), conditioner.as_reference():
        base = Conditioning(generator.encode_texts(words), generator.encode_negative(""))
    tuned = tuned if null else replace(tuned, null=base.null)

    def guided(x, index, cond):
        t = grid.t[index].expand(len(x))
        empty = generator.model(x, t, cond.unconditional())
        return empty + 2.0 * (generator.model(x, t, cond) - empty)

    sources = [torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]]
    x = torch.cat([torch.randn(1, *shape, generator=source) for source in sources]).double() * grid.start
    penalties = []
    for index in range(COUNT):
        p = guided(x, index, tuned if index in used else base)
        if index in active and kl:
            penalties.append((p - guided(x, index, base)).square().mean((1, 2, 3)))
        p = p if index in active else p.detach()
        alpha, sigma, alpha_next, sigma_next = grid.step(index)
        x = x + (sigma_next - sigma) * p if flow else alpha_next * (x - sigma * p) / alpha + sigma_next * p
    config = generator.pipeline.vae.config
    raw = x / config.scaling_factor + (config.shift_factor or 0.0)
    loss = -Red()((generator.pipeline.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1), None).total.mean()
    return loss + kl * torch.stack(penalties).mean() if kl else loss


@pytest.mark.parametrize(
    ("family", "keys", "told"),
    [
        ("unet", {}, {"used": {3, 4}}),  # in training the window of use is that of the gradients
        ("flow", {"as_sampled": True, "activation_checkpointing": True}, {"used": {2, 3, 4}}),
        ("flow", {"tuned_null": False, "full_finetune": False}, {"used": {3, 4}, "null": False}),
        ("flow", {"kl_weight": 0.7, "lora_rank": 2, "full_finetune": False}, {"used": {3, 4}, "kl": 0.7}),
    ],
)
def test_the_gradient_is_that_of_plain_autograd(make, family, keys, told):
    """Trainer puts the model in training mode before each loss; T5, frozen here, has dropout then."""
    trainer = make(family, **keys)
    batch = exact(trainer)
    for module in trainer.generator.conditioner.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    trainer.model.train()
    found = gradients(trainer, trainer.method_loss(trainer.model, batch).loss.mean())
    expected = gradients(trainer, derived(trainer, batch, active={3, 4}, **told))
    assert expected.norm() > 0
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_held_out_losses_are_those_of_images_as_they_are_sampled(make):
    trainer = make("unet")
    batch = exact(trainer)
    with torch.no_grad():
        found = trainer.method_loss(trainer.model, batch).loss.mean()
        torch.testing.assert_close(found, derived(trainer, batch, active=(), used={2, 3, 4}))


def rises(trainer, batch, rate, count):
    """Whether the reward of a fixed batch with fixed noise rises in each step of AdamW."""
    optimizer = torch.optim.AdamW(trainer._trainable().values(), lr=rate)
    rewards = []
    for _ in range(count):
        loss = trainer.method_loss(trainer.model, batch).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(-loss.item())
    return rewards == sorted(set(rewards))


def test_a_fixed_batch_rises_monotonically(make):
    """Three steps with gradients."""
    trainer = make("unet", gradient_steps="last 3")
    assert rises(trainer, exact(trainer), 1e-4, 6)


def test_a_fixed_batch_of_the_sandbox_rises_monotonically(make):
    """The same with encoders that were trained with their generator, and a trained reward."""
    trainer = make(
        rows=prompts(2, seed=3),
        generator=load_generator("sandbox:flow"),
        rewards={"careful": PreferenceReward(model_path("sandbox:careful"))},
        reward_weights={"careful": 1.0},
        encoders=["text_encoder", "text_encoder_2"],
        full_finetune=False,
        lora_rank=8,
        lora_targets=["q_proj", "v_proj", "fc1", "fc2"],
        sampling_steps=12,
        gradient_steps="last 3",
        guidance_scale=2.5,
        height=64,
        width=64,
        state_gradient_cap=1.0,
    )
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(2)])
    assert rises(trainer, batch, 5e-4, 4)


def test_the_encoders_run_once_a_step(make):
    """Forward and backward, whatever the numbers of denoising steps and rewards; the denoiser has no gradient."""
    counts = []
    for keys in ({}, {"sampling_steps": 9, "gradient_steps": "last 5", "tuned_steps": "last 6"}):
        rewards = {"red": Red()} if not keys else {"red": Red(), "more": Red(), "most": Red()}
        trainer = make("unet", rewards=rewards, reward_weights=dict.fromkeys(rewards, 1.0), max_steps=1, **keys)
        forward, backward = [], []
        encoder = trainer.generator.pipeline.text_encoder
        encoder.final_layer_norm.register_forward_hook(lambda _m, _i, out, seen=forward: seen.append(out.requires_grad))
        encoder.final_layer_norm.register_full_backward_hook(lambda *_, seen=backward: seen.append(1))
        before = {name: value.clone() for name, value in trainer.generator.net.state_dict().items()}
        trainer.train()
        counts.append((forward, len(backward)))
        assert all(parameter.grad is None for parameter in trainer.generator.model.parameters())
        assert all(torch.equal(value, before[name]) for name, value in trainer.generator.net.state_dict().items())
    assert counts[0] == counts[1]
    assert counts[0] == ([True, True], 2)  # the prompts, and the empty prompt; the frozen copy is another module


def test_the_direct_variant(make, random_png, load):
    """The reward of the clean image that one call predicts from the noised image of the row."""
    images = [{"bytes": random_png(16, 16, seed), "path": None} for seed in range(2)]
    rows = datasets.Dataset.from_dict({"prompt": PROMPTS[:2], "image": images})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    trainer = make("unet", rows=rows, variant="direct")
    batch, generator = exact(trainer), trainer.generator
    x0, noise, t = (batch[f"data.{name}"][:, 0].double() for name in ("latents", "noise", "t"))
    alpha, sigma = (value.view(-1, 1, 1, 1).double() for value in generator.noise_schedule.coefficients(t))
    x_t = alpha * x0 + sigma * noise
    batch |= {f"data.{name}": batch[f"data.{name}"].double() for name in ("latents", "noise", "t")}
    eps = generator.model(x_t, t, generator.conditioner(PROMPTS[:2]))
    expected = -Red()(generator.decode((x_t - sigma * eps) / alpha), None).total.mean()
    found = trainer.method_loss(trainer.model, batch).loss.mean()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(trainer, found), gradients(trainer, expected))
    trainer = make("unet", rows=rows, variant="direct", max_steps=1, self_check=True)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0
    with pytest.raises(DataError, match="columns prompt and image"):
        make("unet", variant="direct")


# --- what is trained, and the result --------------------------------------------------------------------------------


def encoded(generator, **options):
    with torch.no_grad():
        cond = generator.conditioner(PROMPTS, **options)
    return {**cond.tensors, **{f"null {name}": value for name, value in cond.null.items()}}


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("family", ["unet", "sdxl"])
def test_the_exported_encoders_are_those_in_memory(make, load, tmp_path, family, full):
    """SDXL has two. The original ones are kept to the last bit, and the vanilla pipeline loads the folder."""
    trainer = make(family, full_finetune=full, max_steps=1)
    trainer.train()
    stir(trainer)
    trainer.export(tmp_path / "out")
    names = sorted(folder.name for folder in (tmp_path / "out").glob("text_encoder*"))
    assert names == list(trainer.generator.conditioner.trained) == (["text_encoder"] if family == "unet" else names)
    plain, tuned, vanilla = load(family), encoded(trainer.generator), load(family)
    for name in names:
        kind = type(vanilla.pipeline.components[name])
        vanilla.pipeline.register_modules(**{name: kind.from_pretrained(tmp_path / "out" / name)})
    for name, value in encoded(vanilla).items():
        torch.testing.assert_close(value, tuned[name], rtol=1e-3, atol=1e-4)
    assert not all(torch.equal(value, tuned[name]) for name, value in encoded(plain).items())
    again = load(family, encoder=tmp_path / "out")
    for generator in (trainer.generator, again):
        kept = encoded(generator, reference=True)
        assert all(torch.equal(value, kept[name]) for name, value in encoded(plain).items())
        assert generator.conditioner.window == trainer.args.window
    assert (tmp_path / "out" / "lora" / "pytorch_lora_weights.safetensors").is_file() == (not full)
    assert "text_encoder*" in (tmp_path / "out" / "README.md").read_text()
    if not full:
        fresh = load(family, adapter=tmp_path / "out" / "lora")
        for name, value in encoded(fresh).items():
            torch.testing.assert_close(value, tuned[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "chosen"), [("flow", ["text_encoder_3"]), ("flux", None), ("wan", None), ("qwen_image", None)]
)
def test_encoders_of_other_families(make, family, chosen):
    """T5 of SD3; CLIP of FLUX; UMT5 of Wan; the language model of Qwen-Image. One step moves those that are chosen."""

    class RedClip(Red):
        modality = "video"

        def __call__(self, media, prompts):
            return super().__call__(media[:, 0], prompts)

    keys = {"rewards": {"red": RedClip()}, "num_frames": 5} if family == "wan" else {}
    trainer = make(family, encoders=chosen, max_steps=1, **keys)
    before = {name: value.clone() for name, value in trainer._trainable().items()}
    trainer.train()
    moved = {name.split(".")[1] for name, value in trainer._trainable().items() if not torch.equal(value, before[name])}
    assert moved == set(chosen or ["text_encoder"])


def test_a_training_goes_on_from_tuned_encoders(make, load, tmp_path, ranked_rows):
    """The reference stays the original; a denoiser is trained on top of them by another method."""
    from alignkit.trainers.reward_flow import RewardConfig, RewardTrainer
    from alignkit.trainers.sft import SFTConfig, SFTTrainer

    first = make("unet", max_steps=1)
    stir(first)
    first.export(tmp_path / "out")
    second = make("unet", generator=load("unet", encoder=tmp_path / "out"), max_steps=1)
    assert all(torch.equal(v, encoded(second.generator)[n]) for n, v in encoded(first.generator).items())
    original = encoded(load("unet"))
    second.train()
    kept = encoded(second.generator, reference=True)
    assert all(torch.equal(value, kept[name]) for name, value in original.items())

    keys = {**TRAINING, **CHAIN, "sampling_steps": COUNT, "gradient_steps": "last 2", "noise_samples": 1, "guard": None}
    generator = load("unet", encoder=tmp_path / "out")
    stage = RewardTrainer(
        generator, RewardConfig(output_dir=str(tmp_path / "stage"), **keys), PROMPTS, rewards={"red": Red()}
    )
    cond = stage.conditioning(stage.model, PROMPTS, Steps(), COUNT)
    held = [cond(index).tensors["encoder_hidden_states"] for index in range(COUNT)]
    tuned = encoded(first.generator)["encoder_hidden_states"]
    expected = [original["encoder_hidden_states"]] * 2 + [tuned] * 3
    assert all(torch.equal(*pair) for pair in zip(held, expected, strict=True))
    stage.train()
    assert stage.state.log_history[0]["grad_norm"] > 0
    assert not any(parameter.requires_grad for parameter in generator.conditioner.parameters())
    with pytest.raises(ConfigError, match="this method trains on single times: leave out `encoder`"):
        SFTTrainer(load("unet", encoder=tmp_path / "out"), SFTConfig(output_dir=str(tmp_path / "sft")), ranked_rows(2))


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tuned_steps": "last 0"}, "tuned steps are 'last 0'; give all, last K"),
        ({"tuned_steps": "last 0%"}, "with at least one step"),
        ({"gradient_steps": "last 0%"}, "K is from 1 to 5"),
        ({"tuned_steps": "last 9"}, "the chain has 5 steps"),
        ({"gradient_steps": "last 4"}, r"has steps \[1\], which tuned_steps 'last 3' has not"),
        ({"variant": "both"}, "variant is 'both'; use prompt or direct"),
        ({"data_weight": 1.0}, "data_weight has no use here"),
        ({"lora_dropout": 0.1}, "leave out train_text_encoder, lora_dropout and fsdp"),
        ({"encoders": ["text_encoder_9"]}, "no text encoder 'text_encoder_9'; the pipeline has"),
    ],
)
def test_bad_settings_are_named(make, keys, message):
    with pytest.raises(ConfigError, match=message):
        make(**keys)


def test_drawn_steps_are_not_compared_with_the_window(make):
    assert make("unet", gradient_steps="random 1").args.gradient.steps == "random 1"


def test_settings_that_would_be_ignored_are_refused(load, tmp_path):
    args = TextCraftorConfig(**SETTINGS, output_dir=str(tmp_path))
    options = {"rewards": {"red": Red()}, "peft_config": LoraConfig(r=2)}
    with pytest.raises(ConfigError, match="peft_config is for a denoiser's LoRA"):
        TextCraftorTrainer(load("unet"), args, PROMPTS, **options)
    with pytest.raises(ConfigError, match="save_merged is for a LoRA: after full_finetune nothing is left to merge"):
        TextCraftorConfig(**SETTINGS, output_dir=str(tmp_path), save_merged=True)


def test_half_precision_is_for_a_lora(load, make):
    with pytest.raises(ConfigError, match="full_finetune: false"):
        make(generator=load("unet", dtype=torch.bfloat16))
    trainer = make(generator=load("unet", dtype=torch.bfloat16), full_finetune=False, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_a_folder_that_does_not_fit_is_refused(make, load, tmp_path):
    trainer, folder = make("unet", max_steps=1), tmp_path / "out"
    trainer.export(folder)
    with pytest.raises(AdapterError, match="no text encoder is trained"):
        save_tuned(load("unet"), tmp_path / "other")
    stranger = load("unet")
    stranger.conditioner.encoders.pop("text_encoder")
    with pytest.raises(UnknownNameError, match="holds a text encoder 'text_encoder'; this model has"):
        load_tuned(stranger, folder)
    with pytest.raises(DataError, match="do not fit the CLIPTextModelWithProjection"):
        load_tuned(load("flow"), folder)
    wide = copy.deepcopy(load("unet").pipeline.text_encoder)
    wide.final_layer_norm = torch.nn.LayerNorm(64)
    with pytest.raises(AdapterError, match=r"CLIPTextModel: 'final_layer_norm\.bias' has another shape"):
        load("unet").conditioner.put({"text_encoder": wide}, TunedSteps())
    with pytest.raises(AdapterError, match="that one is tuned already"):
        load_tuned(load("unet", encoder=folder), folder)
    file, weights = folder / "alignkit.json", folder / "text_encoder" / "model.safetensors"
    written = file.read_text()
    file.write_text(written.replace("0.4", "0.5"))
    with pytest.raises(DataError, match=r"alignkit\.json' was changed after it was written"):
        load_tuned(load("unet"), folder)
    file.write_text(written)
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(DataError, match="is not the file that the mixture was made with"):
        load_tuned(load("unet"), folder)
    file.unlink()
    with pytest.raises(DataError, match=r"alignkit.json is missing"):
        load_tuned(load("unet"), folder)

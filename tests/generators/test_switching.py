"""Tuned text encoders in some steps: what the vanilla pipeline draws, and what the chain of training draws."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from tiny_families import FAMILIES

from alignkit.adapters.mixture import HERE, MemberRecord, Mixture, write_mixture
from alignkit.diffusion.tuned_steps import TunedSteps, fixed_steps
from alignkit.errors import AlignKitError, ConfigError
from alignkit.generators.rollout import denoise
from alignkit.generators.switching import by_step, counted_steps
from alignkit.records import Sampling

PROMPTS, SEEDS, COUNT = ["a red circle", "two blue rings on a gray background"], [3, 4], 3


def tuned_copies(generator, size=0.3):
    """Each encoder with other weights."""
    source = torch.Generator().manual_seed(0)
    copies = {name: copy.deepcopy(part) for name, part in generator.conditioner.encoders.items()}
    with torch.no_grad():
        for parameter in (parameter for part in copies.values() for parameter in part.parameters()):
            parameter.add_(size * parameter.abs().mean() * torch.randn(parameter.shape, generator=source))
    return copies


@pytest.fixture
def tuned(load):
    """A generator with tuned encoders in the steps of a window, its base alone, and a sampling."""

    def build(family, window, **changes):
        told = FAMILIES[family]
        generator = load(family)
        generator.conditioner.put(tuned_copies(generator), window)
        sampling = {"steps": COUNT, "guidance_scale": 2.0, "height": told.side, "width": told.side}
        return generator, load(family), Sampling(**{**sampling, "num_frames": told.frames or 1, **changes})

    return build


def test_windows_are_derived_from_the_length_of_the_chain():
    """The paper's 15 of 25, and the same share of other chains."""
    of = TunedSteps.of
    assert of("last 60%", 25).on(25) == range(10, 25)
    assert of("last 15", 25) == of("last 60%", 25)
    assert of("last 15", 25).on(50) == range(20, 50)
    assert of("last 60%", 25).on(10) == range(4, 10)
    assert of("window 2-4", 8).on(8) == range(2, 5)
    assert of("first 1", 8).on(8) == range(1)
    assert of("all", 3) == TunedSteps()
    for count in range(1, 60):  # shares lose no step of the chain that they come from
        assert all(len(of(f"last {steps}", count).on(count)) == steps for steps in range(1, count + 1))
    for drawn in ("random 2", "even 2", "last 1-3", "last 1-100%"):
        assert fixed_steps(drawn, 8) is None
        with pytest.raises(ConfigError, match=f"tuned steps are '{drawn}'; give all"):
            of(drawn, 8)
    with pytest.raises(ConfigError, match=r"window \[0, 0.125\) holds none of the 2 steps"):
        of("first 1", 8).on(2)


@pytest.mark.parametrize(
    ("bounds", "count", "expected"),
    [
        ((0.4, 1.0), 25, range(10, 25)),
        ((10, 25), 25, range(10, 25)),
        ((10, 25), 20, range(10, 20)),
        ((0, 2), 4, range(2)),
        (None, 4, range(4)),
    ],
)
def test_windows_of_bounds(bounds, count, expected):
    window = TunedSteps.between(bounds)
    assert window.on(count) == expected
    assert TunedSteps.between(window.bounds) == window


@pytest.mark.parametrize("bounds", [(0.5, 0.5), (0.5,), (-1, 2), (float("nan"), 1), (0, float("inf")), (1.5, 3)])
def test_windows_that_are_none(bounds):
    with pytest.raises(AlignKitError, match="window is"):
        TunedSteps.between(bounds)


def drawn(generator, sampling):
    """Pixels by a chain of our own, with another conditioning in the steps of the window."""
    with torch.no_grad():
        cond = by_step(generator.conditioner, PROMPTS, COUNT, generator.device)
        return generator.decode(denoise(generator, cond, SEEDS, sampling))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pipeline_draws_what_the_chain_of_training_draws(tuned, family):
    """Every family, two prompts of other lengths; guidance as one call of both halves, two calls, embedded, off."""
    generator, base, sampling = tuned(family, TunedSteps.of("last 2", COUNT))
    for scale in sorted({3.0, FAMILIES[family].guidance}):
        told = replace(sampling, guidance_scale=scale)
        found = generator.generate(PROMPTS, SEEDS, told)
        torch.testing.assert_close(found, drawn(generator, told), rtol=1e-3, atol=1e-4)
    plain = base.generate(PROMPTS, SEEDS, told)
    assert (found - plain).abs().max() > 1e-3
    with generator.reference():
        assert torch.equal(generator.generate(PROMPTS, SEEDS, told), plain)


@pytest.mark.parametrize("family", ["unet", "flow", "wan", "qwen_image", "z_image"])
def test_the_null_condition_stays_the_bases(tuned, family):
    """Where prompts and null condition are one tensor, two, or a list."""
    generator, _, sampling = tuned(family, TunedSteps.of("last 2", COUNT, null=False), guidance_scale=3.0)
    found = generator.generate(PROMPTS, SEEDS, sampling)
    torch.testing.assert_close(found, drawn(generator, sampling), rtol=1e-3, atol=1e-4)
    generator.conditioner.window = replace(generator.conditioner.window, null=True)
    assert (generator.generate(PROMPTS, SEEDS, sampling) - found).abs().max() > 1e-3


def test_a_null_condition_that_cannot_be_told_from_prompts_is_refused(tuned):
    generator, _, sampling = tuned("dreamlite", TunedSteps.of("last 2", COUNT, null=False))
    with pytest.raises(ConfigError, match="pads prompts and the null condition to one length"):
        generator.generate(PROMPTS, SEEDS, sampling)


def test_text_inputs_that_change_during_the_chain_are_refused(tuned, monkeypatch):
    generator, _, sampling = tuned("unet", TunedSteps.of("last 1", COUNT))

    def change(_pipe, step, _time, tensors):
        return {"prompt_embeds": 1.1 * tensors["prompt_embeds"]} if step == 1 else {}

    given = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    monkeypatch.setattr(generator, "sampling_arguments", lambda: given)
    with pytest.raises(ConfigError, match=r"changes its text inputs during the chain \(in step 2\)"):
        generator.generate(PROMPTS, SEEDS, sampling)
    generator.conditioner.window = TunedSteps()
    assert len(generator.generate(PROMPTS, SEEDS, sampling)) == 2


def test_steps_are_counted_for_each_chain_and_one_count_stands_within_another(load):
    generator, ends = load("dreamlite"), []
    told = Sampling(steps=COUNT, guidance_scale=1.0, height=16, width=16)
    pipe = generator.pipeline
    with (
        counted_steps(pipe) as outer,
        counted_steps(pipe, lambda: ends.append((inner.index, outer.index, outer.total))) as inner,
    ):
        generator.generate(PROMPTS, SEEDS, told)
    assert ends == 2 * [(step, step, COUNT) for step in range(COUNT)]
    assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))


@pytest.mark.parametrize(
    ("solver", "indices"), [(HeunDiscreteScheduler, [0, 0, 1, 1, 2, 2, 3]), (PNDMScheduler, [0, 0, 1, 2, 3])]
)
def test_a_step_may_be_several_calls_of_the_network(tuned, solver, indices):
    """The last two of four steps, in numbers and in shares."""
    generator, _, sampling = tuned("unet", TunedSteps.between((2, 4)), steps=4)
    pipe = generator.pipeline
    pipe.scheduler = solver.from_config(pipe.scheduler.config, skip_prk_steps=True)
    seen = []
    with counted_steps(pipe, lambda: seen.append((clock.index, clock.total))) as clock:
        found = generator.generate(PROMPTS, SEEDS, sampling)
    assert seen[-len(indices) :] == [(index, 4) for index in indices]
    generator.conditioner.window = TunedSteps(0.5, 1.0)
    assert torch.equal(generator.generate(PROMPTS, SEEDS, sampling), found)


def test_a_window_of_all_steps_is_the_tuned_encoder_alone(tuned, load):
    generator, _, sampling = tuned("unet", TunedSteps(0.0, 1.0))
    plain = load("unet")
    plain.pipeline.register_modules(**dict(generator.conditioner.encoders))
    found = generator.generate(PROMPTS, SEEDS, sampling)
    torch.testing.assert_close(found, plain.generate(PROMPTS, SEEDS, sampling), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "window", [TunedSteps.between((1, 2)), TunedSteps(0.4, 1.0), TunedSteps(0.0, 0.4), TunedSteps(null=False)], ids=str
)
@pytest.mark.parametrize(("family", "guidance"), [("unet", 2.0), ("unet", 1.0), ("sdxl", 2.0)])
def test_a_window_in_a_plain_pipeline(tuned, tmp_path, family, guidance, window):
    """With the functions of docs/mixing.md, which read window and null from the record."""
    page = (Path(__file__).parents[2] / "docs" / "mixing.md").read_text(encoding="utf-8")
    code = next(block for block in page.split("```python\n") if "def tuned_steps" in block)
    pasted: dict[str, object] = {}
    exec(code.partition("```")[0], pasted)
    generator, base, sampling = tuned(family, window, guidance_scale=guidance)
    for name, encoder in generator.conditioner.encoders.items():
        encoder.save_pretrained(tmp_path / name)
    member = MemberRecord(name="tuned", place=HERE)
    record = Mixture(space="embedding", base=family, members=(member,), weights=(1.0,), window=window)
    write_mixture(tmp_path, record)
    sources = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    size = {"height": sampling.height, "width": sampling.width}
    told = pasted["tuned_steps"](base.pipeline, tmp_path, PROMPTS, COUNT, guided=guidance > 1)
    expected = base.pipeline(generator=sources, guidance_scale=guidance, output_type="pt", **size, **told)[0]
    found = generator.generate(PROMPTS, SEEDS, sampling)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found, base.generate(PROMPTS, SEEDS, sampling))

"""Tuned text encoders in some steps: what the vanilla pipeline draws, and what the chain of training draws."""

from __future__ import annotations

import copy

import pytest
import torch

from alignkit.diffusion.tuned_steps import TunedSteps, fixed_steps
from alignkit.errors import ConfigError
from alignkit.generators.rollout import rollout
from alignkit.generators.switching import by_step
from alignkit.records import Sampling

PROMPTS, SEEDS, COUNT = ["a red circle", "two blue rings"], [3, 4], 5


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
        import tiny_families

        told = tiny_families.FAMILIES[family]
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
    with pytest.raises(ConfigError, match="are none of 2 steps"):
        of("first 1", 8).on(2)
    with pytest.raises(ConfigError, match="0 <= start < stop <= 1"):
        TunedSteps(0.4, 0.4)


@pytest.mark.parametrize(
    ("family", "null"),
    [
        *(("unet", True), ("unet", False), ("sdxl", True), ("flow", False), ("flux", True)),
        *(("wan", True), ("wan", False), ("sana", True), ("qwen_image", False)),
    ],
)
def test_the_pipeline_draws_what_the_chain_of_training_draws(tuned, family, null):
    """CLIP, two CLIPs, T5, UMT5, Gemma and Qwen; guidance as one call of both halves, as two calls, and embedded."""
    generator, base, sampling = tuned(family, TunedSteps.of("last 3", COUNT, null=null))
    shape = generator.latent_shape(sampling.height, sampling.width, *([sampling.num_frames] if family == "wan" else []))
    grid = generator.grid(COUNT, shape)
    noise = torch.cat([generator.initial_noise(shape, torch.Generator().manual_seed(seed)) for seed in SEEDS])
    with torch.no_grad():
        cond = by_step(generator.conditioner, PROMPTS, COUNT, generator.device)
        expected = rollout(generator, cond, noise * grid.start, grid, scale=2.0)
        expected = generator.decode(expected)
    found = generator.generate(PROMPTS, SEEDS, sampling)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    plain = base.generate(PROMPTS, SEEDS, sampling)
    assert (found - plain).abs().max() > 1e-3
    with generator.reference():
        assert torch.equal(generator.generate(PROMPTS, SEEDS, sampling), plain)


def test_a_window_of_all_steps_is_the_tuned_encoder_alone(tuned, load):
    generator, _, sampling = tuned("unet", TunedSteps(0.0, 1.0))
    plain = load("unet")
    plain.pipeline.register_modules(**dict(generator.conditioner.encoders))
    found = generator.generate(PROMPTS, SEEDS, sampling)
    torch.testing.assert_close(found, plain.generate(PROMPTS, SEEDS, sampling), rtol=0, atol=1e-6)


def test_embeddings_switched_by_hand_in_a_plain_pipeline(tuned):
    """With the callback of docs/textcraftor.md."""
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "textcraftor.md").read_text(encoding="utf-8")
    code = next(block for block in page.split("```python\n") if block.startswith("def tuned_from"))
    names: dict[str, object] = {"torch": torch}
    exec(code.partition("```")[0], names)
    for family, guidance in (("unet", 2.0), ("unet", 1.0), ("sdxl", 2.0)):
        generator, base, sampling = tuned(family, TunedSteps.of("last 3", COUNT), guidance_scale=guidance)
        pipe = base.pipeline
        switch = names["tuned_from"](pipe, dict(generator.conditioner.encoders), PROMPTS, 2, guidance > 1)
        size = {"height": sampling.height, "width": sampling.width, "num_inference_steps": COUNT}
        sources = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        expected = pipe(PROMPTS, generator=sources, guidance_scale=guidance, output_type="pt", **size, **switch)[0]
        found = generator.generate(PROMPTS, SEEDS, sampling)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

"""What a generator refuses to sample with, before it generates."""

from __future__ import annotations

import pytest

from alignkit.errors import ConfigError
from alignkit.records import Sampling

GOOD = {"steps": 1, "height": 16, "width": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": {"eat": 0.5}}, "'eat' is no keyword of a StableDiffusionPipeline.*Did you mean 'eta'"),
        ({"extra": {"generator": 1}}, "'generator' is no keyword"),
        ({"height": 21}, "height is 21; .* takes multiples of 2: 20 or 22"),
        ({"width": 1}, "width is 1; .* takes multiples of 2: 2"),
    ],
)
def test_what_the_pipeline_does_not_take_is_refused(load, changes, message):
    with pytest.raises(ConfigError, match=message):
        load("unet").generate(["a red circle"], [1], Sampling(**{**GOOD, **changes}))


def test_keywords_of_the_pipeline_pass(load):
    generator = load("unet")
    plain, eta = (
        generator.generate(["a red circle"], [1], Sampling(**GOOD, extra=extra)) for extra in ({}, {"eta": 0.0})
    )
    assert plain.equal(eta)

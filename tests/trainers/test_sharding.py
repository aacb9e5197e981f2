"""Layouts of weights over processes: which are known, and what FSDP2 may not do to a call."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy

from alignkit.errors import ConfigError
from alignkit.trainers.sharding import settle_layout


@pytest.mark.parametrize(
    ("kind", "fsdp_version", "zero_stage", "message"),
    [
        (DistributedType.MULTI_CPU, None, None, "this is MULTI_CPU"),
        (DistributedType.FSDP, 1, None, "version to 2"),
        (DistributedType.DEEPSPEED, None, 3, "ZeRO 3 is not supported"),
    ],
)
def test_layouts_that_would_be_ignored_or_saved_wrongly_are_refused(kind, fsdp_version, zero_stage, message):
    deepspeed = zero_stage and SimpleNamespace(zero_stage=zero_stage)
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=fsdp_version), deepspeed_plugin=deepspeed)
    with pytest.raises(ConfigError, match=message):
        settle_layout(SimpleNamespace(distributed_type=kind, state=state), asked=zero_stage is None)


def test_fsdp_rounds_no_input():
    """Its own default casts all that a module is called with to bf16: times too, and 0.9985 is 1.0 there."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    assert policy.cast_forward_inputs
    plugin = SimpleNamespace(fsdp_version=2, mixed_precision_policy=policy)
    state = SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=None)
    settle_layout(SimpleNamespace(distributed_type=DistributedType.FSDP, state=state), asked=True)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, None, False)

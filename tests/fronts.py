"""Points of a frontier whose gains are given, for tests."""

from __future__ import annotations

import numpy as np

from alignkit.evaluation.frontier import Point
from alignkit.evaluation.ladder import ArmResult
from alignkit.evaluation.results import Evaluation
from alignkit.evaluation.statistics import Bootstrap, combine_runs
from alignkit.records import Sampling

REWARDS = ("sharp", "warm")
NAMES = (*REWARDS, "deep")
EVALUATION = Evaluation("base", "tuned", Sampling(), 3, 2, 0, 0.95, ())


def point(space, weights, *runs, name=None):
    """A point whose gains in run r are the two or three numbers `runs[r]` for every prompt and seed."""
    named = enumerate(NAMES[: len(runs[0])])
    gains = {reward: np.array([np.full((3, 2), run[axis]) for run in runs]) for axis, reward in named}
    rewards = {reward: combine_runs(gain, Bootstrap(50)) for reward, gain in gains.items()}
    label = name or "-".join(map(str, weights))
    result = ArmResult(label, EVALUATION, rewards, {}, tuple(range(len(runs))), gains)
    return Point(space, tuple(map(float, weights)), result)

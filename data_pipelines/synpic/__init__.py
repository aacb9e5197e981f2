"""Syn-Pic (arXiv 2410.18013, section 3.2): prompts -> candidates -> scores -> rankings, each stage resumable.

    generate_candidates     several generators x seeds per prompt (generate.py)
    score_candidates        raw scores of every reward (score.py)
    generate_and_score      both, scoring each finished part while the next one is generated
    rank_candidates         win rates, filters, split, dataset card (rank.py)

Importing this package loads no torch.
"""

from data_pipelines.synpic.generate import GenerateConfig, SourceConfig, generate_and_score, generate_candidates
from data_pipelines.synpic.rank import RankConfig, rank_candidates
from data_pipelines.synpic.score import ScoreConfig, score_candidates

__all__ = [
    "GenerateConfig",
    "RankConfig",
    "ScoreConfig",
    "SourceConfig",
    "generate_and_score",
    "generate_candidates",
    "rank_candidates",
    "score_candidates",
]

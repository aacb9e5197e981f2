"""Real videos with captions -> pairs of clips in the dense format -> labels of their segments: two resumable stages.

    read_clips      a folder or dataset of captioned videos; what cannot be used is listed (clips.py)
    make_pairs      decoded ahead, made by a generator, stored as latents; one row a pair (pairs.py)
    rebuild_pair    one pair again, from its row and its video alone
    label_pairs     votes of labellers on every segment, and a dataset with labels (label.py, votes.py)

The generator comes in as a builder of an `alignkit.pairs.PairMaker`, a labeller as one of an `alignkit.pairs.Labeller`.
Importing this package loads no torch.
"""

from data_pipelines.dense.clips import Clip, Clips, made_clips, read_clips
from data_pipelines.dense.config import PairsConfig
from data_pipelines.dense.label import LabelConfig, label_pairs
from data_pipelines.dense.pairs import make_pairs, rebuild_pair

__all__ = [
    "Clip",
    "Clips",
    "LabelConfig",
    "PairsConfig",
    "label_pairs",
    "made_clips",
    "make_pairs",
    "read_clips",
    "rebuild_pair",
]

"""What a ranked dataset is like: generator bias, agreement of rewards, ties, the spread of phi.

Plain JSON-able dicts for the report and the dataset card. Shape letters: R rewards, P prompts, K candidates,
G generators. Not here: anything about a trained model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignkit.storage import read_table
from data_pipelines.ranking import concordance

CHUNK = 4096  # prompts at a time: [R, R, P, K, K] would not stay small
BINS = 10


def load_columns(paths: Sequence[Path]) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[str]]:
    """(scores {reward: [P, K]}, phi [P, K], generators [P, K] as indices, generator names) without the images."""
    codes: dict[str, int] = {}
    scores: dict[str, list[np.ndarray]] = {}
    phi, generators = [], []
    for path in paths:
        table = read_table(path, columns=["scores", "phi", "generators"])
        column = table["scores"].combine_chunks()
        for field in column.type:
            scores.setdefault(field.name, []).append(np.array(column.field(field.name).to_pylist()))
        phi.append(np.array(table["phi"].to_pylist()))
        names = table["generators"].to_pylist()
        generators.append(np.array([[codes.setdefault(name, len(codes)) for name in row] for row in names]))
    joined = {reward: np.concatenate(values) for reward, values in scores.items()}
    return joined, np.concatenate(phi), np.concatenate(generators), list(codes)


def describe(
    scores: Mapping[str, np.ndarray], phi_PK: np.ndarray, generators_PK: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    """All statistics of P ranked rows (arguments as `load_columns` returns them), without a NaN in them."""
    counts, edges = np.histogram(phi_PK, bins=BINS, range=(0.0, 1.0))
    return {
        "rows": len(phi_PK),
        "candidates": phi_PK.shape[1],
        "rewards": {name: _reward(values_PK) for name, values_PK in scores.items()},
        "agreement": agreement_matrix(scores),
        "phi_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "mean_margin": float((phi_PK.max(axis=1) - phi_PK.min(axis=1)).mean()),
        "generator_bias": generator_bias(phi_PK, generators_PK, names),
    }


def _reward(values_PK: np.ndarray) -> dict[str, float]:
    first, second = _pairs(values_PK)
    within = values_PK.std(axis=1).mean()
    moments = {"mean": values_PK.mean(), "std": values_PK.std(), "within_prompt_std": within}
    return {**{key: float(value) for key, value in moments.items()}, "tied_pairs": float((first == second).mean())}


def agreement_matrix(scores: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Mean concordance in [0, 1] of every two rewards over all prompts; 0.5 is chance (see `ranking.concordance`).

    A reward agrees with itself by less than 1 where it ties: each tied pair costs one half.
    """
    import torch

    stacked = torch.from_numpy(np.stack(list(scores.values())))
    sums = [concordance(chunk).sum(dim=-1) for chunk in torch.split(stacked, CHUNK, dim=1)]
    matrix = (torch.stack(sums).sum(dim=0) / stacked.shape[1]).tolist()
    return {a: dict(zip(scores, row, strict=True)) for a, row in zip(scores, matrix, strict=True)}


def generator_bias(phi_PK: np.ndarray, generators_PK: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """How well the generator's name alone predicts the rank: the fingerprint shortcut a preference loss could learn.

    Every pair of candidates of different generators with different phi is predicted by comparing the two generators'
    mean phi over the other half of the prompts (every second row). `pair_accuracy` is the share predicted right (an
    undecided prediction counts one half; 0.5 is no shortcut, 1 means the images need not be looked at), None without
    such pairs. (Leaving out one prompt only would count fair generators as wrong wherever a near tie turns.)
    `variance_explained` is the share of phi's variance between generators (eta squared), None where phi is constant.
    """
    half_P = np.arange(len(phi_PK)) % 2
    means_2G = np.stack([_means(phi_PK[half_P == half], generators_PK[half_P == half], len(names)) for half in (1, 0)])
    expected_PK = means_2G[half_P[:, None], generators_PK]
    gap, expected_gap = _gaps(phi_PK), _gaps(expected_PK)
    first, second = _pairs(generators_PK)
    known = (first != second) & (np.abs(gap) > 0) & np.isfinite(expected_gap)
    right = 0.5 + 0.5 * np.sign(gap[known]) * np.sign(np.round(expected_gap[known], 12))
    return {
        "pairs": int(known.sum()),
        "pair_accuracy": float(right.mean()) if len(right) else None,
        "variance_explained": _eta_squared(phi_PK, _means(phi_PK, generators_PK, len(names))[generators_PK]),
        "generators": _generators(phi_PK, generators_PK, names),
    }


def _means(phi_PK: np.ndarray, generators_PK: np.ndarray, count: int) -> np.ndarray:
    """Mean phi of every generator, [G]; NaN for one without a candidate."""
    sums_G = np.bincount(generators_PK.ravel(), weights=phi_PK.ravel(), minlength=count)
    counts_G = np.bincount(generators_PK.ravel(), minlength=count)
    return np.where(counts_G > 0, sums_G / np.maximum(counts_G, 1), np.nan)


def _pairs(values_PK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both members of every candidate pair i < j, [P, K (K - 1) / 2] each."""
    i, j = np.triu_indices(values_PK.shape[1], k=1)
    return values_PK[:, i], values_PK[:, j]


def _gaps(values_PK: np.ndarray) -> np.ndarray:
    first, second = _pairs(values_PK)
    gaps: np.ndarray = first - second
    return gaps


def _eta_squared(phi_PK: np.ndarray, mean_PK: np.ndarray) -> float | None:
    total = ((phi_PK - phi_PK.mean()) ** 2).sum()
    return float(((mean_PK - phi_PK.mean()) ** 2).sum() / total) if total > 0 else None


def _generators(phi_PK: np.ndarray, generators_PK: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Pictures, mean phi, and the share of its decided pairs each generator won."""
    gap = _gaps(phi_PK)
    first, second = _pairs(generators_PK)
    described = {}
    for code, name in enumerate(names):
        wins = int((gap[first == code] > 0).sum() + (gap[second == code] < 0).sum())
        losses = int((gap[first == code] < 0).sum() + (gap[second == code] > 0).sum())
        mine = phi_PK[generators_PK == code]
        share = wins / (wins + losses) if wins + losses else None
        described[name] = {"pictures": len(mine), "mean_phi": float(mine.mean()), "win_share": share}
    return described

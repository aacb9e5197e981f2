"""The generator-bias probe and the other statistics on tables small enough to count by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data_pipelines.synpic.pixel_statistics import agreement_matrix, describe, generator_bias


def test_a_generator_that_always_wins_is_fully_predictable() -> None:
    phi = np.array([[1.0, 0.0]] * 5)
    bias = generator_bias(phi, np.array([[0, 1]] * 5), ["good", "bad"])
    assert (bias["pairs"], bias["pair_accuracy"], bias["variance_explained"]) == (5, 1.0, 1.0)
    assert bias["generators"]["good"] == {"pictures": 5, "mean_phi": 1.0, "win_share": 1.0}
    assert bias["generators"]["bad"]["win_share"] == 0.0


def test_each_half_is_predicted_from_the_other() -> None:
    # "a" wins in every even row and "b" in every odd one, so every prediction from the other half is wrong.
    phi = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    bias = generator_bias(phi, np.array([[0, 1]] * 4), ["a", "b"])
    assert bias["pair_accuracy"] == 0.0
    assert bias["variance_explained"] == 0.0


def test_names_of_fair_generators_predict_nothing() -> None:
    rng = np.random.default_rng(0)
    phi = rng.permuted(np.tile([0.0, 0.4, 0.6, 1.0], (2000, 1)), axis=1)
    bias = generator_bias(phi, np.tile([0, 1, 2, 3], (2000, 1)), list("abcd"))
    assert bias["pair_accuracy"] == pytest.approx(0.5, abs=0.03)  # about 5 standard deviations
    assert bias["variance_explained"] == pytest.approx(0.0, abs=0.01)


def test_one_generator_gives_no_pairs() -> None:
    bias = generator_bias(np.array([[1.0, 0.0]]), np.array([[0, 0]]), ["only"])
    assert (bias["pairs"], bias["pair_accuracy"]) == (0, None)


def test_one_prompt_predicts_nothing_without_nan() -> None:
    bias = generator_bias(np.array([[1.0, 0.0]]), np.array([[0, 1]]), ["a", "b"])
    assert (bias["pairs"], bias["pair_accuracy"]) == (0, None)


def test_agreement_matrix_by_hand() -> None:
    scores = {"a": np.array([[1.0, 2.0], [1.0, 2.0]]), "b": np.array([[1.0, 2.0], [2.0, 1.0]])}
    assert agreement_matrix(scores) == {"a": {"a": 1.0, "b": 0.5}, "b": {"a": 0.5, "b": 1.0}}


def test_description_is_plain_json_even_where_all_is_constant() -> None:
    scores = {"a": np.array([[1.0, 1.0, 2.0]]), "b": np.zeros((1, 3))}
    told = describe(scores, np.full((1, 3), 0.5), np.array([[0, 0, 1]]), ["x", "y"])
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["rewards"]["a"]["tied_pairs"] == pytest.approx(1 / 3)
    assert told["rewards"]["b"]["tied_pairs"] == 1.0
    assert sum(told["phi_histogram"]["counts"]) == 3
    assert told["generator_bias"]["variance_explained"] is None

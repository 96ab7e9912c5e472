"""Factored second moments are those of materialised gradients; what is stored acts as Adam's metric would."""

from __future__ import annotations

import pytest
import torch

from stages.gradients.batching import TokenBudget
from stages.gradients.layers import select_layers
from stages.gradients.preconditioner import FLOOR, second_moments
from tests.stages.gradients.oracles import exact_pair_gradient


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rows_and_columns_are_means_of_squared_gradients(architecture, make_model, make_pairs) -> None:
    """Rank-16 sketches of 40 pairs: median error of a row's or column's mean square below 10%, and no bias."""
    model, pairs = make_model(architecture), make_pairs(40, seed=4)
    layers = select_layers(model).layers
    moments, used = second_moments(model, layers, pairs, TokenBudget(512), seed=1)
    assert used == 40
    exact = [exact_pair_gradient(model, pair, layers) for pair in pairs]
    errors = []
    for layer in layers:
        square_OI = torch.stack([one[layer.name].double().square() for one in exact]).mean(dim=0)
        rows_O, columns_I = square_OI.mean(dim=1), square_OI.mean(dim=0)
        want_OI = rows_O[:, None] * columns_I / square_OI.mean()
        got_OI = moments[layer.name][0][:, None] * moments[layer.name][1]
        errors.append((got_OI / want_OI).log().flatten())
    errors_M = torch.cat(errors)
    assert float(errors_M.abs().median()) < 0.1
    assert abs(float(errors_M.mean())) < 0.05


def test_a_weight_no_pair_moves_is_not_blown_up(make_model, make_pairs) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 5] = 0  # nothing flows back into unit 5 of up_proj
    layers = select_layers(model, include=["model.layers.0.mlp.up_proj"]).layers
    moments, _ = second_moments(model, layers, make_pairs(6, seed=2), TokenBudget(512), seed=0)
    rows_O = moments["model.layers.0.mlp.up_proj"][0]
    assert torch.isfinite(rows_O).all() and float(rows_O[5] / rows_O.mean()) == pytest.approx(FLOOR, rel=0.01)


def test_a_sample_without_finite_gradients_is_refused(make_model, make_pairs) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="no pair of the preconditioner's sample gives a finite gradient"):
        second_moments(model, select_layers(model).layers, make_pairs(2), TokenBudget(512), seed=0)

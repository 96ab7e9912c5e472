"""Exact pair gradients equal a finite difference of the model's own log-probabilities, along the gradient."""

from __future__ import annotations

import pytest
import torch

from stages.gradients.layers import select_layers
from tests.stages.gradients.oracles import exact_pair_gradient, flatten


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma2"])
def test_directional_derivative(architecture, make_model, make_pairs, oracle_values) -> None:
    model = make_model(architecture, dtype=torch.float64).eval()
    (pair,) = make_pairs(1, seed=6)
    layers = select_layers(model).layers
    gradients = exact_pair_gradient(model, pair, layers)
    assert flatten(gradients).shape == (sum(s.out_width * s.in_width for s in layers),)
    length = float(flatten(gradients).norm())

    def value(size: float) -> float:
        with torch.no_grad():
            for name, gradient in gradients.items():
                layer = model.get_submodule(name)
                layer.weight += size / length * (gradient.T if type(layer).__name__ == "Conv1D" else gradient)
            return float(
                oracle_values(model, pair.prompt, pair.chosen).sum()
                - oracle_values(model, pair.prompt, pair.rejected).sum()
            )

    size = 1e-3  # norms and rotary embeddings are float32 inside, so the step must stand above their rounding
    up, down = value(size), value(-2 * size)
    assert (up - down) / (2 * size) == pytest.approx(length, rel=1e-3)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())

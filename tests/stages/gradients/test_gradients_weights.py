"""The weights of pairs and of their sides under every loss, against the derivative of its formula taken numerically."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from schemas.config.loss import LossConfig
from stages.gradients.weights import pair_weights
from tests.stages.pair_losses import LOSSES, settings_of

N_W, N_L = torch.tensor([3, 5, 2, 7, 1]), torch.tensor([4, 1, 2, 9, 6])


def settings(name: str, **more: float) -> LossConfig:
    return LossConfig.model_validate({**settings_of(name, 0.3), **more})


def slopes(value: Callable[[Tensor, Tensor], Tensor], x_w: Tensor, x_l: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(p_w, p_l) of a loss by central differences."""
    h = 1e-6
    up = -(value(x_w + h, x_l) - value(x_w - h, x_l)) / (2 * h * beta)
    return up, (value(x_w, x_l + h) - value(x_w, x_l - h)) / (2 * h * beta)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_pair_and_side_weights_are_the_slopes_of_the_loss(name: str, fresh_seed: int) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    x_w, x_l = (6 * torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = settings(name)
    got = pair_weights(loss, x_w, x_l, N_W, N_L)
    sides = torch.ones(5, 2, dtype=torch.float64) if got.sides_N2 is None else got.sides_N2
    want = slopes(lambda w, r: LOSSES[name](w, r, N_W, N_L, 0.3), x_w, x_l, 0.3)
    for side in range(2):
        torch.testing.assert_close(got.weight_N * sides[:, side], want[side], rtol=1e-5, atol=1e-6)
    assert (got.sides_N2 is not None) == loss.weights_sides_apart(at_reference=False)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_at_the_reference_only_losses_that_say_so_weigh_sides_apart(name: str) -> None:
    zero, loss = torch.zeros(5), settings(name)
    got = pair_weights(loss, zero, zero, N_W, N_L)
    assert (got.sides_N2 is not None) == loss.weights_sides_apart(at_reference=True)
    assert bool((got.weight_N > 0).all()), "every pair is pushed at the start"


def test_the_length_penalty_pushes_a_longer_winner_less() -> None:
    x, n_w, n_l = torch.tensor([0.0, 2.0, -2.0, 0.0]), torch.tensor([10, 10, 10, 30]), torch.tensor([10, 10, 10, 10])
    got = pair_weights(LossConfig(beta=0.5, alpha=0.01), x, torch.zeros(4), n_w, n_l).weight_N
    assert got.tolist() == pytest.approx([1 / (1 + math.exp(z)) for z in (0.0, 1.0, -1.0, 0.2)], rel=1e-12)
    assert float(got[3]) < float(got[0])


def test_log_probabilities_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(ValueError, match="not finite"):
        pair_weights(LossConfig(), torch.tensor([float("nan")]), torch.zeros(1), N_W[:1], N_L[:1])

"""How hard the run's loss pushes each pair: c_i, and the weights of its two sides. docs/methods.md sections 2 and 4.

With x_w = s(y_w) - s_ref(y_w) and x_l alike (their means over tokens for `ipo`, `sigmoid_norm` and `simpo`, which has no s_ref), a loss pushes x_w up by
p_w = -(1/beta) dL/dx_w and x_l down by p_l = (1/beta) dL/dx_l. Where it is a function of x_w - x_l both are the same number c and
-grad L = beta c (grad s_w - grad s_l): the stored difference is enough. Each formula is the derivative of the one that TRL 1.16
computes under the same name (tests/stages/train/test_train_losses.py holds them against TRL's gradients).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from schemas.config.loss import LossConfig


class PairWeights(NamedTuple):
    """g_i = weight_N[i] * (sides_N2[i, 0] grad s_w - sides_N2[i, 1] grad s_l), float64; sides_N2 None: both are 1.

    weight_N is p_w = p_l where they agree (it may be negative: a margin that is too large is pushed back), else the mean of
    |p_w| and |p_l|: **ours**, what a pair of unit norm is multiplied by.
    """

    weight_N: Tensor
    sides_N2: Tensor | None


def pair_weights(
    loss: LossConfig, chosen_N: Tensor, rejected_N: Tensor, n_chosen_N: Tensor, n_rejected_N: Tensor
) -> PairWeights:
    """Weights of N pairs under `loss`.

    chosen_N, rejected_N: s - s_ref of both sides, s where `loss.reference_free`; n_*: completion tokens, end of turn included.
    alpha > 0: a longer winner has margin for free, so a smaller push. nll > 0: chosen is pushed up by nll / (beta |y_w|) more.
    Raises ValueError for entries that are not finite.
    """
    chosen_N, rejected_N, n_chosen_N, n_rejected_N = (
        x.to(torch.float64) for x in (chosen_N, rejected_N, n_chosen_N, n_rejected_N)
    )
    if not bool(torch.isfinite(chosen_N - rejected_N).all()):
        raise ValueError("log-probabilities of a pair are not finite")
    weights = _of_preference(loss, chosen_N, rejected_N, n_chosen_N, n_rejected_N)
    return _with_likelihood(weights, loss.nll / (loss.beta * n_chosen_N)) if loss.nll else weights


def _of_preference(
    loss: LossConfig, chosen_N: Tensor, rejected_N: Tensor, n_chosen_N: Tensor, n_rejected_N: Tensor
) -> PairWeights:
    """Weights under the loss without its likelihood term."""
    if loss.type in ("ipo", "sigmoid_norm", "simpo"):
        h_N = chosen_N / n_chosen_N - rejected_N / n_rejected_N
        c_N = torch.sigmoid(loss.target - loss.beta * h_N)
        if loss.type == "ipo":
            c_N = 2.0 * (0.5 / loss.beta - h_N) / loss.beta
        return PairWeights(c_N, torch.stack([1.0 / n_chosen_N, 1.0 / n_rejected_N], dim=1))
    if loss.type in ("sigmoid", "hinge", "robust", "exo_pair", "discopop"):
        z_N = loss.beta * (chosen_N - rejected_N) + loss.alpha * (n_chosen_N - n_rejected_N)
        return PairWeights(_of_margin(loss, z_N), None)
    up_N, down_N = _of_sides(loss, loss.beta * chosen_N, loss.beta * rejected_N)
    return PairWeights(up_N, None) if torch.equal(up_N, down_N) else _apart(up_N, down_N)


def _with_likelihood(weights: PairWeights, more_N: Tensor) -> PairWeights:
    """The same with chosen pushed up by more_N more."""
    weight_N, sides_N2 = weights
    if sides_N2 is None:
        return _apart(weight_N + more_N, weight_N)
    return _apart(weight_N * sides_N2[:, 0] + more_N, weight_N * sides_N2[:, 1])


def _apart(up_N: Tensor, down_N: Tensor) -> PairWeights:
    """Of p_w and p_l that differ."""
    weight_N = (up_N.abs() + down_N.abs()) / 2
    sides_N2 = torch.stack([up_N, down_N], dim=1) / torch.where(weight_N > 0, weight_N, 1.0)[:, None]
    return PairWeights(weight_N, sides_N2)


def _of_margin(loss: LossConfig, z_N: Tensor) -> Tensor:
    """c = -dL/dz of a loss of z = beta Delta (and the length term)."""
    up_N, down_N = torch.sigmoid(z_N), torch.sigmoid(-z_N)
    match loss.type:
        case "sigmoid":
            return down_N
        case "hinge":
            return (z_N < 1.0).to(torch.float64)
        case "robust":
            return ((1.0 - loss.smoothing) * down_N + loss.smoothing * up_N) / (1.0 - 2.0 * loss.smoothing)
        case "exo_pair":
            return up_N * down_N * (math.log1p(-loss.smoothing) - math.log(loss.smoothing) - z_N)
        case "discopop":
            mix_N, exp_N = torch.sigmoid(z_N / loss.tau), torch.exp(-z_N)
            change_N = mix_N * (1.0 - mix_N) / loss.tau
            logistic_N = -torch.nn.functional.logsigmoid(z_N)
            return down_N * (1.0 - mix_N) + exp_N * mix_N + change_N * (logistic_N - exp_N)
    raise ValueError(f"{loss.type} is no function of the margin")


def _of_sides(loss: LossConfig, r_w_N: Tensor, r_l_N: Tensor) -> tuple[Tensor, Tensor]:
    """(p_w, p_l) of a loss of both rewards r = beta (s - s_ref)."""

    def bell(x: Tensor) -> Tensor:
        return torch.sigmoid(x) * torch.sigmoid(-x)

    match loss.type:
        case "nca_pair":
            return torch.sigmoid(-r_w_N) - 0.5 * torch.sigmoid(r_w_N), 0.5 * torch.sigmoid(r_l_N)
        case "bco_pair":
            return torch.sigmoid(-r_w_N), torch.sigmoid(r_l_N)
        case "sppo_hard":
            return (1.0 - 2.0 * r_w_N) / loss.beta**2, (1.0 + 2.0 * r_l_N) / loss.beta**2
        case "apo_zero":
            return bell(r_w_N), bell(r_l_N)
        case "apo_down":
            return bell(r_w_N - r_l_N) - bell(r_w_N), bell(r_w_N - r_l_N)
    raise ValueError(f"{loss.type} does not weigh sides apart")

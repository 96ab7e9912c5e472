"""Strengths from comparisons: the Bradley-Terry model with ties counted half to either side."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PRIOR = 1.0
"""Tied comparisons of every item with one of strength 0: strengths stay finite where an item wins or loses them all."""
_STEPS = 100
_TOLERANCE = 1e-10


def strengths(wins_NN: NDArray[np.float64], prior: float = PRIOR) -> NDArray[np.float64]:
    """Log strengths s [N]: P(i beats j) = sigmoid(s_i - s_j), at the maximum of the likelihood (Bradley & Terry 1952).

    wins_NN[i, j]: how often i beat j, a tie one half in both places. prior > 0 makes the maximum unique, and s comparable between
    items that were never compared. Newton's method; the likelihood is concave.
    """
    games_NN = wins_NN + wins_NN.T
    s_N = np.zeros(len(wins_NN))
    for _ in range(_STEPS):
        p_NN = _sigmoid(s_N[:, None] - s_N[None, :])
        own_N = _sigmoid(s_N)
        gradient_N = (wins_NN - games_NN * p_NN).sum(axis=1) + prior * (0.5 - own_N)
        weight_NN = games_NN * p_NN * (1 - p_NN)
        hessian_NN = np.diag(weight_NN.sum(axis=1) + prior * own_N * (1 - own_N)) - weight_NN
        step_N = np.linalg.solve(hessian_NN, gradient_N)
        s_N = s_N + step_N / max(1.0, float(np.abs(step_N).max()))
        if np.abs(step_N).max() < _TOLERANCE:
            break
    return s_N


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(x / 2))

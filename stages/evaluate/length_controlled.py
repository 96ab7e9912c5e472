"""The win rate at equal length: a logistic regression of the verdicts on the difference in length (arXiv 2404.04475).

The published model has a term for how hard each instruction is, fitted on a leaderboard of many models. With two models there is none to
fit it on, so it is left out: P(after wins) = sigmoid(a + b tanh(d / sd(d))), d the difference in length; at d = 0 it is sigmoid(a).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RIDGE = 1.0
"""L2 penalty on b: verdicts that follow the length alone have no finite b. Our choice; the released code cross-validates its own."""
_STEPS = 100
_TOLERANCE = 1e-10
_LARGEST = 20.0


def length_controlled(wins: Sequence[float], lengths: Sequence[float], ridge: float = RIDGE) -> float:
    """The win rate at equal length. wins: 1, 0 or one half (a tie); lengths: of the answer after less that of the one before.

    Maximum of sum w log p + (1 - w) log(1 - p) - ridge b^2 / 2, by Newton's method; where every verdict is the same it is that verdict.
    """
    w_N = np.asarray(wins, dtype=np.float64)
    if len(set(w_N.tolist())) == 1:
        return float(w_N[0])
    d_N = np.asarray(lengths, dtype=np.float64)
    spread = d_N.std()
    x_N2 = np.stack([np.ones_like(d_N), np.tanh(d_N / spread) if spread > 0 else np.zeros_like(d_N)], axis=1)
    penalty_2 = np.array([0.0, ridge])
    theta_2 = np.zeros(2)
    for _ in range(_STEPS):
        p_N = 0.5 * (1 + np.tanh(x_N2 @ theta_2 / 2))
        gradient_2 = x_N2.T @ (w_N - p_N) - penalty_2 * theta_2
        hessian_22 = (x_N2 * (p_N * (1 - p_N))[:, None]).T @ x_N2 + np.diag(penalty_2)
        step_2 = np.linalg.solve(hessian_22, gradient_2)
        theta_2 = np.clip(theta_2 + step_2 / max(1.0, float(np.abs(step_2).max())), -_LARGEST, _LARGEST)
        if np.abs(step_2).max() < _TOLERANCE:
            break
    return float(0.5 * (1 + np.tanh(theta_2[0] / 2)))

"""omega_i: what a pair counts in its language's direction G_l = sum_i omega_i g_i; they sum to one inside a language.

ConGrad (arXiv 2503.23777) averages minibatch gradients with an EMA whose coefficient was not released: ours is a declared
value.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_omegas(language_N: Tensor, n_languages: int) -> Tensor:
    """omega_i = 1 / n_l [N], float64: the plain mean of each language's pairs."""
    counts_L = torch.bincount(language_N, minlength=n_languages).to(torch.float64)
    return 1.0 / counts_L[language_N]


def ema_omegas(language_N: Tensor, n_languages: int, gamma: float, batch_size: int) -> Tensor:
    """Weights [N] that give the bias-corrected EMA over each language's minibatches, newest last; float64.

    omega_i = (1 - gamma) gamma^(T - b) / ((1 - gamma^T) m_b) for a pair in minibatch b of T, of size m_b (the last
    may be smaller). Minibatches are consecutive pairs of one language in stream order. Order-biased by design:
    gamma = 0.9 remembers about 19 minibatches. gamma = 0 keeps the last minibatch only. Raises ValueError outside 0
    <= gamma < 1 or for batch_size < 1.
    """
    if not 0.0 <= gamma < 1.0:
        raise ValueError(f"gamma must be in [0, 1), got {gamma}")
    if batch_size < 1:
        raise ValueError(f"EMA batch size must be at least 1, got {batch_size}")
    omega_N = torch.zeros(language_N.shape[0], dtype=torch.float64)
    for language in range(n_languages):
        where = (language_N == language).nonzero()[:, 0]
        n = where.shape[0]
        if n == 0:
            continue
        batch_n = torch.arange(n) // batch_size
        total = int(batch_n[-1]) + 1
        size_n = torch.bincount(batch_n)[batch_n].to(torch.float64)
        age_n = (total - 1 - batch_n).to(torch.float64)
        omega_N[where] = (1.0 - gamma) * gamma**age_n / ((1.0 - gamma**total) * size_n)
    return omega_N

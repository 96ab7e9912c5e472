"""Small random sketch streams."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def stream() -> Callable[..., Callable[[], list[Tensor]]]:
    """stream(rows [N, D], chunk) -> a re-readable stream of chunks of `chunk` rows."""

    def make(rows_ND: Tensor, chunk: int = 7) -> Callable[[], list[Tensor]]:
        return lambda: list(rows_ND.split(chunk))

    return make


@pytest.fixture
def world() -> Callable[..., tuple[Tensor, Tensor]]:
    """world(seed, n, dim, languages, signal) -> (g [N, D] float64, language [N]); two languages oppose the others."""

    def make(seed: int, n: int = 60, dim: int = 24, languages: int = 4, signal: float = 0.5) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        centre_LD = torch.randn(languages, dim, generator=generator, dtype=torch.float64)
        centre_LD[0] = -centre_LD[-1] + 0.3 * centre_LD[0]
        language_N = torch.randint(0, languages, (n,), generator=generator)
        language_N[: 2 * languages] = torch.arange(2 * languages) % languages
        noise_ND = torch.randn(n, dim, generator=generator, dtype=torch.float64)
        return signal * centre_LD[language_N] + noise_ND, language_N

    return make

"""Sampling draws from the distribution it says, row by row."""

from __future__ import annotations

import math

import pytest
import torch

from schemas.config.model import Sampling
from stages.engines.sampling import RowSampler

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def draw(sampling: Sampling, n: int = 4000, seed: int = 5) -> torch.Tensor:
    """Relative frequencies of n draws."""
    sampler = RowSampler([sampling], [seed])
    picks = torch.cat([sampler(LOGITS[None]) for _ in range(n)])
    return torch.bincount(picks, minlength=len(LOGITS)) / n


def test_temperature_zero_is_argmax() -> None:
    assert RowSampler([Sampling(temperature=0)], [1])(LOGITS[None]).item() == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    want = torch.softmax(LOGITS / temperature, -1)
    error = (draw(Sampling(temperature=temperature)) - want).abs()
    assert (error <= 4 * (want * (1 - want) / 4000).sqrt() + 1e-3).all()


@pytest.mark.parametrize(
    ("limits", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.6}, {0, 1}),  # p = 0.54, 0.20, ...: the token that crosses top_p is kept
        ({"top_p": 0.5}, {0}),
        ({"min_p": math.exp(-1.6)}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.7}, {0, 1}),
        ({}, {0, 1, 2, 3, 4, 5}),
    ],
)
def test_limits_leave_exactly_these_tokens(limits: dict, allowed: set[int]) -> None:
    found = draw(Sampling(temperature=1.0, **limits), n=3000)
    assert set(found.nonzero().flatten().tolist()) == allowed
    want = torch.softmax(LOGITS, -1)
    want = torch.where(torch.tensor([i in allowed for i in range(6)]), want, 0)
    torch.testing.assert_close(found, want / want.sum(), atol=0.04, rtol=0)


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    alone = RowSampler([Sampling()], [7])
    among = RowSampler([Sampling(temperature=0), Sampling(), Sampling(top_p=0.5)], [7, 7, 9])
    rows = LOGITS.expand(3, -1)
    assert [alone(LOGITS[None]).item() for _ in range(20)] == [among(rows)[1].item() for _ in range(20)]


def test_seeds_up_to_63_bits_are_told_apart() -> None:
    def stream(seed: int) -> list[int]:
        sampler = RowSampler([Sampling(temperature=2.0)], [seed])
        return [sampler(LOGITS[None]).item() for _ in range(30)]

    streams = {tuple(stream(seed)) for seed in (0, 1, 2**62, 2**63 - 1)}
    assert len(streams) == 4
    assert stream(2**63 - 1) == stream(2**63 - 1)

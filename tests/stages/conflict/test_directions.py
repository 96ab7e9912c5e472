"""Directions and their weights equal literal loops, and the stream's chunks change no bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.conflict.directions import cosines, count_conflicts, directions, grams, signed_directions
from stages.conflict.stream import BLOCK, Chunk, blocks, scaled
from stages.gradients.omegas import ema_omegas, mean_omegas


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40), st.floats(0.0, 0.99), st.integers(1, 8), st.integers(0, 10**6)
)
def test_ema_omegas_equal_a_literal_ema(languages, gamma, batch_size, seed) -> None:
    """moment = gamma * moment + (1 - gamma) * batch mean, divided by 1 - gamma^T at the end."""
    language_N = torch.tensor(languages)
    g_ND = torch.randn(len(languages), 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    omega_N = ema_omegas(language_N, 3, gamma, batch_size)
    got = directions(lambda: [g_ND], language_N, omega_N, 3)
    for language in range(3):
        mine = g_ND[language_N == language]
        moment, steps = torch.zeros(5, dtype=torch.float64), 0
        for batch in mine.split(batch_size) if len(mine) else ():
            moment = gamma * moment + (1 - gamma) * batch.mean(dim=0)
            steps += 1
        want = moment / (1 - gamma**steps) if steps else moment
        torch.testing.assert_close(got[language], want, rtol=1e-9, atol=1e-12)
        if steps:
            assert float(omega_N[language_N == language].sum()) == pytest.approx(1.0, abs=1e-12)


def test_mean_direction(world, stream, fresh_seed) -> None:
    g_ND, language_N = world(fresh_seed)
    got = directions(stream(g_ND), language_N, mean_omegas(language_N, 4), 4)
    for language in range(4):
        torch.testing.assert_close(got[language], g_ND[language_N == language].mean(dim=0), rtol=1e-12, atol=1e-12)


def test_chunk_size_changes_no_bit(world, stream, fresh_seed) -> None:
    g_ND, language_N = world(fresh_seed, n=1300)
    omega_N = ema_omegas(language_N, 4, 0.9, 3)
    results = [directions(stream(g_ND.half(), chunk), language_N, omega_N, 4) for chunk in (1, 700, 1300)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_scaled_multiplies_rows(world, stream) -> None:
    g_ND, _ = world(0, n=20)
    weight_N = torch.linspace(0, 1, 20)
    once = scaled(stream(g_ND, 6), weight_N)
    twice = scaled(once, weight_N)
    for chunks, factor_N in ((once, weight_N.double()), (twice, weight_N.double() ** 2)):
        got = torch.cat([x_ND * factor_n[:, None] for x_ND, factor_n in chunks()])
        torch.testing.assert_close(got, g_ND * factor_N[:, None])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=8), st.integers(1, 3))
def test_blocks_are_the_same_whatever_the_chunks(sizes, at_once) -> None:
    total, size = sum(sizes), at_once * BLOCK
    x_ND, factor_N = torch.arange(float(total))[:, None], torch.arange(float(total)).double()
    cuts = [Chunk(x, f) for x, f in zip(x_ND.split(sizes), factor_N.split(sizes), strict=True)]
    got = list(blocks(lambda: cuts, at_once))
    assert [len(block.x_ND) for block in got] == [min(size, total - at) for at in range(0, total, size)]
    assert [block.start for block in got] == list(range(0, total, size))
    if got:
        assert torch.equal(torch.cat([block.x_ND for block in got]), x_ND)
        assert torch.equal(torch.cat([block.factor_N for block in got]), factor_N)


@pytest.mark.parametrize("mixed", [True, False])
def test_sums_are_the_same_whatever_the_chunks_and_the_order_of_languages(mixed, stream) -> None:
    n, n_languages, dim = 9000, 30, 5
    generator = torch.Generator().manual_seed(1)
    g_ND = torch.randn(n, dim, generator=generator)
    language_N = torch.arange(n) % n_languages if mixed else torch.arange(n) * n_languages // n
    omega_N = torch.rand(n, generator=generator, dtype=torch.float64)
    rows_n = (torch.rand(n, generator=generator) < 0.6).nonzero()[:, 0]
    sign_Rn = torch.randint(0, 2, (3, len(rows_n)), generator=generator, dtype=torch.int8) * 2 - 1
    (got_LD, got_RLD), again = (
        signed_directions(stream(g_ND, size), language_N, omega_N, n_languages, sign_Rn, rows_n) for size in (n, 777)
    )
    assert torch.equal(got_LD, again[0]) and torch.equal(got_RLD, again[1])
    wide_ND = omega_N[:, None] * g_ND.double()
    want_LD = torch.zeros(n_languages, dim, dtype=torch.float64).index_add_(0, language_N, wide_ND)
    torch.testing.assert_close(got_LD, want_LD, rtol=1e-5, atol=1e-5)
    for sign_n, got in zip(sign_Rn, got_RLD, strict=True):
        want_LD = torch.zeros_like(want_LD).index_add_(0, language_N[rows_n], sign_n[:, None] * wide_ND[rows_n])
        torch.testing.assert_close(got.double(), want_LD, rtol=1e-5, atol=1e-4)


def test_segment_grams_sum_to_the_whole(world, stream) -> None:
    g_ND, language_N = world(1)
    direction_LD = directions(stream(g_ND), language_N, mean_omegas(language_N, 4), 4)
    parts = grams(direction_LD, [torch.tensor([0, 2, 4]), torch.tensor([1, 3, *range(5, 24)])])
    torch.testing.assert_close(parts.sum(dim=0), direction_LD @ direction_LD.T)


def test_cosines_and_conflicts_with_an_empty_direction() -> None:
    direction_LD = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, 0.0]]).double()
    value, valid = cosines(direction_LD @ direction_LD.T)
    assert valid.tolist() == [[True, True, False], [True, True, False], [False] * 3]
    assert float(value[0, 1]) == pytest.approx(-(0.5**0.5))
    assert value[2].tolist() == [0.0, 0.0, 0.0]
    assert count_conflicts(direction_LD @ direction_LD.T) == 1


def test_bad_streams_are_refused(stream) -> None:
    language_N, omega_N = torch.zeros(3, dtype=torch.int64), torch.ones(3).double()
    for n in (2, 4):
        with pytest.raises(ValueError, match="for 3 pairs"):
            directions(stream(torch.ones(n, 2)), language_N, omega_N, 1)
    bad = torch.ones(3, 2)
    bad[2, 0] = float("inf")
    with pytest.raises(ValueError, match="row 2"):
        directions(stream(bad, 2), language_N, omega_N, 1)
    with pytest.raises(ValueError, match="gamma"):
        ema_omegas(language_N, 1, 1.0, 2)

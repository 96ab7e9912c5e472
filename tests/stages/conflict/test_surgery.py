"""Weights from the Gram matrix equal surgery done on the vectors themselves, and TorchJD's."""

from __future__ import annotations

import pytest
import torch

from stages.conflict.surgery import REGISTRY, draw_orders, pcgrad_coefficients, surgery


def vector_pcgrad(direction_LD: torch.Tensor, order_LL: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of arXiv 2001.06782 on the vectors."""
    total = torch.zeros_like(direction_LD[0])
    for i, start in enumerate(direction_LD):
        running = start.clone()
        for j in order_LL[i].tolist():
            other = direction_LD[j]
            if j != i and running @ other < 0 and other @ other > 0:
                running = running - (running @ other) / (other @ other) * other
        total = total + running
    return total


@pytest.mark.parametrize("languages", [1, 2, 5, 9])
def test_coefficient_space_equals_vector_space(languages, fresh_seed) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    for _ in range(20):
        direction_LD = torch.randn(languages, 4, generator=generator, dtype=torch.float64)
        (order_LL,) = draw_orders(languages, 1, int(torch.randint(2**31, (1,), generator=generator)))
        coefficients = pcgrad_coefficients(direction_LD @ direction_LD.T, order_LL)
        got = coefficients.sum(dim=0) @ direction_LD
        torch.testing.assert_close(got, vector_pcgrad(direction_LD, order_LL), rtol=1e-9, atol=1e-9)


def test_equals_torchjd_with_the_same_permutations(fresh_seed) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    generator = torch.Generator().manual_seed(fresh_seed)
    for seed in range(10):
        direction_LD = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        gram = direction_LD @ direction_LD.T
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            want = aggregation.PCGradWeighting()(gram)
        torch.testing.assert_close(surgery("pcgrad", 6, seed=seed, repeats=1)(gram), want, rtol=1e-10, atol=1e-10)


def test_pcgrad_only_adds_weight_and_is_idle_without_conflict(fresh_seed) -> None:
    generator = torch.Generator().manual_seed(fresh_seed)
    direction_LD = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    method = surgery("pcgrad", 6, seed=1, repeats=8)
    assert method(direction_LD @ direction_LD.T).min() >= 1 - 1e-12
    friendly = direction_LD.abs()
    assert torch.equal(method(friendly @ friendly.T), torch.ones(6, dtype=torch.float64))


def test_pcgrad_averages_its_orders_and_leaves_the_global_generator_alone() -> None:
    direction_LD = torch.randn(5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gram = direction_LD @ direction_LD.T
    before = torch.random.get_rng_state()
    got = surgery("pcgrad", 5, seed=9, repeats=4)(gram)
    assert torch.equal(before, torch.random.get_rng_state())
    want = torch.stack([pcgrad_coefficients(gram, order).sum(dim=0) for order in draw_orders(5, 4, 9)]).mean(dim=0)
    torch.testing.assert_close(got, want)
    assert torch.equal(got, surgery("pcgrad", 5, seed=9, repeats=4)(gram))


def test_a_direction_without_length_is_harmless() -> None:
    gram = torch.tensor([[1.0, -0.5, 0.0], [-0.5, 1.0, 0.0], [0.0, 0.0, 0.0]])
    for name in ("pcgrad", "mean", "unit_mean"):
        assert torch.isfinite(surgery(name, 3)(gram)).all()
    assert surgery("unit_mean", 3)(gram)[2] == 0


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_batches_of_matrices_equal_one_at_a_time(name) -> None:
    """Every method takes [S, L, L]; solvers that are not installed say which package they want."""
    direction = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = direction @ direction.mT
    try:
        method = surgery(name, 4, seed=2, repeats=3)
    except ImportError as error:
        pytest.skip(f"optional solver: {error}")
    state = torch.random.get_rng_state()
    together = method(gram)
    assert torch.equal(state, torch.random.get_rng_state())
    assert together.shape == (3, 4)
    for s in range(3):
        torch.testing.assert_close(together[s], method(gram[s]), rtol=1e-9, atol=1e-9)


def test_means() -> None:
    gram = torch.tensor([[4.0, 0.0], [0.0, 16.0]])
    assert surgery("mean", 2)(gram).tolist() == [0.5, 0.5]
    assert surgery("unit_mean", 2)(gram).tolist() == [0.25, 0.125]


def test_errors() -> None:
    with pytest.raises(ValueError, match="known: pcgrad"):
        surgery("pc_grad", 2)
    with pytest.raises(ValueError, match="square"):
        surgery("mean", 2)(torch.ones(2, 3))
    with pytest.raises(ValueError, match="not finite"):
        surgery("mean", 2)(torch.full((2, 2), float("nan")))
    with pytest.raises(ValueError, match="at least one order"):
        surgery("pcgrad", 2, repeats=0)

"""The standard error from a second seed is the one that many seeds show."""

from __future__ import annotations

import pytest
import torch

from stages.gradients.error import cosine_error
from stages.gradients.projections import LayerShape, SketchLayout
from tests.stages.gradients.oracles import project_gradients


def test_the_estimate_is_the_spread_over_many_seeds() -> None:
    """Cosines of 12 fixed random gradients: sd over 200 seeds against estimates from 40 pairs of seeds, within 10%."""
    generator = torch.Generator().manual_seed(3)
    shapes = [LayerShape(f"h.{n}", 24, 20) for n in range(3)]
    layout = SketchLayout.plan(shapes, 3 * 36)
    gradients = [{s.name: torch.randn(24, 20, generator=generator) for s in shapes} for _ in range(12)]

    def sketches(seed: int) -> torch.Tensor:
        return torch.stack([project_gradients(layout, seed, one.items()) for one in gradients])

    upper = torch.triu_indices(12, 12, 1)
    cosines = []
    for seed in range(200):
        unit = torch.nn.functional.normalize(sketches(seed).double(), dim=1)
        cosines.append((unit @ unit.T)[upper[0], upper[1]])
    truth = float(torch.stack(cosines).var(dim=0).mean().sqrt())
    found = [cosine_error(sketches(1000 + 2 * k), sketches(1001 + 2 * k)) for k in range(40)]
    assert all(f["sketch_cosine_error_pairs"] == 12 for f in found)
    mean_square = sum(f["sketch_cosine_error"] ** 2 for f in found) / len(found)
    assert mean_square**0.5 == pytest.approx(truth, rel=0.1)


def test_too_little_to_compare_says_nothing_and_never_nan() -> None:
    assert cosine_error(torch.zeros(3, 4), torch.randn(3, 4)) == {}
    assert cosine_error(torch.randn(1, 4), torch.randn(1, 4)) == {}
    assert cosine_error(torch.zeros(0, 4), torch.zeros(0, 4)) == {}
    some = torch.randn(4, 5)
    some[2] = 0
    assert cosine_error(some, some) == {"sketch_cosine_error": 0.0, "sketch_cosine_error_pairs": 3.0}

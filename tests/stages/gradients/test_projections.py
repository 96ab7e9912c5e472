"""Projections are reproducible and unbiased; the layout survives a round trip."""

from __future__ import annotations

import hashlib

import pytest
import torch

from stages.gradients.projections import (
    LayerShape,
    SketchLayout,
    block_and_kind,
    projection,
    projection_seed,
)
from tests.stages.gradients.oracles import layer_projections


def test_projection_depends_on_seed_name_and_side_only() -> None:
    first = projection(3, "model.layers.0.mlp.up_proj", "out", 4, 50)
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(first, projection(3, "model.layers.0.mlp.up_proj", "out", 4, 50))
    for other in ((4, "model.layers.0.mlp.up_proj", "out"), (3, "b", "out"), (3, "model.layers.0.mlp.up_proj", "in")):
        assert not torch.equal(first, projection(*other, 4, 50))


def test_projection_seed_is_the_documented_hash() -> None:
    digest = hashlib.blake2b(b"7\x1fa.b\x1fin", digest_size=8).digest()
    assert projection_seed(7, "a.b", "in") == int.from_bytes(digest, "little") >> 1
    assert float(projection(7, "a.b", "in", 1, 3)[0, 0]) == pytest.approx(
        float(
            torch.randn(
                3, generator=torch.Generator().manual_seed(projection_seed(7, "a.b", "in")), dtype=torch.float64
            )[0]
        )
    )


def test_entries_have_mean_zero_and_variance_one_over_p() -> None:
    p, width = 8, 50_000
    entries = projection(0, "layer", "in", p, width).double()
    n = p * width
    assert abs(float(entries.mean())) < 5 * (1 / p / n) ** 0.5
    assert abs(float(entries.var()) * p - 1) < 5 * (2 / n) ** 0.5


def test_inner_products_are_unbiased_with_the_documented_variance(fresh_seed) -> None:
    """E<S, S'> = <G, G'> and Var from the closed form, over 4,000 seeds: within 5 standard errors of each."""
    generator = torch.Generator().manual_seed(fresh_seed)
    p, o, i, draws = 4, 6, 5, 4000
    a = torch.randn(o, i, generator=generator, dtype=torch.float64)
    b = a + torch.randn(o, i, generator=generator, dtype=torch.float64)
    layout = SketchLayout.plan([LayerShape("w", o, i)], dim=p * p)
    products = []
    for seed in range(draws):
        out_PO, in_PI = (m.double() for m in layer_projections(seed, layout.layers[0]))
        products.append((out_PO @ a @ in_PI.T * (out_PO @ b @ in_PI.T)).sum())
    values = torch.stack(products)

    ab, ba = a.T @ b, a @ b.T
    shared = ab.square().sum() + ba.square().sum()
    variance = (shared + 2 * torch.trace(ab @ ab)) / p + (
        a.square().sum() * b.square().sum() + (a * b).sum() ** 2 + shared
    ) / p**2
    assert abs(values.mean() - (a * b).sum()) < 5 * (variance / draws).sqrt()
    centred = values - values.mean()
    error_of_variance = ((centred**4).mean() - values.var() ** 2).sqrt() / draws**0.5
    assert abs(values.var() - variance) < 5 * error_of_variance


def test_layout_shares_the_dimension_and_caps_at_narrow_layers() -> None:
    shapes = [LayerShape("h.0.a", 64, 64), LayerShape("h.0.b", 3, 64), LayerShape("h.1.a", 64, 64)]
    layout = SketchLayout.plan(shapes, dim=3 * 30)
    assert [slot.p for slot in layout.layers] == [5, 3, 5]
    assert [slot.offset for slot in layout.layers] == [0, 25, 34]
    assert layout.dim == 59
    assert [slot.p for slot in SketchLayout.plan(shapes, dim=1).layers] == [1, 1, 1]
    with pytest.raises(ValueError, match="no layer"):
        SketchLayout.plan([])
    with pytest.raises(ValueError, match="unique"):
        SketchLayout.plan([shapes[0], shapes[0]])


def test_layout_round_trip_and_damage() -> None:
    layout = SketchLayout.plan([LayerShape("model.layers.0.mlp.up", 9, 9), LayerShape("x", 9, 9)], dim=50)
    assert SketchLayout.from_json(layout.to_json()) == layout
    with pytest.raises(ValueError, match="damaged"):
        SketchLayout.from_json(layout.to_json().replace('"offset":25', '"offset":24'))


@pytest.mark.parametrize("by", ["model", "block", "kind", "layer"])
def test_groups_partition_the_columns(by) -> None:
    names = ["model.layers.0.mlp.up", "model.layers.0.self_attn.q", "model.layers.1.mlp.up", "projector"]
    layout = SketchLayout.plan([LayerShape(name, 9, 9) for name in names], dim=36)
    groups = layout.group_columns(by)
    assert torch.cat(list(groups.values())).sort().values.tolist() == list(range(layout.dim))
    keys = {
        "model": ["model"],
        "block": ["block.0", "block.1", "other"],
        "kind": ["mlp.up", "self_attn.q", "projector"],
    }
    assert list(groups) == keys.get(by, names)


def test_block_and_kind() -> None:
    assert block_and_kind("model.layers.12.self_attn.q_proj") == (12, "self_attn.q_proj")
    assert block_and_kind("transformer.h.0.mlp.c_fc") == (0, "mlp.c_fc")
    assert block_and_kind("score") == (None, "score")


def test_one_sided_compresses_the_wider_side_and_exact_neither() -> None:
    shapes = [LayerShape("h.0.wide", 6, 20), LayerShape("h.0.tall", 20, 6), LayerShape("h.1.thin", 2, 3)]
    layout = SketchLayout.plan(shapes, method="one_sided", rank=4)
    assert [slot.shape for slot in layout.layers] == [(6, 4), (4, 6), (2, 3)]
    assert [slot.sides for slot in layout.layers] == [("in",), ("out",), ("in",)]
    assert layout.dim == 24 + 24 + 6
    exact = SketchLayout.plan(shapes, method="exact")
    assert [slot.shape for slot in exact.layers] == [(6, 20), (20, 6), (2, 3)]
    for one in (layout, exact):
        assert SketchLayout.from_json(one.to_json()) == one
    with pytest.raises(ValueError, match=r"rank must be at least 1"):
        SketchLayout.plan(shapes, method="one_sided", rank=0)
    with pytest.raises(ValueError, match=r"500,002 parameters are too large.*two_sided"):
        SketchLayout.plan([LayerShape("w", 2, 250_001)], method="exact")


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_flora_is_unbiased_with_the_variance_of_its_formula(shape, fresh_seed) -> None:
    """G A^T or A G with A_ij ~ N(0, 1/R) and no further scale: E<C, C'> = <G, G'> and E[A^T A] = 1, over 4,000 seeds.

    Var<C, C'> = (|G^T G'|^2 + tr((G^T G')^2)) / R for the wider side compressed: trace of a Wishart quadratic form.
    """
    generator = torch.Generator().manual_seed(fresh_seed)
    a = torch.randn(*shape, generator=generator, dtype=torch.float64)
    b = a + torch.randn(*shape, generator=generator, dtype=torch.float64)
    rank, draws = 4, 4000
    (slot,) = SketchLayout.plan([LayerShape("w", *shape)], method="one_sided", rank=rank).layers
    products, squares = [], torch.zeros(9, 9, dtype=torch.float64)
    for seed in range(draws):
        matrix_RW = projection(seed, "w", slot.sides[0], rank, 9).double()
        one, two = (g @ matrix_RW.T if slot.sides == ("in",) else matrix_RW @ g for g in (a, b))
        products.append((one * two).sum())
        squares += matrix_RW.T @ matrix_RW / draws
    values = torch.stack(products)
    cross = a.T @ b if slot.sides == ("in",) else a @ b.T
    variance = (cross.square().sum() + torch.trace(cross @ cross)) / rank
    assert abs(values.mean() - (a * b).sum()) < 5 * (variance / draws).sqrt()
    centred = values - values.mean()
    assert abs(values.var() - variance) < 5 * ((centred**4).mean() - values.var() ** 2).sqrt() / draws**0.5
    assert (squares - torch.eye(9)).abs().max() < 6 * (2 / rank / draws) ** 0.5

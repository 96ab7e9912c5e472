"""float16 storage keeps direction and norm, and refuses what it cannot keep."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.config.curation import ConflictConfig
from schemas.errors import UserError
from stages.gradients.projections import LayerShape, SketchLayout
from stages.gradients.store import SCALE, common_metadata, pack_sketches, store_metadata, unpack_sketches
from stages.gradients.sums import sums_key


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31 - 1), st.floats(-30, 30), st.integers(1, 300))
def test_round_trip(seed, exponent, dim) -> None:
    """Any norm from 1e-30 to 1e30: cosine within 1e-6 of 1, norm within 1e-3 (1e-6 typical at full size)."""
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(3, dim, generator=generator) * 10.0**exponent
    stored, norm = pack_sketches(sketch)
    assert stored.dtype == torch.float16
    assert norm.dtype == torch.float32
    back = unpack_sketches(stored, norm)
    assert torch.cosine_similarity(back.double(), sketch.double(), dim=1, eps=0).min() >= 1 - 1e-6
    torch.testing.assert_close(back.double().norm(dim=1), sketch.double().norm(dim=1), rtol=1e-3, atol=0)


def test_full_size_norm_error() -> None:
    sketch = torch.randn(20, 8192)
    back = unpack_sketches(*pack_sketches(sketch))
    torch.testing.assert_close(back.norm(dim=1), sketch.norm(dim=1), rtol=2e-5, atol=0)
    assert torch.cosine_similarity(back.double(), sketch.double(), dim=1).min() >= 1 - 1e-7


def test_one_huge_entry_and_a_quiet_layer_survive() -> None:
    sketch = torch.full((1, 100), 1e-5)
    sketch[0, 0] = 1.0
    stored, norm = pack_sketches(sketch)
    assert float(stored.abs().max()) == SCALE
    torch.testing.assert_close(unpack_sketches(stored, norm), sketch, rtol=1e-3, atol=0)


def test_zero_stays_zero() -> None:
    stored, norm = pack_sketches(torch.zeros(2, 5))
    assert not stored.any()
    assert norm.tolist() == [0.0, 0.0]
    assert not unpack_sketches(stored, norm).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_not_finite_is_refused(bad) -> None:
    sketch = torch.ones(3, 4)
    sketch[1] = bad
    with pytest.raises(ValueError, match="row 1"):
        pack_sketches(sketch)


LAYOUT = SketchLayout.plan([LayerShape("w", 8, 8)], 16)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"model": "other"}, "models"),
        ({"factors": "f"}, "factors"),
        ({"layout": SketchLayout.plan([LayerShape("w", 8, 8)], 9)}, "layers"),
    ],
)
def test_sketches_of_other_projections_or_models_are_refused_by_what_differs(tmp_path, change, named) -> None:
    given = {"layout": LAYOUT, "seed": 0, "model": "m", "factors": ""}
    for name, arguments in (("a", given), ("b", given), ("c", given | change)):
        table = pa.table({"x": [1]}).replace_schema_metadata(store_metadata(**arguments))
        pq.write_table(table, tmp_path / f"{name}.parquet")
    same = common_metadata([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert same == store_metadata(**given)
    with pytest.raises(UserError, match=rf"c\.parquet and a\.parquet differ in .*{named}"):
        common_metadata([tmp_path / f"{name}.parquet" for name in "abc"])
    conflict = ConflictConfig()
    assert sums_key(same, conflict) != sums_key(store_metadata(**(given | change)), conflict)


def test_a_table_without_a_layout_is_refused(tmp_path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="cannot be compared"):
        common_metadata([tmp_path / "a.parquet"])

"""The metric is the documented diagonal scaling, frozen after one pass."""

from __future__ import annotations

import pytest
import torch

from stages.conflict.metric import fit_metric


def loud_rows(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, 12, generator=generator, dtype=torch.float64) * torch.logspace(-1, 2, 12)


def test_coordinate_metric(stream, fresh_seed) -> None:
    rows = loud_rows(fresh_seed)
    metric = fit_metric(stream(rows), "coordinate", q=0.5, floor=1e-9)
    unit = rows / rows.norm(dim=1, keepdim=True)
    want = unit / unit.square().mean(dim=0).sqrt() ** 0.5
    torch.testing.assert_close(metric(rows), want)
    got = torch.cat([x_ND * factor_N[:, None] * metric.scale_D for x_ND, factor_N in metric.stream(stream(rows))()])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(metric(rows[:1] * 1e6), want[:1])


def test_q_one_equalises_and_q_zero_is_unit(stream, fresh_seed) -> None:
    rows = loud_rows(fresh_seed)
    equal = fit_metric(stream(rows), "coordinate", q=1.0, floor=1e-9)(rows)
    torch.testing.assert_close(equal.square().mean(dim=0), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(
        fit_metric(stream(rows), "coordinate", q=0.0)(rows), fit_metric(stream(rows), "unit")(rows)
    )


def test_layer_metric_gives_layers_equal_energy_per_coordinate(stream, fresh_seed) -> None:
    rows = loud_rows(fresh_seed)
    layers = [slice(0, 4), slice(4, 9), slice(9, 12)]
    scaled = fit_metric(stream(rows), "layer", floor=1e-9, layers=layers)(rows)
    for columns in layers:
        assert float(scaled[:, columns].square().mean()) == pytest.approx(1.0)
    unit = fit_metric(stream(rows), "unit")(rows)
    ratio = scaled[:, layers[1]] / unit[:, layers[1]]
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))


def test_floor_bounds_the_amplification(stream) -> None:
    rows = torch.ones(10, 4)
    rows[:, 3] = 1e-12
    metric = fit_metric(stream(rows), "coordinate", q=1.0, floor=0.01)
    assert float(metric.scale_D[3] / metric.scale_D[0]) < 120


@pytest.mark.parametrize("dim", [4, 64])
def test_the_floor_is_a_share_of_the_coordinates_rms_and_has_no_unit(stream, dim) -> None:
    """A silent coordinate, or layer, is divided by floor times the RMS of all, which at unit norm is 1 / sqrt(D)."""
    rows = torch.randn(50, dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)
    rows[:, : dim // 4] = 0.0
    least = 0.01 / dim**0.5
    coordinate = fit_metric(stream(rows), "coordinate", q=0.5, floor=0.01)
    torch.testing.assert_close(
        coordinate.scale_D[: dim // 4], torch.full((dim // 4,), least**-0.5, dtype=torch.float64)
    )
    layers = [slice(0, dim // 4), slice(dim // 4, dim)]
    layer = fit_metric(stream(rows), "layer", floor=0.01, layers=layers)
    torch.testing.assert_close(layer.scale_D[: dim // 4], torch.full((dim // 4,), 1 / least, dtype=torch.float64))


def test_zero_rows_stay_zero_and_do_not_count(stream, fresh_seed) -> None:
    rows = loud_rows(fresh_seed)
    padded = torch.cat([rows, torch.zeros(5, 12, dtype=torch.float64)])
    metric = fit_metric(stream(padded), "coordinate")
    torch.testing.assert_close(metric.scale_D, fit_metric(stream(rows), "coordinate").scale_D)
    assert not metric(padded)[-5:].any()


def test_none_is_the_identity_and_chunks_change_no_bit(stream, fresh_seed) -> None:
    rows = loud_rows(fresh_seed)
    assert torch.equal(fit_metric(stream(rows), "none")(rows), rows)
    scales = [fit_metric(stream(rows, chunk), "coordinate").scale_D for chunk in (1, 40)]
    assert torch.equal(*scales)


def test_errors(stream) -> None:
    with pytest.raises(ValueError, match="unknown metric"):
        fit_metric(stream(torch.ones(2, 2)), "adam")
    with pytest.raises(ValueError, match="every sketch is zero"):
        fit_metric(stream(torch.zeros(2, 2)), "coordinate")
    with pytest.raises(ValueError, match="cover"):
        fit_metric(stream(torch.ones(2, 2)), "layer", layers=[slice(0, 1)])
    with pytest.raises(ValueError, match="floor"):
        fit_metric(stream(torch.ones(2, 2)), "coordinate", floor=0.0)

"""The k-th largest magnitude of a whole parameter, exactly and with the documented ties, against a sort."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from stages.train.optimizers import top
from stages.train.optimizers.top import EVERYTHING, Cut, cut_whole

SIZE = 200_000


def normal() -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(1)).abs()


VALUES = {
    "normal": normal(),
    "float64": normal().double(),
    "the first part is no sample of the rest": normal() * (1 + (torch.arange(SIZE) > SIZE // 2) * 30),
    "the first part is the largest": normal() / (1 + (torch.arange(SIZE) > SIZE // 4) * 30),
    "many ties": (4 * normal()).round(),
    "all equal": torch.full((SIZE,), 0.25),
    "mostly zero": normal() * (torch.arange(SIZE) % 1000 == 7),
    "infinite": torch.where(torch.arange(SIZE) % 9000 == 5, torch.inf, normal()),
    "no multiple of eight": normal()[: SIZE - 3],
}


def by_sorting(values: torch.Tensor, k: int) -> Cut:
    order = torch.sort(values, descending=True, stable=True).indices[:k]
    limit = values[order[-1]]
    return Cut(float(limit), int(order[values[order] == limit].max()))


def cut(values: torch.Tensor, k: int, part: int = 1 << 15) -> Cut:
    return cut_whole(values.split(part), k, values.numel(), lambda: values.split(part))


@pytest.mark.parametrize("what", VALUES)
def test_the_cut_is_the_one_of_a_stable_sort(what: str) -> None:
    values = VALUES[what]
    for k in (1, 2, 100, 2000, 20_000, values.numel() - 1):
        assert cut(values, k) == by_sorting(values, k), k


def test_a_bracket_spares_the_second_look_and_all_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look takes the gradient into the moments: also what is passed over must be asked for."""
    monkeypatch.setattr(top, "_ROOM", 0)
    values, looked = normal(), []

    def parts() -> Iterator[torch.Tensor]:
        for part in values.split(1 << 15):
            looked.append(len(part))
            yield part

    found = cut_whole(parts(), 2000, SIZE, lambda: pytest.fail("a second look"))
    assert found == by_sorting(values, 2000) and sum(looked) == SIZE
    values, looked = torch.ones(SIZE), []  # more candidates than are remembered
    assert cut_whole(parts(), 2000, SIZE, lambda: values.split(1 << 15)) == Cut(1.0, 1999) and sum(looked) == SIZE


def test_not_a_number_is_never_counted() -> None:
    values = normal()
    values[::3] = torch.nan
    real = torch.where(values.isnan(), -1.0, values)
    assert cut(values, 2000) == by_sorting(real, 2000)
    assert cut(values, SIZE - 10) == EVERYTHING

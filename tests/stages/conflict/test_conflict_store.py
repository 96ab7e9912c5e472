"""Sketches come back in order and complete, however they were cut into files and row groups and whoever reads them."""

from __future__ import annotations

import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from schemas.sketches import sketch_array
from stages.conflict.store import SAMPLE, read_sketches, sample_windows
from stages.gradients.store import pack_sketches, unpack_sketches


def as_lists(rows):
    """The column as runs have it that were made before sketches became bytes."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


COLUMNS = (sketch_array, as_lists)


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("group", [1, 7, 100])
def test_rows_come_in_order_as_they_were_stored(tmp_path, readers, group):
    sketch_ND = torch.randn(40, 6) * torch.logspace(-3, 3, 40)[:, None]
    sketch_ND[5] = 0
    stored_ND, norm_N = pack_sketches(sketch_ND)
    files = []
    for number, (start, stop) in enumerate([(0, 3), (3, 3), (3, 30), (30, 40)]):
        column = COLUMNS[number % 2](stored_ND[start:stop].numpy())
        table = pa.table({"sketch": column, "norm": norm_N[start:stop].numpy()})
        files.append(tmp_path / f"{number}.parquet")
        pq.write_table(table, files[-1], row_group_size=group)
    rows = list(read_sketches(files, readers))
    assert torch.equal(torch.cat([x for x, _ in rows]), stored_ND)
    got = torch.cat([x.double() * factor[:, None] for x, factor in rows])
    torch.testing.assert_close(got, unpack_sketches(stored_ND, norm_N).double(), rtol=1e-6, atol=0)
    first = read_sketches(files, readers)
    next(first)
    first.close()  # a reader that stops early leaves no thread waiting


@pytest.mark.parametrize("group", [1, 7, 100])
def test_windows_of_rows_are_read_however_the_table_is_cut(tmp_path, group):
    stored_ND, norm_N = pack_sketches(torch.randn(40, 6))
    files = []
    for number, (start, stop) in enumerate([(0, 3), (3, 30), (30, 40)]):
        column = COLUMNS[number % 2](stored_ND[start:stop].numpy())
        table = pa.table({"sketch": column, "norm": norm_N[start:stop].numpy()})
        files.append(tmp_path / f"{number}.parquet")
        pq.write_table(table, files[-1], row_group_size=group)
    windows = [range(1, 4), range(6, 8), range(28, 40)]
    wanted = [row for window in windows for row in window]
    assert torch.equal(torch.cat([x for x, _ in read_sketches(files, windows=windows)]), stored_ND[wanted])


def test_the_sample_is_everything_or_windows_apart_from_first_to_last_row():
    assert sample_windows(SAMPLE) == [range(SAMPLE)]
    for n in (SAMPLE + 1, 2 * SAMPLE + 7, 10_000_000):
        windows = sample_windows(n)
        assert sum(map(len, windows)) == SAMPLE
        assert windows[0].start == 0 and windows[-1].stop == n
        assert all(one.stop <= two.start for one, two in itertools.pairwise(windows))

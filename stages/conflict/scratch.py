"""Rows brought into another order than the stream's: in memory when they are few, else in an unnamed temporary file."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from schemas.errors import UserError
from stages.conflict.groups import Layout
from stages.conflict.stream import Block

_SPARE = 2**28


class Scratch:
    """`rows` rows of `dim` numbers, each put once at its slot and read back by ranges of slots. `close` it.

    folder: of the file; None: the system's. Raises UserError when neither `memory_bytes` nor the folder can hold them.
    """

    def __init__(self, rows: int, dim: int, dtype: torch.dtype, memory_bytes: int, folder: Path | None = None) -> None:
        self._dim, self._numpy = dim, torch.empty(0, dtype=dtype).numpy().dtype
        self._width = dim * self._numpy.itemsize
        need = rows * self._width
        self._memory = np.empty((rows, dim), self._numpy) if need <= memory_bytes else None
        if self._memory is None:
            self._folder = str(folder or tempfile.gettempdir())
            if shutil.disk_usage(self._folder).free < need + _SPARE:
                raise UserError(
                    f"pairs that leave together lie apart in the pairs table: {need / 1e9:,.1f} GB are needed to bring"
                    " them together",
                    where=self._folder,
                    fix="Make room there, or set conflict.leave_out: pair.",
                )
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115

    def close(self) -> None:
        """Give memory and file back."""
        if self._memory is None:
            self._file.close()
        self._memory = np.empty((0, self._dim), self._numpy)

    def put(self, slot_n: Tensor, x_nD: Tensor) -> None:
        """Store row i at slot_n[i]."""
        values = x_nD.contiguous().numpy()
        if self._memory is not None:
            self._memory[slot_n.numpy()] = values
            return
        for i, slot in enumerate(slot_n.tolist()):
            self._write(values[i], slot * self._width)

    def get(self, start: int, stop: int) -> Tensor:
        """Rows [stop - start, dim] of the slots start .. stop - 1."""
        if self._memory is not None:
            return torch.from_numpy(self._memory[start:stop])
        values = np.empty((stop - start, self._dim), self._numpy)
        into, done = values.data.cast("B"), 0
        while done < len(into):
            got = os.preadv(self._file.fileno(), [into[done:]], start * self._width + done)
            if not got:
                raise OSError("the temporary file ends early")
            done += got
        return torch.from_numpy(values)

    def _write(self, row: np.ndarray, at: int) -> None:
        left = row.data.cast("B")
        try:
            while left:
                wrote = os.pwrite(self._file.fileno(), left, at)
                left, at = left[wrote:], at + wrote
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._folder) from error  # the file has no name to blame


class Kept:
    """Rows of a stream, put aside in one pass and laid beside those that leave with them (`layout`). `close` it.

    group_N [N]: labels of the pairs that leave together. Rows of pairs that leave alone are kept too where `memory_bytes`
    hold every row; the stream need not be read again then (`complete`), nor where no pair leaves alone. factor_N [N]:
    the rows' factors. Raises UserError as `Scratch` does.
    """

    def __init__(self, group_N: Tensor, memory_bytes: int, folder: Path | None = None) -> None:
        self.factor_N = torch.ones(len(group_N), dtype=torch.float64)
        self.layout = Layout.of(group_N)
        self._group_N, self._bytes, self._folder = group_N, memory_bytes, folder
        self._scratch: Scratch | None = None

    @property
    def complete(self) -> bool:
        """Whether every row has a place."""
        return self.layout.together == len(self.factor_N)

    def put(self, block: Block) -> None:
        """The next rows of the stream."""
        if self._scratch is None:
            row_bytes = block.x_ND.shape[1] * block.x_ND.element_size()
            if len(self.factor_N) * row_bytes <= self._bytes:
                self.layout = Layout.of(self._group_N, alone=True)
            dim = block.x_ND.shape[1]
            self._scratch = Scratch(self.layout.together, dim, block.x_ND.dtype, self._bytes, self._folder)
        self.factor_N[block.start : block.stop] = block.factor_N
        slot_n = self.layout.slot_N[block.start : block.stop]
        waits_n = slot_n >= 0
        if bool(waits_n.all()):
            self._scratch.put(slot_n, block.x_ND)
        elif bool(waits_n.any()):
            self._scratch.put(slot_n[waits_n], block.x_ND[waits_n])

    def get(self, start: int, stop: int) -> Tensor:
        """Rows at the places start .. stop - 1, without their factors."""
        assert self._scratch is not None  # a place is asked for that a row was put at
        return self._scratch.get(start, stop)

    def close(self) -> None:
        """Give memory and file back."""
        if self._scratch is not None:
            self._scratch.close()

    def __enter__(self) -> Kept:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

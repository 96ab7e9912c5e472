"""Rows brought into another order than the stream's: in memory when they are few, else in an unnamed temporary file."""

from __future__ import annotations

import os
import shutil
import tempfile

import numpy as np
import torch
from torch import Tensor

from schemas.errors import UserError

_SPARE = 2**28


class Scratch:
    """`rows` rows of `dim` numbers, each put once at its slot and read back by ranges of slots. `close` it.

    Raises UserError when neither `memory_bytes` nor the temporary folder can hold them.
    """

    def __init__(self, rows: int, dim: int, dtype: torch.dtype, memory_bytes: int) -> None:
        self._dim, self._numpy = dim, torch.empty(0, dtype=dtype).numpy().dtype
        self._width = dim * self._numpy.itemsize
        need = rows * self._width
        self._memory = np.empty((rows, dim), self._numpy) if need <= memory_bytes else None
        if self._memory is None:
            folder = tempfile.gettempdir()
            if shutil.disk_usage(folder).free < need + _SPARE:
                raise UserError(
                    f"pairs that leave together lie apart in the pairs table: {need / 1e9:,.1f} GB are needed to bring"
                    " them together",
                    where=folder,
                    fix="Set TMPDIR to a folder with that much space, or conflict.leave_out: pair.",
                )
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

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
        while left:
            wrote = os.pwrite(self._file.fileno(), left, at)
            left, at = left[wrote:], at + wrote

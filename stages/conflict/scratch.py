"""Rows brought into another order than the stream's: in memory when they are few, else in an unnamed temporary file."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from schemas.errors import UserError

_SPARE = 2**28


class Scratch:
    """`rows` rows of `dim` numbers, each put once at its slot and read back by ranges of slots. `close` it.

    folder: of the file; None: the system's; why, fix: what is said where neither `memory_bytes` nor the folder can hold them (UserError).
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        dtype: torch.dtype,
        memory_bytes: int,
        folder: Path | None = None,
        *,
        why: str,
        fix: str = "Make room there.",
    ) -> None:
        self._dim, self._numpy = dim, torch.empty(0, dtype=dtype).numpy().dtype
        self._width = dim * self._numpy.itemsize
        need = rows * self._width
        self._memory = np.empty((rows, dim), self._numpy) if need <= memory_bytes else None
        if self._memory is None:
            self._folder = str(folder or tempfile.gettempdir())
            if shutil.disk_usage(self._folder).free < need + _SPARE:
                raise UserError(f"{need / 1e9:,.1f} GB are needed for {why}", where=self._folder, fix=fix)
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
        ends = [*((slot_n[1:] != slot_n[:-1] + 1).nonzero()[:, 0] + 1).tolist(), len(slot_n)]
        start = 0
        for stop in ends:  # slots that follow each other are one write
            self._write(values[start:stop], int(slot_n[start]) * self._width)
            start = stop

    def get(self, start: int, stop: int) -> Tensor:
        """Rows [stop - start, dim] of the slots start .. stop - 1."""
        if self._memory is not None:
            return torch.from_numpy(self._memory[start:stop])
        values = np.empty((stop - start, self._dim), self._numpy)
        into, done = values.reshape(-1).view(np.uint8).data, 0
        while done < len(into):
            got = os.preadv(self._file.fileno(), [into[done:]], start * self._width + done)
            if not got:
                raise OSError("the temporary file ends early")
            done += got
        return torch.from_numpy(values)

    def _write(self, rows: np.ndarray, at: int) -> None:
        left = rows.reshape(-1).view(np.uint8).data
        try:
            while left:
                wrote = os.pwrite(self._file.fileno(), left, at)
                left, at = left[wrote:], at + wrote
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._folder) from error  # the file has no name to blame

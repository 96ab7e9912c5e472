"""Rows of a stream that wait for those they leave every direction with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from stages.conflict.groups import Slots
from stages.conflict.scratch import Scratch
from stages.conflict.stream import Block


class Waiting:
    """Rows of a stream, put aside in one pass and laid beside those that leave with them (`layout`). `close` it.

    group_N [N]: labels of the pairs that leave together. Rows of pairs that leave alone are kept too where `memory_bytes`
    hold every row; the stream need not be read again then (`complete`), nor where no pair leaves alone. factor_N [N]:
    the rows' factors. Raises UserError as `Scratch` does.
    """

    def __init__(self, group_N: Tensor, memory_bytes: int, folder: Path | None = None) -> None:
        self.factor_N = torch.ones(len(group_N), dtype=torch.float64)
        self.layout = Slots.of(group_N)
        self._group_N, self._bytes, self._folder = group_N, memory_bytes, folder
        self._scratch: Scratch | None = None
        self._device = torch.device("cpu")

    @property
    def complete(self) -> bool:
        """Whether every row has a place."""
        return self.layout.together == len(self.factor_N)

    def put(self, block: Block) -> None:
        """The next rows of the stream."""
        if self._scratch is None:
            row_bytes = block.x_ND.shape[1] * block.x_ND.element_size()
            if len(self.factor_N) * row_bytes <= self._bytes:
                self.layout = Slots.of(self._group_N, alone=True)
            dim = block.x_ND.shape[1]
            self._scratch = Scratch(
                self.layout.together,
                dim,
                block.x_ND.dtype,
                self._bytes,
                self._folder,
                why="sketches that leave together and lie apart in the pairs table",
                fix="Make room there, or set conflict.leave_out: pair.",
            )
            self._device = block.x_ND.device
        self.factor_N[block.start : block.stop] = block.factor_N
        slot_n = self.layout.slot_N[block.start : block.stop]
        waits_n = slot_n >= 0
        if bool(waits_n.all()):
            self._scratch.put(slot_n, block.x_ND.cpu())
        elif bool(waits_n.any()):
            self._scratch.put(slot_n[waits_n], block.x_ND[waits_n.to(block.x_ND.device)].cpu())

    def get(self, start: int, stop: int) -> Tensor:
        """Rows at the places start .. stop - 1, without their factors, where they came from."""
        assert self._scratch is not None  # a place is asked for that a row was put at
        return self._scratch.get(start, stop).to(self._device)

    def close(self) -> None:
        """Give memory and file back."""
        if self._scratch is not None:
            self._scratch.close()

"""Safetensors written and read as a stream: no more than one slice of a tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from schemas import files
from schemas.errors import UserError

SLICE = 1 << 24
"""Elements of a slice."""

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def write_stream(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    slices: Callable[[str], Iterator[torch.Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write `shapes` as one safetensors file, each tensor from the slices that `slices(name)` yields in order.

    The file appears under its name only when it is whole and on disk. Slices are converted to `dtype`. Raises ValueError
    when the slices of a tensor do not add up to its size.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with files.publishing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            written = 0
            for part in slices(name):
                flat = part.detach().to("cpu", dtype).contiguous().view(-1)
                file.write(flat.view(torch.uint8).numpy().data)
                written += flat.numel()
            if written != torch.Size(shape).numel():
                raise ValueError(f"{name}: {written} elements written for shape {shape}")


class Checkpoint:
    """The tensors of a model folder (one safetensors file or several), opened lazily and read in slices of rows.

    name: what the user calls the model, for errors. Raises UserError when the folder has no safetensors or one is damaged.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._files: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                opened = safe_open(str(file), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise UserError(f"The weights of {name} cannot be read: {error}", where=str(file)) from error
            self._files.update(dict.fromkeys(opened.keys(), opened))
        if not self._files:
            raise UserError(f"The model {name} has no *.safetensors weights", where=str(folder))

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors calls it."""
        return str(self._files[name].get_slice(name).get_dtype())

    def slices(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor in slices of whole rows, about `SLICE` elements each."""
        shape = self.shape(name)
        if not shape:
            yield self._files[name].get_tensor(name)
            return
        whole = self._files[name].get_slice(name)
        rows = max(1, SLICE // max(1, torch.Size(shape[1:]).numel()))
        for first in range(0, shape[0], rows):
            yield whole[first : first + rows]

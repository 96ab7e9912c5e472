"""Weights and optimizer states that are cut over processes, in a checkpoint: each process writes the rows it holds, as safetensors, and
any number of processes reads them, each its own (torch.distributed.checkpoint; nothing is pickled).

The folder `weights` holds tensors under the names that they have in the model, `optimizer` those of a parameter's state as `<index>.<entry>`. What is
left of a state, step counts and groups, is small: the first process writes it as torch does. torch's `consolidate_safetensors_files` makes
whole tensors of either folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from stages.train.checkpoints import STATE

_FILE_BYTES = 1 << 27
"""torch makes up a file in memory, about twice."""


def write_rows(tensors: Mapping[str, torch.Tensor], folder: Path, file_bytes: int = _FILE_BYTES) -> None:
    """Write the rows that this process holds, what several hold once, in files of about `file_bytes`, flushed. Collective: what fails in one
    process is raised in all."""
    files, held = {}, 0
    for name, tensor in tensors.items():
        files[name] = held // file_bytes
        held += (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
    numbers = {file: number for number, file in enumerate(dict.fromkeys(files.values()), 1)}
    mapping = {name: numbers[file] for name, file in files.items()}  # the first process's counts
    writer = HuggingFaceStorageWriter(str(folder), mapping, save_distributed=True)
    _unwrapped(lambda: checkpoint.save(dict(tensors), storage_writer=writer))


def read_rows(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Read the rows that each of `tensors` holds here, in place. Collective, as `write_rows`; RuntimeError where one is not in the folder."""
    reader = HuggingFaceStorageReader(str(folder))
    _unwrapped(lambda: checkpoint.load(dict(tensors), storage_reader=reader))


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of its state_dict; a tied one once."""
    first: dict[int, str] = {}
    named = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in named.items() if first.setdefault(id(tensor), name) == name}


def parted_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(the tensors of its state that are cut, by name; its state_dict without them)."""
    found, tensors = optimizer.state_dict(), dict[str, torch.Tensor]()
    state: dict[Any, dict[str, Any]] = {}
    for index, entries in found["state"].items():
        cut = {key: value for key, value in entries.items() if isinstance(value, DTensor)}
        tensors |= {f"{index}.{key}": value for key, value in cut.items()}
        state[index] = {key: value for key, value in entries.items() if key not in cut}
    return tensors, {**found, "state": state}


def read_state(optimizer: torch.optim.Optimizer, folder: Path, small: str) -> dict[str, Any]:
    """The optimizer's state_dict in a checkpoint, written by rows or whole, as this process holds its parameters: whole or some rows.
    small: the file that torch wrote. Collective."""
    found = torch.load(folder / small, map_location="cpu", weights_only=True, mmap=True)
    saved = chain.from_iterable(group["params"] for group in found["param_groups"])
    params = dict(zip(saved, chain.from_iterable(group["params"] for group in optimizer.param_groups), strict=True))
    state: dict[Any, dict[str, Any]] = {
        index: {key: _as_held(value, params[index]) for key, value in entries.items()}
        for index, entries in found["state"].items()
    }
    if (folder / STATE).is_dir():
        tensors: dict[str, torch.Tensor] = {}
        for name, kind in HuggingFaceStorageReader(str(folder / STATE)).read_metadata().state_dict_metadata.items():
            assert isinstance(kind, TensorStorageMetadata)
            index, _, key = name.partition(".")
            like = params[int(index)].detach()
            tensors[name] = torch.empty_like(like, dtype=kind.properties.dtype, memory_format=torch.contiguous_format)
            state[int(index)][key] = tensors[name]
        read_rows(tensors, folder / STATE)
    return {**found, "state": state}


def _as_held(value: Any, param: torch.Tensor) -> Any:
    """Of a whole entry of a state, the rows that this process holds of its parameter."""
    if not isinstance(param, DTensor) or not isinstance(value, torch.Tensor) or value.shape != param.shape:
        return value
    return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)


def _unwrapped(call: Callable[[], object]) -> None:
    """What was raised, of the lowest process, instead of the BaseException that torch wraps it in."""
    try:
        call()
    except CheckpointException as wrapped:
        raise wrapped.failures[min(wrapped.failures)][0] from wrapped

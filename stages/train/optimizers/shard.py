"""Which rows of a parameter this process holds. Sharded parameters are those of FSDP2 (torch.distributed.fsdp.fully_shard):
DTensors cut along their rows, so that what is held is one run of entries of the whole.

What a transform needs of the whole parameter it asks of the other processes: sums of a few numbers, or of a q x I matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from schemas.errors import UserError

_INSTEAD = "Shard with FSDP2 (torch.distributed.fsdp.fully_shard), or use DistributedDataParallel."


@dataclass(frozen=True)
class LocalRows:
    """Rows `start` to `start + rows` of a parameter of shape `shape`.

    peers: the processes that hold the other rows; None when all rows are here. most: the largest number of entries any of
    them holds.
    """

    shape: torch.Size
    start: int
    rows: int
    most: int
    peers: dist.ProcessGroup | None = None
    layout: tuple[DeviceMesh, tuple[Placement, ...], tuple[int, ...]] | None = None

    @classmethod
    def of(cls, name: str, parameter: torch.Tensor) -> LocalRows:
        """Of a parameter, whole or a DTensor. Raises UserError, naming it, for one that was flattened or is cut along
        another dimension."""
        if is_flattened(parameter):
            raise flattened(name)
        if not isinstance(parameter, DTensor):
            rows = parameter.shape[0] if parameter.ndim else 1
            return cls(parameter.shape, 0, rows, parameter.numel())
        placements = parameter.placements
        cuts = [axis for axis, placement in enumerate(placements) if not isinstance(placement, Replicate)]
        if len(cuts) > 1 or any(not _by_rows(placements[axis]) for axis in cuts):
            raise UserError(
                f"{name} is cut as {placements}: merging and projecting need parameters that are cut by rows alone",
                where="params",
                fix=_INSTEAD,
            )
        mesh, total = parameter.device_mesh, parameter.shape[0] if parameter.ndim else 1
        count, rank = (mesh.size(cuts[0]), mesh.get_local_rank(cuts[0])) if cuts else (1, 0)
        step = math.ceil(total / count)
        start = min(rank * step, total)
        rows, held = min(step, total - start), parameter.to_local()
        if held.ndim and held.shape[0] != rows:
            raise UserError(f"{name} is cut unevenly: {held.shape[0]} of {total} rows are here", where="params")
        peers = mesh.get_group(cuts[0]) if count > 1 else None
        layout = (mesh, tuple(placements), parameter.stride())
        return cls(parameter.shape, start, rows, step * (parameter.numel() // max(total, 1)), peers, layout)

    @property
    def entries(self) -> tuple[int, int]:
        """First and last + 1 of the entries held, counted over the whole parameter."""
        row = math.prod(self.shape[1:])
        return self.start * row, (self.start + self.rows) * row

    @property
    def numel(self) -> int:
        """Entries of the whole parameter."""
        return math.prod(self.shape)

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """The rows held here of a tensor of the parameter's shape (a view)."""
        return whole if self.peers is None else whole[self.start : self.start + self.rows]

    def wrap(self, held: torch.Tensor) -> torch.Tensor:
        """A tensor of the rows held here in the parameter's own kind, for the optimizer's state."""
        if self.layout is None:
            return held
        mesh, placements, stride = self.layout
        return DTensor.from_local(held, mesh, placements, run_check=False, shape=self.shape, stride=stride)


def _by_rows(placement: Placement) -> bool:
    return type(placement) is ShardPlacement and placement.dim == 0  # not the strided kind tensor parallelism leaves


def flattened(name: str) -> UserError:
    """The error for a parameter whose shape is gone."""
    return UserError(
        f"{name} is a piece of a flattened buffer (DeepSpeed ZeRO or FSDP1): its rows and columns are gone, and merging and"
        " projecting need them",
        where="params",
        fix=_INSTEAD,
    )


def groups_of(tensor: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The processes that hold the other parts of a tensor, along each axis of them it is cut over; none for a whole one."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    cuts = [axis for axis, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    return tuple(mesh.get_group(axis) for axis in cuts if mesh.size(axis) > 1)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor this process holds; writes go through."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def add_up(tensor: torch.Tensor, peers: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum a tensor over the processes, in place; the same bits in each of them."""
    if peers is not None:
        dist.all_reduce(tensor, group=peers)
    return tensor


def before_me(counts: torch.Tensor, peers: dist.ProcessGroup | None) -> torch.Tensor:
    """Per entry of `counts`: the sum over the processes that hold lower rows."""
    if peers is None:
        return torch.zeros_like(counts)
    everyone = [torch.empty_like(counts) for _ in range(dist.get_world_size(peers))]
    dist.all_gather(everyone, counts, group=peers)
    return torch.stack(everyone)[: dist.get_rank(peers)].sum(0)


def is_flattened(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 or FSDP1 took the parameter's shape away."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_is_flat_param")

"""A model cut over the processes of a training with FSDP2 (torch.distributed.fsdp.fully_shard), and put together again.

accelerate offers FSDP2 on GPUs alone; torch's own call is the same on a CPU, where the tests are. The forward is the one of a
single process: autocast over float32 weights, gathered layer by layer.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stages.models.load import widen


def mesh_over(device: torch.device, copies: int) -> DeviceMesh:
    """All processes, in one row that shares the weights; copies > 1 (HSDP): so many rows, of neighbouring ranks, that each hold all of them."""
    processes = dist.get_world_size()
    if copies == 1:
        return dist.init_device_mesh(device.type, (processes,))
    return dist.init_device_mesh(device.type, (copies, processes // copies), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Cut the model's parameters by rows, in place, moving them to the mesh's device: one gathering per decoder layer, one for the rest.
    What each process holds is float32. Returns the model without parameters, for `unsharded`."""
    empty = copy.deepcopy(model, {id(p): _without_data(p) for p in model.parameters()})
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    widen(model)  # no sooner: see `load_to_cut`
    return empty


def unsharded(model: nn.Module, empty: nn.Module, keep: bool) -> nn.Module:
    """`empty` with the whole weights of the sharded model, on the CPU; as it is where not `keep`. Collective: one tensor at a time is
    whole on a device."""
    filled: dict[int, nn.Parameter] = {}
    for old, parameter in zip(empty.parameters(), model.parameters(), strict=True):
        full = _gathered(parameter)
        if keep:
            filled[id(old)] = nn.Parameter(full.cpu(), requires_grad=parameter.requires_grad)
    if not keep:
        return empty
    for module in empty.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, name, filled[id(parameter)])
    return empty.cpu()


def whole_weights(model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """The state_dict with whole tensors on the CPU; empty where not `keep` (processes that do not write). Collective: one tensor
    at a time is whole on a device."""
    seen: dict[int, torch.Tensor | None] = {}
    named = model.state_dict(keep_vars=True)  # tied weights are one tensor under two names
    for tensor in named.values():
        if id(tensor) not in seen:
            full = _gathered(tensor)
            seen[id(tensor)] = full.cpu() if keep else None
    return {name: kept for name, tensor in named.items() if (kept := seen[id(tensor)]) is not None}


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _without_data(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)

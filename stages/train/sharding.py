"""A model cut over the processes of a training with FSDP2 (torch.distributed.fsdp.fully_shard), and put together again.

accelerate offers FSDP2 on GPUs alone; torch's own call is the same on a CPU, where the tests are. The forward is the one of a
single process: autocast over float32 weights, gathered layer by layer.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stages.models.load import widen
from stages.train.optimizers.stream import write_stream


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


def unsharded(model: nn.Module, empty: nn.Module, dtype: torch.dtype, file: Path | None) -> nn.Module:
    """`empty` with the whole weights of the sharded model in `dtype`, mapped from `file`, which is written tensor by tensor and has no name
    any more on return; as it is where that is None (processes that do not write). Collective: one tensor at a time is whole in memory."""
    rows = dict(model.named_parameters())

    def whole(name: str) -> torch.Tensor:
        tensor = rows[name].detach().to(dtype)
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    if file is None:
        for name in rows:
            whole(name)
        return empty
    write_stream(file, {name: tuple(p.shape) for name, p in rows.items()}, dtype, lambda name: iter([whole(name)]), {})
    weights = load_file(file)
    file.unlink()
    filled = {
        id(old): nn.Parameter(weights[name], requires_grad=rows[name].requires_grad)
        for name, old in empty.named_parameters()
    }
    for module in empty.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, name, filled[id(parameter)])
    return empty.cpu()


def _without_data(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)

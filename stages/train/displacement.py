"""What an objective did to the weights: a copy of them before it, their change after it, its leak into protected subspaces.

The copy is a memory-mapped file: full fine-tuning holds float32 masters, and a second set of them may be the gigabytes that are
missing. Changes are taken matrix by matrix on the device that trains; a `Beat` is called between matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from stages.train.optimizers.change import Change
from stages.train.optimizers.stream import write_stream
from stages.train.optimizers.subspace import Protected

Beat = Callable[[], None]
"""Called after each matrix: reports progress, raises Stopped when the run was asked to stop."""
Weights = Mapping[str, torch.Tensor]


def remember(model: nn.Module, path: Path) -> Weights:
    """The model's matrices by name, written to `path` and memory-mapped from there, exactly as they are held."""
    matrices = {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}
    dtypes = {p.dtype for p in matrices.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # which holds bfloat16 and float16
    shapes = {name: tuple(p.shape) for name, p in matrices.items()}
    write_stream(path, shapes, dtype, lambda name: iter([matrices[name]]), {})
    return load_file(path)


def merged(trained: Any) -> Any:
    """The model without its adapter, which is merged into the weights."""
    return trained.merge_and_unload() if isinstance(trained, PeftModel) else trained


def changed(trained: Any, before: Weights, most: Callable[[torch.Size], int], beat: Beat) -> dict[str, Change]:
    """What happened to every matrix, `most(shape)` directions of it: from the adapter's factors, or against `before`."""
    changes: dict[str, Change] = {}
    if isinstance(trained, PeftModel):
        layers: dict[str, Any] = {n: m for n, m in trained.named_modules() if isinstance(m, LoraLayer)}
        for name, layer in layers.items():
            (adapter,) = layer.lora_A.keys()
            b_OR = layer.lora_B[adapter].weight.detach().double() * layer.scaling[adapter]
            a_RI = layer.lora_A[adapter].weight.detach()
            weight = name.removeprefix("base_model.model.") + ".weight"
            changes[weight] = Change.of_factors(weight, b_OR, a_RI, most(torch.Size((len(b_OR), a_RI.shape[1]))))
            beat()
        return changes
    for name, parameter in trained.named_parameters():
        if name in before:
            difference = parameter.detach().float() - before[name].to(parameter.device, torch.float32)
            changes[name] = Change.of(name, difference, most(parameter.shape))
            beat()
    return changes


@contextmanager
def cut_to(model: nn.Module, before: Weights, changes: Mapping[str, Change], q: int) -> Iterator[None]:
    """The model with every change cut to its q leading directions; its weights are restored."""
    parameters = {name: p for name, p in model.named_parameters() if name in changes}
    after = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data.copy_(before[name].double() + changes[name].first(q).matrix())
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(after[name])


def leaks(
    model: nn.Module, before: Weights, protected: Protected, export: torch.dtype, beat: Beat
) -> tuple[float, float]:
    """The share of the change that lies in the protected subspaces, |inside| / |change| over all protected matrices together:
    of the weights as they are held, and as they are exported, in `export`: rounding to bfloat16 is in no subspace. (Not the largest of
    a matrix: one whose every update was projected away has changed by rounding alone.)"""
    inside, whole = [0.0, 0.0], [0.0, 0.0]
    for name, parameter in model.named_parameters():
        if protected.covers(name):
            start = before[name].to(parameter.device, torch.float64)
            for at, weights in enumerate((parameter.detach(), parameter.detach().to(export))):
                change = weights.double() - start
                whole[at] += float(change.square().sum())
                inside[at] += (protected.leak(name, change) ** 2) * float(change.square().sum())
            beat()
    held, exported = (math.sqrt(i / w) if w else 0.0 for i, w in zip(inside, whole, strict=True))
    return held, exported

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

from schemas.errors import UserError
from stages.models.merging import merge_checked
from stages.train.optimizers.change import Change
from stages.train.optimizers.stream import write_stream
from stages.train.optimizers.subspace import Protected
from stages.train.optimizers.trust import exact

Beat = Callable[[], None]
"""Called after each matrix: reports progress, raises Stopped when the run was asked to stop."""
Announce = Callable[[int, str], Beat]
"""Says that so many units of work follow, and gives their `Beat`."""
Weights = Mapping[str, torch.Tensor]
_ROUNDING = 1e-4
"""By what share of the radius a change may be above it: W - W_start is rounded with the weights."""


def remember(model: nn.Module, path: Path) -> Weights:
    """The model's matrices by name, written to `path` and memory-mapped from there, exactly as they are held."""
    matrices = {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}
    dtypes = {p.dtype for p in matrices.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # which holds bfloat16 and float16
    shapes = {name: tuple(p.shape) for name, p in matrices.items()}
    write_stream(path, shapes, dtype, lambda name: iter([matrices[name]]), {})
    return load_file(path)


def without_adapter(trained: Any) -> Any:
    """The model without its adapter, which is merged into the weights. Raises UserError when it then computes something else."""
    return merge_checked(trained, "that was trained") if isinstance(trained, PeftModel) else trained


def bounded(model: nn.Module, before: Weights, radius: float, announce: Announce) -> tuple[float, int]:
    """(the largest spectral norm of a matrix's change, how many were above `radius`): those are scaled back to it, in place.

    The optimizer's trust region estimates norms from below; these are exact. Raises UserError, naming the matrix, for a change that
    is not finite.
    """
    matrices = {name: p for name, p in model.named_parameters() if name in before}
    beat, largest, above = announce(len(matrices), "matrix"), 0.0, 0
    for name, parameter in matrices.items():
        start = before[name].to(parameter.device, torch.float32)
        change = parameter.detach().float() - start
        norm = float(change.norm())
        if not math.isfinite(norm):
            raise UserError(f"The change of {name} is not a finite matrix", where="train.orthalign.trust_radius")
        if norm > min(radius, largest):  # else the Frobenius norm, an upper bound, says enough
            norm = exact(change)
            largest = max(largest, norm)
        if norm > radius * (1 + _ROUNDING):
            parameter.data.copy_(start + change * (radius / norm))
            above += 1
        beat()
    return largest, above


def changed(trained: Any, before: Weights, most: Callable[[torch.Size], int], announce: Announce) -> dict[str, Change]:
    """What happened to every matrix, `most(shape)` directions of it: from the adapter's factors, or against `before`. Matrices of
    which no direction is wanted are left out."""
    if isinstance(trained, PeftModel):
        modules = ((name, module) for name, module in trained.named_modules() if isinstance(module, LoraLayer))
        layers = {name.removeprefix("base_model.model.") + ".weight": _Factors(layer) for name, layer in modules}
        shapes = {name: layer.shape for name, layer in layers.items()}

        def change(name: str, q: int) -> Change:
            return Change.of_factors(name, layers[name].b_OR(), layers[name].a_RI(), q)
    else:
        weights = {name: p.detach() for name, p in trained.named_parameters() if name in before}
        shapes = {name: p.shape for name, p in weights.items()}

        def change(name: str, q: int) -> Change:
            now = weights[name]
            return Change.of(name, now.float() - before[name].to(now.device, torch.float32), q)

    wanted = {name: q for name, shape in shapes.items() if (q := most(shape))}
    beat, changes = announce(len(wanted), "matrix"), {}
    for name, q in wanted.items():
        changes[name] = change(name, q)
        beat()
    return changes


class _Factors:
    """s B [O, r] and A [r, I] of a layer with one adapter; shape: of their product."""

    def __init__(self, layer: Any) -> None:
        (adapter,) = layer.lora_A.keys()
        self._b, self._a = layer.lora_B[adapter].weight.detach(), layer.lora_A[adapter].weight.detach()
        self._scaling = layer.scaling[adapter]
        self.shape = torch.Size((self._b.shape[0], self._a.shape[1]))

    def b_OR(self) -> torch.Tensor:
        return self._b.double() * self._scaling

    def a_RI(self) -> torch.Tensor:
        return self._a


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

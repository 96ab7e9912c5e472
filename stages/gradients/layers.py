"""Which parameters a sketch covers: the text model's linear layers, and an account of everything left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.gradients.experts import Stack, keeps_rows, stacks
from stages.gradients.probe import unsketchable
from stages.gradients.projections import LayerShape
from stages.models.text_model import backbone, text_parameters

Of = Literal["weights", "adapter"]
"""What the gradient is of: the model's own weights, or the matrices A and B of a LoRA adapter on it."""

_PLAIN = (nn.Linear, Conv1D)
_ROUTED = "experts"
"""Routed experts are taken by patterns that say so; an experts module has this in its name."""
_WORTH_NAMING = 0.001
"""Least share of the model's parameters for a kind of parameter to be named in a summary."""
_NAMED = 3


@dataclass(frozen=True)
class Coverage:
    """What the sketch covers. Counts are of distinct parameters of the text model: a tied embedding and head count once.

    `left_out` maps a parameter's name to its number of entries, biases of sketched layers included
    (the sketch is of weight matrices only); `unsketchable` a linear layer's name to why it cannot be taken;
    `routed`: parameters of routed experts that no pattern asked for.
    """

    layers: tuple[LayerShape, ...]
    total_parameters: int
    covered_parameters: int
    left_out: dict[str, int]
    unsketchable: dict[str, str] = field(default_factory=dict)
    routed: int = 0

    @property
    def share(self) -> float:
        """Share of the model's parameters whose gradient the sketch sees."""
        return self.covered_parameters / self.total_parameters

    def summary(self) -> str:
        """For logs and the report: shares by kind of parameter, largest first, and why layers cannot be taken."""
        by_kind: dict[str, int] = {}
        for name, count in self.left_out.items():
            kind = ".".join(part for part in name.split(".") if not part.isdigit())
            by_kind[kind] = by_kind.get(kind, 0) + count
        ranked = sorted(by_kind.items(), key=lambda item: (-item[1], item[0]))
        large = [(kind, count) for kind, count in ranked if count >= _WORTH_NAMING * self.total_parameters]
        parts = [f"{kind} {count / self.total_parameters:.1%}" for kind, count in large]
        if small := sum(count for _, count in ranked[len(large) :]):
            parts.append(f"biases, norms and the like {small / self.total_parameters:.2%}")
        left = "; left out: " + ", ".join(parts) if parts else ""
        said = f"{len(self.layers)} layers, {self.share:.1%} of {self.total_parameters:,} parameters{left}"
        if self.routed:
            said += (
                f"; routed experts hold {self.routed / self.total_parameters:.1%} and are left out unless "
                "gradients.sketch.include has a pattern such as '*.experts.*' beside '*'"
            )
        for reason, count in Counter(self.unsketchable.values()).most_common(_NAMED):
            first = next(name for name, why in self.unsketchable.items() if why == reason)
            said += f"; cannot be sketched: {count} layers (first {first}), which {reason}"
        return said


def select_layers(
    model: PreTrainedModel, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), of: Of = "weights"
) -> Coverage:
    """Choose the linear layers to sketch by glob patterns over qualified names (`*.mlp.*`,
    `model.layers.0.*`). Of an adapter: its A and B (`*.lora_A.*`), shares counted within the adapter.

    nn.Linear and transformers' Conv1D inside the text model, in module order, that a tiny pass shows to be sketchable
    (see `probe`). Layers that share one weight are one layer, under the first one's name. Routed experts' stacked weights
    are layers too (see `experts`), and only patterns with "experts" in them take them. Embeddings, norms and
    the language-model head are never taken: they are not backbone matrices and the head runs outside the hooks.

    Raises ValueError for adapters that were not merged (of the weights) or that are missing or no LoRA (of the adapter),
    for a pattern that matches nothing or only what cannot be sketched, and when nothing is left to sketch; `Unprobed`
    where the pass cannot be made.
    """
    refuse_adapters(model, of)
    wanted = {name: m for name, m in linear_layers(model).items() if of == "weights" or _is_adapter(name)}
    stacked, refused = _stacked(model) if of == "weights" else ({}, {})
    if not wanted and not stacked:
        raise ValueError(f"nothing can be sketched: the backbone of {type(model).__name__} has no linear layer")
    refused |= _not_plain(model, wanted)
    refused |= unsketchable(model, {name: modules for name, modules in wanted.items() if name not in refused})
    shapes = {name: weight_shape(modules[0]) for name, modules in wanted.items()}
    shapes |= {name: stack.shape for name, stack in stacked.items()}
    names = [*shapes, *(name for name in refused if name not in shapes)]
    open_to = [name for name in names if not _routed(name)]
    taken = set[str]()
    for pattern in include:
        taken |= _matching(pattern, names if _ROUTED in pattern else open_to, refused)
    for pattern in exclude:
        taken -= _matching(pattern, names)
    layers = tuple(LayerShape(name, *shape) for name, shape in shapes.items() if name in taken - set(refused))
    if not layers:
        raise ValueError(_nothing(refused))
    weights = {id(stacked[s.name].weight if s.name in stacked else wanted[s.name][0].weight) for s in layers}
    counts = {
        name: (id(parameter), parameter.numel())
        for name, parameter in text_parameters(model)
        if of == "weights" or _is_adapter(name)
    }
    total = sum(count for _, count in counts.values())
    covered = sum(count for key, count in counts.values() if key in weights)
    left_out = {name: count for name, (key, count) in counts.items() if key not in weights}
    routed = sum(count for name, count in left_out.items() if name in stacked or _routed(name))
    reasons = {name: why for name, why in refused.items() if name in taken}
    return Coverage(layers, total, covered, left_out, reasons, routed)


def linear_layers(model: PreTrainedModel) -> dict[str, list[Any]]:
    """Qualified name -> the linear layers of the text model that share one weight, in module order, the head excluded;
    the name is the first one's."""
    head = model.get_output_embeddings()
    inside = {id(module) for module in backbone(model).modules()}
    found: dict[str, list[Any]] = {}
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        if id(module) in inside and module is not head and isinstance(module, _PLAIN):
            found.setdefault(first.setdefault(id(module.weight), name), []).append(module)
    return found


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(O, I) of a linear layer; Conv1D stores its weight transposed."""
    if isinstance(module, Conv1D):
        return int(module.nf), int(module.nx)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{type(module).__name__} is not a linear layer")
    return module.out_features, module.in_features


def stacked_layers(model: PreTrainedModel) -> dict[str, Stack]:
    """Qualified name -> the stacked weights of routed experts whose tokens keep their rows."""
    return _stacked(model)[0]


def refuse_adapters(model: nn.Module, of: Of = "weights") -> None:
    """Raise ValueError for adapters on a model whose weights are asked for, and for a missing or unsuitable adapter."""
    if of == "adapter" and not any(_is_adapter(name) for name, _ in model.named_parameters()):
        raise ValueError("the model has no LoRA adapter")
    for name, module in model.named_modules():
        kind = type(module)
        if of == "weights" and (kind.__module__.split(".")[0] == "peft" or hasattr(module, "lora_A")):
            raise ValueError(
                f"{name or 'the model'} is a PEFT adapter ({kind.__name__}): merge it into the "
                "weights first (merge_and_unload), or take the gradient of the adapter"
            )
        if len(getattr(module, "lora_magnitude_vector", ())):
            raise ValueError(f"{name} is a DoRA layer: its magnitudes are no linear layer; use a plain LoRA adapter")


def _stacked(model: PreTrainedModel) -> tuple[dict[str, Stack], dict[str, str]]:
    """(stacked weights that can be sketched, why others cannot) by qualified parameter name."""
    found: dict[str, Stack] = {}
    refused: dict[str, str] = {}
    base = backbone(model)
    inside = {id(module) for module in base.modules()}
    for name, module in model.named_modules():
        if id(module) not in inside:
            continue
        if keeps_rows(module):
            found |= {stack.name: stack for stack in stacks(name, module)}
        elif _routed(f"{name}."):
            reason = f"belongs to routed experts whose tokens cannot be told apart ({type(module).__name__})"
            refused |= {f"{name}.{key}": reason for key, p in module.named_parameters(recurse=False) if p.dim() == 3}
    return found, refused


def _not_plain(model: PreTrainedModel, layers: Mapping[str, Sequence[nn.Module]]) -> dict[str, str]:
    """Why a layer is no matrix product of a weight of its own, by name, where it is not."""
    linear = {id(module) for modules in layers.values() for module in modules}
    others: dict[int, str] = {}
    for name, module in model.named_modules():
        if id(module) not in linear:
            others |= {id(parameter): name or "the model" for parameter in module.parameters(recurse=False)}
    found: dict[str, str] = {}
    for name, modules in layers.items():
        odd = [type(module).__name__ for module in modules if not _is_plain(module)]
        if odd:
            found[name] = f"is no plain linear layer ({odd[0]})"
        elif _routed(name):
            found[name] = "belongs to routed experts whose tokens cannot be told apart"
        elif (other := others.get(id(modules[0].weight))) is not None:
            found[name] = f"has the weight of {other}"
    return found


@torch.no_grad()
def _is_plain(module: Any) -> bool:
    """Whether a layer computes x W^T + b from a weight it holds; classes with a forward of their own are tried."""
    if "weight" not in module._parameters:
        return False
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    if isinstance(module, Conv1D):
        return False
    weight_OI: Tensor = module.weight
    if not weight_OI.is_floating_point() or weight_OI.dim() != 2:
        return False
    x_2I = torch.linspace(-1.0, 1.0, 2 * weight_OI.shape[1], device=weight_OI.device, dtype=weight_OI.dtype)
    x_2I = x_2I.view(2, weight_OI.shape[1])
    try:
        ours, theirs = nn.functional.linear(x_2I, weight_OI, module.bias), module(x_2I)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
        return False
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return False
    return weight_OI.is_meta or torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3)


def _routed(name: str) -> bool:
    """Whether a layer or parameter lies in a module called `experts` (shared experts are called otherwise)."""
    return _ROUTED in name.split(".")[:-1]


def _matching(pattern: str, names: Sequence[str], refused: Mapping[str, str] | None = None) -> set[str]:
    """The names that a pattern matches. Raises ValueError when there are none, or only refused ones."""
    found = {name for name in names if fnmatchcase(name, pattern)}
    if not found:
        first = next(iter(names), "none")
        raise ValueError(f"layer pattern {pattern!r} matches none of the {len(names)} linear layers (first: {first})")
    if refused and found <= set(refused):
        first = min(found, key=names.index)
        raise ValueError(f"layer pattern {pattern!r} matches only what cannot be sketched: {first} {refused[first]}")
    return found


def _nothing(refused: Mapping[str, str]) -> str:
    said = "nothing can be sketched: the patterns leave no linear layer"
    first = next(iter(refused), None)
    return said if first is None else f"{said} (left out: {first} {refused[first]})"


def _is_adapter(name: str) -> bool:
    """Whether a module or parameter belongs to an adapter (PEFT's names: lora_A, lora_embedding_B, modules_to_save)."""
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))

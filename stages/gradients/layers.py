"""Which parameters a sketch covers: the backbone's linear layers, and an account of everything left
out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.gradients.projections import LayerShape

Of = Literal["weights", "adapter"]
"""What the gradient is of: the model's own weights, or the matrices A and B of a LoRA adapter on it."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WORTH_NAMING = 0.001
"""Least share of the model's parameters for a kind of parameter to be named in a summary."""


@dataclass(frozen=True)
class Coverage:
    """What the sketch covers. Counts are of distinct parameters: a tied embedding and head count
    once.

    `left_out` maps a parameter's name to its number of entries, biases of sketched layers included
    (the sketch is of weight matrices only).
    """

    layers: tuple[LayerShape, ...]
    total_parameters: int
    covered_parameters: int
    left_out: dict[str, int]

    @property
    def share(self) -> float:
        """Share of the model's parameters whose gradient the sketch sees."""
        return self.covered_parameters / self.total_parameters

    def summary(self) -> str:
        """One sentence for logs and the report: shares by kind of parameter, largest first."""
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
        return f"{len(self.layers)} layers, {self.share:.1%} of {self.total_parameters:,} parameters{left}"


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head: what turns token ids into final hidden states (transformers'
    `base_model`)."""
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model:
        raise ValueError(f"{type(model).__name__} is not a backbone under a language-model head")
    return base


def select_layers(
    model: PreTrainedModel, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), of: Of = "weights"
) -> Coverage:
    """Choose the linear layers to sketch by glob patterns over qualified names (`*.mlp.*`,
    `model.layers.0.*`). Of an adapter: its A and B (`*.lora_A.*`), shares counted within the adapter.

    nn.Linear and transformers' Conv1D inside the backbone, in module order. Embeddings, norms and
    the language-model head are never taken: they are not backbone matrices and the head runs
    outside the hooks.

    Raises ValueError for mixture-of-experts models (routed tokens break the row bookkeeping), for
    adapters that were not merged (of the weights) or that are missing or no LoRA (of the adapter), for a
    pattern that matches nothing, and when nothing is left to sketch.
    """
    refuse_unsupported(model, of)
    candidates = {name: m for name, m in linear_layers(model) if of == "weights" or _is_adapter(name)}
    if not candidates:
        raise ValueError(f"nothing can be sketched: the backbone of {type(model).__name__} has no linear layer")
    for pattern in [*include, *exclude]:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise ValueError(
                f"layer pattern {pattern!r} matches none of the {len(candidates)} linear layers "
                f"(first: {next(iter(candidates), 'none')})"
            )
    chosen = {
        name: module
        for name, module in candidates.items()
        if any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)
    }
    if not chosen:
        raise ValueError("nothing can be sketched: the patterns leave no linear layer")
    shapes = tuple(LayerShape(name, *weight_shape(module)) for name, module in chosen.items())

    taken = {id(module.weight) for module in chosen.values()}
    distinct: dict[int, tuple[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if of == "weights" or _is_adapter(name):
            distinct.setdefault(id(parameter), (name, parameter))
    total = sum(parameter.numel() for _, parameter in distinct.values())
    covered = sum(parameter.numel() for key, (_, parameter) in distinct.items() if key in taken)
    left_out = {name: p.numel() for key, (name, p) in distinct.items() if key not in taken}
    return Coverage(shapes, total, covered, left_out)


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """(qualified name, module) of every linear layer of the backbone, in module order, the head
    excluded."""
    head = model.get_output_embeddings()
    inside = {id(module) for module in backbone(model).modules()}
    for name, module in model.named_modules():
        if id(module) in inside and module is not head and isinstance(module, (nn.Linear, Conv1D)):
            yield name, module


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(O, I) of a linear layer; Conv1D stores its weight transposed."""
    if isinstance(module, Conv1D):
        return int(module.nf), int(module.nx)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{type(module).__name__} is not a linear layer")
    return module.out_features, module.in_features


def _is_adapter(name: str) -> bool:
    """Whether a module or parameter belongs to an adapter (PEFT's names: lora_A, lora_embedding_B, modules_to_save)."""
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def refuse_unsupported(model: nn.Module, of: Of = "weights") -> None:
    """Raise ValueError for models whose per-pair gradient this version cannot sketch."""
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
        three_d = [
            key
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.dim() >= 3 and not isinstance(module, _CONVOLUTIONS)
        ]
        routed = "Router" in kind.__name__ or "SparseMoe" in kind.__name__
        if three_d or routed or name.split(".")[-1] == "experts":
            found = f"{name}.{three_d[0]}" if three_d else name
            raise ValueError(
                f"{found} ({kind.__name__}) looks like a mixture of experts: tokens are routed to "
                "stacked expert weights, which sketches do not support; use a dense model"
            )

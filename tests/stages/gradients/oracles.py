"""What hooks and sketches are held against: pair gradients by ordinary automatic differentiation, projected as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stages.gradients.logprobs import Head, completion_logprobs
from stages.gradients.projections import LayerShape, LayerSlot, Scales, SketchLayout, apply_side, projection, side_maps
from stages.gradients.rows import Pair, RowBatch


def exact_pair_gradient(model: PreTrainedModel, pair: Pair, layers: Sequence[LayerShape]) -> dict[str, Tensor]:
    """d = grad s(y_w) - grad s(y_l) as {layer name: G (O x I)}, in the weights' dtype and on their
    device.

    Holds one gradient of every layer at once: O x I numbers each. No .grad is written; eval mode,
    and the model's mode and requires_grad flags are restored.
    """
    modules = dict(model.named_modules())
    weights = [modules[layer.name].weight for layer in layers]
    before = [(p, p.requires_grad) for p in model.parameters()]
    training = model.training
    model.eval()
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        head = Head.of(model)
        with torch.enable_grad():
            batch = RowBatch.build(pair.rows, head.weight.device)
            chosen, rejected = completion_logprobs(model, batch, head).sum(dim=1)
            gradients = torch.autograd.grad(chosen - rejected, weights)
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
        model.train(training)
    return {
        layer.name: as_out_in(modules[layer.name], gradient) for layer, gradient in zip(layers, gradients, strict=True)
    }


def flatten(gradients: dict[str, Tensor]) -> Tensor:
    """All layers as one vector [sum of O * I], in the dictionary's order."""
    return torch.cat([gradient.reshape(-1) for gradient in gradients.values()])


def as_out_in(module: nn.Module, weight_like: Tensor) -> Tensor:
    """View a tensor shaped like the module's weight as (O x I)."""
    return weight_like.T if isinstance(module, Conv1D) else weight_like


def layer_projections(seed: int, slot: LayerSlot) -> tuple[Tensor, Tensor]:
    """(P_o [P, O], P_i [P, I]) of one layer, float32 on the CPU; of a side that is not projected the identity."""
    found = []
    for side, width in (("out", slot.out_width), ("in", slot.in_width)):
        drawn = side in slot.sides
        found.append(projection(seed, slot.name, side, slot.p, width) if drawn else torch.eye(width))
    return found[0], found[1]


def project_gradients(
    layout: SketchLayout, seed: int, gradients: Iterable[tuple[str, Tensor]], scales: Scales | None = None
) -> Tensor:
    """Sketch [dim] of given full gradients G (O x I) by name."""
    given, parts = dict(gradients), list[Tensor]()
    for slot in layout.layers:
        gradient_OI = given[slot.name]
        assert tuple(gradient_OI.shape) == (slot.out_width, slot.in_width), slot.name
        out, in_ = (None if m is None else m.to(gradient_OI) for m in side_maps(seed, slot, scales))
        parts.append(apply_side(apply_side(gradient_OI, in_).T, out).T.reshape(-1))
    return torch.cat(parts)

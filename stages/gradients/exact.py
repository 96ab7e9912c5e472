"""Exact pair gradients by ordinary automatic differentiation: for tests and small models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.gradients.layers import as_out_in
from stages.gradients.logprobs import Head, completion_logprobs
from stages.gradients.projections import LayerShape
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

"""Scores of the weights' entries or rows, and the masks made from them. docs/methods.md section 7."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from schemas.errors import UserError
from stages.train.optimizers.active import ActiveEntries, Unit, select_top
from stages.train.optimizers.subspace import is_stack


def per_unit(scores: torch.Tensor, unit: Unit) -> torch.Tensor:
    """Scores of entries as they are, or the mean of each row: [O, 1], in a stack of experts [E, O, 1]; a vector is one row."""
    if unit == "weight" or not scores.ndim:
        return scores
    if is_stack(scores):
        return scores.mean(dim=-1, keepdim=True)
    return scores.mean(dim=tuple(range(1, scores.ndim)) if scores.ndim > 1 else 0, keepdim=True)


def refuse_transposed(model: nn.Module) -> None:
    """Raise UserError for weights whose rows are no outputs: stored [I, O] (GPT-2's Conv1D), or in stacks [E, I, O] (gpt_oss)."""
    for name, module in model.named_modules():
        if isinstance(module, Conv1D) or getattr(module, "is_transposed", False) is True:
            raise UserError(
                f"{name} ({type(module).__name__}) stores its weights transposed: a row is what one input goes to, no neuron",
                where="train.allo.unit: row",
                fix="Set train.allo.unit: weight.",
            )


def select_entries(
    parameters: Mapping[str, nn.Parameter],
    score: Callable[[str], torch.Tensor],
    share: float,
    unit: Unit,
    field: str,
    allow_empty: bool,
) -> tuple[ActiveEntries, str]:
    """(the masks of the `share` of entries or rows with the largest scores over all parameters, a line for people).

    score: scores of the entries of a named parameter. field: the config's name of `share`, for errors. Raises UserError, naming the
    matrix, when one gets nothing and that is not allowed; vectors (norms, biases) may go without.
    """
    selection = select_top(parameters, lambda name: per_unit(score(name), unit), share)
    empty = [name for name, p in parameters.items() if p.ndim > 1 and not bool(selection.masks[name].any())]
    if empty and not allow_empty:
        raise UserError(
            f"the largest {share:g} of all {unit}s leave {len(empty)} of the matrices without any, for example {empty[0]}",
            where=f"train.allo.{field}",
            fix="Raise it, or set train.allo.allow_empty_layers: true: those matrices are then not trained.",
        )
    active = ActiveEntries(selection.masks)
    entries = sum(p.numel() for p in parameters.values())
    trained = sum(active.count(name, p.numel()) for name, p in parameters.items())
    line = f"{field} {share:g}: {trained:,} of {entries:,} weights are trained"
    if selection.kept < selection.wanted:
        line += f"; only {selection.kept:,} {unit}s have a score above 0"
    if empty:
        line += f"; {len(empty)} matrices have none"
    return active, line

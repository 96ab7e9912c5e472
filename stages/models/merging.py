"""An adapter into its model's weights, checked: the merged model must say what model and adapter said together."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from schemas.errors import UserError, first_line, foreign

_SHOWN = 3
_TOKENS = 16
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_HALF = 1e-1
"""Largest difference of a logit, relative to the largest logit, that rounding explains."""


def with_adapter(model: Any, folder: Path, name: str) -> Any:
    """The PEFT model of a base model and an adapter's folder.

    Raises UserError for an adapter that does not fit the model: tensors of other shapes, that are missing (PEFT would leave them as
    before training), or that have no place in it (PEFT would leave them out).
    """
    from peft import PeftModel

    where, fix = str(folder / "adapter_config.json"), "Check its base_model_name_or_path, or save the adapter again."

    def misfit(error: Exception) -> UserError:
        if isinstance(error, KeyError):  # of a module that is saved whole
            return lacks([str(error.args[0])])
        shapes = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), first_line(error))
        return UserError(f"The adapter {name} does not fit its base model: {shapes}", where=where, fix=fix)

    def lacks(tensors: list[str]) -> UserError:
        return UserError(
            f"The adapter {name} lacks tensors that its config names: {', '.join(tensors)[:300]}", where=where, fix=fix
        )

    with foreign(misfit), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that are missing: refused below
        adapted = PeftModel.from_pretrained(model, str(folder))
        found = adapted.load_adapter(str(folder), "default")  # what the first time found is not given out
    if found.missing_keys:
        raise lacks(list(found.missing_keys))
    if other := sorted(found.unexpected_keys):
        raise UserError(
            f"The adapter {name} is of another base model, or of other settings: {len(other)} of its tensors have no place in this one "
            f"({', '.join(other[:_SHOWN])})",
            where=where,
            fix=fix,
        )
    return adapted


@torch.no_grad()
def merge_checked(adapted: Any, name: str) -> Any:
    """The base model of a PEFT model with its adapter merged into the weights. Uses the PEFT model up.

    A head and embeddings that share one weight are untied when only one of them is adapted, as the adapter computes.
    Raises UserError, with the difference, when logits on a short text are not those of the unmerged model.
    """

    def unmergeable(error: Exception) -> UserError:
        return UserError(
            f"The adapter {name} cannot be merged: {first_line(error)}",
            where="the adapter's adapter_config.json",
            fix="Merge it where it was made, or train one that PEFT can merge (LoRA without lora_bias).",
        )

    training = adapted.training
    adapted.eval()
    with foreign(unmergeable):
        want_TV = _logits(adapted)
        untie_adapted(adapted)
        merged = adapted.merge_and_unload(safe_merge=True)
    off = float((_logits(merged) - want_TV).abs().max() / want_TV.abs().max().clamp_min(1e-6))
    merged.train(training)
    tolerance = _TOLERANCE.get(next(merged.parameters()).dtype, _TOLERANCE_HALF)
    if not off <= tolerance:  # NaN included
        raise UserError(
            f"The adapter {name} cannot be merged into its model: logits of the merged model differ by {off:.1%} from "
            "those of model and adapter",
            where="the adapter's adapter_config.json",
            fix="It changes something that its base model shares between layers or computes otherwise: adapt other modules "
            "(target_modules: all-linear), or merge it where it was made.",
        )
    return merged


def untie_adapted(adapted: Any) -> bool:
    """Give head and embeddings of a tied model a weight each where an adapter changes one of them; whether it did."""
    model = adapted.get_base_model()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not any(_is_adapted(module) for module in (head, embeddings)):
        return False
    owners = [_owner(module) for module in (head, embeddings)]
    if owners[0] is None or owners[1] is None or owners[0].weight is not owners[1].weight:
        return False
    weight = owners[0].weight
    owners[0].weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    return True


def _is_adapted(module: nn.Module) -> bool:
    """Whether PEFT wrapped it."""
    return type(module).__module__.split(".")[0] == "peft"


def _owner(module: Any) -> Any:
    """The layer under PEFT's wrapper that holds the weight."""
    while _is_adapted(module):
        module = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
    return module


def _logits(model: Any) -> torch.Tensor:
    """[T, V] float32 on the same short text for both; ids spread over the vocabulary."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids_1T = torch.arange(1, _TOKENS + 1, device=next(model.parameters()).device)[None] * 7919 % rows
    logits_TV: torch.Tensor = model(input_ids=ids_1T, use_cache=False).logits[0].float()
    return logits_TV

"""The language model inside a model: of a multimodal wrapper the decoder that reads text, of others all there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)


def auto_class(config: PretrainedConfig) -> Any:
    """The transformers class that makes a language model of a config: causal, or a wrapper that also reads images."""
    causal = type(config) in AutoModelForCausalLM._model_mapping
    wrapped = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if wrapped and not causal else AutoModelForCausalLM


def classifier_class(config: PretrainedConfig) -> Any:
    """The transformers class that makes a sequence classifier of a config."""
    return AutoModelForSequenceClassification


def labels_of(config: PretrainedConfig) -> tuple[str, ...]:
    """The names of a classifier's heads."""
    names: Any = config.id2label or {0: "LABEL_0"}
    return tuple(names[number] for number in sorted(names))


def is_wrapper(model: PreTrainedModel) -> bool:
    """Whether the language model is one part of several (towers for images, sound, …)."""
    return model.config.get_text_config() is not model.config


def backbone(model: PreTrainedModel) -> nn.Module:
    """The text model without its head: what turns token ids into final hidden states. Raises ValueError when there is none."""
    found: Any = getattr(model, "base_model", None)
    if found is model:
        found = next((child for child in model.children() if isinstance(child, PreTrainedModel)), None)
    if is_wrapper(model):
        found = model.get_decoder()
        if isinstance(found, PreTrainedModel) and found.get_output_embeddings() is not None:
            found = found.base_model
    if not isinstance(found, nn.Module) or found is model or found is model.get_output_embeddings():
        raise ValueError(f"{type(model).__name__} is not a backbone under a language-model head")
    return found


def text_parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the text model and its head, each parameter once."""
    inside = None
    if is_wrapper(model):
        parts = [backbone(model), model.get_input_embeddings(), model.get_output_embeddings()]
        inside = {id(p) for part in parts if part is not None for p in part.parameters()}
    for name, parameter in model.named_parameters():
        if inside is None or id(parameter) in inside:
            yield name, parameter


def drop_towers(model: PreTrainedModel) -> int:
    """Free the weights that text never uses, for a model that only reads text; returns their number of entries."""
    kept = {id(parameter) for _, parameter in text_parameters(model)}
    towers = [
        (name, module)
        for name, module in model.named_modules()
        if (mine := list(module.parameters())) and not any(id(p) in kept for p in mine)
    ]
    dropped = 0
    for name, module in towers:
        if any(name.startswith(f"{other}.") for other, _ in towers):
            continue  # goes with the tower it is part of
        dropped += sum(parameter.numel() for parameter in module.parameters())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, None)
    return dropped

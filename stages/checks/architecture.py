"""A model looked at without its weights: do its files fit it, what would a sketch cover. Seconds, before anything is paid for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import torch
from transformers import PreTrainedModel

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.checks.finding import Finding
from stages.contract import ModelRef
from stages.gradients.layers import Coverage, select_layers
from stages.gradients.logprobs import Head
from stages.gradients.probe import Unprobed
from stages.gradients.projections import SketchLayout
from stages.models.device import refuse_float16
from stages.models.folder import is_quantised
from stages.models.load import no_adapter
from stages.models.strict import skeleton
from stages.models.text_model import text_parameters


@dataclass(frozen=True)
class Look:
    """text_bytes: of the weights that reading text takes. coverage: what a sketch covers; None when it was not asked for or
    cannot be known without weights. note: what to tell."""

    text_bytes: int
    coverage: Coverage | None
    note: str


def look(model: ModelRef, config: RunConfig, sketched: bool) -> Look:
    """Raises UserError when the model's files do not fit it or, if `sketched`, when its gradients cannot be."""
    if sketched:
        refuse_float16(config)
    of = config.gradients.of if sketched else "weights"
    if of == "adapter":
        if model.adapter is None and not config.sft.sources:
            raise no_adapter(model)
        sketched = model.adapter is not None  # else the run's own sft stage makes it
    made = _skeleton(model, config.model.trust_remote_code, sketched and of == "adapter")
    size = sum(parameter.numel() * parameter.element_size() for _, parameter in text_parameters(made))
    if not sketched:
        return Look(size, None, "")
    sketch = config.gradients.sketch
    assert model.path is not None
    if is_quantised(model.adapter[1] if of == "adapter" and model.adapter else model.path):
        raise UserError(
            f"The weights of {model.name} are quantised: gradients need them in bfloat16 or float32",
            where="model.policy",
            fix="Give a version that is not quantised, or save a dequantised one.",
        )
    try:
        Head.of(made)
        coverage = select_layers(made, sketch.include, sketch.exclude, of)
        SketchLayout.plan(coverage.layers, sketch.dim, sketch.method, sketch.rank)
    except Unprobed as error:
        return Look(size, None, f"{model.name}: what can be sketched is seen when its weights are loaded ({error})")
    except ValueError as error:
        raise UserError(
            f"The gradients of {model.name} cannot be sketched: {error}",
            where="gradients.sketch",
            fix="Exclude the named layers with gradients.sketch.exclude, or use another model.",
        ) from error
    return Look(size, coverage, f"{model.name}: {coverage.summary()}")


def architecture_findings(model: ModelRef, config: RunConfig) -> Iterator[Finding]:
    """The policy's."""
    found = look(model, config, sketched=True)
    values: dict[str, float | str] = {"bytes": found.text_bytes}
    yield Finding("architecture", "ok", found.note or f"{model.name}: its files fit it", values=values)


@lru_cache(maxsize=4)
def _skeleton(model: ModelRef, trust_remote_code: bool, adapted: bool) -> PreTrainedModel:
    """Read once for all stages that ask. adapted: the base with the adapter on it, not the merged model."""
    if not adapted or model.adapter is None:
        return skeleton(model, trust_remote_code)
    from peft import PeftConfig, inject_adapter_in_model

    folder, base = model.adapter
    made = skeleton(replace(model, path=base), trust_remote_code)
    with torch.device("meta"):
        return cast(PreTrainedModel, inject_adapter_in_model(PeftConfig.from_pretrained(str(folder)), made))

"""A causal language model in memory: device, dtype, threads and weights as the config says."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from schemas.config import RunConfig
from schemas.errors import UserError, foreign
from stages.contract import ModelRef
from stages.models.generation import drop_unsavable
from stages.models.merging import with_adapter
from stages.models.strict import config_of, headers, refuse_misfits, unloadable
from stages.models.text_model import auto_class, classifier_class, drop_towers


def settle_threads(config: RunConfig, processes: int = 1) -> None:
    """execution.threads for this process, or its share of them if several compute together; one thread and deterministic kernels in reference mode, where the order of
    float sums, and with it the last bits, must not depend on the machine."""
    if config.execution.deterministic:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
    elif config.execution.threads or processes > 1:
        torch.set_num_threads(max(1, (config.execution.threads or torch.get_num_threads()) // processes))


def load_causal_lm(model: ModelRef, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> Any:
    """The model in evaluation mode on `device`, from safetensors only; a multimodal wrapper whole (see `drop_towers`).

    Raises UserError when it cannot be loaded, and for tensors that are missing, unexpected or misshapen.
    """
    if model.path is None:
        raise UserError(
            f"There is no folder of {model.name} on this machine", where="model", fix="Give a hub id or a folder."
        )
    return _loaded(auto_class(config_of(model, trust_remote_code)), model, dtype, device, trust_remote_code)


def load_to_cut(model: ModelRef, trust_remote_code: bool = False) -> Any:
    """`load_causal_lm` in float32 on the CPU, for weights that are cut over processes: where the files have one dtype they stay in it until they
    are cut, mapped from the files and shared by the machine's processes, so that none holds them whole. `widen` once it is cut."""
    dtype = dtype_of_files(model)
    loaded = load_causal_lm(model, dtype or torch.float32, torch.device("cpu"), trust_remote_code)
    if dtype is not None:
        _compute_in_float32(loaded, trust_remote_code)
    return loaded


def dtype_of_files(model: ModelRef) -> torch.dtype | None:
    """Of all weights in the folder, if it is one with fewer bits than float32; None where they have several: read in one of them, the
    others would be rounded."""
    assert model.path is not None
    found = {tensor.dtype for tensor in headers(model.path).values() if tensor.is_floating_point()}
    return found.pop() if len(found) == 1 and found <= {torch.bfloat16, torch.float16} else None


def _compute_in_float32(model: Any, trust_remote_code: bool) -> None:
    """What a model computed for itself when it was made (scales, frequencies) was computed in the numbers of its files: computed anew."""
    for config in (model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)):
        if config is not None:
            config.dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        made = auto_class(model.config).from_config(
            model.config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    for name, buffer in made.named_buffers():
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if leaf in module._non_persistent_buffers_set:
            setattr(module, leaf, buffer)
        else:  # it is in the files
            setattr(module, leaf, getattr(module, leaf).to(buffer.dtype))


def widen(model: nn.Module) -> None:
    """Weights to float32, cut or not. What a model computed for itself keeps the numbers that its code gives it."""
    model._apply(lambda tensor: tensor.float() if isinstance(tensor, nn.Parameter) else tensor)


def load_classifier(model: ModelRef, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> Any:
    """A sequence classifier, as `load_causal_lm`: a language model without a trained head of rewards is refused by name."""
    kind = classifier_class(config_of(model, trust_remote_code, language_model=False))
    return _loaded(kind, model, dtype, device, trust_remote_code)


def _loaded(kind: Any, model: ModelRef, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    with foreign(partial(unloadable, model)):
        loaded, found = kind.from_pretrained(
            model.path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # said by refuse_misfits, with their names
        )
    refuse_misfits(model, loaded, found)
    drop_unsavable(loaded)
    return loaded.to(device).eval()


def load_text_model(model: ModelRef, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> Any:
    """`load_causal_lm` for reading text only: towers for images and sound take no memory. Not to be saved."""
    loaded = load_causal_lm(model, dtype, torch.device("cpu"), trust_remote_code)
    drop_towers(loaded)
    return loaded.to(device)


def load_with_adapter(
    model: ModelRef, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> Any:
    """The base model with the adapter on it, not merged; the adapter's weights are float32 (PEFT). Raises UserError when
    the model is no merged adapter."""
    if model.adapter is None:
        raise no_adapter(model)
    folder, base = model.adapter
    loaded = load_causal_lm(ModelRef(model.name, base, model.digest), dtype, device, trust_remote_code)
    return with_adapter(loaded, folder, model.name).get_base_model().to(device).eval()


def no_adapter(model: ModelRef) -> UserError:
    """What is said where the gradient of an adapter is asked for and the model has none."""
    return UserError(
        f"{model.name} has no LoRA adapter to take the gradient of",
        where="gradients.of: adapter",
        fix="Set gradients.of: weights, or give a PEFT adapter as model.policy.",
    )

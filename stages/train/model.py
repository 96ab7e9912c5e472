"""The policy in memory: device, numbers, adapters.

- LoRA: the base keeps `model.dtype` (bfloat16 by default) and is frozen; the adapter's weights are float32 (PEFT).
- Full fine-tune: float32 master weights; the forward runs in `model.dtype` by autocast. The final model is written in
  `model.dtype`.
- float32 (reference mode): plain float32 everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from schemas.config import RunConfig
from schemas.config.training import LoraConfig as LoraSettings
from schemas.errors import UserError
from stages.contract import ModelRef

_DTYPES = {
    "auto": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Precision:
    """device; compute: dtype of the forward; load: dtype of the weights in memory; bf16, fp16: autocast."""

    device: str
    compute: torch.dtype
    load: torch.dtype

    @property
    def autocast(self) -> bool:
        """Whether weights and computation differ."""
        return self.load != self.compute

    @property
    def bf16(self) -> bool:
        """bfloat16 autocast."""
        return self.autocast and self.compute == torch.bfloat16

    @property
    def fp16(self) -> bool:
        """float16 autocast with loss scaling: also for LoRA, whose gradients would underflow without it."""
        return self.compute == torch.float16


def precision(config: RunConfig) -> Precision:
    """Device and dtypes of the run. Raises UserError for what this machine cannot do."""
    cuda = torch.cuda.is_available()
    if config.execution.device == "cuda" and not cuda:
        raise UserError(
            "no CUDA device is visible to torch",
            where="execution.device: cuda",
            fix="Use execution.device: auto or cpu, or install a CUDA build of torch.",
        )
    use_cuda = cuda and config.execution.device != "cpu" and not config.execution.deterministic
    compute = _DTYPES[config.model.dtype]
    if compute == torch.float16 and not use_cuda:
        raise UserError(
            "training in float16 needs a CUDA device",
            where="model.dtype: float16",
            fix="Use model.dtype: bfloat16 (or auto), or float32.",
        )
    if use_cuda and compute == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        raise UserError(
            f"{torch.cuda.get_device_name()} has no bfloat16",
            where="model.dtype",
            fix="Use model.dtype: float16 or float32.",
        )
    load = torch.float32 if config.train.method == "full" else compute
    return Precision("cuda" if use_cuda else "cpu", compute, load)


def load_causal_lm(ref: ModelRef, dtype: torch.dtype, device: str, trust_remote_code: bool) -> PreTrainedModel:
    """The model in evaluation mode on `device`, from safetensors only. Raises UserError when it cannot be read."""
    if ref.path is None:
        raise UserError(
            f"model {ref.name} has no folder on this machine", where="model", fix="Give a hub id or folder."
        )
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            ref.path, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {ref.name}: {error}", where=str(ref.path)) from error
    return model.to(device).eval()


def disable_dropout(model: nn.Module) -> None:
    """Set the model's own dropout to 0 (as TRL does); LoRA's, added later, keeps its configured value."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def adapter_config(settings: LoraSettings, model: PreTrainedModel) -> LoraConfig:
    """PEFT's LoRA config. Raises UserError when `target_modules` names nothing in the model, or its head."""
    targets = settings.target_modules
    if targets != "all-linear":
        wanted = [targets] if isinstance(targets, str) else targets
        leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "")
        unknown = [name for name in wanted if name.rpartition(".")[2] not in leaves]
        if unknown or head in wanted:
            raise UserError(
                f"LoRA cannot adapt {', '.join(unknown) or head}",
                where="train.lora.target_modules",
                fix=f"Linear layers of this model: {', '.join(sorted(leaves - {head}))}; or use all-linear.",
            )
        targets = wanted
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )

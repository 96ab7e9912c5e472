"""The policy's numbers and its adapters.

- LoRA: the base keeps `model.dtype` (bfloat16 by default) and is frozen; the adapter's weights are float32 (PEFT).
- Full fine-tune: float32 master weights; the forward runs in `model.dtype` by autocast. The final model is written in
  `model.dtype`.
- float32 (reference mode): plain float32 everywhere.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from schemas.config import RunConfig
from schemas.config.trainer import TrainerConfig
from schemas.errors import UserError
from stages.models.device import device_of, dtype_of
from stages.train.processes import local_size, world_size


@dataclass(frozen=True)
class Precision:
    """device; compute: dtype of the forward; load: dtype of the weights in memory; bf16, fp16: autocast. copies: of the weights that are cut
    over several processes; 0: they are not cut."""

    device: torch.device
    compute: torch.dtype
    load: torch.dtype
    copies: int = 0

    @property
    def sharded(self) -> bool:
        """The weights are cut over several processes."""
        return self.copies > 0

    @property
    def bf16(self) -> bool:
        """bfloat16 autocast over float32 weights."""
        return self.load != self.compute == torch.bfloat16

    @property
    def fp16(self) -> bool:
        """float16 autocast with loss scaling: also for LoRA, whose gradients would underflow without it."""
        return self.compute == torch.float16

    def forward(self) -> AbstractContextManager[Any]:
        """What the trainer's forward runs in: the autocast that accelerate puts around it, or nothing."""
        if self.bf16 or self.fp16:
            return torch.autocast(self.device.type, self.compute)
        return nullcontext()


def precision(config: RunConfig, section: TrainerConfig) -> Precision:
    """Device and dtypes of a training. Raises UserError for what this machine cannot do."""
    device, compute = device_of(config), dtype_of(config)
    if compute == torch.float16 and device.type != "cuda":
        raise UserError(
            "training in float16 needs a CUDA device",
            where="model.dtype: float16",
            fix="Use model.dtype: bfloat16 (or auto), or float32.",
        )
    if (
        device.type == "cuda"
        and compute == torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UserError(
            f"{torch.cuda.get_device_name()} has no bfloat16",
            where="model.dtype",
            fix="Use model.dtype: float32.",
        )
    copies = section.copies(world_size() // local_size(), local_size()) if world_size() > 1 else 0
    if copies and compute == torch.float16:
        raise UserError(
            "float16 scales the loss, which is not done for weights cut over processes",
            where=f"model.dtype: float16, {section.section}.sharding",
            fix=f"Use model.dtype: bfloat16, or {section.section}.sharding: ddp.",
        )
    return Precision(device, compute, torch.float32 if section.method == "full" else compute, copies)


def adapter_config(section: TrainerConfig, model: PreTrainedModel) -> LoraConfig | None:
    """PEFT's LoRA config; None where all weights are trained. Raises UserError when `target_modules` names nothing in the
    model, or its head."""
    if section.method == "full":
        return None
    settings = section.lora
    targets = settings.target_modules
    if targets != "all-linear":
        wanted = [targets] if isinstance(targets, str) else targets
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        leaves = {name.rpartition(".")[2] for name in linear}
        head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "")
        unknown = [target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in linear)]
        if unknown or head in wanted:
            raise UserError(
                f"LoRA cannot adapt {', '.join(unknown) or head}",
                where=f"{section.section}.lora.target_modules",
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

"""Where a run computes, and in which precision."""

from __future__ import annotations

import gc

import torch

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.models.gpus import given_gpus

_MEMORY_MESSAGES = ("out of memory", "not enough memory", "can't allocate memory")


def device_of(config: RunConfig) -> torch.device:
    """Where the run computes. Raises UserError when CUDA is asked for, or GPUs are given to this process, and torch can use none."""
    wanted = config.execution.device
    if config.execution.deterministic or wanted == "cpu":
        return torch.device("cpu")
    if wanted == "cuda" or given_gpus():
        refuse_unusable()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def refuse_unusable() -> None:
    """Raise UserError unless torch can use a GPU: for where there are some, and a CPU would be taken for them."""
    if not torch.cuda.is_available():
        what, fix = unusable()
        raise UserError(what, where="execution.device", fix=fix)


def unusable() -> tuple[str, str]:
    """What is wrong with the GPUs that torch cannot use, and what to do."""
    built = torch.version.cuda
    what = f"torch {torch.__version__} can use no GPU here: it is built for {f'CUDA {built}' if built else 'the CPU'}"
    driver = "Check the driver: nvidia-smi names the newest CUDA that it runs"
    return (
        what,
        f"{driver if built else 'Install a build for CUDA (make install PLATFORM=cuda)'}. Or set execution.device: cpu.",
    )


def dtype_of(config: RunConfig) -> torch.dtype:
    """model.dtype; auto is bfloat16."""
    return torch.bfloat16 if config.model.dtype == "auto" else getattr(torch, config.model.dtype)


def refuse_float16(config: RunConfig) -> None:
    """Raise UserError for gradients in numbers in which they underflow."""
    if config.model.dtype == "float16":
        raise UserError(
            "Gradients in float16 underflow", where="model.dtype: float16", fix="Use bfloat16 (auto) or float32."
        )


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA and CPU allocation failures; PyTorch raises a plain RuntimeError for the
    latter."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(m in str(error).lower() for m in _MEMORY_MESSAGES)


def free_memory() -> None:
    """Give memory of models no longer referenced back, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

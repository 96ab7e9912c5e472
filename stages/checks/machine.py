"""The accelerator as torch sees it, against what the config asks for."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import torch

from schemas.config import RunConfig
from stages.checks.finding import Finding
from stages.models.compiler import INSTALL, lacking
from stages.models.device import unusable
from stages.models.gpus import visible_gpus

GIB = 2**30
_LEAST = (7, 5)
"""Capability that CUDA 13 still has code for: Turing."""
_DEAR = 1.3
"""Times the cost of float32 from which bfloat16 is worth a word."""


def bfloat16_cost() -> float:
    """Seconds of a bfloat16 matrix product over those of a float32 one, the best of three of each: CPUs without AMX convert. Takes 0.1 to 1 s."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x_MK, w_NK = torch.ones(256, 1024, dtype=dtype), torch.ones(2048, 1024, dtype=dtype)
        times = []
        for _ in range(4):  # the first one warms up
            begun = time.perf_counter()
            torch.nn.functional.linear(x_MK, w_NK)
            times.append(time.perf_counter() - begun)
        seconds[dtype] = min(times[1:])
    return seconds[torch.bfloat16] / seconds[torch.float32]


def device_findings(config: RunConfig) -> Iterator[Finding]:
    """GPUs with capability and free memory, or the CPU; whether dtype and device fit them."""
    wanted = config.execution.device
    cuda = torch.cuda.is_available() and wanted != "cpu" and not config.execution.deterministic
    asked = wanted == "cuda" or (wanted == "auto" and not config.execution.deterministic and visible_gpus())
    if asked and not torch.cuda.is_available():
        yield Finding("device", "problem", *unusable())
        return
    if not cuda:
        memory, cores = psutil.virtual_memory(), psutil.cpu_count(logical=False)
        what = f"CPU, {cores} cores, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB memory free"
        yield Finding("device", "ok", what, values={"memory_bytes": memory.available})
        if config.model.dtype in ("auto", "bfloat16") and (cost := bfloat16_cost()) > _DEAR:
            yield Finding(
                "device",
                "warning",
                f"matrix products in bfloat16 take {cost:.1f} times as long as in float32 on this CPU (no AMX)",
                "Where gradients and training take most of the time, set model.dtype: float32. It takes twice the memory.",
                {"bfloat16_cost": cost},
            )
        return
    if missing := lacking():
        what = f"Triton compiles kernels for the GPU, and there is no {' and no '.join(missing)}: training needs them"
        yield Finding("device", "problem", what, INSTALL)
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        name = f"GPU {index}: {found.name}, capability {found.major}.{found.minor}"
        what = f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        values: dict[str, float | str] = {"memory_bytes": free, "gpu": index}
        if (found.major, found.minor) < _LEAST:
            fix = f"Builds of torch for CUDA 13 need capability {'.'.join(map(str, _LEAST))}: take another GPU, or set device: cpu."
            yield Finding("device", "problem", what, fix, values)
        elif config.model.dtype in ("auto", "bfloat16") and found.major < 8:
            fix = "bfloat16 needs capability 8.0: set model.dtype: float32."
            yield Finding("device", "problem", what, fix, values)
        elif config.engine.facts.reserves and free < config.engine.gpu_memory_utilization * total:
            fix = (
                "Free the GPU or lower engine.gpu_memory_utilization: the engine takes that share of the whole memory."
            )
            yield Finding("device", "problem", what, fix, values)
        else:
            yield Finding("device", "ok", what, values=values)

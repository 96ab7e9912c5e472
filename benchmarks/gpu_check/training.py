"""A tiny run on the device against the CPU: sketches, what languages conflict in, then training with a merge; in float32."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch

from benchmarks.gpu_check.report import Row, Sizes, right

_PART = "tiny run"


def tiny(sizes: Sizes) -> Iterator[Row]:
    """Three DPO steps after the sketches of the same pairs."""
    from benchmarks.gpu_check.gradients import _model
    from benchmarks.gradients import make_pairs
    from stages.gradients.batching import TokenBudget
    from stages.gradients.layers import select_layers
    from stages.gradients.projections import SketchLayout
    from stages.gradients.sketcher import Sketcher

    pairs = make_pairs(8, 24, 512, 0.5)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for device in ("cpu", sizes.device):
        model = _model(64, 2, 512, torch.float32, device)
        with Sketcher(model, SketchLayout.plan(select_layers(model).layers, 512), seed=0) as sketcher:
            rows = sketcher.run(pairs, TokenBudget(4096)).sketch_ND.double()
        unit = rows / rows.norm(dim=1, keepdim=True)
        found.setdefault("conflict", {})[device] = unit @ unit.T
        found.setdefault("losses", {})[device] = torch.tensor(_losses(model, pairs, device), dtype=torch.float64)
    for what, values in found.items():
        away = float((values["cpu"] - values[sizes.device]).abs().max())
        yield right(_PART, {"conflict": "cosines of gradients", "losses": "losses of training"}[what], away, 1e-4)


def _losses(model: Any, pairs: Any, device: str) -> list[float]:
    from benchmarks.gradients import dpo_margins
    from stages.train.optimizers import Merge, OnlineMergingAdamW

    with torch.no_grad():
        reference = dpo_margins(model, pairs, device)
    optimizer = OnlineMergingAdamW(model.named_parameters(), lr=1e-3, merge=Merge("anchor", 0.01))
    losses = []
    for _ in range(3):
        loss = -torch.nn.functional.logsigmoid(0.1 * (dpo_margins(model, pairs, device) - reference)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def stages(sizes: Sizes) -> Iterator[Row]:
    """Whether what the stages themselves need is here; their own tests run on the device with `make test`."""
    for package in ("polars", "pyarrow", "trl"):
        import_module(package)
    yield Row(_PART, "packages of the stages", "there", "", "measured", "make test runs the stages on this device")

"""Plain AdamW: fused where the weights are on CUDA, and there alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stages.train.adamw import adamw


@pytest.mark.parametrize(("devices", "fused"), [((True, True), True), ((False, False), None), ((True, False), None)])
def test_weights_on_cuda_are_stepped_by_the_fused_kernel(
    devices: tuple[bool, ...], fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = [(f"{n}", SimpleNamespace(requires_grad=True, ndim=n + 1, is_cuda=cuda)) for n, cuda in enumerate(devices)]
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **options: asked.append(options))
    adamw(SimpleNamespace(named_parameters=lambda: named), 1e-3, 0.1)  # type: ignore[arg-type]
    assert asked == [{"lr": 1e-3, "fused": fused}]


def test_the_fused_kernel_steps_weights_that_are_cut(tmp_path: Any) -> None:
    """torch's own, on the CPU: it takes DTensors, and gives what the plain way gives up to rounding."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        found = []
        for fused in (None, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
            for _ in range(3):
                model(torch.ones(2, 8)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append([parameter.full_tensor().detach() for parameter in model.parameters()])  # type: ignore[attr-defined]
        for plain, kernel in zip(*found, strict=True):
            torch.testing.assert_close(kernel, plain, rtol=0, atol=1e-7)
    finally:
        dist.destroy_process_group()

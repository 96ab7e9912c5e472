"""The optimizers on the device: masks, cuts and steps against the CPU's eager ones, no wait inside a step, sharded, and their time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.gpu_check.report import Row, Sizes, Verdict, against, exactly, right
from benchmarks.optimizer_step import bandwidth, measure
from stages.train.optimizers import ActiveEntries, Merge, OnlineMergingAdamW, Protected, TaskVector
from stages.train.optimizers.masks import SPAN, random_mask
from stages.train.optimizers.top import Held, cut_whole, cuts_by_digits

_PART = "optimizers"
_SHAPES = {"w": (130, 96), "v": (64, 200), "b": (96,)}
_LR = 1e-2
_BEFORE, _AFTER = 3, 5
_COMPILED_SMALL = ("ondare", "projection")
"""What is compiled with small sizes: each takes seconds, and tests of their own compile the others."""


def masks(sizes: Sizes) -> Iterator[Row]:
    """Random masks are the CPU's to the bit, also beyond 2^32 entries."""
    key = (1, 0, 7, "step", "w")
    for start in (0, SPAN - 5000):
        ours = random_mask(0.01, key, start, start + 100_000, sizes.device).cpu()
        yield exactly(
            _PART,
            f"random mask from entry {start:,}",
            torch.equal(ours, random_mask(0.01, key, start, start + 100_000)),
        )


def cuts(sizes: Sizes) -> Iterator[Row]:
    """OnTIES' largest entries, with many ties and with none."""
    random = torch.Generator().manual_seed(3)
    size = 300_000
    for what, values in (
        ("ties", torch.randint(0, 50, (size,), generator=random).float()),
        ("no ties", torch.randn(size, generator=random).abs()),
    ):
        same = True
        there = values.to(sizes.device)
        for k in (1, 3000, size // 2, size):
            held = Held(lambda: iter(there.split(1 << 16)), there.__getitem__, 0, size, k)  # noqa: B023  (used at once)
            [found] = cuts_by_digits([held], torch.float32, there.device, None)
            mine = cut_whole(values.split(1 << 16), k, size, lambda: values.split(1 << 16))  # noqa: B023
            same = same and (float(found.limit), int(found.last)) == (mine.limit, mine.last)
        yield exactly(_PART, f"largest entries, {what}", same)


def _settings() -> dict[str, dict[str, Any]]:
    random = torch.Generator().manual_seed(4)
    entries = ActiveEntries({n: torch.rand(s, generator=random) < 0.4 for n, s in _SHAPES.items()})
    rows = ActiveEntries(
        {n: torch.rand((s[0], *[1] * (len(s) - 1)), generator=random) < 0.4 for n, s in _SHAPES.items() if len(s) > 1}
    )
    bases = {n: torch.linalg.qr(torch.randn(_SHAPES[n][0], 5, generator=random)).Q.contiguous() for n in ("w", "v")}
    return {
        "anchor": {"merge": Merge("anchor", 0.01)},
        "ondare": {"merge": Merge("ondare", 0.01, 0.3)},
        "ondare released": {"merge": Merge("ondare", 0.01, 0.3, "released", rescale=True)},
        "onties": {"merge": Merge("onties", 0.01, 0.3)},
        "onties released": {"merge": Merge("onties", 0.01, 0.3, "released")},
        "onties, every 2": {"merge": Merge("onties", 0.01, 0.3, every=2)},
        "entry masks": {"active": entries},
        "row masks": {"active": rows},
        "projection": {"protected": Protected(bases, {})},
        "trust region": {"trust_radius": 0.05},
    }


def _made(device: str, compiled: bool, weights: dict[str, nn.Parameter] | None = None, **settings: Any) -> Any:
    random = torch.Generator().manual_seed(1)
    start = {n: torch.randn(s, generator=random).bfloat16().float() for n, s in _SHAPES.items()}
    tau = {n: (0.02 * torch.randn(s, generator=random)).bfloat16() for n, s in _SHAPES.items()}
    weights = weights or {n: nn.Parameter(value.to(device)) for n, value in start.items()}
    merge = settings.get("merge")
    vector = TaskVector.from_tensors(tau) if merge is not None and merge.needs_task_vector else None
    named = list(weights.items())
    return OnlineMergingAdamW(
        named, lr=_LR, weight_decay=0.1, task_vector=vector, compiled=compiled, **settings
    ), weights


def _step(optimizer: torch.optim.Optimizer, weights: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        random = torch.Generator().manual_seed(100 + step)
        for name, p in weights.items():
            p.grad = torch.randn(_SHAPES[name], generator=random).to(p.device)
        optimizer.step()


def steps(sizes: Sizes) -> Iterator[Row]:
    """Every optimizer, eager and compiled on the device, against the eager one on the CPU; and that a step waits for nothing."""
    for name, settings in _settings().items():
        first, start = _made("cpu", False, **settings)
        _step(
            first, start, range(_BEFORE)
        )  # at first all steps are equally large: rounding would say which are the largest
        saved = first.state_dict()
        found = {}
        ways = {"cpu": ("cpu", False), "eager": (sizes.device, False), "compiled": (sizes.device, True)}
        if sizes.small and name not in _COMPILED_SMALL:
            del ways["compiled"]
        for way, (device, compiled) in ways.items():
            copies = {n: nn.Parameter(p.detach().clone().to(device)) for n, p in start.items()}
            made, weights = _made(device, compiled, copies, **settings)
            made.load_state_dict(_cloned(saved))
            _step(made, weights, range(_BEFORE, _BEFORE + _AFTER))
            found[way] = {n: p.detach().cpu() for n, p in weights.items()}
            ran_compiled = made._chain.form.compiled
            if way != "cpu" and device != "cpu":
                yield _waits_for_nothing(f"{name}, {way}", made, weights)
        for way in list(ways)[1:]:
            worst = max(float((found[way][n] - found["cpu"][n]).abs().max()) for n in _SHAPES) / _LR
            note = "" if way == "eager" or ran_compiled else "could not be compiled: eager"
            yield right(_PART, f"{name}, {way}: difference in steps", worst, 2e-3, note)


def _cloned(state: dict[str, Any]) -> dict[str, Any]:
    copies = {
        index: {key: value.clone() if torch.is_tensor(value) else value for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {"state": copies, "param_groups": [dict(group) for group in state["param_groups"]]}


def _waits_for_nothing(what: str, optimizer: torch.optim.Optimizer, weights: dict[str, nn.Parameter]) -> Row:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    except RuntimeError as error:
        return Row(_PART, f"{what}: waits for the device", "yes", "no", "wrong", str(error).splitlines()[0])
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return Row(_PART, f"{what}: waits for the device", "no", "no", "right")


@contextmanager
def _one_process(device: str) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{os.path.join(folder, 'store')}", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def sharded(sizes: Sizes) -> Iterator[Row]:
    """FSDP2 in a group of one process gives the bits of no FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def trained(shard: Callable[[nn.Module], object]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).to(sizes.device)
        shard(model)
        tau = {n: torch.full(p.shape, 0.01) for n, p in model.named_parameters()}
        optimizer = OnlineMergingAdamW(
            model.named_parameters(),
            merge=Merge("onties", 0.01, 0.3),
            task_vector=TaskVector.from_tensors(tau),
            compiled=False,
        )
        for step in range(3):
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).to(sizes.device)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return {n: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for n, p in model.named_parameters()}

    with _one_process(sizes.device):
        mesh = init_device_mesh(sizes.device, (1,))
        ours, plain = trained(lambda model: fully_shard(model, mesh=mesh)), trained(lambda model: None)
        yield exactly(_PART, "FSDP2 on one device, onties", all(torch.equal(ours[n], plain[n]) for n in plain))


def speed(sizes: Sizes) -> Iterator[Row]:
    """The time of a step against torch's AdamW in the same process."""
    copy = bandwidth(sizes.device, sizes.copy_bytes)
    for m in measure(sizes.layers, sizes.hidden, sizes.repeats, sizes.device, copy):
        bound = "" if m.aim is None else f"<= {m.aim:g} x"
        note = f"{m.ms:.2f} ms, memory bound {m.bound_ms:.2f} ms, {m.state_bytes:.1f} bytes of state a parameter"
        verdict: Verdict = "measured" if m.aim is None else against(sizes, m.ratio <= m.aim)
        yield Row("speed", f"step, {m.variant.name}", f"{m.ratio:.2f} x", bound, verdict, note)

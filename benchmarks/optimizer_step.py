"""Time and memory of an optimizer step with online merging, masks, a projection or a trust region, against torch's AdamW on equal tensors.

    python -m benchmarks.optimizer_step [--layers 4] [--hidden 896] [--repeats 5] [--device cpu] [--only onties]
    python -m benchmarks.optimizer_step --forms [--only ondare]

Tensors: layers of a Qwen2-like model with random weights and gradients, float32 masters of bfloat16 values. Every variant runs in turn
with the baseline (torch's AdamW, foreach on a CPU, fused on a GPU), and the best of --repeats counts on both sides, since other work on
the machine only adds time. Beside the time: the bytes a variant must read and write at least, divided by the bandwidth of a copy.
Memory: bytes per parameter beside the weights and their gradients. Verdicts are against the aims, which are of the ratio.

--forms: the same steps eager and compiled, of 0.1 to 50 million parameters, what compiling took, and the steps after which that is paid:
where `COMPILE_FROM` of `stages/train/optimizers/form.py` belongs. The first size of a variant pays the compiler, or torch's cache of it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from stages.train.optimizers import ActiveEntries, Merge, OnlineMergingAdamW, Protected, TaskVector

# Bytes per parameter, each buffer once: AdamW reads p, g, m, v and writes p, m, v (float32).
_ADAMW = 28
# Chained: g; m, v read and written; displacement read and written; start (bfloat16); p written.
_CHAINED = 4 + 16 + 8 + 2 + 4
_TAU = 2  # bfloat16, read
_MASK = 1  # bool, read
_LOOK = 8 + 8  # m and v once more, and their second writing left to the first pass

_SIZES = (0.1, 0.3, 1, 3, 10, 17, 30, 50)
"""Millions of parameters."""
_PER_SQUARE = 2 + 2 / 7 + 15
"""Parameters of a layer of `make_weights` over the square of its width."""

Weights = dict[str, nn.Parameter]


@dataclass(frozen=True)
class Variant:
    """An optimizer to measure. moved: bytes a parameter.  aims: of its time over the baseline's, on a CPU and on a GPU."""

    name: str
    make: Callable[[Weights], torch.optim.Optimizer]
    moved: int = _CHAINED
    vector: int = 0
    aims: tuple[float, float] | None = None


@dataclass(frozen=True)
class Measurement:
    """A variant's figures: milliseconds of a step, its ratio to the baseline measured beside it, the least possible, bytes a parameter."""

    variant: Variant
    ms: float
    base_ms: float
    bound_ms: float
    state_bytes: float
    aim: float | None

    @property
    def ratio(self) -> float:
        """Its time over the baseline's."""
        return self.ms / self.base_ms

    @property
    def verdict(self) -> str:
        """Against the aim."""
        return "" if self.aim is None else ("met" if self.ratio <= self.aim else "missed")


def make_weights(layers: int, hidden: int, device: str) -> Weights:
    """Parameters of `layers` Qwen2-like blocks with random gradients."""
    torch.manual_seed(0)
    wide, key = hidden * 5, max(1, hidden // 7)
    shapes = {"q": (hidden, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, hidden)}
    shapes |= {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide), "norm": (hidden,)}
    weights = {}
    for layer in range(layers):
        for name, shape in shapes.items():
            p = nn.Parameter(torch.randn(shape, device=device).bfloat16().float())
            p.grad = torch.randn_like(p)
            weights[f"{layer}.{name}"] = p
    return weights


def baseline(device: str) -> Variant:
    """torch's AdamW as it is fastest without a compiler: fused on a GPU; on a CPU foreach, torch's form of many tensors."""
    if device.startswith("cuda"):
        return Variant("torch AdamW, fused", lambda w: torch.optim.AdamW(w.values(), fused=True), _ADAMW)
    return Variant("torch AdamW, foreach", lambda w: torch.optim.AdamW(w.values(), foreach=True), _ADAMW)


def variants() -> list[Variant]:
    """What is measured, and the aims."""
    found = [
        Variant("torch AdamW, fused", lambda w: torch.optim.AdamW(w.values(), fused=True), _ADAMW),
        Variant("all off", lambda w: OnlineMergingAdamW(list(w.items()), foreach=True), _ADAMW),
    ]
    for merge, aims in (
        (Merge("anchor", 1e-3), (0.5, 1.3)),
        (Merge("ondare", 1e-4), (0.5, 1.3)),
        (Merge("ondare", 1e-7, 0.01), (0.5, 1.3)),
        (Merge("ondare", 1e-7, 0.01, "released"), (0.5, 1.3)),
        (Merge("onties", 1e-7, 0.01), (1.2, 1.6)),
        (Merge("onties", 1e-7, 0.01, "released"), (1.2, 1.6)),
    ):
        name = f"{merge.merge} {merge.preset}, reserve {merge.reserve:g}"
        vector = _TAU if merge.needs_task_vector else 0
        moved = _CHAINED + vector + (_LOOK if merge.rule().selection == "top" else 0)
        found.append(Variant(name, _merging(merge), moved, vector, aims))
    found += [
        Variant("mask, 10% of the entries", _masked(False), _CHAINED + _MASK, 0, (0.6, 1.3)),
        Variant("mask, 10% of the rows", _masked(True), _CHAINED, 0, (0.6, 1.3)),
        Variant("projection, left, 64 directions", _projected, _CHAINED + 16, 0, (1.2, 2.0)),
        Variant("trust region", _trusted, _CHAINED + 16, 0, (1.3, 2.0)),
    ]
    return found


def _merging(merge: Merge) -> Callable[[Weights], torch.optim.Optimizer]:
    def make(weights: Weights) -> torch.optim.Optimizer:
        tau = {name: (0.01 * torch.randn(p.shape)).bfloat16() for name, p in weights.items()}
        vector = TaskVector.from_tensors(tau) if merge.needs_task_vector else None
        return OnlineMergingAdamW(list(weights.items()), merge=merge, task_vector=vector)

    return make


def _masked(rows: bool) -> Callable[[Weights], torch.optim.Optimizer]:
    def make(weights: Weights) -> torch.optim.Optimizer:
        shapes = {n: (p.shape[0], *[1] * (p.ndim - 1)) if rows else p.shape for n, p in weights.items()}
        masks = {n: torch.rand(shape) < 0.1 for n, shape in shapes.items()}
        return OnlineMergingAdamW(list(weights.items()), active=ActiveEntries(masks))

    return make


def _projected(weights: Weights) -> torch.optim.Optimizer:
    bases = {}
    for name, p in weights.items():
        if p.ndim == 2 and p.shape[0] > 1:
            bases[name] = torch.linalg.qr(torch.randn(p.shape[0], min(64, p.shape[0] // 2))).Q.contiguous()
    return OnlineMergingAdamW(list(weights.items()), protected=Protected(bases, {}))


def _trusted(weights: Weights) -> torch.optim.Optimizer:
    return OnlineMergingAdamW(list(weights.items()), trust_radius=1e-3)


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bandwidth(device: str, size: int = 1 << 26) -> float:
    """Bytes per second of a large copy (read and written)."""
    a = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    b = torch.empty_like(a)
    return 2 * a.numel() / min(seconds(lambda: b.copy_(a), device) for _ in range(10))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(layers: int, hidden: int, repeats: int, device: str, speed: float, only: str = "") -> Iterator[Measurement]:
    """Every variant whose name has `only` in it, two optimizers in memory at a time. speed: of a copy, bytes a second."""
    plain = baseline(device)
    base_weights = make_weights(layers, hidden, device)
    base = plain.make(base_weights)
    count = sum(p.numel() for p in base_weights.values())
    for variant in (plain, *(v for v in variants() if only in v.name)):
        weights = make_weights(layers, hidden, device)
        optimizer = variant.make(weights)
        best = [float("inf")] * 2
        for repeat in range(repeats + 2):  # the first ones compile and warm up
            for side, (each, given) in enumerate(((base, base_weights), (optimizer, weights))):
                for p in given.values():
                    assert p.grad is not None
                    p.grad.normal_()  # equal gradients would make every entry of a step equally large: the worst case of a top share
                taken = seconds(each.step, device)
                if repeat > 1:
                    best[side] = min(best[side], taken)
        aim = None if variant.aims is None else variant.aims[device.startswith("cuda")]
        yield Measurement(
            variant,
            best[1] * 1e3,
            best[0] * 1e3,
            variant.moved * count / speed * 1e3,
            state_bytes(optimizer) / count,
            aim,
        )
        del weights, optimizer


def forms(repeats: int, device: str, only: str) -> Iterator[tuple[Variant, int, float, float, float]]:
    """(variant, parameters, ms eager, ms compiled, seconds of compiling) of every variant of ours, over sizes."""
    for variant in variants():
        if only not in variant.name or variant.aims is None:
            continue
        for millions in _SIZES:
            hidden = max(7, round((millions * 1e6 / _PER_SQUARE) ** 0.5))
            best, compiling = {}, 0.0
            for compiled in (False, True):
                weights = make_weights(1, hidden, device)
                optimizer = variant.make(weights)
                assert isinstance(optimizer, OnlineMergingAdamW)
                optimizer.use_form(compiled)
                first = seconds(optimizer.step, device)
                best[compiled] = min(seconds(optimizer.step, device) for _ in range(repeats + 1))
                compiling = first - best[compiled]
            count = sum(p.numel() for p in weights.values())
            yield variant, count, best[False] * 1e3, best[True] * 1e3, compiling


def print_forms(repeats: int, device: str, only: str) -> None:
    """A Markdown table of `forms`."""
    print("| optimizer | parameters | eager, ms | compiled, ms | compiling, s | paid after steps |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for variant, count, eager, compiled, compiling in forms(repeats, device, only):
        saved = eager - compiled
        steps = f"{compiling * 1e3 / saved:,.0f}" if saved > 0 else "never"
        print(
            f"| {variant.name} | {count / 1e6:.2f}M | {eager:.2f} | {compiled:.2f} | {compiling:.1f} | {steps} |",
            flush=True,
        )


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="variants whose name has this in it")
    parser.add_argument("--forms", action="store_true", help="eager against compiled, over sizes")
    options = parser.parse_args()
    if options.forms:
        print_forms(options.repeats, options.device, options.only)
        return
    speed = bandwidth(options.device)
    count = sum(p.numel() for p in make_weights(options.layers, options.hidden, options.device).values())
    threads = torch.get_num_threads()
    print(f"{count / 1e6:.1f}M parameters, {options.device}, {threads} threads, copy {speed / 1e9:.1f} GB/s\n")
    print("| optimizer | ms | x AdamW | aim | | lower bound, ms | state, bytes per parameter | task vector |")
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    for m in measure(options.layers, options.hidden, options.repeats, options.device, speed, options.only):
        aim = "" if m.aim is None else f"{m.aim:g}"
        print(
            f"| {m.variant.name} | {m.ms:.1f} | {m.ratio:.2f} | {aim} | {m.verdict} | {m.bound_ms:.1f} |"
            f" {m.state_bytes:.2f} | {m.variant.vector} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

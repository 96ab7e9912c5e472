"""Time and memory of an optimizer step with online merging or a projection, against torch's AdamW on the same tensors.

    python benchmarks/optimizer_step.py [--layers 4] [--hidden 896] [--repeats 5] [--device cpu]

Tensors: layers of a Qwen2-like model with random weights and gradients, float32 masters of bfloat16 values. Variants
alternate and the best of --repeats counts, since other work on the machine only adds time. Beside the time: on the CPU the
lower bound of the variant, the bytes it must read and write at least divided by the measured bandwidth of a copy.
Memory: bytes per parameter beside the weights and their gradients.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stages.train.optimizers import ActiveEntries, Merge, OnlineMergingAdamW, Protected, TaskVector

# Bytes per parameter, each buffer once: AdamW reads p, g, m, v and writes p, m, v (float32).
_ADAMW = 28
# Chained: g; m, v read and written; displacement read and written; start (bfloat16); p written.
_CHAINED = 4 + 16 + 8 + 2 + 4
_TAU = 2  # bfloat16, read
_MASK = 1  # bool, read


def make_weights(layers: int, hidden: int, device: str) -> dict[str, nn.Parameter]:
    """Parameters of `layers` Qwen2-like blocks with random gradients."""
    torch.manual_seed(0)
    wide, key = hidden * 5, hidden // 7
    shapes = {"q": (hidden, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, hidden)}
    shapes |= {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide), "norm": (hidden,)}
    weights = {}
    for layer in range(layers):
        for name, shape in shapes.items():
            p = nn.Parameter(torch.randn(shape, device=device).bfloat16().float())
            p.grad = torch.randn_like(p)
            weights[f"{layer}.{name}"] = p
    return weights


def variants(layers: int, hidden: int, device: str) -> dict[str, tuple[torch.optim.Optimizer, int]]:
    """name -> (optimizer over its own weights, bytes per parameter a step must move)."""

    def fresh() -> dict[str, nn.Parameter]:
        return make_weights(layers, hidden, device)

    shapes = {name: p.shape for name, p in fresh().items()}
    tau = {name: (0.01 * torch.randn(shape)).bfloat16() for name, shape in shapes.items()}
    vector = TaskVector.from_tensors(tau)
    bases = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            bases[name] = torch.linalg.qr(torch.randn(shape[0], min(64, shape[0] // 2))).Q.contiguous()
    found: dict[str, tuple[torch.optim.Optimizer, int]] = {
        f"torch AdamW, foreach {f}": (torch.optim.AdamW(fresh().values(), foreach=f), _ADAMW) for f in (True, False)
    }
    found["all off"] = (OnlineMergingAdamW(list(fresh().items()), foreach=True), _ADAMW)
    for merge, moved in (
        (Merge("anchor", 1e-3), _CHAINED),
        (Merge("ondare", 1e-4), _CHAINED + _TAU),
        (Merge("ondare", 1e-7, 0.01), _CHAINED + _TAU),
        (Merge("ondare", 1e-7, 0.01, "released"), _CHAINED + _TAU),
        (Merge("onties", 1e-7, 0.01), _CHAINED + _TAU),
        (Merge("onties", 1e-7, 0.01, "released"), _CHAINED + _TAU),
    ):
        own = None if merge.merge == "anchor" else vector
        name = f"{merge.merge} {merge.preset}, reserve {merge.reserve:g}"
        optimizer = OnlineMergingAdamW(list(fresh().items()), merge=merge, task_vector=own, foreach=True)
        found[name] = (optimizer, moved)
    projected = OnlineMergingAdamW(list(fresh().items()), protected=Protected(bases, {}), foreach=True)
    found["projection, left, 64 directions"] = (projected, _CHAINED)
    trusted = OnlineMergingAdamW(list(fresh().items()), trust_radius=1e-3, foreach=True)
    masks = {name: torch.rand(shape) < 0.1 for name, shape in shapes.items()}
    masked = OnlineMergingAdamW(list(fresh().items()), active=ActiveEntries(masks), foreach=True)
    found["mask, 10% of the entries"] = (masked, _CHAINED + _MASK)
    rows = {name: torch.rand(shape[0], *[1] * (len(shape) - 1)) < 0.1 for name, shape in shapes.items()}
    whole = OnlineMergingAdamW(list(fresh().items()), active=ActiveEntries(rows), foreach=True)
    found["mask, 10% of the rows"] = (whole, _CHAINED)
    found["trust region"] = (trusted, _CHAINED)
    return found


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bandwidth(device: str) -> float:
    """Bytes per second of a large copy (read and written)."""
    a = torch.empty(1 << 26, dtype=torch.uint8, device=device).fill_(1)
    b = torch.empty_like(a)
    return 2 * a.numel() / min(seconds(lambda: b.copy_(a), device) for _ in range(10))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return sum(t.numel() * t.element_size() for t in tensors)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    found = variants(options.layers, options.hidden, options.device)
    speed = bandwidth(options.device)
    best = dict.fromkeys(found, float("inf"))
    for repeat in range(options.repeats + 1):  # the first one warms up
        for name, (optimizer, _) in found.items():
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad.normal_()  # equal gradients would make every entry of a step equally large: the worst case of a top share
            taken = seconds(optimizer.step, options.device)
            best[name] = min(best[name], taken) if repeat else float("inf")
    count = sum(p.numel() for group in next(iter(found.values()))[0].param_groups for p in group["params"])
    base = best["torch AdamW, foreach True"]
    print(
        f"{count / 1e6:.1f}M parameters, {options.device}, {torch.get_num_threads()} threads, copy {speed / 1e9:.1f} GB/s\n"
    )
    print("| optimizer | ms | x AdamW | lower bound, ms | state, bytes per parameter | task vector |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, (optimizer, moved) in found.items():
        bound = moved * count / speed * 1e3
        vector = 2 if name.startswith("on") else 0
        kept = state_bytes(optimizer) / count
        print(f"| {name} | {best[name] * 1e3:.1f} | {best[name] / base:.2f} | {bound:.1f} | {kept:.2f} | {vector} |")


if __name__ == "__main__":
    main()

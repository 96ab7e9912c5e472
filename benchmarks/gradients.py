"""Time and memory of the sketch pass against a plain DPO loss.backward(): same pairs, model, attention and machine.

    python -m benchmarks.gradients [--model FOLDER] [--dtype bfloat16] [--device cpu] [--pairs 2] [--tokens 320]
                                   [--prompt-share 0.5] [--measure time] [--measure memory] [--clock wall]

The DPO side: all weights trainable, no optimizer step, no reference pass, logits at completion positions only. Ours: a row
for each side, and prompts computed once. Without --model: a Qwen2-like model of 0.36B parameters, random weights.

time: every way runs --repeats times after one warm-up, in turn; the best run counts, since other work on the machine only
adds time. --clock cpu counts processor time of all threads, which waiting for other work does not change. memory: the highest sum of live tensors, weights left out, against a forward pass that keeps its activations
(weights frozen) and against the DPO pass; on the CPU counted by dispatch, on CUDA by the allocator.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

from stages.gradients.layers import select_layers
from stages.gradients.logprobs import Head, completion_logprobs, hidden_states
from stages.gradients.projections import DEFAULT_SKETCH_DIM, SketchLayout
from stages.gradients.rows import Pair, RowBatch
from stages.gradients.sketcher import Sketcher

Way = Callable[[], AbstractContextManager[Callable[[], object]]]
"""A context that gives what is measured: what it sets up and clears away is not counted."""


def load(folder: str | None, dtype: torch.dtype, device: str) -> Any:
    """The model under test."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    config = Qwen2Config(
        **{"vocab_size": 65_536, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 20},
        **{"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)


def make_pairs(count: int, tokens: int, vocabulary: int, prompt_share: float) -> list[Pair]:
    """Pairs of `tokens` tokens a side, a share of them prompt."""
    rng = random.Random(0)
    n_prompt = max(1, min(tokens - 1, round(tokens * prompt_share)))

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocabulary) for _ in range(n))

    return [Pair(ids(n_prompt), ids(tokens - n_prompt), ids(tokens - n_prompt)) for _ in range(count)]


def dpo_margins(model: Any, pairs: Sequence[Pair], device: str) -> Tensor:
    """log pi(chosen) - log pi(rejected) of every pair, logits at completion positions only."""
    batch = RowBatch.build([pair.rows[side] for side in (0, 1) for pair in pairs], device)
    hidden_MH = hidden_states(model, batch)[batch.row_M, batch.at_M]
    logits_MV = model.get_output_embeddings()(hidden_MH)
    value_M = -nn.functional.cross_entropy(logits_MV.float(), batch.target_M, reduction="none")
    value_R = batch.spread(value_M).sum(dim=1)
    return value_R[: len(pairs)] - value_R[len(pairs) :]


def dpo_backward(model: Any, pairs: Sequence[Pair], device: str) -> None:
    """loss.backward() of DPO with every weight trainable (reference terms are constants and left out)."""
    (-nn.functional.logsigmoid(0.1 * dpo_margins(model, pairs, device))).mean().backward()
    model.zero_grad(set_to_none=True)


def forward_with_activations(model: Any, pairs: Sequence[Pair], device: str, shared: bool) -> None:
    """Log-probabilities whose graph is kept, weights frozen: what any backward pass starts from."""
    rows = [pair.rows[side] for side in (0, 1) for pair in pairs]
    batch = RowBatch.build_shared(pairs, device) if shared else RowBatch.build(rows, device)
    handle = model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.detach().requires_grad_(True))
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        values = completion_logprobs(model, batch, Head.of(model))
        assert values.requires_grad
    finally:
        handle.remove()
        for parameter, wanted in flags:
            parameter.requires_grad_(wanted)


class LiveBytes(TorchDispatchMode):
    """Sum of the storages of tensors made inside it, and its peak; what kernels allocate within themselves is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._seen and key not in given:
                    self._seen.add(key)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Highest sum of tensors that `work` makes."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as counted:
        work()
    return counted.peak


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(work: Callable[[], object], device: str, clock: str = "wall") -> float:
    """Time of one call."""
    gc.collect()
    start = CLOCKS[clock]()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return CLOCKS[clock]() - start


def report_time(ways: dict[str, Way], pairs: Sequence[Pair], repeats: int, device: str, clock: str) -> None:
    """Time every way in turn; print the best and the median, and ratios to the last way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):  # the first round warms up
        for name, way in ways.items():
            with way() as work:
                took = seconds(work, device, clock)
            if repeat:
                times[name].append(took)
    best = {name: min(values) / len(pairs) for name, values in times.items()}
    *_, plain = best
    tokens = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs) / len(pairs)
    for name, values in times.items():
        print(
            f"{clock} time {name:>13}: {best[name]:6.2f} s per pair at best, {statistics.median(values) / len(pairs):6.2f} at "
            f"the median, {tokens / best[name]:5.0f} tokens/s; {best[name] / best[plain]:.2f} x {plain}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=320, help="per side")
    parser.add_argument("--prompt-share", type=float, default=0.5, help="of a side's tokens")
    parser.add_argument("--dim", type=int, default=DEFAULT_SKETCH_DIM)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", action="append", choices=["time", "memory"], help="default: both")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    args = parser.parse_args()

    device, measures = args.device, args.measure or ["time", "memory"]
    model = load(args.model, getattr(torch, args.dtype), device).eval()
    coverage = select_layers(model)
    layout = SketchLayout.plan(coverage.layers, args.dim)
    pairs = make_pairs(args.pairs, args.tokens, model.get_output_embeddings().weight.shape[0], args.prompt_share)
    print(
        f"{coverage.total_parameters / 1e6:.0f}M parameters, {coverage.share:.0%} in {len(coverage.layers)} sketched "
        f"layers, sketch {layout.dim} (P = {layout.layers[0].p}), {args.dtype} on {device}, "
        f"{torch.get_num_threads()} threads, {args.pairs} pairs of 2 x {args.tokens} tokens, "
        f"{len(pairs[0].prompt)} of each side prompt"
    )

    with Sketcher(model, layout, seed=0, prefix_sharing=True) as probed:
        can_share = probed.sharing
    print(probed.sharing_note or "prompts can be shared")

    @contextmanager
    def ours(shared: bool) -> Iterator[Callable[[], object]]:
        with Sketcher(model, layout, seed=0) as entered:
            entered.sketch(pairs[:1], shared)  # projections are drawn once per worker: not counted
            yield lambda: entered.sketch(pairs, shared)

    ways: dict[str, Way] = {"sketch": lambda: ours(False)}
    if can_share:
        ways["shared sketch"] = lambda: ours(True)
    ways["DPO backward"] = lambda: nullcontext(lambda: dpo_backward(model, pairs, device))
    if "time" in measures:
        report_time(ways, pairs, args.repeats, device, args.clock)
    if "memory" in measures:
        peaks = {}
        for name, way in ways.items():
            with way() as work:
                peaks[name] = peak_bytes(work, device)
        plain = peaks.pop("DPO backward")
        for name, mine in peaks.items():
            shared = name.startswith("shared")
            least = peak_bytes(lambda: forward_with_activations(model, pairs, device, shared), device)  # noqa: B023
            print(
                f"peak memory {name:>14}: {mine / 2**20:,.0f} MiB, {mine / least:.2f} x forward + activations "
                f"({least / 2**20:,.0f} MiB), {mine / plain:.2f} x DPO backward ({plain / 2**20:,.0f} MiB)"
            )


if __name__ == "__main__":
    main()

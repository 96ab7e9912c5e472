"""Time per pair of the sketch pass against a plain DPO loss.backward(), same batch, model and machine.

    python benchmarks/gradients.py [--model FOLDER] [--dtype bfloat16] [--pairs 2] [--tokens 320] [--device cpu]

The DPO side: all weights trainable, no optimizer step, no reference pass, logits at completion positions only. Without
--model: a Qwen2-like model of 0.36B parameters, random weights. Each side runs --repeats times after one warm-up,
alternating; the best run counts, since other work on the machine only adds time.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stages.gradients.layers import select_layers
from stages.gradients.logprobs import hidden_states
from stages.gradients.projections import DEFAULT_SKETCH_DIM, SketchLayout
from stages.gradients.rows import Pair, RowBatch
from stages.gradients.sketcher import Sketcher


def load(folder: str | None, dtype: torch.dtype, device: str) -> nn.Module:
    """The model under test."""
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    config = Qwen2Config(
        **{"vocab_size": 65_536, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 20},
        **{"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)


def make_pairs(count: int, tokens: int, vocabulary: int) -> list[Pair]:
    """Pairs of `tokens` tokens a side, a third of them prompt."""
    rng = random.Random(0)
    n_prompt = tokens // 3

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocabulary) for _ in range(n))

    return [Pair(ids(n_prompt), ids(tokens - n_prompt), ids(tokens - n_prompt)) for _ in range(count)]


def dpo_backward(model: nn.Module, pairs: Sequence[Pair], device: str) -> None:
    """loss.backward() of DPO with every weight trainable (reference terms are constants and left
    out)."""
    rows = [pair.rows[0] for pair in pairs] + [pair.rows[1] for pair in pairs]
    batch = RowBatch.build(rows, device)
    hidden_MH = hidden_states(model, batch.ids_BT)[batch.row_M, batch.at_M]
    logits_MV = model.get_output_embeddings()(hidden_MH)
    value_M = -nn.functional.cross_entropy(logits_MV.float(), batch.target_M, reduction="none")
    value_R = batch.spread(value_M).sum(dim=1)
    margin_N = value_R[: len(pairs)] - value_R[len(pairs) :]
    (-nn.functional.logsigmoid(0.1 * margin_N)).mean().backward()
    model.zero_grad(set_to_none=True)


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    gc.collect()
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=320, help="per side")
    parser.add_argument("--dim", type=int, default=DEFAULT_SKETCH_DIM)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    model = load(args.model, getattr(torch, args.dtype), args.device).eval()
    coverage = select_layers(model)
    layout = SketchLayout.plan(coverage.layers, args.dim)
    pairs = make_pairs(args.pairs, args.tokens, model.get_output_embeddings().weight.shape[0])
    print(
        f"{coverage.total_parameters / 1e6:.0f}M parameters, {coverage.share:.0%} in "
        f"{len(coverage.layers)} sketched layers, sketch {layout.dim} (P = {layout.layers[0].p}), "
        f"{args.dtype} on {args.device}, {torch.get_num_threads()} threads, "
        f"{args.pairs} pairs of 2 x {args.tokens} tokens"
    )

    times: dict[str, list[float]] = {"sketch": [], "dpo": []}
    for repeat in range(args.repeats + 1):  # the first round warms up
        with Sketcher(model, layout, seed=0) as sketcher:
            sketcher.sketch(pairs[:1])  # projections are drawn once per worker: not timed
            sketch = seconds(lambda: sketcher.sketch(pairs), args.device)
        dpo = seconds(lambda: dpo_backward(model, pairs, args.device), args.device)
        if repeat:
            times["sketch"].append(sketch)
            times["dpo"].append(dpo)
    best = {name: min(values) / args.pairs for name, values in times.items()}
    for name, values in times.items():
        median = statistics.median(values) / args.pairs
        print(f"{name:>6}: {best[name]:.2f} s per pair at best, {median:.2f} at the median")
    print(f" ratio: sketch / DPO backward = {best['sketch'] / best['dpo']:.2f} (best runs: neighbours only add time)")


if __name__ == "__main__":
    main()

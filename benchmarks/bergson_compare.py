"""Sketch throughput against bergson (`bergson build`): same model, rows, projection width and token budget, one machine.

    python -m benchmarks.bergson_compare --bergson PYTHON --model FOLDER [--dtype bfloat16] [--pairs 6] [--tokens 320]

PYTHON: the interpreter of an environment in which bergson 2.5 is installed (`pip install "bergson==2.5.*"`; it is no
dependency of this project). bergson gets token ids with the prompt's labels masked and makes one gradient per side; ours
makes one per pair, once with a row for each side and once with prompts shared. Both: Gaussian two-sided projections of
width --width on the backbone's linear layers, loss on the completion, first batch and drawing of projections included,
loading of the model not. Runs alternate; the best of --repeats counts. Kept out of the comparison: bergson also writes its
index (a memory map), ours packs float16.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gradients import CLOCKS, load, make_pairs
from stages.gradients.batching import TokenBudget
from stages.gradients.layers import select_layers
from stages.gradients.projections import SketchLayout
from stages.gradients.rows import Pair
from stages.gradients.sketcher import Sketcher
from stages.gradients.store import pack_sketches

PRECISION = {"bfloat16": "bf16", "float32": "fp32"}
DRIVER = """
import sys, time
import torch
torch.set_num_threads(int(sys.argv.pop(1)))
import bergson.build as build
from bergson.__main__ import main
collect = build.collect_gradients
def timed(*args, **kwargs):
    begun = time.perf_counter(), time.process_time()
    collect(*args, **kwargs)
    print("seconds", time.perf_counter() - begun[0], time.process_time() - begun[1], flush=True)
build.collect_gradients = timed
main()
"""


def write_rows(pairs: Sequence[Pair], path: Path) -> None:
    """Both sides of every pair as token ids and labels (prompt masked)."""
    with path.open("w", encoding="utf-8") as file:
        for row in (row for pair in pairs for row in pair.rows):
            labels = [-100] * len(row.prompt) + list(row.completion)
            file.write(json.dumps({"input_ids": row.prompt + row.completion, "labels": labels}) + "\n")


def bergson_seconds(python: str, model: str, rows: Path, run: Path, args: argparse.Namespace) -> float:
    """Time of bergson's gradient collection, in a process of its own. Raises RuntimeError with its output."""
    options = {
        **{"model": model, "dataset": str(rows), "precision": PRECISION[args.dtype]},
        **{"projection_dim": args.width, "projection_type": "normal", "token_batch_size": args.budget},
        "nproc_per_node": 1,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [python, "-c", DRIVER, str(torch.get_num_threads()), "build", str(run), *words, "--overwrite"]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = re.search(r"^seconds ([\d.]+) ([\d.]+)$", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        raise RuntimeError(f"bergson failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return float(found.group(1 + list(CLOCKS).index(args.clock)))


def our_seconds(
    model: torch.nn.Module, layout: SketchLayout, pairs: Sequence[Pair], share: bool, args: argparse.Namespace
) -> float:
    """Time of sketching and packing. Measuring whether prompts can be shared draws the projections: both counted."""
    begun = CLOCKS[args.clock]()
    with Sketcher(model, layout, seed=0, prefix_sharing=share) as sketcher:  # type: ignore[arg-type]
        if share and not sketcher.sharing:
            raise RuntimeError(sketcher.sharing_note)
        pack_sketches(sketcher.run(pairs, TokenBudget(args.budget)).sketch_ND)
        return CLOCKS[args.clock]() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bergson", required=True, metavar="PYTHON")
    parser.add_argument("--model", required=True, help="folder with tokenizer")
    parser.add_argument("--dtype", default="bfloat16", choices=list(PRECISION))
    parser.add_argument("--device", default="cpu", help="ours; bergson takes CUDA when it sees it")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=320, help="per side")
    parser.add_argument("--prompt-share", type=float, default=0.5, help="of a side's tokens")
    parser.add_argument("--width", type=int, default=16, help="projection width P of every layer")
    parser.add_argument("--budget", type=int, default=2048, help="padded tokens per batch")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: processor time of all threads")
    args = parser.parse_args()

    model = load(args.model, getattr(torch, args.dtype), args.device).eval()
    layers = select_layers(model).layers
    layout = SketchLayout.plan(layers, args.width**2 * len(layers))
    pairs = make_pairs(args.pairs, args.tokens, model.get_input_embeddings().weight.shape[0], args.prompt_share)
    tokens = sum(len(row) for pair in pairs for row in pair.rows)
    times: dict[str, list[float]] = {"bergson": [], "ours": [], "ours, prompts shared": []}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(pairs, rows)
        for _ in range(args.repeats):
            times["bergson"].append(bergson_seconds(args.bergson, args.model, rows, Path(folder) / "index", args))
            times["ours"].append(our_seconds(model, layout, pairs, False, args))
            times["ours, prompts shared"].append(our_seconds(model, layout, pairs, True, args))
        info = json.loads((Path(folder) / "index" / "info.json").read_text(encoding="utf-8"))
    print(
        f"{len(pairs)} pairs of 2 x {args.tokens} tokens ({len(pairs[0].prompt)} prompt), {args.dtype}, "
        f"{torch.get_num_threads()} threads; {len(info['grad_sizes'])} layers in bergson, {len(layers)} in ours, "
        f"{sum(info['grad_sizes'].values())} and {layout.dim} numbers a gradient"
    )
    theirs = min(times["bergson"])
    for name, values in times.items():
        best = min(values)
        print(
            f"{name:>20}: {best:6.1f} s, {tokens / best:6.0f} tokens/s (of both sides in full), "
            f"{len(pairs) / best:.3f} pairs/s, {theirs / best:.2f} x bergson"
        )


if __name__ == "__main__":
    main()

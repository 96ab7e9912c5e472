"""Right results first, then every figure promised of a GPU with its baseline in the same process, and the ceilings beside them.

    python -m benchmarks.gpu_check [--out gpu-check.json] [--device cuda] [--small] [--only PART]

Needs a checkout, torch, transformers, accelerate, safetensors, numpy and pydantic; no network and no weights. Under eight minutes on a GPU. Without a
GPU it runs on the CPU with small sizes, to see that everything runs: its figures then say nothing. Prints a table with verdicts, writes one JSON. A
part that lacks a package says "not run". Exits with 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import SubprocessError
from typing import Any

import torch

from benchmarks.gpu_check import gradients, optimizers, training, trl_loss
from benchmarks.gpu_check.report import Row, Sizes, as_json, table
from benchmarks.optimizer_step import bandwidth
from schemas.errors import UserError, first_line

PARTS: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "masks": optimizers.masks,
    "largest entries": optimizers.cuts,
    "steps": optimizers.steps,
    "FSDP2": optimizers.sharded,
    "sketches": gradients.correct,
    "waits": gradients.waits,
    "tiny run": training.tiny,
    "TRL's loss": trl_loss.loss,
    "stages": training.stages,
    "optimizer speed": optimizers.speed,
    "gradient speed": gradients.speed,
}
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    SubprocessError,  # Triton's compiler
    TypeError,
    ValueError,
    UserError,
)


def run(name: str, sizes: Sizes) -> list[Row]:
    """The rows of one part; what ends it early is a row too."""
    rows: list[Row] = []
    try:
        for row in PARTS[name](sizes):
            rows.append(row)
            print(f"{row.part}: {row.what}: {row.value} {row.verdict} {row.note}", file=sys.stderr, flush=True)
    except ModuleNotFoundError as error:
        rows.append(Row(name, "", "", "", "not run", f"there is no package {error.name}"))
    except _FAILURES as error:
        rows.append(Row(name, "", "", "", "wrong", f"{type(error).__name__}: {first_line(error)}"))
    return rows


def facts(device: str) -> dict[str, Any]:
    """The machine and its packages."""
    packages = {}
    for name in ("torch", "triton", "transformers", "accelerate", "safetensors", "numpy", "polars", "trl"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = ""
    named = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"date": time.strftime("%Y-%m-%d"), "device": named, "cpus": os.cpu_count(), "packages": packages}


def main() -> int:
    """Run the parts; 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="small sizes; always so on a CPU")
    parser.add_argument("--only", action="append", choices=list(PARTS), help="may be given several times")
    options = parser.parse_args()
    sizes = Sizes.of(options.device, options.small or options.device == "cpu")
    started = time.monotonic()
    known = facts(options.device)
    copy = bandwidth(sizes.device, sizes.copy_bytes)
    rows = [Row("machine", "copy, read and written", f"{copy / 1e9:.1f} GB/s", "", "measured", known["device"])]
    for name in options.only or PARTS:
        rows += run(name, sizes)
    known["seconds"] = round(time.monotonic() - started, 1)
    print(table(rows))
    options.out.write_text(json.dumps(as_json(known, rows), indent=1) + "\n", encoding="utf-8")
    wrong, missed = (sum(row.verdict == verdict for row in rows) for verdict in ("wrong", "missed"))
    print(f"\n{known['device']}, {known['seconds']} s: {wrong} wrong, {missed} aims missed; {options.out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Main memory of each of several processes that read a model and cut it over themselves (FSDP2, gloo, CPU).

python -m benchmarks.sharded_load --processes 4 --layers 24

A random Llama in bfloat16 on disk; every process reads it, whole in float32 or mapped from its files (`stages.models.load.load_to_cut`), and
keeps its share in float32. The figure is the peak of memory of the process's own (RssAnon of /proc, sampled fifty times a second) over what it had before;
pages of files are shared by a machine's processes and can be dropped.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from stages.contract import ModelRef
from stages.models.load import load_causal_lm, load_to_cut
from stages.train.sharding import mesh_over, shard

CPU = torch.device("cpu")


class _Peak:
    """The most memory of this process's own while it is open, in bytes over the beginning."""

    def __enter__(self) -> _Peak:
        self.begun = self.most = _own()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self.bytes = max(self.most, _own()) - self.begun

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, _own())


def _own() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024


def _read_and_cut(rank: int, processes: int, port: int, folder: Path, way: str, said: Any) -> None:
    store = dist.TCPStore("127.0.0.1", port, processes, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    mesh, ref = mesh_over(CPU, 1), ModelRef("m", folder, "d")
    begun = time.monotonic()
    with _Peak() as peak:
        model = load_to_cut(ref) if way == "mapped" else load_causal_lm(ref, torch.float32, CPU)
        shard(model, mesh)
    said.put((rank, peak.bytes, _own() - peak.begun, time.monotonic() - begun))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure and print both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--layers", type=int, default=24)
    arguments = parser.parse_args()
    console, context = Console(highlight=False), get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="sharded-load-") as name:
        config = LlamaConfig(
            vocab_size=8000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=arguments.layers,
            num_attention_heads=16,
            num_key_value_heads=8,
        )
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        weights = sum(p.numel() for p in model.parameters())
        model.save_pretrained(name)
        del model
        console.print(
            f"{weights / 1e6:.0f} million weights: {4 * weights / 1e6:,.0f} MB in float32; {arguments.processes} processes"
        )
        for way in ("whole", "mapped"):
            said, port = context.Queue(), dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
            given = [
                (rank, arguments.processes, port + 1, Path(name), way, said) for rank in range(arguments.processes)
            ]
            children = [context.Process(target=_read_and_cut, args=each) for each in given]
            for child in children:
                child.start()
            found = [said.get(timeout=300) for _ in children]
            for child in children:
                child.join()
            peak, after = max(entry[1] for entry in found), max(entry[2] for entry in found)
            seconds = max(entry[3] for entry in found)
            console.print(
                f"{way}: at most {peak / 1e6:,.0f} MB of a process's own ({after / 1e6:,.0f} MB once it is cut), {seconds:.1f} s"
            )


if __name__ == "__main__":
    main()

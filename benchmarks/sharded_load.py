"""Main memory of each of several processes that read a model, cut it over themselves, save and export it (FSDP2, gloo, CPU).

python -m benchmarks.sharded_load --processes 4 --layers 24

A random Llama in bfloat16 on disk; every process reads it, whole in float32 or mapped from its files (`stages.models.load.load_to_cut`), and
keeps its share in float32. Then a checkpoint (weights, AdamW's two moments) and the export, each gathered whole by the first process and by
rows (`stages/train/rows.py`, `stages.train.sharding.unsharded`). The figure is the peak of memory of the process's own (RssAnon of /proc, sampled fifty times a second) over what it had before;
pages of files are shared by a machine's processes and can be dropped.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from stages.contract import ModelRef
from stages.models.load import load_causal_lm, load_to_cut
from stages.train.rows import parted_state, weights_of, write_rows
from stages.train.sharding import mesh_over, shard, unsharded

CPU = torch.device("cpu")


class Peak:
    """The most memory of this process's own while it is open, in bytes over the beginning; looked at every so many seconds."""

    def __init__(self, seconds: float = 0.02) -> None:
        self._seconds = seconds

    def __enter__(self) -> Peak:
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
        while not self._over.wait(self._seconds):
            self.most = max(self.most, _own())


def _own() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024


def _process(rank: int, processes: int, port: int, folder: Path, way: str, said: Any) -> None:
    """Read, save a checkpoint, export. way: whole, as it was once: read, or gathered for the first process to write; rows: as it is."""
    store = dist.TCPStore("127.0.0.1", port, processes, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    mesh, ref, out = mesh_over(CPU, 1), ModelRef("m", folder, "d"), folder / way
    out.mkdir(exist_ok=True)
    with _measured("read and cut", rank, way, said):
        model = load_to_cut(ref) if way == "rows" else load_causal_lm(ref, torch.float32, CPU)
        empty = shard(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.ones_like(p),
            "exp_avg_sq": torch.ones_like(p),
        }
    with _measured("checkpoint", rank, way, said):
        tensors, _ = parted_state(optimizer)
        if way == "rows":
            write_rows(weights_of(model), out / "weights")
            write_rows(tensors, out / "optimizer")
        else:
            _gathered(weights_of(model), rank, out / "model.safetensors")
            _gathered(tensors, rank, out / "optimizer.safetensors")
    del optimizer, tensors
    with _measured("export", rank, way, said):
        if way == "rows":
            whole = unsharded(model, empty, torch.bfloat16, None if rank else out / "whole.safetensors")
            if not rank:
                whole.save_pretrained(out)  # type: ignore[operator]
        else:
            _gathered(weights_of(model), rank, out / "exported.safetensors")
    dist.destroy_process_group()


def _gathered(tensors: dict[str, torch.Tensor], rank: int, file: Path) -> None:
    """What checkpoints and exports did: all tensors whole in the first process before it writes the first."""
    whole = {name: full for name, tensor in tensors.items() if (full := tensor.full_tensor()) is not None and not rank}  # type: ignore[attr-defined]
    if not rank:
        save_file(whole, file)


@contextmanager
def _measured(what: str, rank: int, way: str, said: Any) -> Iterator[None]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again, unseen
    dist.barrier()
    begun = time.monotonic()
    with Peak() as peak:
        yield
        dist.barrier()
    said.put((what, way, rank, peak.bytes, time.monotonic() - begun))


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
        for way in ("whole", "rows"):
            said, port = context.Queue(), dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
            given = [
                (rank, arguments.processes, port + 1, Path(name), way, said) for rank in range(arguments.processes)
            ]
            children = [context.Process(target=_process, args=each) for each in given]
            for child in children:
                child.start()
            found = [said.get(timeout=300) for _ in range(3 * len(children))]
            for child in children:
                child.join()
            for what in ("read and cut", "checkpoint", "export"):
                own = {entry[2]: entry[3] for entry in found if entry[0] == what}
                seconds = max(entry[4] for entry in found if entry[0] == what)
                console.print(
                    f"{way}, {what}: {own[0] / 1e6:,.0f} MB of the first process's own, at most"
                    f" {max(own.values()) / 1e6:,.0f} MB of any, {seconds:.1f} s"
                )


if __name__ == "__main__":
    main()

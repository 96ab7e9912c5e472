"""What two gloo processes (and three) compute for test_optimizers_sharded.py, and what one process is asked for the same."""

from __future__ import annotations

import errno
import json
import resource
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from benchmarks.sharded_load import Peak
from schemas.errors import UserError
from stages.train.checkpoints import STATE, WEIGHTS
from stages.train.disk import writing
from stages.train.optimizers import ActiveEntries, Merge, OnlineMergingAdamW, Protected, TaskVector
from stages.train.optimizers.masks import is_top, kept_of, room_of
from stages.train.optimizers.shard import LocalRows as Rows
from stages.train.optimizers.top import Held, cuts_by_digits
from stages.train.processes import error_of_any
from stages.train.rows import parted_state, read_rows, read_state, weights_of, write_rows

STEPS, ROWS = 6, 8
SMALL, FILE_BYTES = "optimizer.pt", 1 << 17
RESUMED = ("ondare released", "trust region, every 3", "onties")
INPUTS, OUTPUTS = 12_000, 3
"""The first matrix has 7 rows, 84,000 entries: the second process's part begins inside one block of random masks (65,536 entries)
and ends inside the next."""


@dataclass(frozen=True)
class Case:
    """Settings of an optimizer. double: in float64, where rounding does not decide which of two entries is the larger."""

    settings: dict[str, Any]
    double: bool = True
    bf16_start: bool = False


def protected(side: str) -> Protected:
    generator = torch.Generator().manual_seed(7)
    matrices = {n: p for n, p in make_model(False).named_parameters() if p.ndim == 2 and min(p.shape) > 2}
    changes = {n: torch.randn(p.shape, generator=generator) for n, p in matrices.items()}
    return Protected.none().extended(changes, side, 0.5, 2)  # type: ignore[arg-type]


def active(share: float) -> ActiveEntries:
    """Random entries of most parameters; whole rows of the second matrix."""
    generator = torch.Generator().manual_seed(8)
    masks = {n: torch.rand(p.shape, generator=generator) < share for n, p in make_model(False).named_parameters()}
    masks["2.weight"] = torch.rand(11, 1, generator=generator) < 0.5
    masks["0.bias"] = torch.tensor([True])
    del masks["5.bias"]
    return ActiveEntries(masks)


CASES = {
    "adamw": Case({}),
    "ondare": Case({"merge": Merge("ondare", alpha=0.01, reserve=0.5)}),
    "ondare released": Case(
        {"merge": Merge("ondare", alpha=0.01, reserve=0.3, preset="released", rescale=True, every=2)},
        double=False,
        bf16_start=True,
    ),
    "onties": Case({"merge": Merge("onties", alpha=0.01, reserve=0.3)}),
    "onties released": Case({"merge": Merge("onties", alpha=0.01, reserve=0.3, preset="released", rescale=True)}),
    "anchor": Case({"merge": Merge("anchor", alpha=0.01, alpha_schedule="constant")}),
    "masked, merged": Case({"active": 0.2, "merge": Merge("onties", alpha=0.01, reserve=0.3), "weight_decay": 0.1}),
    "left": Case({"protected": "left", "weight_decay": 0.1}),
    "right": Case({"protected": "right"}),
    "both, merged": Case({"protected": "both", "merge": Merge("ondare", alpha=0.01, reserve=0.5)}),
    "trust region": Case({"trust_radius": 0.02}, double=False),
    "trust region, every 3": Case({"trust_radius": 0.02, "merge": Merge("ondare", alpha=0.01, reserve=0.5, every=3)}),
}


def make_model(double: bool, bf16_start: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(INPUTS, 7), nn.Tanh(), nn.Linear(7, 11, bias=False), nn.Tanh(), nn.Linear(11, OUTPUTS)
    )
    model.append(nn.Linear(OUTPUTS, 1))  # one row: a process holds none of it
    if bf16_start:
        model.bfloat16()
    return model.double() if double else model.float()


def shard(model: nn.Sequential) -> nn.Sequential:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model


def make_optimizer(model: nn.Module, case: Case) -> OnlineMergingAdamW:
    settings = dict(case.settings)
    if isinstance(settings.get("protected"), str):
        settings["protected"] = protected(settings["protected"])
    if isinstance(settings.get("active"), float):
        settings["active"] = active(settings["active"])
    generator = torch.Generator().manual_seed(99)
    tau = {n: torch.randn(p.shape, generator=generator) for n, p in make_model(False).named_parameters()}
    merged = settings.get("merge")
    vector = TaskVector.from_tensors(tau) if merged is not None and merged.needs_task_vector else None
    return OnlineMergingAdamW(model.named_parameters(), lr=1e-2, task_vector=vector, telemetry_every=1, **settings)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rows: slice = slice(None)) -> list[float]:
    """Losses of this process's rows of each step's batch."""
    losses = []
    dtype = next(model.parameters()).dtype
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(ROWS, INPUTS, generator=generator)[rows].to(dtype)
        y = torch.randn(ROWS, 1, generator=generator)[rows].to(dtype)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}


def top_inputs() -> list[torch.Tensor]:
    """Tensors with many ties, of zeros, of distinct values; the last has one row."""
    generator = torch.Generator().manual_seed(3)
    ties = torch.randint(-3, 4, (9, 10), generator=generator).float()
    return [ties, torch.zeros(5, 4), torch.randn(33, 7, generator=generator), torch.randn(1, 12, generator=generator)]


TOPS = [
    (reserve, released, double)
    for reserve in (0.01, 0.3, 0.999, 1.0)
    for released in (False, True)
    for double in (False, True)
]


def two_processes(rank: int, store: str, out: str) -> None:
    """Everything that two processes are asked for, written into the folder `out` by the first."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {"losses": {}, "telemetry": {}}
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    for name, case in CASES.items():
        model = shard(make_model(case.double, case.bf16_start))
        optimizer = make_optimizer(model, case)
        losses = torch.tensor(train(model, optimizer, range(STEPS), half), dtype=torch.float64)
        dist.all_reduce(losses)
        facts["losses"][name] = (losses / 2).tolist()
        facts["telemetry"][name] = optimizer.telemetry
        found |= {f"{name}/{n}": p for n, p in whole(model).items()}
    for name in RESUMED:
        facts[f"resumed {name}"] = _resumed(CASES[name], half, found, name, Path(out))
    facts["of one"] = _of_one(Path(out))
    facts["disk"] = _disk(Path(out))
    facts["memory"] = _memory(Path(out))
    facts["blank"] = _blank()
    facts["uneven"] = _uneven(rank)
    facts["accelerate"] = _accelerate(half, found)
    facts["refused"] = _refused()
    found |= _tops(rank)
    if rank == 0:
        save_file(found, Path(out) / "found.safetensors")
        (Path(out) / "facts.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """As a checkpoint of a training does."""
    tensors, small = parted_state(optimizer)
    write_rows(weights_of(model), folder / WEIGHTS, FILE_BYTES)
    write_rows(tensors, folder / STATE, FILE_BYTES)
    if dist.get_rank() == 0:
        torch.save(small, folder / SMALL)
    dist.barrier()


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    read_rows(weights_of(model), folder / WEIGHTS)
    optimizer.load_state_dict(read_state(optimizer, folder, SMALL))


def _resumed(case: Case, half: slice, found: dict[str, torch.Tensor], name: str, out: Path) -> bool:
    """Whether three steps, saved by rows, and three more in a new optimizer give the bits of six."""
    model = shard(make_model(case.double, case.bf16_start))
    optimizer = make_optimizer(model, case)
    train(model, optimizer, range(3), half)
    save(model, optimizer, out / name)
    again = shard(make_model(case.double, case.bf16_start))
    continued = make_optimizer(again, case)
    load(again, continued, out / name)
    train(again, continued, range(3, STEPS), half)
    return all(torch.equal(p, found[f"{name}/{n}"]) for n, p in whole(again).items())


def _same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    """Whether two optimizers, cut or not, hold the same numbers in the same dtypes. Collective."""
    ours, theirs = a.state_dict()["state"], b.state_dict()["state"]
    full = [{(i, k): _full(v) for i, entries in state.items() for k, v in entries.items()} for state in (ours, theirs)]
    return full[0].keys() == full[1].keys() and all(
        v.dtype == full[1][k].dtype and torch.equal(v, full[1][k]) for k, v in full[0].items()
    )


def _full(value: Any) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)


def _of_one(out: Path) -> bool:
    """Whether the state that one process wrote whole is read by two, each its rows."""
    case = CASES["ondare released"]
    plain = make_model(case.double, case.bf16_start)
    optimizer = make_optimizer(plain, case)
    train(plain, optimizer, range(3))
    folder = out / f"whole of {dist.get_rank()}"  # all have trained the same
    folder.mkdir()
    torch.save(optimizer.state_dict(), folder / SMALL)
    cut = make_optimizer(shard(make_model(case.double, case.bf16_start)), case)
    cut.load_state_dict(read_state(cut, folder, SMALL))
    return _same_state(cut, optimizer)


def _disk(out: Path) -> list[Any]:
    """[what each process met, whether anything is left] when the disk refuses one of them: in what all write, and in what one does by itself."""
    met: list[Any] = []
    rows = {"a": distribute_tensor(torch.ones(8, 512), dist.init_device_mesh("cpu", (2,)), [Shard(0)])}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number, alone in enumerate((False, True)):
        folder = out / f"refused {number}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if dist.get_rank() else before[0], before[1]))
        try:
            with writing(folder, error_of_any):
                folder.mkdir(exist_ok=True)
                if not alone:
                    write_rows(rows, folder / WEIGHTS)
                (folder / f"own {dist.get_rank()}").write_bytes(bytes(8192))
        except OSError as error:
            met.append(errno.errorcode[error.errno or 0])
        dist.barrier()
        met.append(folder.exists())
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, met)
    return everyone


def _memory(out: Path) -> int:
    """Peak of the first process's own memory, in bytes, while two write 2 x 32 MB by rows, in files of 4 MB."""
    mesh = dist.init_device_mesh("cpu", (2,))
    rows = {str(n): DTensor.from_local(torch.ones(256, 1024), mesh, [Shard(0)]) for n in range(32)}
    with Peak(0.002) as peak:
        write_rows(rows, out / "memory", 4 << 20)
    return peak.bytes


def three_processes(rank: int, store: str, out: str) -> None:
    """Whether three hold of what two saved what a single one does."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    torch.set_num_threads(1)
    case = CASES[RESUMED[0]]
    pair = [make_model(case.double, case.bf16_start), shard(make_model(case.double, case.bf16_start))]
    optimizers = [make_optimizer(model, case) for model in pair]
    for model, optimizer in zip(pair, optimizers, strict=True):
        load(model, optimizer, Path(out) / RESUMED[0])
    plain, cut = map(whole, pair)
    same = _same_state(*optimizers) and all(torch.equal(plain[n], p) for n, p in cut.items())
    if rank == 0:
        (Path(out) / "three.json").write_text(json.dumps(same))
    dist.destroy_process_group()


def _blank() -> bool:
    """Whether torch.distributed.checkpoint restores a state and moves nothing by doing so."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    case = Case({"merge": Merge("anchor", alpha=0.01, alpha_schedule="constant"), "weight_decay": 0.1})
    model = shard(make_model(False))
    optimizer = make_optimizer(model, case)
    train(model, optimizer, range(2))
    options = StateDictOptions(full_state_dict=True)
    state = deepcopy(get_optimizer_state_dict(model, optimizer, options=options))  # its steps are the optimizer's own
    before = whole(model)
    fresh = make_optimizer(model, case)
    set_optimizer_state_dict(model, fresh, state, options=options)
    same = all(torch.equal(p, before[n]) for n, p in whole(model).items())
    train(model, optimizer, range(2, 3))
    after = whole(model)
    for n, p in model.named_parameters():
        assert isinstance(p, DTensor)
        p.data.copy_(distribute_tensor(before[n], p.device_mesh, p.placements))
    train(model, fresh, range(2, 3))
    return same and all(torch.equal(p, after[n]) for n, p in whole(model).items())


def _uneven(rank: int) -> bool:
    """Whether a first step with learning rate 0 pulls every weight although one process has gradients of 0 alone."""
    case = Case({"merge": Merge("ondare", alpha=0.01, alpha_schedule="constant")})
    model = shard(make_model(case.double))
    optimizer = make_optimizer(model, case)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        assert isinstance(p.grad, DTensor)
        p.grad.to_local().fill_(rank)
    before = whole(model)
    optimizer.step()
    return all(bool((p != before[n]).all()) for n, p in whole(model).items())


def _accelerate(half: slice, found: dict[str, torch.Tensor]) -> bool:
    """Whether an optimizer made before accelerate shards the model gives the same bits. accelerate offers FSDP2 on GPUs alone;
    its preparation runs here because the plugin is put in by hand."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator = Accelerator(cpu=True)
    model = make_model(True)
    optimizer = make_optimizer(model, CASES["ondare"])
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator.state.distributed_type = DistributedType.FSDP
    prepared, _ = accelerator._prepare_fsdp2(model, optimizer)
    train(prepared, optimizer, range(STEPS), half)
    return all(
        isinstance(p, DTensor) and torch.allclose(p.full_tensor(), found[f"ondare/{n}"], rtol=0, atol=1e-6)
        for n, p in prepared.named_parameters()
    )


def _refused() -> list[str]:
    mesh = dist.init_device_mesh("cpu", (2,))
    columns, rows = (nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(axis)])) for axis in (1, 0))
    both = {
        "protected": Protected({"weight": torch.eye(4)[:, :1]}, {}),
        "active": ActiveEntries({"weight": torch.eye(4) > 0}),
    }
    errors = []
    for parameter, settings in ((columns, {"merge": Merge("anchor", alpha=0.1)}), (rows, both)):
        try:
            OnlineMergingAdamW([("weight", parameter)], **settings)
        except UserError as error:
            errors.append(str(error))
    return errors


def _tops(rank: int) -> dict[str, torch.Tensor]:
    """The largest entries of cut tensors, put together again."""
    mesh = dist.init_device_mesh("cpu", (2,))
    found: dict[str, torch.Tensor] = {}
    for number, (reserve, released, double) in enumerate(TOPS):
        tensors = [distribute_tensor(t.double() if double else t, mesh, [Shard(0)]) for t in top_inputs()]
        held, places = [], []
        for i, t in enumerate(tensors):
            rows, mine = Rows.of("t", t), t.to_local().abs().flatten()
            k = kept_of(t.numel(), reserve, released)
            if 0 < k < t.numel():
                places.append(i)
                held.append(_held(mine, rows.entries[0], k))
        peers = mesh.get_group()
        dtype = torch.float64 if double else torch.float32
        for i, cut in zip(places, cuts_by_digits(held, dtype, torch.device("cpu"), peers) if held else [], strict=True):
            mine = tensors[i].to_local()
            local = torch.arange(mine.numel(), dtype=torch.int32).view(mine.shape)
            mine.mul_(is_top(mine.abs(), local, cut.limit, room_of(cut.last, Rows.of("t", tensors[i]).entries[0])))
        found |= {f"top {number}/{i}": t.full_tensor() for i, t in enumerate(tensors)}
    return found


def _held(magnitudes: torch.Tensor, first: int, k: int) -> Held:
    """In chunks of 2,048, none if nothing is held."""
    return Held(
        lambda: (chunk for chunk in magnitudes.split(2048) if len(chunk)),
        magnitudes.__getitem__,
        first,
        len(magnitudes),
        k,
    )

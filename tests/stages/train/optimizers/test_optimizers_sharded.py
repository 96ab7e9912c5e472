"""Two processes that share the parameters by rows (FSDP2, gloo) give what one gives.

Not bit for bit: a gradient is the mean of two means, and sums over rows are sums of two sums, which round otherwise, and Adam
magnifies the rounding of gradients near 0. 1e-5, a thousandth of a step, is that in float32 (seen: 3e-6); 1e-10 in float64.
"""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors import safe_open
from safetensors.torch import load_file
from sharded_bench import (
    CASES,
    RESUMED,
    STEPS,
    TOPS,
    active,
    load,
    make_model,
    make_optimizer,
    protected,
    three_processes,
    top_inputs,
    train,
    two_processes,
    whole,
)
from torch import nn
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

from schemas.errors import UserError
from stages.train.optimizers import Merge, OnlineMergingAdamW
from stages.train.optimizers.masks import keep_top_
from stages.train.optimizers.trust import exact

SINGLE, DOUBLE = 1e-5, 1e-10


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.set_forkserver_preload(["sharded_bench"])
    for count, job in ((2, two_processes), (3, three_processes)):
        arguments = (str(folder / f"store {count}"), str(folder))
        torch.multiprocessing.start_processes(job, arguments, nprocs=count, start_method="forkserver")
    return folder


@pytest.fixture(scope="module")
def found(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "found.safetensors")


@pytest.fixture(scope="module")
def facts(out: Path) -> dict[str, Any]:
    return json.loads((out / "facts.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_losses_weights_and_telemetry_of_one(
    name: str, found: dict[str, torch.Tensor], facts: dict[str, Any]
) -> None:
    case = CASES[name]
    model = make_model(case.double, case.bf16_start)
    start = whole(model)
    optimizer = make_optimizer(model, case)
    losses, tolerance = train(model, optimizer, range(STEPS)), DOUBLE if case.double else SINGLE
    assert facts["losses"][name] == pytest.approx(losses, abs=tolerance)
    for parameter, weight in whole(model).items():
        torch.testing.assert_close(found[f"{name}/{parameter}"], weight, rtol=0, atol=tolerance)
    assert not any(torch.equal(whole(model)[n], start[n]) for n in ("0.weight", "2.weight")), "nothing was trained"
    assert facts["telemetry"][name] == pytest.approx(optimizer.telemetry, rel=1e-4, abs=SINGLE)


def test_the_largest_entries_are_exactly_those_of_whole_tensors(found: dict[str, torch.Tensor]) -> None:
    for number, (reserve, released, double) in enumerate(TOPS):
        for i, whole_tensor in enumerate(top_inputs()):
            expected = keep_top_(whole_tensor.double() if double else whole_tensor, reserve, released)
            assert torch.equal(found[f"top {number}/{i}"], expected), (reserve, released, double, i)


def test_no_update_of_two_processes_leaks_into_protected_directions(found: dict[str, torch.Tensor]) -> None:
    start = whole(make_model(False))
    for side, name in (("left", "left"), ("right", "right"), ("both", "both, merged")):
        bases = protected(side)
        for parameter, weight in start.items():
            assert bases.leak(parameter, found[f"{name}/{parameter}"].double() - weight.double()) <= 1e-5


def test_two_processes_stay_in_the_trust_region(found: dict[str, torch.Tensor]) -> None:
    start = whole(make_model(False))
    norms = [exact(found[f"trust region/{n}"].double() - w.double()) for n, w in start.items()]
    assert max(norms) <= 0.02 * (1 + 1e-4)
    assert max(norms) > 0.018, "the bound never acted"


@pytest.mark.parametrize("name", RESUMED)
def test_a_state_of_two_processes_resumes_bit_for_bit_on_two_and_rightly_on_one(
    name: str, out: Path, found: dict[str, torch.Tensor], facts: dict[str, Any]
) -> None:
    assert facts[f"resumed {name}"] is True
    case = CASES[name]
    model = make_model(case.double, case.bf16_start)
    optimizer = make_optimizer(model, case)
    load(model, optimizer, out / name)
    train(model, optimizer, range(3, STEPS))
    for parameter, weight in whole(model).items():
        torch.testing.assert_close(found[f"{name}/{parameter}"], weight, rtol=0, atol=DOUBLE if case.double else SINGLE)


def test_the_whole_state_of_one_process_is_read_by_two_and_that_of_two_by_three(
    out: Path, facts: dict[str, Any]
) -> None:
    assert facts["of one"] is True
    assert json.loads((out / "three.json").read_text()) is True


def test_each_process_writes_its_own_rows_of_which_torch_makes_whole_tensors(out: Path, tmp_path: Path) -> None:
    case = CASES["ondare released"]
    model = make_model(case.double, case.bf16_start)
    load(model, make_optimizer(model, case), out / "ondare released")
    held: dict[str, list[int]] = {"shard-00001": [], "shard-00002": []}
    for file in (out / "ondare released" / "weights").iterdir():
        with safe_open(file, "pt") as tensors:
            held[file.name[:11]] += [tensors.get_tensor(name).numel() for name in tensors.keys()]  # noqa: SIM118
    assert sum(map(sum, held.values())) == sum(p.numel() for p in model.parameters())
    assert sum(held["shard-00001"]) < 0.6 * sum(map(sum, held.values()))
    names = dict.fromkeys(dict(model.named_parameters()), 1)
    consolidate_safetensors_files(str(out / "ondare released" / "weights"), str(tmp_path), names)
    whole_tensors = load_file(tmp_path / "model-00001-of-00001.safetensors")
    assert all(torch.equal(whole_tensors[name], p) for name, p in model.named_parameters())
    assert not [
        p for p in (out / "ondare released").rglob("*") if p.is_file() and p.suffix not in (".safetensors", ".pt")
    ]


def test_a_disk_that_refuses_one_process_is_heard_in_all_and_nothing_is_left(facts: dict[str, Any]) -> None:
    assert facts["disk"] == [["EFBIG", False, "EFBIG", False]] * 2


def test_what_a_process_writes_is_not_whole_in_its_memory(facts: dict[str, Any]) -> None:
    assert facts["memory"] < 24 << 20, "three files' worth, twice; its rows are 32 MB, all 64"


def test_torch_distributed_checkpoint_restores_a_state_without_a_step(facts: dict[str, Any]) -> None:
    assert facts["blank"] is True


def test_gradients_of_0_in_one_process_alone_do_not_split_the_processes(facts: dict[str, Any]) -> None:
    assert facts["uneven"]


def test_parameters_that_accelerate_shards_afterwards_are_found_by_name(facts: dict[str, Any]) -> None:
    assert facts["accelerate"] is True


def test_parameters_cut_by_columns_are_refused_and_so_are_mask_and_subspace_on_rows(facts: dict[str, Any]) -> None:
    columns, both = facts["refused"]
    assert "weight is cut as" in columns and "FSDP2" in columns
    assert "weight is sharded and has both a mask and protected directions" in both


def test_what_is_masked_stays_as_it_was_to_the_bit(found: dict[str, torch.Tensor]) -> None:
    start, masks = whole(make_model(True)), active(0.2)
    for parameter, weight in start.items():
        if masks.covers(parameter):
            frozen = ~masks.mask(parameter).expand_as(weight)
            assert torch.equal(found[f"masked, merged/{parameter}"][frozen], weight[frozen])


def test_flattened_parameters_are_refused_by_name() -> None:
    anchor = Merge("anchor", alpha=0.1)
    zero = nn.Parameter(torch.empty(0))
    zero.ds_id = 3  # type: ignore[attr-defined]  # what DeepSpeed ZeRO-3 leaves of a parameter
    with pytest.raises(UserError, match=r"layer\.weight is a piece of a flattened buffer"):
        OnlineMergingAdamW([("layer.weight", zero)], merge=anchor)
    with pytest.raises(UserError, match="FSDP1"):
        OnlineMergingAdamW([("_fsdp_wrapped_module.weight", nn.Parameter(torch.ones(4)))], merge=anchor)

    named = [("a", nn.Parameter(torch.ones(2, 2))), ("b", nn.Parameter(torch.ones(3)))]
    optimizer = OnlineMergingAdamW(named, merge=anchor)
    flat = nn.Parameter(torch.ones(7))  # what ZeRO-1 and -2 put in the place of a group's parameters
    flat.grad = torch.ones(7)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(UserError, match="flattened"):
        optimizer.step()
    optimizer = OnlineMergingAdamW(named[:1], trust_radius=0.1)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(UserError, match="flattened"):
        optimizer.step()

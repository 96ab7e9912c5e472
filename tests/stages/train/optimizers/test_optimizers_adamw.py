"""With everything off the optimizer is torch.optim.AdamW, bit for bit; what it keeps, saves and refuses."""

from __future__ import annotations

import copy
import io
import random
from typing import Any

import pytest
import torch
from optimizer_bench import SHAPES, Bench, run, same
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from schemas.errors import UserError
from stages.train.optimizers import Merge, OnlineMergingAdamW, TaskVector

NOTHING = [
    Merge("none", 0.5),
    Merge("ondare", 0.0),
    Merge("ondare", 0.0, preset="released"),
    Merge("onties", 0.0),
    Merge("anchor", 0.0),
]
ON = [
    Merge("ondare", 0.01, 0.5),
    Merge("ondare", 0.01, 0.5, "released", rescale=True),
    Merge("onties", 0.01, 0.3),
    Merge("onties", 0.01, 0.3, "released"),
    Merge("anchor", 0.01),
    Merge("ondare", 0.01, 0.5, every=3),
    Merge("anchor", 0.01, every=4),
]


def groups(weights: dict[str, nn.Parameter], decay: float) -> list[dict[str, Any]]:
    """Matrices with decay and a smaller rate, the rest without."""
    named = list(weights.items())
    return [
        {"params": [(n, p) for n, p in named if p.ndim >= 2], "weight_decay": decay, "lr": 3e-3, "betas": (0.8, 0.95)},
        {"params": [(n, p) for n, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("merge", NOTHING, ids=str)
def test_all_off_is_torch_bit_for_bit(foreach: bool | None, dtype: torch.dtype, merge: Merge) -> None:
    """Groups, decay, a schedule, amsgrad, and a state_dict round trip through torch's own optimizer and back."""
    seed = random.SystemRandom().randrange(2**31)
    bench = Bench(seed, dtype)
    gradients = bench.gradients(12)
    arguments: dict[str, Any] = {"lr": 1e-2, "foreach": foreach, "amsgrad": bool(seed % 2)}
    ours, theirs = bench.weights(), bench.weights()
    mine = OnlineMergingAdamW(groups(ours, 0.1), merge=merge, task_vector=bench.vector, **arguments)
    reference = torch.optim.AdamW(groups(theirs, 0.1), **arguments)
    schedules = [LambdaLR(o, lambda step: min(1.0, step / 5)) for o in (mine, reference)]
    run(mine, ours, gradients[:6], schedules[0])
    run(reference, theirs, gradients[:6], schedules[1])
    saved = copy.deepcopy(reference.state_dict())
    for group, own in zip(saved["param_groups"], mine.state_dict()["param_groups"], strict=True):
        group |= {key: own[key] for key in own.keys() - group.keys()}
    mine.load_state_dict(saved)
    run(mine, ours, gradients[6:], schedules[0])
    run(reference, theirs, gradients[6:], schedules[1])
    assert same(ours, theirs), f"seed {seed}"
    for p, q in zip(ours.values(), theirs.values(), strict=True):
        assert mine.state[p].keys() == reference.state[q].keys()
        assert all(torch.equal(mine.state[p][k], reference.state[q][k]) for k in mine.state[p]), f"seed {seed}"


def test_onties_as_released_is_never_torch() -> None:
    bench = Bench(0)
    ours, theirs = bench.weights(), bench.weights()
    gradients = bench.gradients(1)
    run(bench.merged(ours, Merge("onties", 0.0, preset="released")), ours, gradients)
    run(torch.optim.AdamW(theirs.values(), lr=1e-2), theirs, gradients)
    assert not same(ours, theirs)


@pytest.mark.parametrize("merge", ON, ids=str)
def test_a_learning_rate_of_zero_moves_nothing(merge: Merge) -> None:
    bench = Bench(1)
    weights = bench.weights()
    optimizer = bench.merged(weights, merge, weight_decay=0.1)
    run(optimizer, weights, bench.gradients(5))
    before = {name: p.detach().clone() for name, p in weights.items()}
    assert not same(before, bench.start)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    if merge.every > 1:  # a merge that is due still replaces the window's steps: start from a window's beginning
        optimizer, weights = bench.merged(weights, merge, weight_decay=0.1), weights
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    run(optimizer, weights, bench.gradients(7))
    assert same(before, {name: p.detach() for name, p in weights.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merge", ON, ids=str)
def test_saved_and_loaded_at_any_step_it_continues_bit_for_bit(merge: Merge, dtype: torch.dtype) -> None:
    bench = Bench(2, dtype)
    gradients = bench.gradients(9)
    whole = bench.weights()
    run(bench.merged(whole, merge, weight_decay=0.1, seed=5), whole, gradients)
    for at in range(1, 9):
        first = bench.weights()
        optimizer = bench.merged(first, merge, weight_decay=0.1, seed=5)
        run(optimizer, first, gradients[:at])
        file = io.BytesIO()
        torch.save({"optimizer": optimizer.state_dict(), "weights": {n: p.data for n, p in first.items()}}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        second = {name: nn.Parameter(value) for name, value in loaded["weights"].items()}
        resumed = bench.merged(second, merge, weight_decay=0.1, seed=5)
        resumed.load_state_dict(loaded["optimizer"])
        run(resumed, second, gradients[at:])
        assert same(whole, second), at
        for p in second.values():
            assert resumed.state[p]["displacement"].dtype == torch.float32


def test_the_state_never_holds_the_task_vector_and_stays_within_its_bytes() -> None:
    bench = Bench(3, torch.bfloat16)
    bench.start = {name: value.float() for name, value in bench.start.items()}  # bfloat16 values, float32 masters
    weights = bench.weights()
    optimizer = bench.merged(weights, Merge("onties", 0.01, 0.3))
    run(optimizer, weights, bench.gradients(2))
    for p in weights.values():
        state = optimizer.state[p]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", "displacement", "start"}
        assert state["start"].dtype == torch.bfloat16
        extra = sum(state[key].numel() * state[key].element_size() for key in ("displacement", "start"))
        assert extra == 6 * p.numel()
    saved = optimizer.state_dict()
    tensors = [v for state in saved["state"].values() for v in state.values() if torch.is_tensor(v)]
    for tau in bench.tau.values():
        assert not any(t.shape == tau.shape and torch.allclose(t.float(), tau, atol=1e-3) for t in tensors)
    assert {group["task_vector"] for group in saved["param_groups"]} == {bench.vector.fingerprint}


def test_the_state_of_another_task_vector_is_refused() -> None:
    bench, other = Bench(4), Bench(5)
    weights = bench.weights()
    optimizer = bench.merged(weights, Merge("ondare", 0.1))
    run(optimizer, weights, bench.gradients(1))
    with pytest.raises(UserError, match="another task vector"):
        other.merged(other.weights(), Merge("ondare", 0.1)).load_state_dict(optimizer.state_dict())


def test_weights_of_another_checkpoint_than_the_state_are_refused() -> None:
    bench = Bench(6)
    weights, fresh = bench.weights(), bench.weights()
    optimizer = bench.merged(weights, Merge("ondare", 0.1))
    run(optimizer, weights, bench.gradients(2))
    resumed = bench.merged(fresh, Merge("ondare", 0.1))
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(UserError, match=r"embed\.weight is not where"):
        run(resumed, fresh, bench.gradients(1))


def test_missing_misshapen_and_unnamed_parameters_are_refused_by_name() -> None:
    bench = Bench(7)
    merge = Merge("onties", 0.1, 0.5)
    missing = TaskVector.from_tensors({n: t for n, t in bench.tau.items() if n != "layer.bias"})
    with pytest.raises(UserError, match=r"layer\.bias"):
        bench.merged(bench.weights(), merge, missing)
    reshaped = TaskVector.from_tensors(bench.tau | {"norm": torch.ones(23)})
    with pytest.raises(UserError, match=r"norm .*\[23\].*\[24\]"):
        bench.merged(bench.weights(), merge, reshaped)
    with pytest.raises(UserError, match="named_parameters"):
        OnlineMergingAdamW(bench.weights().values(), merge=merge, task_vector=bench.vector)
    with pytest.raises(UserError, match="needs a task vector"):
        OnlineMergingAdamW(bench.weights().items(), merge=merge)
    with pytest.raises(UserError, match="fused belongs to torch's own step"):
        OnlineMergingAdamW([{"params": list(bench.weights().items()), "fused": True}], merge=Merge("anchor", 0.1))
    with pytest.raises(UserError, match="zero"):
        TaskVector.from_tensors({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    with pytest.raises(UserError, match=r"norm is torch\.int64"):
        TaskVector.from_tensors({"norm": torch.ones(24, dtype=torch.int64)})


def test_names_may_carry_what_wrappers_put_in_front() -> None:
    bench = Bench(8)
    weights, wrapped = bench.weights(), bench.weights()
    merge, gradients = Merge("ondare", 0.1, 0.5), bench.gradients(3)
    run(bench.merged(weights, merge), weights, gradients)
    named = [(f"module._orig_mod.{name}", p) for name, p in wrapped.items()]
    run(OnlineMergingAdamW(named, lr=1e-2, merge=merge, task_vector=bench.vector), wrapped, gradients)
    assert same(weights, wrapped)


def test_a_group_may_set_its_own_knobs() -> None:
    """One group merges, the other is torch's."""
    bench = Bench(9)
    ours, theirs = bench.weights(), bench.weights()
    gradients = bench.gradients(3)
    split = groups(ours, 0.1)
    split[1]["merge"] = "none"
    run(OnlineMergingAdamW(split, merge=Merge("ondare", 0.1, 0.5), task_vector=bench.vector, lr=1e-2), ours, gradients)
    run(torch.optim.AdamW(groups(theirs, 0.1), lr=1e-2), theirs, gradients)
    for name in SHAPES:
        assert torch.equal(ours[name], theirs[name]) == (ours[name].ndim < 2)


def test_what_gets_no_gradient_does_not_move() -> None:
    bench = Bench(10)
    weights = bench.weights()
    run(bench.merged(weights, Merge("anchor", 0.1)), weights, [{"norm": torch.ones(24)}])
    moved = {name for name in SHAPES if not torch.equal(weights[name].detach(), bench.start[name])}
    assert moved == {"norm"}


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"alpha": 1.0}, "alpha"),
        ({"alpha": 0.1, "reserve": 0.0}, "reserve"),
        ({"alpha": 0.1, "every": 0}, "every"),
        ({"alpha": 0.1, "rescale": True}, "rescale"),
        ({"alpha": 0.1, "preset": "blog"}, "preset"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(bad: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Merge("ondare", **bad)
    with pytest.raises(UserError, match="anchor"):
        Merge("anchor", 0.1, reserve=0.5)

"""The compiled step against the eager one, which is the reference; what may and may not differ between them.

Tolerance: relative 1e-5 of a step after six steps. The two round some products and sums otherwise (torch's eager kernels fuse them), by
a few units in the last place a step; masks, and what they keep, are the same bits.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_bench import Bench, run
from torch import nn

from stages.train.optimizers import ActiveEntries, Merge, OnlineMergingAdamW, Protected, TaskVector, form
from stages.train.optimizers.masks import random_mask
from stages.train.optimizers.step import Plan, advance

LR = 1e-2
SHAPES: dict[str, tuple[int, ...]] = {"w": (70, 33), "v": (61, 40), "b": (33,), "s": ()}


def optimizer(
    compiled: bool, weights: dict[str, nn.Parameter] | None = None, **settings: Any
) -> tuple[OnlineMergingAdamW, dict[str, nn.Parameter]]:
    random = torch.Generator().manual_seed(1)
    start = {n: torch.randn(s, generator=random).bfloat16().float() for n, s in SHAPES.items()}
    weights = weights or {n: nn.Parameter(value) for n, value in start.items()}
    tau = {n: (0.02 * torch.randn(s, generator=random)).bfloat16() for n, s in SHAPES.items()}
    merge = settings.get("merge")
    vector = TaskVector.from_tensors(tau) if merge is not None and merge.needs_task_vector else None
    named = list(weights.items())
    made = OnlineMergingAdamW(named, lr=LR, weight_decay=0.1, task_vector=vector, compiled=compiled, **settings)
    return made, weights


def gradients(steps: int) -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(2)
    return [{n: torch.randn(s, generator=random) for n, s in SHAPES.items()} for _ in range(steps)]


def active(rows: bool) -> ActiveEntries:
    random = torch.Generator().manual_seed(3)
    shapes = {n: (s[0], 1) if rows and len(s) > 1 else s for n, s in SHAPES.items() if s}
    return ActiveEntries({n: torch.rand(s, generator=random) < 0.4 for n, s in shapes.items()})


def protected() -> Protected:
    random = torch.Generator().manual_seed(4)
    return Protected({n: torch.linalg.qr(torch.randn(SHAPES[n][0], 5, generator=random)).Q for n in ("w", "v")}, {})


SETTINGS: dict[str, dict[str, Any]] = {
    "ondare": {"merge": Merge("ondare", 0.01, 0.3)},
    "ondare released": {"merge": Merge("ondare", 0.01, 0.3, "released", rescale=True)},
    "onties": {"merge": Merge("onties", 0.01, 0.3)},
    "onties released, masked": {"merge": Merge("onties", 0.01, 0.3, "released"), "active": active(False)},
    "anchor, every 2": {"merge": Merge("anchor", 0.01, every=2)},
    "rows, protected, trust": {"active": active(True), "protected": protected(), "trust_radius": 0.05},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_compiled_and_eager_steps_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "COMPILED_CPU", 2048)  # more runs than one
    monkeypatch.setattr(form, "LOOK_CPU", 2048)
    found, before = {}, 3  # at first all steps are equally large, and rounding would decide which are the largest
    for compiled in (False, True):
        first, weights = optimizer(False, **SETTINGS[name])
        run(first, weights, gradients(9)[:before])
        made, weights = optimizer(compiled, weights, **SETTINGS[name])
        made.load_state_dict(copy.deepcopy(first.state_dict()))
        run(made, weights, gradients(9)[before:])
        assert made._chain.form.compiled == compiled, "it was not compiled"
        found[compiled] = {n: (p.detach(), made.state[p]["displacement"]) for n, p in weights.items()}
    for n in SHAPES:
        for eager, fused in zip(found[False][n], found[True][n], strict=True):
            torch.testing.assert_close(fused, eager, rtol=0, atol=1e-5 * LR + 2e-7)
            assert torch.equal(eager != 0, fused != 0), "another entry was kept"


def test_a_step_of_new_numbers_or_another_size_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    original = form._advancing
    monkeypatch.setattr(form, "_advancing", lambda plan: counted.append(plan) or original(plan))  # type: ignore[func-returns-value]
    made, weights = optimizer(True, merge=Merge("ondare", 0.01, 0.3))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, gradient in enumerate(gradients(5)):
            made.param_groups[0]["lr"] = LR * (step + 1) / 5
            run(made, weights, [gradient])
    assert len(counted) == 1 and made._chain.form.compiled


def test_without_a_compiler_the_step_is_the_eager_one_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    made, weights = optimizer(True, merge=Merge("anchor", 0.01))
    eager, twins = optimizer(False, merge=Merge("anchor", 0.01))
    with caplog.at_level(logging.WARNING):
        run(made, weights, gradients(3))
    run(eager, twins, gradients(3))
    assert all(torch.equal(weights[n], twins[n]) for n in SHAPES)
    assert [r.levelname for r in caplog.records if "cannot be compiled" in r.getMessage()] == ["WARNING"]


def test_small_models_are_not_compiled_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for least, compiled in ((10**9, False), (100, True)):
        monkeypatch.setattr("stages.train.optimizers.adamw.COMPILE_FROM", least)
        bench = Bench(1)
        made = bench.merged(bench.weights(), Merge("anchor", 0.01))
        made._decide()
        assert made._chain.form.compiled == compiled


def test_the_compiled_hash_is_the_eager_one_to_the_bit() -> None:
    """Gradients of 0 and a task vector of 1: what moved is the mask."""
    shape = (37, 1000)
    weight = nn.Parameter(torch.zeros(shape))
    merge = Merge("ondare", 0.5, 0.3, alpha_schedule="constant")
    vector = TaskVector.from_tensors({"w": torch.ones(shape).bfloat16()})  # as elsewhere here: it is compiled once
    made = OnlineMergingAdamW([("w", weight)], merge=merge, task_vector=vector, compiled=True, seed=5)
    weight.grad = torch.zeros(shape)
    made.step()
    mask = random_mask(0.3, (5, 0, 1, "task", "w"), 0, weight.numel()).view(shape)
    assert torch.equal(weight.detach() != 0, mask)


def test_not_a_number_is_not_hidden_by_a_mask() -> None:
    for merge in (Merge("ondare", 0.01, 0.3), Merge("onties", 0.01, 0.3)):
        made, weights = optimizer(False, merge=merge)
        gradient = gradients(1)[0]
        gradient["w"][3, 4] = float("nan")
        run(made, weights, [gradient])
        assert bool(weights["w"][3, 4].isnan()) and int(weights["w"].isnan().sum()) == 1


def test_a_step_is_a_function_that_changes_nothing_it_is_given() -> None:
    made, weights = optimizer(False, merge=Merge("ondare", 0.01, 0.3))
    run(made, weights, gradients(1))
    from stages.train.optimizers.part import Piece
    from stages.train.optimizers.terms import Numbers, Places

    part = Piece("w", made._shard("w", weights["w"]), weights["w"], made.state[weights["w"]], None)
    part.task = torch.ones(part.size)
    entries = part.entries(0, part.size)
    before = [None if x is None else x.clone() for x in entries]
    n = Numbers(-LR, 0.03, 1e-8, 0.99, -0.01, 0.1, 0.9, 0.3)
    plan = Plan(0.9, 0.999, rule=Merge("ondare", 0.1, 0.3).rule(), decay="zero")
    new = advance(entries, n, Places(0, 1, 2, 3, 4, 0), plan)
    assert new.weights is not None and not torch.equal(new.weights, entries.weights)
    assert all(x is y or torch.equal(x, y) for x, y in zip(before, entries, strict=True))  # type: ignore[arg-type]

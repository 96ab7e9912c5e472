"""Masks of active entries: selected exactly, what is off them never moves, together with protected subspaces on every column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimizer_bench import SHAPES, Bench, merged, run
from torch import nn

from schemas.errors import UserError
from stages.train.optimizers import ActiveEntries, Merge, OnlineMergingAdamW, Protected
from stages.train.optimizers.active import select_top
from stages.train.optimizers.confine import Confined
from stages.train.optimizers.masks import keep_top_
from stages.train.optimizers.rules.onties import OnTies

MATRICES = ("embed.weight", "layer.weight")
MERGES = [
    Merge("none", 0.0),
    Merge("ondare", 0.05, 0.5),
    Merge("ondare", 0.05, 0.5, "released", rescale=True),
    Merge("onties", 0.05, 0.3, every=3),
    Merge("onties", 0.05, 0.3, "released"),
    Merge("anchor", 0.05),
]


def some(share: float = 0.3, seed: int = 7, rows: bool = False) -> ActiveEntries:
    random = torch.Generator().manual_seed(seed)
    shapes = {n: (s[0], *(1 for _ in s[1:])) if rows and len(s) > 1 else s for n, s in SHAPES.items()}
    return ActiveEntries({n: torch.rand(shape, generator=random) < share for n, shape in shapes.items()})


def protect(side: Any, rank: int = 6) -> Protected:
    random = torch.Generator().manual_seed(40)
    changes = {}
    for name in MATRICES:
        rows, columns = SHAPES[name]
        changes[name] = torch.randn(rows, rank, generator=random) @ torch.randn(rank, columns, generator=random)
    return Protected.none().extended(changes, side, energy=1.0)


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1e-30, 0.25, 0.5, 1.0, 3.0, 1e30]), max_size=30), min_size=1, max_size=4),
    st.floats(0.001, 1.0),
)
def test_the_largest_scores_are_selected_as_a_stable_sort_does(values: list[list[float]], share: float) -> None:
    scores = {f"w{i}": torch.tensor(v) for i, v in enumerate(values)}
    flat = [v for value in values for v in value]
    if not any(flat):
        if flat:
            with pytest.raises(UserError, match="every score is 0"):
                select_top(scores, scores.__getitem__, share)
        return
    selection = select_top(scores, scores.__getitem__, share)
    ours = torch.cat([selection.masks[name].flatten() for name in scores]).tolist()
    k = max(1, round(share * len(flat)))
    best = sorted(range(len(flat)), key=lambda i: (-np.float32(flat[i]), i))[:k]
    assert ours == [i in best and flat[i] > 0 for i in range(len(flat))]
    assert (selection.wanted, selection.kept) == (k, sum(ours))


def test_scores_that_are_not_finite_are_refused_by_name() -> None:
    scores = {"good": torch.ones(3), "bad": torch.tensor([1.0, float("nan")])}
    with pytest.raises(UserError, match="scores of bad"):
        select_top(scores, scores.__getitem__, 0.5)


def test_masks_are_stored_as_bits_and_come_back(tmp_path: Path) -> None:
    masks = {"a": torch.rand(1001, 63) < 0.1, "rows": torch.rand(40, 1) < 0.5, "scalar": torch.tensor(True)}
    active = ActiveEntries(masks)
    active.save(tmp_path / "masks.safetensors")
    again = ActiveEntries.load(tmp_path / "masks.safetensors")
    assert all(torch.equal(again.mask(name), mask) for name, mask in masks.items())
    assert again.fingerprint == active.fingerprint != some().fingerprint
    assert (tmp_path / "masks.safetensors").stat().st_size < 1001 * 63 / 8 + 1000
    assert active.count("rows", 40 * 5) == 5 * int(masks["rows"].sum())


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("merge", MERGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_off_the_mask_does_not_move_by_a_bit(dtype: torch.dtype, merge: Merge, rows: bool) -> None:
    bench = Bench(50, dtype)
    weights, active = bench.weights(), some(rows=rows)
    optimizer = bench.merged(weights, merge, active=active, weight_decay=0.1)
    run(optimizer, weights, bench.gradients(7))
    for name, start in bench.start.items():
        moved = (weights[name].detach() != start) | (optimizer.state[weights[name]]["displacement"] != 0)
        off = ~active.mask(name).expand(start.shape)
        assert not bool(moved[off].any()), name
        if merge.merge != "onties" and name in MATRICES:
            assert float(moved[~off].float().mean()) > 0.4, name


def test_without_the_mask_decay_and_merge_move_what_has_no_gradient() -> None:
    """The check above can fail."""
    bench = Bench(51)
    weights, active = bench.weights(), some()
    optimizer = bench.merged(weights, Merge("anchor", 0.05), weight_decay=0.1)
    gradients = bench.gradients(3)
    for gradient in gradients:
        for name, value in gradient.items():
            active.zero_(name, value)
    run(optimizer, weights, gradients)
    off = ~active.mask("embed.weight")
    assert bool((weights["embed.weight"].detach() != bench.start["embed.weight"])[off].all())


def test_on_the_mask_the_step_is_torchs() -> None:
    bench = Bench(52, torch.float64)
    ours, theirs, active = bench.weights(), bench.weights(), some()
    gradients = bench.gradients(5)
    run(OnlineMergingAdamW(list(ours.items()), lr=1e-2, weight_decay=0.0, active=active), ours, gradients)
    run(torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.0), theirs, gradients)
    for name in SHAPES:
        on = active.mask(name)
        torch.testing.assert_close(ours[name].detach()[on], theirs[name].detach()[on], rtol=1e-12, atol=1e-14)


def test_gradients_are_masked_before_their_norm_is_clipped() -> None:
    weight = nn.Parameter(torch.ones(4))
    active = ActiveEntries({"w": torch.tensor([True, False, False, True])})
    slope = torch.tensor([3.0, 1e6, float("nan"), 4.0])
    with active.on_gradients([("w", weight)]):
        for _ in range(2):  # accumulated
            (weight * slope / 2).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [3.0, 0.0, 0.0, 4.0]
    assert float(nn.utils.clip_grad_norm_([weight], 1.0)) == pytest.approx(5.0)
    weight.grad.zero_()
    (weight * slope).sum().backward()  # the hooks are gone
    assert float(weight.grad[1]) == 1e6


def test_shares_of_a_merge_are_of_the_active_entries() -> None:
    values = torch.randn(10, 100)
    active = ActiveEntries({"w": torch.rand(10, 100) < 0.2})
    count = active.count("w", values.numel())
    active.zero_("w", values)
    kept = keep_top_(values.clone(), 0.1, active=count)
    assert int((kept != 0).sum()) == round(0.1 * count) != round(0.1 * 1000)
    limit = values.abs().flatten().sort(descending=True).values[round(0.1 * count) - 1]
    assert torch.equal(kept, torch.where(values.abs() >= limit, values, 0.0))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("deficient", [False, True])
def test_mask_and_subspace_hold_on_every_column(side: str, deficient: bool) -> None:
    """Against the pseudo-inverse: x_s - Q_s pinv(Q_s) x_s, column by column, with empty, small and rank-deficient ones."""
    random = torch.Generator().manual_seed(3)
    q = torch.linalg.qr(torch.randn(30, 5, dtype=torch.float64, generator=random)).Q
    if deficient:  # the last two directions live on four rows, where the others are 0
        q[:4], q[4:, 3:] = 0.0, 0.0
        q[:2, 3], q[2:4, 4] = 2**-0.5, 2**-0.5
        q[:, :3] = torch.linalg.qr(q[:, :3]).Q
    mask = torch.rand(30, 600, generator=random) < torch.linspace(0, 0.9, 600)
    update = torch.randn(30, 600, dtype=torch.float64, generator=random)
    kept = {"w": q.float()}
    protected = Protected(kept, {}) if side == "left" else Protected({}, kept)
    confined = Confined(protected, ActiveEntries({"w": mask if side == "left" else mask.T}))
    parameter = nn.Parameter(torch.zeros(mask.shape if side == "left" else mask.T.shape))
    confined.check("w", parameter)
    ours = update.clone() if side == "left" else update.T.clone()
    confined.apply_("w", ours)
    ours = ours if side == "left" else ours.T
    frozen = used = short = 0
    for column in range(600):
        s = mask[:, column].numpy()
        expected = np.zeros(30)
        if s.any():
            q_s, x_s = q.float().double().numpy()[s], update[:, column].numpy()[s]
            expected[s] = x_s - q_s @ (np.linalg.pinv(q_s, rcond=1e-6) @ x_s)
            rank = np.linalg.matrix_rank(q_s, tol=1e-6)
            used, frozen, short = used + 1, frozen + (rank == s.sum()), short + (rank < min(5, s.sum()))
            if rank == s.sum():
                assert not ours[:, column].any()
        np.testing.assert_allclose(ours[:, column].numpy(), expected, atol=2e-6)
        assert not ours[:, column].numpy()[~s].any()
        assert float((q.T @ ours[:, column]).norm()) <= 1e-6 * float(update[:, column].norm())
    assert frozen > 20 and used < 600 and (short > 20) == deficient
    assert confined.numbers()["frozen_columns"] == pytest.approx(frozen / used)
    assert confined.numbers()["active"] == pytest.approx(float(mask.float().mean()))


@pytest.mark.parametrize("order", ["mask last", "projection last"])
def test_one_after_the_other_breaks_one_of_the_two(order: str) -> None:
    bench, active, protected = Bench(53), some(), protect("left")
    name, update = "embed.weight", bench.normal("embed.weight")
    if order == "mask last":
        protected.project_(name, update)
        active.zero_(name, update)
        assert protected.leak(name, update) > 0.1
    else:
        active.zero_(name, update)
        protected.project_(name, update)
        assert float(update[~active.mask(name)].abs().max()) > 0.01


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("merge", MERGES[:4], ids=str)
def test_a_hundred_masked_steps_leak_nothing(merge: Merge, side: str, rows: bool) -> None:
    if side == "both" and not rows:
        return
    bench = Bench(54)
    weights, active, protected = bench.weights(), some(0.6, rows=rows), protect(side)
    optimizer = bench.merged(weights, merge, active=active, protected=protected, weight_decay=0.1, trust_radius=3.0)
    run(optimizer, weights, bench.gradients(102))
    for name in MATRICES:
        moved = optimizer.state[weights[name]]["displacement"]
        assert float(moved.norm()) > 0.1 and protected.leak(name, moved) <= 1e-6
        off = ~active.mask(name).expand(moved.shape)
        assert not bool(moved[off].any()) and torch.equal(weights[name].detach()[off], bench.start[name][off])


def test_an_election_after_the_projection_would_leak() -> None:
    """The order that must not be: what the chain does, and what the other order does, on the same step."""
    bench, active, protected = Bench(55), some(0.6), protect("left")
    name = "embed.weight"
    confined = Confined(protected, active)
    delta, tau = 0.1 * bench.normal(name), bench.tau[name].clone()
    right = merged(OnTies(), delta, tau, 0.5)
    confined.apply_(name, right)
    assert protected.leak(name, right) <= 1e-6
    wrong = delta.clone()
    confined.apply_(name, wrong)
    confined.active.zero_(name, tau)
    assert protected.leak(name, merged(OnTies(), wrong, tau, 0.5)) > 0.05


def test_no_learning_rate_moves_nothing_under_a_mask() -> None:
    bench = Bench(56)
    weights = bench.weights()
    optimizer = bench.merged(weights, MERGES[1], active=some(), protected=protect("left"), weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, weights, bench.gradients(2))
    assert all(torch.equal(weights[name].detach(), bench.start[name]) for name in SHAPES)


def test_both_sides_under_an_elementwise_mask_are_refused() -> None:
    bench = Bench(57)
    with pytest.raises(UserError, match=r"embed\.weight.*both sides"):
        bench.merged(bench.weights(), MERGES[0], active=some(), protected=protect("both"))


def test_factors_over_the_bound_are_refused_by_name() -> None:
    bench = Bench(58)
    with pytest.raises(UserError, match=r"embed\.weight"):
        bench.merged(bench.weights(), MERGES[0], active=some(), protected=protect("left"), factor_bytes=1000)
    bench.merged(bench.weights(), MERGES[0], active=some(rows=True), protected=protect("left"), factor_bytes=1000)


def test_rows_of_a_stack_are_masked_as_their_entries_are() -> None:
    random = torch.Generator().manual_seed(3)
    start, rows = torch.randn(5, 7, 9, generator=random), torch.rand(5, 7, 1, generator=random) < 0.4
    ends = []
    for mask in (rows, rows.expand(5, 7, 9).clone()):
        weights = {"stack": nn.Parameter(start.clone())}
        gradients = [{"stack": torch.randn(5, 7, 9, generator=torch.Generator().manual_seed(n))} for n in range(3)]
        optimizer = OnlineMergingAdamW(
            list(weights.items()), lr=0.1, merge=Merge("none", 0.0), active=ActiveEntries({"stack": mask})
        )
        run(optimizer, weights, gradients)
        ends.append(weights["stack"].detach())
    moved = ends[0] != start
    assert torch.equal(ends[0], ends[1]) and torch.equal(moved, rows.expand_as(moved))


def test_a_mask_of_another_shape_and_a_state_of_other_masks_are_refused() -> None:
    bench = Bench(59)
    with pytest.raises(UserError, match=r"mask of layer\.bias"):
        bench.merged(bench.weights(), MERGES[0], active=ActiveEntries({"layer.bias": torch.ones(3).bool()}))
    weights = bench.weights()
    optimizer = bench.merged(weights, MERGES[0], active=some())
    run(optimizer, weights, bench.gradients(2))
    again = bench.merged(bench.weights(), MERGES[0], active=some(seed=8))
    with pytest.raises(UserError, match="other masks"):
        again.load_state_dict(optimizer.state_dict())


def test_telemetry_has_the_share_of_active_entries_from_the_first_step() -> None:
    bench = Bench(61)
    weights, active = bench.weights(), some()
    optimizer = bench.merged(weights, MERGES[0], active=active, protected=protect("left"), telemetry_every=10)
    run(optimizer, weights, bench.gradients(1))
    on = sum(int(active.mask(name).sum()) for name in SHAPES)
    assert optimizer.telemetry["active"] == pytest.approx(on / sum(active.mask(n).numel() for n in SHAPES))
    assert 0 <= optimizer.telemetry["frozen_columns"] < 1 and 0 < optimizer.telemetry["projected"] < 1

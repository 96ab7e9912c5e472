"""Protected subspaces and the trust region: what must not leak, what does, and by exact SVD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_bench import SHAPES, Bench, merged, run, same
from torch import nn

from schemas.errors import UserError
from stages.train.optimizers import Merge, OnlineMergingAdamW, Protected, masks
from stages.train.optimizers.rules.ondare import OnDare
from stages.train.optimizers.rules.onties import OnTies
from stages.train.optimizers.trust import exact

MATRICES = ("embed.weight", "layer.weight")
SIDES = ("left", "right", "both")


def low_rank(name: str, rank: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    rows, columns = SHAPES[name]
    return torch.randn(rows, rank, generator=random) @ torch.randn(rank, columns, generator=random)


def protect(side: Any, rank: int = 6) -> Protected:
    return Protected.none().extended({name: low_rank(name, rank, 40) for name in MATRICES}, side, energy=1.0)


def displacement(optimizer: OnlineMergingAdamW, p: nn.Parameter) -> torch.Tensor:
    return optimizer.state[p]["displacement"]


@pytest.mark.parametrize("merge", [Merge("none", 0.0), Merge("ondare", 0.05, 0.5), Merge("onties", 0.05, 0.5, every=3)])
@pytest.mark.parametrize("side", SIDES)
def test_a_hundred_steps_leak_nothing(side: str, merge: Merge) -> None:
    bench = Bench(41)
    weights = bench.weights()
    protected = protect(side)
    optimizer = bench.merged(weights, merge, protected=protected, weight_decay=0.1)
    run(optimizer, weights, bench.gradients(102))
    for name in MATRICES:
        moved = displacement(optimizer, weights[name])
        assert float(moved.norm()) > 0.5
        q_left, q_right = protected.left.get(name), protected.right.get(name)
        assert (q_left is None) == (side == "right") and (q_right is None) == (side == "left")
        for q, matrix in ((q_left, moved), (q_right, moved.T)):  # an oracle of its own: |Q^T D| / |D|
            if q is not None:
                assert float((q.double().T @ matrix.double()).norm() / moved.double().norm()) <= 1e-6
        assert protected.leak(name, moved) <= 1e-6
    assert not torch.equal(weights["norm"].detach(), bench.start["norm"])


def test_projecting_the_gradient_instead_leaks() -> None:
    """The same check fails for a hook before Adam: Adam rescales coordinates (docs/methods.md section 6)."""
    bench = Bench(42)
    protected = protect("left")
    weights = bench.weights()
    for name in MATRICES:

        def hook(gradient: torch.Tensor, name: str = name) -> torch.Tensor:
            projected = gradient.clone()
            protected.project_(name, projected)
            return projected

        weights[name].register_hook(hook)
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.0)
    for gradient in bench.gradients(100):
        optimizer.zero_grad()
        sum((weights[name] * gradient[name]).sum() for name in SHAPES).backward()  # type: ignore[union-attr]
        optimizer.step()
    for name in MATRICES:
        assert protected.leak(name, weights[name].detach() - bench.start[name]) > 0.05


@pytest.mark.parametrize("side", SIDES)
def test_one_step_is_adamws_projected(side: str) -> None:
    bench = Bench(43, torch.float64)
    weights, gradients = bench.weights(), bench.gradients(1)
    protected = protect(side)
    named = list(weights.items())
    optimizer = OnlineMergingAdamW(named, lr=1e-2, weight_decay=0.1, protected=protected)
    run(optimizer, weights, gradients)
    for name in MATRICES:
        expected = -1e-2 * gradients[0][name] / (gradients[0][name].abs() + 1e-8)  # decay towards the start: 0 at first
        for q, transpose in ((protected.left.get(name), False), (protected.right.get(name), True)):
            if q is not None:
                q64 = torch.linalg.qr(q.double()).Q
                projector = torch.eye(len(q64), dtype=torch.float64) - q64 @ q64.T
                expected = expected @ projector if transpose else projector @ expected
        torch.testing.assert_close(weights[name].detach() - bench.start[name], expected, rtol=1e-4, atol=1e-8)


def test_the_basis_holds_the_asked_energy_with_the_fewest_directions() -> None:
    u, _ = torch.linalg.qr(torch.randn(40, 5, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(24, 5, dtype=torch.float64))
    change = (u * torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])) @ v.T
    for energy, q in ((0.7, 1), (0.75, 1), (0.9, 2), (0.95, 3), (0.995, 4), (1.0, 5)):
        protected = Protected.none().extended({"w": change}, "left", energy)
        basis = protected.left["w"].double()
        assert basis.shape == (40, q), energy
        assert float((basis - u[:, :q] @ (u[:, :q].T @ basis)).norm()) < 1e-6
    assert Protected.none().extended({"w": change}, "both", 1.0, q_max=2).right["w"].shape == (24, 2)


def test_a_second_objective_adds_only_what_is_new_and_stays_orthonormal() -> None:
    name = "embed.weight"
    first, second = low_rank(name, 3, 1), low_rank(name, 4, 2)
    once = Protected.none().extended({name: first}, "both", energy=1.0)
    again = once.extended({name: first}, "both", energy=1.0)
    assert again.left[name].shape == (40, 3) and again.right[name].shape == (24, 3)
    both = once.extended({name: first + second}, "both", energy=1.0)
    for q, size in ((both.left[name], 7), (both.right[name], 7)):
        assert q.shape[1] == size
        torch.testing.assert_close(q.double().T @ q.double(), torch.eye(size, dtype=torch.float64), atol=1e-6, rtol=0)
    assert both.leak(name, first) == pytest.approx(1.0) == both.leak(name, second)


@pytest.mark.parametrize("every", [1, 3])
def test_the_displacement_stays_in_the_trust_region_by_exact_svd(every: int) -> None:
    bench = Bench(44)
    weights, radius = bench.weights(), 0.2
    merge = Merge("ondare", 0.05, 0.5, every=every)
    optimizer = bench.merged(weights, merge, protected=protect("left"), trust_radius=radius, weight_decay=0.0)
    free = bench.weights()
    unbounded = bench.merged(free, merge, protected=protect("left"), weight_decay=0.0)
    for gradient in bench.gradients(60):
        run(optimizer, weights, [gradient])
        run(unbounded, free, [gradient])
        for name, p in weights.items():
            assert exact(p.detach() - bench.start[name]) <= radius * (1 + 1e-5), name
    for name in MATRICES:
        assert exact(free[name].detach() - bench.start[name]) > radius
        assert exact(weights[name].detach() - bench.start[name]) > 0.8 * radius
        assert protect("left").leak(name, displacement(optimizer, weights[name])) <= 1e-6


@pytest.mark.parametrize("what", ["top share", "random share", "election", "pull"])
def test_merging_after_the_projection_would_leak(what: str) -> None:
    """The order that must not be: what is in its subspace leaves it when entries are dropped, elected or added."""
    bench, protected, name = Bench(51), protect("left"), "layer.weight"
    update, tau = bench.normal(name), bench.tau[name]
    protected.project_(name, update)
    assert protected.leak(name, update) <= 1e-6
    if what == "top share":
        masks.keep_top_(update, 0.5)
    elif what == "random share":
        update *= masks.random_mask(0.5, ("k",), 0, update.numel()).view(update.shape)
    elif what == "election":
        update = merged(OnTies(), update, tau, 0.9)
    else:
        update = merged(OnDare(), update, tau, 0.9)
    assert protected.leak(name, update) > 0.05
    protected.project_(name, update)  # the chain's order: last
    assert protected.leak(name, update) <= 1e-6


@pytest.mark.parametrize("merge", [Merge("none", 0.0), Merge("onties", 0.05, 0.5)])
def test_a_learning_rate_of_zero_moves_nothing_that_is_constrained(merge: Merge) -> None:
    bench = Bench(52)
    weights = bench.weights()
    optimizer = bench.merged(weights, merge, protected=protect("both"), trust_radius=0.05, weight_decay=0.1)
    run(optimizer, weights, bench.gradients(3))
    before = {name: p.detach().clone() for name, p in weights.items()}
    assert not same(before, bench.start)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run(optimizer, weights, bench.gradients(3))
    assert same(before, {name: p.detach() for name, p in weights.items()})


def test_decay_goes_to_the_start_when_constrained() -> None:
    """Zero gradients: nothing moves, although decay to 0 would leave the subspace."""
    bench = Bench(45)
    weights = bench.weights()
    optimizer = OnlineMergingAdamW(list(weights.items()), lr=1e-2, weight_decay=0.5, protected=protect("left"))
    run(optimizer, weights, [{name: torch.zeros_like(p) for name, p in weights.items()}] * 3)
    assert same(bench.start, {name: p.detach() for name, p in weights.items()})


def test_bases_are_saved_and_a_state_of_others_is_refused(tmp_path: Path) -> None:
    bench = Bench(47)
    gradients, protected = bench.gradients(6), protect("both")
    protected.save(tmp_path / "bases.safetensors")
    loaded = Protected.load(tmp_path / "bases.safetensors")
    assert loaded.fingerprint == protected.fingerprint != protect("left").fingerprint
    arguments: dict[str, Any] = {"trust_radius": 0.05, "weight_decay": 0.1}
    whole, half = bench.weights(), bench.weights()
    run(bench.merged(whole, Merge("ondare", 0.1, 0.5), protected=protected, **arguments), whole, gradients)
    first = bench.merged(half, Merge("ondare", 0.1, 0.5), protected=protected, **arguments)
    run(first, half, gradients[:3])
    second = bench.merged(half, Merge("ondare", 0.1, 0.5), protected=loaded, **arguments)
    second.load_state_dict(first.state_dict())
    run(second, half, gradients[3:])
    assert same(whole, half)
    with pytest.raises(UserError, match="other protected subspaces"):
        bench.merged(half, Merge("ondare", 0.1), protected=protect("left")).load_state_dict(first.state_dict())


def test_bases_that_do_not_fit_are_refused_by_name() -> None:
    bench = Bench(48)
    for protected, said in (
        (Protected({"norm": torch.eye(24)[:, :2]}, {}), "norm"),
        (Protected({"layer.weight": torch.eye(23)[:, :2]}, {}), r"layer\.weight"),
        (Protected({"layer.weight": torch.eye(24)}, {}), r"layer\.weight is all 24"),
    ):
        with pytest.raises(UserError, match=said):
            OnlineMergingAdamW(list(bench.weights().items()), protected=protected)
    with pytest.raises(UserError, match="changed nothing"):
        Protected.none().extended({"layer.weight": torch.zeros(24, 24)})
    half, rest = torch.randn(24, 12), torch.randn(24, 12)
    once = Protected.none().extended({"layer.weight": half @ half.T}, energy=1.0)
    with pytest.raises(UserError, match=r"layer\.weight is all 24"):  # not only when the next objective starts
        once.extended({"layer.weight": rest @ rest.T}, energy=1.0)
    with pytest.raises(UserError, match="norm is not a finite matrix"):
        Protected.none().extended({"norm": torch.ones(24)})


def test_bases_are_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched, bases = [], Protected.bases
    monkeypatch.setattr(Protected, "bases", lambda *given: fetched.append(given[1]) or bases(*given))  # type: ignore[func-returns-value]
    bench = Bench(53)
    weights = bench.weights()
    run(bench.merged(weights, Merge("ondare", 0.05), protected=protect("both")), weights, bench.gradients(3))
    assert sorted(fetched) == sorted(MATRICES)


def test_telemetry_shows_what_the_projection_took() -> None:
    bench = Bench(49)
    weights = bench.weights()
    optimizer = bench.merged(weights, Merge("ondare", 0.05), protected=protect("left", 12), telemetry_every=1)
    run(optimizer, weights, bench.gradients(1))
    assert 0.3 < optimizer.telemetry["projected"] < 0.95

"""Each merge against its formula, worked out by hand or in float64 entry by entry."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_bench import Bench, merged, run, same
from torch import nn

from schemas.merging import MERGES, OptimizerName
from stages.train.optimizers import Merge, OnlineMergingAdamW, TaskVector
from stages.train.optimizers.masks import keep_top_, random_mask
from stages.train.optimizers.rules import RULES
from stages.train.optimizers.rules.anchor import Anchor
from stages.train.optimizers.rules.ondare import OnDare
from stages.train.optimizers.rules.onties import OnTies

A = 0.25


def test_the_config_and_the_optimizers_know_the_same_rules() -> None:
    assert set(get_args(OptimizerName)) - {"adamw"} == set(MERGES) == set(RULES)
    for name, facts in MERGES.items():
        assert (facts.anchored, facts.drops) == (RULES[name].anchored, RULES[name].selection != "none")


def test_ondare_adds_the_weighted_sum() -> None:
    update = merged(OnDare(), torch.tensor([4.0, 0.0, -8.0]), torch.tensor([8.0, 4.0, 0.0]), A)
    assert update.tolist() == [5.0, 1.0, -6.0]


def test_onties_elects_by_weighted_magnitude() -> None:
    """x = 0.75 delta, y = 0.25 tau: agreement adds, the larger of two opposites stays, equal opposites cancel."""
    delta = torch.tensor([4.0, -4.0, 4.0, 4.0, 0.0, 4.0, 0.0, -4.0])
    tau = torch.tensor([4.0, -4.0, -8.0, -16.0, -4.0, 0.0, 0.0, 12.0])
    #       x, y:      3,1    -3,-1   3,-2    3,-4    0,-1   3,0    0,0   -3,3
    assert merged(OnTies(), delta, tau, A).tolist() == [4.0, -4.0, 3.0, -4.0, -1.0, 3.0, 0.0, 0.0]


def test_onties_election_does_not_underflow() -> None:
    delta, tau = torch.tensor([1e-30, -1e-30]), torch.tensor([-4e-30, -1e-30])
    torch.testing.assert_close(merged(OnTies(), delta, tau, 0.5), torch.tensor([-2e-30, -1e-30]), rtol=1e-6, atol=0)


def test_onties_as_released_votes_unweighted_and_zero_counts_as_plus() -> None:
    delta = torch.tensor([4.0, 1.0, -1.0, 4.0, -4.0, -2.0])
    tau = torch.tensor([4.0, -4.0, 4.0, -4.0, 4.0, 0.0])
    # vote on delta + tau:  +     -     +     + (0)  + (0)  -
    assert merged(OnTies(released=True), delta, tau, A).tolist() == [4.0, -1.0, 1.0, 3.0, 1.0, -1.5]


def test_anchor_is_the_exact_interpolation_of_weights() -> None:
    """(1 - a)(theta + delta) + a theta_SFT."""
    theta, delta, sft = (torch.randn(50, dtype=torch.float64) for _ in range(3))
    update = merged(Anchor(), delta, sft - theta, A)
    torch.testing.assert_close(theta + update, (1 - A) * (theta + delta) + A * sft, rtol=1e-14, atol=1e-14)


@settings(deadline=None, print_blob=True, max_examples=40)
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=60), st.floats(0.001, 1.0))
def test_top_share_keeps_exactly_k_largest_and_the_first_of_equals(values: list[int], reserve: float) -> None:
    for released, k in ((False, max(1, round(reserve * len(values)))), (True, int(reserve * len(values)))):
        order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
        kept = set(order[:k] if k >= 1 else order)
        expected = [float(v) if i in kept else 0.0 for i, v in enumerate(values)]
        for dtype in (torch.float32, torch.bfloat16):
            assert keep_top_(torch.tensor(values, dtype=dtype), reserve, released).tolist() == expected


def adam_direction(gradient: torch.Tensor, lr: float, eps: float = 1e-8) -> torch.Tensor:
    """AdamW's first step: m / bias = g and v / bias = g^2, so -lr * g / (|g| + eps)."""
    return -lr * gradient.double() / (gradient.double().abs() + eps)


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("kind", ["ondare", "onties"])
def test_one_step_equals_the_closed_form(kind: str, preset: str) -> None:
    """The whole optimizer against the formulas of docs/methods.md section 5, in float64 from the masks on."""
    lr, decay, alpha, reserve, seed = 1e-2, 0.1, 0.2, 0.4, 11
    bench = Bench(20, torch.float64)
    bench.vector = TaskVector.from_tensors({n: t.double() for n, t in bench.tau.items()})
    weights, gradients = bench.weights(), bench.gradients(1)
    merge = Merge(kind, alpha, reserve, preset)  # type: ignore[arg-type]
    run(bench.merged(weights, merge, lr=lr, weight_decay=decay, seed=seed), weights, gradients)
    for name, p in weights.items():
        start, tau = bench.start[name], bench.tau[name].double()
        count = start.numel()
        # As released, eps is added to sqrt(v) = |g| sqrt(1 - beta2), before that is divided by its bias correction.
        eps = 1e-8 / math.sqrt(1 - 0.999) if preset == "released" else 1e-8
        delta = adam_direction(gradients[0][name], lr, eps)
        if kind == "ondare":
            of_delta = random_mask(reserve, (seed, 0, 1, "step", name), 0, count).view(start.shape)
            if preset == "paper":
                of_tau = random_mask(reserve, (seed, 0, 1, "task", name), 0, count).view(start.shape)
                update = (1 - alpha) * delta * of_delta + alpha * tau * of_tau
            else:
                of_tau = random_mask(reserve, (seed, "task", name), 0, count).view(start.shape)
                update = (1 - alpha) * delta * of_delta / reserve
                update += alpha * (tau * of_tau / reserve).clamp(-1, 1)
        else:
            k = int(reserve * count) if preset == "released" else max(1, round(reserve * count))
            x, y = (_top(value, k) for value in (delta, tau))
            update = torch.zeros_like(start)
            for i in np.ndindex(*start.shape):
                u, v = (1 - alpha) * float(x[i]), alpha * float(y[i])
                if preset == "released":
                    vote = 1 if float(x[i] + y[i]) >= 0 else -1
                    update[i] = (u if u * vote > 0 else 0.0) + (v if v * vote > 0 else 0.0)
                else:
                    update[i] = u + v if u * v >= 0 else (0.0 if u == -v else max(u, v, key=abs))
        shrink = 1 - lr * decay
        expected = (start + update) * shrink if preset == "released" else start * shrink + update
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


def _top(value: torch.Tensor, k: int) -> torch.Tensor:
    if k < 1:
        return value
    order = value.abs().flatten().argsort(descending=True, stable=True)[:k]
    mask = torch.zeros(value.numel(), dtype=value.dtype)
    mask[order] = 1
    return value * mask.view(value.shape)


def test_rescaling_keeps_the_l1_norm_of_the_step() -> None:
    bench = Bench(21, torch.float64)
    gradients = bench.gradients(1)
    for kind in ("ondare", "onties"):
        weights = bench.weights()
        merge = Merge(kind, 0.0, 0.3, "released", rescale=True)
        run(bench.merged(weights, merge, lr=1e-2, weight_decay=0.0), weights, gradients)
        if kind == "ondare":  # OnTIES drops outvoted entries afterwards
            for name in ("embed.weight", "layer.weight", "norm"):
                step = (weights[name].detach() - bench.start[name]).abs().sum()
                full = adam_direction(gradients[0][name], 1e-2).abs().sum()
                assert float(step) == pytest.approx(float(full), rel=1e-5)


def test_the_anchor_pulls_to_the_start_and_saturates() -> None:
    """With a constant step d the distance converges to (1 - a) / a * d, in closed form at every step."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = OnlineMergingAdamW([("w", weight)], lr=0.1, weight_decay=0.0, merge=Merge("anchor", 0.2))
    for step in range(1, 60):
        weight.grad = torch.full((1,), -3.0, dtype=torch.float64)
        optimizer.step()
        distance = 0.1 * (0.8 / 0.2) * (1 - 0.8**step)
        assert weight.item() == pytest.approx(distance, rel=1e-6)


def test_the_anchor_may_be_elsewhere() -> None:
    bench = Bench(22, torch.float64)
    bench.vector = TaskVector.from_tensors({n: t.double() for n, t in bench.tau.items()})
    weights, gradients = bench.weights(), bench.gradients(1)
    run(bench.merged(weights, Merge("anchor", 0.3), lr=1e-2, weight_decay=0.0), weights, gradients)
    for name, p in weights.items():
        sft = bench.start[name] + bench.tau[name].double()
        expected = 0.7 * (bench.start[name] + adam_direction(gradients[0][name], 1e-2)) + 0.3 * sft
        torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["ondare", "onties", "anchor"])
def test_step_k_merges_the_window_of_every_parameter(kind: str) -> None:
    """Between merges the weights are AdamW's; at the merge the window's steps are replaced by their merge."""
    every, lr, alpha = 3, 1e-2, 0.2
    bench = Bench(23, torch.float64)
    bench.vector = TaskVector.from_tensors({n: t.double() for n, t in bench.tau.items()})
    gradients = bench.gradients(2 * every)
    plain, weights = bench.weights(), bench.weights()
    adam = torch.optim.AdamW(plain.values(), lr=lr, weight_decay=0.0)
    optimizer = bench.merged(weights, Merge(kind, alpha, every=every), lr=lr, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in plain.items()}
    window = {name: torch.zeros_like(p) for name, p in before.items()}
    for step, gradient in enumerate(gradients, start=1):
        last = {name: p.detach().clone() for name, p in plain.items()}
        run(adam, plain, [gradient])
        run(optimizer, weights, [gradient])
        for name, p in plain.items():
            window[name] += p.detach() - last[name]
            here = before[name] + window[name]
            if step % every == 0:
                tau = bench.tau[name].double()
                if kind == "anchor":
                    pull = bench.start[name] + tau - before[name]
                    update = (1 - alpha) * window[name] + alpha * pull
                elif kind == "ondare":
                    update = (1 - alpha) * window[name] + alpha * tau
                else:
                    x, y = (1 - alpha) * window[name], alpha * tau
                    update = torch.where(x * y >= 0, x + y, torch.where(x.abs() > y.abs(), x, y))
                here = before[name] + update
            torch.testing.assert_close(weights[name].detach(), here, rtol=1e-9, atol=1e-11)
            if step % every == 0:
                before[name], window[name] = here, torch.zeros_like(here)


def test_a_drift_of_1e_7_per_step_arrives() -> None:
    """docs/methods.md section 5: added to float32 or bfloat16 weights of 1, a pull of 1e-7 or less rounds away."""
    steps = 100
    for dtype in (torch.float32, torch.bfloat16):
        for pull in (1e-7, 2e-8):
            weight = nn.Parameter(torch.ones(64, dtype=dtype))
            alpha = 1e-4
            vector = TaskVector.from_tensors({"w": torch.full((64,), pull / alpha)})
            merge = Merge("ondare", alpha, alpha_schedule="constant")
            optimizer = OnlineMergingAdamW([("w", weight)], lr=1e-3, weight_decay=0.0, merge=merge, task_vector=vector)
            naive = torch.ones(64)
            for _ in range(steps):
                weight.grad = torch.zeros(64, dtype=dtype)
                optimizer.step()
                naive += pull
            displacement = optimizer.state[weight]["displacement"]
            torch.testing.assert_close(displacement, torch.full((64,), steps * pull), rtol=1e-4, atol=0)
            if dtype == torch.float32:
                torch.testing.assert_close(weight.detach(), torch.full((64,), 1 + steps * pull), rtol=1.2e-7, atol=0)
                assert abs(float(naive[0]) - 1 - steps * pull) > 0.15 * steps * pull


def test_alpha_follows_the_learning_rate_or_stays() -> None:
    assert Merge("ondare", 0.4).alpha_at(5e-4, 1e-3) == pytest.approx(0.2)
    assert Merge("ondare", 0.4).alpha_at(0.0, 1e-3) == 0.0
    assert Merge("ondare", 0.4, alpha_schedule="constant").alpha_at(0.0, 1e-3) == 0.4


def test_random_masks_change_every_step_but_the_released_task_mask_does_not() -> None:
    """Zero gradients: only the task vector moves the weights."""
    moved: dict[str, list[set[int]]] = {}
    for preset in ("paper", "released"):
        bench = Bench(24, torch.float64)
        weights = bench.weights()
        merge = Merge("ondare", 0.1, 0.2, preset, alpha_schedule="constant")  # type: ignore[arg-type]
        optimizer = bench.merged(weights, merge, weight_decay=0.0)
        moved[preset] = []
        for _ in range(3):
            before = weights["embed.weight"].detach().clone()
            run(optimizer, weights, [{name: torch.zeros_like(p) for name, p in weights.items()}])
            changed = (weights["embed.weight"].detach() != before).flatten().nonzero().flatten()
            moved[preset].append(set(changed.tolist()))
    assert len({frozenset(s) for s in moved["paper"]}) == 3
    assert len({frozenset(s) for s in moved["released"]}) == 1


def test_buckets_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """One parameter a bucket, all in one, and the task vector kept in three places."""
    results = []
    for size, keep in ((1, "device"), (1 << 25, "device"), (600, "cpu"), (1, "cpu")):
        monkeypatch.setattr("stages.train.optimizers.bucket.BUCKET", size)
        bench = Bench(25)
        bench.vector = TaskVector.from_tensors(bench.tau, keep)  # type: ignore[arg-type]
        weights = bench.weights()
        optimizer = bench.merged(weights, Merge("ondare", 0.1, 0.5, every=2), weight_decay=0.1)
        run(optimizer, weights, bench.gradients(6))
        results.append(weights)
    assert all(same(results[0], other) for other in results[1:])


def test_telemetry_says_what_happened() -> None:
    bench = Bench(26, torch.float64)
    bench.vector = TaskVector.from_tensors({n: t.double() for n, t in bench.tau.items()})
    weights, gradients = bench.weights(), bench.gradients(2)
    optimizer = bench.merged(weights, Merge("ondare", 0.1), lr=1e-2, weight_decay=0.0, telemetry_every=2)
    run(optimizer, weights, gradients[:1])
    assert optimizer.telemetry == {}
    moments = torch.optim.AdamW((twins := bench.weights()).values(), lr=1e-2, weight_decay=0.0)
    run(moments, twins, gradients[:1])
    before = {name: p.detach().clone() for name, p in twins.items()}
    run(moments, twins, gradients[1:])
    run(optimizer, weights, gradients[1:])
    delta = torch.cat([(twins[n].detach() - before[n]).flatten() for n in twins])
    tau = torch.cat([bench.tau[n].double().flatten() for n in twins])
    drift = torch.cat([(weights[n].detach() - bench.start[n]).flatten() for n in twins])
    expected = {
        "delta_norm": delta.norm(),
        "pull_norm": 0.1 * tau.norm(),
        "cosine": torch.dot(delta, tau) / delta.norm() / tau.norm(),
        "sign_conflict": ((delta * tau) < 0).double().mean(),
        "drift_norm": drift.norm(),
        "drift": drift.norm() / tau.norm(),
        "alpha": 0.1,
        "alpha_sum": 0.2,
    }
    assert optimizer.telemetry == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-6)

"""Objectives one after another: what is left of the earlier ones, what the last one gains (arXiv 2509.24610)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.methods import Bench, Method
from benchmarks.quality.results import Values
from benchmarks.quality.training import extend, projected_gradients
from stages.train.optimizers import Protected

SEQUENCES = {"two": ("helpful", "harmless"), "three": ("helpful", "harmless", "language")}
Q_MAX = 16
"""Of the sanity check: its smallest matrix has 48 outputs."""


def methods(order: Sequence[str], q_max: int = Q_MAX) -> list[Method]:
    """The lines of the table of a sequence of objectives. q_max: most directions protected a matrix, an objective."""
    found = [
        Method("SFT, not trained", _untouched, {"order": order}),
        Method("mixed DPO, as many steps in all", _mixed, {"order": order}),
        Method("sequential DPO", _sequential, {"order": order}),
    ]
    found.append(Method("gradient-hook projection", _sequential, {"order": order, "q_max": q_max}))
    for side in ("left", "right"):
        found.append(Method(f"OrthAlign, {side}", _orthalign, {"order": order, "side": side, "q_max": q_max}))
    return found


def _untouched(bench: Bench, settings: Mapping[str, Any]) -> Values:
    return bench.measure(bench.world.sft)


def _mixed(bench: Bench, settings: Mapping[str, Any]) -> Values:
    order = settings["order"]
    return bench.measure(bench.train("now", order, max_steps=len(order) * bench.world.size.steps).model)


def _sequential(bench: Bench, settings: Mapping[str, Any]) -> Values:
    """One train stage after another, the reference of each the model it starts from; with q_max, each behind a gradient hook that
    projects off what the earlier ones changed."""
    model, protected = bench.world.sft, Protected.none()
    values, own = Values(), Values()
    for number, objective in enumerate(settings["order"]):
        start = model
        model = bench.train(
            f"phase-{number}", (objective,), start, hooks=projected_gradients(protected) if protected else None
        ).model
        if "q_max" in settings:
            protected = extend(protected, start, model, settings["q_max"])
        values = bench.measure(model)
        own[f"own/{objective}"] = values[f"reward/{objective}"]
    return values | own


def _orthalign(bench: Bench, settings: Mapping[str, Any]) -> Values:
    order, steps = settings["order"], bench.world.size.steps
    objectives = [{"name": name, "where": f"source = '{name}'"} for name in order]
    sequence = {"objectives": objectives, "side": settings["side"], "q_max": settings["q_max"]}
    trained = bench.train("now", order, orthalign=sequence)
    own = {
        f"own/{name}": trained.metrics[(number + 1) * steps, f"objective/{name}/reward_accuracy"]
        for number, name in enumerate(order)
    }
    leaks = [value for (_, name), value in trained.metrics.items() if name.endswith("/leak")]
    return bench.measure(trained.model) | own | {"leak": max(leaks)}

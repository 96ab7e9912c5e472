"""Online merging: preference reward against alignment tax (arXiv 2405.17931, table 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.quality import merging
from benchmarks.quality.methods import Bench, Method
from benchmarks.quality.results import Values
from benchmarks.quality.training import Average, averaged, model_in, variant, weights_of
from stages.contract import ModelRef

RESERVE = 0.5
"""Share of entries that DARE and TIES keep, offline and online."""


def methods() -> list[Method]:
    """The lines of the table; a family has several so that frontiers can be compared, not points."""
    found = [
        Method("SFT, not trained", _untouched),
        Method("AdamW", _trained),
        Method("AdamW, half the steps", _trained, {"shorter": 2}),
        *(Method(f"DPO beta {beta:g}", _trained, {"loss": {"beta": beta}}) for beta in (0.3, 1.0)),
        Method("EMA 0.9", _average, {"decay": 0.9}),
        Method("LoRA r 8, lr x3", _trained, {"method": "lora", "lora": {"r": 8}, "times": 3.0}),
    ]
    for kind, shares in (("linear", (0.25, 0.5)), ("DARE", (0.5,)), ("TIES", (0.5,))):
        found += [Method(f"offline {kind}, SFT share {s:g}", _offline, {"kind": kind, "share": s}) for s in shares]
    for name, kind in (("OnDARE", "ondare"), ("OnTIES", "onties")):
        for preset, alphas in (("paper", (2e-3, 1e-2)), ("released", (2e-3,))):
            for alpha in alphas:
                merge = {"alpha": alpha, "reserve": RESERVE, "preset": preset}
                found.append(Method(f"{name} {preset}, alpha {alpha:g}", _trained, {"optimizer": kind, "merge": merge}))
    found.append(Method("anchor, alpha 0.03", _trained, {"optimizer": "anchor", "merge": {"alpha": 0.03}}))
    return found


def _untouched(bench: Bench, settings: Mapping[str, Any]) -> Values:
    return bench.measure(bench.world.sft)


def _trained(bench: Bench, settings: Mapping[str, Any]) -> Values:
    given = dict(settings)
    if "times" in given:
        given["learning_rate"] = bench.world.size.learning_rate * given.pop("times")
    if "shorter" in given:
        given["max_steps"] = bench.world.size.steps // given.pop("shorter")
    return bench.measure(bench.train("now", bench.together, **given).model)


def _average(bench: Bench, settings: Mapping[str, Any]) -> Values:
    averages: Average = {}
    model = bench.train("now", bench.together, hooks=averaged(settings["decay"], averages)).model
    return bench.measure(variant(bench.world, bench.scratch / "average", model, averages))


def _offline(bench: Bench, settings: Mapping[str, Any]) -> Values:
    world, kind, share = bench.world, settings["kind"], settings["share"]
    if world.base is None and kind != "linear":
        raise LookupError("this method needs the pretrained model: give --base")
    trained = _shared(bench)
    ends = weights_of(world.sft), weights_of(trained)
    if world.base is None or kind == "linear":
        merged = merging.linear(*ends, share)
    elif kind == "DARE":
        merged = merging.dare(weights_of(world.base), *ends, share, RESERVE, world.seed)
    else:
        merged = merging.ties(weights_of(world.base), *ends, share, RESERVE)
    return bench.measure(variant(world, bench.scratch / "merged", trained, merged))


def _shared(bench: Bench) -> ModelRef:
    """The model plain AdamW leaves, trained once for all offline merges of a seed."""
    folder = bench.scratch / "adamw"
    if (folder / "finished").is_file():
        return model_in(bench.world, folder)
    model = bench.train("adamw", bench.together).model
    (folder / "finished").touch()
    return model

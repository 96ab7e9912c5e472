"""Few weights, forgetting before learning (arXiv 2406.12606): the top tenth of the weights against all and against a random tenth;
forgetting and learning against learning alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.quality.methods import Bench, Method
from benchmarks.quality.results import Values
from benchmarks.quality.training import named
from schemas.config.training import TrainConfig
from stages.train.optimizers.masks import random_mask

SHARE = 0.1
_MASK = {"mask": "warmup", "warmup_steps": 20, "learn_ratio": SHARE}
_FORGET = {"forget_ratio": SHARE, "forget_max_steps": 10}


def methods() -> list[Method]:
    """The lines of the table; all learn for as many steps, warm-up and forgetting come on top."""
    top = {**_MASK, "forget": False, "key_fraction": 1.0}
    return [
        Method("SFT, not trained", _untouched),
        Method("full DPO", _trained),
        Method("DPO, random 10%", _random, {"share": SHARE}),
        Method("DPO, top 10%", _trained, {"allo": top}),
        Method("DPO, top 10%, key tokens (learning alone)", _trained, {"allo": {**_MASK, "forget": False}}),
        Method("forgetting and learning", _trained, {"allo": {**_MASK, **_FORGET}}),
        Method("forgetting and learning, all tokens", _trained, {"allo": {**_MASK, **_FORGET, "key_fraction": 1.0}}),
    ]


def _untouched(bench: Bench, settings: Mapping[str, Any]) -> Values:
    return bench.measure(bench.world.sft)


def _trained(bench: Bench, settings: Mapping[str, Any]) -> Values:
    if "allo" in settings and "allo" not in TrainConfig.model_fields:
        raise LookupError("this version has no train.allo")
    return bench.measure(bench.train("now", bench.together, **settings).model)


def _random(bench: Bench, settings: Mapping[str, Any]) -> Values:
    hooks = masked_gradients(settings["share"], bench.world.seed)
    return bench.measure(bench.train("now", bench.together, hooks=hooks).model)


@contextmanager
def masked_gradients(share: float, seed: int) -> Iterator[None]:
    """A random `share` of every tensor's entries is trained: the gradients of the others are 0, and without weight decay AdamW then
    never moves them."""

    def mask(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for name, parameter in named(optimizer):
            if parameter.grad is not None:
                kept = random_mask(share, (seed, name), 0, parameter.numel(), parameter.device)
                parameter.grad.mul_(kept.view(parameter.shape))

    handle = register_optimizer_step_pre_hook(mask)
    try:
        yield
    finally:
        handle.remove()

"""One step of the chain on one bucket: mask -> AdamW's moments -> merge -> mask and project -> trust region -> apply. METHODS.md
section 8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.adamw import adamw

from schemas.errors import UserError
from stages.train.optimizers.bucket import Bucket, narrowest, wide
from stages.train.optimizers.confine import Confined
from stages.train.optimizers.merging import Merging
from stages.train.optimizers.settings import Merge
from stages.train.optimizers.shard import Shard, local
from stages.train.optimizers.telemetry import Telemetry
from stages.train.optimizers.trust import keep_within, norms

OWN_STATE = ("start", "displacement", "pending", "directions")
"""What a parameter's state holds beside AdamW's."""


class Chain:
    """The transforms in the order they must have: projecting before a mask or an election of signs would not hold, and a
    displacement outside the trust region is scaled last, which leaves it in its subspace."""

    def __init__(self, merging: Merging, confined: Confined) -> None:
        self.merging, self.confined = merging, confined

    def step(
        self,
        bucket: Bucket,
        lists: list[list[torch.Tensor]],
        merge: Merge,
        a: float,
        due: bool,
        constrained: bool,
        loaded: bool,
        telemetry: Telemetry | None,
        following: tuple[list[str], list[Shard], torch.device] | None,
    ) -> None:
        """Update the bucket's parameters.

        lists: parameters, gradients, moments, largest second moments and steps, as torch's functional AdamW takes them.
        a: weight of the task vector.  due: a merge is due at this step.  constrained: decay goes towards the start.
        loaded: this is the first step after a load.  following: names, shards and device of the next bucket whose merge is due.
        """
        group, released = bucket.group, merge.preset == "released"
        self._begin(bucket, merge, loaded)
        for name, gradient, shard in zip(bucket.names, lists[1], bucket.shards, strict=True):
            self.confined.active.zero_(name, gradient, shard)
        _adamw_step(bucket, lists, released)
        displacements = bucket.state("displacement")
        decay = float(group["lr"]) * group["weight_decay"]
        if decay and (constrained or not released):
            _decay(bucket, decay, to_start=constrained)
        if due:
            if merge.every > 1:
                bucket.update.add_(bucket.gather(bucket.state("pending")))
                torch._foreach_zero_(bucket.state("pending"))
            self.merging(bucket, merge, a, telemetry)
            if following is not None:
                self.merging.prefetch(*following)
        if self.confined:
            self._project(bucket, telemetry)
        waits = merge.active and not due
        torch._foreach_add_(bucket.state("pending") if waits else displacements, bucket.views(bucket.update))
        if group["trust_radius"] and (
            float(group["lr"]) or a
        ):  # else nothing moved, and the estimate's last bits must not
            _trust(bucket, group["trust_radius"])
        if decay and released and not constrained:
            _decay(bucket, decay, to_start=False)
        if telemetry is not None:
            telemetry.drift(bucket.gather(displacements), bucket.peers)
        _place(bucket)

    def _project(self, bucket: Bucket, telemetry: Telemetry | None) -> None:
        """Take what is masked, and the protected directions, out of the update."""
        for name, view, shard in zip(bucket.names, bucket.views(bucket.update), bucket.shards, strict=True):
            if not self.confined.covers(name):
                continue
            watched = telemetry if self.confined.protected.covers(name) else None
            before = float(view.norm()) if watched is not None else 0.0
            self.confined.apply_(name, view, shard)
            if watched is not None:
                watched.project(before**2, float(view.norm()) ** 2, shard.peers)

    def _begin(self, bucket: Bucket, merge: Merge, loaded: bool) -> None:
        """First step: remember where each parameter starts. First step after a load: check that it is where it should be."""
        for name, param, shard, state in zip(bucket.names, bucket.params, bucket.shards, bucket.states, strict=True):
            if "displacement" not in state:
                state["start"] = shard.wrap(narrowest(param, shard.peers))
                state["displacement"] = shard.wrap(torch.zeros_like(param, dtype=wide(param.dtype)))
            if merge.every > 1 and "pending" not in state:
                state["pending"] = torch.zeros_like(state["displacement"])
            if loaded and not torch.equal((_way(state) + local(state["start"])).to(param.dtype), param):
                raise UserError(
                    f"{name} is not where the optimizer's state left it",
                    where="load_state_dict",
                    fix="Load the weights and the optimizer's state of the same checkpoint.",
                )


def _adamw_step(bucket: Bucket, lists: list[list[torch.Tensor]], released: bool) -> None:
    """AdamW's step into `bucket.update`, by torch's own code on weights of 0 without decay.

    released: eps is added before the bias correction of the second moment, as in the released code.
    """
    group, eps = bucket.group, bucket.group["eps"]
    if released:
        eps /= (1 - group["betas"][1] ** bucket.step) ** 0.5
    direct = bucket.update.dtype == bucket.params[0].dtype
    steps = bucket.views(bucket.update) if direct else [torch.zeros_like(p) for p in bucket.params]
    torch_adamw([steps, *lists[1:]], group, 0.0, eps)
    if not direct:
        bucket.update = bucket.gather(steps)


def _decay(bucket: Bucket, decay: float, to_start: bool) -> None:
    """W *= 1 - decay, or W - start *= 1 - decay, as a change of the displacement."""
    displacements = bucket.state("displacement")
    torch._foreach_mul_(displacements, 1 - decay)
    if "pending" in bucket.states[0]:
        torch._foreach_add_(displacements, bucket.state("pending"), alpha=-decay)
    if not to_start:
        for displacement, start in zip(displacements, bucket.state("start"), strict=True):
            displacement.add_(start, alpha=-decay)


def _place(bucket: Bucket) -> None:
    """W = start + displacement + what is pending, added in the displacement's dtype."""
    for param, state, start in zip(bucket.params, bucket.states, bucket.state("start"), strict=True):
        way = _way(state)
        if param.dtype == way.dtype:
            torch.add(way, start, out=param)
        else:
            param.copy_(way + start)


def _way(state: Mapping[str, Any]) -> torch.Tensor:
    """A parameter's way from its start, what of it this process holds: displacement + what is pending."""
    way = local(state["displacement"])
    return way + local(state["pending"]) if "pending" in state else way


def _trust(bucket: Bucket, radius: float) -> None:
    """Scale every parameter's way from its start into the trust region."""
    ways = [_way(state) for state in bucket.states]
    bounds = norms(ways, bucket.peers)
    for state, way, bound, shard in zip(bucket.states, ways, bounds, bucket.shards, strict=True):
        if bound <= radius:
            continue
        factor = keep_within(state, way, radius, bound, shard)  # with something pending, of a copy: both shrink alike
        if "pending" in state:
            local(state["displacement"]).mul_(factor)
            local(state["pending"]).mul_(factor)


def torch_adamw(lists: list[Any], group: Mapping[str, Any], weight_decay: float, eps: float) -> None:
    """torch's functional AdamW on parameters, gradients, moments, largest second moments and steps."""
    beta1, beta2 = group["betas"]
    names = ("foreach", "capturable", "differentiable", "fused", "amsgrad", "lr", "maximize")
    same = {name: group[name] for name in names}
    adamw(*lists, **same, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps)

"""One step of the chain on the parameters of a bucket: mask -> AdamW's moments -> merge -> mask and project -> trust region -> apply.
docs/methods.md section 8.

What is elementwise is one function of every entry (`step.py`), carried out by a `Form`. A step stops in between only for what needs a whole
parameter: OnTIES' cut and rescaling look at the step first, a projection is a matrix product, a trust region a norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

from stages.train.optimizers.bucket import wide
from stages.train.optimizers.confine import Confined
from stages.train.optimizers.form import Form
from stages.train.optimizers.merging import NOWHERE, Merging
from stages.train.optimizers.part import Piece, check_place, prepare, way_of
from stages.train.optimizers.settings import Merge
from stages.train.optimizers.shard import LocalRows, local
from stages.train.optimizers.step import Decay, Plan, decayed, moments, pull_of
from stages.train.optimizers.telemetry import Telemetry
from stages.train.optimizers.terms import Mask, Numbers, Places
from stages.train.optimizers.trust import factors

OWN_STATE = ("start", "displacement", "pending", "directions")
"""What a parameter's state holds beside AdamW's."""

Ahead = tuple[list[str], list[LocalRows], torch.device]


@dataclass
class Bucket:
    """Parameters of one group at the same step, on one device, of one dtype, sharded over the same processes. step: AdamW's, from 1.

    a: weight of the task vector.  due: a merge is due at this step.  constrained: decay goes towards the start.
    """

    group: dict[str, Any]
    parts: list[Piece]
    step: int
    merge: Merge
    a: float
    due: bool
    constrained: bool

    def plan(self, confined: bool) -> Plan:
        """What the step of the bucket's parameters is made of; confined: an update is projected."""
        group, decay = self.group, self._decay()
        beta1, beta2 = group["betas"]
        end = "update" if confined else ("displacement" if group["trust_radius"] else "weights")
        waits = self.merge.active and not self.due
        return Plan(
            beta1,
            beta2,
            rule=self.merge.rule() if self.due else None,
            due=not waits,
            maximize=group["maximize"],
            decay=decay,
            end=end,  # type: ignore[arg-type]
        )

    def _decay(self) -> Decay:
        if not float(self.group["lr"]) * self.group["weight_decay"]:
            return "none"
        if self.constrained:
            return "start"
        return "late" if self.merge.preset == "released" else "zero"

    def numbers(self) -> Numbers:
        """This step's. Released: eps is added before the bias correction of the second moment."""
        group = self.group
        lr, eps = float(group["lr"]), group["eps"]
        beta1, beta2 = group["betas"]
        root = (1 - beta2**self.step) ** 0.5
        if self.merge.preset == "released":
            eps /= root
        decay = lr * group["weight_decay"]
        size = -(lr / (1 - beta1**self.step))
        return Numbers(size, root, eps, 1 - decay, -decay, self.a, 1 - self.a, self.merge.reserve)


class Chain:
    """The transforms in the order they must have: projecting before a mask or an election of signs would not hold, and a
    displacement outside the trust region is scaled last, which leaves it in its subspace."""

    def __init__(self, merging: Merging, confined: Confined, form: Form) -> None:
        self.merging, self.confined, self.form = merging, confined, form

    def step(self, bucket: Bucket, loaded: bool, telemetry: Telemetry | None, following: Ahead | None) -> None:
        """Update the bucket's parameters. loaded: this is the first step after a load.  following: names, shards and device of the next
        bucket whose merge is due."""
        parts = bucket.parts
        for part in parts:
            prepare(part, bucket.merge.every, bool(bucket.group["amsgrad"]))
            if loaded:
                check_place(part)
            part.state["step"] += 1
        if bucket.due:
            self.merging.fetch(parts)
            if following is not None:
                self.merging.prefetch(*following)
        numbers, lasts, fresh = self._looked(bucket, telemetry)
        for i, part in enumerate(parts):
            self._advance(bucket, part, numbers[i], lasts[i], fresh, telemetry)
        if bucket.group["trust_radius"]:
            self._trust(bucket)
        for part in parts:
            if telemetry is not None:
                telemetry.drift(local(part.state["displacement"]), part.shard.peers)
            part.written()

    def _looked(
        self, bucket: Bucket, telemetry: Telemetry | None
    ) -> tuple[list[Numbers], list[int | torch.Tensor], bool]:
        """(each parameter's numbers, the last ties of its cut, whether the moments still have to take the gradient in)."""
        parts, base, plan = bucket.parts, bucket.numbers(), bucket.plan(False)
        nothing: list[int | torch.Tensor] = [-1] * len(parts)
        if plan.rule is None:
            return [base] * len(parts), nothing, True
        numbers = self.merging.numbers(parts, bucket.merge, base)
        if telemetry is not None:
            for part, n in zip(parts, numbers, strict=True):
                self._observe(bucket, part, n, plan, telemetry)
        looks = plan.rule.selection == "top" and plan.rule.partial
        if not (looks or plan.rule.rescale):
            return numbers, nothing, True
        cuts = self.merging.cuts(self.form, parts, bucket.merge, base, plan)
        numbers = [n._replace(step_limit=cut.limit) for n, cut in zip(numbers, cuts, strict=True)]
        lasts = [cut.last for cut in cuts]
        plan = plan._replace(fresh=False)
        if plan.rule is not None and plan.rule.rescale:

            def places(i: int, begin: int) -> Places:
                return self._places(bucket, parts[i], begin, lasts[i])

            found = self.merging.factors(
                self.form, parts, bucket.merge, numbers, plan, places, float(bucket.group["eps"])
            )
            numbers = [n._replace(step_factor=f) for n, f in zip(numbers, found, strict=True)]
        return numbers, lasts, False

    def _places(self, bucket: Bucket, part: Piece, begin: int, last: int | torch.Tensor) -> Places:
        if not bucket.due:
            return NOWHERE
        return self.merging.places(part, bucket.merge, bucket.group, bucket.step, begin, last)

    def _observe(self, bucket: Bucket, part: Piece, n: Numbers, plan: Plan, telemetry: Telemetry) -> None:
        """What the merge is about to see; changes nothing."""
        assert plan.rule is not None
        for begin, end in part.runs(self.form.chunk(part.param.device)):
            e = part.entries(begin, end)
            _, delta = moments(e, n, plan)
            if e.pending is not None:
                delta = delta + e.pending
            index = torch.arange(end - begin, dtype=torch.int32, device=delta.device)
            mask = Mask(index, self._places(bucket, part, begin, -1), n)
            pull = pull_of(e, decayed(e, n, plan), mask, n, plan.rule)
            telemetry.merge(delta, pull, bucket.a, part.shard.peers)

    def _advance(
        self,
        bucket: Bucket,
        part: Piece,
        n: Numbers,
        last: int | torch.Tensor,
        fresh: bool,
        telemetry: Telemetry | None,
    ) -> None:
        projected = self.confined.protected.covers(part.name)
        plan = bucket.plan(projected)._replace(fresh=fresh)
        if projected:
            part.update = torch.empty(part.size, dtype=wide(part.param.dtype), device=part.param.device)
        for begin, end in part.runs(self.form.chunk(part.param.device)):
            self.form.advance(part.entries(begin, end), n, self._places(bucket, part, begin, last), plan)
        if part.update is None:
            return
        update = part.update.view(part.param.shape)
        if telemetry is not None:
            before = update.norm()
        self.confined.apply_(part.name, update, part.shard)
        if telemetry is not None:
            telemetry.project(before, update.norm(), part.shard.peers)
        if bucket.group["trust_radius"]:
            local(part.state["displacement" if plan.due else "pending"]).add_(update)
        else:
            self._settle(part, None, plan.due)
        part.update = None

    def _settle(self, part: Piece, factor: float | torch.Tensor | None, due: bool) -> None:
        for begin, end in part.runs(self.form.chunk(part.param.device)):
            self.form.settle(part.entries(begin, end), factor, due)

    def _trust(self, bucket: Bucket) -> None:
        """Scale every parameter's way from its start into the trust region, and place the weights."""
        radius, parts = bucket.group["trust_radius"], bucket.parts
        if float(bucket.group["lr"]) or bucket.a:  # else nothing moved, and the estimate's last bits must not
            ways = [way_of(part) for part in parts]
            found = factors(ways, [part.state for part in parts], [part.shard for part in parts], radius)
        else:
            found = [None] * len(parts)
        for part, factor in zip(parts, found, strict=True):
            self._settle(part, factor, True)


def torch_adamw(lists: list[Any], group: Mapping[str, Any]) -> None:
    """torch's functional AdamW on parameters, gradients, moments, largest second moments and steps."""
    beta1, beta2 = group["betas"]
    names = ("foreach", "capturable", "differentiable", "fused", "amsgrad", "lr", "maximize", "weight_decay", "eps")
    same = {name: group[name] for name in names}
    adamw(*lists, **same, beta1=beta1, beta2=beta2)

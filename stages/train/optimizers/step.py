"""One step of AdamW with everything elementwise behind it, as a pure function of some entries of one parameter. docs/methods.md sections 5 to 8.

mask -> moments -> decay -> merge -> mask -> displacement -> weights. It is run eagerly, which is the reference, or compiled (`form.py`),
when it reads and writes every entry once.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from stages.train.optimizers.rules import Rule
from stages.train.optimizers.terms import Mask, Numbers, Places, axpy

Decay = Literal["none", "zero", "start", "late"]
End = Literal["weights", "displacement", "update", "magnitude", "norms"]


class Entries(NamedTuple):
    """What a step reads of some entries: flat tensors of one length. Moments, displacement, pending and update are float32 (float64 for float64
    weights).

    weights: W.  start: W as training started.  displacement: the way from there.  pending: AdamW's steps since the last merge of step-K.
    task: the task vector.  frozen: bool, entries that must not change.  update: where an update is written that is still to be projected.
    """

    weights: torch.Tensor
    gradient: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    displacement: torch.Tensor
    start: torch.Tensor
    max_exp_avg_sq: torch.Tensor | None = None
    pending: torch.Tensor | None = None
    task: torch.Tensor | None = None
    frozen: torch.Tensor | None = None
    update: torch.Tensor | None = None


class Plan(NamedTuple):
    """Which operations a step is made of: what is the same from one step to the next.

    rule: of the merge; None: nothing is merged at this step.  due: False: the step waits in `pending`.  fresh: the moments have not seen the
    gradient yet.  decay: towards 0 (zero; late: after the merge, as released) or towards the start.
    end: how far it goes. weights: all the way.  displacement: the weights are not placed.  update: what would be added to the
    decayed displacement (or pending) is written to `update` instead.  magnitude: |the step to be merged|.  norms: the L1 norms of
    the step and of what its mask keeps.
    """

    beta1: float
    beta2: float
    rule: Rule | None = None
    due: bool = True
    fresh: bool = True
    maximize: bool = False
    decay: Decay = "none"
    end: End = "weights"


class New(NamedTuple):
    """What a step makes of `Entries`; None: it stays as it is. found: what `Plan.end` asks for beside the state."""

    weights: torch.Tensor | None = None
    exp_avg: torch.Tensor | None = None
    exp_avg_sq: torch.Tensor | None = None
    max_exp_avg_sq: torch.Tensor | None = None
    displacement: torch.Tensor | None = None
    pending: torch.Tensor | None = None
    update: torch.Tensor | None = None
    found: torch.Tensor | None = None


def advance(e: Entries, n: Numbers, p: Places, plan: Plan) -> New:
    """The step that `plan` is."""
    new, delta = moments(e, n, plan)
    if plan.due and e.pending is not None:
        delta = delta + e.pending
    if plan.end == "magnitude":
        return new._replace(found=delta.abs())
    mask = Mask(torch.arange(delta.numel(), dtype=torch.int32, device=delta.device), p, n)
    rule = plan.rule
    if plan.end == "norms":
        assert rule is not None
        return new._replace(found=torch.stack([delta.abs().sum(), rule.kept(delta, mask, n).abs().sum()]))
    displacement = decayed(e, n, plan)
    if rule is None:
        update = delta
    else:
        kept = rule.kept(delta, mask, n)
        if rule.rescale:
            kept = rule.rescaled(kept, n.step_factor)
        update = rule.merged(kept, pull_of(e, displacement, mask, n, rule), n)
    if e.frozen is not None:
        update = update.masked_fill(e.frozen, 0)
    pending = torch.zeros_like(e.pending) if plan.due and e.pending is not None else e.pending
    if plan.end == "update":
        return new._replace(displacement=displacement, pending=pending, update=update)
    if plan.due:
        displacement = displacement + update
    else:
        assert pending is not None
        pending = pending + update
    if plan.decay == "late":
        displacement = _toward_zero(displacement, pending, e.start, n)
    new = new._replace(displacement=displacement, pending=pending)
    return new if plan.end == "displacement" else new._replace(weights=placed(displacement, pending, e))


def moments(e: Entries, n: Numbers, plan: Plan) -> tuple[New, torch.Tensor]:
    """The moments after the gradient, and AdamW's step without decay; operation by operation torch.optim.AdamW's on weights of 0."""
    m, v, largest = e.exp_avg, e.exp_avg_sq, e.max_exp_avg_sq
    if plan.fresh:
        g = e.gradient.to(m.dtype)
        if e.frozen is not None:
            g = g.masked_fill(e.frozen, 0)
        if plan.maximize:
            g = -g
        m = torch.lerp(m, g, 1 - plan.beta1)
        v = torch.addcmul(v * plan.beta2, g, g, value=1 - plan.beta2)
        largest = None if largest is None else torch.maximum(largest, v)
    delta = m * n.step_size / ((v if largest is None else largest).sqrt() / n.root + n.eps)
    return (New(exp_avg=m, exp_avg_sq=v, max_exp_avg_sq=largest) if plan.fresh else New()), delta


def decayed(e: Entries, n: Numbers, plan: Plan) -> torch.Tensor:
    """The displacement after the decay that comes before the merge."""
    if plan.decay in ("none", "late"):
        return e.displacement
    if plan.decay == "zero":
        return _toward_zero(e.displacement, e.pending, e.start, n)
    shrunk = e.displacement * n.shrink
    return shrunk if e.pending is None else axpy(shrunk, e.pending, n.decay)


def _toward_zero(
    displacement: torch.Tensor, pending: torch.Tensor | None, start: torch.Tensor, n: Numbers
) -> torch.Tensor:
    shrunk = displacement * n.shrink
    if pending is not None:
        shrunk = axpy(shrunk, pending, n.decay)
    return axpy(shrunk, start.to(shrunk.dtype), n.decay)


def pull_of(e: Entries, displacement: torch.Tensor, mask: Mask, n: Numbers, rule: Rule) -> torch.Tensor:
    """What the step is merged with; 0 off the active entries."""
    task = None if e.task is None else e.task.to(displacement.dtype)
    if task is not None and e.frozen is not None:
        task = task.masked_fill(e.frozen, 0)
    pull = rule.pull(task, displacement, mask, n)
    if rule.rescale and rule.selection == "top" and e.task is not None:
        pull = pull.to(e.task.dtype).to(displacement.dtype)
    return pull if e.frozen is None else pull.masked_fill(e.frozen, 0)


def placed(displacement: torch.Tensor, pending: torch.Tensor | None, e: Entries) -> torch.Tensor:
    """W = start + displacement + what is pending, added in the displacement's dtype."""
    way = displacement if pending is None else displacement + pending
    return (way + e.start.to(way.dtype)).to(e.weights.dtype)


def settle(e: Entries, factor: float | torch.Tensor | None, due: bool) -> New:
    """The end of a step that stopped before: an update that was projected is added, the way from the start scaled, the weights placed."""
    displacement, pending = e.displacement, e.pending
    if e.update is not None:
        if due:
            displacement = displacement + e.update
        else:
            assert pending is not None
            pending = pending + e.update
    if factor is not None:
        displacement = displacement * factor
        pending = None if pending is None else pending * factor
    return New(placed(displacement, pending, e), displacement=displacement, pending=pending)

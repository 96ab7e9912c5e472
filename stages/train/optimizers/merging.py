"""The merge's side of a step: which rule, its numbers and keys, and what it must know of a whole parameter first."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from stages.train.optimizers.active import ActiveEntries
from stages.train.optimizers.bucket import wide
from stages.train.optimizers.form import Form
from stages.train.optimizers.masks import is_top, kept_of, key_words, room_of, share_of, top_cut, wrapped
from stages.train.optimizers.part import Piece
from stages.train.optimizers.rules import Rule
from stages.train.optimizers.settings import Merge
from stages.train.optimizers.shard import LocalRows, add_up
from stages.train.optimizers.step import Plan
from stages.train.optimizers.task_vector import TaskVector
from stages.train.optimizers.terms import Numbers, Places
from stages.train.optimizers.top import EVERYTHING, Cut, Held, cut_whole, cuts_by_digits

_SMALL = 1e-8
"""As released: a smaller L1 norm is not restored."""


class Merging:
    """The task vector and what is found in it and in a step. active: entries that may change; the shares that OnTIES keeps are of them."""

    def __init__(self, vector: TaskVector | None, seed: int, active: ActiveEntries) -> None:
        self.vector, self.seed, self.active = vector, seed, active
        self._cuts: dict[tuple[str, Rule, float], tuple[Cut, float]] = {}

    def forget(self) -> None:
        """Settings or masks changed: what was found in the task vector does not hold any more."""
        self._cuts.clear()

    def fetch(self, parts: list[Piece]) -> None:
        """Hand the parts their task vectors."""
        if self.vector is None or not parts:
            return
        names, shards = [part.name for part in parts], [part.shard for part in parts]
        for part, task in zip(parts, self.vector.fetch(names, shards, parts[0].param.device), strict=True):
            part.task = task.reshape(-1)

    def prefetch(self, names: list[str], shards: list[LocalRows], device: torch.device) -> None:
        """Have the task vectors of the next bucket read ahead."""
        if self.vector is not None:
            self.vector.prefetch(names, shards, device)

    def of_vector(self, part: Piece, merge: Merge) -> tuple[Cut, float]:
        """(cut, factor) of F(tau) of a parameter, found in the whole tensor when first asked for."""
        rule = merge.rule()
        if rule.selection != "top" or not (rule.partial or rule.rescale) or self.vector is None:
            return EVERYTHING, 1.0
        key = (part.name, rule, merge.reserve)
        if key not in self._cuts:
            tau = self.vector.whole(part.name)
            tau = tau.to("cpu", wide(tau.dtype), copy=True)
            self.active.zero_(part.name, tau)
            k = kept_of(self.active.count(part.name, tau.numel()), merge.reserve, rule.released)
            cut, factor = top_cut(tau, k) if rule.partial else EVERYTHING, 1.0
            if rule.rescale:
                magnitude = tau.abs()
                local = torch.arange(tau.numel()).view(tau.shape)
                kept = (magnitude * is_top(magnitude, local, cut.limit, cut.last)).sum()
                before = magnitude.sum()
                factor = float(before / kept) if before >= _SMALL else 1.0
            self._cuts[key] = cut, factor
        return self._cuts[key]

    def numbers(self, parts: list[Piece], merge: Merge, base: Numbers) -> list[Numbers]:
        """The base numbers with each parameter's of the task vector."""
        found = [self.of_vector(part, merge) for part in parts]
        return [base._replace(task_limit=cut.limit, task_factor=factor) for cut, factor in found]

    def places(self, part: Piece, merge: Merge, group: dict[str, Any], step: int, begin: int, last: Any) -> Places:
        """What decides about the entries from `begin` on by where they are. last: of the step's cut."""
        rule, first = merge.rule(), part.first + begin
        if not rule.partial or rule.selection == "none":
            return NOWHERE
        if rule.selection == "top":
            task = self.of_vector(part, merge)[0]
            return NOWHERE._replace(step_room=room_of(last, first), task_room=room_of(task.last, first))
        span = first >> 32
        key = (self.seed, 0, step)  # 0: masks are what they were when one optimizer went through phases
        of_step = key_words((*key, "step", part.name), span)
        of_task = key_words((self.seed, "task", part.name) if rule.released else (*key, "task", part.name), span)
        return Places(wrapped(first), *of_step, *of_task, share_of(merge.reserve))

    def cuts(self, form: Form, parts: list[Piece], merge: Merge, base: Numbers, plan: Plan) -> list[Cut]:
        """Of every parameter's step: F's cut. The moments take the gradients in on the way."""
        rule = merge.rule()
        counts = [self.active.count(part.name, part.shard.numel) for part in parts]
        kept = [kept_of(count, merge.reserve, rule.released) for count in counts]
        top = rule.selection == "top" and rule.partial
        wanted = [top and 0 < k < part.shard.numel for k, part in zip(kept, parts, strict=True)]
        cuts = [EVERYTHING] * len(parts)
        device, peers = parts[0].param.device, parts[0].shard.peers
        if peers is None and device.type == "cpu":
            for i, (part, k) in enumerate(zip(parts, kept, strict=True)):
                look = plan._replace(end="magnitude")
                magnitudes = _magnitudes(form, part, base, look)
                again = partial(_magnitudes, form, part, base, look._replace(fresh=False))
                if wanted[i]:
                    cuts[i] = cut_whole(magnitudes, k, part.size, again)
                else:
                    _exhaust(magnitudes)
            return cuts
        for part in parts:
            _exhaust(_magnitudes(form, part, base, plan._replace(end="magnitude")))
        picked = [i for i, w in enumerate(wanted) if w]
        if picked:
            look = plan._replace(end="magnitude", fresh=False)
            held = [_held(form, parts[i], base, look, kept[i]) for i in picked]
            found = cuts_by_digits(held, wide(parts[0].param.dtype), device, peers)
            for i, cut in zip(picked, found, strict=True):
                cuts[i] = cut
        return cuts

    def factors(
        self, form: Form, parts: list[Piece], merge: Merge, numbers: list[Numbers], plan: Plan, places: Any, eps: float
    ) -> list[torch.Tensor]:
        """What restores the L1 norm of every parameter's step (released option). places: of (index of the part, first entry)."""
        sums = []
        for i, (part, n) in enumerate(zip(parts, numbers, strict=True)):
            total = torch.zeros(2, dtype=wide(part.param.dtype), device=part.param.device)
            for begin, end in part.runs(form.chunk(part.param.device)):
                found = form.advance(part.entries(begin, end), n, places(i, begin), plan._replace(end="norms"))
                assert found is not None
                total += found
            sums.append(total)
        both = add_up(torch.stack(sums), parts[0].shard.peers)
        before, now = both[:, 0], both[:, 1]
        factors = torch.where(before >= _SMALL, before / (now + merge.rule().eps_of_norm(eps)), torch.ones_like(before))
        return list(factors.unbind())


NOWHERE = Places(0, 0, 0, 0, 0, 0)


def _magnitudes(form: Form, part: Piece, n: Numbers, plan: Plan) -> Iterator[torch.Tensor]:
    """|step| of the entries held, in runs."""
    size = form.chunk(part.param.device, looking=True)
    for begin in range(0, part.size, size):
        found = form.advance(part.entries(begin, min(begin + size, part.size)), n, NOWHERE, plan)
        assert found is not None
        yield found


def _held(form: Form, part: Piece, n: Numbers, plan: Plan, k: int) -> Held:
    def at(places: torch.Tensor) -> torch.Tensor:
        found = form.advance(part.at(places), n, NOWHERE, plan)
        assert found is not None
        return found

    return Held(lambda: _magnitudes(form, part, n, plan), at, part.first, part.size, k)


def _exhaust(runs: Iterator[torch.Tensor]) -> None:
    for _ in runs:
        pass

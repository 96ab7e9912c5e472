"""OrthAlign: objectives one after another, each kept out of the subspaces the earlier ones used. docs/methods.md sections 6 and 8,
arXiv 2509.24610.

After an objective the leading singular vectors of every matrix's change are protected; the next objective's UPDATES are
projected off them (after Adam: a projected gradient would leak). LoRA: the change is B A, so its outputs stay free when the updates of B
(which starts at 0) are projected on the left, and its inputs when A, as it starts and in every update, is projected on the right; each
objective has an adapter of its own, merged into the weights when it ends.

Rank search (ours, after the paper's): of the objective just trained the fewest singular directions q are protected without which,
that is with its change cut to them, its reward accuracy on dev pairs falls by no more than `tolerance`: the other directions are as if a later
objective had used all of them. Bisection over q, one for all matrices; accuracy need not be monotone in q, so the one below is tried,
and lower while it holds too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from schemas.config.training import TrainConfig
from schemas.ids import content_id
from stages.contract import Drop
from stages.models.device import free_memory
from stages.train.allo.phases import pairs_seen_in_phases, train_in_phases
from stages.train.allo.phases import plans as phases_of
from stages.train.batches import BatchPlan, plan_last
from stages.train.callbacks import beats
from stages.train.checkpoints import MARKER, is_complete, mark_complete
from stages.train.confined import ConfinedPhase
from stages.train.dataset import TrainingPairs
from stages.train.displacement import Beat, Weights, bounded, changed, cut_to, leaks, remember, without_adapter
from stages.train.objectives import Chosen, Scores, accuracies, choose, score
from stages.train.optimizers.change import Change
from stages.train.optimizers.subspace import Protected, refuse_unprotected
from stages.train.phase import History, pairs_seen, train_phase
from stages.train.processes import at_first, from_first, is_first, weights_of_first, world_size
from stages.train.references import recomputed
from stages.train.room import most_directions
from stages.train.session import Session

_MODEL, _BASES, _LOG, _BEFORE = "model", "protected.safetensors", "history.json", "before.safetensors"


def train_objectives(
    session: Session, model: PreTrainedModel, pairs: TrainingPairs
) -> tuple[PreTrainedModel, History, list[Drop], set[int]]:
    """(the trained model without adapters; the log, steps counted on; pairs that belong to no objective; positions of
    those that were learnt from).

    Everything an objective leaves (weights, bases, log) is in checkpoints/objective-K: a run that was killed continues
    inside the objective it was in. Raises UserError for what the config or the data make impossible, Stopped when asked to.
    """
    refuse_unprotected(model, session.train.method)
    _name_narrow(session, model)
    objectives, drops = choose(session, pairs)
    plans = [plan_last(len(o.pairs), session.train, world_size()) for o in objectives]
    for objective, plan in zip(objectives, plans, strict=True):
        steps = total_steps(session.train, plan, len(objective.pairs))
        session.note(f"objective {objective.name}: {len(objective.pairs)} pairs, {steps} steps")
        for line in plan.notes:
            session.note(f"objective {objective.name}: {line}")
    start = from_first(lambda: [score(model, o.dev, session.scorer()) for o in objectives], session.config)
    sequence = _Sequence(session, objectives, plans, start)
    trained, history = sequence.run(model)
    return trained, history, drops, sequence.seen()


def _name_narrow(session: Session, model: nn.Module) -> None:
    sequence = session.train.orthalign
    shapes = {name: p.shape for name, p in model.named_parameters() if p.ndim == 2}
    if narrow := [name for name, shape in shapes.items() if not most_directions(shape, sequence)]:
        session.note(
            f"{len(narrow)} matrices have fewer dimensions than there are objectives: none of their directions are protected,"
            f" for example {narrow[0]} {list(shapes[narrow[0]])}"
        )


@dataclass
class _Sequence:
    session: Session
    objectives: list[Chosen]
    plans: list[BatchPlan]
    start: list[Scores]

    def run(self, model: PreTrainedModel) -> tuple[PreTrainedModel, History]:
        """Train the objectives that are not done yet."""
        protected, history, done = Protected.none(), History(), from_first(self._done, self.session.config)
        if done:
            place = self._place(done - 1)
            names = ", ".join(o.name for o in self.objectives[:done])
            self.session.note(f"objectives done before: {names}")
            model = replace(self.session, start=replace(self.session.start, path=place / _MODEL)).load()
            protected = Protected.load(place / _BASES)
            history = json.loads((place / _LOG).read_text(encoding="utf-8"))
        if is_first():
            for later in range(done + 1, len(self.objectives)):  # it stands on weights that are made again
                shutil.rmtree(self._place(later), ignore_errors=True)
        for number in range(done, len(self.objectives)):
            model, protected, history = self._objective(number, model, protected, history)
        return model, history

    def _objective(
        self, number: int, model: PreTrainedModel, protected: Protected, history: History
    ) -> tuple[PreTrainedModel, Protected, History]:
        """Train it; what is measured between objectives, and written, the first process does for all."""
        objective, settings = self.objectives[number], self.session.train.orthalign
        place, last, config = self._place(number), number == len(self.objectives) - 1, self.session.config
        pairs = objective.pairs
        referred = settings.reference == "objective" and not config.loss.reference_free
        if number and referred:
            pairs = from_first(partial(recomputed, pairs, model, self.session.scorer()), config)
        place.mkdir(parents=True, exist_ok=True)
        factors = self.session.train.method == "lora" and settings.rank == "energy"  # say alone what changed
        compared = bool(protected) or bool(settings.trust_radius) or not (last or factors)
        before: Weights = at_first(partial(remember, model, place / _BEFORE), {}, config) if compared else {}
        phase = self._phase(number, pairs, protected)
        train = train_in_phases if self.session.train.allo.on else train_phase
        trained, log = train(self.session, model, phase)
        none: tuple[dict[str, float], dict[str, Change]] = ({}, {})
        figures, changes = at_first(partial(self._held, objective, trained, before, last), none, config)
        plain = without_adapter(trained)
        del trained
        weights_of_first(plain)
        finish = partial(self._finish, number, plain, before, changes, protected, figures, log, history)
        kept = at_first(finish, None, config)
        free_memory()
        if kept is None:
            return plain, Protected.load(place / _BASES), history
        return plain, *kept

    def _held(
        self, objective: Chosen, trained: Any, before: Weights, last: bool
    ) -> tuple[dict[str, float], dict[str, Change]]:
        """(figures, what changed), after the change was held to the trust region."""
        settings = self.session.train.orthalign
        figures = self._within(objective, trained, before) if settings.trust_radius else {}
        most = partial(most_directions, sequence=settings)
        return figures, {} if last else changed(trained, before, most, self._beat)

    def _finish(
        self,
        number: int,
        plain: PreTrainedModel,
        before: Weights,
        changes: Mapping[str, Change],
        protected: Protected,
        figures: dict[str, float],
        log: History,
        history: History,
    ) -> tuple[Protected, History]:
        """(what the next objectives stay out of, the log with this one's figures); both, and the weights, are on disk then."""
        objective, settings = self.objectives[number], self.session.train.orthalign
        if protected:
            beat = self._beat(len(protected.left) or len(protected.right), "matrix")
            figures["leak"], figures["leak_exported"] = leaks(
                plain, before, protected, self.session.numbers.compute, beat
            )
        if number < len(self.objectives) - 1:  # what the last one did, nobody needs to stay out of
            kept = self._kept(number, plain, before, changes)
            protected = protected.extended(kept, settings.side, energy=1.0, q_max=settings.q_max)
            figures["directions"] = _mean_directions(protected)
            held, whole = (sum(f(change) for change in kept.values()) for f in (_squares, lambda c: c.energy))
            figures["energy"] = held / whole
        entry: dict[str, Any] = {f"objective/{objective.name}/{name}": value for name, value in figures.items()}
        for earlier, start in zip(self.objectives[: number + 1], self.start, strict=False):
            measured = accuracies(self._score(plain, earlier), start)
            entry |= {f"objective/{earlier.name}/{name}": value for name, value in measured.items()}
        offset = sum(self._steps(earlier) for earlier in range(number))
        history = history + [logged | {"step": logged["step"] + offset} for logged in log]
        history.append({"step": offset + self._steps(number), **entry})
        self._keep(number, plain, protected, history)
        return protected, history

    def _phase(self, number: int, pairs: TrainingPairs, protected: Protected) -> ConfinedPhase:
        later = sum(self._steps(later) for later in range(number + 1, len(self.plans)))
        place, identity = self._place(number), self._identity(number)
        return ConfinedPhase(
            pairs,
            self.plans[number],
            place,
            identity,
            number=number,
            later=later,
            title=f"objective/{self.objectives[number].name}",
            protected=protected,
        )

    def seen(self) -> set[int]:
        """Positions in curated of the pairs that any objective learns from."""
        seen = pairs_seen_in_phases if self.session.train.allo.on else pairs_seen
        phases = (self._phase(n, o.pairs, Protected.none()) for n, o in enumerate(self.objectives))
        return set().union(*(seen(self.session, phase) for phase in phases))

    def _within(self, objective: Chosen, model: nn.Module, before: Weights) -> dict[str, float]:
        """Hold the change to the trust region also where the optimizer's estimate was too low. Every phase has its own radius."""
        radius, allo = self.session.train.orthalign.trust_radius, self.session.train.allo
        radius *= 2 if allo.on and allo.forget and allo.learn else 1
        norm, above = bounded(model, before, radius, self._beat)
        if above:
            self.session.note(
                f"objective {objective.name}: {above} changes scaled back to norm {radius:g}, from up to {norm:g}"
            )
        return {"spectral_norm": norm}

    def _kept(
        self, number: int, model: PreTrainedModel, before: Weights, changes: Mapping[str, Change]
    ) -> dict[str, Change]:
        """The part of every change that is protected."""
        settings = self.session.train.orthalign
        if settings.rank == "search":
            q = self._search(number, model, before, changes)
            return {name: change.first(q) for name, change in changes.items()}
        return {name: change.first(change.count(settings.energy)) for name, change in changes.items()}

    def _search(self, number: int, model: PreTrainedModel, before: Weights, changes: Mapping[str, Change]) -> int:
        """The fewest directions a matrix that hold the objective's reward accuracy within the tolerance."""
        objective, start = self.objectives[number], self.start[number]
        settings = self.session.train.orthalign
        whole = accuracies(self._score(model, objective), start)["reward_accuracy"]

        def holds(q: int) -> bool:
            with cut_to(model, before, changes, q):
                now = accuracies(self._score(model, objective), start)["reward_accuracy"]
            return fell_within(whole, now, settings.tolerance)

        q, tries = fewest(holds, settings.q_max)
        self.session.note(f"objective {objective.name}: {q} directions a matrix protected, {tries} ranks tried")
        if q == settings.q_max and not holds(q):
            self.session.note(
                f"objective {objective.name}: q_max {q} directions lose more than the tolerance: raise q_max to hold it"
            )
        return q

    def _steps(self, number: int) -> int:
        return total_steps(self.session.train, self.plans[number], len(self.objectives[number].pairs))

    def _score(self, model: PreTrainedModel, objective: Chosen) -> Scores:
        return score(model, objective.dev, self.session.scorer())

    def _beat(self, amount: int, unit: str) -> Beat:
        return beats(self.session.ctx, amount, unit)

    def _place(self, number: int) -> Path:
        return self.session.checkpoints / f"objective-{number}"

    def _identity(self, number: int) -> str:
        used = [(o.pairs.digest, o.digest) for o in self.objectives[: number + 1]]
        return content_id(self.session.identity, used, number)

    def _done(self) -> int:
        """How many objectives were finished, under this configuration: up to the last whose weights are there."""
        numbers = reversed(range(len(self.objectives)))
        return next((n + 1 for n in numbers if is_complete(self._place(n), self._identity(n))), 0)

    def _keep(self, number: int, model: PreTrainedModel, protected: Protected, history: History) -> None:
        """Write what the next objective starts from; then the checkpoints and the weights before it are no longer needed."""
        place = self._place(number)
        (place / MARKER).unlink(missing_ok=True)
        model.save_pretrained(place / _MODEL)
        protected.save(place / _BASES)
        (place / _LOG).write_text(json.dumps(history), encoding="utf-8")
        mark_complete(place, self._identity(number), history[-1]["step"], (_MODEL, _BASES, _LOG))
        for old in [*place.glob("checkpoint-*"), place / "allo" / "forget", place / "allo" / "forgotten"]:
            shutil.rmtree(old, ignore_errors=True)
        (place / _BEFORE).unlink(missing_ok=True)
        if number:
            shutil.rmtree(self._place(number - 1) / _MODEL, ignore_errors=True)


def total_steps(train: TrainConfig, plan: BatchPlan, n_pairs: int) -> int:
    """Optimizer steps of an objective, over all its phases."""
    if not train.allo.on:
        return plan.steps
    return sum(phase.steps for phase in phases_of(train, plan, n_pairs).values())


def _squares(change: Change) -> float:
    return float(change.values.square().sum())


def fell_within(before: float, after: float, tolerance: float) -> bool:
    """Whether a share fell by at most `tolerance`: 1 of 50 is 0.02, whatever the last bits of 1 - 0.98 are."""
    return before - after <= tolerance + 1e-9


def fewest(holds: Any, most: int) -> tuple[int, int]:
    """(the least q in 1..most with holds(q) and not holds(q - 1), how many q were asked); `most` if none holds.

    Bisection assumes that what holds at q holds above it; when it does not, the answer still holds, and the one below it does not.
    """
    known: dict[int, bool] = {most: True}

    def ask(q: int) -> bool:
        if q not in known:
            known[q] = bool(holds(q))
        return known[q]

    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ask(middle) else (middle + 1, high)
    while low > 1 and ask(low - 1):
        low -= 1
    return low, len(known) - 1


def _mean_directions(protected: Protected) -> float:
    """Directions protected, a matrix, on the side that has them."""
    counts = [q.shape[1] for bases in (protected.left, protected.right) for q in bases.values()]
    return sum(counts) / len(counts)

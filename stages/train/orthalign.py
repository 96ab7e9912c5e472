"""OrthAlign: objectives one after another, each kept out of the subspaces the earlier ones used. METHODS.md sections 6 and 8,
arXiv 2509.24610.

After an objective the leading singular vectors of every matrix's change are protected; the next objective's UPDATES are
projected off them (after Adam: a projected gradient would leak). LoRA: the change is B A, so its outputs stay free when the updates of B
(which starts at 0) are projected on the left, and its inputs when A, as it starts and in every update, is projected on the right; each
objective has an adapter of its own, merged into the weights when it ends.

Rank search (ours, after the paper's): of the objective just trained the fewest singular directions q are protected without which,
that is with its change cut to them, its reward accuracy on dev pairs falls by no more than `tolerance`: the other directions are as if a later
objective had used all of them. Bisection over q, one for all matrices; accuracy need not be monotone in q, so the neighbours are tried.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from schemas.errors import UserError
from schemas.ids import content_id
from stages.contract import Context, Drop
from stages.models.load import free_memory, load_causal_lm
from stages.text.render import Renderer
from stages.train.allo.phases import total_steps, train_objective
from stages.train.batches import BatchPlan, plan_batches
from stages.train.callbacks import beats
from stages.train.checkpoints import sync_folder
from stages.train.dataset import TrainingPairs
from stages.train.displacement import Beat, Weights, changed, cut_to, leaks, merged, remember
from stages.train.model import Precision
from stages.train.objectives import Chosen, Scores, accuracies, choose, score
from stages.train.optimizers.change import Change
from stages.train.optimizers.subspace import Protected
from stages.train.phase import History, Phase
from stages.train.references import recomputed
from stages.train.scoring import Scorer

_DONE, _BASES, _BEFORE = "objective.json", "protected.safetensors", "before.safetensors"


def train_objectives(
    ctx: Context,
    folder: Path,
    model: PreTrainedModel,
    renderer: Renderer,
    pairs: TrainingPairs,
    numbers: Precision,
    identity: str,
) -> tuple[PreTrainedModel, History, list[Drop]]:
    """(the trained model without adapters; the log, steps counted on; pairs that belong to no objective).

    Everything an objective leaves (weights, bases, log) is in folder/checkpoints/objective-K: a run that was killed continues
    inside the objective it was in. Raises UserError for what the config or the data make impossible, Stopped when asked to.
    """
    refuse_transposed(model)
    objectives, drops = choose(ctx, pairs, renderer)
    plans = [plan_batches(len(o.pairs), ctx.config.train) for o in objectives]
    for objective, plan in zip(objectives, plans, strict=True):
        steps = total_steps(ctx.config.train, plan, len(objective.pairs))
        ctx.progress.note(f"objective {objective.name}: {len(objective.pairs)} pairs, {steps} steps")
        for line in plan.notes:
            ctx.progress.note(f"objective {objective.name}: {line}")
    scorer = Scorer.of(ctx, numbers)
    start = [score(model, o.dev, scorer) for o in objectives]
    sequence = _Sequence(ctx, folder / "checkpoints", renderer, numbers, identity, objectives, plans, start)
    trained, history = sequence.run(model)
    return trained, history, drops


def refuse_transposed(model: nn.Module) -> None:
    """Raise UserError for weights stored [I, O] (GPT-2's Conv1D): outputs and inputs would be taken for each other."""
    name = next((name for name, module in model.named_modules() if isinstance(module, Conv1D)), None)
    if name is not None:
        raise UserError(
            f"{name} is a Conv1D, whose weight is stored transposed: outputs and inputs would be taken for each other",
            where="train.orthalign",
            fix="Train this model without objectives, or use one made of nn.Linear layers.",
        )


@dataclass
class _Sequence:
    ctx: Context
    folder: Path
    renderer: Renderer
    numbers: Precision
    identity: str
    objectives: list[Chosen]
    plans: list[BatchPlan]
    start: list[Scores]

    def run(self, model: PreTrainedModel) -> tuple[PreTrainedModel, History]:
        """Train the objectives that are not done yet."""
        protected, left = Protected.none(), self._left()
        history, done = [entry for log in left for entry in log], len(left)
        if done:
            place = self._place(done - 1)
            names = ", ".join(o.name for o in self.objectives[:done])
            self.ctx.progress.note(f"objectives done before: {names}")
            ref = replace(self.ctx.models["policy"], path=place / "model")
            trust = self.ctx.config.model.trust_remote_code
            model = load_causal_lm(ref, self.numbers.load, self.numbers.device, trust)
            protected = Protected.load(place / _BASES)
        for later in range(done + 1, len(self.objectives)):  # it stands on weights that are made again
            shutil.rmtree(self._place(later), ignore_errors=True)
        for number in range(done, len(self.objectives)):
            model, protected, entries = self._objective(number, model, protected)
            history += entries
        return model, history

    def _objective(
        self, number: int, model: PreTrainedModel, protected: Protected
    ) -> tuple[PreTrainedModel, Protected, History]:
        objective, plan, settings = self.objectives[number], self.plans[number], self.ctx.config.train.orthalign
        place, last = self._place(number), number == len(self.objectives) - 1
        pairs = objective.pairs
        if number and settings.reference == "objective":
            pairs = recomputed(pairs, model, Scorer.of(self.ctx, self.numbers))
        place.mkdir(parents=True, exist_ok=True)
        before = remember(model, place / _BEFORE)
        phase = Phase(
            pairs,
            plan,
            place,
            self._identity(number),
            number=number,
            later=sum(self._steps(later) for later in range(number + 1, len(self.plans))),
            protected=protected,
        )
        trained, log = train_objective(self.ctx, model, self.renderer, self.numbers, phase)
        figures: dict[str, float] = {}
        changes = {} if last else changed(trained, before, self._most, self._beat(len(before), "matrix"))
        plain = merged(trained)
        del trained
        if protected:
            beat = self._beat(len(protected.left) or len(protected.right), "matrix")
            figures["leak"], figures["leak_exported"] = leaks(plain, before, protected, self.numbers.compute, beat)
        if not last:  # what the last one did, nobody needs to stay out of
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
        entries = [logged | {"step": logged["step"] + offset} for logged in log]
        entries.append({"step": offset + self._steps(number), **entry})
        self._keep(number, plain, protected, entries)
        free_memory()
        return plain, protected, entries

    def _most(self, shape: torch.Size) -> int:
        """Directions an objective may protect in a matrix: q_max, and no more than its share of the narrowest side that is
        protected, so that those of all objectives together never are the whole space."""
        side = self.ctx.config.train.orthalign.side
        width = {"left": shape[0], "right": shape[1], "both": min(shape)}[side]
        return min(self.ctx.config.train.orthalign.q_max, max(1, width // len(self.objectives)))

    def _kept(
        self, number: int, model: PreTrainedModel, before: Weights, changes: Mapping[str, Change]
    ) -> dict[str, Change]:
        """The part of every change that is protected."""
        settings = self.ctx.config.train.orthalign
        if settings.rank == "search":
            q = self._search(number, model, before, changes)
            return {name: change.first(q) for name, change in changes.items()}
        return {name: change.first(change.count(settings.energy)) for name, change in changes.items()}

    def _search(self, number: int, model: PreTrainedModel, before: Weights, changes: Mapping[str, Change]) -> int:
        """The fewest directions a matrix that hold the objective's reward accuracy within the tolerance."""
        objective, start = self.objectives[number], self.start[number]
        settings = self.ctx.config.train.orthalign
        whole = accuracies(self._score(model, objective), start)["reward_accuracy"]

        def holds(q: int) -> bool:
            with cut_to(model, before, changes, q):
                now = accuracies(self._score(model, objective), start)["reward_accuracy"]
            return within(whole, now, settings.tolerance)

        q, tries = fewest(holds, settings.q_max)
        self.ctx.progress.note(f"objective {objective.name}: {q} directions a matrix protected, {tries} ranks tried")
        if q == settings.q_max and not holds(q):
            self.ctx.progress.note(
                f"objective {objective.name}: q_max {q} directions lose more than the tolerance: raise q_max to hold it"
            )
        return q

    def _steps(self, number: int) -> int:
        return total_steps(self.ctx.config.train, self.plans[number], len(self.objectives[number].pairs))

    def _score(self, model: PreTrainedModel, objective: Chosen) -> Scores:
        return score(model, objective.dev, Scorer.of(self.ctx, self.numbers))

    def _beat(self, amount: int, unit: str) -> Beat:
        return beats(self.ctx, amount, unit)

    def _place(self, number: int) -> Path:
        return self.folder / f"objective-{number}"

    def _identity(self, number: int) -> str:
        used = [(o.pairs.digest, o.digest) for o in self.objectives[: number + 1]]
        return content_id(self.identity, used, number)

    def _left(self) -> list[History]:
        """The logs of the objectives that were finished, under this configuration, up to the last whose weights are there."""
        found: list[History] = []
        for number in range(len(self.objectives)):
            try:
                record = json.loads((self._place(number) / _DONE).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                break
            if not isinstance(record, dict) or record.get("identity") != self._identity(number):
                break
            found.append(record["history"])
        while found and not (self._place(len(found) - 1) / "model").is_dir():
            found.pop()
        return found

    def _keep(self, number: int, model: PreTrainedModel, protected: Protected, history: History) -> None:
        """Write the objective's result, the record last; the checkpoints and the weights before it are no longer needed."""
        place = self._place(number)
        model.save_pretrained(place / "model")
        protected.save(place / _BASES)
        for file in sorted(p for p in [*(place / "model").iterdir(), place / _BASES] if p.is_file()):
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        temporary = place / (_DONE + ".tmp")
        with temporary.open("w", encoding="utf-8") as handle:
            json.dump({"identity": self._identity(number), "history": history}, handle)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.rename(place / _DONE)
        sync_folder(place)  # before the weights it stands on go
        for old in [*place.glob("checkpoint-*"), place / "allo" / "forget", place / "allo" / "forgotten"]:
            shutil.rmtree(old, ignore_errors=True)
        (place / _BEFORE).unlink(missing_ok=True)
        if number:
            shutil.rmtree(self._place(number - 1) / "model", ignore_errors=True)


def _squares(change: Change) -> float:
    return float(change.values.square().sum())


def within(before: float, after: float, tolerance: float) -> bool:
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

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
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
from stages.train.checkpoints import sync_folder
from stages.train.dataset import TrainingPairs
from stages.train.model import Precision
from stages.train.objectives import Chosen, Scores, accuracies, choose, score
from stages.train.optimizers.change import Change
from stages.train.optimizers.subspace import Protected
from stages.train.phase import Phase
from stages.train.references import recomputed

History = list[dict[str, Any]]
_DONE, _BASES = "objective.json", "protected.safetensors"


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
    tokens = ctx.config.gradients.token_budget
    start = [score(model, o.dev, tokens) for o in objectives]
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
        place = self._place(number)
        pairs = objective.pairs
        if number and settings.reference == "objective":
            pairs = recomputed(pairs, model, self.ctx.config.gradients.token_budget)
        before = {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters() if p.ndim == 2}
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
        plain, changes = _ended(trained, before, settings.q_max)
        del trained
        numbers = {f"objective/{objective.name}/leak": _leak(plain, before, protected)} if protected else {}
        q = self._search(number, plain, before, changes) if settings.rank == "search" else settings.q_max
        energy = 1.0 if settings.rank == "search" else settings.energy
        protected = protected.extended(changes, settings.side, energy, q)
        numbers[f"objective/{objective.name}/directions"] = _mean_directions(protected)
        for earlier, start in zip(self.objectives[: number + 1], self.start, strict=False):
            now = score(plain, earlier.dev, self.ctx.config.gradients.token_budget)
            numbers |= {f"objective/{earlier.name}/{k}": v for k, v in accuracies(now, start).items()}
        offset = sum(self._steps(earlier) for earlier in range(number))
        entries = [entry | {"step": entry["step"] + offset} for entry in log]
        entries.append({"step": offset + self._steps(number), **numbers})
        self._keep(number, plain, protected, entries)
        free_memory()
        return plain, protected, entries

    def _search(
        self, number: int, model: PreTrainedModel, before: Mapping[str, torch.Tensor], changes: Mapping[str, Change]
    ) -> int:
        """The fewest directions a matrix that hold the objective's reward accuracy within the tolerance."""
        objective, start = self.objectives[number], self.start[number]
        settings, tokens = self.ctx.config.train.orthalign, self.ctx.config.gradients.token_budget
        whole = accuracies(score(model, objective.dev, tokens), start)["reward_accuracy"]

        def holds(q: int) -> bool:
            with _cut_to(model, before, changes, q):
                now = accuracies(score(model, objective.dev, tokens), start)["reward_accuracy"]
            return within(whole, now, settings.tolerance)

        q, tries = fewest(holds, settings.q_max)
        self.ctx.progress.note(f"objective {objective.name}: {q} directions a matrix protected, {tries} ranks tried")
        return q

    def _steps(self, number: int) -> int:
        return total_steps(self.ctx.config.train, self.plans[number], len(self.objectives[number].pairs))

    def _place(self, number: int) -> Path:
        return self.folder / f"objective-{number}"

    def _identity(self, number: int) -> str:
        return content_id(self.identity, [o.pairs.digest for o in self.objectives[: number + 1]], number)

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
        if number:
            shutil.rmtree(self._place(number - 1) / "model", ignore_errors=True)


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


def _ended(trained: Any, before: Mapping[str, torch.Tensor], q_max: int) -> tuple[Any, dict[str, Change]]:
    """(the model without an adapter, what happened to its matrices)."""
    changes: dict[str, Change] = {}
    if isinstance(trained, PeftModel):
        layers: dict[str, Any] = {n: m for n, m in trained.named_modules() if isinstance(m, LoraLayer)}
        for name, layer in layers.items():
            (adapter,) = layer.lora_A.keys()
            b_OR = layer.lora_B[adapter].weight.detach().double() * layer.scaling[adapter]
            weight = name.removeprefix("base_model.model.") + ".weight"
            changes[weight] = Change.of_factors(weight, b_OR, layer.lora_A[adapter].weight.detach(), q_max)
        plain: Any = trained
        return plain.merge_and_unload(), changes
    for name, parameter in trained.named_parameters():
        if name in before:
            changes[name] = Change.of(name, parameter.detach().to("cpu", torch.float32) - before[name].float(), q_max)
    return trained, changes


@contextmanager
def _cut_to(
    model: nn.Module, before: Mapping[str, torch.Tensor], changes: Mapping[str, Change], q: int
) -> Iterator[None]:
    """The model with every change cut to its q leading directions; its weights are restored."""
    parameters = {name: p for name, p in model.named_parameters() if name in changes}
    after = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data.copy_(before[name].double() + changes[name].first(q).matrix())
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(after[name])


def _leak(model: nn.Module, before: Mapping[str, torch.Tensor], protected: Protected) -> float:
    """The largest share of a matrix's change, in the weights as they are held, that lies in the protected subspaces."""
    leaks = [0.0]
    for name, parameter in model.named_parameters():
        if protected.covers(name):
            change = parameter.detach().to("cpu", torch.float64) - before[name].double()
            leaks.append(protected.leak(name, change))
    return max(leaks)


def _mean_directions(protected: Protected) -> float:
    """Directions protected, a matrix, on the side that has them."""
    counts = [q.shape[1] for bases in (protected.left, protected.right) for q in bases.values()]
    return sum(counts) / len(counts)

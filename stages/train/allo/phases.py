"""The phases of one objective: warm-up -> token rewards and masks -> restore -> forget -> learn. docs/methods.md sections 7 and 8.

What a finished phase leaves is in folders that are complete or not there (`checkpoints.py`), so
that a run that was killed continues in the phase it was in, and ends with the same weights where training is deterministic:

    <checkpoints>/allo/warmup, gradient, forget    checkpoints while the phase runs
    <checkpoints>/allo/prepared                    forget.safetensors, learn.safetensors (masks), tokens.parquet, history.json
    <checkpoints>/allo/forgotten                   weights.safetensors (as trained), history.json
    <checkpoints>/checkpoint-*                     of the last phase
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from schemas.config.allo import AlloConfig
from schemas.config.training import MergeConfig, OrthAlignConfig, TrainConfig
from schemas.errors import UserError
from schemas.ids import content_id
from stages.gradients.rows import BatchRow
from stages.models.device import free_memory
from stages.train.allo.forget import ForgetTrainer
from stages.train.allo.gradient import GradientPhase
from stages.train.allo.learn import LearnTrainer
from stages.train.allo.masks import select_entries
from stages.train.allo.rewards import model_rewards
from stages.train.allo.tokens import RejectedTokens, implicit_rewards
from stages.train.batches import BatchPlan, plan_batches
from stages.train.checkpoints import is_complete, mark_complete
from stages.train.confined import ConfinedPhase
from stages.train.dataset import TrainingPairs
from stages.train.optimizers.active import ActiveEntries
from stages.train.optimizers.bucket import narrowest
from stages.train.phase import History, Phase, pairs_seen, train_phase
from stages.train.processes import from_first, world_size
from stages.train.references import recomputed
from stages.train.session import Session

T = TypeVar("T")
_KEPT = ("forget", "learn")
"""Phases whose weights stay."""


def train_in_phases(session: Session, model: PreTrainedModel, last: ConfinedPhase) -> tuple[Any, History]:
    """As `train_phase`, through the phases of `train.allo`; last: learning. Steps are counted over all phases; what is logged before
    the last is named `allo/<phase>/...`. Raises UserError as its parts do."""
    return _Phases(session, last, plans(session.train, last.plan, len(last.pairs))).run(model)


def pairs_seen_in_phases(session: Session, last: ConfinedPhase) -> set[int]:
    """As `pairs_seen`, of forgetting and learning: what the warm-up did is undone."""
    phases = _Phases(session, last, plans(session.train, last.plan, len(last.pairs)))
    return set().union(*(pairs_seen(session, phases.phase(name, last.pairs)) for name in phases.plans if name in _KEPT))


def plans(train: TrainConfig, plan: BatchPlan, n_pairs: int) -> dict[str, BatchPlan]:
    """Phase -> its steps, in order; plan: of the last."""
    allo = train.allo
    warmup_steps = allo.warmup_steps
    short = replace(plan, steps=warmup_steps, warmup_steps=int(train.warmup_ratio * warmup_steps), notes=())
    found = {}
    if allo.needs_warmup:
        found["warmup"] = short
    if allo.mask == "gradient":
        found["gradient"] = short
    if allo.forget:
        found["forget"] = plan_batches(n_pairs, train.forgetting, world_size(), "forgetting")
    if allo.learn:
        found["learn"] = plan
    return found


def _warming(train: TrainConfig) -> TrainConfig:
    """Plain AdamW on all weights, without decay: it would change every weight by its size, whatever the preference."""
    plain = {"optimizer": "adamw", "merge": MergeConfig(), "orthalign": OrthAlignConfig(), "allo": AlloConfig()}
    return train.model_copy(update=plain | {"weight_decay": 0.0})


@dataclass
class _Phases:
    session: Session
    last: ConfinedPhase
    plans: dict[str, BatchPlan]

    def run(self, model: PreTrainedModel) -> tuple[Any, History]:
        allo = self.session.train.allo
        self._prepare(model)
        masks = self.folder / "prepared"
        tokens = RejectedTokens.load(masks / "tokens.parquet") if allo.needs_rewards else None
        history = _history(masks)
        if allo.forget:
            assert tokens is not None
            history = self._forget(model, tokens, ActiveEntries.load(masks / "forget.safetensors"), history)
        if not allo.learn:
            return model, history
        pairs = self.last.pairs
        if allo.forget or allo.key_fraction < 1:
            pairs = self._referred(pairs, model, tokens)
        active = ActiveEntries.load(masks / "learn.safetensors")
        learn = replace(self.last, pairs=pairs, active=active, kind=LearnTrainer)
        trained, log = train_phase(self.session, model, learn)
        before = self._before("learn")
        return trained, history + [entry | {"step": entry["step"] + before} for entry in log]

    def phase(self, name: str, pairs: TrainingPairs, make: Callable[..., Phase] = Phase) -> Phase:
        """A phase by its name; the last is learning."""
        if name == "learn":
            return replace(self.last, pairs=pairs)
        order = list(self.plans)
        return make(
            pairs,
            self.plans[name],
            self.folder / name,
            self._identity(name),
            number=self.last.number + 1000 * (1 + order.index(name)),  # another order of the pairs
            later=self.last.later + sum(self.plans[n].steps for n in order[order.index(name) + 1 :]),
            title="/".join(filter(None, (self.last.title, f"allo/{name}"))),
        )

    @property
    def folder(self) -> Path:
        return self.last.checkpoints / "allo"

    def _before(self, name: str) -> int:
        """Steps of the phases before this one."""
        order = list(self.plans)
        return sum(self.plans[earlier].steps for earlier in order[: order.index(name)])

    def _identity(self, *parts: str) -> str:
        return content_id(self.last.identity, "allo", *parts)

    def _run(
        self, name: str, model: Any, train: TrainConfig, pairs: TrainingPairs, make: Callable[..., Phase] = Phase
    ) -> History:
        """One phase before the last; its log under its name, but for the summary of the call."""
        phase = self.phase(name, pairs, make)
        for line in (f"{self.plans[name].steps} steps", *self.plans[name].notes):
            self.session.note(f"phase {name}: {line}")
        _, log = train_phase(self.session.trained_by(train), model, phase)
        before = self._before(name)
        counted = [entry | {"step": entry["step"] + before} for entry in log]
        return [entry if "train_runtime" in entry else _named(entry, f"allo/{name}") for entry in counted]

    def _prepare(self, model: PreTrainedModel) -> None:
        """Masks and tokens on disk; the model as it was. Nothing to do when they are there."""
        folder, identity = self.folder / "prepared", self._identity("prepared")
        if self._first(lambda: is_complete(folder, identity)):
            self.session.note("masks and token rewards: made before")
            return
        self._first(lambda: _emptied(folder))
        train, pairs = self.session.train, self.last.pairs
        allo = train.allo
        references: list[torch.Tensor] = []
        rewards: list[torch.Tensor] = []
        if allo.needs_rewards:
            references = self._rejected_logps(model)
        if allo.needs_rewards and allo.token_reward != "implicit":  # before any training: the model may be refused
            rewards = self._first(lambda: model_rewards(self.session, _rejected(pairs), references))
        history: History = []
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with _restored(trained) as start:
            if "warmup" in self.plans:
                history += self._run("warmup", model, _warming(train), pairs)
            if allo.needs_rewards and allo.token_reward == "implicit":
                warmed = self._rejected_logps(model)
                rewards = [implicit_rewards(a, b, allo.beta) for a, b in zip(warmed, references, strict=True)]
            if allo.mask == "warmup":
                change = partial(_change_of, trained, start)
                self._first(lambda: self._select(folder, trained, change))
        if allo.mask == "gradient":
            sums: dict[str, torch.Tensor] = {}
            unclipped = _warming(train).model_copy(update={"max_grad_norm": 0.0})
            history += self._run("gradient", model, unclipped, pairs, partial(GradientPhase, sums=sums))
            self._first(lambda: self._select(folder, trained, sums.__getitem__))
        self._first(lambda: self._keep_prepared(folder, identity, rewards, references, history))
        free_memory()

    def _keep_prepared(
        self,
        folder: Path,
        identity: str,
        rewards: list[torch.Tensor],
        references: list[torch.Tensor],
        history: History,
    ) -> None:
        if self.session.train.allo.needs_rewards:
            self._choose(rewards, references).save(folder / "tokens.parquet")
        _finish(folder, identity, history)
        for name in ("warmup", "gradient"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _first(self, compute: Callable[[], T]) -> T:
        """What the first of the processes computes, in all of them: scores and masks are of the weights that all of them hold."""
        return from_first(compute, self.session.config)

    def _select(self, folder: Path, trained: Mapping[str, nn.Parameter], score: Callable[[str], torch.Tensor]) -> None:
        """The masks of both phases, from the same scores."""
        allo = self.session.train.allo
        for phase, share in (("forget", allo.forget_ratio), ("learn", allo.learn_ratio)):
            if phase in self.plans:
                active, line = select_entries(
                    trained, score, share, allo.unit, f"{phase}_ratio", allo.allow_empty_layers
                )
                active.save(folder / f"{phase}.safetensors")
                self.session.note(line)

    def _choose(self, rewards: list[torch.Tensor], references: list[torch.Tensor]) -> RejectedTokens:
        allo = self.session.train.allo
        tokens = RejectedTokens.chosen_by(rewards, references, allo.key_fraction)
        if allo.forget:
            count, unlearned, without = tokens.counts()
            line = f"{unlearned:,} of {count:,} rejected tokens have a reward below 0.5 and are unlearned"
            self.session.note(f"{line}; {without} of {len(rewards)} pairs have none" if without else line)
            if not unlearned:
                raise UserError(
                    "no token of a rejected answer has a reward below 0.5: there is nothing to forget",
                    where="train.allo.forget",
                    fix="Set train.allo.forget: false, or warm up longer (train.allo.warmup_steps).",
                )
        return tokens

    def _forget(self, model: Any, tokens: RejectedTokens, active: ActiveEntries, history: History) -> History:
        """Train, or load what forgetting left; the history with its log."""
        folder, identity = self.folder / "forgotten", self._identity("forgotten")
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self._first(lambda: is_complete(folder, identity)):
            self.session.note("phase forget: done before")
            with safe_open(str(folder / "weights.safetensors"), framework="pt", device="cpu") as file:
                for name, parameter in parameters.items():
                    parameter.data.copy_(file.get_tensor(name))
            return _history(folder)
        self._first(lambda: shutil.rmtree(folder, ignore_errors=True))
        pairs = self.last.pairs.with_column("token_weights", tokens.weights())
        pairs = pairs.with_column("ref_token_logps", tokens.column("ref_token_logps"))
        train = self.session.train.forgetting
        confined = partial(ConfinedPhase, protected=self.last.protected, active=active, kind=ForgetTrainer)
        history = history + self._run("forget", model, train, pairs, confined)
        if self.session.train.allo.learn:  # else it is the last, and its checkpoints are what is resumed from
            self._first(lambda: self._keep_forgotten(folder, identity, parameters, history))
        return history

    def _keep_forgotten(
        self, folder: Path, identity: str, parameters: Mapping[str, nn.Parameter], history: History
    ) -> None:
        folder.mkdir(parents=True)
        save_file({n: p.detach().contiguous() for n, p in parameters.items()}, folder / "weights.safetensors")
        _finish(folder, identity, history)
        shutil.rmtree(self.folder / "forget", ignore_errors=True)

    def _referred(self, pairs: TrainingPairs, model: Any, tokens: RejectedTokens | None) -> TrainingPairs:
        """The pairs with the references of `model`, the rejected side's over its key tokens."""
        if tokens is None or self.session.train.allo.key_fraction == 1:
            return self._first(lambda: recomputed(pairs, model, self.session.scorer()))
        keys = tokens.column("key_tokens")
        chosen = self._logps(model, [pairs.pair(i).rows[0] for i in range(len(pairs))])
        rejected = self._rejected_logps(model)
        references = [
            (float(c.double().sum()), float(r.double()[torch.tensor(k)].sum()))
            for c, r, k in zip(chosen, rejected, keys.to_pylist(), strict=True)
        ]
        return pairs.with_references(references).with_column("key_tokens", keys)

    def _rejected_logps(self, model: Any) -> list[torch.Tensor]:
        """log pi of every token of the rejected answers."""
        return self._logps(model, _rejected(self.last.pairs))

    def _logps(self, model: Any, rows: list[BatchRow]) -> list[torch.Tensor]:
        unit = "rejected answer"
        return self._first(lambda: list(self.session.scorer().stream(model, rows, len(rows), unit)))


def _rejected(pairs: TrainingPairs) -> list[BatchRow]:
    return [pairs.pair(index).rows[1] for index in range(len(pairs))]


def _named(entry: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name if name == "step" else f"{prefix}/{name}": value for name, value in entry.items()}


def _change_of(now: Mapping[str, nn.Parameter], start: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    after = now[name].detach()
    return (after.float() - start[name].to(after.device).float()).abs()


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


@contextmanager
def _restored(parameters: Mapping[str, nn.Parameter]) -> Iterator[Mapping[str, torch.Tensor]]:
    """Gives the parameters' values as they are, in main memory; they are put back at the end."""
    start = {name: narrowest(p, None).cpu() for name, p in parameters.items()}
    try:
        yield start
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(start[name])
            parameter.grad = None


def _history(folder: Path) -> History:
    found: History = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    return found


def _finish(folder: Path, identity: str, history: History) -> None:
    """The log so far into the folder; then it is complete."""
    (folder / "history.json").write_text(json.dumps(history), encoding="utf-8")
    mark_complete(folder, identity, max((entry["step"] for entry in history), default=0))

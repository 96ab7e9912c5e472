"""AdamW with an ordered chain behind it: mask -> moments -> merge -> mask, project -> trust region -> apply. docs/methods.md sections 5 to 8."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch.optim import AdamW
from torch.utils.weak import WeakIdKeyDictionary

from schemas.errors import UserError
from stages.train.optimizers.active import ActiveEntries
from stages.train.optimizers.bucket import cut
from stages.train.optimizers.chain import OWN_STATE, Ahead, Bucket, Chain, torch_adamw
from stages.train.optimizers.confine import FACTOR_BYTES, Confined
from stages.train.optimizers.form import COMPILE_FROM, Form
from stages.train.optimizers.merging import Merging
from stages.train.optimizers.part import MOMENTS, Piece
from stages.train.optimizers.settings import OFF, Merge
from stages.train.optimizers.shard import LocalRows, add_up, flattened, groups_of, local
from stages.train.optimizers.subspace import Protected
from stages.train.optimizers.task_vector import TaskVector
from stages.train.optimizers.telemetry import Telemetry

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
_FSDP1 = "_fsdp_wrapped_module"
DRAWS = 2
"""How random masks are drawn: a hash of every entry. Before, one random stream a block."""


class OnlineMergingAdamW(AdamW):
    """torch.optim.AdamW whose step is merged with a task vector (arXiv 2405.17931), kept out of protected subspaces and inside a
    spectral trust region (2509.24610) before it is applied.

        optimizer = OnlineMergingAdamW(model.named_parameters(), lr=1e-6,
                                       merge=Merge("onties", alpha=1e-7, reserve=0.01),
                                       task_vector=TaskVector.open("task_vector.safetensors"))

    params: named parameters, or groups of them ({"params": [(name, parameter), ...]}); a group may set its own value of
        every field of `Merge`, for example {"merge": "none"}.
    merge, task_vector: docs/methods.md section 5; `anchor` may go without a vector and then pulls to the weights as they are when
        training starts, else task_vector is theta_SFT - those weights.
    protected: docs/methods.md section 6: subspaces of matrices, by name, that no update enters. The UPDATE is projected, after Adam and
        after the merge: a projected gradient would leak, because Adam rescales coordinates. Biases and norms are not projected.
    active: docs/methods.md section 7: entries that may change, by name. Gradients are masked before the moments (`active.on_gradients` does it
        before clipping too), the merged update again: the other weights stay as they are to the last bit, decay or not. With a
        protected subspace the update is projected within the active entries; factor_bytes bounds what that keeps.
    trust_radius: of a group; largest spectral norm of W - start per matrix (Euclidean norm of other shapes); 0: none.
    compiled: whether steps are compiled (`form.py`); None: where there is enough to step, unless deterministic algorithms are asked of torch.
    seed: of the random masks.  telemetry_every: steps between entries of `telemetry`; 0: never.

    A group with nothing switched on takes torch's own AdamW step, bit for bit. In any other group the weights are held as
    W = start + displacement, moments and displacement in float32: a*tau is far below the resolution of the weights and would be
    lost if it were added to them. State per parameter beside AdamW's: `displacement` (float32), `start` (the narrowest dtype that
    holds it exactly, bfloat16 for most models), with every > 1 `pending` (AdamW's steps since the last merge). The optimizer owns the
    weights then: writing to a parameter from outside is undone by the next step. The state_dict holds the task vector's fingerprint,
    never the vector; loading another one's state is refused.

    Order of a step: mask, AdamW's moments, decay (W *= 1 - lr * weight_decay; as released: after the merge; in a group with masks, a
    protected subspace or a trust region: towards the start instead of 0), merge, mask and project, trust region, apply. Raises UserError, naming the
    parameter, when the task vector lacks it or has another shape, and for flattened or complex parameters.

    Sharded parameters (DTensors of torch.distributed.fsdp.fully_shard, cut by rows, also when they take the place of whole ones
    after this was made, as accelerate does) give what whole ones give, up to the order of float sums: task vector and bases are
    looked up by name and cut to the rows held here; what a transform needs of the others is summed over the processes (see
    `shard.py`, `top.py`). The state is sharded like the parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        merge: Merge = OFF,
        task_vector: TaskVector | None = None,
        protected: Protected | None = None,
        active: ActiveEntries | None = None,
        factor_bytes: int = FACTOR_BYTES,
        trust_radius: float = 0.0,
        seed: int = 0,
        telemetry_every: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        compiled: bool | None = None,
    ) -> None:
        self._defaults = merge.knobs() | {"trust_radius": trust_radius}
        entries = ActiveEntries({}) if active is None else active
        confined = Confined(protected or Protected.none(), entries, factor_bytes)
        self._chain = Chain(Merging(task_vector, seed, entries), confined, Form(bool(compiled)))
        self._compiled = compiled
        self._vector = task_vector
        self._telemetry_every = telemetry_every
        self._loaded = False
        self._shards = WeakIdKeyDictionary()
        self._shapes: dict[str, torch.Size] = {}
        self.telemetry: dict[str, float] = {}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's merge settings are checked against the task vector."""
        for name, value in self._defaults.items():
            param_group.setdefault(name, value)
        param_group.setdefault("task_vector", self._vector.fingerprint if self._vector else "")
        param_group |= self._fingerprints() | {"draws": DRAWS}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("peak_lr", float(group["lr"]))
        group.setdefault("alpha_sum", 0.0)
        self._check(group)
        self._chain.merging.forget()
        self._decided = False

    @property
    def frozen_columns(self) -> float:
        """See `Confined.numbers`: of the matrices that were stepped so far."""
        return self._chain.confined.numbers().get("frozen_columns", 0.0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. After it `telemetry` holds this step's numbers, or nothing if it was none of its turns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        telemetry = Telemetry()
        self.telemetry = {}
        self._decide()
        blank, confined = self._blank(), self._chain.confined
        for group in self.param_groups:
            merge = Merge.of(group)
            names = _names(group) if merge.active or confined or group["trust_radius"] else []
            constrained = bool(group["trust_radius"]) or (bool(confined) and any(map(confined.covers, names)))
            if merge.active or constrained:
                self._chained(group, merge, names, constrained, telemetry, blank)
            else:
                self._plain(group)
        if telemetry.sums:
            self.telemetry |= telemetry.values() | self._chain.confined.numbers()
        self._loaded = False
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's, with our tensors in their own dtypes. Raises UserError for the state of another task vector, of other
        protected subspaces or of other masks."""
        mine = self._vector.fingerprint if self._vector else ""
        if any(group.get("task_vector", "") != mine for group in state_dict["param_groups"]):
            raise UserError(
                "This optimizer state was made with another task vector",
                where="task_vector",
                fix="Resume with the base and SFT models the run started with, or start again.",
            )
        for what, fingerprint in self._fingerprints().items():
            if any(group.get(what, "") != fingerprint for group in state_dict["param_groups"]):
                words = "protected subspaces" if what == "protected" else "masks"
                raise UserError(f"This optimizer state was made with other {words}", where=what)
        for group in state_dict["param_groups"]:
            if "merge" in group and Merge.of(group).random and group.get("draws") != DRAWS:
                raise UserError(
                    "This optimizer state is of a version that drew other random masks",
                    where="merge",
                    fix="Finish the training with that version, or start it again.",
                )
        super().load_state_dict(dict(state_dict))
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(indices, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if key in OWN_STATE or key in MOMENTS:
                    self.state[param][key] = value.to(param.device)
        for group in self.param_groups:
            group["draws"] = DRAWS
        self._chain.merging.forget()
        self._loaded = True

    @property
    def compile_seconds(self) -> float:
        """What compiling the step took so far, reading torch's cache of compiled code included; 0: it is not compiled."""
        return self._chain.form.seconds

    def use_form(self, compiled: bool) -> None:
        """Compile steps from here on, or do not, as `compiled` says it when the optimizer is made."""
        self._compiled = self._chain.form.compiled = compiled

    def _decide(self) -> None:
        """Whether steps are compiled, when nobody said: whether there is enough to step."""
        if self._decided:
            return
        self._decided = True
        if self._compiled is None:
            held = (local(p.detach()).numel() for group in self.param_groups for p in group["params"])
            exact = torch.are_deterministic_algorithms_enabled()  # reference mode
            self._chain.form.compiled = sum(held) >= COMPILE_FROM and not exact

    def _blank(self) -> bool:
        """Whether this step is torch.distributed.checkpoint's, which makes an optimizer's state by a step with lr 0 and gradients
        of 0 before it loads one: it must move nothing, not even with alpha_schedule constant."""
        if self.state or any(float(group["lr"]) for group in self.param_groups):
            return False
        flags: dict[Any, list[torch.Tensor]] = {}
        for gradient in (p.grad for group in self.param_groups for p in group["params"] if p.grad is not None):
            flags.setdefault((gradient.device, groups_of(gradient)), []).append(local(gradient).any())
        seen = []
        for (_, groups), found in flags.items():
            seen.append(torch.stack(found).any().int())
            for others in groups:  # one process's part may be 0 by chance, and all must do the same
                add_up(seen[-1], others)
        return not any(map(bool, seen))

    def _shard(self, name: str, param: torch.Tensor) -> LocalRows:
        """Which rows of the parameter are here; looked up once for each parameter that takes a place in a group."""
        if param not in self._shards:
            if param.is_complex() or not param.is_floating_point():
                raise UserError(
                    f"{name} is {param.dtype}",
                    where="params",
                    fix="Merging and projecting work on real float parameters.",
                )
            shard = LocalRows.of(name, param)
            if self._shapes.setdefault(name, shard.shape) != shard.shape:
                raise flattened(name)
            self._chain.confined.check(name, param, shard)
            self._shards[param] = shard
        return self._shards[param]

    def _fingerprints(self) -> dict[str, str]:
        """What a state is only good with, as entries of a parameter group."""
        confined = self._chain.confined
        return {"protected": confined.protected.fingerprint, "active": confined.active.fingerprint}

    def _check(self, group: dict[str, Any]) -> None:
        merge = Merge.of(group)
        if group["trust_radius"] < 0:
            raise UserError(f"trust_radius is {group['trust_radius']}", where="trust_radius", fix="0 switches it off.")
        if not (merge.active or self._chain.confined or group["trust_radius"]):
            return
        if "param_names" not in group:
            raise UserError(
                "Task vectors and subspaces are looked up by parameter name, and the parameters have none",
                where="params",
                fix="Pass model.named_parameters(), or groups of (name, parameter).",
            )
        for form in ("fused", "capturable", "differentiable"):
            if group[form]:
                raise UserError(
                    f"{form} belongs to torch's own step, and this group's is merged or confined", where=form
                )
        if merge.needs_task_vector and self._vector is None:
            raise UserError(f"merge {merge.merge} needs a task vector", where="task_vector")
        for name, param in zip(_names(group), group["params"], strict=True):
            self._shard(name, param)
            if merge.active and self._vector is not None:
                self._vector.check(name, param)

    def _plain(self, group: dict[str, Any]) -> None:
        """torch's step."""
        for param in (p for p in group["params"] if p.grad is not None and p in self.state):
            state = self.state[param]
            for key in OWN_STATE:
                state.pop(key, None)
            for key in MOMENTS:  # of a merged step
                if key in state:
                    state[key] = state[key].to(param.dtype)
        lists: list[list[torch.Tensor]] = [[] for _ in range(6)]
        self._init_group(group, *lists)
        torch_adamw(lists, group)

    def _chained(
        self,
        group: dict[str, Any],
        merge: Merge,
        names: list[str],
        constrained: bool,
        telemetry: Telemetry,
        blank: bool,
    ) -> None:
        """names: of the group's parameters. constrained: it has a trust region or a parameter with a mask or protected directions."""
        a = 0.0 if blank else merge.alpha_at(float(group["lr"]), group["peak_lr"])
        active = self._chain.confined.active
        parts = []
        for name, param in zip(names, group["params"], strict=True):
            if param.grad is None:
                continue
            shard = self._shard(name, param)
            if param.grad.is_sparse:
                raise UserError(f"The gradient of {name} is sparse", where="params", fix="Set sparse=False.")
            frozen = active.frozen(name, shard, local(param.detach()).device)
            parts.append(Piece(name, shard, param, self.state[param], frozen))
        steps = [int(part.state.get("step", 0)) + 1 for part in parts]
        cuts = list(cut([part.shard for part in parts], [part.param for part in parts], steps))
        buckets = [
            Bucket(
                group,
                [parts[i] for i in picked],
                step := steps[picked[0]],
                merge,
                a,
                merge.active and step % merge.every == 0,
                constrained,
            )
            for picked in cuts
        ]
        if buckets and buckets[0].due:
            self._chain.merging.prefetch(*_ahead(buckets[0]))
        masked_first = bool(active) and steps[:1] == [1]
        for bucket, following in zip(buckets, [*buckets[1:], None], strict=True):
            watched = bool(self._telemetry_every) and (bucket.step % self._telemetry_every == 0 or masked_first)
            then = _ahead(following) if following is not None else None
            self._chain.step(bucket, self._loaded, telemetry if watched else None, then)
        if buckets and buckets[0].due:
            group["alpha_sum"] += a
        if telemetry.sums and "alpha" not in self.telemetry:
            self.telemetry |= {"alpha": a, "alpha_sum": group["alpha_sum"]}


def _ahead(bucket: Bucket) -> Ahead:
    return [p.name for p in bucket.parts], [p.shard for p in bucket.parts], bucket.parts[0].param.device


def _names(group: Mapping[str, Any]) -> list[str]:
    """The group's parameter names without what wrappers put in front. Raises UserError for flattened parameters."""
    if len(group["param_names"]) != len(group["params"]) or any(_FSDP1 in name for name in group["param_names"]):
        raise flattened(group["param_names"][0])
    plain = (name.removeprefix("module.") for name in group["param_names"])
    return [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in plain]

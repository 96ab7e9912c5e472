"""AdamW with an ordered chain behind it: moments -> merge -> project -> trust region -> apply. METHODS.md sections 5, 6, 8."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.adamw import adamw

from schemas.errors import UserError
from stages.train.optimizers.bucket import Bucket, cut, narrowest, wide
from stages.train.optimizers.merging import Merging
from stages.train.optimizers.settings import OFF, Merge
from stages.train.optimizers.task_vector import TaskVector
from stages.train.optimizers.telemetry import Telemetry

_OWN = ("start", "displacement", "pending")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class OnlineMergingAdamW(AdamW):
    """torch.optim.AdamW whose step is merged with a task vector before it is applied (arXiv 2405.17931).

        optimizer = OnlineMergingAdamW(model.named_parameters(), lr=1e-6,
                                       merge=Merge("onties", alpha=1e-7, reserve=0.01),
                                       task_vector=TaskVector.open("task_vector.safetensors"))

    params: named parameters, or groups of them ({"params": [(name, parameter), ...]}); a group may set its own value of
        every field of `Merge`, for example {"merge": "none"}.
    merge, task_vector: METHODS.md section 5; `anchor` may go without a vector and then pulls to the weights as they are when
        training starts, else task_vector is theta_SFT - those weights.
    seed: of the random masks.  telemetry_every: steps between entries of `telemetry`; 0: never.

    A group with nothing switched on takes torch's own AdamW step, bit for bit. In any other group the weights are held as
    W = start + displacement, the displacement in float32: a*tau is far below the resolution of the weights and would be
    lost if it were added to them. State per parameter beside AdamW's: `displacement` (float32), `start` (the narrowest dtype that
    holds it exactly, bfloat16 for most models), with every > 1 `pending` (AdamW's steps since the last merge). The optimizer owns the
    weights then: writing to a parameter from outside is undone by the next step. The state_dict holds the task vector's fingerprint,
    never the vector; loading another one's state is refused.

    Order of a step: decay (W *= 1 - lr * weight_decay; as released: after the merge), AdamW's moments, merge, apply. Raises UserError,
    naming the parameter, when the task vector lacks it or has another shape, and for sharded or complex parameters.
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
        seed: int = 0,
        telemetry_every: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        self._defaults = merge.knobs()
        self._vector = task_vector
        self._merging = Merging(task_vector, seed)
        self._telemetry_every = telemetry_every
        self._loaded = False
        self.telemetry: dict[str, float] = {}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's merge settings are checked against the task vector."""
        for name, value in self._defaults.items():
            param_group.setdefault(name, value)
        param_group.setdefault("task_vector", self._vector.fingerprint if self._vector else "")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("peak_lr", float(group["lr"]))
        group.setdefault("alpha_sum", 0.0)
        self._check(group)
        self._merging.forget()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. After it `telemetry` holds this step's numbers, or nothing if it was none of its turns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._merging.settle({n: Merge.of(g) for g in self.param_groups if Merge.of(g).active for n in _names(g)})
        telemetry = Telemetry()
        self.telemetry = {}
        for group in self.param_groups:
            if Merge.of(group).active:
                self._chained(group, telemetry)
            else:
                self._plain(group)
        if telemetry.sums:
            self.telemetry |= telemetry.values()
        self._loaded = False
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's, with our tensors in their own dtypes. Raises UserError for the state of another task vector."""
        mine = self._vector.fingerprint if self._vector else ""
        if any(group.get("task_vector", "") != mine for group in state_dict["param_groups"]):
            raise UserError(
                "This optimizer state was made with another task vector",
                where="task_vector",
                fix="Resume with the base and SFT models the run started with, or start again.",
            )
        super().load_state_dict(dict(state_dict))
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(indices, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if key in _OWN:
                    self.state[param][key] = value.to(param.device)
        self._merging.forget()
        self._loaded = True

    def _check(self, group: dict[str, Any]) -> None:
        merge = Merge.of(group)
        if not merge.active:
            return
        if "param_names" not in group:
            raise UserError(
                "Merging looks the task vector up by parameter name, and the parameters have none",
                where="params",
                fix="Pass model.named_parameters(), or groups of (name, parameter).",
            )
        if merge.needs_task_vector and self._vector is None:
            raise UserError(f"merge {merge.merge} needs a task vector", where="task_vector")
        for name, param in zip(_names(group), group["params"], strict=True):
            if isinstance(param, DTensor) or param.is_complex() or not param.is_floating_point():
                raise UserError(
                    f"{name} is {'sharded' if isinstance(param, DTensor) else param.dtype}",
                    where="params",
                    fix="Merging works on whole, real float parameters.",
                )
            if self._vector is not None:
                self._vector.check(name, param)

    def _plain(self, group: dict[str, Any]) -> None:
        """torch's step."""
        lists = self._gradients(group)
        for param in lists[0]:
            for key in _OWN:
                self.state[param].pop(key, None)
        _torch_adamw(lists, group, group["weight_decay"], group["eps"])

    def _gradients(self, group: dict[str, Any]) -> list[list[torch.Tensor]]:
        """Parameters with a gradient, gradients, both moments, largest second moments, steps."""
        lists: list[list[torch.Tensor]] = [[] for _ in range(6)]
        self._init_group(group, *lists)
        return lists

    def _chained(self, group: dict[str, Any], telemetry: Telemetry) -> None:
        merge = Merge.of(group)
        a = merge.alpha_at(float(group["lr"]), group["peak_lr"])
        names = [name for name, p in zip(_names(group), group["params"], strict=True) if p.grad is not None]
        lists = self._gradients(group)
        steps = [int(step) + 1 for step in lists[5]]
        cuts = list(cut(names, lists[0], steps))
        due = [steps[picked[0]] % merge.every == 0 for picked in cuts]
        ahead = [[names[i] for i in picked] for picked in cuts]
        if cuts and due[0]:
            self._merging.prefetch(ahead[0], lists[0][0].device)
        for turn, picked in enumerate(cuts):
            mine = [[entries[i] for i in picked] for entries in lists[:4]]
            mine += [[entries[i] for i in picked] if entries else [] for entries in lists[4:]]
            states = [self.state[p] for p in mine[0]]
            bucket = Bucket(group, ahead[turn], mine[0], states, steps[picked[0]])
            watched = bool(self._telemetry_every) and bucket.step % self._telemetry_every == 0
            following = (ahead[turn + 1], lists[0][cuts[turn + 1][0]].device) if turn + 1 < len(cuts) else None
            self._step_bucket(bucket, mine, merge, a, due[turn], telemetry if watched else None, following)
        if due and due[0]:
            group["alpha_sum"] += a
        if telemetry.sums and "alpha" not in self.telemetry:
            self.telemetry |= {"alpha": a, "alpha_sum": group["alpha_sum"]}

    def _step_bucket(
        self,
        bucket: Bucket,
        lists: list[list[torch.Tensor]],
        merge: Merge,
        a: float,
        due: bool,
        telemetry: Telemetry | None,
        following: tuple[list[str], torch.device] | None,
    ) -> None:
        group, released = bucket.group, merge.preset == "released"
        self._begin(bucket, merge)
        _adamw_step(bucket, lists, released)
        displacements = bucket.state("displacement")
        decay = float(group["lr"]) * group["weight_decay"]
        if decay and not released:
            torch._foreach_add_(displacements, _position(bucket), alpha=-decay)
        if due:
            if merge.every > 1:
                bucket.update.add_(bucket.gather(bucket.state("pending")))
                torch._foreach_zero_(bucket.state("pending"))
            self._merging(bucket, merge, a, telemetry)
            if following is not None:
                self._merging.prefetch(*following)
        torch._foreach_add_(displacements if due else bucket.state("pending"), bucket.views(bucket.update))
        if decay and released:
            torch._foreach_add_(displacements, _position(bucket), alpha=-decay)
        if telemetry is not None:
            telemetry.drift(bucket.gather(displacements))
        torch._foreach_copy_(bucket.params, _position(bucket))

    def _begin(self, bucket: Bucket, merge: Merge) -> None:
        """First step: remember where each parameter starts. First step after a load: check that it is where it should be."""
        for name, param, state in zip(bucket.names, bucket.params, bucket.states, strict=True):
            if "displacement" not in state:
                state["start"] = narrowest(param)
                state["displacement"] = torch.zeros_like(param, dtype=wide(param.dtype))
            if merge.every > 1 and "pending" not in state:
                state["pending"] = torch.zeros_like(state["displacement"])
            if self._loaded:
                expected = state["displacement"] + state["start"]
                expected = expected + state["pending"] if "pending" in state else expected
                if not torch.equal(expected.to(param.dtype), param):
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
    _torch_adamw([steps, *lists[1:]], group, 0.0, eps)
    if not direct:
        bucket.update = bucket.gather(steps)


def _position(bucket: Bucket) -> tuple[torch.Tensor, ...]:
    """start + displacement + what is pending, in the displacement's dtype."""
    where = torch._foreach_add(bucket.state("displacement"), bucket.state("start"))
    if "pending" in bucket.states[0]:
        torch._foreach_add_(where, bucket.state("pending"))
    return tuple(where)


def _torch_adamw(lists: list[Any], group: Mapping[str, Any], weight_decay: float, eps: float) -> None:
    """torch's functional AdamW on parameters, gradients, moments, largest second moments and steps."""
    beta1, beta2 = group["betas"]
    names = ("foreach", "capturable", "differentiable", "fused", "amsgrad", "lr", "maximize")
    same = {name: group[name] for name in names}
    adamw(*lists, **same, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps)


def _names(group: Mapping[str, Any]) -> list[str]:
    """The group's parameter names without what wrappers put in front."""
    plain = (name.removeprefix("module.") for name in group["param_names"])
    return [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in plain]

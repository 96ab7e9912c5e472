"""What this process holds of one parameter at one step: flat tensors, passed in runs of entries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from schemas.errors import UserError
from stages.train.optimizers.bucket import narrowest, wide
from stages.train.optimizers.masks import SPAN
from stages.train.optimizers.shard import LocalRows, local
from stages.train.optimizers.step import Entries

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Piece:
    """A parameter, its gradient and its state, as `Entries` of any run of entries.

    frozen: bool, of the parameter's shape or broadcast to it; its rows held here.  task: the rows held here of its task vector.  update: for one that
    is to be projected; both flat.
    """

    def __init__(
        self, name: str, shard: LocalRows, param: torch.Tensor, state: dict[str, Any], frozen: torch.Tensor | None
    ) -> None:
        self.name, self.shard, self.state = name, shard, state
        self.param = local(param.detach())
        gradient = param.grad
        assert gradient is not None
        self.frozen = frozen
        self.first = shard.entries[0]
        self.size = self.param.numel()
        self.weights = self.param.reshape(-1)  # a copy where the parameter is not contiguous: `written` brings it back
        self.gradient = local(gradient).reshape(-1)
        self.task: torch.Tensor | None = None
        self.update: torch.Tensor | None = None

    def written(self) -> None:
        """Bring weights that were worked on in a copy back."""
        if not self.param.is_contiguous():
            self.param.copy_(self.weights.view(self.param.shape))

    def flat(self, key: str) -> torch.Tensor | None:
        """An entry of the state, flat; None if there is none."""
        value = self.state.get(key)
        return None if value is None else local(value).view(-1)

    def runs(self, size: int) -> Iterator[tuple[int, int]]:
        """All entries held here, `size` at a time; none of the runs has indices on both sides of a multiple of 2^32."""
        for begin in range(0, self.size, size):
            end = min(begin + size, self.size)
            edge = ((self.first + begin) // SPAN + 1) * SPAN - self.first
            if edge < end:
                yield begin, edge
                begin = edge
            yield begin, end

    def entries(self, begin: int, end: int) -> Entries:
        """Entries `begin` to `end` of those held here; writes go through."""
        return self._each(lambda flat: flat[begin:end])._replace(frozen=self._frozen(begin, end))

    def at(self, places: torch.Tensor) -> Entries:
        """Copies of the entries at some places, without the mask."""
        return self._each(lambda flat: flat[places])

    def _each(self, cut: Any) -> Entries:
        def of(key: str) -> torch.Tensor | None:
            flat = self.flat(key)
            return None if flat is None else cut(flat)

        m, v, way, start = of("exp_avg"), of("exp_avg_sq"), of("displacement"), of("start")
        assert m is not None and v is not None and way is not None and start is not None
        task = None if self.task is None else cut(self.task)
        return Entries(
            cut(self.weights),
            cut(self.gradient),
            m,
            v,
            way,
            start,
            max_exp_avg_sq=of("max_exp_avg_sq"),
            pending=of("pending"),
            task=task,
            update=None if self.update is None else cut(self.update),
        )

    def _frozen(self, begin: int, end: int) -> torch.Tensor | None:
        mask = self.frozen
        if mask is None:
            return None
        if mask.numel() == self.size:
            return mask.reshape(-1)[begin:end]
        if mask.ndim > 1 and mask.shape[0] > 1 and (mask[0].numel() == 1 or self._is_of_rows(mask)):
            columns = self.size // mask.numel()
            rows = mask.reshape(-1)[begin // columns : -(-end // columns)]
            first = begin // columns * columns
            return rows[:, None].expand(-1, columns).reshape(-1)[begin - first : end - first]
        return mask.expand(self.param.shape).reshape(-1)[begin:end]

    def _is_of_rows(self, mask: torch.Tensor) -> bool:
        """Whether a mask takes or leaves whole rows of the matrices of a stack: [E, O, 1] of [E, O, I], or the experts held here of it."""
        return mask.shape[-1] == 1 and mask.shape[1:-1] == self.param.shape[1:-1]


def prepare(part: Piece, every: int, amsgrad: bool) -> None:
    """Make of the parameter's state what a step needs: at the first step all of it; of another optimizer's, what is missing.

    Moments are float32 (float64) whatever the weights are: in bfloat16 a second moment that decays by 0.1% a step never moves.
    """
    param, state, shard = part.param, part.state, part.shard
    dtype = wide(param.dtype)
    state.setdefault("step", torch.tensor(0.0, dtype=torch.float32))
    for key in MOMENTS[: 3 if amsgrad else 2]:
        value = state.get(key)
        if value is None:
            state[key] = shard.wrap(torch.zeros(param.shape, dtype=dtype, device=param.device))
        elif value.dtype != dtype or not local(value).is_contiguous():
            state[key] = shard.wrap(local(value).to(dtype).contiguous())
    if "displacement" not in state:
        state["start"] = shard.wrap(narrowest(param, shard.peers))
        state["displacement"] = shard.wrap(torch.zeros(param.shape, dtype=dtype, device=param.device))
    for key in ("start", "displacement", "pending"):
        if key in state and not local(state[key]).is_contiguous():
            state[key] = shard.wrap(local(state[key]).contiguous())
    if every > 1 and "pending" not in state:
        state["pending"] = torch.zeros_like(state["displacement"])
    if not amsgrad:
        state.pop("max_exp_avg_sq", None)


def way_of(part: Piece) -> torch.Tensor:
    """The way from the start, displacement + what is pending, in the parameter's shape."""
    way, pending = local(part.state["displacement"]), part.state.get("pending")
    return way if pending is None else way + local(pending)


def check_place(part: Piece) -> None:
    """Raise UserError unless the weights are where the state says."""
    way = way_of(part)
    if not torch.equal((way + local(part.state["start"])).to(part.param.dtype), part.param):
        raise UserError(
            f"{part.name} is not where the optimizer's state left it",
            where="load_state_dict",
            fix="Load the weights and the optimizer's state of the same checkpoint.",
        )

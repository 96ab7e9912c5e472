"""Routed experts: linear layers whose weights are stacked, one for each expert, and whose tokens choose among them.

A stack of E matrices W_e (O x I) is one layer of E * O outputs, of which a token fills the O of its expert, so that its
gradient is sum_s e_s (x) delta_s x_s^T over the token-expert pairs s, and all there is for linear layers holds for it. What
hooks cannot see is which row a packed token came from: here the tokens are packed by ourselves, by an implementation
that transformers' interface for experts (`use_experts_implementation`) calls by name.

Suffixes: N tokens (B rows of T), K experts a token, S = N * K, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from stages.gradients.projections import apply_side
from stages.models.text_model import backbone

_NAME = "by_row"
_INTERFACE = ("has_gate", "has_bias", "is_transposed", "num_experts", "down_proj", "_apply_gate")

Place = Literal["up", "down"]


@dataclass(frozen=True)
class Stack:
    """One stacked weight. name: of the parameter, qualified; place: before or after the activation."""

    name: str
    module: Any
    place: Place

    @property
    def weight(self) -> Tensor:
        """[E, O, I], or [E, I, O] where the module stores it so."""
        weight: Tensor = getattr(self.module, self.name.rpartition(".")[2])
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """(E * O, I)."""
        count, rows, columns = self.weight.shape
        return (count * columns, rows) if self.module.is_transposed else (count * rows, columns)


def keeps_rows(module: nn.Module) -> bool:
    """Whether the module computes through transformers' interface for experts, which lets us pack its tokens."""
    return all(hasattr(module, name) for name in _INTERFACE)


def stacks(name: str, module: nn.Module) -> Iterator[Stack]:
    """The stacked weights of experts that keep rows."""
    up = "gate_up_proj" if getattr(module, "has_gate", False) else "up_proj"
    yield Stack(f"{name}.{up}", module, "up")
    yield Stack(f"{name}.down_proj", module, "down")


@dataclass(frozen=True)
class Packed:
    """Tokens sorted by expert. order_S: the token-expert pair of a place; back_S: the place of a pair; ends: of the experts."""

    order_S: Tensor
    back_S: Tensor
    ends: list[int]

    @classmethod
    def of(cls, index_NK: Tensor, experts: int) -> Packed:
        expert_S = index_NK.reshape(-1)
        order_S = torch.argsort(expert_S, stable=True)
        back_S = torch.empty_like(order_S)
        back_S[order_S] = torch.arange(order_S.shape[0], device=order_S.device)
        ends = torch.bincount(expert_S, minlength=experts)[:experts].cumsum(0).tolist()
        return cls(order_S, back_S, ends)

    @property
    def slices(self) -> Iterator[tuple[int, slice]]:
        """(expert, its places) of the experts that have tokens."""
        start = 0
        for expert, end in enumerate(self.ends):
            if end > start:
                yield expert, slice(start, end)
            start = end

    def linear(self, x_SI: Tensor, weight: Tensor, bias_EO: Tensor | None, transposed: bool) -> Tensor:
        """[S, O]: every token through its expert."""
        parts = []
        for expert, places in self.slices:
            weight_OI = weight[expert].T if transposed else weight[expert]
            parts.append(nn.functional.linear(x_SI[places], weight_OI, None if bias_EO is None else bias_EO[expert]))
        nowhere = x_SI.shape[0] - self.ends[-1]  # pairs that name no expert, at the end
        if nowhere:
            parts.append(x_SI.new_zeros(nowhere, weight.shape[2 if transposed else 1]))
        return torch.cat(parts)

    def sketch(self, delta_SO: Tensor, x_SP: Tensor, out: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor:
        """[B, P_out or E * O, P_in]: sum over a row's token-expert pairs of (P_o (e_s (x) delta_s)) (P_i x_s)^T.

        x_SP: inputs, projected; out: see `projections.side_maps`, for E * O outputs.
        """
        width = delta_SO.shape[1]

        def by_row(value_SC: Tensor) -> Tensor:
            return value_SC.to(dtype)[self.back_S].view(rows, -1, value_SC.shape[1])

        if out is not None and out.dim() == 2:
            d_SP = delta_SO.new_zeros(delta_SO.shape[0], out.shape[0])
            for expert, places in self.slices:
                d_SP[places] = delta_SO[places] @ out[:, expert * width : (expert + 1) * width].T
            return torch.bmm(by_row(d_SP).transpose(1, 2), by_row(x_SP))
        x_BTP = by_row(x_SP)
        s_BEOP = x_BTP.new_zeros(rows, len(self.ends), width, x_BTP.shape[2])
        for expert, places in self.slices:
            mine_SO = torch.zeros_like(delta_SO)
            factor = None if out is None else out[expert * width : (expert + 1) * width]
            mine_SO[places] = apply_side(delta_SO[places], factor)
            s_BEOP[:, expert] = torch.bmm(by_row(mine_SO).transpose(1, 2), x_BTP)
        return s_BEOP.flatten(1, 2)


Listener = Callable[[Packed, Tensor, Tensor], Tensor]
"""(packed tokens, input [S, I], output [S, O]) -> the output to go on with."""

_LISTENERS: ContextVar[dict[tuple[int, Place], Listener]] = ContextVar("listeners")
"""Of the forward pass under way: transformers calls the implementation by name, without our arguments."""


def _forward(module: Any, hidden_NH: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """What every experts module computes, with listeners on both of its linear layers."""
    listeners = _LISTENERS.get()
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    packed, each = Packed.of(index_NK, module.num_experts), index_NK.shape[1]

    def linear(x_SI: Tensor, name: str, place: Place) -> Tensor:
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        out_SO = packed.linear(x_SI, getattr(module, name), bias, module.is_transposed)
        listener = listeners.get((id(module), place))
        return out_SO if listener is None else listener(packed, x_SI, out_SO)

    up_SO = linear(hidden_NH[packed.order_S // each], up_name, "up")
    inner_SI = module._apply_gate(up_SO) if module.has_gate else module.act_fn(up_SO)
    out_SH = linear(inner_SI, "down_proj", "down") * weights_NK.reshape(-1)[packed.order_S, None]
    out_NH: Tensor = out_SH[packed.back_S].view(*index_NK.shape, -1).sum(dim=1).to(hidden_NH.dtype)
    return out_NH


ALL_EXPERTS_FUNCTIONS.register(_NAME, _forward)


@contextmanager
def heard(model: PreTrainedModel, listeners: dict[tuple[int, Place], Listener]) -> Iterator[None]:
    """Experts compute as here and are listened to while the context lasts; without listeners nothing changes."""
    if not listeners:
        yield
        return
    with experts_as(backbone(model), _NAME):
        token = _LISTENERS.set(listeners)
        try:
            yield
        finally:
            _LISTENERS.reset(token)


@contextmanager
def experts_as(model: Any, name: str) -> Iterator[None]:
    """The model's experts computed by the implementation of this name while the context lasts."""
    before = model.get_experts_implementation()
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)

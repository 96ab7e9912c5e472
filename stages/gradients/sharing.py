"""Prefix sharing: a pair as one row [prompt | chosen | rejected], so that its prompt is computed once.

Layers that work token by token take the joined rows. Attention takes them apart: queries, keys and values are copied into a
row for each side, [prompt | chosen] and [prompt | rejected], the model's own attention runs on those under the masks the
model makes for them, and the results are joined again, the prompt's from the chosen row (both are equal). Positions of
the rejected side restart after the prompt. Every token then sees what it sees in a row of its own, so log-probabilities and
gradients are the same up to the order of float sums. Attention costs what it costs without sharing; everything else is
saved for one of the two prompts.

The usual way, one mask over the joined row, makes attention compute chosen x rejected products only to hide them, gives up the
causal flash kernel (or needs FlexAttention), and has to know every kind of window. The copies here are a few rows of
the hidden width a token and layer.

State-space and convolutional layers, and position biases made from padding masks (ALiBi), read the sequence itself: `Sketcher`
measures sharing against two rows on the loaded model and goes without where they differ. **On CUDA this was never run**, for
want of a GPU; it uses no operation that is not used on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from stages.models.text_model import backbone

_NAME = "shared_prefix"


def moved_to(value: Tensor, device: torch.device | str) -> Tensor:
    """On the device; to CUDA from pinned memory, so that nobody waits for what the GPU is doing."""
    if torch.device(device).type != "cuda":
        return value.to(device)
    return value.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Sharing:
    """Where the K = B * T tokens of joined rows lie among the N = 2B * L places of rows [prompt | side], and back.

    Rows [prompt | side] are every pair's chosen one, then every pair's rejected one. position_BT: position in such a row.
    first_K: a token's place (a prompt's in the chosen row). second_K: a prompt token's place in the rejected row. own_N:
    the token of a place. Masks: prompt_K, token_K (no padding), joined_N (places that `first_K` names). Indices of padding
    are 0: it reads something finite and is read by nothing.
    """

    position_BT: Tensor
    first_K: Tensor
    second_K: Tensor
    prompt_K: Tensor
    token_K: Tensor
    own_N: Tensor
    joined_N: Tensor
    shape: tuple[int, int]

    @classmethod
    def build(cls, lengths: Sequence[tuple[int, int, int]], device: torch.device | str) -> Sharing:
        """From (prompt, chosen, rejected) token counts of every pair."""
        rows, tokens = len(lengths), max(map(sum, lengths))
        longest = max(p + max(c, r) for p, c, r in lengths)
        position_BT, first_BT, second_BT = (torch.zeros(rows, tokens, dtype=torch.int64) for _ in range(3))
        prompt_BT, token_BT = (torch.zeros(rows, tokens, dtype=torch.bool) for _ in range(2))
        own_RL = torch.zeros(2 * rows, longest, dtype=torch.int64)
        joined_RL = torch.zeros(2 * rows, longest, dtype=torch.bool)
        for b, (p, c, r) in enumerate(lengths):
            index = torch.arange(p + c + r) + b * tokens
            chosen, rejected = torch.arange(p + c), torch.arange(p, p + r)
            position_BT[b, : p + c + r] = torch.cat([chosen, rejected])
            first_BT[b, : p + c + r] = torch.cat([chosen + b * longest, rejected + (rows + b) * longest])
            second_BT[b, :p] = chosen[:p] + (rows + b) * longest
            prompt_BT[b, :p] = token_BT[b, : p + c + r] = True
            own_RL[b, : p + c] = index[: p + c]
            own_RL[rows + b, : p + r] = torch.cat([index[:p], index[p + c :]])
            joined_RL[b, : p + c] = joined_RL[rows + b, p : p + r] = True
        flat = [moved_to(x.flatten(), device) for x in (first_BT, second_BT, prompt_BT, token_BT, own_RL, joined_RL)]
        first_K, second_K, prompt_K, token_K, own_N, joined_N = flat
        shape = (2 * rows, longest)
        return cls(moved_to(position_BT, device), first_K, second_K, prompt_K, token_K, own_N, joined_N, shape)

    def apart(self, value_BHTD: Tensor) -> Tensor:
        """[B, heads, T, D] of joined rows as [2B, heads, L, D]; a prompt's gradient is the sum over both its rows."""
        heads, width = value_BHTD.shape[1], value_BHTD.shape[3]
        value_KC = value_BHTD.transpose(1, 2).reshape(-1, heads * width)
        return _Apart.apply(value_KC, self).view(*self.shape, heads, width).transpose(1, 2)

    def join(self, value_RLHD: Tensor) -> Tensor:
        """[2B, L, heads, D] as [B, T, heads, D]."""
        value_KC = _Join.apply(value_RLHD.reshape(-1, value_RLHD.shape[2] * value_RLHD.shape[3]), self)
        return value_KC.view(*self.position_BT.shape, *value_RLHD.shape[2:])


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value_KC: Tensor, sharing: Sharing) -> Tensor:
        ctx.sharing = sharing
        return value_KC.index_select(0, sharing.own_N)

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor, None]:
        sharing: Sharing = ctx.sharing
        first_KC = grad_NC.index_select(0, sharing.first_K).masked_fill_(~sharing.token_K[:, None], 0)
        second_KC = grad_NC.index_select(0, sharing.second_K).masked_fill_(~sharing.prompt_K[:, None], 0)
        return first_KC.add_(second_KC), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value_NC: Tensor, sharing: Sharing) -> Tensor:
        ctx.sharing = sharing
        return value_NC.index_select(0, sharing.first_K)

    @staticmethod
    def backward(ctx: Any, grad_KC: Tensor) -> tuple[Tensor, None]:
        sharing: Sharing = ctx.sharing
        return grad_KC.index_select(0, sharing.own_N).masked_fill_(~sharing.joined_N[:, None], 0), None


@dataclass(frozen=True, slots=True)
class _Kind:
    """An attention of the model's own, and the masks it reads."""

    attend: Callable[..., tuple[Tensor, Any]]
    mask: Callable[..., Tensor | None]


def _own_eager(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """The attention that the model's own file spells out: some have terms that no kernel has (sinks, soft caps)."""
    found: tuple[Tensor, Any] = sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)
    return found


_KINDS = {"sdpa": _Kind(sdpa_attention_forward, sdpa_mask), "eager": _Kind(_own_eager, eager_mask)}

_SHARING: ContextVar[tuple[Sharing, _Kind]] = ContextVar("sharing")
"""Of the forward pass under way: transformers calls attention and mask functions by name, without our arguments."""


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The model's attention on rows [prompt | side]; transformers' attention interface."""
    sharing, kind = _SHARING.get()
    query, key, value = (sharing.apart(part) for part in (query, key, value))
    out_RLHD, _ = kind.attend(module, query, key, value, attention_mask, **kwargs)
    return sharing.join(out_RLHD), None


def _mask(batch_size: int, q_length: int, kv_length: int, attention_mask: Any = None, **kwargs: Any) -> Tensor | None:
    """The mask that the model makes for rows [prompt | side], windows and all; transformers' mask interface."""
    sharing, kind = _SHARING.get()
    rows, longest = sharing.shape
    return kind.mask(batch_size=rows, q_length=longest, kv_length=longest, attention_mask=None, **kwargs)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


@contextmanager
def shared_prefixes(model: PreTrainedModel, sharing: Sharing) -> Iterator[dict[str, Any]]:
    """The model attends to rows [prompt | side] while the context lasts; gives the arguments its backbone then needs.

    The mask of ones keeps transformers from taking restarting positions for packed sequences. Raises ValueError for
    attention other than SDPA and the model's own.
    """
    base: Any = backbone(model)
    before = base.config._attn_implementation
    if before not in _KINDS:
        raise ValueError(f"its attention is {before}, not {' or '.join(_KINDS)}")
    token = _SHARING.set((sharing, _KINDS[before]))
    base.set_attn_implementation(_NAME)
    try:
        yield {"position_ids": sharing.position_BT, "attention_mask": torch.ones_like(sharing.position_BT)}
    finally:
        base.set_attn_implementation(before)
        _SHARING.reset(token)

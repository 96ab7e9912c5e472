"""Completion log-probabilities s(y) = sum_t log pi(y_t | x, y_<t) without logits for whole
sequences.

Logits exist only at completion positions and only for one chunk of them at a time, so [B, T, V] is
never allocated. The gradient of a token's log-probability with respect to its hidden state, W^T
(onehot - softmax), is formed in the same chunk of the forward pass; the backward pass only scales
it. The head's own weights get no gradient here: the head is not sketched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from schemas.errors import first_line
from stages.gradients.batching import Memo, TokenBudget
from stages.gradients.rows import BatchRow, RowBatch
from stages.gradients.sharing import shared_prefixes
from stages.models.device import is_out_of_memory
from stages.models.text_model import backbone

CHUNK_ELEMENTS = 32 * 1024 * 1024
"""Logits held at a time (float32: 128 MiB, half as much again for a bfloat16 copy)."""

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}
_TOLERANCE_HALF = 2e-2
"""Relative difference of log-probabilities that rounding explains."""
_KNOWN = "logit_scale, logits_scaling, lm_head_multiplier, final_logit_softcapping, logits_soft_cap"


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = cap(scale * (W h + bias)), cap(z) = softcap * tanh(z /
    softcap) when set.

    weight [V, H], bias [V] or None. `scale` covers Cohere's logit_scale, Granite's logits_scaling
    (its inverse) and Falcon-H1's lm_head_multiplier; `softcap` covers Gemma's
    final_logit_softcapping and RecurrentGemma's logits_soft_cap.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """Read the head of a transformers causal language model. Raises ValueError when it is not
        one linear layer."""
        layer = model.get_output_embeddings()
        if layer is None or getattr(layer, "weight", None) is None or layer.weight.dim() != 2:
            raise ValueError(f"{type(model).__name__} has no linear language-model head")
        if getattr(layer.weight, "quant_state", None) is not None or not layer.weight.is_floating_point():
            raise ValueError("the language-model head is quantised: load it in bfloat16 or float32")
        config: Any = model.config.get_text_config()
        scale = 1.0
        for name, power in (("logit_scale", 1), ("logits_scaling", -1), ("lm_head_multiplier", 1)):
            value = getattr(config, name, None)
            if value is not None:
                scale *= float(value) ** power
        softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        return cls(layer.weight, getattr(layer, "bias", None), scale, None if softcap is None else float(softcap))

    def logits(self, hidden_MH: Tensor) -> Tensor:
        """[M, V] in float32 (float64 for a float64 model); the product itself in the model's dtype,
        as models do it."""
        logits_MV = nn.functional.linear(hidden_MH.to(self.weight.dtype), self.weight, self.bias)
        logits_MV = logits_MV.to(accumulation_dtype(logits_MV.dtype))
        if self.scale != 1.0:
            logits_MV *= self.scale
        if self.softcap is None:
            return logits_MV
        return logits_MV.div_(self.softcap).tanh_().mul_(self.softcap)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 models (tests)."""
    return torch.promote_types(dtype, torch.float32)


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(head(h_m))[target_m] with d/dh formed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_MH: Tensor, target_M: Tensor, head: Head, chunk: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        grad_MH = torch.empty_like(hidden_MH) if wanted else None
        values: list[Tensor] = []
        for start in range(0, hidden_MH.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits_MV = head.logits(hidden_MH[rows])
            index_M1 = target_M[rows, None]
            target_M1 = logits_MV.gather(1, index_M1)
            slope_MV = None  # d cap(z)/dz = 1 - tanh^2
            if grad_MH is not None and head.softcap is not None:
                slope_MV = (logits_MV / head.softcap).square_().neg_().add_(1.0)
            peak_M1 = logits_MV.amax(dim=1, keepdim=True)
            delta_MV = logits_MV.sub_(peak_M1).exp_()  # in place: one such tensor at a time, not three
            sum_M1 = delta_MV.sum(dim=1, keepdim=True)
            values.append((target_M1 - peak_M1 - sum_M1.log())[:, 0])
            if grad_MH is not None:
                delta_MV.div_(sum_M1.neg_())
                delta_MV.scatter_add_(1, index_M1, torch.ones_like(sum_M1))
                if slope_MV is not None:
                    delta_MV.mul_(slope_MV)
                if head.scale != 1.0:
                    delta_MV.mul_(head.scale)
                grad_MH[rows] = (delta_MV.to(head.weight.dtype) @ head.weight).to(grad_MH.dtype)
        ctx.save_for_backward(grad_MH)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad_MH,) = ctx.saved_tensors
        return (grad_MH * grad_M[:, None]).to(grad_MH.dtype), None, None, None


def token_logprobs(hidden_MH: Tensor, target_M: Tensor, head: Head, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """Log-probability [M] (float32) of each target under the head; once differentiable in
    `hidden_MH`.

    At most `chunk_elements` logits exist at a time (but at least one position's).
    """
    chunk = max(1, chunk_elements // head.weight.shape[0])
    return _TokenLogProbs.apply(hidden_MH, target_M, head, chunk)


def hidden_states(model: PreTrainedModel, batch: RowBatch) -> Tensor:
    """Final hidden states [B, T, H] (after the last norm), without cache and without a mask."""
    if batch.sharing is None:
        return backbone(model)(input_ids=batch.ids_BT, use_cache=False, return_dict=True).last_hidden_state
    with shared_prefixes(model, batch.sharing) as arguments:
        return backbone(model)(input_ids=batch.ids_BT, use_cache=False, return_dict=True, **arguments).last_hidden_state


def completion_logprobs(
    model: PreTrainedModel, batch: RowBatch, head: Head, chunk_elements: int = CHUNK_ELEMENTS
) -> Tensor:
    """Token log-probabilities [completions, C], zeros after their ends; differentiable in activations."""
    hidden_MH = hidden_states(model, batch)[batch.row_M, batch.at_M]
    return batch.spread(token_logprobs(hidden_MH, batch.target_M, head, chunk_elements))


@torch.no_grad()
def logprobs_of_rows(
    model: PreTrainedModel,
    rows: Sequence[BatchRow],
    budget: TokenBudget,
    chunk_elements: int = CHUNK_ELEMENTS,
    misfits: list[int] | None = None,
    done: Callable[[list[int]], None] = lambda rows: None,
    memo: Memo[Tensor] | None = None,
) -> list[Tensor]:
    """Per-token log-probabilities of each row's completion, in row order, on the CPU in float32; no
    gradient. `misfits` and `memo` as in `TokenBudget.run`. done: told which rows each forward was of.

    The sequence value s(y) is the tensor's `.double().sum()`, the mean-token value its mean. The
    model is used in evaluation mode and its mode restored; batches follow `budget` and back off
    when memory runs out.
    """
    head = Head.of(model)
    device = head.weight.device
    training = model.training
    model.eval()

    def compute(indices: list[int]) -> list[Tensor]:
        batch = RowBatch.build([rows[i] for i in indices], device)
        values_BC = completion_logprobs(model, batch, head, chunk_elements).to("cpu")
        done(indices)
        return [values_BC[b, : len(rows[i].completion)].clone() for b, i in enumerate(indices)]

    try:
        return budget.run([len(row) for row in rows], compute, misfits=misfits, memo=memo)
    finally:
        model.train(training)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare our log-probabilities with the model's own logits on one short row, and test that
    padding is inert.

    Raises ValueError when the model cannot be run on text alone, or when they differ by more than rounding of its dtype,
    relative to the spread of log-probabilities: the model does something to its logits that `Head` does not know, or its
    attention is not causal. Costs four tiny forwards.
    """
    head = Head.of(model)
    tolerance = _TOLERANCE.get(head.weight.dtype, _TOLERANCE_HALF)
    vocabulary = head.weight.shape[0]
    ids = tuple(1 + (7919 * k) % max(1, min(vocabulary, 1000) - 2) for k in range(8))
    training = model.training
    model.eval()
    try:
        batch = RowBatch.build([BatchRow(ids[:2], ids[2:])], head.weight.device)
        logits_TV = model(input_ids=batch.ids_BT, use_cache=False, return_dict=True).logits[0]
        full_TV = logits_TV.to(accumulation_dtype(logits_TV.dtype)).log_softmax(-1)
        theirs_M = full_TV[batch.at_M, batch.target_M]
        ours_M = completion_logprobs(model, batch, head)[0]
        # the same shape twice, with other tokens after the row's end: in bfloat16 the shape alone changes the last digits
        plain = RowBatch.build([BatchRow(ids[:2], ids[2:]), BatchRow(ids, ids)], head.weight.device)
        filled = replace(plain, ids_BT=plain.ids_BT.clone())
        filled.ids_BT[0, len(ids) :] = ids[2]
        plain_M, filled_M = (completion_logprobs(model, b, head)[0, : len(ids) - 2] for b in (plain, filled))
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"{type(model).__name__} cannot be run on text alone: {first_line(error)}") from error
    finally:
        model.train(training)
    scale = float(theirs_M.abs().mean().clamp_min(1e-6))
    off = float((ours_M - theirs_M).abs().max())
    if not off <= tolerance * scale:  # NaN included
        raise ValueError(
            f"{type(model).__name__} transforms its logits in a way this version does not know (known: {_KNOWN}); "
            f"log-probabilities are off by {off / scale:.2g} of their size"
        )
    if not float((filled_M - plain_M).abs().max()) <= tolerance * scale:
        raise ValueError(f"{type(model).__name__} is not causal: tokens after a row's end change its log-probabilities")

"""Sketches of per-pair preference gradients, made by hooks while one backward pass runs.

For a linear layer y_t = W x_t with output gradient delta_t the gradient of a row is G = sum_t
delta_t x_t^T, so its sketch S = P_o G P_i^T = sum_t (P_o delta_t) (P_i x_t)^T needs only projected
inputs [T, P] and projected output gradients [T, P]. No weight gradient (O x I) is ever formed: the
weights are frozen and the graph hangs on the embeddings' output.

The pair's vector is d = grad s(y_w) - grad s(y_l), of which the DPO gradient is a multiple (arXiv
2305.18290, equation 7: -grad loss = beta * c * d). The sign of s is folded into the one scalar that
is differentiated, and rows never mix, so one backward gives the sketches of N pairs: over N rows that
hold prompt, chosen and rejected (prefix sharing, `stages.gradients.sharing`) or over 2N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from schemas.errors import first_line
from stages.gradients.batching import Memo, TokenBudget
from stages.gradients.experts import Listener, Packed, Place, Stack, heard
from stages.gradients.layers import Of, linear_layers, refuse_adapters, stacked_layers, weight_shape
from stages.gradients.logprobs import CHUNK_ELEMENTS, Head, accumulation_dtype, completion_logprobs
from stages.gradients.pair_sketches import PairSketches, Sketched
from stages.gradients.probe import Leaves, by_row, frozen, given
from stages.gradients.projections import LayerSlot, Scales, SketchLayout, apply_side, side_maps
from stages.gradients.rows import Pair, RowBatch

_SUMS_BYTES = 2**30
"""Sums of a batch's rows, float32."""
PROBE = Pair(prompt=(11, 5, 23, 8, 17, 6), chosen=(9, 31, 7, 12, 19, 14, 10), rejected=(21, 13, 27, 18, 15))
"""A short pair to measure prefix sharing with; ids are taken modulo the vocabulary."""
_LOGP_TOLERANCE = 2e-2
"""Relative; as in `check_head`: what bfloat16 may change, and no wrong mask leaves."""
_LEAST_COSINE = {torch.float64: 0.99999, torch.float32: 0.9999}
_LEAST_COSINE_HALF = 0.95


class Unsketchable(ValueError):
    """A batch showed what no look at the model could: a layer that gets no gradient, or whose rows are mixed."""


class Sketcher:
    """Context manager around a model: inside it the weights are frozen, the model is in eval mode
    and hooks listen.

        with Sketcher(model, layout, seed) as sketcher:
            sketches = sketcher.run(pairs, TokenBudget(8192))

    Leaving it removes the hooks and restores mode and requires_grad flags. Gradient checkpointing
    is inert in eval mode, so every layer runs once. Raises ValueError on entering for layers that
    are missing or changed shape, for what `select_layers` refuses, and for float16 weights, whose
    gradients underflow unnoticed; Unsketchable while sketching.

    prefix_sharing: compute each prompt once where the loaded model gives the same result that way
    (measured on entering). Afterwards `sharing` says whether it is done and
    `sharing_note` why not. Sketches of both sides need a row for each side: never shared.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: SketchLayout,
        seed: int,
        both_sides: bool = False,
        chunk_elements: int = CHUNK_ELEMENTS,
        scales: Scales | None = None,
        prefix_sharing: bool = False,
        of: Of = "weights",
    ) -> None:
        """scales: factors on delta_t and x_t before projection (see preconditioner.py)."""
        self.model, self.layout, self.seed, self.scales = model, layout, seed, scales
        self.prefix_sharing, self.sharing, self.sharing_note = prefix_sharing, False, ""
        self.both_sides, self.chunk_elements, self.of = both_sides, chunk_elements, of
        self._projections: dict[tuple[str, torch.device, torch.dtype], tuple[Tensor | None, Tensor | None]] = {}
        self._entered = ExitStack()
        self._is_entered = False
        self._experts: dict[tuple[int, Place], Listener] = {}
        self._sums_RD: Tensor | None = None  # rows x dim; None: hooks are idle
        self._rows_tokens = (0, 0)
        self._reached: set[str] = set()
        self._leaves = Leaves()

    def __enter__(self) -> Sketcher:
        modules, stacks = self._checked_modules()
        self._head = Head.of(self.model)
        with ExitStack() as entered:
            entered.enter_context(frozen(self.model))
            entered.callback(self.model.get_input_embeddings().register_forward_hook(self._open_graph).remove)
            for slot in self.layout.layers:
                for module in modules.get(slot.name, ()):
                    hook = module.register_forward_hook(self._listener(slot), with_kwargs=True)
                    entered.callback(hook.remove)
                if slot.name in stacks:
                    stack = stacks[slot.name]
                    self._experts[id(stack.module), stack.place] = self._expert_listener(slot)
            entered.callback(self._experts.clear)
            entered.callback(self._projections.clear)
            self._entered = entered.pop_all()
        self._is_entered = True
        if self.prefix_sharing:
            self.sharing_note = self._why_not_share()
            self.sharing = not self.sharing_note
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_entered = False
        self._entered.close()

    def sketch(self, pairs: Sequence[Pair], shared: bool = False) -> PairSketches:
        """Sketch pairs as one batch of 2N rows, or of N rows that share the prompt. Use `run` for many pairs."""
        found = self._launch(pairs, shared)
        self.settle()
        return found

    def _launch(self, pairs: Sequence[Pair], shared: bool) -> PairSketches:
        """`sketch`, but on CUDA the copies to the CPU (pinned) are under way until `settle`."""
        if not self._is_entered:
            raise RuntimeError("enter the Sketcher first: with Sketcher(...) as sketcher")
        if shared and self.both_sides:
            raise ValueError("sketches of both sides need a row for each side")
        n, device = len(pairs), self._head.weight.device
        if shared:
            batch = RowBatch.build_shared(pairs, device)
        else:
            batch = RowBatch.build([pair.rows[side] for side in (0, 1) for pair in pairs], device)
        rows, tokens = batch.ids_BT.shape
        self._rows_tokens = (rows, tokens)
        dtype = accumulation_dtype(self._head.weight.dtype)
        self._sums_RD = torch.zeros(rows, self.layout.dim, dtype=dtype, device=device)
        self._reached = set()
        try:
            with torch.enable_grad(), heard(self.model, self._experts):
                value_BC = completion_logprobs(self.model, batch, self._head, self.chunk_elements)
                value_R = value_BC.sum(dim=1)
                signed = value_R[:n].sum() - value_R[n:].sum()
                torch.autograd.grad(signed, self._checked_leaves(), allow_unused=True)
            sums_RD = self._sums_RD
        finally:
            self._sums_RD = None
            self._leaves.clear()
        silent = [slot.name for slot in self.layout.layers if slot.name not in self._reached]
        if silent:
            raise Unsketchable(f"no gradient reached {len(silent)} sketched layers (first: {silent[0]}): exclude them")
        sides = (sums_RD[:n], -sums_RD[n:]) if self.both_sides else ()
        sketch_ND = sums_RD if shared else sums_RD[:n] + sums_RD[n:]
        # of equal answers only rounding is left, which a metric of unit norms would blow up
        for k, pair in enumerate(pairs):
            if pair.chosen == pair.rejected:
                sketch_ND[k] = 0.0
        value_R = value_R.detach()
        return PairSketches(*(_to_cpu(part) for part in (sketch_ND, value_R[:n], value_R[n:], *sides)))

    def settle(self) -> None:
        """Wait for the copies that `_launch` started."""
        if self._head.weight.is_cuda:
            torch.cuda.synchronize(self._head.weight.device)

    def run(
        self,
        pairs: Sequence[Pair],
        budget: TokenBudget,
        report: Callable[[list[Pair]], None] = lambda batch: None,
        misfits: list[int] | None = None,
        reduce: Callable[[list[int], PairSketches], PairSketches] | None = None,
        memo: Memo[Sketched] | None = None,
    ) -> PairSketches:
        """Sketch any number of pairs in length-sorted batches under a token budget; results in the
        order given. `report` is told of every finished batch; `misfits` and `memo` as in `TokenBudget.run`.
        `reduce` makes what is kept of a batch (indices, sketches): large sketches never pile up."""
        if not pairs:
            raise ValueError("no pairs to sketch")

        def compute(indices: list[int]) -> list[Sketched]:
            batch = [pairs[i] for i in indices]
            got = self._launch(batch, self.sharing)
            if reduce is not None:
                self.settle()
                got = reduce(indices, got)
            report(batch)
            return [(got, k) for k in range(len(batch))]

        # a pair counts for at least its share of the memory that sums take, which matters for one-sided sketches only
        least = math.ceil(budget.tokens * 4 * self.layout.dim / _SUMS_BYTES)
        lengths = [max(pair.joined if self.sharing else pair.longest, least) for pair in pairs]
        parts = budget.run(lengths, compute, rows_per_item=1 if self.sharing else 2, misfits=misfits, memo=memo)
        self.settle()
        if not parts:
            none_ND, none_N = torch.zeros(0, self.layout.dim), torch.zeros(0)
            return PairSketches(none_ND, none_N, none_N, *((none_ND, none_ND) if self.both_sides else ()))
        return PairSketches.cat([batch.rows([k]) for batch, k in parts])

    def _why_not_share(self) -> str:
        """Why this model's prompts cannot be shared, from one short pair computed both ways; empty when they can."""
        if self.both_sides:
            return "prompts are computed twice: sketches of both sides need a row for each side"
        tokens = self._head.weight.shape[0]
        pair = Pair(*(tuple(i % tokens for i in ids) for ids in (PROBE.prompt, PROBE.chosen, PROBE.rejected)))
        try:
            ours, theirs = self.sketch([pair], shared=True), self.sketch([pair])
        except (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return f"prompts are computed twice: {type(self.model).__name__} cannot share them ({first_line(error)})"
        logp, logp_alone = (torch.cat([s.logp_chosen_N, s.logp_rejected_N]) for s in (ours, theirs))
        gap = float((logp - logp_alone).abs().max() / logp_alone.abs().mean())
        cosine = float(torch.cosine_similarity(ours.sketch_ND, theirs.sketch_ND))
        least = _LEAST_COSINE.get(self._head.weight.dtype, _LEAST_COSINE_HALF)
        if gap <= _LOGP_TOLERANCE and cosine >= least:  # False for values that are not finite
            return ""
        return (
            f"prompts are computed twice: shared, {type(self.model).__name__} gives another result "
            f"(log-probability off by {gap:.2%}, cosine of the sketches {cosine:.4f})"
        )

    def _checked_leaves(self) -> list[Tensor]:
        if not self._leaves.tensors:
            raise Unsketchable(f"{type(self.model).__name__} did not use its input embeddings: it cannot be sketched")
        return self._leaves.tensors

    def _checked_modules(self) -> tuple[dict[str, list[Any]], dict[str, Stack]]:
        """(modules, stacked experts) by slot."""
        refuse_adapters(self.model, self.of)
        modules, stacks = linear_layers(self.model), stacked_layers(self.model)
        for slot in self.layout.layers:
            if slot.name not in modules and slot.name not in stacks:
                raise ValueError(f"no layer {slot.name}: the layout belongs to another model")
            stack = stacks.get(slot.name)
            shape = weight_shape(modules[slot.name][0]) if stack is None else stack.shape
            if shape != (slot.out_width, slot.in_width):
                raise ValueError(f"{slot.name} is {shape}, not {(slot.out_width, slot.in_width)} as planned")
        if any(parameter.dtype == torch.float16 for parameter in self.model.parameters()):
            raise ValueError("float16 weights: gradients underflow; load bfloat16 or float32")
        return modules, stacks

    def _open_graph(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Make the embeddings' output a leaf that the graph hangs on (weights are frozen)."""
        return None if self._sums_RD is None else self._leaves.open(output)

    def _listener(self, slot: LayerSlot) -> Any:
        def forward_hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            if self._sums_RD is None or not torch.is_grad_enabled():
                return None
            output = self._leaves.open(output)
            out, in_ = self._layer_projections(slot, output)
            with torch.no_grad():
                x_BTP = apply_side(self._by_row(slot, given(args, kwargs)), in_)  # all that is kept of the input

            def backward_hook(delta: Tensor) -> None:
                if (sums_RD := self._sums_RD) is None:
                    return
                d_BTP = apply_side(self._by_row(slot, delta), out)
                self._add(slot, torch.bmm(d_BTP.to(sums_RD.dtype).transpose(1, 2), x_BTP.to(sums_RD.dtype)))

            output.register_hook(backward_hook)
            return output

        return forward_hook

    def _expert_listener(self, slot: LayerSlot) -> Listener:
        def heard_linear(packed: Packed, x_SI: Tensor, output: Tensor) -> Tensor:
            if self._sums_RD is None or not torch.is_grad_enabled():
                return output
            output = self._leaves.open(output)
            out, in_ = self._layer_projections(slot, output)
            rows, tokens = self._rows_tokens
            if len(packed.order_S) % (rows * tokens):
                raise Unsketchable(f"{slot.name} gets some tokens only: its rows cannot be told apart; exclude it")
            with torch.no_grad():
                x_SP = apply_side(x_SI, in_)

            def backward_hook(delta: Tensor) -> None:
                if (sums_RD := self._sums_RD) is not None:
                    self._add(slot, packed.sketch(delta, x_SP, out, rows, sums_RD.dtype))

            output.register_hook(backward_hook)
            return output

        return heard_linear

    def _add(self, slot: LayerSlot, s_BPP: Tensor) -> None:
        sums_RD = self._sums_RD
        assert sums_RD is not None
        sums_RD[:, slot.columns] += s_BPP.reshape(s_BPP.shape[0], -1).to(sums_RD.device)
        self._reached.add(slot.name)

    def _layer_projections(self, slot: LayerSlot, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Projections (`side_maps`) in the activations' dtype and device; drawn once while the sketcher is
        entered."""
        key = (slot.name, like.device, like.dtype)
        if key not in self._projections:
            out, in_ = side_maps(self.seed, slot, self.scales)
            self._projections[key] = (
                None if out is None else out.to(like.device, like.dtype),
                None if in_ is None else in_.to(like.device, like.dtype),
            )
        return self._projections[key]

    def _by_row(self, slot: LayerSlot, value: Tensor) -> Tensor:
        """[B, places, width] of a layer's input or output gradient."""
        rows, tokens = self._rows_tokens
        found = by_row(value, rows, tokens)
        if found is None:
            raise Unsketchable(
                f"{slot.name} gets input of shape {tuple(value.shape)} for {rows} rows of {tokens} "
                "tokens: its rows cannot be told apart; exclude it"
            )
        return found


def _to_cpu(value: Tensor) -> Tensor:
    """On the CPU; from CUDA into pinned memory while the GPU goes on (`Sketcher.settle` waits)."""
    return value.to("cpu", non_blocking=value.is_cuda)

"""Prefix sharing: a pair as one sequence [prompt | chosen | rejected], so that its prompt is computed once.

A mask hides the chosen side from the rejected one, and the rejected side's positions restart after the prompt; the first
token of either side is predicted from the last prompt position. Every token then sees what it sees in a sequence of its
own, so log-probabilities and gradients are the same up to the order of float sums. The prompt's gradient is the sum over
both sides, which is what the pair's gradient asks for.

That holds for attention whose masks and positions are arguments. State-space and convolutional layers, attention over
chunks and position biases made from padding masks read the sequence itself: `Sketcher` measures sharing against two
separate rows on the loaded model and goes without where they differ.

On the CPU the mask is dense [B, 1, T, T]. On CUDA a dense mask loses the flash kernel, so attention runs as FlexAttention
under a block mask. **The CUDA path was never run**: no GPU was at hand; tests hold only its mask function, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from stages.gradients.layers import linear_layers, weight_shape
from stages.gradients.rows import PROMPT, Pair, Sharing

_FULL, _SLIDING = "full_attention", "sliding_attention"
_MASKED = ("eager", "sdpa", "flex_attention")
"""Attention implementations that take any mask; flash kernels called by name take none."""
PROBE_WINDOW = 4
PROBE = Pair(prompt=(11, 5, 23, 8, 17, 6), chosen=(9, 31, 7, 12, 19, 14, 10), rejected=(21, 13, 27, 18, 15))
"""A pair longer than PROBE_WINDOW on every side, to measure sharing with; ids are taken modulo the vocabulary."""
_ATTENTION_COST = 3.5
"""Forward and backward of a query-key product (4 + 10 flops per channel) against a weight's (4)."""


def sharing_arguments(model: PreTrainedModel, sharing: Sharing) -> dict[str, Any]:
    """position_ids [B, T] and attention_mask (a mask, or one per attention type) of a shared batch.

    Raises ValueError for attention that takes no such mask.
    """
    config: Any = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {_FULL, _SLIDING}:
        raise ValueError(f"layers of type {', '.join(sorted(unknown))} read the sequence, not a mask")
    window = getattr(config, "sliding_window", None)
    if not kinds:
        return {"position_ids": sharing.position_BT, "attention_mask": _mask(model, sharing, window)}
    masks = {kind: _mask(model, sharing, window if kind == _SLIDING else None) for kind in (_FULL, *kinds)}
    return {"position_ids": sharing.position_BT, "attention_mask": masks}


def visible(sharing: Sharing, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Mask function (row, head, query, key) -> bool: a token sees itself, earlier tokens of the prompt and of its own
    side, no further back than the window. Of index tensors that broadcast, or of scalars (a block mask's `mask_mod`).
    """
    side_BT, position_BT = sharing.side_BT, sharing.position_BT

    def mask(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (side_BT[row, key] == PROMPT) | (side_BT[row, key] == side_BT[row, query])
        seen = own & (key <= query)
        return seen if window is None else seen & (position_BT[row, query] - position_BT[row, key] < window)

    return mask


def _mask(model: PreTrainedModel, sharing: Sharing, window: int | None) -> Any:
    """The mask in the form the model's attention takes: bool, additive, or a block mask."""
    kind = model.config.get_text_config()._attn_implementation
    if kind not in _MASKED:
        raise ValueError(f"attention implementation {kind} takes no mask of ours")
    rows, tokens = sharing.side_BT.shape
    return ALL_MASK_ATTENTION_FUNCTIONS[kind](
        batch_size=rows,
        q_length=tokens,
        kv_length=tokens,
        mask_function=visible(sharing, window),
        allow_is_causal_skip=False,
        device=sharing.side_BT.device,
        dtype=model.dtype,
    )


@contextmanager
def sharing_attention(model: PreTrainedModel) -> Iterator[None]:
    """FlexAttention in place of SDPA on CUDA while the context lasts (not run yet: see above); nothing on the CPU."""
    before = model.config.get_text_config()._attn_implementation
    switch = model.device.type == "cuda" and before == "sdpa"
    if switch:
        model.set_attn_implementation("flex_attention")
    try:
        yield
    finally:
        if switch:
            model.set_attn_implementation(before)


@contextmanager
def probe_window(model: PreTrainedModel) -> Iterator[None]:
    """A sliding window that PROBE reaches, while the context lasts: the real one would need a long row to be felt."""
    config: Any = model.config.get_text_config()
    before = getattr(config, "sliding_window", None)
    if before is not None:
        config.sliding_window = min(before, PROBE_WINDOW)
    try:
        yield
    finally:
        if before is not None:
            config.sliding_window = before


class SharingCost:
    """Whether sharing saves a pair time: a dense mask computes chosen x rejected products only to hide them."""

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config.get_text_config()
        shapes = [weight_shape(module) for _, module in linear_layers(model)]
        self._weights = sum(out_width * in_width for out_width, in_width in shapes)
        self._channels = config.num_hidden_layers * config.hidden_size
        self._dense = model.device.type != "cuda"

    def pays(self, pair: Pair) -> bool:
        """True when the prompt's matrix products cost more than the attention the mask throws away.

        Rows of their own use causal kernels: half of [T, T]. A block mask skips what it hides.
        """
        if not self._dense:
            return True
        prompt, sides = len(pair.prompt), (len(pair.chosen), len(pair.rejected))
        hidden = pair.joined**2 - sum((prompt + side) ** 2 for side in sides) / 2
        return prompt * self._weights > _ATTENTION_COST * hidden * self._channels

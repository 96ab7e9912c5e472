"""The k largest entries of tensors whose parts lie on several processes, exactly as if they were whole.

Radix selection: the bits of a non-negative float, read as an integer, order as the float does. Three rounds (six in float64) over
11-bit digits from the top, each a histogram of the entries that are still in question, summed over the processes, narrow the k-th
largest value down to all its bits. Memory: a copy of this process's magnitudes, and 2,048 counts a tensor; nothing is gathered.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from stages.train.optimizers.shard import add_up, before_me

_DIGIT = 11
_INTEGERS = {torch.float32: (torch.int32, 31), torch.float64: (torch.int64, 63)}


def keep_top_sharded_(values: list[torch.Tensor], kept: list[int], peers: dist.ProcessGroup) -> None:
    """Zero, in place, all but the kept[i] entries of largest magnitude of tensor i, of which `values[i]` are this process's
    rows; ties go to the lower position in the whole tensor. Collective: every process calls it with its part."""
    integer, _ = _INTEGERS[values[0].dtype]
    bits = [value.abs().flatten().view(integer) for value in values]
    limits, ties = _kth_largest(bits, kept, peers)
    equal = [(b == limit).nonzero().flatten() for b, limit in zip(bits, limits, strict=True)]
    here = torch.tensor([len(e) for e in equal], device=values[0].device)
    room = (ties - before_me(here, peers)).clamp_(min=0).tolist()
    for value, b, limit, e, n in zip(values, bits, limits, equal, room, strict=True):
        keep = b > limit
        keep[e[:n]] = True
        value.mul_(keep.view(value.shape))


def _kth_largest(
    bits: list[torch.Tensor], kept: list[int], peers: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per tensor the bits of its k-th largest entry over all processes, and how many of the entries that equal it are among
    the k."""
    device = bits[0].device
    high = _INTEGERS[torch.float32 if bits[0].dtype == torch.int32 else torch.float64][1]
    left, prefix = torch.tensor(kept, device=device), torch.zeros(len(kept), dtype=torch.int64, device=device)
    asked = bits
    while high:
        width = min(_DIGIT, high)
        high -= width
        digits = [(b >> high) & ((1 << width) - 1) for b in asked]
        counts = add_up(torch.stack([torch.bincount(d, minlength=1 << width) for d in digits]), peers)
        from_top = counts.flip(1).cumsum(1)
        steps = (from_top < left[:, None]).sum(1)  # digits above the one the k-th largest has
        above = torch.where(steps > 0, from_top.gather(1, (steps - 1).clamp(min=0)[:, None])[:, 0], 0)
        digit = (1 << width) - 1 - steps
        left = left - above
        prefix = (prefix << width) | digit
        asked = [b[d == wanted] for b, d, wanted in zip(asked, digits, digit, strict=True)]
    return prefix, left

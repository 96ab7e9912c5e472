"""Which entries of the weights a phase may change (ALLO, arXiv 2406.12606). docs/methods.md sections 7 and 8."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from schemas.errors import UserError
from schemas.ids import canonical_json
from stages.train.optimizers.shard import LocalRows, local

Unit = Literal["weight", "row"]
_CHUNK = 1 << 22
_SHAPES = "active entries"


class ActiveEntries:
    """name -> bool, True where the weight may change; [O, I] like the parameter, or [O, 1] for whole rows (of a stack of matrices [E, O, 1]; a
    vector, bias or norm, is one row: [1]). Parameters without an entry are free.

    The masks are kept inverted, one byte an entry, on the device of the parameter they were last used with; on disk they are bits.
    """

    def __init__(self, masks: Mapping[str, torch.Tensor]) -> None:
        self._frozen = {name: ~mask.bool() for name, mask in masks.items()}
        self._held: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._fingerprint: str | None = None

    def __bool__(self) -> bool:
        return bool(self._frozen)

    def covers(self, name: str) -> bool:
        """Whether the parameter has a mask."""
        return name in self._frozen

    def mask(self, name: str) -> torch.Tensor:
        """A copy of one mask, True where active."""
        return ~self._frozen[name]

    def whole_rows(self, name: str) -> bool:
        """Whether the parameter's mask takes or leaves whole rows."""
        frozen = self._frozen[name]
        return frozen.ndim < 2 or frozen.shape[1:].numel() == 1

    def check(self, name: str, parameter: torch.Tensor) -> None:
        """Raise UserError unless the mask fits the parameter."""
        if not self.covers(name):
            return
        shape = self._frozen[name].shape
        fits = len(shape) == parameter.ndim and all(m in (1, p) for m, p in zip(shape, parameter.shape, strict=True))
        if not fits:
            raise UserError(
                f"The mask of {name} has shape {list(shape)}, the parameter {list(parameter.shape)}", where="active"
            )

    def count(self, name: str, entries: int) -> int:
        """Active entries of a parameter with so many."""
        if not self.covers(name):
            return entries
        frozen = self._frozen[name]
        if name not in self._counts:
            self._counts[name] = int((~frozen).sum())
        return self._counts[name] * (entries // frozen.numel())

    def frozen(self, name: str, shard: LocalRows, device: torch.device) -> torch.Tensor | None:
        """The inverted mask, broadcast to the parameter's shape or of it: the rows `shard` says, on a device; None: all are free."""
        if not self.covers(name):
            return None
        if shard.peers is not None:
            return self._rows(name, shard, device)
        if self._frozen[name].device != device:
            self._frozen[name] = self._frozen[name].to(device)
        return self._frozen[name]

    def zero_(self, name: str, values: torch.Tensor, shard: LocalRows | None = None) -> None:
        """Set what is not active to exactly 0, in place; values: of the parameter's shape, or the rows of it that `shard` says."""
        if not self.covers(name):
            return
        if shard is None or isinstance(values, DTensor):
            shard = LocalRows.of(name, values)
        values = local(values)
        frozen = self.frozen(name, shard, values.device)
        assert frozen is not None
        values.masked_fill_(frozen, 0)

    def _rows(self, name: str, shard: LocalRows, device: torch.device) -> torch.Tensor:
        """What `shard` says of the inverted mask; a mask of one row is that of every row."""
        if name not in self._held or self._held[name].device != device:
            frozen = self._frozen[name]
            self._held[name] = (shard.take(frozen) if len(frozen) == shard.shape[0] else frozen).to(device)
        return self._held[name]

    @contextmanager
    def on_gradients(self, parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> Iterator[None]:
        """Inside, every gradient is masked as soon as it is accumulated: before anything clips its norm."""

        def hook(name: str) -> Callable[[torch.Tensor], None]:
            def masked(parameter: torch.Tensor) -> None:
                if parameter.grad is not None:
                    self.zero_(name, parameter.grad)

            return masked

        covered = [(name, p) for name, p in parameters if self.covers(name)]
        handles = [p.register_post_accumulate_grad_hook(hook(name)) for name, p in covered]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def fingerprint(self) -> str:
        """Hash of the masks; "" when there are none."""
        if self._fingerprint is None:
            content = hashlib.blake2b(digest_size=16)
            for name in sorted(self._frozen):
                content.update(canonical_json([name, list(self._frozen[name].shape)]).encode())
                content.update(_pack(~self._frozen[name]).numpy().tobytes())
            self._fingerprint = content.hexdigest() if self._frozen else ""
        return self._fingerprint

    def save(self, path: Path | str) -> None:
        """As one safetensors file, a bit an entry."""
        shapes = {name: list(frozen.shape) for name, frozen in self._frozen.items()}
        packed = {name: _pack(~frozen) for name, frozen in self._frozen.items()}
        save_file(packed, path, metadata={_SHAPES: json.dumps(shapes)})

    @classmethod
    def load(cls, path: Path | str) -> ActiveEntries:
        """What `save` wrote. Raises UserError for any other file."""
        with safe_open(str(path), framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(_SHAPES)
            if text is None:
                raise UserError("These are not masks of active entries", where=str(path))
            return cls({n: _unpack(file.get_tensor(n), tuple(shape)) for n, shape in json.loads(text).items()})


def _pack(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.packbits(mask.to("cpu").numpy().reshape(-1)))


def _unpack(bits: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    flat = np.unpackbits(bits.numpy(), count=torch.Size(shape).numel())
    return torch.from_numpy(flat.astype(np.bool_)).view(shape)


@dataclass(frozen=True)
class SelectedEntries:
    """masks: True where selected, of the scores' shapes.  wanted: max(1, round(share * entries)), the units asked for.  kept: those
    selected: fewer when fewer have a score above 0."""

    masks: dict[str, torch.Tensor]
    wanted: int
    kept: int


def select_top(names: Iterable[str], score: Callable[[str], torch.Tensor], share: float) -> SelectedEntries:
    """The `share` of entries with the largest scores over all tensors together, exactly; ties go to the earlier name, then position.

    score: gives the scores (>= 0, finite) of a name; called a few times, so that nothing of the size of the model is kept. An entry
    with score 0 is never selected. The threshold is found by two histograms of the float32 bit patterns (which order like the numbers): no
    sort, no copy. Raises UserError, naming the tensor, for scores that are not finite, and when all are 0.
    """
    ordered = list(names)
    high = _histogram(ordered, score, lambda bits: bits >> 16, 1 << 15)
    entries, kept = int(high.sum()), 0
    wanted = max(1, round(share * entries))
    upper, above = _bin(high, wanted)
    inside = _histogram(ordered, score, lambda bits: bits[(bits >> 16) == upper] & 0xFFFF, 1 << 16)
    lower, over = _bin(inside, wanted - above)
    threshold, ties = (upper << 16) | lower, wanted - above - over
    masks = {}
    for name in ordered:
        scores = score(name)
        bits = _bits(name, scores)
        mask = bits > threshold
        if threshold and ties:
            equal = (bits == threshold).nonzero().flatten()[:ties]
            mask[equal] = True
            ties -= len(equal)
        kept += int(mask.sum())
        masks[name] = mask.view(scores.shape).cpu()
    if not kept:
        raise UserError("Nothing changed: every score is 0", where="train.allo.mask", fix="Raise train.learning_rate.")
    return SelectedEntries(masks, wanted, kept)


def _bits(name: str, scores: torch.Tensor) -> torch.Tensor:
    """Non-negative float32 as integers of the same order, flat."""
    flat = scores.detach().to(torch.float32).contiguous().view(-1)
    bits = flat.view(torch.int32)
    if bits.numel() and (int(bits.max()) >= 0x7F800000 or int(bits.min()) < 0):
        raise UserError(f"The scores of {name} are not finite numbers >= 0", where="train.allo.mask")
    return bits


def _histogram(
    names: list[str],
    score: Callable[[str], torch.Tensor],
    key: Callable[[torch.Tensor], torch.Tensor],
    bins: int,
) -> torch.Tensor:
    counts = torch.zeros(bins, dtype=torch.int64)
    for name in names:
        for part in _bits(name, score(name)).split(_CHUNK):
            counts += torch.bincount(key(part), minlength=bins).cpu()
    return counts


def _bin(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """(the bin that holds the `wanted`-th entry from the top, how many lie in the bins above it)."""
    from_top = counts.flip(0).cumsum(0)
    place = int((from_top < wanted).sum())
    return len(counts) - 1 - place, int(from_top[place] - counts.flip(0)[place])

"""Random projections and the layout of a two-sided sketch.

A linear layer W (O x I) with per-pair gradient G (O x I) is stored as S = P_o G P_i^T (P x P),
LoGra's two-sided random projection (arXiv 2405.13954, section 3.2). Entries of P_o and P_i are
zero-mean, independent, of variance 1/P, and P_o is independent of P_i, so that E<S, S'> = <G, G'>.
For Gaussian entries

    Var<S, S'> = (1/P)   [|G^T G'|^2 + |G G'^T|^2 + 2 tr((G^T G')^2)]
               + (1/P^2) [|G|^2 |G'|^2 + <G, G'>^2 + |G^T G'|^2 + |G G'^T|^2].

A matrix depends on (user seed, layer name, side) and nothing else: every worker, device, language
and pair of a round shares it, and it is redrawn when needed instead of being stored.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

Side = Literal["out", "in"]
DEFAULT_SKETCH_DIM = 8192


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A layer that can be sketched: its qualified name and the widths of its weight W (O x I)."""

    name: str
    out_width: int
    in_width: int


@dataclass(frozen=True, slots=True)
class LayerSlot:
    """Where one layer lives in the sketch: columns [offset, offset + p * p), row-major S (out side
    x in side).

    `block` is the transformer block's index (None outside the blocks), `kind` the module's name
    inside its block, for example `self_attn.q_proj`.
    """

    name: str
    out_width: int
    in_width: int
    p: int
    offset: int
    block: int | None
    kind: str

    @property
    def size(self) -> int:
        """Number of sketch columns of this layer."""
        return self.p * self.p

    @property
    def columns(self) -> slice:
        """Columns of this layer in a sketch."""
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True)
class SketchLayout:
    """Order, widths and offsets of all sketched layers; stored in the gradients table's metadata as
    JSON."""

    layers: tuple[LayerSlot, ...]

    @property
    def dim(self) -> int:
        """Total sketch columns."""
        return sum(slot.size for slot in self.layers)

    @classmethod
    def plan(cls, shapes: Sequence[LayerShape], dim: int = DEFAULT_SKETCH_DIM) -> SketchLayout:
        """Share `dim` columns equally: P = floor(sqrt(dim / n_layers)), at least 1, at most the
        layer's narrower width.

        Raises ValueError when there is no layer, `dim` < 1, or a name occurs twice.
        """
        if not shapes:
            raise ValueError("no layer to sketch: the include/exclude patterns leave nothing")
        if dim < 1:
            raise ValueError(f"sketch.dim must be at least 1, got {dim}")
        names = [shape.name for shape in shapes]
        if len(set(names)) != len(names):
            raise ValueError("layer names must be unique")
        p_shared = max(1, math.isqrt(dim // len(shapes)))
        slots: list[LayerSlot] = []
        offset = 0
        for shape in shapes:
            p = min(p_shared, shape.out_width, shape.in_width)
            block, kind = block_and_kind(shape.name)
            slots.append(LayerSlot(shape.name, shape.out_width, shape.in_width, p, offset, block, kind))
            offset += p * p
        return cls(tuple(slots))

    def groups(self, by: Literal["model", "block", "kind", "layer"]) -> dict[str, list[slice]]:
        """Column slices of each layer group, in layer order; `model` is the single group of
        everything."""
        found: dict[str, list[slice]] = {}
        for slot in self.layers:
            key = {
                "model": "model",
                "block": "other" if slot.block is None else f"block.{slot.block}",
                "kind": slot.kind,
                "layer": slot.name,
            }[by]
            found.setdefault(key, []).append(slot.columns)
        return found

    def group_columns(self, by: Literal["model", "block", "kind", "layer"]) -> dict[str, Tensor]:
        """Column indices (int64) of each layer group; together they partition range(dim)."""
        return {
            key: torch.cat([torch.arange(s.start, s.stop) for s in slices]) for key, slices in self.groups(by).items()
        }

    def to_json(self) -> str:
        """Compact JSON; `from_json` gives an equal layout back."""
        return json.dumps({"layers": [asdict(slot) for slot in self.layers]}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> SketchLayout:
        """Read `to_json`. Raises ValueError when offsets do not follow each other (a damaged or
        edited layout)."""
        layout = cls(tuple(LayerSlot(**slot) for slot in json.loads(text)["layers"]))
        offset = 0
        for slot in layout.layers:
            if slot.offset != offset:
                raise ValueError(f"layout is damaged: {slot.name} starts at {slot.offset}, not {offset}")
            offset += slot.size
        return layout


def block_and_kind(name: str) -> tuple[int | None, str]:
    """Split `model.layers.3.self_attn.q_proj` into (3, `self_attn.q_proj`); no index gives (None,
    name)."""
    match = re.match(r"(?:.*?\.)??(\d+)\.(.+)$", name)
    return (int(match.group(1)), match.group(2)) if match else (None, name)


def projection_seed(seed: int, name: str, side: Side) -> int:
    """A 63-bit generator seed: blake2b of (user seed, layer name, side), the same everywhere."""
    digest = hashlib.blake2b(f"{seed}\x1f{name}\x1f{side}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def projection(seed: int, name: str, side: Side, p: int, width: int) -> Tensor:
    """Gaussian projection [P, width], float32 on the CPU, entries of variance 1/P.

    Drawn in float64 and rounded: the float32 generator takes a vectorised path whose last bits
    depend on the processor.
    """
    generator = torch.Generator(device="cpu").manual_seed(projection_seed(seed, name, side))
    draw = torch.randn(p, width, generator=generator, dtype=torch.float64, device="cpu")
    return (draw / math.sqrt(p)).to(torch.float32)


def layer_projections(seed: int, slot: LayerSlot) -> tuple[Tensor, Tensor]:
    """(P_o [P, O], P_i [P, I]) of one layer, float32 on the CPU."""
    return (
        projection(seed, slot.name, "out", slot.p, slot.out_width),
        projection(seed, slot.name, "in", slot.p, slot.in_width),
    )


def project_gradients(layout: SketchLayout, seed: int, gradients: Iterable[tuple[str, Tensor]]) -> Tensor:
    """Sketch [dim] of given full gradients G (O x I) by name: for tests and for re-ranking pairs
    near the cut.

    Raises ValueError when a layer of the layout is missing or its gradient has another shape.
    """
    given = dict(gradients)
    parts: list[Tensor] = []
    for slot in layout.layers:
        if slot.name not in given:
            raise ValueError(f"no gradient for layer {slot.name}")
        gradient_OI = given[slot.name]
        if tuple(gradient_OI.shape) != (slot.out_width, slot.in_width):
            raise ValueError(
                f"{slot.name}: gradient has shape {tuple(gradient_OI.shape)}, expected "
                f"{(slot.out_width, slot.in_width)}"
            )
        out_PO, in_PI = (m.to(gradient_OI) for m in layer_projections(seed, slot))
        parts.append((out_PO @ gradient_OI @ in_PI.T).reshape(-1))
    return torch.cat(parts)

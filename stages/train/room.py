"""What protected subspaces leave to train, alone and under masks, told from the shapes of the weights. docs/methods.md sections 6 and 8."""

from __future__ import annotations

import math

import torch
from torch import nn

from schemas.config.training import OrthAlignConfig, TrainConfig
from schemas.errors import UserError
from stages.train.optimizers.confine import cost


def most_directions(shape: torch.Size, sequence: OrthAlignConfig) -> int:
    """Directions an objective may protect in a matrix: q_max, and no more than its share of the narrowest side that is
    protected, so that those of all objectives together never are the whole space: none where there are fewer dimensions than objectives.
    A mask may leave less than they take: see `check_room`."""
    width = {"left": shape[0], "right": shape[1], "both": min(shape)}[sequence.side]
    return min(sequence.q_max, width // len(sequence.objectives))


def check_room(model: nn.Module, train: TrainConfig) -> list[str]:
    """What there is to say of ALLO's phases in objectives in sequence, as if a phase's weights were spread evenly and every objective protected
    all the directions it may. Raises UserError where the last objective would need more factors than `train.allo.factor_bytes`."""
    allo, sequence = train.allo, train.orthalign
    rows = allo.unit == "row"
    if not (allo.on and sequence.objectives) or (rows and sequence.side == "right"):
        return []
    across = 1 if sequence.side == "right" else 0
    shapes = {n: p.shape for n, p in model.named_parameters() if p.ndim == 2 and most_directions(p.shape, sequence)}
    held = {name: (len(sequence.objectives) - 1) * most_directions(shape, sequence) for name, shape in shapes.items()}
    notes = []
    for phase, share in _phases(train).items():
        active = {name: share * shape[across] for name, shape in shapes.items()}
        if not rows:
            columns = {
                name: torch.full((shape[1 - across],), math.ceil(active[name])) for name, shape in shapes.items()
            }
            _bounded(sum(cost(columns[name], q) for name, q in held.items()), allo.factor_bytes, phase)
        if stuck := [name for name, q in held.items() if active[name] <= q]:
            name = stuck[0]
            notes.append(
                f"the last objective will {phase} little in {len(stuck)} of {len(shapes)} matrices: a column that {phase}_ratio leaves no more"
                f" weights than there are protected directions cannot move (for example {name} {list(shapes[name])}: about {active[name]:.0f}"
                f" weights, up to {held[name]} directions); lower train.orthalign.q_max or raise train.allo.{phase}_ratio"
            )
    return notes


def _phases(train: TrainConfig) -> dict[str, float]:
    """Phase whose weights stay -> share of the weights that it trains."""
    allo = train.allo
    return ({"forget": allo.forget_ratio} if allo.forget else {}) | ({"learn": allo.learn_ratio} if allo.learn else {})


def _bounded(needed: int, most: int, phase: str) -> None:
    if needed > most:
        raise UserError(
            f"the last objective would need about {needed:,} bytes to {phase} with masks of single weights and protected subspaces"
            " together",
            where=f"train.allo.factor_bytes: {most:,}",
            fix="Set train.allo.unit: row, which needs next to none; or lower"
            f" train.allo.{phase}_ratio or train.orthalign.q_max, or raise the bound (the GPU's memory, beside all else).",
        )

"""How rows (pairs, conversations) become optimizer steps: accumulation and step counts, in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

from schemas.config.trainer import TrainerConfig
from schemas.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """micro_batch * accumulation * devices = rows per step; steps: optimizer steps of the run; notes: for people."""

    micro_batch: int
    accumulation: int
    steps_per_epoch: int
    steps: int
    warmup_steps: int
    notes: tuple[str, ...] = ()


def plan_batches(rows: int, config: TrainerConfig, devices: int = 1, part: str = "the run") -> BatchPlan:
    """Plan the steps over so many rows.

    An epoch has ceil(rows / batch_size) steps; the last one takes what is left, every row weighing the same inside
    its step. `max_steps` counts instead of `epochs`, as in transformers. A batch larger than the data is said aloud:
    each step then uses all rows. Raises UserError when batch_size is not a multiple of micro_batch_size * devices, and when
    the run, or the part of it that this is, is shorter than the window between two merges.
    """
    section = config.section
    micro, notes = _micro_batch(config, devices)
    if config.batch_size > rows:
        notes.append(
            f"{section}.batch_size {config.batch_size} is larger than the {rows} {config.rows}: each step uses them all"
        )
    steps = steps_of(rows, config)
    return BatchPlan(
        micro_batch=micro,
        accumulation=config.batch_size // (micro * devices),
        steps_per_epoch=_epoch(rows, config),
        steps=steps,
        warmup_steps=int(config.warmup_ratio * steps),
        notes=(*notes, *_cut_window(config, steps, part)),
    )


def steps_of(rows: int, config: TrainerConfig) -> int:
    """Optimizer steps over so many rows: `max_steps`, or what the epochs are together, rounded up."""
    return config.max_steps if config.max_steps > 0 else math.ceil(config.epochs * _epoch(rows, config))


def plan_last(rows: int, config: TrainerConfig, devices: int) -> BatchPlan:
    """As `plan_batches`, of the part that is trained last; raises UserError for those before it, too."""
    return [plan_batches(rows, told, devices, part) for part, told in config.parts.items()][-1]


def check_batches(config: TrainerConfig, devices: int) -> None:
    """Raise UserError where `plan_batches` would whatever the rows."""
    _micro_batch(config, devices)
    for part, told in config.parts.items():
        if told.max_steps > 0:
            _cut_window(told, told.max_steps, part)


def _epoch(rows: int, config: TrainerConfig) -> int:
    return math.ceil(rows / config.batch_size)


def _micro_batch(config: TrainerConfig, devices: int) -> tuple[int, list[str]]:
    """Rows per forward that divide a step over the devices, and what is to be said about them."""
    section, notes, micro = config.section, list[str](), config.micro_batch_size
    if devices > config.batch_size:
        raise UserError(
            f"{section}.batch_size {config.batch_size} is smaller than the {devices} processes that train together",
            where=f"{section}.batch_size, {section}.processes",
            fix="Raise the one or lower the other: each process takes part in every step.",
        )
    if micro > config.batch_size // devices:
        micro = config.batch_size // devices
        per = f" / {devices} processes" if devices > 1 else ""
        notes.append(f"{section}.micro_batch_size reduced to {section}.batch_size{per} ({micro})")
    if config.batch_size % (micro * devices):
        keys = ["batch_size", "micro_batch_size", *(["processes"] if devices > 1 else [])]
        raise UserError(
            f"{section}.batch_size {config.batch_size} is not a multiple of {section}.micro_batch_size {micro}"
            + (f" times {devices} processes" if devices > 1 else ""),
            where=", ".join(f"{section}.{key}" for key in keys),
            fix="Change one of them: micro_batch_size alters speed and memory only.",
        )
    return micro, notes


def _cut_window(config: TrainerConfig, steps: int, part: str) -> list[str]:
    window = config.window
    if window > steps:
        raise UserError(
            f"{config.section}.merge.every is {window} and {part} has {steps} steps: nothing would be merged",
            where=f"{config.section}.merge.every",
            fix="Lower it, or train longer.",
        )
    if steps % window:
        return [
            f"the last {steps % window} of {steps} steps end inside a window of {config.section}.merge.every: not merged"
        ]
    return []

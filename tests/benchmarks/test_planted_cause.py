"""One step on either half: the step is AdamW's first, the weights come back, and the loss moves as it must."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import torch

from benchmarks.planted.cause import BETA, Stepper, measure
from benchmarks.planted.damage import DamagedSet
from benchmarks.planted.sketches import Sketches
from benchmarks.planted.texts import make_pairs
from stages.models.resolve import resolve

LANGUAGES = ["en", "de"]


def weights(stepper: Stepper) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in stepper.weights.items()}


def test_the_step_is_adamws_first_and_the_weights_come_back(tiny_model: Path) -> None:
    stepper = Stepper(resolve(str(tiny_model)))
    frame = pl.DataFrame(make_pairs(LANGUAGES, 3, "easy"))
    pairs = stepper.ids(frame)
    start, before = weights(stepper), stepper.margins(pairs)
    stepper.step(pairs, 1e-3, lambda: None)
    moved, after = weights(stepper), stepper.margins(pairs)
    assert bool((after > before).float().mean() > 0.5)
    stepper.restore()
    assert all(torch.equal(value, start[name]) for name, value in weights(stepper).items())
    assert torch.equal(stepper.margins(pairs), before)

    leaves = list(stepper.weights.values())
    for weight in leaves:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(leaves, lr=1e-3, weight_decay=0.0)
    margins = torch.stack([stepper.margin(pair) for pair in pairs])
    (-torch.nn.functional.logsigmoid(BETA * (margins - before))).mean().backward()
    optimizer.step()
    largest = max(float((weight.detach() - moved[name]).abs().max()) for name, weight in stepper.weights.items())
    assert largest < 2e-5  # a step moves every weight by about 1e-3


def test_a_step_on_right_pairs_helps_the_measured_questions_more_than_one_on_flipped_pairs(tiny_model: Path) -> None:
    stepper = Stepper(resolve(str(tiny_model)))
    rows = make_pairs(LANGUAGES, 4, "easy")
    twice = [row for n in range(0, 8, 2) for row in (*rows[n : n + 2], *rows[n : n + 2])]
    frame = pl.DataFrame(twice)  # every odd question is the even one before it: what is learned there shows here
    wrong = torch.arange(16) // 2 >= 4  # of the even questions 4 and 6
    flipped = frame.with_columns(
        chosen=pl.when(pl.Series(wrong.numpy())).then("rejected").otherwise("chosen"),
        rejected=pl.when(pl.Series(wrong.numpy())).then("chosen").otherwise("rejected"),
    )
    none = torch.zeros(16, 1)
    damaged = DamagedSet(flipped, none, wrong, LANGUAGES)
    found = measure(
        stepper,
        damaged,
        Sketches(frame, none, LANGUAGES),
        -wrong.double(),
        ["en"],
        questions=4,
        learning_rate=1e-3,
        say=lambda message: None,
    )
    assert found["damaged"].to_list() == [0.0, 0.0, 1.0, 1.0]
    change = {(row["half"], row["language"]): row["change"] for row in found.iter_rows(named=True)}
    assert change["top", "en"] < change["bottom", "en"]

"""Damaged preference sets, made from sketches that exist: a flipped label is a negated sketch with its sides swapped.

    flip        the labels of some pairs flipped
    twins       the labels of some questions flipped in every language at once, as in a translated data set
    off_topic   some pairs prefer the answer to another question to the true one: flipped pairs of the easy contrast
    language    some pairs prefer the true answer in another language: flipped pairs of the language contrast
    conflict    every label of one language flipped: it prefers what the others disprefer
    null        nothing is damaged, some pairs are only called so: every filter must end at 0.5

`off_topic` is not listed for the easy contrast, where it is `flip`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from benchmarks.planted.sketches import Sketches

SOURCE = {"flip": None, "twins": None, "off_topic": "easy", "language": "language", "conflict": None, "null": None}
"""Damage -> the contrast whose flipped pairs take the damaged pairs' place (None: the set's own)."""
SHARES = (0.1, 0.25)
_SIDES = tuple(
    f"{name}{side}"
    for name in ("", "logp_", "ref_logp_", "n_", "relevance_", "null_")
    for side in ("chosen", "rejected")
)


@dataclass(frozen=True)
class Damage:
    """What is planted. share: of each language's pairs; for `conflict` of one language's, the others' stay whole."""

    contrast: str
    kind: str
    share: float
    seed: int


@dataclass(frozen=True)
class DamagedSet:
    """A preference set, question-major like its source. damaged_N: which pairs are (or, for null, are called) damaged."""

    frame: pl.DataFrame
    sketch_ND: Tensor
    damaged_N: Tensor
    languages: list[str]

    @property
    def language_N(self) -> Tensor:
        """Language index of every pair."""
        return torch.tensor([self.languages.index(code) for code in self.frame["language"]])

    def only(self, kept_N: Tensor) -> DamagedSet:
        """Some of the pairs; no longer question-major."""
        frame = self.frame.filter(pl.Series(kept_N.numpy()))
        return DamagedSet(frame, self.sketch_ND[kept_N], self.damaged_N[kept_N], self.languages)

    @property
    def question_N(self) -> Tensor:
        """Question index of every pair: what leaves the directions together."""
        return torch.arange(self.frame.height) // len(self.languages)


def plan(contrasts: Sequence[str], kinds: Sequence[str], seed: int) -> list[Damage]:
    """Every damage that can be made with these contrasts, once for a seed. The language contrast is damage only."""
    found = []
    for contrast in contrasts:
        for kind in kinds:
            source = SOURCE[kind]
            if contrast == "language" or (source is not None and (source == contrast or source not in contrasts)):
                continue
            shares = (1.0,) if kind == "conflict" else SHARES
            found += [Damage(contrast, kind, share, seed) for share in shares]
    return found


def plant(sketches: Mapping[str, Sketches], damage: Damage) -> DamagedSet:
    """The damaged set. Raises KeyError for a contrast without sketches."""
    base = sketches[damage.contrast]
    n_languages = len(base.languages)
    questions = base.frame.height // n_languages
    rng = random.Random(f"{damage.contrast} {damage.kind} {damage.share} {damage.seed}")
    hit = torch.zeros(questions, n_languages, dtype=torch.bool)
    chosen = [rng.randrange(n_languages)] if damage.kind == "conflict" else range(n_languages)
    for language in chosen:
        hit[rng.sample(range(questions), round(damage.share * questions)), language] = True
    if damage.kind == "twins":
        hit = hit[:, :1].expand(-1, n_languages)
    damaged_N = hit.flatten()
    if damage.kind == "null":
        return DamagedSet(base.frame, base.sketch_ND, damaged_N, base.languages)
    source = sketches[SOURCE[damage.kind] or damage.contrast]
    flipped = source.frame.rename({s: _other(s) for s in _SIDES if s in source.frame.columns}).select(
        base.frame.columns
    )
    mark = pl.Series(damaged_N.numpy())
    frame = base.frame.select(
        pl.when(mark).then(flipped[name]).otherwise(pl.col(name)).alias(name) for name in base.frame.columns
    )
    sketch_ND = torch.where(damaged_N[:, None], -source.sketch_ND, base.sketch_ND)
    return DamagedSet(frame, sketch_ND, damaged_N, base.languages)


def _other(side: str) -> str:
    return side.replace("chosen", "rejected") if "chosen" in side else side.replace("rejected", "chosen")

"""Random masks: a hash of (key, index) whose bits are the same everywhere and look independent.

Each statistical check is at a level of one in a million and has a fixed key: it passes or fails for good.
"""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from schemas.ids import canonical_json
from stages.train.optimizers.masks import SPAN, random_mask

KEY = (3, 0, 17, "step", "model.layers.0.mlp.up_proj.weight")
SIZE = 1 << 20
LEVEL = 1e-6


def by_hand(reserve: float, key: tuple[int | str, ...], start: int, stop: int) -> np.ndarray:
    """The documented hash in numpy's uint32: two rounds of lowbias32, a word of the key before each."""
    index = np.arange(start, stop, dtype=np.uint64)
    assert start // SPAN == (stop - 1) // SPAN
    digest = hashlib.blake2b(canonical_json([*key, start // SPAN]).encode(), digest_size=8).digest()
    first, second = np.frombuffer(digest, "<u4")

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))

    x = (index % SPAN).astype(np.uint32)
    return mix(mix(x ^ first) + second) < min(round(reserve * 2**32), 2**32 - 1)


@pytest.mark.parametrize("start", [0, 12345, SPAN - 2000, SPAN, 3 * SPAN + (1 << 31) - 7])
@pytest.mark.parametrize("reserve", [1e-9, 0.01, 0.5, 0.999])
def test_the_mask_is_the_documented_hash_on_any_machine(start: int, reserve: float) -> None:
    stop = start + 1999
    assert random_mask(reserve, KEY, start, stop).numpy().tolist() == by_hand(reserve, KEY, start, stop).tolist()


def test_masks_do_not_depend_on_how_a_tensor_is_cut() -> None:
    """Two, three and many workers see the mask one worker sees, across a change of the key's words too."""
    for begin in (0, SPAN - 5000):
        size = 12_345
        whole = random_mask(0.3, KEY, begin, begin + size)
        for workers in (2, 3, 7, 64):
            edges = [begin + size * i // workers for i in range(workers + 1)]
            parts = [random_mask(0.3, KEY, a, b) for a, b in pairwise(edges)]
            assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("reserve", [0.0005, 0.01, 0.1, 0.5, 0.9])
def test_the_share_kept_is_the_asked_one(reserve: float) -> None:
    kept = int(random_mask(reserve, KEY, 0, SIZE).sum())
    assert stats.binomtest(kept, SIZE, reserve).pvalue > LEVEL
    assert bool(random_mask(1.0, ("any",), 0, 10).all())


@pytest.mark.parametrize("reserve", [0.01, 0.5])
@pytest.mark.parametrize("lag", [1, 2, 3, 16, 64, 896, 1024, 4096, 65_536])
def test_neighbours_and_rows_are_not_correlated(lag: int, reserve: float) -> None:
    """Serial correlation at distances that are neighbours, powers of two and rows of matrices: normal with variance 1 / n."""
    mask = random_mask(reserve, KEY, 0, SIZE).double()
    centred = (mask - reserve) / math.sqrt(reserve * (1 - reserve))
    z = float((centred[lag:] * centred[:-lag]).sum()) / math.sqrt(SIZE - lag)
    assert 2 * stats.norm.sf(abs(z)) > LEVEL


@pytest.mark.parametrize("width", [8, 10])
def test_runs_of_bits_are_uniform(width: int) -> None:
    """Chi-square over all patterns of `width` neighbouring entries."""
    bits = random_mask(0.5, KEY, 0, SIZE).view(-1)[: SIZE // width * width].view(-1, width).long()
    counts = torch.bincount((bits << torch.arange(width)).sum(1), minlength=1 << width).numpy()
    assert LEVEL < stats.chisquare(counts).pvalue < 1 - LEVEL


@pytest.mark.parametrize(
    "other",
    [
        (4, 0, 17, "step", KEY[4]),
        (3, 1, 17, "step", KEY[4]),
        (3, 0, 18, "step", KEY[4]),
        (3, 0, 17, "task", KEY[4]),
        (3, 0, 17, "step", "model.layers.1.mlp.up_proj.weight"),
    ],
    ids=["seed", "phase", "step", "what", "name"],
)
@pytest.mark.parametrize("shift", [0, 1, 64])
def test_masks_of_other_keys_are_independent(other: tuple[int | str, ...], shift: int) -> None:
    """Chi-square of the four combinations, also where one mask would be the other moved along."""
    reserve = 0.3
    a, b = random_mask(reserve, KEY, 0, SIZE - shift), random_mask(reserve, other, shift, SIZE)
    counts = torch.bincount(2 * a.long() + b.long(), minlength=4).numpy()
    q = 1 - reserve
    expected = (SIZE - shift) * np.array([q * q, q * reserve, reserve * q, reserve * reserve])
    assert stats.chisquare(counts, expected).pvalue > LEVEL


def test_a_hundred_steps_keep_every_entry_equally_often() -> None:
    """No entry is favoured: counts of 100 masks are binomial, seen in their variance."""
    size, steps, reserve = 1 << 14, 100, 0.2
    counts = sum(random_mask(reserve, (3, 0, step, "step", "w"), 0, size).double() for step in range(steps))
    assert isinstance(counts, torch.Tensor)
    spread = float(((counts - steps * reserve) ** 2).sum()) / (steps * reserve * (1 - reserve))
    assert LEVEL < stats.chi2.sf(spread, size) < 1 - LEVEL

"""What studies 3 and 4 compare: pools, their arms, the languages and the methods."""

from __future__ import annotations

SEEN, UNSEEN = ("de", "es", "fr"), ("en", "ru")
"""Languages that are trained on, and those that only held-out pairs are in."""
POOLS: dict[str, tuple[str, float]] = {
    "undamaged": ("flip", 0.0),
    "10% flips": ("flip", 0.1),
    "20% flips": ("flip", 0.2),
    "40% flips": ("flip", 0.4),
    "20% off-topic": ("off_topic", 0.2),
}
"""Name -> kind and share of the damage."""
ARMS = ("all", "random", "curated", "baseline", "oracle")
CELLS = tuple((pool, arm) for pool, (_, share) in POOLS.items() for arm in ARMS if share or arm != "oracle")
"""(pool, arm). Of an undamaged pool the oracle's half is the random one."""
MANY = tuple((pool, arm) for pool, arm in CELLS if pool != "10% flips" and (arm != "baseline" or pool == "40% flips"))
"""Of these, those that are measured with `SPLIT` held-out pairs in either group of languages too."""
SPLIT = 400

METHODS = (
    "AdamW",
    "DPO beta 1",
    "offline linear, SFT share 0.5",
    "OnDARE paper, alpha 0.002",
    "OnTIES paper, alpha 0.002",
    "anchor, alpha 0.03",
    "DPO, random 10%",
    "DPO, top 10%",
    "forgetting and learning",
)
"""What study 4 trains on one objective, as `benchmarks.quality` names it."""
SEQUENCE = ("mixed DPO, as many steps in all", "sequential DPO", "OrthAlign, left")
"""What it trains on two, of these names."""


def table_of(split: int = 0) -> str:
    """Of the rows with `split` held-out pairs in either group of languages; 0: with 40 a language."""
    return f"training, {split} held out" if split else "training"

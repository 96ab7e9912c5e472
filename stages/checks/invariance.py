"""Whether a pair's gradient sketch depends on the batch it is computed in, for this model, dtype and attention kernel.

Rows of a batch never mix, but kernels may sum in another order for other shapes. What is measured is what the gradients
stage stores: the sketch of each pair alone against the same pair in one batch, as cosine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from schemas.config import RunConfig
from schemas.errors import UserError
from stages.checks.examples import shipped
from stages.checks.finding import Finding
from stages.contract import ModelRef
from stages.gradients.batching import TokenBudget
from stages.gradients.layers import select_layers
from stages.gradients.logprobs import check_head
from stages.gradients.pair_sketches import PairSketches
from stages.gradients.projections import SketchLayout
from stages.gradients.rows import Pair
from stages.gradients.sketcher import Sketcher
from stages.gradients.stage import shares_prefixes
from stages.models.device import device_of, dtype_of, free_memory
from stages.models.load import load_text_model, load_with_adapter
from stages.text.render import load_renderer

FINE, USABLE = 0.99, 0.95
_PAIRS = 5


def sample_pairs(model: ModelRef, config: RunConfig, count: int) -> list[Pair]:
    """Shipped pairs of unequal lengths in the run's languages, tokenised; English ones if the package has no others."""
    renderer = load_renderer(model, config.text, config.model.trust_remote_code)
    languages = [code for code in config.languages.seen if shipped("authored_pairs", code)] or ["en"]
    rows = [shipped("authored_pairs", languages[n % len(languages)])[n] for n in range(count)]
    pairs = []
    for n, row in enumerate(rows):
        sides = [
            [{"role": "assistant", "content": " ".join([row[side]] * (1 + n % 3))}] for side in ("chosen", "rejected")
        ]
        ids = renderer.pair_ids([{"role": "user", "content": row["prompt"]}], *sides)
        pairs.append(Pair(tuple(ids.prompt), tuple(ids.chosen), tuple(ids.rejected)))
    longest = config.text.max_length
    return [pair for pair in pairs if pair.longest <= longest] or pairs[:1]


def invariance_findings(model: ModelRef, config: RunConfig) -> Iterator[Finding]:
    """Load the model as the gradients stage does, sketch some pairs alone and together, compare; times both."""
    of = config.gradients.of
    load = load_text_model if of == "weights" else load_with_adapter
    policy = load(model, dtype_of(config), device_of(config), config.model.trust_remote_code)
    size = sum(p.numel() * p.element_size() for p in policy.parameters())
    what = f"{model.name}: {sum(p.numel() for p in policy.parameters()) / 1e9:.2f} billion parameters, {policy.dtype}"
    yield Finding("weights", "ok", f"{what} on {policy.device}, {size / 2**30:.2f} GiB", values={"bytes": size})
    pairs = sample_pairs(model, config, _PAIRS)
    try:
        alone, together, seconds = _sketched(policy, config, pairs)
    except ValueError as error:
        raise UserError(f"Gradients cannot be sketched: {error}", where="gradients.sketch") from error
    finally:
        kernel = getattr(policy.config, "_attn_implementation", "default")
        del policy
        free_memory()
    cosine = float(torch.nn.functional.cosine_similarity(alone.sketch_ND, together.sketch_ND).min())
    tokens = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in pairs)
    values: dict[str, float | str] = {
        "cosine": cosine,
        "seconds_per_pair": seconds / len(pairs),
        "tokens": tokens / len(pairs),
    }
    drift = float((alone.logp_chosen_N - together.logp_chosen_N).abs().max())
    what = (
        f"least cosine of a sketch alone and in a batch of {len(pairs)} pairs: {cosine:.6f}; log-probabilities differ by "
        f"{drift:.3g} at most ({config.model.dtype}, attention {kernel})"
    )
    if cosine >= FINE:
        yield Finding("batch_invariance", "ok", what, values=values)
    else:
        fix = (
            "Scores near the cut will depend on the batching: set model.dtype: float32, or gradients.token_budget: 64, "
            "which computes every pair alone."
        )
        yield Finding("batch_invariance", "warning" if cosine >= USABLE else "problem", what, fix, values)


def _sketched(policy: Any, config: RunConfig, pairs: list[Pair]) -> tuple[PairSketches, PairSketches, float]:
    """Of each pair alone and of all in one batch, and the seconds that the batch took. On return nothing here holds the policy: the
    next check needs the device."""
    check_head(policy)
    sketch, of = config.gradients.sketch, config.gradients.of
    coverage = select_layers(policy, sketch.include, sketch.exclude, of)
    layout = SketchLayout.plan(coverage.layers, sketch.dim, sketch.method, sketch.rank)
    with Sketcher(policy, layout, sketch.seed, prefix_sharing=shares_prefixes(config), of=of) as sketcher:
        alone = sketcher.run(pairs, TokenBudget(1))
        begun = time.monotonic()
        together = sketcher.run(pairs, TokenBudget(len(pairs) * 2 * max(pair.longest for pair in pairs)))
        return alone, together, time.monotonic() - begun

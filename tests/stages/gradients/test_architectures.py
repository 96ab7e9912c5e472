"""Sketches against autograd's gradient of the model's own logits, prompts apart and shared, on some of every kind of model.

All architectures: `python -m benchmarks.architectures`, whose table is in docs/models.md.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.architectures import FINE, PAIRS, SEED, gradient, outcome
from benchmarks.tiny_models import tiny_config, tiny_model
from stages.gradients.batching import TokenBudget
from stages.gradients.layers import select_layers
from stages.gradients.preconditioner import second_moments
from stages.gradients.projections import SketchLayout
from stages.gradients.sketcher import Sketcher

EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "qwen2_moe", "qwen3_vl_moe")
WRAPPERS = ("gemma3", "mistral3", "qwen2_5_vl")
OTHERS = (
    "minicpm3",
    "mamba",
    "jamba",
    "zamba2",
    "recurrent_gemma",
    "qwen3_next",
    "falcon",
    "llama4_text",
    "gemma4_text",
)


@pytest.mark.parametrize("name", [*EXPERTS, *WRAPPERS, *OTHERS])
def test_sketches_are_the_gradient_of_the_models_own_logits(name) -> None:
    found = outcome(name)
    assert not found.refusal
    assert found.error <= 1e-5
    assert found.sharing == (name not in ("mamba", "jamba", "zamba2", "recurrent_gemma", "qwen3_next", "falcon"))
    assert (found.experts is not None) == (name in EXPERTS or name in ("jamba", "qwen3_next"))
    assert (found.experts or 0.0) <= 1e-5


@pytest.mark.parametrize("method", ["one_sided", "exact"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_routed_experts_are_right_however_they_are_compressed(name, method) -> None:
    model = tiny_model(tiny_config(name))
    coverage = select_layers(model, ["*.experts.*"])
    layout = SketchLayout.plan(coverage.layers, 1000, method, rank=4)
    with Sketcher(model, layout, SEED, both_sides=True) as sketcher:
        got = sketcher.sketch(PAIRS)
    for n, pair in enumerate(PAIRS):
        want = gradient(model, pair, coverage, layout)
        assert (got.sketch_ND[n] - want).norm() <= 1e-5 * want.norm()
    torch.testing.assert_close(got.chosen_ND - got.rejected_ND, got.sketch_ND)


def test_the_second_moments_of_routed_experts_are_those_of_the_gradient() -> None:
    model = tiny_model(tiny_config("qwen3_moe"))
    coverage = select_layers(model, ["*.experts.down_proj"])
    exact = SketchLayout.plan(coverage.layers, 1000, "exact")
    g_N = torch.stack([gradient(model, pair, coverage, exact) for pair in PAIRS])
    found, used = second_moments(model, coverage.layers, list(PAIRS), TokenBudget(1000), 0)
    assert used == len(PAIRS)
    for slot in exact.layers:
        square_OI = g_N[:, slot.columns].view(-1, *slot.shape).double().square().mean(dim=0)
        rows, columns = found[slot.name]
        assert torch.cosine_similarity(rows, square_OI.mean(dim=1), dim=0) > 0.9  # estimates, by random projections
        assert torch.cosine_similarity(columns, square_OI.mean(dim=0), dim=0) > 0.9


def test_layers_that_share_a_weight_get_the_gradient_of_the_weight() -> None:
    model = tiny_model(tiny_config("llama"))
    for kind in ("up_proj", "down_proj"):
        getattr(model.model.layers[1].mlp, kind).weight = getattr(model.model.layers[0].mlp, kind).weight
    coverage = select_layers(model)
    layout = SketchLayout.plan(coverage.layers, 2000)
    with Sketcher(model, layout, SEED) as sketcher:
        got = sketcher.sketch(PAIRS)
    for n, pair in enumerate(PAIRS):
        want = gradient(model, pair, coverage, layout)
        assert (got.sketch_ND[n] - want).norm() <= 1e-5 * want.norm()


def test_a_branch_that_does_not_start_at_the_embeddings_is_seen() -> None:
    """Half of a layer's gradient comes from a call whose input has none of its own."""
    model = tiny_model(tiny_config("llama"))
    mlp, table = model.model.layers[0].mlp, torch.randn(100, 32)
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + mlp.down_proj(mlp.up_proj(table[: x.shape[1]].expand(x.shape)))
    coverage = select_layers(model)
    assert "model.layers.0.mlp.up_proj" in {layer.name for layer in coverage.layers}
    layout = SketchLayout.plan(coverage.layers, 2000)
    with Sketcher(model, layout, SEED) as sketcher:
        got = sketcher.sketch(PAIRS)
    for n, pair in enumerate(PAIRS):
        want = gradient(model, pair, coverage, layout)
        assert (got.sketch_ND[n] - want).norm() <= FINE * want.norm()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bert", "transforms its logits in a way this version does not know"),
        ("blip-2", "cannot be run on text alone"),
        ("cpmant", "is not causal"),
    ],
)
def test_what_cannot_be_sketched_is_refused_in_words(name, words) -> None:
    assert words in outcome(name).refusal

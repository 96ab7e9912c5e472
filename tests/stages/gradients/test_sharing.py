"""A prompt computed once gives the log-probabilities and sketches of two separate rows, or it is not shared."""

from __future__ import annotations

import pytest
import torch

from stages.gradients.batching import TokenBudget
from stages.gradients.layers import select_layers
from stages.gradients.projections import SketchLayout
from stages.gradients.rows import Pair, RowBatch
from stages.gradients.sketcher import Sketcher

SHARING = (
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "mistral_sliding", "phi", "phi3"),
    *("gpt2", "cohere", "granite", "gemma2_eager"),
)
NOT_SHARING = ("bloom", "mamba", "lfm2")


def entered(model, dim=600, **options) -> Sketcher:
    return Sketcher(model, SketchLayout.plan(select_layers(model).layers, dim), seed=3, **options)


@pytest.mark.parametrize("architecture", SHARING)
def test_shared_prompts_change_nothing(architecture, make_model, make_pairs, fresh_seed) -> None:
    pairs = make_pairs(8, seed=fresh_seed)
    with entered(make_model(architecture), prefix_sharing=True) as sketcher:
        assert sketcher.sharing, sketcher.sharing_note
        shared, apart = sketcher.sketch(pairs, shared=True), sketcher.sketch(pairs)
    assert torch.cosine_similarity(shared.sketch_ND, apart.sketch_ND).min() >= 0.99999
    error = (shared.sketch_ND - apart.sketch_ND).norm(dim=1) / apart.sketch_ND.norm(dim=1)
    assert error.max() <= 1e-4
    torch.testing.assert_close(shared.logp_chosen_N, apart.logp_chosen_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared.logp_rejected_N, apart.logp_rejected_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "phi"])  # others compute their norms in float32 in any case
def test_shared_prompts_are_exact_in_float64(architecture, make_model, make_pairs) -> None:
    pairs = make_pairs(5, seed=2)
    with entered(make_model(architecture, dtype=torch.float64)) as sketcher:
        shared, apart = sketcher.sketch(pairs, shared=True), sketcher.sketch(pairs)
    torch.testing.assert_close(shared.sketch_ND, apart.sketch_ND, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", NOT_SHARING)
def test_models_that_read_the_sequence_itself_are_measured_and_left_alone(architecture, make_model, make_pairs) -> None:
    pairs = make_pairs(3, seed=1)
    model = make_model(architecture)
    with entered(model) as sketcher:
        want = sketcher.run(pairs, TokenBudget(1000))
    with entered(model, prefix_sharing=True) as sketcher:
        assert not sketcher.sharing
        assert type(model).__name__ in sketcher.sharing_note
        got = sketcher.run(pairs, TokenBudget(1000))
    assert torch.equal(got.sketch_ND, want.sketch_ND)


@pytest.mark.parametrize("budget", [1, 60, 5000])
def test_run_shares_in_any_batch_and_keeps_the_order(budget, make_model, make_pairs) -> None:
    pairs = make_pairs(9, seed=6)
    model = make_model("gemma3")
    with entered(model) as sketcher:
        apart = sketcher.run(pairs, TokenBudget(5000))
    batches: list[list[Pair]] = []
    with entered(model, prefix_sharing=True) as sketcher:
        together = sketcher.run(pairs, TokenBudget(budget), batches.append)
    assert torch.cosine_similarity(together.sketch_ND, apart.sketch_ND).min() >= 0.99999
    torch.testing.assert_close(together.logp_chosen_N, apart.logp_chosen_N, rtol=1e-5, atol=1e-5)
    assert sorted((pair for batch in batches for pair in batch), key=repr) == sorted(pairs, key=repr)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(pair.joined for pair in batch) <= budget


@pytest.mark.parametrize("architecture", ["gemma2", "gemma2_eager"])
def test_the_model_is_left_as_it_was(architecture, make_model, make_pairs) -> None:
    model = make_model(architecture)
    before = model.config._attn_implementation
    with entered(model, prefix_sharing=True) as sketcher:
        sketcher.run(make_pairs(2), TokenBudget(100))
    assert model.config._attn_implementation == before


def test_an_attention_kernel_that_is_not_known_is_left_alone(make_model, make_pairs) -> None:
    model = make_model("gemma2")
    with entered(model) as sketcher:
        model.config._attn_implementation_internal = "flex_attention"
        with pytest.raises(ValueError, match="its attention is flex_attention"):
            sketcher.sketch(make_pairs(1), shared=True)


def test_pairs_that_do_not_fit_are_named_by_their_place(make_model, make_pairs, monkeypatch) -> None:
    model, pairs = make_model("llama"), make_pairs(6, seed=4)
    with entered(model, prefix_sharing=True) as sketcher:
        launch = sketcher._launch

        def small(batch, shared):
            if any(pair in (pairs[1], pairs[4]) for pair in batch):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return launch(batch, shared)

        monkeypatch.setattr(sketcher, "_launch", small)
        misfits: list[int] = []
        got = sketcher.run(pairs, TokenBudget(1000), misfits=misfits)
    assert sorted(misfits) == [1, 4]
    with entered(model) as sketcher:
        want = sketcher.sketch([pairs[i] for i in (0, 2, 3, 5)])
    torch.testing.assert_close(got.sketch_ND, want.sketch_ND, rtol=1e-4, atol=1e-4)


def test_both_sides_are_never_shared(make_model, make_pairs) -> None:
    with entered(make_model("llama"), both_sides=True, prefix_sharing=True) as sketcher:
        assert "both sides" in sketcher.sharing_note
        assert sketcher.run(make_pairs(2), TokenBudget(100)).chosen_ND is not None
        with pytest.raises(ValueError, match="row for each side"):
            sketcher.sketch(make_pairs(2), shared=True)


def test_the_first_rejected_token_is_predicted_from_the_prompt() -> None:
    batch = RowBatch.build_shared([Pair((5, 6), (7, 8), (9, 10, 11)), Pair((1,), (2,), (3,))])
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8, 9, 10, 11], [1, 2, 3, 0, 0, 0, 0]]
    assert batch.sharing.position_BT.tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 1, 0, 0, 0, 0]]
    assert batch.sharing.shape == (4, 5)
    assert batch.row_M.tolist() == [0, 0, 1, 0, 0, 0, 1]
    assert batch.at_M.tolist() == [1, 2, 0, 1, 4, 5, 0]
    assert batch.target_M.tolist() == [7, 8, 2, 9, 10, 11, 3]
    spread = batch.spread(torch.arange(1.0, 8.0)).tolist()
    assert spread == [[1, 2, 0], [3, 0, 0], [4, 5, 6], [7, 0, 0]]
    for pair in (Pair((), (1,), (2,)), Pair((1,), (), (2,)), Pair((1,), (2,), ())):
        with pytest.raises(ValueError, match="tokens"):
            RowBatch.build_shared([pair])


def test_taking_rows_apart_and_joining_them_has_the_gradient_of_indexing() -> None:
    """Against plain indexing, whose gradient autograd knows."""
    pairs = [Pair((5, 6), (7, 8), (9, 10, 11)), Pair((1, 2, 3, 4), (2,), (3, 3, 3, 3))]
    sharing = RowBatch.build_shared(pairs).sharing
    torch.manual_seed(0)
    ours = torch.randn(2, 3, 9, 4, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_(True)
    rows = sharing.apart(ours)
    assert rows.shape == (4, 3, 8, 4)
    weights = torch.randn(4, 8, 3, 4, dtype=torch.float64)
    joined = sharing.join((rows.transpose(1, 2) * weights).tanh())
    want_total = torch.zeros((), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for b, pair in enumerate(pairs):
        p, c, end = len(pair.prompt), len(pair.chosen), pair.joined
        for row, places in ((b, list(range(p + c))), (2 + b, [*range(p), *range(p + c, end)])):
            taken = theirs[b][:, places].transpose(0, 1)
            torch.testing.assert_close(rows[row, :, : len(places)].transpose(0, 1), taken)
            value = (taken * weights[row, : len(places)]).tanh()
            kept = slice(0, None) if row < 2 else slice(p, None)  # the prompt is joined from the chosen row
            want_total = want_total + (value[kept] ** 2).sum()
        total = total + (joined[b, :end] ** 2).sum()
    torch.testing.assert_close(total, want_total)
    total.backward()
    want_total.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    both = sharing.apart(ours.detach().requires_grad_(True))
    assert both.requires_grad
    (grad,) = torch.autograd.grad(sharing.apart(theirs).square().sum(), theirs)
    torch.testing.assert_close(grad[0, :, :2], 4 * theirs[0, :, :2].detach())  # twice: in both rows
